"""plaintrain.data.transforms: augmentation that draws from the generator it is given."""

import random

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from plaintrain.data.transforms import (
    RandomCrop,
    RandomFlip,
    ResizeShortestEdge,
    build_augmentation,
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
    return {"image": tv_tensors.Image(image), "boxes": boxes}


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
        (((), 100), "MIN_SIZE"),
        (((0,), 100), "MIN_SIZE"),
        (((-5, 20), 100), "-5"),
        (((20,), 100, "range"), "MIN_SIZE_TRAIN"),
        (((20, 30, 40), 100, "range"), "MIN_SIZE_TRAIN"),
        (((40, 20), 100, "range"), "MIN_SIZE_TRAIN"),
        (((20,), 0), "MAX_SIZE"),
        (((20,), -1), "MAX_SIZE"),
        (((20,), 100, "rnage"), "rnage"),
    ],
)
def test_bad_lengths_and_styles_are_refused_when_they_are_given(arguments, word):
    with pytest.raises(UserError, match=word):
        ResizeShortestEdge(*arguments)


# ---- flipping


@pytest.mark.parametrize(
    ("direction", "expected"), [("horizontal", [30, 5, 38, 25]), ("vertical", [2, 5, 10, 25])]
)
def test_a_flip_moves_the_box_with_its_rectangle(direction, expected):
    flipped = RandomFlip(1.0, direction)(_tensors(30, 40, (2, 5, 10, 25)), _rng())
    assert flipped["boxes"].tolist() == [expected]
    assert _bright(flipped) == expected
    upper = RandomFlip(1.0, "vertical")(_tensors(30, 40, (2, 5, 10, 12)), _rng())
    assert _bright(upper) == upper["boxes"][0].tolist() == [2, 18, 10, 25]


def test_a_flip_happens_as_often_as_its_probability():
    tensors = _tensors(30, 40, (2, 5, 10, 25))
    for prob, low, high in ((0.0, 0, 0), (0.5, 80, 120), (0.9, 170, 190), (1.0, 200, 200)):
        flip = RandomFlip(prob)
        flipped = sum(_bright(flip(tensors, _rng(seed))) != [2, 5, 10, 25] for seed in range(200))
        assert low <= flipped <= high


def test_an_unknown_direction_is_refused():
    with pytest.raises(UserError, match="diagonal"):
        RandomFlip(0.5, "diagonal")


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


def test_a_crop_cuts_boxes_and_empties_those_cut_away():
    kinds = set()
    for seed in range(60):
        cropped = RandomCrop("absolute", (20, 25))(_tensors(40, 60, (38, 14, 53, 32)), _rng(seed))
        x0, y0, x1, y1 = cropped["boxes"][0].tolist()
        assert 0 <= x0 <= x1 <= 25
        assert 0 <= y0 <= y1 <= 20
        if (cropped["image"] > 127).any():
            assert _bright(cropped) == [x0, y0, x1, y1]
            kinds.add("whole" if (x1 - x0, y1 - y0) == (15, 18) else "cut")
        else:
            assert (x1 - x0) * (y1 - y0) == 0
            kinds.add("away")
    assert kinds == {"whole", "cut", "away"}


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
    with pytest.raises(UserError, match=r"INPUT\.CROP\.SIZE") as error:
        RandomCrop(crop_type, size)
    assert str(size) in str(error.value)


def test_an_unknown_crop_type_is_refused():
    with pytest.raises(UserError, match="relativ_range"):
        RandomCrop("relativ_range", (20, 20))


# ---- all of them


ALL = [
    ResizeShortestEdge((20, 24, 31), 50),
    ResizeShortestEdge((20, 40), 70, "range"),
    RandomFlip(),
    RandomCrop("relative_range", (0.4, 0.4)),
    RandomCrop("absolute_range", (10, 30)),
]


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
def test_only_the_given_generator_decides(augmentation):
    tensors = _tensors(30, 40, (2, 5, 10, 25))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    results = []
    for seed in range(8):
        one, other = (augmentation(tensors, _rng(seed)) for _ in range(2))
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["boxes"], other["boxes"])
        results.append((tuple(one["image"].shape), one["image"].numpy().tobytes()))
    assert len(set(results)) > 1
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
def test_the_given_tensors_are_not_changed_and_an_image_may_come_alone(augmentation):
    tensors, same = (_tensors(30, 40, (2, 5, 10, 25)) for _ in range(2))
    for seed in range(4):
        with_boxes = augmentation(tensors, _rng(seed))
        alone = augmentation({"image": tensors["image"]}, _rng(seed))
        assert torch.equal(alone["image"], with_boxes["image"])
    assert torch.equal(tensors["image"], same["image"])
    assert torch.equal(tensors["boxes"], same["boxes"])


def test_training_crops_then_resizes_then_flips(cfg):
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 30)
    cfg.INPUT.RANDOM_FLIP = "vertical"
    assert build_augmentation(cfg, is_train=True) == [
        RandomCrop("relative_range", (0.9, 0.9)),
        ResizeShortestEdge((20, 30), 60, "range"),
        RandomFlip(0.5, "vertical"),
    ]


def test_what_is_switched_off_is_not_done(cfg):
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    assert build_augmentation(cfg, is_train=True) == []


def test_evaluation_only_resizes(cfg):
    cfg.INPUT.CROP.ENABLED = True
    assert build_augmentation(cfg, is_train=False) == []
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 33, 44
    assert build_augmentation(cfg, is_train=False) == [ResizeShortestEdge((33,), 44)]
