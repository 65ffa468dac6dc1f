"""plaintrain.structures: box formats, and segmentations as RLE.

tests/properties/test_target_properties.py has what holds for every box and mask.
"""

import math

import numpy as np
import pytest
from hostile_helpers import rejected
from pycocotools import mask as coco_mask

from plaintrain.structures import BoxMode, segmentation_mistake, segmentation_to_rle


def test_convert_takes_detectron2s_numbers_and_returns_a_new_list():
    box = [1, 2, 3, 4]
    assert BoxMode.convert(box, 1, 0) == [1, 2, 4, 6]
    assert BoxMode.convert(box, 0, 0) is not box and box == [1, 2, 3, 4]
    rejected("four finite numbers, not [1, 2, 3]", by=lambda: BoxMode.convert([1, 2, 3], 1, 0))
    rejected("'XYXY'", by=lambda: BoxMode.convert(box, "XYXY", 0))


SQUARE = [2, 1, 6, 1, 6, 4, 2, 4]


def test_segmentations_may_hold_tuples_and_polygons_are_their_union_cut_off_at_the_image():
    # Rows 1 to 3, columns 2 to 5, of an image of 8 x 10.
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[1:4, 2:6] = 1
    for segmentation in ([tuple(SQUARE)], {"size": (8, 10), "counts": (17, 3, 5, 3, 5, 3, 5, 3, 36)}):
        before = repr(segmentation)
        rle = segmentation_to_rle(segmentation, 8, 10)
        assert rle["size"] == [8, 10] and type(rle["counts"]) is bytes
        assert np.array_equal(coco_mask.decode(rle), mask)
        assert repr(segmentation) == before
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
    rejected(*words, by=lambda: segmentation_to_rle(segmentation, 8, 10))


def test_the_runs_of_compressed_masks_add_up_and_a_cut_is_seen():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (40, 60), (9, 90)):
        mask = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
        mask[:, width // 2 :] = height % 2
        rle = coco_mask.encode(mask)
        assert segmentation_mistake(rle, height, width) is None
        for wrong in (rle["counts"][:-1], rle["counts"] + b"1", rle["counts"] + b"\xff"):
            assert segmentation_mistake({**rle, "counts": wrong}, height, width)[0] == "bad_rle"
