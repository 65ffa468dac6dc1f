"""plaintrain.data.transforms and crops: what moves pixels and targets, drawn from the given generator."""

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


def _with_keypoints(tensors, points, visibility):
    """points: `[N][Kp]` pairs x, y."""
    size = tuple(tensors["image"].shape[-2:])
    points = tv_tensors.KeyPoints(torch.tensor(points, dtype=torch.float32), canvas_size=size)
    return {**tensors, "keypoints": points, "visibility": torch.tensor(visibility)}


def _with_masks(tensors, masks):
    return {**tensors, "masks": tv_tensors.Mask(masks.to(torch.uint8))}


def _bright(tensors):
    """The box around the bright pixels."""
    y, x = torch.nonzero(tensors["image"][0] > 127, as_tuple=True)
    return [x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1]


def _size(tensors):
    assert tensors["boxes"].canvas_size == tuple(tensors["image"].shape[-2:])
    return tuple(tensors["image"].shape[-2:])


def _rng(seed=0):
    return np.random.default_rng(seed)


# ---- resizing


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


def test_sizes_are_detectron2s_for_coco_like_images():
    rng = _rng()
    for _ in range(3000):
        h, w, drawn_short, drawn_longest = rng.integers(20, 1200, size=4).tolist()
        for short, longest in ((800, 1333), (640, 1333), (drawn_short, drawn_longest)):
            assert shortest_edge_size(h, w, short, longest) == _detectron2_size(h, w, short, longest)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((400, 400), 800, 1333, (800, 800)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((427, 640), 427, 1333, (427, 640)),
        ((1, 900), 20, 30, (1, 30)),
    ],
)
def test_known_sizes(size, short, longest, expected):
    assert shortest_edge_size(*size, short, longest) == expected
    resized = ResizeShortestEdge((short,), longest)(_tensors(*size, (0, 0, 9, 9)), _rng())
    assert _size(resized) == expected
    assert resized["image"].dtype == torch.uint8


def test_choice_draws_every_length_and_no_other():
    resize, tensors = ResizeShortestEdge((20, 24, 31), 100), _tensors(16, 20)
    seen = [min(_size(resize(tensors, _rng(seed)))) for seed in range(60)]
    assert set(seen) == {20, 24, 31}
    assert min(seen.count(length) for length in set(seen)) > 8


def test_range_draws_every_length_between_both_ends():
    resize, tensors = ResizeShortestEdge((20, 24), 100, "range"), _tensors(16, 20)
    assert {min(_size(resize(tensors, _rng(seed)))) for seed in range(60)} == {20, 21, 22, 23, 24}


@pytest.mark.parametrize("short", [24, 37, 60, 96, 131])
def test_a_resized_box_still_holds_its_rectangle(short):
    resized = ResizeShortestEdge((short,), 1000)(_tensors(60, 90, (20, 10, 50, 34)), _rng())
    difference = np.array(_bright(resized)) - resized["boxes"][0].numpy()
    assert np.abs(difference).max() <= 1
    assert resized["boxes"][0].numpy() == pytest.approx(np.array([20, 10, 50, 34]) * short / 60, abs=0.3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (((), 100), "short_edge_length"),
        (((0,), 100), "short_edge_length"),
        (((-5, 20), 100), "-5"),
        (((20,), 100, "range"), "short_edge_length"),
        (((20, 30, 40), 100, "range"), "short_edge_length"),
        (((40, 20), 100, "range"), "short_edge_length"),
        (((20,), 0), "max_size"),
        (((20,), -1), "max_size"),
        (((20,), 100, "rnage"), "rnage"),
        (((20.5,), 100), "whole numbers"),
        (((True,), 100), "short_edge_length"),
        ((20, 100), "short_edge_length"),
        (((20,), "100"), "max_size"),
    ],
)
def test_bad_lengths_and_styles_are_refused_when_they_are_given(arguments, word):
    with pytest.raises(UserError, match=word):
        ResizeShortestEdge(*arguments)


