"""The training scripts, run as a user would run them, and the old names of flags."""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from PIL import Image
from processes import CONFIG, MASKS_AND_KEYPOINTS, ROOT, Run, run_script, write_config
from run_files import lines

TRAIN = ROOT / "scripts" / "plain_train_net.py"
RESULTS = "inference/few_val/coco_instances_results.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; `folder` is its OUTPUT_DIR."""
    options = ["SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 5, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 1]
    options += ["TEST.EVAL_PERIOD", 6, "TEST.BEST_METRIC", "", "LOG_PERIOD", 2]
    return Run(tmp_path_factory.mktemp("finished") / "out", options, flags=["--debug"]).wait(code=0)


def test_run_leaves_its_files_and_metrics(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "inference"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "report.html" not in names and "model_best.pth" not in names
    assert {n for n in names if re.fullmatch(r"model_\d+\.pth", n)} == {"model_0000009.pth"}
    assert "AP50" in finished.output and "eta:" in finished.output and "Traceback" not in finished.output
    rows = lines(finished.folder)
    assert list(rows) == [1, 3, 5, 7, 9, 11]
    assert {"lr", "grad_norm", "loss_cls", "loss_rpn_loc"} <= set(rows[1])
    assert [i for i, row in rows.items() if "few_val/bbox/AP" in row] == [5, 11]


@pytest.mark.parametrize("script", ["plain", "epoch"])
def test_eval_only_finds_what_the_run_found_and_compares_it_with_what_is_expected(finished, tmp_path, script):
    options = ["MODEL.WEIGHTS", finished.folder / "model_final.pth", "TEST.IMS_PER_BATCH", 1]
    options += ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.5]]"]
    run = Run(tmp_path / "out", options, flags=["--eval-only"], script=script).wait(code=1)
    assert "expected 99.0 +- 0.5" in run.output and "Traceback" not in run.output
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert results and results == json.loads((finished.folder / RESULTS).read_text())


