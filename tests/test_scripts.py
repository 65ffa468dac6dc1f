"""Every script, run as a user would run it."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from plaintrain.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "scripts" / "plain_train_net.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

# A detector that takes milliseconds: 4 layers, 64 pixels, a dozen images.
TINY = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_tiny_backbone, FREEZE_AT: 0}
  TINY: {CHANNELS: [8, 16], OUT_CHANNELS: 16, NORM: BN}
  ANCHOR_GENERATOR: {SIZES: [[16, 32]]}
  RPN: {PRE_NMS_TOPK_TRAIN: 50, PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 20}
  ROI_HEADS: {BATCH_SIZE_PER_IMAGE: 16, POSITIVE_FRACTION: 0.5, SCORE_THRESH_TEST: 0.01}
  ROI_BOX_HEAD: {FC_DIM: 16}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}
DATASETS:
  DECLARE:
    few_train: {FORMAT: shapes, SPLIT: train, NUM: 12, HEIGHT: 64, WIDTH: 64}
    few_val: {FORMAT: shapes, SPLIT: val, NUM: 6, HEIGHT: 64, WIDTH: 64}
  TRAIN: [few_train]
  TEST: [few_val]
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {OPTIMIZER: AdamW, IMS_PER_BATCH: 4, BASE_LR: 0.002, STEPS: [], WARMUP_ITERS: 2,
  MAX_ITER: 12, CHECKPOINT_PERIOD: 5}
LOG_PERIOD: 2
OUTPUT: {REPORT: False}
SEED: 3
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def run(*args, script=TRAIN, cwd=None, timeout=120):
    command = [sys.executable, str(script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)


def train(config, folder, *args):
    """A run that must succeed."""
    flags = [a for a in args if str(a).startswith("--")]
    overrides = [a for a in args if a not in flags]
    done = run("--config-file", config, *flags, "OUTPUT_DIR", folder, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def losses(folder):
    return {m["iteration"]: m["total_loss"] for m in metrics(folder) if "total_loss" in m}


def start_slow_run(config, folder, *args):
    """A run of many iterations in the background, once it has saved a checkpoint."""
    command = [sys.executable, TRAIN, "--config-file", config, *args, "OUTPUT_DIR", folder]
    command += ["SOLVER.MAX_ITER", "5000"]
    reader, writer = os.pipe()
    process = subprocess.Popen(
        list(map(str, command)),
        env=ENV,
        # Ended by the same Ctrl-C, `tee` reads no more.
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as CI may be, hands down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(reader)
    os.close(writer)
    deadline = time.time() + 90
    while not (folder / "last_checkpoint").exists():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.05)
    return process


def test_a_run_leaves_everything_and_eval_only_and_resume_agree_with_it(config, tmp_path):
    out = tmp_path / "out"
    done = train(config, out, "--debug", "SOLVER.CHECKPOINT_MAX_TO_KEEP", 1, "TEST.EVAL_PERIOD", 6)
    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "inference"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "report.html" not in names
    assert {n for n in names if re.fullmatch(r"model_\d+\.pth", n)} == {"model_0000009.pth"}
    assert "AP50" in done.stdout and "eta:" in done.stdout and "Traceback" not in done.stderr
    lines = metrics(out)
    assert [m["iteration"] for m in lines] == [1, 3, 5, 7, 9, 11]
    assert {"lr", "time", "data_time", "grad_norm", "loss_cls", "loss_rpn_loc"} <= set(lines[0])
    assert [m["iteration"] for m in lines if "few_val/bbox/AP" in m] == [5, 11]
    evaluated = run(
        *("--config-file", config, "--eval-only", "OUTPUT_DIR", tmp_path / "eval"),
        *("MODEL.WEIGHTS", out / "model_final.pth", "TEST.IMS_PER_BATCH", 1),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads((tmp_path / "eval/inference/few_val/coco_instances_results.json").read_text())
    assert results == json.loads((out / "inference/few_val/coco_instances_results.json").read_text())
    assert len(results) > 0
    # A second run keeps the first in old-1.
    train(config, out, "SOLVER.MAX_ITER", 2)
    assert losses(out / "old-1") == losses_of(lines)
    assert list(losses(out)) == [1]


def losses_of(lines):
    return {m["iteration"]: m["total_loss"] for m in lines if "total_loss" in m}


def test_a_killed_run_resumes_from_its_last_checkpoint(config, tmp_path):
    out = tmp_path / "out"
    process = start_slow_run(config, out)
    process.kill()
    process.communicate()
    last = (out / "last_checkpoint").read_text()
    done = int(re.search(r"\d+", last).group())
    finished = train(config, out, "--resume", "SOLVER.MAX_ITER", done + 8)
    assert f"starting training from iteration {done + 1}" in finished.stdout
    iterations = [m["iteration"] for m in metrics(out)]
    assert iterations == sorted(set(iterations)) and iterations[-1] == done + 7
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == done + 7


def test_fine_tuning_with_fewer_classes_starts_at_iteration_0(config, tmp_path):
    out = tmp_path / "out"
    train(config, out, "SOLVER.MAX_ITER", 6)
    other = tmp_path / "other.yaml"
    # The real data would be another set; a COCO file of two of the classes stands in for it.
    images = [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}]
    boxes = [(1, [4, 4, 20, 20]), (2, [30, 30, 20, 24])]
    annotations = [
        {"id": i, "image_id": 1, "category_id": c, "bbox": b, "iscrowd": 0, "area": 400}
        for i, (c, b) in enumerate(boxes)
    ]
    categories = [{"id": 1, "name": "circle"}, {"id": 2, "name": "square"}]
    from PIL import Image

    Image.new("RGB", (64, 64), "gray").save(tmp_path / "a.png")
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    spec = f"{{FORMAT: coco, JSON: {tmp_path}/a.json, IMAGE_ROOT: {tmp_path}}}"
    other.write_text(
        f"_BASE_: tiny.yaml\nDATASETS:\n  DECLARE:\n    two: {spec}\n  TRAIN: [two]\n  TEST: [two]\n"
    )
    tuned = train(other, tmp_path / "tuned", "MODEL.WEIGHTS", out / "model_final.pth", "SOLVER.MAX_ITER", 4)
    assert "starting training from iteration 0" in tuned.stdout
    assert (
        "other shape   roi_heads.box_predictor.cls_score.weight: [4, 16] there, [3, 16] here" in tuned.stdout
    )
    assert list(losses(tmp_path / "tuned")) == [1, 3]
    # Also from its own folder, whose files move aside first.
    again = train(config, out, "MODEL.WEIGHTS", out / "model_final.pth", "SOLVER.MAX_ITER", 2)
    assert "starting training from iteration 0" in again.stdout and "loaded" in again.stdout


# What turns the tiny detector into another, and the losses and scores that it then has.
HEADS = {
    "mask and keypoint": (
        [
            *["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8],
            *["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[8]"],
            *["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1, 0.1]"],
            *["INPUT.AUGMENTATIONS", "['SimpleCopyPaste', {'RandomIoUCrop': {'trials': 5}}]"],
        ],
        {"loss_mask", "loss_keypoint", "few_val/bbox/AP", "few_val/segm/AP", "few_val/keypoints/AP"},
    ),
    "proposals": (
        ["MODEL.META_ARCHITECTURE", "ProposalNetwork"],
        {"loss_rpn_cls", "few_val/box_proposals/AR@100"},
    ),
    "RetinaNet": (["MODEL.META_ARCHITECTURE", "RetinaNet"], {"loss_box_reg", "few_val/bbox/AP"}),
    "FCOS": (
        [
            *["MODEL.META_ARCHITECTURE", "FCOS", "MODEL.TINY.OUT_CHANNELS", 32],
            *["MODEL.ANCHOR_GENERATOR.SIZES", "[[4]]", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]"],
        ],
        {"loss_fcos_ctr", "few_val/bbox/AP"},
    ),
    "SSD": (
        [
            *["MODEL.META_ARCHITECTURE", "SSD", "MODEL.SSD.HEAD_NAME", "SSDLiteHead"],
            *["MODEL.SSD.ASPECT_RATIOS", "[[2]]", "MODEL.SSD.SCALES", "[]", "MODEL.SSD.STEPS", "[]"],
            *["INPUT.FIXED_SIZE", "(48, 64)", "INPUT.AUGMENTATIONS", "['RandomPhotometricDistort']"],
        ],
        {"loss_cls", "loss_box_reg", "few_val/bbox/AP"},
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_detector_trains_with_the_same_script(config, tmp_path, head):
    overrides, logged = HEADS[head]
    train(config, tmp_path / "out", *overrides, "SOLVER.MAX_ITER", 4)
    assert logged <= set(metrics(tmp_path / "out")[-1])


def test_masks_and_keypoints_of_two_processes_are_scored_together(config, tmp_path):
    overrides, logged = HEADS["mask and keypoint"]
    train(config, tmp_path / "out", *overrides, "SOLVER.MAX_ITER", 2)
    weights = ["MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth"]
    scores = []
    for folder, processes in (("one", 1), ("two", 2)):
        done = run(
            *(
                "--config-file",
                config,
                "--eval-only",
                "--num-gpus",
                processes,
                "OUTPUT_DIR",
                tmp_path / folder,
            ),
            *(*overrides, *weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        )
        assert done.returncode == 0, done.stderr
        results = tmp_path / folder / "inference" / "few_val" / "coco_instances_results.json"
        scores.append((re.findall(r"copypaste: (?!Task).*", done.stdout), json.loads(results.read_text())))
    assert scores[0] == scores[1]
    assert {"bbox", "segmentation", "keypoints", "score"} <= scores[0][1][0].keys()


def test_two_processes_on_the_cpu_train_and_evaluate(config, tmp_path):
    out = tmp_path / "out"
    done = train(config, out, "--num-gpus=2", "SOLVER.MAX_ITER", 4, "OUTPUT.REPORT", True)
    assert (out / "log.txt.rank1").exists()
    assert done.stdout.count("the report of this run is in") == 1
    assert "Finished: 4 of 4 iterations" in (out / "report.html").read_text()
    assert "few_val/bbox/AP" in metrics(out)[-1] and "Traceback" not in done.stderr
    # The ranks split one batch: the same first loss but for the proposals that each rank samples.
    train(config, tmp_path / "one", "SOLVER.MAX_ITER", 4)
    assert losses(out)[1] == pytest.approx(losses(tmp_path / "one")[1], rel=0.2)


def test_ctrl_c_ends_a_run_with_one_line(config, tmp_path):
    process = start_slow_run(config, tmp_path / "out", "--num-gpus", "1")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGINT: the run stops after this step" in stderr and "Traceback" not in stderr
    log = (tmp_path / "out/log.txt").read_text()
    assert "the run has stopped, with a checkpoint; go on with --resume" in log


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(config, tmp_path):
    done = run("--config-file", config, "OUTPUT_DIR", tmp_path / "out", "SOLVER.BASE_LR", "1e30")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"became NaN or infinite at iteration \d+", done.stderr)
    assert "shapes://train/" in done.stderr
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_model_with_an_expected_result_fails_when_it_misses_it(config, tmp_path):
    expected = "[['bbox', 'AP', 99.0, 0.5]]"
    args = ("OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", 2, "TEST.EXPECTED_RESULTS", expected)
    done = run("--config-file", config, *args)
    assert done.returncode == 1 and "expected 99.0 +- 0.5" in done.stderr
    assert (tmp_path / "out" / "model_final.pth").exists()


# ---- wrong input: one sentence, exit code not 0, no traceback ----------------------------------


def _bad_annotations(tmp_path, **changes):
    image = {"id": 1, "file_name": "missing.png", "height": 64, "width": 64}
    annotation = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}
    content = {
        "images": [image],
        "annotations": [{**annotation, **changes}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "bad.json").write_text(json.dumps(content))


def _wrong_inputs(tmp_path):
    coco = f"{{FORMAT: coco, JSON: {tmp_path}/bad.json, IMAGE_ROOT: {tmp_path}}}"
    dataset = f"_BASE_: tiny.yaml\nDATASETS:\n  DECLARE:\n    bad: {coco}\n  TRAIN: [bad]\n  TEST: [bad]\n"
    (tmp_path / "bad.yaml").write_text(dataset)
    (tmp_path / "typo.yaml").write_text("SOLVER:\n  BASE_LRR: 1\n")
    return tmp_path / "bad.yaml"


@pytest.fixture
def in_process(monkeypatch, capsys, tmp_path):
    """The script's `launch(main, ...)` in this process: (exit code, stderr)."""
    before = set(DatasetCatalog.list())

    def call(*args):
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *map(str, args)])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path / "empty"))
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(TRAIN), run_name="__main__")
        return exit_info.value.code, capsys.readouterr().err

    yield call
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