def test_a_shortest_size_is_one_of_those_given_within_the_longest():
    tensors = _tensors(16, 20)
    sizes = {_size(RandomShortestSize([24, 32])(tensors, _rng(seed))) for seed in range(20)}
    assert sizes == {(24, 30), (32, 40)}
    assert _size(RandomShortestSize(32, 35)(tensors, _rng())) == (28, 35)


def test_resize_brings_any_image_to_its_size():
    resized = Resize([30, 20])(_tensors(60, 90, (18, 10, 45, 34)), _rng())
    assert _size(resized) == (30, 20)
    assert resized["boxes"].tolist() == [[4, 5, 10, 17]]
    assert _size(Resize((30, 20))(_tensors(9, 7), _rng())) == (30, 20)


@pytest.mark.parametrize("size", [300, (300,), (0, 10), (10, 10.5), "300", None])
def test_a_size_is_two_whole_numbers(size):
    with pytest.raises(UserError, match="size must be 2 whole numbers"):
        Resize(size)


@pytest.mark.parametrize("size", [(48, 64), (21, 33), (17, 90), (7, 5)])
def test_masks_are_sampled_where_the_image_is(size):
    # A half plane: in the resized image its edge is where the interpolated one crosses one half.
    tensors = _tensors(30, 40, (0, 0, 17, 30))
    tensors = _with_masks(tensors, (tensors["image"][:1] > 0))
    resized = Resize(size)(tensors, _rng())
    assert resized["masks"].dtype == torch.uint8
    assert (resized["masks"][0] == (resized["image"][0] > 127)).float().mean() > 1 - 0.6 / size[1]
    edge = resized["masks"][0].sum(dim=1).float()
    assert (edge - resized["boxes"][0, 2]).abs().max() <= 0.51


def test_keypoints_scale_with_the_image():
    tensors = _with_keypoints(_tensors(30, 40, (0, 0, 9, 9)), [[[4, 6], [40, 30]]], [[2, 1]])
    resized = Resize((60, 20))(tensors, _rng())
    assert resized["keypoints"].tolist() == [[[2, 12], [20, 60]]]
    assert resized["keypoints"].canvas_size == (60, 20)
    assert resized["visibility"].tolist() == [[2, 1]]


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


def test_scale_jitter_never_loses_the_whole_image():
    assert _size(ScaleJitter((20, 20), (0.1, 0.1))(_tensors(2, 100), _rng())) == (1, 2)


# ---- flipping


@pytest.mark.parametrize(
    ("flip", "expected"),
    [(RandomHorizontalFlip(1.0), [30, 5, 38, 25]), (RandomVerticalFlip(1.0), [2, 5, 10, 25])],
)
def test_a_flip_moves_the_box_with_its_rectangle(flip, expected):
    flipped = flip(_tensors(30, 40, (2, 5, 10, 25)), _rng())
    assert flipped["boxes"].tolist() == [expected]
    assert _bright(flipped) == expected
    upper = RandomVerticalFlip(1.0)(_tensors(30, 40, (2, 5, 10, 12)), _rng())
    assert _bright(upper) == upper["boxes"][0].tolist() == [2, 18, 10, 25]


@pytest.mark.parametrize("kind", [RandomHorizontalFlip, RandomVerticalFlip])
def test_a_flip_happens_as_often_as_its_probability(kind):
    tensors = _tensors(30, 40, (2, 5, 10, 22))
    for p, low, high in ((0.0, 0, 0), (0.5, 80, 120), (0.9, 170, 190), (1.0, 200, 200)):
        flipped = sum(_bright(kind(p)(tensors, _rng(seed))) != [2, 5, 10, 22] for seed in range(200))
        assert low <= flipped <= high
    with pytest.raises(UserError, match="p must be a number from 0 to 1, not 1.5"):
        kind(1.5)


POINTS = [[[2, 5], [10, 5], [6, 25.5]]]


