"""plaintrain.data.transforms and crops: sizes, places and probabilities that are drawn.

tests/properties/test_transform_properties.py checks that targets follow the pixels.
"""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import box_iou

from plaintrain.data.crops import FixedSizeCrop, RandomCrop, RandomIoUCrop
from plaintrain.data.transforms import (
    RandomHorizontalFlip,
    RandomShortestSize,
    RandomVerticalFlip,
    RandomZoomOut,
    Resize,
    ResizeShortestEdge,
    ScaleJitter,
    shortest_edge_size,
)
from plaintrain.utils.errors import UserError


def _tensors(height, width, *boxes):
    """A dark image with a bright rectangle where each box is."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] = 255
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    return {"image": tv_tensors.Image(image), "boxes": boxes, "labels": torch.arange(len(boxes))}


def _bright(tensors):
    """The box around the bright pixels."""
    y, x = torch.nonzero(tensors["image"][0] > 127, as_tuple=True)
    return [x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1]


def _size(tensors):
    assert tensors["boxes"].canvas_size == tuple(tensors["image"].shape[-2:])
    return tuple(tensors["image"].shape[-2:])


def _rng(seed=0):
    return np.random.default_rng(seed)


def _detectron2_size(h, w, short_edge_length, max_size):
    """ResizeShortestEdge.get_output_shape of Detectron2 0.6."""
    size = short_edge_length * 1.0
    scale = size / min(h, w)
    newh, neww = (size, scale * w) if h < w else (scale * h, size)
    if max(newh, neww) > max_size:
        scale = max_size * 1.0 / max(newh, neww)
        newh = newh * scale
        neww = neww * scale
    return int(newh + 0.5), int(neww + 0.5)


def test_shortest_edge_size_is_that_of_detectron2():
    rng = _rng()
    for _ in range(3000):
        h, w, drawn_short, drawn_longest = rng.integers(20, 1200, size=4).tolist()
        for short, longest in ((800, 1333), (640, 1333), (drawn_short, drawn_longest)):
            assert shortest_edge_size(h, w, short, longest) == _detectron2_size(h, w, short, longest)


def test_resize_shortest_edge_gives_known_sizes():
    for size, short, longest, expected in (
        ((480, 640), 800, 1333, (800, 1067)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((1, 900), 20, 30, (1, 30)),
    ):
        resized = ResizeShortestEdge((short,), longest)(_tensors(*size, (0, 0, 9, 9)), _rng())
        assert _size(resized) == expected
        assert resized["image"].dtype == torch.uint8


def test_resize_shortest_edge_draws_each_of_its_lengths():
    resize, tensors = ResizeShortestEdge((20, 24, 31), 100), _tensors(16, 20)
    seen = [min(_size(resize(tensors, _rng(seed)))) for seed in range(60)]
    assert set(seen) == {20, 24, 31}
    assert min(seen.count(length) for length in set(seen)) > 8


def test_resize_shortest_edge_draws_each_length_of_its_range():
    resize, tensors = ResizeShortestEdge((20, 24), 100, "range"), _tensors(16, 20)
    assert {min(_size(resize(tensors, _rng(seed)))) for seed in range(60)} == {20, 21, 22, 23, 24}


def test_random_shortest_size_draws_one_of_its_sizes_within_the_longest():
    tensors = _tensors(16, 20)
    sizes = {_size(RandomShortestSize([24, 32])(tensors, _rng(seed))) for seed in range(20)}
    assert sizes == {(24, 30), (32, 40)}
    assert _size(RandomShortestSize(32, 35)(tensors, _rng())) == (28, 35)


def test_resize_gives_its_size_to_any_image():
    resized = Resize([30, 20])(_tensors(60, 90, (18, 10, 45, 34)), _rng())
    assert _size(resized) == (30, 20)
    assert resized["boxes"].tolist() == [[4, 5, 10, 17]]
    assert _size(Resize((30, 20))(_tensors(9, 7), _rng())) == (30, 20)


def test_scale_jitter_fits_into_the_target_times_a_factor_of_its_range():
    jitter = ScaleJitter((60, 120), (0.5, 2.0))
    heights = []
    for seed in range(300):
        height, width = _size(jitter(_tensors(40, 50), _rng(seed)))
        # Factor 1 makes 60 x 75, as the height is what meets the target first.
        assert width == pytest.approx(height * 50 / 40, abs=1.3)
        heights.append(height)
    assert min(heights) in (30, 31)
    assert max(heights) in (118, 119)
    assert np.mean(heights) == pytest.approx(75, abs=6)
    assert _size(ScaleJitter((60, 60), (1, 1))(_tensors(30, 90), _rng())) == (20, 60)
    # A pixel is left.
    assert _size(ScaleJitter((20, 20), (0.1, 0.1))(_tensors(2, 100), _rng())) == (1, 2)


@pytest.mark.parametrize("flip", [RandomHorizontalFlip, RandomVerticalFlip])
def test_flip_happens_as_often_as_its_probability(flip):
    tensors = _tensors(30, 40, (2, 5, 10, 22))
    for p, low, high in ((0.0, 0, 0), (0.5, 80, 120), (0.9, 170, 190), (1.0, 200, 200)):
        flipped = sum(_bright(flip(p)(tensors, _rng(seed))) != [2, 5, 10, 22] for seed in range(200))
        assert low <= flipped <= high


def test_horizontal_flip_without_pairs_rejects_keypoints():
    points = tv_tensors.KeyPoints(torch.zeros(1, 3, 2), canvas_size=(30, 40))
    tensors = {**_tensors(30, 40, (2, 5, 10, 26)), "keypoints": points, "visibility": torch.ones(1, 3)}
    with pytest.raises(UserError, match="keypoint_flip_indices"):
        RandomHorizontalFlip(1.0)(tensors, _rng())


def test_zoom_out_puts_the_image_anywhere_on_a_canvas_of_its_range():
    tensors, sides, places = _tensors(20, 30, (3, 4, 13, 14)), [], []
    for seed in range(150):
        zoomed = RandomZoomOut(fill=50, side_range=(1.0, 3.0), p=1.0)(tensors, _rng(seed))
        height, width = _size(zoomed)
        assert abs(height / 20 - width / 30) <= 0.05
        assert _bright(zoomed) == zoomed["boxes"][0].tolist()
        assert (zoomed["image"] == 0).sum() == 3 * (20 * 30 - 100)
        assert (zoomed["image"] == 50).sum() == 3 * (height * width - 20 * 30)
        sides.append(height / 20)
        places.append((zoomed["boxes"][0, 0].item() - 3) / max(1, width - 30))
    assert min(sides) < 1.1
    assert 2.9 < max(sides) <= 3
    assert (min(places), max(places)) == (0, 1)
    zoomed = sum(_size(RandomZoomOut(p=0.3)(tensors, _rng(seed))) != (20, 30) for seed in range(200))
    assert 40 <= zoomed <= 80


def _windows(crop_type, size, image=(40, 60)):
    crop = RandomCrop(crop_type, size)
    return np.array([_size(crop(_tensors(*image), _rng(seed))) for seed in range(200)])


def test_random_crop_has_its_size_within_the_image():
    assert {tuple(w) for w in _windows("relative", (0.5, 0.35))} == {(20, 21)}
    assert {tuple(w) for w in _windows("relative", (1.0, 1.0))} == {(40, 60)}
    # A part of a pixel still leaves one.
    assert {tuple(w) for w in _windows("relative", (0.001, 0.001))} == {(1, 1)}
    assert {tuple(w) for w in _windows("absolute", (30, 25))} == {(30, 25)}
    assert {tuple(w) for w in _windows("absolute", (50, 25))} == {(40, 25)}


def test_random_crop_draws_both_sides_from_its_range():
    windows = _windows("relative_range", (0.5, 0.8))
    assert (windows.min(axis=0) == [20, 48]).all()
    assert (windows.max(axis=0) == [40, 60]).all()
    assert abs(np.corrcoef(windows.T)[0, 1]) < 0.2
    windows = _windows("absolute_range", (37, 42))
    assert set(windows[:, 0]) == {37, 38, 39, 40}
    assert set(windows[:, 1]) == {37, 38, 39, 40, 41, 42}


@pytest.mark.parametrize("crop", [RandomCrop("absolute", (38, 57)), FixedSizeCrop((38, 57))])
def test_crop_lies_anywhere_in_the_image(crop):
    image = tv_tensors.Image(torch.arange(40 * 60).reshape(1, 40, 60).expand(3, -1, -1))
    crops = [crop({"image": image}, _rng(seed))["image"] for seed in range(200)]
    corners = {divmod(cropped[0, 0, 0].item(), 60) for cropped in crops}
    assert corners == {(y, x) for y in range(3) for x in range(4)}


def test_fixed_size_crop_pads_right_and_below():
    tensors = _tensors(20, 60, (0, 0, 60, 20))
    fixed = FixedSizeCrop((30, 57), fill=(7, 8, 9))(tensors, _rng())
    assert _size(fixed) == (30, 57)
    assert fixed["image"][:, 20:].flatten(1).unique(dim=1).tolist() == [[7], [8], [9]]
    assert (fixed["image"][:, :20] == 255).all()
    assert fixed["boxes"].tolist() == [[0, 0, 57, 20]]
    assert torch.equal(FixedSizeCrop((20, 60))(tensors, _rng())["image"], tensors["image"])


def test_iou_crop_keeps_the_instances_whose_centre_is_inside():
    boxes = torch.tensor([[4, 5, 24, 22], [30, 10, 55, 35], [10, 28, 20, 39], [50, 1, 59, 9]])
    tensors = _tensors(40, 60, *boxes.tolist())
    image = torch.arange(40 * 60, dtype=torch.int32).reshape(1, 40, 60)
    tensors["image"] = tv_tensors.Image(image)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    shapes, least = set(), {0.0: [], 0.5: []}
    for option in least:
        for seed in range(120):
            cropped = RandomIoUCrop(sampler_options=[option, 1.0])(tensors, _rng(seed))
            height, width = _size(cropped)
            top, left = divmod(cropped["image"][0, 0, 0].item(), 60)
            window = torch.tensor([left, top, left + width, top + height])
            inside = ((centres > window[:2]) & (centres < window[2:])).all(dim=1)
            assert cropped["labels"].tolist() == inside.nonzero().flatten().tolist()
            expected = boxes[inside].clamp(min=window[:2].repeat(2), max=window[2:].repeat(2))
            assert torch.equal(cropped["boxes"], (expected - window[:2].repeat(2)).float())
            shapes.add((height, width))
            if (height, width) != (40, 60):
                assert 0.5 <= width / height <= 2
                assert height >= 12
                assert width >= 18
                least[option].append(box_iou(boxes[inside].float(), window[None].float()).max().item())
    assert (40, 60) in shapes
    assert len(shapes) > 30
    assert min(least[0.5]) >= 0.5 > min(least[0.0])
    assert len(least[0.0]) == pytest.approx(60, abs=20)


def test_iou_crop_of_an_image_without_instances_is_the_image():
    tensors = _tensors(20, 30)
    assert RandomIoUCrop()(tensors, _rng()) is tensors


@pytest.mark.parametrize(
    ("step", "arguments", "words"),
    [
        (ResizeShortestEdge, ((), 100), "short_edge_length"),
        (ResizeShortestEdge, ((-5, 20), 100), "-5"),
        (ResizeShortestEdge, ((20, 30, 40), 100, "range"), "short_edge_length"),
        (ResizeShortestEdge, ((40, 20), 100, "range"), "short_edge_length"),
        (ResizeShortestEdge, ((20,), 100, "rnage"), "rnage"),
        (ResizeShortestEdge, ((20.5,), 100), "whole numbers"),
        (ResizeShortestEdge, ((True,), 100), "short_edge_length"),
        (ResizeShortestEdge, ((20,), 0), "max_size"),
        (ResizeShortestEdge, ((20,), "100"), "max_size"),
        (Resize, (300,), "size must be 2 whole numbers"),
        (Resize, ((0, 10),), "size must be 2 whole numbers"),
        (Resize, ((10, 10.5),), "size must be 2 whole numbers"),
        (RandomVerticalFlip, (1.5,), "p must be a number from 0 to 1, not 1.5"),
        (RandomCrop, ("relative", (0, 0.5)), r"crop_size.*\(0, 0.5\)"),
        (RandomCrop, ("relative_range", (0.5, 1.5)), r"crop_size.*\(0.5, 1.5\)"),
        (RandomCrop, ("absolute", (20, 20, 3)), r"crop_size.*\(20, 20, 3\)"),
        (RandomCrop, ("absolute_range", (30, 20)), r"crop_size.*\(30, 20\)"),
        (RandomCrop, ("relativ_range", (20, 20)), "relativ_range"),
        (RandomIoUCrop, (0.3, 1.0, 0.5, 2.0, (0.3, 0.5)), "sampler_options must hold a 1"),
    ],
)
def test_arguments_out_of_range_are_rejected(step, arguments, words):
    with pytest.raises(UserError, match=words):
        step(*arguments)
