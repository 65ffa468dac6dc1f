"""Detectron2's anchors: modeling.detectron2."""

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from plaintrain.modeling.detectron2 import DefaultAnchorGenerator


def anchors_of(generator, height, width, strides):
    maps = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in strides]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)
    return anchors


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_anchors_follow_the_formula(offset):
    sizes, ratios, strides = ((32.0, 40.3), (64.0, 80.6)), ((0.5, 1.0, 2.0),) * 2, [8, 16]
    found = anchors_of(DefaultAnchorGenerator(sizes, ratios, strides, offset), 32, 48, strides)
    expected = []
    for level, stride in enumerate(strides):
        for row in range(32 // stride):
            for column in range(48 // stride):
                for ratio in ratios[level]:
                    for size in sizes[level]:
                        # Height / width is the ratio, height * width the size squared.
                        width = math.sqrt(size**2 / ratio)
                        height = width * ratio
                        x, y = (column + offset) * stride, (row + offset) * stride
                        expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(found, torch.tensor(expected))


def test_anchors_of_one_location_by_hand():
    generator = DefaultAnchorGenerator(((32,),), ((0.5, 1.0, 2.0),), [16])
    found = anchors_of(generator, 16, 16, [16])
    half_long, half_short = 16 * math.sqrt(2), 16 / math.sqrt(2)
    expected = [
        [-half_long, -half_short, half_long, half_short],
        [-16, -16, 16, 16],
        [-half_short, -half_long, half_short, half_long],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_order_is_torchvisions_and_the_difference_only_its_rounding():
    sizes, ratios = ((32, 40, 50),), ((0.5, 1.0, 2.0),)
    found = anchors_of(DefaultAnchorGenerator(sizes, ratios, [16]), 64, 96, [16])
    expected = anchors_of(AnchorGenerator(sizes, ratios), 64, 96, [16])
    assert found.shape == expected.shape == (4 * 6 * 9, 4)
    assert 0 < (found - expected).abs().max() <= 0.5
    assert not found.equal(found.round())


def test_the_stride_is_exact_where_the_map_is_not_a_fraction_of_the_image():
    strides = [4, 8, 16, 32, 64]
    sizes, ratios = ((32,),) * 5, ((1.0,),) * 5
    # 800 / 64 is 12.5: the last map has 13 rows, and torchvision's stride is 800 // 13.
    found = anchors_of(DefaultAnchorGenerator(sizes, ratios, strides), 800, 1088, strides)[-13 * 17 :]
    rows = ((found[:, 1] + found[:, 3]) / 2).view(13, 17)
    assert rows[:, 0].tolist() == [64 * row for row in range(13)]
    theirs = anchors_of(AnchorGenerator(sizes, ratios), 800, 1088, strides)[-13 * 17 :]
    assert ((theirs[:, 1] + theirs[:, 3]) / 2).view(13, 17)[1, 0] == 61


def test_every_image_of_a_batch_has_the_same_anchors():
    generator = DefaultAnchorGenerator(((32,),), ((1.0,),), [16])
    images = ImageList(torch.zeros(2, 3, 32, 64), [(32, 50), (20, 64)])
    first, second = generator(images, [torch.zeros(2, 1, 2, 4)])
    assert first.equal(second) and first.shape == (8, 4)