def test_a_horizontal_flip_mirrors_keypoints_continuously_and_exchanges_left_and_right():
    tensors = _with_keypoints(_tensors(30, 40, (2, 5, 10, 26)), POINTS, [[2, 1, 0]])
    flipped = RandomHorizontalFlip(1.0, (1, 0, 2))(tensors, _rng())
    # The corner at x = 2 lies at 40 - 2, and is now the right one's.
    assert flipped["keypoints"].tolist() == [[[30, 5], [38, 5], [34, 25.5]]]
    assert flipped["visibility"].tolist() == [[1, 2, 0]]


def test_a_vertical_flip_mirrors_keypoints_and_leaves_left_left():
    tensors = _with_keypoints(_tensors(30, 40, (2, 5, 10, 26)), POINTS, [[2, 1, 0]])
    flipped = RandomVerticalFlip(1.0)(tensors, _rng())
    assert flipped["keypoints"].tolist() == [[[2, 25], [10, 25], [6, 4.5]]]
    assert flipped["visibility"].tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("flip", [RandomHorizontalFlip(1.0, (1, 0, 2)), RandomVerticalFlip(1.0)])
def test_two_flips_are_none(flip):
    tensors = _with_keypoints(_tensors(30, 41, (2, 5, 10, 26)), POINTS, [[2, 1, 0]])
    tensors = _with_masks(tensors, tensors["image"][:1] > 0)
    twice = flip(flip(tensors, _rng()), _rng())
    for name, value in tensors.items():
        assert torch.equal(twice[name], value), name
    assert not torch.equal(flip(tensors, _rng())["masks"], tensors["masks"])


def test_a_flip_that_does_not_know_the_pairs_refuses_keypoints():
    tensors = _with_keypoints(_tensors(30, 40, (2, 5, 10, 26)), POINTS, [[2, 1, 0]])
    with pytest.raises(UserError, match="keypoint_flip_indices"):
        RandomHorizontalFlip(1.0)(tensors, _rng())


# ---- cropping


def _windows(crop_type, size, image=(40, 60)):
    crop = RandomCrop(crop_type, size)
    return np.array([_size(crop(_tensors(*image), _rng(seed))) for seed in range(300)])


def test_a_relative_window_has_its_share_of_the_image():
    assert {tuple(w) for w in _windows("relative", (0.5, 0.35))} == {(20, 21)}
    assert {tuple(w) for w in _windows("relative", (1.0, 1.0))} == {(40, 60)}
    # A share that is less than a pixel still leaves one.
    assert {tuple(w) for w in _windows("relative", (0.001, 0.001))} == {(1, 1)}


def test_a_relative_range_window_reaches_from_its_share_to_the_whole_image_in_both_directions():
    windows = _windows("relative_range", (0.5, 0.8))
    assert (windows.min(axis=0) == [20, 48]).all()
    assert (windows.max(axis=0) == [40, 60]).all()
    assert abs(np.corrcoef(windows.T)[0, 1]) < 0.2


def test_an_absolute_window_has_its_pixels_but_no_more_than_the_image():
    assert {tuple(w) for w in _windows("absolute", (30, 25))} == {(30, 25)}
    assert {tuple(w) for w in _windows("absolute", (50, 25))} == {(40, 25)}


def test_an_absolute_range_window_takes_every_length_between_its_ends_within_the_image():
    windows = _windows("absolute_range", (37, 42))
    assert set(windows[:, 0]) == {37, 38, 39, 40}
    assert set(windows[:, 1]) == {37, 38, 39, 40, 41, 42}


def test_a_window_lies_anywhere_in_the_image():
    crop = RandomCrop("absolute", (38, 57))
    image = tv_tensors.Image(torch.arange(40 * 60).reshape(1, 40, 60))
    crops = [crop({"image": image}, _rng(seed))["image"] for seed in range(200)]
    corners = {divmod(cropped[0, 0, 0].item(), 60) for cropped in crops}
    assert corners == {(y, x) for y in range(3) for x in range(4)}


