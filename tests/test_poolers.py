"""RoIAlign on the levels of a feature pyramid: modeling.poolers."""

import pytest
import torch
from model_helpers import random_boxes
from torchvision.ops import MultiScaleRoIAlign, roi_align

from plaintrain.modeling.poolers import RoIAlign

STRIDES = [4, 8, 16, 32]


def make_maps(number, side=512, channels=3, batch=2):
    """Feature maps of strides 4, 8, ..., a little wider than high."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch, channels, side >> i, (side >> i) + 3) for i in range(2, 2 + number)]
    return [torch.rand(shape, generator=generator, requires_grad=True) for shape in shapes]


def gradients_of(pooled, features):
    weighted = pooled * torch.arange(float(pooled[0, 0].numel())).view(pooled.shape[2:])
    return torch.autograd.grad(weighted.sum(), features)


@pytest.mark.parametrize(("ratio", "levels"), [(0, 4), (2, 1), (2, 4)])
def test_roi_align_is_torchvisions(ratio, levels):
    features, names = make_maps(levels, batch=3), list("0123"[:levels])
    maps = dict(zip(names, features, strict=True))
    boxes = [random_boxes(n, seed=n) * 8 for n in (30, 1)]
    # A side of 112 * 2 ** n is the border between two levels.
    boxes.append(torch.tensor([[0, 0, side, side] for side in (111.99, 112, 223.9999, 224, 448, 448.01)]))
    pools = RoIAlign(names, 7, ratio, STRIDES[:levels]), MultiScaleRoIAlign(names, 7, ratio)
    found, expected = (pool(maps, boxes, [(512, 512)] * 3) for pool in pools)
    assert pools[0].scales == pools[1].scales
    assert pools[0].assign_levels(torch.cat(boxes)).equal(pools[1].map_levels(boxes).float())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 if ratio else 0)
    for ours, theirs in zip(gradients_of(found, features), gradients_of(expected, features), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert theirs.any() or levels > 1
    assert pools[0](maps, [boxes[0][:0]] * 3, [(512, 512)] * 3).shape == (0, 3, 7, 7)
    # Boxes that are not numbers do not stop the pooling.
    boxes = [torch.tensor([[float("nan")] * 4, [0, 0, 0, 40]])] * 3
    found = pools[0](maps, boxes, [(512, 512)] * 3)
    assert found[1].any() and not found[0].any()


@pytest.mark.parametrize(
    ("ratio", "size", "aligned"),
    [(1, (2, 3), True), (2, (7, 7), False), (2, (2, 3), True), (3, (7, 7), True)],
)
def test_a_sum_of_locations_is_the_operators_also_at_the_edges(ratio, size, aligned):
    (features,) = make_maps(1, side=64)
    # Whole and half locations, tiny boxes, some of them wrong way round, and what lies outside.
    inside = torch.rand(40, 4, generator=torch.Generator().manual_seed(1)) * 70
    edges = torch.tensor([
        [-4.0, -4.0, 68.0, 68.0], [-8, -8, 4, 4], [-40, 0, -9, 30], [0, 0, 64, 64], [60, 60, 64, 64],
        [62, 30, 90, 31], [8, 8, 8, 8], [10, 10, 10.5, 40], [0, 66, 64, 70], [1e6, 0, 2e6, 9], [2, 2, 58, 62],
    ])  # fmt: skip
    boxes = torch.cat([edges, inside])
    boxes = [boxes[:20], boxes[20:]]
    found = RoIAlign(["0"], size, ratio, [4], aligned=aligned)({"0": features}, boxes)
    expected = roi_align(features, boxes, size, 0.25, ratio, aligned)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (ours,), (theirs,) = gradients_of(found, [features]), gradients_of(expected, [features])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not expected[2].any() and expected[0].any()


def test_low_precision_is_pooled_in_float32():
    (features,) = make_maps(1, side=64)
    pool, boxes = RoIAlign(["0"], 7, 2, [4]), [random_boxes(60)] * 2
    low = features.detach().bfloat16().requires_grad_()
    found, expected = pool({"0": low}, boxes), pool({"0": low.float()}, boxes)
    assert found.dtype == torch.bfloat16 and found.equal(expected.bfloat16())
    # Each location adds up many small numbers.
    (exact,) = torch.autograd.grad(expected.sum(), low, retain_graph=True)
    assert torch.autograd.grad(found.float().sum(), low)[0].equal(exact)


@pytest.mark.parametrize("ratio", [0, 2])
def test_aligned_boxes_of_many_images_are_pooled_from_the_level_of_their_size(ratio):
    maps = dict(zip("0123", make_maps(4), strict=True))
    # FPN paper: 224 belongs to the map of stride 16.
    levels = {1: 0, 111: 0, 448: 3, 2000: 3, 112: 1, 223: 1, 224: 2, 447: 2}
    boxes = [torch.tensor([[0.0, 0, side, side]]) for side in levels]
    pool = RoIAlign(list(maps), 5, ratio, STRIDES, aligned=True)
    pooled = pool(maps, [torch.cat(boxes[:3]), torch.cat(boxes[3:])], [(512, 512)] * 2)
    assert pooled.shape == (8, 3, 5, 5)
    for i, (row, box, level) in enumerate(zip(pooled, boxes, levels.values(), strict=True)):
        feature = maps[str(level)][int(i >= 3)][None]
        expected = roi_align(feature, [box], 5, 1 / STRIDES[level], ratio, aligned=True)
        torch.testing.assert_close(row, expected[0], rtol=1e-5, atol=1e-5)
