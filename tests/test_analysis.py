"""The errors of detections and TIDE's delta AP by hand, and the analysis of predictions."""

import json

import numpy as np
import pytest
from detection_helpers import add_dataset, make_annotation, make_record, random_dataset

from plaintrain.analysis import breakdown
from plaintrain.analysis.analyze import analyze, compute_delta_ap, compute_fixed_ap
from plaintrain.analysis.errors import (
    DETECTION_TYPES,
    ERRORS,
    REAL_STATES,
    STATES,
    find_errors,
    match_detections,
)
from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.evaluation import COCOEvaluator
from plaintrain.evaluation.detections import Detections, compute_overlaps
from plaintrain.evaluation.predictions import PREDICTIONS_FILE, read_detections, write_predictions
from plaintrain.structures import BoxMode, encode_segmentation
from plaintrain.utils.errors import UserError


def register(objects, classes=2, images=1):
    """A dataset of objects (image, box XYXY, label, crowd)."""
    records = [make_record(i) for i in range(images)]
    for image, box, label, crowd in objects:
        records[image]["annotations"].append(make_annotation(box, label, iscrowd=crowd))
    return add_dataset(records, [f"c{i}" for i in range(classes)], evaluator_type="coco")


def detections_of(rows, images=1):
    """`Detections` of rows (image, box, score, label)."""
    rows = np.array([[image, *box, score, label] for image, box, score, label in rows], dtype=float)
    return Detections(rows.reshape(-1, 7), np.arange(images))


A, B, NEAR_B, BADLY_B, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 4], [20, 0, 30, 2], [80, 80, 90, 90]
# A recall of a half is reached at 51 of 101 points.
HALF = 100 * 51 / 101
LATE = (HALF / 2, 50 - HALF / 2)
TWICE = 50 / 3.03
# Type of error: label of the object B (None: no object B), detections (box, score, label), AP, the AP gained
# by fixing each type, by dropping all wrong detections, and by removing all objects that are not found.
CASES = {
    "classification": (1, [(B, 0.9, 0), (A, 0.5, 0)], 25, {"classification": 75}, 25, 50),
    "localization": (0, [(NEAR_B, 0.9, 0), (A, 0.5, 0)], HALF / 2, {"localization": 100 - HALF / 2}, *LATE),
    "both": (1, [(BADLY_B, 0.9, 0), (A, 0.5, 0)], 25, {"both": 25, "missed": 50}, 25, 50),
    "duplicate": (0, [(A, 0.9, 0), (A, 0.8, 0), (B, 0.5, 0)], 100 - TWICE, {"duplicate": TWICE}, TWICE, 0),
    "background": (None, [(FAR, 0.9, 0), (A, 0.5, 0)], 50, {"background": 50}, 50, 0),
    "missed": (0, [(A, 0.9, 0)], HALF, {"missed": 100 - HALF}, 0, 100 - HALF),
}


@pytest.mark.parametrize("error", ERRORS)
def test_the_cost_of_an_error_of_each_type(error):
    label, found, ap, costs, false_positives, false_negatives = CASES[error]
    objects = [(0, A, 0, 0)] + ([] if label is None else [(0, B, label, 0)])
    errors = find_errors(register(objects), detections_of([(0, *row) for row in found]))
    assert set(errors.detections["type"]) == {"correct", *({error} - {"missed"})}
    cost = compute_delta_ap(errors)
    assert cost["AP"] == pytest.approx(ap)
    assert cost["delta_ap"] == pytest.approx(dict.fromkeys(ERRORS, 0) | costs)
    assert cost["false_positives"] == pytest.approx(false_positives)
    assert cost["false_negatives"] == pytest.approx(false_negatives)


