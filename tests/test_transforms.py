"""plaintrain.data.transforms, crops, photometric and augmentations: what a config names and what is drawn.

tests/properties/test_transform_properties.py checks that targets follow the pixels.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hostile_helpers import rejected
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.transforms.crops import FixedSizeCrop, RandomCrop, RandomIoUCrop
from plaintrain.data.transforms.geometric import (
    RandomHorizontalFlip,
    RandomShortestSize,
    RandomVerticalFlip,
    RandomZoomOut,
    Resize,
    ResizeShortestEdge,
    ScaleJitter,
    get_shortest_edge_size,
)
from plaintrain.data.transforms.photometric import RandomErasing, RandomPhotometricDistort


def _tensors(height, width, *boxes):
    """An image of random bright pixels, with boxes."""
    image = torch.from_numpy(_rng(9).integers(100, 256, (3, height, width), dtype=np.uint8))
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    return {"image": tv_tensors.Image(image), "boxes": boxes, "labels": torch.arange(len(boxes))}


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


def test_shortest_edge_size_is_that_of_detectron2_and_of_at_least_a_pixel():
    rng = _rng()
    for _ in range(3000):
        h, w, drawn_short, drawn_longest = rng.integers(20, 1200, size=4).tolist()
        for short, longest in ((800, 1333), (640, 1333), (drawn_short, drawn_longest)):
            assert get_shortest_edge_size(h, w, short, longest) == _detectron2_size(h, w, short, longest)
    for size, short, longest, expected in (((300, 900), 800, 1333, (444, 1333)), ((1, 900), 20, 30, (1, 30))):
        assert _size(ResizeShortestEdge((short,), longest)(_tensors(*size), _rng())) == expected


def test_resizes_give_their_size_or_draw_each_of_their_lengths():
    tensors = _tensors(16, 20)
    resize = ResizeShortestEdge((20, 24, 31), 100)
    seen = [min(_size(resize(tensors, _rng(seed)))) for seed in range(60)]
    assert set(seen) == {20, 24, 31}
    assert min(seen.count(length) for length in set(seen)) > 8
    resize = ResizeShortestEdge((20, 24), 100, "range")
    assert {min(_size(resize(tensors, _rng(seed)))) for seed in range(60)} == {20, 21, 22, 23, 24}
    sizes = {_size(RandomShortestSize([24, 32])(tensors, _rng(seed))) for seed in range(20)}
    assert sizes == {(24, 30), (32, 40)}
    assert _size(RandomShortestSize(32, 35)(tensors, _rng())) == (28, 35)
    for size in ((60, 90), (9, 7)):
        assert _size(Resize([30, 20])(_tensors(*size), _rng())) == (30, 20)


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


def test_flips_happen_as_often_as_their_probability_and_need_pairs_of_keypoints():
    tensors = _tensors(30, 40, (2, 5, 10, 22))
    chances = ((0.0, 0, 0), (0.5, 80, 120), (0.9, 170, 190), (1.0, 200, 200))
    for flip, (p, low, high) in itertools.product((RandomHorizontalFlip, RandomVerticalFlip), chances):
        images = [flip(p)(tensors, _rng(seed))["image"] for seed in range(200)]
        flipped = sum(not torch.equal(image, tensors["image"]) for image in images)
        assert low <= flipped <= high
    points = tv_tensors.KeyPoints(torch.zeros(1, 3, 2), canvas_size=(30, 40))
    tensors |= {"keypoints": points, "visibility": torch.ones(1, 3)}
    rejected("keypoint_flip_indices", by=lambda: RandomHorizontalFlip(1.0)(tensors, _rng()))


def test_zoom_out_puts_the_image_anywhere_on_a_canvas_of_its_range():
    tensors, sides, places = _tensors(20, 30, (3, 4, 13, 14)), [], []
    for seed in range(150):
        zoomed = RandomZoomOut(fill=50, side_range=(1.0, 3.0), p=1.0)(tensors, _rng(seed))
        height, width = _size(zoomed)
        assert abs(height / 20 - width / 30) <= 0.05
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


def test_random_crop_has_its_size_or_one_of_its_range_within_the_image():
    assert {tuple(w) for w in _windows("relative", (0.5, 0.35))} == {(20, 21)}
    assert {tuple(w) for w in _windows("relative", (1.0, 1.0))} == {(40, 60)}
    # A part of a pixel still leaves one.
    assert {tuple(w) for w in _windows("relative", (0.001, 0.001))} == {(1, 1)}
    assert {tuple(w) for w in _windows("absolute", (30, 25))} == {(30, 25)}
    assert {tuple(w) for w in _windows("absolute", (50, 25))} == {(40, 25)}
    windows = _windows("relative_range", (0.5, 0.8))
    assert (windows.min(axis=0) == [20, 48]).all()
    assert (windows.max(axis=0) == [40, 60]).all()
    assert abs(np.corrcoef(windows.T)[0, 1]) < 0.2
    windows = _windows("absolute_range", (37, 42))
    assert set(windows[:, 0]) == {37, 38, 39, 40}
    assert set(windows[:, 1]) == {37, 38, 39, 40, 41, 42}


def test_crops_lie_anywhere_in_the_image_and_fixed_size_crop_pads_right_and_below():
    image = tv_tensors.Image(torch.arange(40 * 60).reshape(1, 40, 60).expand(3, -1, -1))
    for crop in (RandomCrop("absolute", (38, 57)), FixedSizeCrop((38, 57))):
        crops = [crop({"image": image}, _rng(seed))["image"] for seed in range(200)]
        corners = {divmod(cropped[0, 0, 0].item(), 60) for cropped in crops}
        assert corners == {(y, x) for y in range(3) for x in range(4)}
    tensors = _tensors(20, 60, (0, 0, 60, 20))
    fixed = FixedSizeCrop((30, 57), fill=(7, 8, 9))(tensors, _rng())
    assert _size(fixed) == (30, 57)
    assert fixed["image"][:, 20:].flatten(1).unique(dim=1).tolist() == [[7], [8], [9]]
    assert fixed["image"][:, :20].min() >= 100
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
    for empty in (_tensors(20, 30), {"image": tensors["image"]}):
        assert RandomIoUCrop()(empty, _rng()) is empty


def test_build_augmentation_appends_crop_resize_and_flip_in_training(cfg):
    zoom = {"p": 0.3, "side_range": [1, 2], "fill": [1, 2, 3]}
    cfg.INPUT.AUGMENTATIONS = ["RandomPhotometricDistort", {"RandomZoomOut": zoom}, {"RandomErasing": None}]
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 30)
    assert build_augmentation(cfg, is_train=True, keypoint_flip_indices=(1, 0)) == [
        RandomPhotometricDistort(),
        RandomZoomOut((1, 2, 3), (1, 2), 0.3),
        RandomErasing(),
        RandomCrop("relative_range", (0.9, 0.9)),
        ResizeShortestEdge((20, 30), 60, "range"),
        RandomHorizontalFlip(0.5, (1, 0)),
    ]
    cfg.INPUT.RANDOM_FLIP = "vertical"
    assert build_augmentation(cfg, is_train=True)[-1] == RandomVerticalFlip(0.5)
    cfg.INPUT.AUGMENTATIONS, cfg.INPUT.CROP.ENABLED = [{"RandomHorizontalFlip": {"p": 0.1}}], False
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = "none", (0,)
    steps = build_augmentation(cfg, is_train=True, keypoint_flip_indices=(0, 2, 1))
    assert steps == [RandomHorizontalFlip(0.1, (0, 2, 1))]
    cfg.INPUT.CROP.ENABLED = True
    assert build_augmentation(cfg, is_train=False) == []
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 33, 44
    assert build_augmentation(cfg, is_train=False) == [ResizeShortestEdge((33,), 44)]
    # A fixed size takes the place of both resizes.
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (20, 30), "horizontal"
    cfg.INPUT.FIXED_SIZE, cfg.INPUT.AUGMENTATIONS, cfg.INPUT.CROP.ENABLED = (30, 40), [], False
    assert build_augmentation(cfg, is_train=True) == [Resize((30, 40)), RandomHorizontalFlip()]
    assert build_augmentation(cfg, is_train=False) == [Resize((30, 40))]


def test_defaults_are_those_of_torchvision():
    for step in (RandomErasing, RandomIoUCrop, RandomPhotometricDistort, RandomZoomOut):
        theirs = vars(getattr(v2, step.__name__)())
        for field in dataclasses.fields(step):
            value = theirs[{"sampler_options": "options"}.get(field.name, field.name)]
            value = value[0] if field.name == "value" else value
            assert field.default == (tuple(value) if isinstance(value, list) else value), (step, field.name)


def _edge(lengths, max_size=100, style="choice"):
    arguments = {"short_edge_length": lengths, "max_size": max_size, "sample_style": style}
    return {"ResizeShortestEdge": arguments}


def _crop(crop_type, size):
    return {"RandomCrop": {"crop_type": crop_type, "crop_size": size}}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("RandomZoomout", ["unknown augmentation 'RandomZoomout'", "did you mean RandomZoomOut?"]),
        ("Mosaic", ["unknown augmentation 'Mosaic'", "SimpleCopyPaste", "FixedSizeCrop"]),
        (3, ["names or mappings {name: {argument: value}}, got", "3]"]),
        ({"Resize": {"size": [3, 4]}, "RandomIoUCrop": {}}, ["a list of names or mappings"]),
        ({"Resize": 300}, ["a list of names or mappings", "{'Resize': 300}"]),
        ({"Resize": {}}, ["INPUT.AUGMENTATIONS: Resize", "argument: 'size'"]),
        ({"RandomZoomOut": {"sides_range": [1, 2]}}, ["argument 'sides_range'", "are fill, side_range, p"]),
        ({"RandomHorizontalFlip": {"keypoint_flip_indices": [0]}}, ["argument 'keypoint_flip_indices'"]),
        ({"RandomZoomOut": {"p": 1.5}}, ["RandomZoomOut: p must be", "from 0 to 1, got 1.5"]),
        ({"RandomZoomOut": {"p": float("nan")}}, ["only finite numbers", "'p': nan"]),
        ({"RandomZoomOut": {"p": ""}}, ["p must be a number from 0 to 1, got ''"]),
        ({"RandomZoomOut": {"side_range": [0.5, 2]}}, ["side_range must be 2 numbers from 1 to 1000000"]),
        ({"RandomZoomOut": {"side_range": [3, 2]}}, ["side_range must be in ascending order"]),
        ({"RandomZoomOut": {"fill": 256}}, ["fill must be", "256"]),
        ({"RandomZoomOut": {"fill": [1, 2]}}, ["fill must be 3 numbers from 0 to 255, got [1, 2]"]),
        ({"FixedSizeCrop": {"size": [10**11, 9]}}, ["size must be 2 integers from 1 to 1000000"]),
        ({"FixedSizeCrop": {"size": 640}}, ["size must be 2 integers from 1 to 1000000, got 640"]),
        ({"RandomShortestSize": {"min_size": []}}, ["min_size must be a list of integers"]),
        ({"RandomShortestSize": {"min_size": 9, "max_size": 0}}, ["max_size must be an integer"]),
        ({"RandomIoUCrop": {"max_scale": 0.1}}, ["max_scale must be a number from 0.3 to 1"]),
        ({"RandomIoUCrop": {"max_aspect_ratio": 0.1}}, ["max_aspect_ratio"]),
        ({"RandomIoUCrop": {"trials": 0}}, ["trials must be an integer from 1 to 10000"]),
        ({"RandomPhotometricDistort": {"hue": [-0.6, 0]}}, ["hue must be 2 numbers from -0.5 to 0.5"]),
        ({"RandomErasing": {"scale": [0, 1.2]}}, ["scale must be 2 numbers from 0 to 1"]),
        ({"RandomErasing": {"value": "noise"}}, ["value must be", "'noise'"]),
        (_edge([]), ["short_edge_length must"]),
        (_edge([20, 30, 40], style="range"), ["short_edge_length must"]),
        (_edge([40, 20], style="range"), ["short_edge_length must"]),
        (_edge([20], style="rnage"), ["rnage"]),
        (_crop("relative", [0, 0.5]), ["crop_size must", "[0, 0.5]"]),
        (_crop("absolute", [20, 20, 3]), ["crop_size must", "[20, 20, 3]"]),
        (_crop("absolute_range", [30, 20]), ["crop_size must", "(30, 20)"]),
        (_crop("relativ_range", [20, 20]), ["relativ_range"]),
        ({"RandomIoUCrop": {"sampler_options": [0.3, 0.5]}}, ["sampler_options must hold a 1"]),
        # Other keys of INPUT.
        (("FIXED_SIZE", (300, 0)), []),
        (("MIN_SIZE_TRAIN", (0, 20)), []),
        (("MAX_SIZE_TRAIN", 0), []),
        (("MIN_SIZE_TRAIN_SAMPLING", "rnage"), ["rnage"]),
        (("RANDOM_FLIP", "diagonal"), []),
        (("CROP", {"ENABLED": True, "SIZE": [0.5, 1.5]}), ["[0.5, 1.5]"]),
    ],
    ids=str,
)
def test_augmentations_and_keys_of_input_are_checked(cfg, entry, words):
    key, value = entry if isinstance(entry, tuple) else ("AUGMENTATIONS", ["RandomVerticalFlip", entry])
    cfg.merge_from_other_cfg({"INPUT": {key: value}})
    rejected(f"INPUT.{key}", *words, by=lambda: build_augmentation(cfg, is_train=True))


@pytest.fixture
def tensors():
    return _tensors(30, 40, (2, 5, 20, 25), (15, 3, 38, 18))


NOTHING = dict.fromkeys(("brightness", "contrast", "saturation"), (1, 1)) | {"hue": (0, 0)}


def _differences(image, other):
    """The largest difference of a pixel to another image, for each order of its channels."""
    orders = itertools.permutations(range(3))
    return [(image.int() - other[list(order)].int()).abs().max().item() for order in orders]


def test_photometric_distort_is_that_of_torchvision_up_to_the_order_of_channels(tensors):
    for name, value in (("brightness", 0.9), ("contrast", 1.4), ("saturation", 0.6), ("hue", 0.04)):
        distort = RandomPhotometricDistort(**{**NOTHING, name: (value, value)}, p=1.0)
        distorted = distort(tensors, _rng(3))["image"]
        expected = getattr(F, f"adjust_{name}")(tensors["image"], value)
        # Turning a colour to HSV and back may round by one.
        assert min(_differences(distorted, expected)) <= 3, name


def test_photometric_distort_permutes_channels_and_the_order_of_contrast(tensors):
    distort = RandomPhotometricDistort(**NOTHING, p=0.5)
    first = []
    for seed in range(300):
        differences = _differences(distort(tensors, _rng(seed))["image"], tensors["image"])
        first.append(int(np.argmin(differences)))
        assert min(differences) <= 3
    counts = np.bincount(first, minlength=6)
    # p / 6 each, and what is left alone.
    assert 150 < counts[0] < 200
    assert counts[1:].min() >= 12
    never = RandomPhotometricDistort(p=0)
    assert torch.equal(never(tensors, _rng())["image"], tensors["image"])
    distort = RandomPhotometricDistort((1, 1), (0.5, 0.5), (0, 0), (0, 0), p=1.0)
    grey = {distort(tensors, _rng(seed))["image"].numpy().tobytes() for seed in range(12)}
    both = {
        F.adjust_saturation(F.adjust_contrast(tensors["image"], 0.5), 0).numpy().tobytes(),
        F.adjust_contrast(F.adjust_saturation(tensors["image"], 0), 0.5).numpy().tobytes(),
    }
    assert len(both) == 2
    assert len(grey & both) == 2


def test_erasing_fills_a_rectangle_of_its_scale_and_ratio_in_the_image_as_often_as_p(tensors):
    tensors["image"] = tv_tensors.Image(torch.full((3, 60, 80), 200, dtype=torch.uint8))
    places = set()
    for seed in range(200):
        erased = RandomErasing(1.0, (0.05, 0.2), (0.5, 2.0), value=(1, 2, 3))(tensors, _rng(seed))
        changed = erased["image"][0] == 1
        y, x = torch.nonzero(changed, as_tuple=True)
        height, width = y.max() - y.min() + 1, x.max() - x.min() + 1
        assert changed.sum() == height * width
        assert erased["image"][:, y[0], x[0]].tolist() == [1, 2, 3]
        assert 0.04 <= height * width / 4800 <= 0.22
        assert 0.45 <= height / width <= 2.2
        assert all(erased[name] is tensors[name] for name in tensors if name != "image")
        places.add((y.min().item() // 15, x.min().item() // 20))
    assert len(places) >= 12
    noisy = RandomErasing(1.0, (0.3, 0.3), (1, 1), value="random")(tensors, _rng())["image"]
    changed = noisy[noisy != 200].float()
    assert len(changed) == pytest.approx(3 * 0.3 * 4800, rel=0.05)
    assert changed.mean() == pytest.approx(127, abs=6)
    assert changed.max() > 240
    count = sum((RandomErasing(0.3)(tensors, _rng(i))["image"] != 200).any().item() for i in range(200))
    assert 40 <= count <= 80
