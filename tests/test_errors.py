"""What is wrong with detections: every kind by hand, COCO's matching, and what must always hold."""

import numpy as np
import pytest
import torch
from detection_helpers import random_dataset
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from plaintrain.evaluation.errors import KINDS, STATES, errors_of, match_image
from plaintrain.evaluation.predictions import PREDICTIONS_FILE, read_detections, write_predictions
from plaintrain.utils.errors import UserError

# Two classes. Objects: a 0 that is found, a 1, a 0, a 0, a crowd of 0, a 1, a 0 that nothing is near.
OBJECTS = {
    "boxes": [
        [0, 0, 10, 10],
        [20, 0, 30, 10],
        [40, 0, 50, 10],
        [60, 0, 70, 10],
        [0, 40, 40, 80],
        [80, 0, 90, 10],
        [0, 20, 10, 30],
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


def check(matches, rows):
    assert matches.kinds.tolist() == [row[0] for row in rows]
    assert matches.objects.tolist() == [row[1] for row in rows]
    assert matches.ious == pytest.approx([row[2] for row in rows])


def test_every_kind_of_detection_and_of_object():
    matches = match_image(OBJECTS, detections_of(EXPECTED))
    check(matches, EXPECTED)
    assert set(matches.kinds) == set(KINDS) and set(matches.states) == set(STATES)
    states = ["found", "erroneous", "erroneous", "missed", "crowd", "missed", "missed"]
    assert matches.states.tolist() == states
    # Of the two that are badly placed, the one with the higher score.
    assert matches.detections.tolist() == [0, 2, 4, -1, -1, -1, -1]


def test_the_order_of_detections_and_objects_changes_nothing():
    rows = [EXPECTED[i] for i in np.random.default_rng(0).permutation(len(EXPECTED))]
    check(match_image(OBJECTS, detections_of(rows)), rows)
    order = np.array([3, 0, 6, 5, 1, 4, 2])
    objects = {key: np.array(value)[order] for key, value in OBJECTS.items()}
    matches = match_image(objects, detections_of(EXPECTED))
    assert matches.kinds.tolist() == [row[0] for row in EXPECTED]
    assert np.where(matches.objects < 0, -1, order[matches.objects]).tolist() == [row[1] for row in EXPECTED]


def test_thresholds_are_reached_by_what_is_equal_to_them():
    objects = {"boxes": [[0, 0, 10, 10]], "labels": [0]}

    def kind(height, label=0, **thresholds):
        found = {"boxes": [[0, 0, 10, height]], "labels": [label], "scores": [1.0]}
        return match_image(objects, found, **thresholds).kinds[0]

    assert [kind(5), kind(4.99), kind(1), kind(0.99)] == [
        "correct",
        "localisation",
        "localisation",
        "background",
    ]
    assert [kind(5, 1), kind(4.99, 1), kind(1, 1), kind(0.99, 1)] == ["class", "both", "both", "background"]
    assert kind(5, iou_threshold=0.6) == "localisation"
    assert kind(2, background_threshold=0.3) == "background"
    assert kind(10, iou_threshold=1.0) == "correct"
    for thresholds in ((0.05, 0.1), (1.5, 0.1), (0.5, 0)):
        with pytest.raises(UserError, match="the IoU that a correct detection has must be"):
            kind(10, iou_threshold=thresholds[0], background_threshold=thresholds[1])


def test_of_two_errors_the_first_of_the_kinds_counts():
    # A place that is wrong, and on an object of another class; a duplicate on an object of another class.
    objects = {
        "boxes": [[0, 0, 10, 3], [0, 0, 10, 8], [20, 0, 30, 10], [20, 0, 30, 9]],
        "labels": [0, 1, 0, 1],
    }
    found = {"boxes": [[0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 10]], "labels": [0, 0, 0]}
    matches = match_image(objects, {**found, "scores": [0.9, 0.8, 0.7]})
    assert matches.kinds.tolist() == ["localisation", "correct", "class"]
    assert matches.objects.tolist() == [0, 2, 3] and matches.states.tolist()[0] == "erroneous"


def test_a_detection_takes_the_best_object_that_is_left():
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


@pytest.mark.parametrize(("num_objects", "num_found"), [(0, 0), (0, 2), (2, 0)])
def test_nothing_to_find_and_nothing_found(num_objects, num_found):
    objects = {"boxes": torch.ones(num_objects, 4), "labels": torch.zeros(num_objects)}
    found = {"boxes": torch.ones(num_found, 4), "labels": torch.zeros(num_found)}
    matches = match_image(objects, {**found, "scores": torch.ones(num_found)})
    assert matches.kinds.tolist() == ["background"] * num_found
    assert matches.states.tolist() == ["missed"] * num_objects


def test_only_the_hundred_best_of_a_class_count():
    objects = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    boxes = [[50, 50, 60, 60]] * 100 + [[0, 0, 10, 10]] * 2
    found = {"boxes": boxes, "labels": [0] * 102, "scores": [0.9] * 100 + [0.1, 0.2]}
    matches = match_image(objects, found)
    assert matches.kinds.tolist() == ["background"] * 100 + ["ignored"] * 2
    assert matches.states.tolist() == ["missed"]
    found["labels"][3] = 1
    assert match_image(objects, found).kinds.tolist()[-2:] == ["ignored", "correct"]


# ---- datasets ----------------------------------------------------------------------------------


def pycocotools_matches(records, detections, threshold_at):
    """{(image, place of the detection in it): (matched object or -1, ignored)} as pycocotools has it."""
    truth, found = COCO(), COCO()
    things = [(i, a) for i, record in enumerate(records) for a in record["annotations"]]
    base = {"images": [{"id": i} for i in range(len(records))], "categories": [{"id": k} for k in range(9)]}
    truth.dataset = base | {
        "annotations": [
            {"id": n, "image_id": i, "area": 1, **{k: a[k] for k in ("bbox", "iscrowd", "category_id")}}
            for n, (i, a) in enumerate(things, start=1)
        ]
    }
    found.dataset = base | {
        "annotations": [
            {"id": n, "image_id": i, "area": 1, "bbox": [*b[:2], b[2] - b[0], b[3] - b[1]], "iscrowd": 0}
            | {"score": b[4], "category_id": b[5]}
            for n, (i, *b) in enumerate(detections.rows.tolist())
        ]
    }
    truth.createIndex()
    found.createIndex()
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.evaluate()
    matched = {}
    for image in (e for e in evaluation.evalImgs[: 9 * 4 * len(records)] if e and e["aRng"] == [0, 1e10]):
        rows = zip(
            image["dtIds"], image["dtMatches"][threshold_at], image["dtIgnore"][threshold_at], strict=True
        )
        matched |= {n: (int(thing) - 1, bool(ignored)) for n, thing, ignored in rows}
    return matched


@pytest.mark.parametrize(("threshold", "place"), [(0.5, 0), (0.75, 5)])
def test_correct_and_ignored_are_as_pycocotools_has_them(threshold, place):
    name, records, detections = random_dataset()
    matches = errors_of(name, detections, iou_threshold=threshold).matches
    expected = pycocotools_matches(records, detections, place)
    assert len(expected) == len(matches.kinds) and {"ignored", "correct"} < set(matches.kinds)
    for n, (thing, ignored) in expected.items():
        kind = matches.kinds[n]
        assert (kind == "ignored") == ignored and (kind == "correct") == (thing >= 0 and not ignored)
        if kind == "correct":
            assert matches.objects[n] == thing


def test_an_image_of_a_dataset_is_matched_as_one_alone():
    name, records, detections = random_dataset(1)
    errors = errors_of(name, detections)
    assert set(errors.matches.kinds) == set(KINDS)
    for i, record in enumerate(records):
        objects, found, matches = errors.of_image(i)
        assert len(objects["labels"]) == len(record["annotations"]) and len(found["labels"]) == 12
        alone = match_image(objects, found)
        for key, value in vars(alone).items():
            assert np.array_equal(value, getattr(matches, key)), key


def test_what_always_holds():
    name, _, detections = random_dataset(2, images=60)
    m = errors_of(name, detections).matches
    correct, found = m.kinds == "correct", m.states == "found"
    assert set(m.kinds) <= set(KINDS) and set(m.states) <= set(STATES)
    # Each correct one has found one object, and each object was found by one.
    assert np.array_equal(m.detections[m.objects[correct]], np.flatnonzero(correct))
    assert correct.sum() == found.sum() == len(set(m.objects[correct].tolist()))
    assert (m.objects[~np.isin(m.kinds, ["background"])] >= 0).all()
    assert ((m.ious >= 0) & (m.ious <= 1)).all()


def test_a_score_threshold_leaves_out_detections_and_changes_no_other_ones_kind():
    name, _, detections = random_dataset(3)
    every, some = errors_of(name, detections), errors_of(name, detections, score_threshold=0.5)
    kept = every.detections["scores"] >= 0.5
    assert 0 < kept.sum() < len(kept)
    assert np.array_equal(some.matches.kinds, every.matches.kinds[kept])


def test_errors_of_a_file(tmp_path):
    name, _, detections = random_dataset(4)
    write_predictions(tmp_path, name, detections)
    path = tmp_path / PREDICTIONS_FILE
    errors = errors_of(name, read_detections(path, name), iou_threshold=0.6)
    expected = errors_of(name, detections, iou_threshold=0.6)
    assert np.array_equal(errors.matches.kinds, expected.matches.kinds)
    assert errors.classes == ["c0", "c1", "c2", "c3"] and errors.iou_threshold == 0.6
    with pytest.raises(UserError, match="errors of masks need masks"):
        errors_of(name, read_detections(path, name), task="segm")
