"""Detectron2's anchors: modeling.detectron2."""

import math

import torch
from torchvision.models.detection.image_list import ImageList

from plaintrain.modeling.detectron2 import DefaultAnchorGenerator


def anchors_of(generator, height, width, strides):
    maps = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in strides]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)
    return anchors


def test_anchors_follow_the_formula():
    offset = 0.5
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


def test_the_stride_is_exact_where_the_map_is_not_a_fraction_of_the_image():
    strides = [4, 8, 16, 32, 64]
    sizes, ratios = ((32,),) * 5, ((1.0,),) * 5
    # 800 / 64 is 12.5: the last map has 13 rows.
    found = anchors_of(DefaultAnchorGenerator(sizes, ratios, strides), 800, 1088, strides)[-13 * 17 :]
    rows = ((found[:, 1] + found[:, 3]) / 2).view(13, 17)
    assert rows[:, 0].tolist() == [64 * row for row in range(13)]