def coco_file(folder, category_id=2):
    """Write a COCO file of one image of two classes, and a config that trains on it; returns its path."""
    box = {"image_id": 1, "bbox": [4, 4, 20, 20], "iscrowd": 0, "area": 400}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}],
        "annotations": [{**box, "id": 1, "category_id": 1}, {**box, "id": 2, "category_id": category_id}],
        "categories": [{"id": 1, "name": "circle"}, {"id": 2, "name": "square"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    spec = f"{{FORMAT: coco, JSON: {folder}/a.json, IMAGE_ROOT: {folder}}}"
    datasets = f"{{DECLARE: {{two: {spec}}}, TRAIN: [two], TEST: [two]}}"
    write_config(folder)
    (folder / "coco.yaml").write_text(f"_BASE_: config.yaml\nDATASETS: {datasets}\n")
    return folder / "coco.yaml"


def test_fine_tuning_with_fewer_classes_starts_at_iteration_0(finished, tmp_path):
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "a.png")
    options = ["OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", finished.folder / "model_final.pth"]
    options += ["SOLVER.MAX_ITER", 2, "INPUT.CROP.ENABLED", False]
    command = ["plain_train_net.py", "--config-file", coco_file(tmp_path), *options]
    tuned = run_script(*command, folder=tmp_path, code=0)
    assert "starting training from iteration 0" in tuned.output
    assert "roi_heads.box_predictor.cls_score.weight: [4, 16], the model has [3, 16]" in tuned.output
    assert list(lines(tmp_path / "out")) == [0, 1]


PASTE_AND_CROP = "['SimpleCopyPaste', {'RandomIoUCrop': {'trials': 5}}]"
# What turns the tiny detector into another, and the losses and scores that it then has.
DETECTORS = {
    "mask and keypoint": (
        [*MASKS_AND_KEYPOINTS, "INPUT.AUGMENTATIONS", PASTE_AND_CROP],
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


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_train_with_the_same_script(tmp_path, name):
    options, logged = DETECTORS[name]
    Run(tmp_path / "out", [*options, "SOLVER.MAX_ITER", 2]).wait(code=0)
    assert logged <= set(lines(tmp_path / "out")[1])


def test_ranks_are_spawned_by_a_script_that_is_started_from_a_shell(tmp_path):
    # The only test with interpreters of its own: what a script hands to its ranks is pickled there.
    out, config = tmp_path / "out", write_config(tmp_path)
    command = [sys.executable, TRAIN, "--config-file", config, "--num-gpus", 2, "OUTPUT_DIR", out]
    command += ["SOLVER.MAX_ITER", 2, "OUTPUT.REPORT", True]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (out / "log.txt.rank1").exists() and "few_val/bbox/AP" in lines(out)[1]
    assert done.stdout.count("the report of this run is in") == 1
    assert "Finished: 2 of 2 iterations" in (out / "report.html").read_text()


USER_CODE = """
import os
from plaintrain.data import DatasetCatalog, MetadataCatalog
for name in ("train", "val"):
    DatasetCatalog.register(f"my_{name}", lambda: list(DatasetCatalog.get("shapes_val"))[:4])
    MetadataCatalog.get(f"my_{name}").set(thing_classes=["circle", "square", "triangle"])
open(f"imported-{os.getpid()}", "x").close()
"""


def test_datasets_of_imported_code_are_known_to_ranks_and_scripts(tmp_path):
    (tmp_path / "my_data.py").write_text(USER_CODE)
    train = [sys.executable, TRAIN, "--import", "my_data.py", "--config-file", write_config(tmp_path)]
    train += ["--num-gpus", "2", "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", "out"]
    train += ["DATASETS.TRAIN", "('my_train',)", "DATASETS.TEST", "('my_val',)"]
    subprocess.run(train, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    # The first process and its two ranks import it once.
    assert len(list(tmp_path.glob("imported-*"))) == 3
    path = str(tmp_path / "my_data.py")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["starts"][0]["imports"] == [path]
    unknown = run_script("analyze_errors.py", "out", folder=tmp_path, cwd=tmp_path)
    assert "'my_val' is not registered" in unknown.output and f"has used --import {path}:" in unknown.output
    run_script("analyze_errors.py", "out", "--import", "my_data", folder=tmp_path, cwd=tmp_path, code=0)


# ---- mistakes -------------------------------------------------------------------------------------

TINY, COCO = ["--config-file", "config.yaml"], ["--config-file", "coco.yaml"]
# (script, command line, what the error says)
MISTAKES = [
    ("plain", [], r"DATASETS\.TRAIN and DATASETS\.TEST are empty; set --config-file"),
    ("epoch", ["SOLVER.MAXITER", "3"], r"SOLVER\.MAXITER.*command line.*SOLVER\.MAX_ITER"),
    ("plain", COCO, r"annotation 2 in .*a\.json has category_id 9.*\[1, 2\]"),
    (
        "plain",
        [*TINY, "DATASETS.TRAIN", "('coco_2017_train',)"],
        r"instances_train2017.*; relative paths start at PL",
    ),
    ("plain", [*TINY, "--eval-only", "--resume"], r"--resume: there is no checkpoint in"),
    ("plain", [*TINY, "WORKFLOW", "[['val', 1], ['train', 1]]"], r"WORKFLOW must be .*TEST\.VAL_LOSS_PERIOD"),
    ("epoch", [*TINY, "TEST.VAL_LOSS_PERIOD", "2"], r"TEST\.VAL_LOSS_PERIOD must be 0 .*WORKFLOW"),
    ("plain", ["--import", "config.yaml"], r"cannot import config\.yaml: ModuleNotFoundError: No module"),
    ("epoch", TINY, r"SOLVER\.MAX_EPOCHS must be .*, got 0"),
    ("plain", [*TINY, "--overfit", "0"], r"--overfit must be from 1 to 22 .*, got 0"),
    ("plain", [*TINY, "--overfit", "23"], r"--overfit must be from 1 to 22 .*, got 23"),
    ("plain", [*TINY, "--dry-run", "--resume"], "cannot be combined with --resume or --eval-only"),
    ("plain", [*TINY, "--dry-run", "TEST.BEST_METRIC", "bbox/APP"], r"'bbox/APP'.*few_val/bbox/AP"),
]


@pytest.mark.parametrize(("script", "args", "words"), MISTAKES)
def test_mistakes_are_answered_with_one_sentence(tmp_path, script, args, words):
    coco_file(tmp_path, category_id=9)
    environment = {"PLAINTRAIN_DATASETS": str(tmp_path / "empty")}
    script = f"{script}_train_net.py"
    done = run_script(script, *args, folder=tmp_path, cwd=tmp_path, env=environment)
    assert done.code not in (0, None) and "Traceback" not in done.output
    last = done.output.strip().splitlines()[-1]
    assert "error: " in last and re.search(words, last), done.output
    if not {"--eval-only", "--dry-run"} & set(args):
        # A run that cannot start touches no earlier one.
        assert not (tmp_path / "output").exists()


@pytest.mark.long
def test_loop_of_the_seed_trains_with_only_the_package_name_changed(tmp_path):
    documents = sorted((ROOT.parent / "shared" / "seeds").glob("001_*.txt"))
    if not documents:
        pytest.skip("the seed document is not there")
    text = documents[0].read_text(encoding="utf-8")
    loop = text[text.index("import logging\n") : text.index("\nsetup() ")]
    (tmp_path / "seed.py").write_text(loop.replace("detectron2", "plaintrain"))
    options = ["OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", 400, "SOLVER.BASE_LR", 0.005]
    options += ["INPUT.CROP.ENABLED", False, "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.CHECKPOINT_PERIOD", 0]
    # Few images are learned soon.
    config = tmp_path / "few.yaml"
    config.write_text(CONFIG.replace("NUM: 22", "NUM: 6"))
    run_script(tmp_path / "seed.py", "--config-file", config, *options, folder=tmp_path, code=0)
    values = [row["total_loss"] for row in lines(tmp_path / "out").values() if "total_loss" in row]
    assert len(values) >= 3 and sorted(values[-5:])[2] < values[0] / 2, values


OLD_FLAGS = """
analyze_errors    --iou 0.7        --iou-threshold 0.7
analyze_model     --json a.json    --output a.json
check_dataset     --json a.json    --output a.json
predict           --threshold 0.7  --score-threshold 0.7
predict           --no-pictures    --no-images
visualize_data    --num 3          --max-images 3
visualize_results --num 3          --max-images 3
visualize_results --threshold 0.7  --score-threshold 0.7
visualize_results --iou 0.7        --iou-threshold 0.7
visualize_results --kind both      --error-type both
"""


@pytest.mark.parametrize("line", OLD_FLAGS.strip().splitlines())
def test_old_flags_work_and_are_not_shown(line, monkeypatch):
    script, old, new = re.split(r"\s+(?=--)", line)
    parsers = []
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(
            argparse.ArgumentParser, name, lambda parser, *_: parsers.append(parser) or exit()
        )
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    monkeypatch.undo()
    default, by_old, by_new = (parsers[0].parse_args(["x", *flag.split()]) for flag in ("", old, new))
    assert by_old == by_new != default
    shown = re.findall(r"--[\w-]+", parsers[0].format_help())
    assert new.split()[0] in shown and old.split()[0] not in shown
