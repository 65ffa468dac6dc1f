"""scripts/test_net.py, run as a user would: weights or a file of predictions, and what it leaves."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "test_net.py"
FOUND, RESULTS = "coco_instances_results.json", "results.json"

# A Mask and Keypoint R-CNN that takes milliseconds; the second dataset is scored as VOC.
TINY = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_tiny_backbone, FREEZE_AT: 0}
  TINY: {CHANNELS: [8, 16], OUT_CHANNELS: 16, NORM: BN}
  ANCHOR_GENERATOR: {SIZES: [[16, 32]]}
  RPN: {PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TEST: 20}
  ROI_HEADS: {SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {FC_DIM: 16}
  MASK_ON: True
  ROI_MASK_HEAD: {NUM_CONV: 1, CONV_DIM: 8}
  KEYPOINT_ON: True
  ROI_KEYPOINT_HEAD: {CONV_DIMS: [8]}
INPUT: {MIN_SIZE_TEST: 64}
DATASETS:
  DECLARE:
    test_net_coco: {FORMAT: shapes, SPLIT: val, NUM: 6, HEIGHT: 64, WIDTH: 64}
    test_net_voc: {FORMAT: shapes, SPLIT: val, NUM: 5, HEIGHT: 64, WIDTH: 72, EVALUATOR: pascal_voc}
  TRAIN: [test_net_coco]
  TEST: [test_net_coco, test_net_voc]
DATALOADER: {NUM_WORKERS: 0}
TEST: {DETECTIONS_PER_IMAGE: 8, KEYPOINT_OKS_SIGMAS: [0.1, 0.1, 0.1, 0.1]}
SEED: 3
"""
COCO, VOC = ("DATASETS.TEST", "('test_net_coco',)"), ("DATASETS.TEST", "('test_net_voc',)")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the config and two checkpoints, a.pth and b.pth."""
    folder = tmp_path_factory.mktemp("test_net")
    (folder / "tiny.yaml").write_text(TINY)
    cfg = get_cfg()
    cfg.merge_from_file(folder / "tiny.yaml")
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4])
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        torch.save({"model": build_model(cfg).state_dict(), "iteration": seed}, folder / f"{name}.pth")
    return folder


@pytest.fixture
def call(files, monkeypatch, capsys, tmp_path):
    """Runs the script in this process, in `tmp_path`: its exit code, stdout and stderr."""

    def call(*args, code=0):
        command = [SCRIPT, "--config-file", files / "tiny.yaml", *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in command])
        monkeypatch.chdir(tmp_path)
        done = SimpleNamespace(code=0)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as e:
            done.code = e.code
        done.out, done.err = capsys.readouterr()
        assert done.code == code, done.out + done.err
        return done

    return call


def evaluate(call, files, folder, *args):
    return call("OUTPUT_DIR", folder, "MODEL.WEIGHTS", files / "a.pth", *args)


def content(folder, name):
    """{dataset: the bytes of a file of that name} below an output folder."""
    return {path.parent.name: path.read_bytes() for path in (folder / "inference").glob(f"*/{name}")}


def test_each_dataset_gets_its_predictions_and_its_results(call, files, tmp_path):
    done = evaluate(call, files, tmp_path / "out")
    out = tmp_path / "out" / "inference"
    results = {
        name: json.loads((out / name / RESULTS).read_text(), parse_constant=pytest.fail)
        for name in ("test_net_coco", "test_net_voc")
    }
    assert [list(result) for result in results.values()] == [["test_net_coco"], ["test_net_voc"]]
    coco, voc = results["test_net_coco"]["test_net_coco"], results["test_net_voc"]["test_net_voc"]
    assert list(coco) == ["bbox", "segm", "keypoints"] and list(voc) == ["bbox"]
    assert {"AP", "AP50", "APl", "AP-circle"} <= coco["bbox"].keys() and coco["bbox"]["APl"] is None
    assert set(voc["bbox"]) == {"AP", "AP50", "AP75", "AP50-circle", "AP50-square", "AP50-triangle"}
    # What it prints is what it writes.
    for metrics in (*coco.values(), *voc.values()):
        row = [value for name, value in metrics.items() if "-" not in name]
        assert "copypaste: " + ",".join(f"{float('nan') if v is None else v:.4f}" for v in row) in done.out
    assert any(0 < value < 100 for value in coco["bbox"].values() if value is not None)
    for name, images in (("test_net_coco", 6), ("test_net_voc", 5)):
        found = json.loads((out / name / FOUND).read_text())
        assert {d["image_id"] for d in found} <= set(range(1, images + 1)) and len(found) > images
        assert {d["category_id"] for d in found} <= {1, 2, 3}
        assert all({"bbox", "score", "segmentation", "keypoints"} <= d.keys() for d in found)


def test_a_file_of_predictions_scores_as_the_model_that_wrote_it(call, files, tmp_path):
    evaluate(call, files, tmp_path / "model")
    for name, choice in (("test_net_coco", COCO), ("test_net_voc", VOC)):
        path = tmp_path / "model" / "inference" / name / FOUND
        call("--predictions", path, "OUTPUT_DIR", tmp_path / "file", *choice)
    for name in (FOUND, RESULTS, "voc_results.json"):
        written = content(tmp_path / "file", name)
        assert written == content(tmp_path / "model", name) and written


@pytest.mark.long
def test_two_processes_find_and_score_what_one_does(call, files, tmp_path):
    evaluate(call, files, tmp_path / "one")
    predictions = tmp_path / "one" / "inference" / "test_net_coco" / FOUND
    for folder, flags, overrides in (
        ("two", [], ["MODEL.WEIGHTS", files / "a.pth"]),
        ("file", ["--predictions", predictions], COCO),
    ):
        command = [sys.executable, SCRIPT, "--config-file", files / "tiny.yaml", "--num-gpus", 2, *flags]
        command += ["OUTPUT_DIR", tmp_path / folder, *overrides]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)), env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / folder / "log.txt.rank1").exists()
    for name in (FOUND, RESULTS):
        one = content(tmp_path / "one", name)
        assert content(tmp_path / "two", name) == one
        assert content(tmp_path / "file", name) == {"test_net_coco": one["test_net_coco"]}


def fake_run(files, folder):
    """The folder of a run whose last checkpoint is b.pth; returns its files' contents."""
    folder.mkdir()
    for source, name in (("b", "model_0000001"), ("a", "model_0000000"), ("a", "model_final")):
        shutil.copy(files / f"{source}.pth", folder / f"{name}.pth")
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    for name in ("config.yaml", "log.txt", "metrics.json"):
        (folder / name).write_text(f"{name} of the run\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_evaluated_from_its_last_checkpoint_and_stays_as_it_is(call, files, tmp_path):
    run = tmp_path / "run"
    before = fake_run(files, run)
    call("--resume", "OUTPUT_DIR", run, *COCO)
    call("OUTPUT_DIR", tmp_path / "b", "MODEL.WEIGHTS", files / "b.pth", *COCO)
    evaluate(call, files, tmp_path / "a", *COCO)
    assert content(run, FOUND) == content(tmp_path / "b", FOUND) != content(tmp_path / "a", FOUND)
    predictions = tmp_path / "a" / "inference" / "test_net_coco" / FOUND
    call("--predictions", predictions, "OUTPUT_DIR", run, *COCO)
    call("--eval-only", "OUTPUT_DIR", run, "MODEL.WEIGHTS", run / "model_final.pth", *COCO)
    assert content(run, FOUND) == content(tmp_path / "a", FOUND)
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    log = after.pop("log.txt")
    assert log.startswith(before.pop("log.txt")) and log.count(b"command line:") == 3
    assert after == before


@pytest.mark.parametrize("which", ["MODEL.WEIGHTS", "--resume"])
def test_of_a_checkpoint_with_averaged_weights_those_are_evaluated_unless_told_otherwise(
    call, files, tmp_path, which
):
    for name in "ab":
        call("OUTPUT_DIR", tmp_path / name, "MODEL.WEIGHTS", files / f"{name}.pth", *COCO)
    state, averaged = (torch.load(files / f"{name}.pth")["model"] for name in "ab")
    ema = {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in averaged.items()}}
    path = tmp_path / "out" / "model_0000004.pth"
    path.parent.mkdir()
    torch.save({"model": state, "ema": ema, "iteration": 4}, path)
    flags, weights = (["--resume"], []) if which == "--resume" else ([], ["MODEL.WEIGHTS", path])
    for more, same in (
        (["MODEL.EMA.ENABLED", "True"], "b"),
        (["MODEL.EMA.ENABLED", "True", "MODEL.EMA.EVALUATE", "raw"], "a"),
    ):
        call(*flags, "OUTPUT_DIR", tmp_path / "out", *weights, *COCO, *more)
        assert content(tmp_path / "out", FOUND) == content(tmp_path / same, FOUND)


