"""Masks of boxes, pasted and encoded: plaintrain.masks."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from plaintrain.masks import BoxMasks, encode_masks

torch.set_num_threads(1)


def random_masks(number, side):
    return torch.rand(number, 1, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", [28, 7])
@pytest.mark.parametrize(
    "box",
    [
        [10.0, 5, 40, 30],
        [10.3, 5.7, 40.2, 30.9],
        # Over each edge, over all of them, tiny, and as small as a detection may be.
        [-20.5, 5, 10, 30],
        [10, -20.5, 30, 9],
        [50, 5, 90.2, 30],
        [10, 30, 20, 77.7],
        [-10, -10, 80, 70],
        [20.4, 20.4, 21.1, 21.3],
        [20, 20, 20.01, 20.01],
        [63.9, 47.9, 64, 48],
        [0, 0, 64, 48],
    ],
)
def test_pasted_masks_are_torchvisions(box, side):
    masks, boxes = random_masks(2, side), torch.tensor([box, [30.0, 20, 50, 40]])
    expected = paste_masks_in_image(masks, boxes, (48, 64))[:, 0] > 0.5
    found = BoxMasks(masks, boxes, 48, 64).paste()
    assert found.dtype == torch.bool and found.equal(expected)
    assert found[1].any()
    assert BoxMasks(masks, boxes, 48, 64).encode() == encode_masks(expected)


@pytest.mark.parametrize(
    "box",
    [
        [70.0, 5, 90, 30],
        [-40, 5, -10, 30],
        [10, 60, 30, 90],
        [10, -50, 30, -8],
        [70, 60, 90, 80],
        [200, 5, 201, 9],
    ],
)
def test_a_mask_wholly_outside_of_the_image_is_empty(box):
    found = BoxMasks(torch.ones(1, 1, 28, 28), torch.tensor([box]), 48, 64).paste()
    assert found.shape == (1, 48, 64) and not found.any()
    assert BoxMasks(torch.ones(1, 1, 28, 28), torch.tensor([box]), 48, 64).encode() == encode_masks(found)


def test_no_masks_are_none():
    masks = BoxMasks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), 48, 64)
    assert masks.paste().shape == masks.shape == (0, 48, 64) and masks.encode() == []


@pytest.mark.parametrize("size", [(48, 64), (31, 200), (200, 3), (1, 1)])
def test_masks_are_encoded_as_if_they_were_pasted(size):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(-0.3, 1.3, (60, 2, 2)) * size[::-1], axis=1).reshape(60, 4)
    # Full height, full width, whole image: runs that go on in the next column, and from the first pixel.
    corners[:3] = [[3, -9, 40, 400], [-9, 2, 400, 9], [-400, -400, 800, 800]]
    probabilities = torch.from_numpy(
        rng.uniform(0, 1, (60, 1, 14, 14)) + rng.uniform(-0.5, 0.5, (60, 1, 1, 1))
    )
    probabilities[2] = 1
    masks = BoxMasks(probabilities.float(), torch.from_numpy(corners).float(), *size)
    expected = masks.paste()
    found = masks.encode()
    assert found == encode_masks(expected)
    decoded = coco_mask.decode([{"size": size, "counts": counts} for counts in found])
    assert (decoded.transpose(2, 0, 1) == expected.numpy()).all() and expected[2].all()


def test_masks_go_to_another_device_with_their_boxes():
    masks = BoxMasks(torch.ones(2, 1, 4, 4), torch.rand(2, 4), 5, 6).to("meta")
    assert masks.probabilities.is_meta and masks.boxes.is_meta and masks.shape == (2, 5, 6)
    assert masks.device.type == "meta" and not masks.is_cuda


def test_masks_are_encoded_as_pycocotools_does():
    masks = torch.from_numpy(np.random.default_rng(0).random((5, 31, 17)) < 0.3)
    masks[3], masks[4] = False, True
    expected = [coco_mask.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8)) for mask in masks]
    assert encode_masks(masks) == [rle["counts"] for rle in expected]
    assert encode_masks(masks.to(torch.uint8)) == encode_masks(masks)
    assert encode_masks(masks[:0]) == []
