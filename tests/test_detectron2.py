"""Detectron2's anchors and RoIAlign: modeling.detectron2."""

import math

import pytest
import torch
from model_helpers import KEYPOINT, MASK, RESNET18, SMALL_HEAD, TINY, build, make_sample, two_samples
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from plaintrain.modeling.detectron2 import AlignedRoIAlign, DefaultAnchorGenerator

# ---- anchors -----------------------------------------------------------------------------------


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


# ---- RoIAlign ----------------------------------------------------------------------------------

STRIDES = [4, 8, 16, 32]


def feature_maps(batch=2, channels=3, side=512):
    generator = torch.Generator().manual_seed(2)
    return {
        str(i): torch.rand(batch, channels, side // stride, side // stride, generator=generator)
        for i, stride in enumerate(STRIDES)
    }


@pytest.mark.parametrize(
    ("side", "level"),
    [
        (1, 0),
        (50, 0),
        (111, 0),
        (112, 1),
        (223, 1),
        # FPN paper: 224 belongs to the map of stride 16.
        (224, 2),
        (447, 2),
        (448, 3),
        (2000, 3),
    ],
)
@pytest.mark.parametrize("ratio", [0, 2])
def test_a_box_is_pooled_from_the_level_of_its_size(side, level, ratio):
    maps = feature_maps()
    box = torch.tensor([[10.3, 7.9, 10.3 + side, 7.9 + side]])
    if side >= 112:
        # Exactly on the border between two levels.
        box = torch.tensor([[0.0, 0.0, side, side]])
    found = AlignedRoIAlign(list(maps), 7, ratio, STRIDES)(maps, [box, box[:0]], [(512, 512)] * 2)
    rois = torch.cat([torch.zeros(1, 1), box], dim=1)
    for i, stride in enumerate(STRIDES):
        expected = roi_align(maps[str(i)], rois, 7, 1 / stride, ratio, aligned=True)
        assert torch.allclose(found, expected, atol=1e-6) == (i == level)


def test_boxes_of_many_images_and_levels_keep_their_order():
    maps = feature_maps()
    boxes = [
        torch.tensor([[0.0, 0, 300, 300], [5, 5, 20, 30], [0, 0, 500, 510]]),
        torch.tensor([[50.0, 40, 200, 190], [0, 0, 10, 400]]),
    ]
    pool = AlignedRoIAlign(list(maps), 5, 2, STRIDES)
    found = pool(maps, boxes, [(512, 512)] * 2)
    assert found.shape == (5, 3, 5, 5)
    levels = [2, 0, 3, 1, 0]
    rows = [(image, box) for image, some in enumerate(boxes) for box in some]
    for pooled, level, (image, box) in zip(found, levels, rows, strict=True):
        expected = roi_align(maps[str(level)][image : image + 1], [box[None]], 5, 1 / STRIDES[level], 2, True)
        torch.testing.assert_close(pooled, expected[0])


def test_the_first_level_is_that_of_the_first_stride():
    maps = {"a": torch.rand(1, 2, 16, 16), "b": torch.rand(1, 2, 8, 8)}
    pool = AlignedRoIAlign(["a", "b"], 3, 2, [16, 32])
    for side, name, stride in ((100.0, "a", 16), (447.0, "a", 16), (448.0, "b", 32)):
        boxes = [torch.tensor([[0.0, 0, side, side]])]
        expected = roi_align(maps[name], boxes, 3, 1 / stride, 2, aligned=True)
        torch.testing.assert_close(pool(maps, boxes, [(256, 256)]), expected)


def test_no_boxes_give_no_features():
    maps = feature_maps()
    pool = AlignedRoIAlign(list(maps), 7, 0, STRIDES)
    assert pool(maps, [torch.zeros(0, 4), torch.zeros(0, 4)], [(512, 512)] * 2).shape == (0, 3, 7, 7)


def test_gradients_reach_the_features():
    maps = {name: feature.requires_grad_() for name, feature in feature_maps().items()}
    boxes = [torch.tensor([[0.0, 0, 300, 300], [5, 5, 20, 30]]), torch.tensor([[50.0, 40, 200, 190]])]
    AlignedRoIAlign(list(maps), 5, 2, STRIDES)(maps, boxes, [(512, 512)] * 2).sum().backward()
    assert [maps[str(i)].grad.abs().sum() > 0 for i in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("backbone", [TINY, RESNET18])
def test_poolers_and_anchors_by_config(backbone):
    model = build(
        *backbone, *SMALL_HEAD, *MASK, *KEYPOINT,
        "MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator",
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 0,
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIAlignV2",
        "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
    )  # fmt: skip
    heads = model.roi_heads
    assert isinstance(heads.box_roi_pool, AlignedRoIAlign) and heads.box_roi_pool.sampling_ratio == 0
    assert isinstance(heads.keypoint_roi_pool, AlignedRoIAlign)
    assert not isinstance(heads.mask_roi_pool, AlignedRoIAlign)
    levels = {len(TINY): [8], len(RESNET18): [4, 8, 16, 32]}[len(backbone)]
    assert heads.box_roi_pool.strides == levels
    losses = model(two_samples())
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        (found,) = model.eval()([make_sample(64, 64)])
    assert found["boxes"].isfinite().all()