def test_a_crop_cuts_boxes_and_removes_those_cut_away():
    kinds = set()
    for seed in range(60):
        cropped = RandomCrop("absolute", (20, 25))(_tensors(40, 60, (38, 14, 53, 32)), _rng(seed))
        assert len(cropped["boxes"]) == len(cropped["labels"]) == int((cropped["image"] > 127).any())
        if not len(cropped["boxes"]):
            kinds.add("away")
            continue
        x0, y0, x1, y1 = cropped["boxes"][0].tolist()
        assert 0 <= x0 < x1 <= 25
        assert 0 <= y0 < y1 <= 20
        assert _bright(cropped) == [x0, y0, x1, y1]
        kinds.add("whole" if (x1 - x0, y1 - y0) == (15, 18) else "cut")
    assert kinds == {"whole", "cut", "away"}


def _three_instances():
    """A whole square, a lying L whose corner is at its left, and one at the lower right."""
    tensors = _tensors(40, 60, (20, 15, 30, 25), (10, 5, 50, 35), (52, 32, 59, 39))
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    masks[0, 15:25, 20:30] = masks[2, 32:39, 52:59] = True
    masks[1, 5:35, 10:14] = masks[1, 31:35, 10:50] = True
    points = [[[21, 16], [29, 24]], [[10, 5], [49, 34]], [[53, 33], [58, 38]]]
    tensors = _with_keypoints(tensors, points, [[2, 1], [2, 2], [1, 2]])
    return _with_masks(tensors, masks)


class _At:
    """Draws a window at a fixed place."""

    def __init__(self, top, left):
        self.top_left = np.array([top, left])

    def integers(self, low, high):
        return self.top_left


def test_a_crop_takes_masks_and_keypoints_along():
    # Of the L only its upright part is left, so its box ends there.
    cropped = RandomCrop("absolute", (25, 40))(_three_instances(), _At(3, 5))
    assert cropped["labels"].tolist() == [0, 1]
    assert cropped["boxes"].tolist() == [[15, 12, 25, 22], [5, 2, 9, 25]]
    assert cropped["masks"].shape == (2, 25, 40)
    assert cropped["masks"].sum(dim=(1, 2)).tolist() == [100, 4 * 23]
    assert cropped["keypoints"].shape == (2, 2, 2)
    assert cropped["visibility"].tolist() == [[2, 1], [2, 0]]
    assert cropped["keypoints"][0].tolist() == [[16, 13], [24, 21]]
    assert cropped["keypoints"].canvas_size == (25, 40)


def test_an_instance_whose_mask_is_cut_away_is_removed_though_its_box_is_not():
    cropped = RandomCrop("absolute", (8, 8))(_three_instances(), _At(15, 22))
    assert cropped["labels"].tolist() == [0]
    without_masks = {name: value for name, value in _three_instances().items() if name != "masks"}
    cropped = RandomCrop("absolute", (8, 8))(without_masks, _At(15, 22))
    assert cropped["labels"].tolist() == [0, 1]
    assert cropped["boxes"].tolist() == [[0, 0, 8, 8], [0, 0, 8, 8]]


def test_a_keypoint_cut_away_does_not_come_back_on_a_larger_canvas():
    cropped = RandomCrop("absolute", (25, 40))(_three_instances(), _At(3, 5))
    larger = RandomZoomOut(p=1.0, side_range=(2, 2))(cropped, _rng())
    assert larger["visibility"].tolist() == [[2, 1], [2, 0]]
    assert _size(larger) == (50, 80)


def test_a_fixed_size_crop_cuts_what_is_larger_and_pads_right_and_below():
    tensors = _tensors(20, 60, (0, 0, 60, 20))
    seen = set()
    for seed in range(80):
        fixed = FixedSizeCrop((30, 57), fill=(7, 8, 9))(tensors, _rng(seed))
        assert _size(fixed) == (30, 57)
        assert fixed["image"][:, 20:].flatten(1).unique(dim=1).tolist() == [[7], [8], [9]]
        assert (fixed["image"][:, :20] == 255).all()
        assert fixed["boxes"].tolist() == [[0, 0, 57, 20]]
        row = {"image": tv_tensors.Image(torch.arange(60, dtype=torch.uint8).expand(3, 20, 60))}
        seen.add(FixedSizeCrop((30, 57))(row, _rng(seed))["image"][0, 0, 0].item())
    assert seen == {0, 1, 2, 3}
    assert torch.equal(FixedSizeCrop((20, 60))(tensors, _rng())["image"], tensors["image"])


