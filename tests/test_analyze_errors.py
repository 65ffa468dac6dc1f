"""scripts/analyze_errors.py as a user would run it: what it prints and writes, and what it refuses."""

import json
import re

import numpy as np
import pytest
from script_helpers import assert_refused, script_output

from plaintrain.analysis.analyze import analyze
from plaintrain.data import DatasetCatalog
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.evaluation.detections import Detections
from plaintrain.evaluation.predictions import write_predictions
from plaintrain.structures import BoxMode

SCRIPT = "analyze_errors.py"
SPEC = {"FORMAT": "shapes", "SPLIT": "val", "NUM": 5, "HEIGHT": 60, "WIDTH": 90}


@pytest.fixture
def run(tmp_path):
    """A run's folder with two test sets, and predictions for the first: all right but one."""
    declare_dataset("first", SPEC)
    rows = [
        [i, *BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), 0.9, a["category_id"]]
        for i, record in enumerate(DatasetCatalog.get("first"))
        for a in record["annotations"]
    ]
    rows[0][5:] = [0.95, (rows[0][6] + 1) % 3]
    folder = tmp_path / "run"
    write_predictions(folder / "inference" / "first", "first", Detections(np.array(rows), np.arange(5)))
    DatasetCatalog.remove("first")
    set_tests(folder, "first", "second")
    return folder


def set_tests(folder, *names):
    config = {"DATASETS": {"DECLARE": {"first": SPEC, "second": SPEC}, "TEST": names}}
    (folder / "config.yaml").write_text(json.dumps(config))


def test_a_run_is_analysed(run, tmp_path):
    text = script_output(SCRIPT, run, folder=tmp_path)
    written = json.loads((run / "inference" / "first" / "analysis.json").read_text())
    declare_dataset("first", SPEC)
    assert written == analyze("first", written["predictions"])
    number, cost = written["objects"], written["errors"]["bbox"]
    assert f"first: 5 images, {number} objects, {number} detections of {run}" in text
    assert cost["delta_ap"]["classification"] > 1 and cost["delta_ap"]["missed"] == 0
    assert re.search(rf"classification +{cost['delta_ap']['classification']:.2f} +1 ", text)
    assert f"at IoU 0.5 of {cost['AP']:.2f}; counts at score threshold 0.900 (best F1)" in text
    for title in (
        *("bbox, COCO metrics", "bbox, by class", "score threshold with the highest F1"),
        *("objects by size", "objects by shape", "objects in the image", "confusion matrix (rows"),
        *("expected calibration error", "worst images", f"wrote {run}/inference/first/analysis.json"),
    ):
        assert title in text


def test_a_config_and_a_file_are_analysed_with_what_is_given(run, tmp_path):
    set_tests(run, "second")
    found, output = run / "inference" / "first" / "coco_instances_results.json", tmp_path / "new" / "a.json"
    options = ["--iou-threshold", "0.75", "--score-threshold", "0.92", "--output", output, "--gallery", "1"]
    sources = ["--config-file", run / "config.yaml", "--predictions", found]
    text = script_output(SCRIPT, *sources, *options, folder=tmp_path)
    written = json.loads(output.read_text())
    settings = {"iou_threshold": 0.75, "score_threshold": 0.92, "score_threshold_is": "given"}
    assert written["settings"] == settings and written["dataset"] == "second"
    assert written["errors"]["bbox"]["detections"]["classification"] == len(written["gallery"]["best"]) == 1
    assert "score threshold 0.920 (given)" in text
    script_output(SCRIPT, run, "--dataset", "second", "--predictions", found, folder=tmp_path)
    assert (run / "inference" / "second" / "analysis.json").is_file()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "give RUN, a run folder, or --predictions FILE"),
        (["run/inference/first"], 2, "has no config.yaml"),
        (
            ["run", "--dataset", "second"],
            2,
            "run holds no predictions for second; the next evaluation writes them, also that of "
            "scripts/test_net.py --config-file run/config.yaml --resume",
        ),
        (["run", "--predictions", "none.json", "--dataset", "first"], 1, "the results file none.json"),
        (["run", "--predictions", "other.json", "--dataset", "frist"], 1, "first"),
        (["run", "--iou-threshold", "1.5"], 2, "must be 0 to 1, got 1.5"),
        (["run", "--dataset", "shapes_val", "--predictions", "other.json"], 1, "10000 (int), which"),
    ],
)
def test_mistakes_end_with_one_sentence(run, tmp_path, args, code, words):
    found = run / "inference" / "first"
    content = json.loads((found / "coco_instances_results.json").read_text())
    content[0]["image_id"] = 10_000
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert_refused(SCRIPT, args, words, tmp_path, codes=[code])
    assert not (found / "analysis.json").exists()