def test_only_the_best_of_several_wrong_detections_of_an_object_is_fixed():
    name = register([(0, A, 0, 0), (0, B, 1, 0)])
    rows = [(0, A, 0.95, 0), (0, B, 0.9, 0), (0, B, 0.8, 0), (0, NEAR_B, 0.7, 1)]
    errors = find_errors(name, detections_of(rows))
    types = ["correct", "classification", "classification", "localization"]
    assert errors.detections["type"].tolist() == types
    # Class 0 has 1 of 1, class 1 first a false one of 0.7 and then also a correct one of 0.9.
    assert compute_fixed_ap(errors) == pytest.approx(50)
    assert compute_fixed_ap(errors, ["classification"]) == pytest.approx(100)
    assert compute_fixed_ap(errors, ["localization"]) == pytest.approx(100)
    # An object that is found already leaves nothing to fix.
    errors = find_errors(name, detections_of([*rows, (0, B, 0.6, 1)]))
    assert errors.detections["type"][-1] == "correct"
    assert compute_fixed_ap(errors, ["classification"]) == pytest.approx(75)
    assert compute_fixed_ap(errors, ["localization"]) == pytest.approx(100)


def test_the_threshold_of_the_best_f1():
    name = register([(0, A, 0, 0), (0, B, 0, 0), (0, FAR, 2, 0)], classes=4)
    rows = [(A, 0.9, 0), (A, 0.7, 0), (B, 0.7, 0), (FAR, 0.6, 0), (A, 0.8, 1), (NEAR_B, 0.8, 2)]
    found = breakdown.compute_best_thresholds(find_errors(name, detections_of([(0, *row) for row in rows])))
    # Of class 0: 1 of 1 and half of all, 2 of 3 and all (the equal scores only together), 2 of 4 and all.
    first = {"name": "c0", "threshold": 0.7, "f1": 0.8, "precision": 2 / 3, "recall": 1}
    assert found["classes"][0] == pytest.approx(first)
    nothing = {"threshold": None, "f1": None, "precision": None, "recall": None}
    assert found["classes"][1:] == [{"name": f"c{k}", **nothing} for k in (1, 2, 3)]
    # Of all: 2 of 5 detections and 2 of 3 objects, or 1 of 1 and 1 of 3, which is as good and stricter.
    assert found["overall"] == pytest.approx({"threshold": 0.9, "f1": 0.5, "precision": 1, "recall": 1 / 3})


def test_calibration_compares_scores_with_what_is_correct():
    objects = [(0, A, 0, 0), (0, B, 0, 0), (0, [40, 40, 100, 100], 0, 1)]
    rows = [(A, 0.95, 0), (FAR, 0.91, 1), (B, 0.15, 0), ([50, 50, 60, 60], 0.5, 0), (FAR, 1.0, 1)]
    errors = find_errors(register(objects), detections_of([(0, *row) for row in rows]))
    found = breakdown.compute_calibration(errors)
    bins = found["bins"]
    assert [part["count"] for part in bins] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 3]
    assert bins[0] == {"low": 0.0, "high": 0.1, "count": 0, "score": None, "precision": None}
    assert (bins[9]["score"], bins[9]["precision"]) == pytest.approx((2.86 / 3, 1 / 3))
    assert found["expected_error"] == pytest.approx((0.85 + 2.86 - 1) / 4)


