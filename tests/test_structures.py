"""plaintrain.structures: box formats."""

import math

import pytest

from plaintrain.structures import BoxMode
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