def test_a_fixed_size_crop_draws_both_offsets():
    image = tv_tensors.Image(torch.arange(25, dtype=torch.uint8).reshape(1, 5, 5).expand(3, 5, 5))
    corners = {FixedSizeCrop((4, 4))({"image": image}, _rng(i))["image"][0, 0, 0].item() for i in range(60)}
    assert corners == {0, 1, 5, 6}


def test_zoom_out_puts_the_image_anywhere_on_a_canvas_of_its_range():
    tensors = _tensors(20, 30, (3, 4, 13, 14))
    tensors = _with_masks(tensors, tensors["image"][:1] > 0)
    zoom, sides, places = RandomZoomOut(fill=50, side_range=(1.0, 3.0), p=1.0), [], []
    for seed in range(150):
        zoomed = zoom(tensors, _rng(seed))
        height, width = _size(zoomed)
        assert abs(height / 20 - width / 30) <= 0.05
        x0, y0, x1, y1 = map(int, zoomed["boxes"][0])
        assert (x1 - x0, y1 - y0) == (10, 10)
        assert torch.equal(zoomed["masks"][0].bool(), zoomed["image"][0] == 255)
        assert zoomed["masks"][0, y0:y1, x0:x1].all()
        assert (zoomed["image"] == 0).sum() == 3 * (20 * 30 - 100)
        sides.append(height / 20)
        places.append((x0 - 3) / max(1, width - 30))
    assert min(sides) < 1.1
    assert 2.9 < max(sides) <= 3
    assert min(places) == 0
    assert max(places) == 1


def test_zoom_out_happens_as_often_as_its_probability():
    zoomed = sum(_size(RandomZoomOut(p=0.3)(_tensors(20, 30), _rng(i))) != (20, 30) for i in range(200))
    assert 40 <= zoomed <= 80


def test_an_iou_crop_keeps_the_instances_whose_centre_is_inside():
    boxes = torch.tensor([[4, 5, 24, 22], [30, 10, 55, 35], [10, 28, 20, 39], [50, 1, 59, 9]])
    tensors = _tensors(40, 60, *boxes.tolist())
    image = torch.arange(40 * 60, dtype=torch.int32).reshape(1, 40, 60)
    tensors["image"] = tv_tensors.Image(image)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    shapes, least = set(), {0.0: [], 0.5: []}
    for option in least:
        for seed in range(150):
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
    assert len(least[0.0]) == pytest.approx(75, abs=25)


def test_an_iou_crop_needs_an_instance_and_an_end():
    tensors = _tensors(20, 30)
    assert RandomIoUCrop()(tensors, _rng()) is tensors
    with pytest.raises(UserError, match="sampler_options must hold a 1"):
        RandomIoUCrop(sampler_options=(0.3, 0.5))


@pytest.mark.parametrize(
    ("crop_type", "size"),
    [
        ("relative", (0, 0.5)),
        ("relative_range", (0.5, 1.5)),
        ("relative", (0.5,)),
        ("absolute", (-3, 20)),
        ("absolute", (20, 20, 3)),
        ("absolute_range", (0, 20)),
        ("absolute_range", (30, 20)),
    ],
)
def test_bad_crop_sizes_are_refused_and_shown(crop_type, size):
    with pytest.raises(UserError, match="crop_size") as error:
        RandomCrop(crop_type, size)
    assert str(size) in str(error.value)


def test_an_unknown_crop_type_is_refused():
    with pytest.raises(UserError, match="relativ_range"):
        RandomCrop("relativ_range", (20, 20))
