"""plaintrain.structures: box formats, and segmentations as RLE."""

import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from plaintrain.structures import BoxMode, segmentation_mistake, segmentation_to_rle
from plaintrain.utils.errors import UserError

XYXY, XYWH = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS


@pytest.mark.parametrize(
    ("box", "source", "target", "expected"),
    [
        ([10, 20, 3, 4], XYWH, XYXY, [10, 20, 13, 24]),
        ([10, 20, 13, 24], XYXY, XYWH, [10, 20, 3, 4]),
        ((-1.5, 2, 3, 4), XYWH, XYWH, [-1.5, 2, 3, 4]),
        # Detectron2's numbers, as JSON holds them.
        ([1, 2, 3, 4], 1, 0, [1, 2, 4, 6]),
    ],
)
def test_convert_returns_a_new_list_of_floats(box, source, target, expected):
    before = list(box)
    converted = BoxMode.convert(box, source, target)
    assert converted == expected
    assert all(type(value) is float for value in converted)
    assert list(box) == before


@pytest.mark.parametrize(
    ("box", "mode", "words"),
    [
        ([1, 2, 3], XYWH, "four finite numbers, not [1, 2, 3]"),
        ([1, 2, math.nan, 4], XYWH, "nan"),
        ([1, 2, 3, "4"], XYWH, "'4'"),
        ([1, 2, 3, 4], "XYXY", "'XYXY'"),
    ],
)
def test_convert_rejects_other_boxes_and_modes(box, mode, words):
    with pytest.raises(UserError) as error:
        BoxMode.convert(box, mode, XYXY)
    assert words in str(error.value)


SQUARE = [2, 1, 6, 1, 6, 4, 2, 4]
# Rows 1 to 3, columns 2 to 5, of an image of 8 x 10.
MASK = np.zeros((8, 10), dtype=np.uint8)
MASK[1:4, 2:6] = 1
# Lengths of the runs of 0 and 1, down the columns.
COUNTS = [17, 3, 5, 3, 5, 3, 5, 3, 36]
COMPRESSED = coco_mask.encode(np.asfortranarray(MASK))["counts"]


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        [tuple(map(float, SQUARE))],
        {"size": [8, 10], "counts": list(COUNTS)},
        {"size": (8, 10), "counts": tuple(COUNTS)},
        {"size": [8, 10], "counts": COMPRESSED},
        {"size": [8, 10], "counts": COMPRESSED.decode()},
    ],
    ids=["polygon", "tuples", "counts", "tuple_counts", "bytes", "str"],
)
def test_every_form_of_a_segmentation_is_the_same_rle(segmentation):
    before = repr(segmentation)
    rle = segmentation_to_rle(segmentation, 8, 10)
    assert rle["size"] == [8, 10] and type(rle["counts"]) is bytes
    assert np.array_equal(coco_mask.decode(rle), MASK)
    assert repr(segmentation) == before


def test_polygons_are_their_union_cut_off_at_the_image():
    mask = MASK.copy()
    mask[2:7, 4:9] = 1
    rle = segmentation_to_rle([SQUARE, [4, 2, 9, 2, 9, 7, 4, 7]], 8, 10)
    assert np.array_equal(coco_mask.decode(rle), mask)
    rle = segmentation_to_rle([[-5, -5, 6, -5, 6, 4, -5, 4]], 8, 10)
    assert coco_mask.decode(rle).sum() == 6 * 4 and coco_mask.decode(rle)[:4, :6].all()


def _rle(counts, size=(8, 10)):
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[1, 2, 3, 4]], ["polygon", "3 finite points", "[1, 2, 3, 4]"]),
        # A list of numbers where a list of polygons belongs.
        (SQUARE, ["polygon", "2"]),
        ([[1, 2, 3, math.nan, 5, 6]], ["finite", "nan"]),
        ([[0, 0, 1e300, 0, -1e300, 5]], ["far outside"]),
        (None, ["no segmentation"]),
        ({"counts": [80]}, ["neither polygons nor an RLE", "counts"]),
        (_rle([80], (10, 8)), ["[10, 8]", "[8, 10]"]),
        *((_rle(counts), ["counts", "8 x 10"]) for counts in ([10, 20], [100, -20], [], [40, "40"], 80)),
        (_rle([2**64, -(2**64) + 80]), ["counts", "8 x 10"]),
        # Strings that are cut off, of which pycocotools would read on past the end, or are no runs.
        *((_rle(counts), ["counts", "8 x 10"]) for counts in ("1", b"\x01", "", "h", "0 0", "\ud800")),
        # A run of too many letters.
        (_rle("0" * 20 + "o" * 40 + "0"), ["counts", "8 x 10"]),
    ],
)
def test_malformed_segmentations_are_rejected(segmentation, words):
    with pytest.raises(UserError) as error:
        segmentation_to_rle(segmentation, 8, 10)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_the_runs_of_compressed_masks_add_up_and_a_cut_is_seen():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (40, 60), (9, 90)):
        mask = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
        mask[:, width // 2 :] = height % 2
        rle = coco_mask.encode(mask)
        assert segmentation_mistake(rle, height, width) is None
        for wrong in (rle["counts"][:-1], rle["counts"] + b"1", rle["counts"] + b"\xff"):
            assert segmentation_mistake({**rle, "counts": wrong}, height, width)[0] == "bad_rle"