_CONFIG = ["--config-file", "tiny.yaml"]
_BAD = ["--config-file", "bad.yaml"]
_MISTAKES = {
    "no config": ([], r"DATASETS\.TRAIN and DATASETS\.TEST are empty: give --config-file"),
    "no data": (["DATASETS.TRAIN", "('coco_2017_train',)"], r"annotation file .*instances_train2017\.json"),
    "missing file": (["--config-file", "nowhere.yaml"], r"config file not found: .*nowhere\.yaml"),
    "misspelt key": (["--config-file", "typo.yaml"], r"BASE_LRR in .*typo\.yaml.*SOLVER\.BASE_LR\b"),
    "misspelt override": (["SOLVER.MAXITER", "3"], r"SOLVER\.MAXITER.*command line.*SOLVER\.MAX_ITER"),
    "odd override": ([*_CONFIG, "SEED"], r"pairs KEY VALUE.*SEED"),
    "unknown dataset": ([*_CONFIG, "DATASETS.TRAIN", "('shape_train',)"], "shapes_train"),
    "not JSON": (_BAD, r"bad\.json is not JSON"),
    "class id": (_BAD, r"annotation 7 in .*bad\.json has category_id 9.*\[1\]"),
    "missing image": (_BAD, r"missing\.png"),
    "weights": ([*_CONFIG, "MODEL.WEIGHTS", "no.pth"], r"no\.pth.*no such file"),
    "eval-only": ([*_CONFIG, "--eval-only"], r"--eval-only needs weights"),
    "no gpus": ([*_CONFIG, "--num-gpus", "0"], r"--num-gpus 0"),
    "flag last": ([*_CONFIG, "SEED", "1", "--resume"], r"--resume stands after the"),
    "device": ([*_CONFIG, "MODEL.DEVICE", "gpu"], r"MODEL\.DEVICE is 'gpu'"),
    "classes": ([*_CONFIG, "MODEL.ROI_HEADS.NUM_CLASSES", "80"], r"80.*few_train has 3"),
}


