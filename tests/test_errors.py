"""The error type of each detection: every type by hand, and invariants: plaintrain.evaluation.errors."""

import numpy as np
import pytest
from detection_helpers import random_dataset

from plaintrain.evaluation.errors import KINDS, STATES, errors_of, match_image
from plaintrain.evaluation.predictions import PREDICTIONS_FILE, read_detections, write_predictions
from plaintrain.utils.errors import UserError

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
    ("class", 1, 0.8, [20, 0, 30, 8], 0, 0.7),
    ("localisation", 2, 0.4, [40, 0, 50, 4], 0, 0.6),
    ("localisation", 2, 0.3, [40, 0, 50, 3], 0, 0.95),
    ("both", 3, 0.2, [60, 0, 70, 2], 1, 0.5),
    ("background", -1, 0.0, [90, 90, 99, 99], 1, 0.4),
    ("background", 5, 0.05, [80, 0, 90, 0.5], 1, 0.3),
    # Half of it is in the crowd, of which it is 1/16.
    ("ignored", 4, 0.5, [30, 40, 50, 50], 0, 0.2),
    ("background", -1, 0.0, [0, 40, 10, 50], 1, 0.1),
]


def detections_of(rows):
    return {
        "boxes": np.array([row[3] for row in rows], dtype=float),
        "labels": np.array([row[4] for row in rows]),
        "scores": np.array([row[5] for row in rows]),
    }


def test_every_type_of_detection_and_of_object_in_any_order():
    matches = match_image(OBJECTS, detections_of(EXPECTED))
    assert set(matches.kinds) == set(KINDS) and set(matches.states) == set(STATES)
    states = ["found", "erroneous", "erroneous", "missed", "crowd", "missed", "missed"]
    assert matches.states.tolist() == states
    # Of the two that are badly placed, the one with the higher score.
    assert matches.detections.tolist() == [0, 2, 4, -1, -1, -1, -1]
    order = np.array([3, 0, 6, 5, 1, 4, 2])
    objects = {key: np.array(value)[order] for key, value in OBJECTS.items()}
    rows = [EXPECTED[i] for i in np.random.default_rng(0).permutation(len(EXPECTED))]
    for actual, expected, places in (
        (matches, EXPECTED, np.arange(7)),
        (match_image(objects, detections_of(rows)), rows, order),
    ):
        assert actual.kinds.tolist() == [row[0] for row in expected]
        matched = np.where(actual.objects < 0, -1, places[actual.objects])
        assert matched.tolist() == [row[1] for row in expected]
        assert actual.ious == pytest.approx([row[2] for row in expected])


def test_an_iou_equal_to_a_threshold_reaches_it():
    objects = {"boxes": [[0, 0, 10, 10]], "labels": [0]}

    def kind(height, label=0, **thresholds):
        found = {"boxes": [[0, 0, 10, height]], "labels": [label], "scores": [1.0]}
        return match_image(objects, found, **thresholds).kinds[0]

    heights = (5, 4.99, 1, 0.99)
    assert [kind(h) for h in heights] == ["correct", "localisation", "localisation", "background"]
    assert [kind(h, label=1) for h in heights] == ["class", "both", "both", "background"]
    assert kind(5, iou_threshold=0.6) == "localisation"
    assert kind(2, background_threshold=0.3) == "background"
    assert kind(10, iou_threshold=1.0) == "correct"
    for thresholds in ((0.05, 0.1), (1.5, 0.1), (0.5, 0)):
        with pytest.raises(UserError, match="the IoU that a correct detection has must be"):
            kind(10, iou_threshold=thresholds[0], background_threshold=thresholds[1])


def test_the_first_of_two_types_of_error_counts():
    # A place that is wrong, and on an object of another class; a duplicate on an object of another class.
    boxes = [[0, 0, 10, 3], [0, 0, 10, 8], [20, 0, 30, 10], [20, 0, 30, 9]]
    objects = {"boxes": boxes, "labels": [0, 1, 0, 1]}
    found = {"boxes": [[0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 10]], "labels": [0, 0, 0]}
    matches = match_image(objects, {**found, "scores": [0.9, 0.8, 0.7]})
    assert matches.kinds.tolist() == ["localisation", "correct", "class"]
    assert matches.objects.tolist() == [0, 2, 3] and matches.states.tolist()[0] == "erroneous"


def test_a_detection_matches_the_best_object_that_is_left():
    objects = {"boxes": [[0, 0, 10, 10], [0, 0, 10, 8]], "labels": [0, 0]}
    found = {"boxes": [[0, 0, 10, 10]] * 3, "labels": [0] * 3, "scores": [0.5, 0.9, 0.4]}
    matches = match_image(objects, found)
    assert matches.kinds.tolist() == ["correct", "correct", "duplicate"]
    assert matches.objects.tolist() == [1, 0, 0]
    assert matches.ious == pytest.approx([0.8, 1, 1])
    assert matches.detections.tolist() == [1, 0]
    # Of two that it overlaps alike, COCO has the later one.
    halves = {"boxes": [[0, 0, 10, 5], [0, 5, 10, 10]], "labels": [0, 0]}
    assert match_image(halves, found).objects.tolist() == [0, 1, 1]


def test_only_the_hundred_best_of_a_class_count():
    objects = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    boxes = [[50, 50, 60, 60]] * 100 + [[0, 0, 10, 10]] * 2
    found = {"boxes": boxes, "labels": [0] * 102, "scores": [0.9] * 100 + [0.1, 0.2]}
    matches = match_image(objects, found)
    assert matches.kinds.tolist() == ["background"] * 100 + ["ignored"] * 2
    assert matches.states.tolist() == ["missed"]
    found["labels"][3] = 1
    assert match_image(objects, found).kinds.tolist()[-2:] == ["ignored", "correct"]


def test_images_of_a_dataset_are_matched_as_each_alone():
    name, records, detections = random_dataset(1)
    errors = errors_of(name, detections)
    m = errors.matches
    correct = m.kinds == "correct"
    assert set(m.kinds) == set(KINDS) and set(m.states) == set(STATES)
    # Each correct detection has found one object, and each found object has one.
    assert np.array_equal(m.detections[m.objects[correct]], np.flatnonzero(correct))
    assert correct.sum() == (m.states == "found").sum() == len(set(m.objects[correct].tolist()))
    for i, record in enumerate(records):
        objects, found, alone = errors.of_image(i)
        assert len(objects["labels"]) == len(record["annotations"]) and len(found["labels"]) == 12
        of_detections, of_objects = (table["image"] == i for table in (errors.detections, errors.objects))
        assert np.array_equal(alone.kinds, m.kinds[of_detections])
        assert np.array_equal(alone.ious, m.ious[of_detections])
        assert np.array_equal(alone.states, m.states[of_objects])


def test_errors_of_a_file_and_above_a_score_threshold(tmp_path):
    name, _, detections = random_dataset(3)
    every = errors_of(name, detections, iou_threshold=0.6)
    write_predictions(tmp_path, name, detections)
    read = read_detections(tmp_path / PREDICTIONS_FILE, name)
    some = errors_of(name, read, iou_threshold=0.6, score_threshold=0.5)
    kept = every.detections["scores"] >= 0.5
    assert 0 < kept.sum() < len(kept)
    assert np.array_equal(some.matches.kinds, every.matches.kinds[kept])
    assert some.classes == ["c0", "c1", "c2", "c3"] and some.iou_threshold == 0.6
    with pytest.raises(UserError, match="errors of masks need masks"):
        errors_of(name, read, task="segm")
