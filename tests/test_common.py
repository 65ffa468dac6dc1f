"""What every detector shares: modeling.common."""

import pytest
import torch
from model_helpers import (
    RESNET18,
    SMALL_HEAD,
    TINY,
    build,
    make_cfg,
    make_sample,
    two_samples,
)

from plaintrain.modeling.anchors import CachedAnchorGenerator
from plaintrain.modeling.backbone import build_backbone
from plaintrain.modeling.common import (
    Preprocess,
    build_anchor_generator,
    prior_bias,
    to_original_size,
)
from plaintrain.modeling.detectron2 import DefaultAnchorGenerator
from plaintrain.utils.errors import UserError

# ---- preprocessing -----------------------------------------------------------------------------


def test_images_are_normalised_and_padded_with_zeros_to_multiples_of_32():
    images = [
        torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 33),
        torch.tensor([50, 40, 250], dtype=torch.uint8).view(3, 1, 1).expand(3, 20, 64),
    ]
    batch, _ = Preprocess([10.0, 20.0, 40.0], [1.0, 2.0, 4.0], bgr=False)(images)
    assert batch.image_sizes == [(40, 33), (20, 64)]
    assert batch.tensors.shape == (2, 3, 64, 64)
    for i, values in enumerate([[0.0, 0.0, -2.5], [40.0, 10.0, 52.5]]):
        h, w = images[i].shape[1:]
        inside = batch.tensors[i, :, :h, :w]
        assert inside.equal(torch.tensor(values).view(3, 1, 1).expand(3, h, w))
        assert batch.tensors[i].abs().sum() == inside.abs().sum()


@pytest.mark.parametrize(
    ("divisor", "size"), [(1, (40, 64)), (7, (42, 70)), (32, (64, 64)), (128, (128, 128))]
)
def test_the_batch_is_padded_to_multiples_of_the_divisor(divisor, size):
    images = [torch.full((3, *s), 9, dtype=torch.uint8) for s in ((40, 33), (20, 64))]
    batch, _ = Preprocess([0.0] * 3, [1.0] * 3, bgr=False, size_divisible=divisor)(images)
    assert batch.tensors.shape == (2, 3, *size)
    assert batch.image_sizes == [(40, 33), (20, 64)]
    assert batch.tensors.sum() == 9 * 3 * (40 * 33 + 20 * 64)


def test_bgr_swaps_the_channels_before_they_are_normalised():
    pixel = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    batch, _ = Preprocess([3.0, 1.0, 0.0], [1.0, 2.0, 4.0], bgr=True)([pixel])
    assert batch.tensors[0, :, 0, 0].tolist() == [0.0, 0.5, 0.25]


def test_a_bgr_model_finds_what_the_rgb_model_with_swapped_weights_finds():
    rgb = build(
        *TINY, *SMALL_HEAD, "MODEL.PIXEL_MEAN", [100.0, 110.0, 130.0], "MODEL.PIXEL_STD", [50.0, 60.0, 70.0]
    )
    bgr = build(
        *TINY, *SMALL_HEAD, "INPUT.FORMAT", "BGR",
        "MODEL.PIXEL_MEAN", [130.0, 110.0, 100.0], "MODEL.PIXEL_STD", [70.0, 60.0, 50.0],
    )  # fmt: skip
    state = rgb.state_dict()
    assert bgr.state_dict().keys() == state.keys()
    state["backbone.stages.0.0.0.weight"] = state["backbone.stages.0.0.0.weight"].flip(1)
    bgr.load_state_dict(state)
    samples = two_samples()
    with torch.no_grad():
        for one, other in zip(rgb.eval()(samples), bgr.eval()(samples), strict=True):
            torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)


def test_pixel_mean_and_std_reach_the_model():
    model = build(*TINY, *SMALL_HEAD, "MODEL.PIXEL_MEAN", [7.0, 7.0, 7.0], "MODEL.PIXEL_STD", [2.0, 2.0, 2.0])
    batch, _ = model.transform([torch.full((3, 32, 32), 11, dtype=torch.uint8)])
    assert batch.tensors.unique().tolist() == [2.0]


