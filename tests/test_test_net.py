"""scripts/test_net.py, run as a user would: weights or a file of predictions, and what it leaves."""

import json
import re
import shutil

import pytest
import torch
from processes import run_script, write_config

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model

PREDICTIONS, RESULTS = "coco_instances_results.json", "results.json"
# The second dataset is scored as VOC.
DATASETS = """
_BASE_: config.yaml
MODEL:
  ROI_HEADS: {SCORE_THRESH_TEST: 0.0}
  MASK_ON: True
  ROI_MASK_HEAD: {NUM_CONV: 1, CONV_DIM: 8}
  KEYPOINT_ON: True
  ROI_KEYPOINT_HEAD: {CONV_DIMS: [8]}
DATASETS:
  DECLARE:
    test_net_coco: {FORMAT: shapes, SPLIT: val, NUM: 6, HEIGHT: 64, WIDTH: 64}
    test_net_voc: {FORMAT: shapes, SPLIT: val, NUM: 5, HEIGHT: 64, WIDTH: 72, EVALUATOR: pascal_voc}
  TRAIN: [test_net_coco]
  TEST: [test_net_coco, test_net_voc]
TEST: {DETECTIONS_PER_IMAGE: 8, KEYPOINT_OKS_SIGMAS: [0.1, 0.1, 0.1, 0.1]}
"""
COCO, VOC = ("DATASETS.TEST", "('test_net_coco',)"), ("DATASETS.TEST", "('test_net_voc',)")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the config and two checkpoints, a.pth and b.pth."""
    folder = tmp_path_factory.mktemp("test_net")
    write_config(folder)
    (folder / "tiny.yaml").write_text(DATASETS)
    cfg = get_cfg()
    cfg.merge_from_file(folder / "tiny.yaml")
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4])
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        torch.save({"model": build_model(cfg).state_dict(), "iteration": seed}, folder / f"{name}.pth")
    return folder


def run(files, folder, *words, script="test_net.py", code=0):
    """Run a script in `folder`, which ends with this exit code, and return what it prints."""
    command = [script, "--config-file", files / "tiny.yaml", *words]
    return run_script(*command, folder=folder, cwd=folder, code=code).output


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory):
    """{name: folder} of evaluations of a.pth and b.pth; `output` is what the first printed."""
    root, outputs = tmp_path_factory.mktemp("evaluated"), {}
    for name in "ab":
        weights = ["MODEL.WEIGHTS", files / f"{name}.pth", "OUTPUT_DIR", root / name]
        outputs[name] = run(files, root, *weights)
    return {"a": root / "a", "b": root / "b", "output": outputs["a"]}


def content(folder, name):
    """Return {dataset: the bytes of a file of that name} below an output folder."""
    return {path.parent.name: path.read_bytes() for path in (folder / "inference").glob(f"*/{name}")}


def of_coco(folder):
    return (folder / "inference" / "test_net_coco" / PREDICTIONS).read_bytes()


def test_datasets_get_their_predictions_and_their_results(evaluated):
    out = evaluated["a"] / "inference"
    coco, voc = (
        json.loads((out / name / RESULTS).read_text(), parse_constant=pytest.fail)[name]
        for name in ("test_net_coco", "test_net_voc")
    )
    assert list(coco) == ["bbox", "segm", "keypoints"] and list(voc) == ["bbox"]
    assert {"AP", "AP50", "APl", "AP-circle"} <= coco["bbox"].keys() and coco["bbox"]["APl"] is None
    assert set(voc["bbox"]) == {"AP", "AP50", "AP75", "AP50-circle", "AP50-square", "AP50-triangle"}
    # What it prints is what it writes.
    for metrics in (*coco.values(), *voc.values()):
        row = [value for name, value in metrics.items() if "-" not in name]
        printed = ",".join(f"{float('nan') if v is None else v:.4f}" for v in row)
        assert f"copypaste: {printed}" in (evaluated["a"] / "log.txt").read_text()
    assert any(0 < value < 100 for value in coco["bbox"].values() if value is not None)
    for name, images in (("test_net_coco", 6), ("test_net_voc", 5)):
        found = json.loads((out / name / PREDICTIONS).read_text())
        assert {d["image_id"] for d in found} <= set(range(1, images + 1)) and len(found) > images
        assert {d["category_id"] for d in found} <= {1, 2, 3}
        assert all({"bbox", "score", "segmentation", "keypoints"} <= d.keys() for d in found)


def test_two_processes_find_and_score_what_one_does(files, evaluated, tmp_path):
    run(files, tmp_path, "--num-gpus", 2, "MODEL.WEIGHTS", files / "a.pth", "OUTPUT_DIR", tmp_path)
    assert (tmp_path / "log.txt.rank1").exists()
    for name in (PREDICTIONS, RESULTS):
        assert content(tmp_path, name) == content(evaluated["a"], name)


def test_run_is_evaluated_from_its_last_checkpoint_and_stays_as_it_is(files, evaluated, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for source, name in (("b", "model_0000001"), ("a", "model_0000000"), ("a", "model_final")):
        shutil.copy(files / f"{source}.pth", folder / f"{name}.pth")
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    for name in ("config.yaml", "log.txt", "metrics.json"):
        (folder / name).write_text(f"{name} of the run\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(files, tmp_path, "--resume", *COCO, "OUTPUT_DIR", folder)
    assert of_coco(folder) == of_coco(evaluated["b"]) != of_coco(evaluated["a"])
    path = evaluated["a"] / "inference" / "test_net_coco" / PREDICTIONS
    run(files, tmp_path, "--predictions", path, *COCO, "OUTPUT_DIR", folder)
    assert of_coco(folder) == of_coco(evaluated["a"])
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    log = after.pop("log.txt")
    assert log.startswith(before.pop("log.txt")) and log.count(b"command line:") == 2
    assert after == before


def test_file_that_is_read_is_not_written(files, tmp_path):
    folder = tmp_path / "out" / "inference" / "test_net_coco"
    folder.mkdir(parents=True)
    # With a key that no evaluator writes.
    found = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5, "note": "mine"}]
    (folder / PREDICTIONS).write_text(json.dumps(found))
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.5]]", "OUTPUT_DIR", tmp_path / "out"]
    output = run(files, tmp_path, "--predictions", folder / PREDICTIONS, *COCO, *expected, code=1)
    assert json.loads((folder / PREDICTIONS).read_text()) == found
    # Results that are not as expected are written too.
    assert "expected 99.0 +- 0.5" in output and "Traceback" not in output
    assert "bbox" in json.loads((folder / RESULTS).read_text())["test_net_coco"]


def test_file_is_scored_without_images_weights_or_a_model_that_can_be_built(files, tmp_path):
    image = {"id": 4, "file_name": "missing.png", "height": 64, "width": 64}
    box = {"id": 7, "image_id": 4, "category_id": 9, "bbox": [4, 4, 40, 40], "iscrowd": 0, "area": 1600}
    data = {"images": [image], "annotations": [box], "categories": [{"id": 9, "name": "a"}]}
    (tmp_path / "truth.json").write_text(json.dumps(data))
    found = [{"image_id": 4, "category_id": 9, "bbox": [4, 4, 40, 40], "score": 0.5}]
    (tmp_path / "found.json").write_text(json.dumps(found))
    spec = f"{{FORMAT: coco, JSON: {tmp_path}/truth.json, IMAGE_ROOT: {tmp_path}}}"
    (tmp_path / "tiny.yaml").write_text(
        f"MODEL: {{WEIGHTS: nowhere.pth, BACKBONE: {{NAME: build_my_backbone}}}}\n"
        f"DATASETS: {{DECLARE: {{test_net_other: {spec}}}, TEST: [test_net_other]}}\n"
    )
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 100.0, 0.1]]"]
    run(tmp_path, tmp_path, "--predictions", "found.json", *expected)


@pytest.mark.parametrize("script", ["plain_train_net.py", "epoch_train_net.py"])
def test_amp_and_tta_are_used_by_every_script(files, evaluated, tmp_path, script):
    options = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)"]
    if script == "plain_train_net.py":
        options = ["TEST.AMP", True, "SOLVER.AMP.PRECISION", "bfloat16"]
    options += [*COCO, "MODEL.WEIGHTS", files / "a.pth", "OUTPUT_DIR"]
    run(files, tmp_path, *options, tmp_path / "one")
    run(files, tmp_path, "--eval-only", *options, tmp_path / "two", script=script)
    assert of_coco(tmp_path / "one") == of_coco(tmp_path / "two")
    plain, other = (json.loads(of_coco(folder)) for folder in (evaluated["a"], tmp_path / "one"))
    assert plain != other and {d["image_id"] for d in plain} == {d["image_id"] for d in other}
    if "TEST.AMP" in options:
        # bfloat16 has 8 bits: about the same scores.
        assert other[0]["score"] == pytest.approx(plain[0]["score"], rel=0.1)


FILE, WEIGHTS = ["--predictions", "found.json"], ["MODEL.WEIGHTS", "a.pth"]
ONE = '[{"image_id": 77, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'
# (content of found.json, command line, what the error says)
MISTAKES = [
    ("[]", [*COCO], r"nothing to evaluate; give MODEL\.WEIGHTS FILE, --resume .* or --predictions FILE"),
    ("[]", ["DATASETS.TEST", "()", *WEIGHTS], r"DATASETS\.TEST is empty"),
    ("[]", [*FILE, *WEIGHTS, *COCO], r"only one of --predictions and MODEL\.WEIGHTS"),
    ("[]", [*FILE, *COCO, "TEST.AUG.ENABLED", "True"], r"must be False with --predictions"),
    ("[]", ["--dry-run", *WEIGHTS], r"--overfit and --dry-run are only for training"),
    ("[]", FILE, r"has 2: test_net_coco, test_net_voc; select one"),
    ("[]", ["--predictions", "no.json", *COCO], r"--predictions no\.json: there is no such file"),
    # These are found when the folder is there.
    ("[]", ["--resume", *COCO], r"--resume: there is no checkpoint in \./output"),
    ("<html>", [*FILE, *COCO], r"the results file found\.json is not JSON"),
    (ONE, [*FILE, *COCO], r"detection 0 in found\.json, for \w+, belongs to image 77"),
]


@pytest.mark.parametrize(("found", "words", "said"), MISTAKES)
def test_mistakes_are_answered_with_one_sentence(files, tmp_path, found, words, said):
    (tmp_path / "found.json").write_text(found)
    error = run(files, tmp_path, *words, code=1).strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(said, error), error
    late = "there is no checkpoint" in said or "found" in said
    assert not (tmp_path / "output" / ("inference" if late else "")).exists()