def test_confusion_counts_each_object_and_each_detection_once():
    # In the second image: found by a better placed one of its class and one of another; mistaken; missed.
    crowd = (0, [40, 40, 100, 100], 0, 1)
    objects = [(0, A, 0, 0), crowd, (1, A, 0, 0), (1, B, 1, 0), (1, FAR, 1, 0)]
    rows = [(0, A, 0.9, 0), (0, FAR, 0.8, 0), (1, A, 0.9, 1), (1, A, 0.6, 0), (1, B, 0.8, 0), (1, B, 0.9, 0)]
    errors = find_errors(register(objects, images=2), detections_of(rows, images=2))
    found = breakdown.compute_confusion_matrix(errors)
    assert found["labels"] == ["c0", "c1", "other error", "background"]
    assert found["counts"] == [[2, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert found["normalized"] == [[1, 0, 0, 0], [0.5, 0, 0, 0.5], [0.5, 0.5, 0, 0], [0, 0, 0, 0]]
    assert found["pairs"] == [{"ground_truth": "c1", "detected_as": "c0", "count": 1, "fraction": 0.5}]


def test_objects_by_what_they_are_like():
    # 10x10 beside one that overlaps it; 40x10; 10x50 alone in its image; a crowd, which is left out.
    objects = [(0, A, 0, 0), (0, [0, 0, 10, 8], 1, 0), (0, [50, 0, 90, 10], 0, 0), (1, [0, 0, 10, 50], 0, 0)]
    name = register([*objects, (1, [0, 0, 100, 100], 0, 1)], images=2)
    rows = [(0, A, 0.9, 0), (0, [50, 0, 90, 8], 0.4, 0), (1, [0, 0, 10, 50], 0.8, 1)]
    errors = find_errors(name, detections_of(rows, images=2))
    found = breakdown.compute_object_breakdown(errors, errors.filter_by_score(0.5))
    bins = {key: {p["name"]: p["objects"] for p in parts if p["objects"]} for key, parts in found.items()}
    assert bins == {
        "size": {"< 16": 2, "16-32": 2},
        "aspect": {"< 0.25": 1, "0.75-1.33": 2, ">= 4": 1},
        "overlaps": {"0": 2, "1": 2},
        "objects_per_image": {"1": 1, "2-3": 3},
    }
    expected = {"name": "16-32", "low": 16, "high": 32, "objects": 2}
    expected |= {"detected": 0, "erroneous": 1, "missed": 1}
    expected |= {"recall": 0.5, "recall_above": 0.0, "mean_iou": pytest.approx(0.8)}
    assert found["size"][1] == expected
    assert found["size"][-1]["recall"] is found["size"][-1]["mean_iou"] is None


def test_the_best_and_the_worst_images():
    objects = [(0, A, 0, 0), (1, A, 0, 0), (1, B, 0, 0), (2, A, 0, 0), (3, A, 0, 0), (3, B, 0, 0)]
    name = register(objects, images=6)
    rows = [(0, A, 0.9, 0), (1, A, 0.9, 0), (1, B, 0.9, 0), (2, FAR, 0.9, 0), (3, A, 0.9, 0), (5, A, 0.9, 1)]
    errors = find_errors(name, detections_of(rows, images=6))
    found = breakdown.select_best_and_worst(errors)
    assert [entry["image_id"] for entry in found["best"]] == [1, 0]
    assert [entry["image_id"] for entry in found["worst"]] == [2, 5, 3]
    assert found["worst"][2]["f1"] == pytest.approx(2 / 3)
    counts = dict.fromkeys([*DETECTION_TYPES, *REAL_STATES], 0) | {"background": 1, "missed": 1, "wrong": 1}
    assert found["worst"][0] == {"image_id": 2, "file_name": "2.jpg", "index": 2, "f1": 0.0, **counts}
    assert [len(entries) for entries in breakdown.select_best_and_worst(errors, 1).values()] == [1, 1]


def analysis_of(folder, name, detections, **options):
    write_predictions(folder, name, detections)
    found = analyze(name, folder / PREDICTIONS_FILE, **options)
    # It is plain JSON, without NaN.
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_an_analysis_agrees_with_the_evaluator_and_with_itself(tmp_path):
    name, records, detections = random_dataset(7, images=40)
    found = analysis_of(tmp_path, name, detections)
    metrics = COCOEvaluator(name).score(read_detections(tmp_path / PREDICTIONS_FILE, name))["bbox"]
    assert found["metrics"]["bbox"] == {k: v if v == v else None for k, v in metrics.items() if "-" not in k}
    rows = found["per_class"]["bbox"]
    assert {f"AP-{row['name']}": row["AP"] for row in rows} == {k: v for k, v in metrics.items() if "-" in k}
    assert np.mean([row["AP50"] for row in rows]) == pytest.approx(metrics["AP50"])
    assert sum(row["objects"] for row in rows) == found["objects"]
    assert found["objects"] + found["crowds"] == sum(len(record["annotations"]) for record in records)
    curves = found["curves"]["bbox"]
    assert 100 * np.mean(curves["mean"]["0.75"]) == pytest.approx(metrics["AP75"], abs=0.01)
    assert 100 * np.mean(curves["classes"][2]["0.50"]) == pytest.approx(rows[2]["AP50"], abs=0.01)
    assert curves["recall"][-1] == 1 and len(curves["recall"]) == 101
    errors, overall = found["errors"]["bbox"], found["thresholds"]["overall"]
    assert errors["AP"] == pytest.approx(metrics["AP50"])
    assert found["settings"]["score_threshold"] == overall["threshold"]
    correct, objects = errors["detections"]["correct"], errors["objects"]
    assert correct / found["objects"] == overall["recall"]
    counted = sum(errors["detections"].values()) - errors["detections"]["ignored"]
    assert correct / counted == overall["precision"]
    assert sum(objects.values()) == found["objects"] + found["crowds"]
    for parts in found["breakdown"].values():
        assert sum(part["detected"] for part in parts) == correct
        assert sum(part["missed"] for part in parts) == objects["missed"]
    for key in ("correct", "both", "missed"):
        total = {**errors["detections"], **objects}[key]
        assert sum(row[key] for row in errors["classes"]) == total
    # Classes keep their names, whatever their ids in the files.
    name = register([(0, A, 0, 0), (0, B, 1, 0)])
    MetadataCatalog.get(name).set(thing_dataset_id_to_contiguous_id={9: 0, 3: 1})
    detections = detections_of([(0, A, 0.9, 0)])
    found = analysis_of(tmp_path, name, detections)
    assert [row["AP"] for row in found["per_class"]["bbox"]] == [100, 0]
    assert [row["0.50"][0] for row in found["curves"]["bbox"]["classes"]] == [1, 0]
    assert COCOEvaluator(name).score(detections)["bbox"]["AP-c1"] == 0


@pytest.mark.parametrize("case", ["no detections", "no objects", "no images", "eighty classes"])
def test_an_analysis_without_objects_or_detections_has_no_numbers(tmp_path, case):
    objects = [] if case in ("no objects", "no images") else [(0, A, 0, 0), (1, B, 0, 0)]
    rows = [] if case in ("no detections", "no images") else [(0, A, 0.9, 0), (1, FAR, 0.5, 0)]
    classes, images = 80 if case == "eighty classes" else 2, 0 if case == "no images" else 2
    name = register(objects, classes=classes, images=images)
    found = analysis_of(tmp_path, name, detections_of(rows, images=images))
    per_class = found["per_class"]["bbox"]
    assert len(per_class) == len(found["thresholds"]["classes"]) == classes
    assert len(found["confusion"]["counts"]) == classes + 2
    ap50 = {"no detections": 0, "eighty classes": round(HALF, 10)}.get(case)
    assert found["metrics"]["bbox"]["AP50"] == found["errors"]["bbox"]["AP"] == per_class[0]["AP50"] == ap50
    assert all(row["AP"] is row["APs"] is None and row["objects"] == 0 for row in per_class[1:])
    threshold = 0.9 if case == "eighty classes" else None
    assert found["thresholds"]["overall"]["threshold"] == threshold
    assert found["settings"]["score_threshold"] == (threshold or 0)


def test_masks_and_keypoints_are_tasks_of_their_own(tmp_path):
    declare_dataset("drawn", {"FORMAT": "shapes", "SPLIT": "val", "NUM": 6, "HEIGHT": 60, "WIDTH": 90})
    rows, masks, keypoints = [], [], []
    for i, record in enumerate(DatasetCatalog.get("drawn")):
        for a in record["annotations"]:
            box = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            rows.append([i, *box, 0.9, a["category_id"]])
            masks.append(encode_segmentation(a["segmentation"], 60, 90)["counts"])
            keypoints.append(np.reshape(a["keypoints"], (-1, 3)))
    # The box is right, the mask is that of another object, in another place.
    masks[0] = masks[1]
    detections = Detections(np.array(rows, float), np.arange(6), masks, np.array(keypoints, float))
    found = analysis_of(tmp_path, "drawn", detections, kpt_oks_sigmas=[0.1] * 4)
    assert list(found["metrics"]) == list(found["curves"]) == ["bbox", "segm", "keypoints"]
    assert set(found["errors"]) == {"bbox", "segm"}
    assert found["metrics"]["bbox"]["AP"] == found["errors"]["bbox"]["AP"] == 100
    segm = found["errors"]["segm"]
    assert segm["AP"] == pytest.approx(found["metrics"]["segm"]["AP50"]) and segm["AP"] < 100
    assert segm["detections"]["correct"] == len(rows) - 1 and segm["objects"]["missed"] == 1
    keypoints = found["per_class"]["keypoints"][0]
    assert keypoints["AP"] == 100 and keypoints["APs"] is None


# Two classes. Objects: a 0 that is found, a 1, a 0, a 0, a crowd of 0, a 1, a 0 that nothing is near.
OBJECTS = {
    "boxes": [
        *([0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]),
        *([0, 40, 40, 80], [80, 0, 90, 10], [0, 20, 10, 30]),
    ],
    "labels": [0, 1, 0, 0, 0, 1, 0],
    "crowd": [False, False, False, False, True, False, False],
}
# kind, object, IoU, box, label, score
EXPECTED = [
    ("correct", 0, 0.9, [0, 0, 10, 9], 0, 0.9),
    ("duplicate", 0, 1.0, [0, 0, 10, 10], 0, 0.8),
    ("classification", 1, 0.8, [20, 0, 30, 8], 0, 0.7),
    ("localization", 2, 0.4, [40, 0, 50, 4], 0, 0.6),
    ("localization", 2, 0.3, [40, 0, 50, 3], 0, 0.95),
    ("both", 3, 0.2, [60, 0, 70, 2], 1, 0.5),
    ("background", -1, 0.0, [90, 90, 99, 99], 1, 0.4),
    ("background", 5, 0.05, [80, 0, 90, 0.5], 1, 0.3),
    # Half of it is in the crowd, of which it is 1/16.
    ("ignored", 4, 0.5, [30, 40, 50, 50], 0, 0.2),
    ("background", -1, 0.0, [0, 40, 10, 50], 1, 0.1),
]


def match_image(objects, detections, iou_threshold=0.5):
    """Match the boxes of one image: the tables of objects and detections."""
    tables = []
    for table in (objects, detections):
        boxes = np.array(table["boxes"], dtype=float)
        tables.append({"crowd": np.zeros(len(boxes), dtype=bool), "image": np.zeros(len(boxes), dtype=int)})
        tables[-1] |= {key: np.array(value) for key, value in table.items()} | {"boxes": boxes}
    return match_detections(*tables, compute_overlaps(*tables), iou_threshold)


def arrays_of(rows):
    boxes, labels, scores = (np.array([row[i] for row in rows]) for i in (3, 4, 5))
    return {"boxes": boxes.astype(float), "labels": labels, "scores": scores}


def test_every_type_of_detection_and_of_object_in_any_order():
    objects, detections = match_image(OBJECTS, arrays_of(EXPECTED))
    assert set(detections["type"]) == set(DETECTION_TYPES) and set(objects["state"]) == set(STATES)
    states = ["detected", "erroneous", "erroneous", "missed", "crowd", "missed", "missed"]
    assert objects["state"].tolist() == states
    # Of the two that are badly placed, the one with the higher score.
    assert objects["detection"].tolist() == [0, 2, 4, -1, -1, -1, -1]
    order = np.array([3, 0, 6, 5, 1, 4, 2])
    shuffled = {key: np.array(value)[order] for key, value in OBJECTS.items()}
    rows = [EXPECTED[i] for i in np.random.default_rng(0).permutation(len(EXPECTED))]
    for actual, expected, places in (
        (detections, EXPECTED, np.arange(7)),
        (match_image(shuffled, arrays_of(rows))[1], rows, order),
    ):
        assert actual["type"].tolist() == [row[0] for row in expected]
        matched = np.where(actual["object"] < 0, -1, places[actual["object"]])
        assert matched.tolist() == [row[1] for row in expected]
        assert actual["iou"] == pytest.approx([row[2] for row in expected])


def test_an_iou_equal_to_a_threshold_reaches_it():
    objects = {"boxes": [[0, 0, 10, 10]], "labels": [0]}

    def type_of(height, label=0, iou_threshold=0.5):
        found = {"boxes": [[0, 0, 10, height]], "labels": [label], "scores": [1.0]}
        return match_image(objects, found, iou_threshold)[1]["type"][0]

    heights = (5, 4.99, 1, 0.99)
    assert [type_of(h) for h in heights] == ["correct", "localization", "localization", "background"]
    assert [type_of(h, label=1) for h in heights] == ["classification", "both", "both", "background"]
    assert type_of(5, iou_threshold=0.6) == "localization"
    assert type_of(10, iou_threshold=1.0) == "correct"
    for iou_threshold in (0.05, 1.5):
        with pytest.raises(UserError, match="the IoU of a correct detection must be"):
            type_of(10, iou_threshold=iou_threshold)


def test_a_detection_matches_the_best_object_that_is_left():
    truth = {"boxes": [[0, 0, 10, 10], [0, 0, 10, 8]], "labels": [0, 0]}
    found = {"boxes": [[0, 0, 10, 10]] * 3, "labels": [0] * 3, "scores": [0.5, 0.9, 0.4]}
    objects, detections = match_image(truth, found)
    assert detections["type"].tolist() == ["correct", "correct", "duplicate"]
    assert detections["object"].tolist() == [1, 0, 0]
    assert detections["iou"] == pytest.approx([0.8, 1, 1])
    assert objects["detection"].tolist() == [1, 0]
    # Of two that it overlaps alike, COCO has the later one.
    halves = {"boxes": [[0, 0, 10, 5], [0, 5, 10, 10]], "labels": [0, 0]}
    assert match_image(halves, found)[1]["object"].tolist() == [0, 1, 1]
    # The first of two types counts: a wrong place, and a duplicate, on an object of another class.
    boxes = [[0, 0, 10, 3], [0, 0, 10, 8], [20, 0, 30, 10], [20, 0, 30, 9]]
    truth = {"boxes": boxes, "labels": [0, 1, 0, 1]}
    found = {"boxes": [[0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 10]], "labels": [0, 0, 0]}
    objects, detections = match_image(truth, {**found, "scores": [0.9, 0.8, 0.7]})
    assert detections["type"].tolist() == ["localization", "correct", "classification"]
    assert detections["object"].tolist() == [0, 2, 3] and objects["state"][0] == "erroneous"
    # Only the hundred best of a class count.
    truth = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    boxes = [[50, 50, 60, 60]] * 100 + [[0, 0, 10, 10]] * 2
    found = {"boxes": boxes, "labels": [0] * 102, "scores": [0.9] * 100 + [0.1, 0.2]}
    objects, detections = match_image(truth, found)
    assert detections["type"].tolist() == ["background"] * 100 + ["ignored"] * 2
    assert objects["state"].tolist() == ["missed"]
    found["labels"][3] = 1
    assert match_image(truth, found)[1]["type"].tolist()[-2:] == ["ignored", "correct"]


def test_images_of_a_dataset_are_matched_as_each_alone():
    name, records, predictions = random_dataset(1)
    errors = find_errors(name, predictions)
    types, states = errors.detections["type"], errors.objects["state"]
    correct = types == "correct"
    assert set(types) == set(DETECTION_TYPES) and set(states) == set(STATES)
    # Each correct detection has found one object, and each found object has one.
    targets = errors.detections["object"][correct]
    assert np.array_equal(errors.objects["detection"][targets], np.flatnonzero(correct))
    assert correct.sum() == (states == "detected").sum() == len(set(targets.tolist()))
    for i, record in enumerate(records):
        objects, detections = errors.get_image_tables(i)
        assert len(objects["labels"]) == len(record["annotations"]) and len(detections["labels"]) == 12
        alone = match_image(
            *({k: t[k] for k in t if k not in ("type", "state")} for t in (objects, detections))
        )
        for table, expected in zip((objects, detections), alone, strict=True):
            assert all(np.array_equal(table[key], expected[key]) for key in table)
    # The AP is COCO's, and 100 without errors.
    coco = COCOEvaluator(name).score(predictions)["bbox"]
    for iou, metric in ((0.5, "AP50"), (0.75, "AP75")):
        errors = find_errors(name, predictions, iou)
        cost = compute_delta_ap(errors)
        assert 5 < coco[metric] < 95 and cost["AP"] == pytest.approx(coco[metric], abs=1e-8)
        assert compute_fixed_ap(errors, ERRORS) == 100 and min(cost["delta_ap"].values()) >= 0
    some = find_errors(name, predictions, score_threshold=0.5)
    kept = predictions.table[:, 5] >= 0.5
    assert 0 < kept.sum() < len(kept)
    assert np.array_equal(some.detections["type"], types[kept])
    with pytest.raises(UserError, match="errors of masks require masks"):
        find_errors(name, predictions, task="segm")