def test_the_file_that_is_read_is_not_written(call, files, tmp_path):
    folder = tmp_path / "out" / "inference" / "test_net_coco"
    folder.mkdir(parents=True)
    # With a key that no evaluator writes.
    found = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5, "note": "mine"}]
    (folder / FOUND).write_text(json.dumps(found))
    call("--predictions", folder / FOUND, "OUTPUT_DIR", tmp_path / "out", *COCO)
    assert json.loads((folder / FOUND).read_text()) == found
    assert "bbox" in json.loads((folder / RESULTS).read_text())["test_net_coco"]


def test_a_file_is_scored_without_images_weights_or_a_model_that_can_be_built(call, files, tmp_path):
    image = {"id": 4, "file_name": "missing.png", "height": 64, "width": 64}
    box = {"id": 7, "image_id": 4, "category_id": 9, "bbox": [4, 4, 40, 40], "iscrowd": 0, "area": 1600}
    data = {"images": [image], "annotations": [box], "categories": [{"id": 9, "name": "a"}]}
    (tmp_path / "truth.json").write_text(json.dumps(data))
    found = [{"image_id": 4, "category_id": 9, "bbox": [4, 4, 40, 40], "score": 0.5}]
    (tmp_path / "found.json").write_text(json.dumps(found))
    spec = f"{{FORMAT: coco, JSON: {tmp_path}/truth.json, IMAGE_ROOT: {tmp_path}}}"
    (tmp_path / "other.yaml").write_text(
        f"MODEL: {{WEIGHTS: nowhere.pth, BACKBONE: {{NAME: build_my_backbone}}}}\n"
        f"DATASETS: {{DECLARE: {{test_net_other: {spec}}}, TEST: [test_net_other]}}\n"
    )
    call("--config-file", "other.yaml", "--predictions", "found.json", "OUTPUT_DIR", "out")
    results = json.loads((tmp_path / "out/inference/test_net_other" / RESULTS).read_text())
    assert results["test_net_other"]["bbox"]["AP"] == pytest.approx(100)