# ---- anchors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("AnchorGenerator", CachedAnchorGenerator), ("DefaultAnchorGenerator", DefaultAnchorGenerator)],
)
def test_the_anchor_generator_that_the_config_names(name, kind):
    cfg = make_cfg(*RESNET18, "MODEL.ANCHOR_GENERATOR.NAME", name)
    generator = build_anchor_generator(cfg, build_backbone(cfg))
    assert type(generator) is kind
    assert generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert generator.aspect_ratios == ((0.5, 1.0, 2.0),) * 5
    if kind is DefaultAnchorGenerator:
        assert (generator.strides, generator.offset) == ([4, 8, 16, 32, 64], 0.0)


def test_the_offset_reaches_detectron2s_anchors():
    keys = ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator", "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5)
    assert build(*TINY, *SMALL_HEAD, *keys).rpn.anchor_generator.offset == 0.5


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ((*TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]]), ["SIZES", "1 level", "[[32], [64]]"]),
        ((*RESNET18, "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]]), ["SIZES", "5 levels"]),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [32, 64]), ["SIZES", "[32, 64]"]),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [32]), ["SIZES", "[32]"]),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [[]]), ["SIZES"]),
        ((*RESNET18, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0], [0.5]]), ["ASPECT_RATIOS", "5 levels"]),
        (
            (*RESNET18, "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128, 256]]),
            ["SIZES", "same length"],
        ),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5), ["ANCHOR_GENERATOR.OFFSET", "0.5"]),
        ((*TINY, "MODEL.ANCHOR_GENERATOR.NAME", "Anchors"), ["'Anchors'", "DefaultAnchorGenerator"]),
        ((*TINY, "MODEL.PIXEL_MEAN", [1.0]), ["PIXEL_MEAN"]),
        ((*TINY, "MODEL.PIXEL_STD", [1.0, 0.0, 1.0]), ["PIXEL_STD"]),
    ],
)
def test_settings_that_cannot_be_built_are_clear_errors(keys, words):
    with pytest.raises(UserError) as error:
        build(*keys)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)


@pytest.mark.parametrize("probability", [0.01, 0.5, 0.9])
def test_the_sigmoid_of_the_prior_bias_is_the_probability(probability):
    assert torch.tensor(prior_bias(probability, "KEY")).sigmoid().item() == pytest.approx(probability)


# ---- the original size ---------------------------------------------------------------------------


def test_detections_are_brought_to_the_original_size():
    detection = {
        "boxes": torch.tensor([[1.0, 2, 20, 30]]),
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([3]),
        "masks": torch.ones(1, 1, 28, 28),
        "keypoints": torch.tensor([[[5.5, 6.5, 1], [7, 8, 1]]]),
        "keypoints_scores": torch.tensor([[2.5, -1]]),
    }
    (result,) = to_original_size([detection], [make_sample(32, 64, original=(96, 128))], label_offset=1)
    assert result["boxes"].tolist() == [[2, 6, 40, 90]]
    assert (result["scores"].tolist(), result["labels"].tolist()) == ([0.5], [2])
    assert result["keypoints"].tolist() == [[[11, 19.5, 2.5], [14, 24, -1]]]
    y, x = result["masks"][0].nonzero(as_tuple=True)
    assert result["masks"].shape == (1, 96, 128)
    edges = torch.stack([x.min(), y.min(), x.max(), y.max()])
    assert (edges - torch.tensor([2, 6, 40, 90])).abs().max() <= 1
    (unpasted,) = to_original_size([detection], [make_sample(32, 64, original=(96, 128))], 1, paste=False)
    assert unpasted["masks"].shape == (1, 96, 128) and unpasted["masks"].paste().equal(result["masks"])
