"""plaintrain.data.augmentations and photometric: what a config names, and colours."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from plaintrain.config import get_cfg
from plaintrain.data.augmentations import AUGMENTATIONS, build_augmentation
from plaintrain.data.copy_paste import SimpleCopyPaste
from plaintrain.data.crops import FixedSizeCrop, RandomCrop, RandomIoUCrop
from plaintrain.data.photometric import RandomErasing, RandomPhotometricDistort
from plaintrain.data.transforms import (
    RandomHorizontalFlip,
    RandomShortestSize,
    RandomVerticalFlip,
    RandomZoomOut,
    Resize,
    ResizeShortestEdge,
    ScaleJitter,
)
from plaintrain.utils.errors import UserError


def _rng(seed=0):
    return np.random.default_rng(seed)


def test_build_augmentation_appends_crop_resize_and_flip_to_the_list(cfg):
    cfg.INPUT.AUGMENTATIONS = ["RandomPhotometricDistort", {"RandomZoomOut": {"p": 0.3}}]
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 30)
    assert build_augmentation(cfg, is_train=True, keypoint_flip_indices=(1, 0)) == [
        RandomPhotometricDistort(),
        RandomZoomOut(p=0.3),
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


def test_build_augmentation_only_resizes_for_evaluation(cfg):
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.AUGMENTATIONS = ["RandomIoUCrop"]
    assert build_augmentation(cfg, is_train=False) == []
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 33, 44
    assert build_augmentation(cfg, is_train=False) == [ResizeShortestEdge((33,), 44)]
    # A fixed size takes the place of both resizes.
    cfg.INPUT.FIXED_SIZE, cfg.INPUT.AUGMENTATIONS, cfg.INPUT.CROP.ENABLED = (30, 40), [], False
    assert build_augmentation(cfg, is_train=True) == [Resize((30, 40)), RandomHorizontalFlip()]
    assert build_augmentation(cfg, is_train=False) == [Resize((30, 40))]


def test_build_augmentation_reads_a_yaml_file_and_its_dump(tmp_path, cfg):
    (tmp_path / "a.yaml").write_text(
        "INPUT:\n  AUGMENTATIONS: [RandomIoUCrop, {RandomZoomOut: {side_range: [1, 2], fill: [1, 2, 3]}},"
        " {RandomErasing: }, {RandomCrop: {crop_type: absolute, crop_size: [8, 9]}}]\n"
    )
    cfg.merge_from_file(tmp_path / "a.yaml")
    augmentations = build_augmentation(cfg, is_train=True)
    assert augmentations[:4] == [
        RandomIoUCrop(),
        RandomZoomOut(side_range=(1, 2), fill=(1, 2, 3)),
        RandomErasing(),
        RandomCrop("absolute", (8, 9)),
    ]
    again = get_cfg()
    (tmp_path / "b.yaml").write_text(cfg.dump())
    again.merge_from_file(tmp_path / "b.yaml")
    assert build_augmentation(again, is_train=True) == augmentations


@pytest.mark.parametrize(
    "step", [RandomErasing, RandomIoUCrop, RandomPhotometricDistort, RandomZoomOut], ids=lambda s: s.__name__
)
def test_defaults_are_those_of_torchvision(step):
    theirs = vars(getattr(v2, step.__name__)())
    for field in dataclasses.fields(step):
        value = theirs[{"sampler_options": "options"}.get(field.name, field.name)]
        value = value[0] if field.name == "value" else value
        assert field.default == (tuple(value) if isinstance(value, list) else value), field.name


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("RandomZoomout", ["unknown augmentation 'RandomZoomout'", "did you mean RandomZoomOut?"]),
        ("Mosaic", ["unknown augmentation 'Mosaic'", "SimpleCopyPaste", "FixedSizeCrop"]),
        ({"ScaleJiter": {}}, ["did you mean ScaleJitter?"]),
        (3, ["the entry 3", "{name: {argument: value}}"]),
        ({"Resize": {"size": [3, 4]}, "RandomIoUCrop": {}}, ["a mapping of one name"]),
        ({"Resize": 300}, ["the entry {'Resize': 300}"]),
        ({"Resize": {}}, ["Resize: it needs the argument size"]),
        ({"RandomZoomOut": {"sides_range": [1, 2]}}, ["no argument 'sides_range'", "side_range?", "p=0.5"]),
        ({"RandomHorizontalFlip": {"keypoint_flip_indices": [0]}}, ["no argument 'keypoint_flip_indices'"]),
        ({"RandomZoomOut": {"p": 1.5}}, ["RandomZoomOut: p must be", "from 0 to 1, not 1.5", "fill=0"]),
        ({"RandomZoomOut": {"p": float("nan")}}, ["p must be"]),
        ({"RandomZoomOut": {"side_range": [0.5, 2]}}, ["side_range must be 2 numbers of at least 1"]),
        ({"RandomZoomOut": {"side_range": [3, 2]}}, ["side_range must have its smaller end first"]),
        ({"RandomZoomOut": {"fill": 256}}, ["fill must be", "256"]),
        ({"RandomZoomOut": {"fill": [1, 2]}}, ["fill must be 3 numbers from 0 to 255, not [1, 2]"]),
        ({"FixedSizeCrop": {"size": 640}}, ["size must be 2 whole numbers of at least 1, not 640"]),
        ({"ScaleJitter": {"scale_range": [0, 2]}}, ["scale_range"]),
        ({"ScaleJitter": {"target_size": [1.5, 2]}}, ["target_size must be 2 whole numbers"]),
        ({"RandomShortestSize": {"min_size": []}}, ["min_size must be a list of whole numbers"]),
        ({"RandomShortestSize": {"min_size": 9, "max_size": 0}}, ["max_size must be a whole number"]),
        ({"RandomIoUCrop": {"min_scale": 0}}, ["min_scale"]),
        ({"RandomIoUCrop": {"max_scale": 0.1}}, ["max_scale must be a number from 0.3 to 1"]),
        ({"RandomIoUCrop": {"max_aspect_ratio": 0.1}}, ["max_aspect_ratio"]),
        ({"RandomIoUCrop": {"sampler_options": []}}, ["sampler_options"]),
        ({"RandomIoUCrop": {"trials": 0}}, ["trials must be a whole number of at least 1"]),
        ({"RandomPhotometricDistort": {"hue": [-0.6, 0]}}, ["hue must be 2 numbers from -0.5 to 0.5"]),
        ({"RandomPhotometricDistort": {"contrast": [-1, 1]}}, ["contrast"]),
        ({"RandomErasing": {"scale": [0, 1.2]}}, ["scale must be 2 numbers from 0 to 1"]),
        ({"RandomErasing": {"ratio": [0, 1]}}, ["ratio"]),
        ({"RandomErasing": {"value": "noise"}}, ["value must be", "'noise'"]),
        ({"SimpleCopyPaste": {"blending": 1}}, ["blending must be true or false, not 1"]),
    ],
    ids=str,
)
def test_entry_of_augmentations_is_checked(cfg, entry, words):
    cfg.INPUT.AUGMENTATIONS = ["RandomVerticalFlip", entry]
    with pytest.raises(UserError) as error:
        build_augmentation(cfg, is_train=True)
    assert str(error.value).startswith("INPUT.AUGMENTATIONS")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("FIXED_SIZE", (300, 0), "INPUT.FIXED_SIZE"),
        ("FIXED_SIZE", (300,), "INPUT.FIXED_SIZE"),
        ("MIN_SIZE_TRAIN", (0, 20), "INPUT.MIN_SIZE_TRAIN"),
        ("MAX_SIZE_TRAIN", 0, "INPUT.MAX_SIZE_TRAIN"),
        ("MIN_SIZE_TRAIN_SAMPLING", "rnage", "rnage"),
        ("RANDOM_FLIP", "diagonal", "INPUT.RANDOM_FLIP"),
        ("CROP.SIZE", [0.5, 1.5], r"INPUT\.CROP: .*\[0\.5, 1\.5\]"),
    ],
)
def test_keys_of_input_are_checked(cfg, key, value, word):
    cfg.INPUT.CROP.ENABLED = True
    cfg.merge_from_list([f"INPUT.{key}", value])
    with pytest.raises(UserError, match=word):
        build_augmentation(cfg, is_train=True)


@pytest.fixture
def tensors():
    """The tensors of a 40x30 image of random pixels with two boxes."""
    image = torch.from_numpy(_rng(9).integers(0, 256, (3, 30, 40), dtype=np.uint8))
    boxes = torch.tensor([[2.0, 5, 20, 25], [15, 3, 38, 18]])
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(30, 40))
    return {"image": tv_tensors.Image(image), "boxes": boxes, "labels": torch.tensor([3, 1])}


NOTHING = dict.fromkeys(("brightness", "contrast", "saturation"), (1, 1)) | {"hue": (0, 0)}


@pytest.mark.parametrize(
    ("name", "value", "function"),
    [
        ("brightness", 0.9, F.adjust_brightness),
        ("contrast", 1.4, F.adjust_contrast),
        ("saturation", 0.6, F.adjust_saturation),
        ("hue", 0.04, F.adjust_hue),
    ],
)
def test_photometric_distort_is_that_of_torchvision_up_to_the_order_of_channels(
    tensors, name, value, function
):
    distort = RandomPhotometricDistort(**{**NOTHING, name: (value, value)}, p=1.0)
    distorted = distort(tensors, _rng(3))["image"]
    expected = function(tensors["image"], value)
    # Turning a colour to HSV and back may round by one.
    matches = [
        (distorted.int() - expected[list(order)].int()).abs().max() <= 3
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    ]
    assert any(matches)


def test_photometric_distort_permutes_channels_in_every_way_as_often_as_p(tensors):
    distort = RandomPhotometricDistort((1, 1), (1, 1), (1, 1), (0, 0), p=0.5)
    first = []
    for seed in range(300):
        image = distort(tensors, _rng(seed))["image"].int()
        orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        differences = [(image - tensors["image"][list(order)].int()).abs().max().item() for order in orders]
        first.append(int(np.argmin(differences)))
        assert min(differences) <= 3
    counts = np.bincount(first, minlength=6)
    # p / 6 each, and what is left alone.
    assert 150 < counts[0] < 200
    assert counts[1:].min() >= 12


def test_photometric_distort_changes_contrast_first_or_last(tensors):
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


def test_erasing_fills_a_rectangle_of_its_scale_and_ratio_in_the_image_only(tensors):
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


def test_erasing_fills_with_noise_and_happens_as_often_as_p(tensors):
    tensors["image"] = tv_tensors.Image(torch.full((3, 60, 80), 200, dtype=torch.uint8))
    noisy = RandomErasing(1.0, (0.3, 0.3), (1, 1), value="random")(tensors, _rng())["image"]
    changed = noisy[noisy != 200].float()
    assert len(changed) == pytest.approx(3 * 0.3 * 4800, rel=0.05)
    assert changed.mean() == pytest.approx(127, abs=6)
    assert changed.max() > 240
    count = sum((RandomErasing(0.3)(tensors, _rng(i))["image"] != 200).any().item() for i in range(200))
    assert 40 <= count <= 80


# tests/properties/test_transform_properties.py draws these with their targets.
ALL = [
    ResizeShortestEdge((20, 24, 31), 50),
    RandomShortestSize((20, 40), 70),
    ScaleJitter((40, 40)),
    Resize((50, 30)),
    RandomHorizontalFlip(0.5, (1, 0)),
    RandomVerticalFlip(),
    RandomCrop("relative_range", (0.4, 0.4)),
    FixedSizeCrop((35, 20)),
    RandomIoUCrop(),
    RandomZoomOut(),
    RandomPhotometricDistort(),
    RandomErasing(value="random"),
]


def test_all_augmentations_change_an_image_alone_as_with_boxes(tensors):
    assert {type(step) for step in ALL} | {SimpleCopyPaste} == set(AUGMENTATIONS.values())
    for step in ALL:
        for seed in range(4):
            alone = step({"image": tensors["image"]}, _rng(seed))
            assert alone.keys() == {"image"}
            if not isinstance(step, RandomIoUCrop):
                assert torch.equal(alone["image"], step(tensors, _rng(seed))["image"]), step