def test_precision_and_test_time_augmentation_are_those_of_the_config(call, files, tmp_path):
    evaluate(call, files, tmp_path / "plain", *COCO)
    evaluate(call, files, tmp_path / "amp", *COCO, "TEST.AMP", "True", "SOLVER.AMP.PRECISION", "bfloat16")
    sizes = ("TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", "True")
    evaluate(call, files, tmp_path / "tta", *COCO, "TEST.AUG.ENABLED", "True", *sizes)
    plain, amp, tta = (
        json.loads(content(tmp_path / folder, FOUND)["test_net_coco"]) for folder in ("plain", "amp", "tta")
    )
    # bfloat16 has 8 bits: about the same scores, but not the same.
    assert plain != amp and amp[0]["score"] == pytest.approx(plain[0]["score"], rel=0.1)
    assert tta != plain and {d["image_id"] for d in tta} == {d["image_id"] for d in plain}


def test_results_are_compared_with_those_expected(call, files, tmp_path):
    predictions = tmp_path / "found.json"
    predictions.write_text("[]")
    args = ("OUTPUT_DIR", tmp_path / "out", *COCO, "TEST.EXPECTED_RESULTS")
    done = call("--predictions", predictions, *args, "[['bbox', 'AP', 0.0, 0.5]]")
    assert "results are as TEST.EXPECTED_RESULTS says" in done.out
    for given in (["--predictions", predictions], []):
        weights = () if given else ("MODEL.WEIGHTS", files / "a.pth")
        shutil.rmtree(tmp_path / "out")
        done = call(*given, *args, "[['bbox', 'AP', 99.0, 0.5]]", *weights, code=1)
        assert "expected 99.0 +- 0.5" in done.err and "Traceback" not in done.err
        assert (tmp_path / "out/inference/test_net_coco" / RESULTS).exists()