@pytest.mark.parametrize("what", _MISTAKES)
def test_a_mistake_is_answered_with_one_sentence(what, config, tmp_path, in_process):
    args, said = _MISTAKES[what]
    _wrong_inputs(tmp_path)
    if what == "not JSON":
        (tmp_path / "bad.json").write_text("<html>")
    else:
        _bad_annotations(tmp_path, **({"category_id": 9} if what == "class id" else {}))
    code, stderr = in_process(*args)
    assert code not in (0, None)
    assert re.search(said, stderr), stderr
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert "error: " in last
    # A run that cannot start touches no earlier one.
    assert not (tmp_path / "output").exists()


def test_debug_shows_the_traceback(in_process):
    code, stderr = in_process("--debug")
    assert code == 1 and "Traceback" in stderr


def test_more_gpus_than_there_are_is_refused(in_process, monkeypatch, config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    code, stderr = in_process("--config-file", config, "--num-gpus", "9")
    assert code == 1 and "--num-gpus is 9, but this machine has 8 GPU(s)" in stderr
    assert "Traceback" not in stderr


# ---- other people's loops ------------------------------------------------------------------------


def _seed_loop():
    """The training script printed in the second seed document, or None without the document."""
    folder = ROOT.parent / "shared" / "seeds"
    for path in sorted(folder.glob("001_*.txt")) if folder.is_dir() else []:
        text = path.read_text(encoding="utf-8")
        start, end = text.index("import logging\n"), text.index("\nsetup() ")
        return text[start:end].replace("detectron2", "plaintrain")
    return None


def test_the_loop_of_the_seed_trains_with_only_the_package_name_changed(config, tmp_path):
    loop = _seed_loop()
    if loop is None:
        pytest.skip("the seed document is not there")
    script = tmp_path / "seed.py"
    script.write_text(loop)
    out = tmp_path / "out"
    args = ("OUTPUT_DIR", out, "SOLVER.MAX_ITER", 400, "SOLVER.BASE_LR", 0.005)
    done = run("--config-file", config, *args, script=script)
    assert done.returncode == 0, done.stderr
    values = list(losses(out).values())
    assert len(values) >= 3 and values[-1] < values[0]
    first, last = first_and_last_total_loss(out)
    assert last < first / 2


def first_and_last_total_loss(out):
    lines = [m for m in metrics(out) if "total_loss" in m]
    return lines[0]["total_loss"], lines[-1]["total_loss"]
