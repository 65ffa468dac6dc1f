"""plaintrain.structures: box formats, and segmentations as RLE."""

import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from plaintrain.structures import BoxMode, segmentation_to_rle
from plaintrain.utils.errors import UserError


def test_values_are_detectron2s():
    assert (int(BoxMode.XYXY_ABS), int(BoxMode.XYWH_ABS)) == (0, 1)


@pytest.mark.parametrize(
    ("box", "source", "target", "expected"),
    [
        ([10, 20, 3, 4], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS, [10, 20, 13, 24]),
        ([10, 20, 13, 24], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, [10, 20, 3, 4]),
        ([10, 20, 13, 24], BoxMode.XYXY_ABS, BoxMode.XYXY_ABS, [10, 20, 13, 24]),
        ((-1.5, 2, 3, 4), BoxMode.XYWH_ABS, BoxMode.XYWH_ABS, [-1.5, 2, 3, 4]),
    ],
)
def test_convert_between_the_modes(box, source, target, expected):
    converted = BoxMode.convert(box, source, target)
    assert converted == expected
    assert type(converted) is list
    assert all(type(value) is float for value in converted)


def test_a_mode_may_be_its_number_as_json_holds_it():
    assert BoxMode.convert([1, 2, 3, 4], 1, 0) == [1, 2, 4, 6]


def test_convert_leaves_its_argument_alone():
    box = [1, 2, 3, 4]
    BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert box == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "box", [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, math.nan, 4], [math.inf, 2, 3, 4], [1, 2, 3, "4"]]
)
def test_a_box_that_is_not_four_finite_numbers_is_refused_and_shown(box):
    with pytest.raises(UserError, match="four finite numbers") as error:
        BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert str(box) in str(error.value)


@pytest.mark.parametrize("mode", [4, "XYXY"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(UserError, match=str(mode)):
        BoxMode.convert([1, 2, 3, 4], mode, BoxMode.XYXY_ABS)


# ---- segmentations -----------------------------------------------------------------------------

SQUARE = [2, 1, 6, 1, 6, 4, 2, 4]


def square_mask():
    """Rows 1 to 3, columns 2 to 5, of an image of 8 x 10."""
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[1:4, 2:6] = 1
    return mask


def counts_of(mask):
    """Uncompressed counts: lengths of the runs of 0 and 1, down the columns."""
    counts, value = [0], 0
    for pixel in mask.flatten(order="F"):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def compressed(mask):
    return coco_mask.encode(np.asfortranarray(mask))


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        [tuple(map(float, SQUARE))],
        {"size": [8, 10], "counts": counts_of(square_mask())},
        {"size": (8, 10), "counts": tuple(counts_of(square_mask()))},
        {"size": [8, 10], "counts": compressed(square_mask())["counts"]},
        {"size": [8, 10], "counts": compressed(square_mask())["counts"].decode()},
    ],
    ids=["polygon", "tuples", "counts", "tuple_counts", "bytes", "str"],
)
def test_every_form_of_a_segmentation_is_the_same_rle(segmentation):
    rle = segmentation_to_rle(segmentation, 8, 10)
    assert rle["size"] == [8, 10] and type(rle["counts"]) is bytes
    assert np.array_equal(coco_mask.decode(rle), square_mask())


def test_several_polygons_are_their_union():
    mask = square_mask()
    mask[2:7, 4:9] = 1
    rle = segmentation_to_rle([SQUARE, [4, 2, 9, 2, 9, 7, 4, 7]], 8, 10)
    assert np.array_equal(coco_mask.decode(rle), mask)


def test_what_a_polygon_has_outside_of_the_image_is_cut_off():
    rle = segmentation_to_rle([[-5, -5, 6, -5, 6, 4, -5, 4]], 8, 10)
    assert coco_mask.decode(rle).sum() == 6 * 4 and coco_mask.decode(rle)[:4, :6].all()


def test_a_segmentation_is_not_changed():
    polygons, rle = [list(SQUARE)], {"size": [8, 10], "counts": counts_of(square_mask())}
    segmentation_to_rle(polygons, 8, 10)
    segmentation_to_rle(rle, 8, 10)
    assert polygons == [SQUARE] and rle == {"size": [8, 10], "counts": counts_of(square_mask())}


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[1, 2, 3, 4]], ["polygon", "3 finite points", "[1, 2, 3, 4]"]),
        ([[1, 2, 3, 4, 5, 6, 7]], ["polygon", "[1, 2, 3, 4, 5, 6, 7]"]),
        ([SQUARE, []], ["polygon", "[]"]),
        # A list of numbers where a list of polygons belongs.
        (SQUARE, ["polygon", "2"]),
        ([[1, 2, 3, math.nan, 5, 6]], ["finite", "nan"]),
        ([[1, 2, 3, "4", 5, 6]], ["finite", "'4'"]),
        ([], ["no segmentation"]),
        (None, ["no segmentation"]),
        ("polygon", ["neither polygons nor an RLE", "polygon"]),
        ({"counts": [80]}, ["neither polygons nor an RLE", "counts"]),
        ({"size": [8, 10]}, ["neither polygons nor an RLE", "size"]),
        ({"size": [10, 8], "counts": [80]}, ["[10, 8]", "[8, 10]"]),
        ({"size": [8, 10], "counts": [10, 20]}, ["counts", "8 x 10"]),
        ({"size": [8, 10], "counts": [100, -20]}, ["counts"]),
        ({"size": [8, 10], "counts": []}, ["counts"]),
        ({"size": [8, 10], "counts": [40, "40"]}, ["counts"]),
        ({"size": [8, 10], "counts": [40.5, 39.5]}, ["counts"]),
        ({"size": [8, 10], "counts": 80}, ["counts", "8 x 10"]),
        ({"size": 8, "counts": [80]}, ["size", "8"]),
        # A string that was cut off, of which pycocotools would read on past the end.
        ({"size": [8, 10], "counts": "1"}, ["counts", "8 x 10"]),
        ({"size": [8, 10], "counts": b"\x01"}, ["counts", "8 x 10"]),
    ],
)
def test_what_is_no_segmentation_is_refused(segmentation, words):
    with pytest.raises(UserError) as error:
        segmentation_to_rle(segmentation, 8, 10)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)