_FILE = ["--predictions", "found.json"]
_MISTAKES = {
    "nothing": ([*COCO], r"nothing to evaluate: give MODEL\.WEIGHTS FILE, --resume .* or --predictions FILE"),
    "no dataset": (["DATASETS.TEST", "()", "MODEL.WEIGHTS", "a.pth"], r"DATASETS\.TEST is empty"),
    "no weights": (["MODEL.WEIGHTS", "no.pth"], r"no\.pth.*no such file"),
    "two of them": ([*_FILE, "MODEL.WEIGHTS", "a.pth", *COCO], r"--predictions and MODEL\.WEIGHTS are given"),
    "resume and weights": (["--resume", "MODEL.WEIGHTS", "a.pth"], r"--resume and MODEL\.WEIGHTS are given"),
    "file and views": ([*_FILE, *COCO, "TEST.AUG.ENABLED", "True"], r"--predictions runs no model: .* False"),
    "file and precision": ([*_FILE, *COCO, "TEST.AMP", "True"], r"--predictions runs no model: .* False"),
    "resume and file": (["--resume", *_FILE, *COCO], r"--predictions and --resume are given"),
    "overfit": (["--overfit", "2", "MODEL.WEIGHTS", "a.pth"], r"--overfit and --dry-run are for training"),
    "dry run": (["--dry-run", "MODEL.WEIGHTS", "a.pth"], r"--overfit and --dry-run are for training"),
    "two datasets": (_FILE, r"names 2: test_net_coco, test_net_voc; choose one"),
    "no file": (["--predictions", "no.json", *COCO], r"--predictions no\.json: there is no such file"),
}


@pytest.mark.parametrize("what", _MISTAKES)
def test_a_mistake_is_answered_with_one_sentence_before_anything_is_made(call, tmp_path, what):
    args, said = _MISTAKES[what]
    (tmp_path / "found.json").write_text("[]")
    _assert_refused(call(*args, code=1), said)
    assert not (tmp_path / "output").exists()


def _assert_refused(done, said):
    assert re.search(said, done.err), done.err
    assert len(done.err.strip().splitlines()) == 1 and done.err.startswith("error: ")


def test_what_is_found_too_late_to_make_nothing_is_answered_with_one_sentence(call, tmp_path):
    _assert_refused(call("--resume", *COCO, code=1), r"--resume: there is no checkpoint in \./output")
    detection = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    for text, said in (
        ("<html>", r"the results file found\.json is not JSON"),
        (json.dumps([detection | {"image_id": 77}]), r"detection 0 in found\.json is of image 77"),
    ):
        (tmp_path / "found.json").write_text(text)
        _assert_refused(call(*_FILE, *COCO, code=1), said)
    assert not (tmp_path / "output" / "inference").exists()
