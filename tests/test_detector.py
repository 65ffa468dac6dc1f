"""What every detector shares: modeling.detector."""

import pytest
import torch
from model_helpers import RESNET18, SMALL_HEAD, TINY, build, make_cfg, make_sample

from plaintrain.modeling.anchors import CachedAnchorGenerator, DefaultAnchorGenerator
from plaintrain.modeling.backbones import build_backbone
from plaintrain.modeling.detector import Preprocess, build_anchor_generator, scale_to_original_size


def plain_image(values, height, width):
    return torch.tensor(values, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)


@pytest.mark.parametrize(("divisor", "size"), [(1, (40, 64)), (7, (42, 70)), (32, (64, 64))])
def test_images_are_normalised_and_padded_with_zeros_to_multiples_of_the_divisor(divisor, size):
    images = [plain_image([10, 20, 30], 40, 33), plain_image([50, 40, 250], 20, 64)]
    batch, _ = Preprocess([10.0, 20.0, 40.0], [1.0, 2.0, 4.0], bgr=False, size_divisible=divisor)(images)
    assert batch.image_sizes == [(40, 33), (20, 64)]
    assert batch.tensors.shape == (2, 3, *size)
    for i, values in enumerate([[0.0, 0.0, -2.5], [40.0, 10.0, 52.5]]):
        h, w = images[i].shape[1:]
        inside = batch.tensors[i, :, :h, :w]
        assert inside.equal(torch.tensor(values).view(3, 1, 1).expand(3, h, w))
        assert batch.tensors[i].abs().sum() == inside.abs().sum()


def test_bgr_swaps_the_channels_before_they_are_normalised():
    model = build(*TINY, *SMALL_HEAD, "INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [3.0, 1.0, 0.0])
    model.transform.std[:] = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    batch, _ = model.transform([plain_image([1, 2, 3], 32, 32)])
    assert batch.tensors[0, :, 0, 0].tolist() == [0.0, 0.5, 0.25]


def test_the_anchor_generator_is_that_of_the_config():
    for kind in (CachedAnchorGenerator, DefaultAnchorGenerator):
        name = kind.__name__.removeprefix("Cached")
        key = "MODEL.ANCHOR_GENERATOR"
        cfg = make_cfg(*RESNET18, f"{key}.NAME", name, f"{key}.OFFSET", 0.5)
        generator = build_anchor_generator(cfg, build_backbone(cfg))
        assert type(generator) is kind
        assert generator.sizes == ((32,), (64,), (128,), (256,), (512,))
        assert generator.aspect_ratios == ((0.5, 1.0, 2.0),) * 5
    assert (generator.strides, generator.offset) == ([4, 8, 16, 32, 64], 0.5)


def test_detections_are_brought_to_the_original_size():
    detection = {
        "boxes": torch.tensor([[1.0, 2, 20, 30]]),
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([2]),
        "masks": torch.ones(1, 1, 28, 28),
        "keypoints": torch.tensor([[[5.5, 6.5, 2.5], [7, 8, -1]]]),
    }
    (result,) = scale_to_original_size([detection], [make_sample(32, 64, original=(96, 128))])
    assert result["boxes"].tolist() == [[2, 6, 40, 90]]
    assert (result["scores"].tolist(), result["labels"].tolist()) == ([0.5], [2])
    assert result["keypoints"].tolist() == [[[11, 19.5, 2.5], [14, 24, -1]]]
    y, x = result["masks"][0].nonzero(as_tuple=True)
    assert result["masks"].shape == (1, 96, 128)
    edges = torch.stack([x.min(), y.min(), x.max(), y.max()])
    assert (edges - torch.tensor([2, 6, 40, 90])).abs().max() <= 1
    (unpasted,) = scale_to_original_size([detection], [make_sample(32, 64, original=(96, 128))], paste=False)
    assert unpasted["masks"].shape == (1, 96, 128) and unpasted["masks"].paste().equal(result["masks"])
