"""Transforms move image, boxes, masks and keypoints together, whatever their sizes and places."""

import contextlib
import copy

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from property_helpers import build_tests, for_all, patched
from torchvision import tv_tensors
from transform_cases import (
    CANVAS,
    IMAGE,
    around,
    check_claims,
    chosen,
    filled,
    flip_order,
    lossless,
    plain,
    same,
    tensors,
)

from plaintrain.data import augmentations, copy_paste, photometric, transforms
from plaintrain.data import tensors as moving
from plaintrain.data.transforms import RandomVerticalFlip

SEEDS = st.integers(0, 2**32)


def _augmented(before, names, rng, slack=0.0):
    after = before
    for name, arguments in names:
        order = {"keypoint_flip_indices": flip_order(before)} if name == "RandomHorizontalFlip" else {}
        after = augmentations.AUGMENTATIONS[name](**arguments, **order)(after, rng)
        check_claims(after, slack)
    return after


@for_all(tensors(angles=True), st.lists(lossless(), min_size=1, max_size=4), SEEDS)
def check_pixels_take_their_targets_along(before, names, seed):
    """After flips, crops and padding each pixel is in the same masks, boxes and keypoints as before."""
    after = _augmented(before, names, np.random.default_rng(seed))
    flips = [name for name, _ in names].count("RandomHorizontalFlip")
    is_image = plain(after["image"])[2] == IMAGE
    source = tuple(plain(after["image"])[:2, is_image].long())
    _check_areas(before, after, is_image, source)
    _check_keypoints(before, after, is_image, flip_order(before) if flips % 2 else None)
    if "RandomIoUCrop" not in dict(names):
        assert not _areas(before)[_gone(before, after)][(slice(None), *source)].any()


def _gone(before, after):
    return sorted(set(before["labels"].tolist()) - set(after["labels"].tolist()))


def _areas(found):
    """The pixels of each instance: of its mask, or without masks in its box."""
    return plain(found["masks"]) if "masks" in found else filled(found)


def _check_areas(before, after, is_image, source):
    old, new = _areas(before)[after["labels"]], _areas(after)
    assert torch.equal(new[:, is_image], old[(slice(None), *source)])
    assert not new[:, ~is_image].any()
    boxes = plain(after["boxes"])
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    if "masks" in after:
        assert torch.equal(boxes, around(new))


def _check_keypoints(before, after, is_image, order):
    if "keypoints" not in before:
        return
    rows = after["labels"]
    points, seen = plain(before["keypoints"])[rows].floor(), before["visibility"][rows]
    if order is not None:
        points, seen = points[:, list(order)], seen[:, list(order)]
    x, y = plain(after["keypoints"]).floor().long().unbind(-1)
    image = plain(after["image"]).long()
    present = {tuple(place) for place in image[:2, is_image].T.tolist()}
    for place in (after["visibility"] > 0).nonzero().tolist():
        i, k = place
        assert image[:, y[i, k], x[i, k]].tolist() == [*points[i, k].long().tolist()[::-1], IMAGE]
        assert after["visibility"][i, k] == seen[i, k]
    for i, k in ((after["visibility"] == 0) & (seen > 0)).nonzero().tolist():
        assert tuple(points[i, k].long().tolist()[::-1]) not in present


@for_all(tensors(), st.booleans())
def check_two_flips_are_none(before, horizontal):
    given = copy.deepcopy(before)
    after = before
    for _ in range(2):
        after = (
            moving.horizontal_flip(after, flip_order(before)) if horizontal else moving.vertical_flip(after)
        )
    assert same(after, given)
    assert same(before, given)


@for_all(tensors(), st.integers(1, 40), st.integers(1, 40))
def check_targets_scale_with_the_image(before, height, width):
    """A box is scaled exactly, and lies within half a pixel of its mask."""
    # PyTorch has no uint8 kernel for a single pixel.
    assume(height * width > 1)
    after = moving.resize(before, (height, width))
    assert tuple(after["image"].shape[-2:]) == (height, width)
    check_claims(after, slack=1e-3)
    old_height, old_width = before["image"].shape[-2:]
    factor = torch.tensor([width / old_width, height / old_height], dtype=torch.float64)
    assert torch.equal(after["labels"], before["labels"])
    expected = plain(before["boxes"]).double() * factor.repeat(2)
    assert torch.allclose(plain(after["boxes"]).double(), expected, atol=1e-3)
    if "masks" in before:
        there = plain(after["masks"]).flatten(1).any(dim=1).bool()
        difference = around(plain(after["masks"])[there]) - plain(after["boxes"])[there]
        assert (difference.abs() <= 0.51).all()
        # A mask vanishes only between the centres of pixels.
        assert ((expected[~there, 2:] - expected[~there, :2]).amin(dim=1) <= 1.001).all()
    if "keypoints" in before:
        assert torch.allclose(
            plain(after["keypoints"]).double(), plain(before["keypoints"]).double() * factor, atol=1e-3
        )
        assert torch.equal(after["visibility"], before["visibility"])


@contextlib.contextmanager
def global_generators_rest():
    """The block draws from no global generator."""
    before = np.random.get_state()[1:3], torch.get_rng_state()
    yield
    after = np.random.get_state()[1:3], torch.get_rng_state()
    assert np.array_equal(before[0][0], after[0][0])
    assert before[0][1] == after[0][1]
    assert torch.equal(before[1], after[1])


@for_all(tensors(), st.lists(chosen(), min_size=1, max_size=4), SEEDS)
def check_the_generator_alone_decides(before, names, seed):
    """The same generator makes the same sample, of the sizes it claims; what was given stays as it was."""
    given = copy.deepcopy(before)
    results = []
    for _ in range(2):
        rng = np.random.default_rng(seed)
        with global_generators_rest():
            after = _augmented(before, names, rng, slack=1e-3)
        labels = after["labels"].tolist()
        assert labels == sorted(set(labels) & set(given["labels"].tolist()))
        results.append((after, rng.bit_generator.state))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert same(before, given)


@for_all(tensors(masks=True), tensors(masks=True), st.booleans(), SEEDS)
def check_what_is_pasted_covers_what_lies_below(below, other, blending, seed):
    """Masks share no pixel with what was pasted over them, and boxes lie around masks."""
    if ("keypoints" in below) != ("keypoints" in other) or flip_order(below) != flip_order(other):
        return
    # PyTorch has no uint8 kernel for a single pixel.
    assume(max(below["image"].shape[-2:]) > 1)
    other["labels"] = other["labels"] + 100
    other["image"][2] = CANVAS
    given = copy.deepcopy((below, other))
    after = copy_paste.SimpleCopyPaste(0.7, blending)(below, np.random.default_rng(seed), other)
    check_claims(after, slack=1e-3)
    pasted = after["labels"] >= 100
    cover = plain(after["masks"])[pasted].any(dim=0).bool()
    rows = after["labels"][~pasted]
    assert set(rows.tolist()) <= set(below["labels"].tolist())
    assert torch.equal(plain(after["masks"])[~pasted], plain(below["masks"])[rows] * ~cover)
    assert not (plain(below["masks"])[_gone(below, after)] * ~cover).any()
    assert ((around(plain(after["masks"])) - plain(after["boxes"])).abs() <= 0.51).all()
    if not blending:
        assert torch.equal(plain(after["image"])[2] == CANVAS, cover)
        assert torch.equal(plain(after["image"])[:, ~cover], plain(below["image"])[:, ~cover])
    assert all(map(same, given, (below, other)))


def _boxes_only(change):
    """A torchvision function with another result for boxes: `change(original, boxes, arguments)`."""

    def wrap(original):
        def function(value, *arguments, **options):
            if isinstance(value, tv_tensors.BoundingBoxes):
                new = change(original, value, arguments)
                return tv_tensors.BoundingBoxes(
                    new, format="XYXY", canvas_size=original(value, *arguments).canvas_size
                )
            return original(value, *arguments, **options)

        return function

    return wrap


def function_from(name, change):
    """A defect in what happens to boxes: `change(original, boxes, arguments)`, new boxes."""

    def defect(patch):
        patch.setattr(moving.F, name, _boxes_only(change)(getattr(moving.F, name)))

    return defect


def rounded(original, boxes, arguments):
    return original(boxes).as_subclass(torch.Tensor).floor()


def scaled_alike(original, boxes, arguments):
    return boxes.as_subclass(torch.Tensor) * (arguments[0][0] / boxes.canvas_size[0])


boxes_not_clipped = function_from(
    "crop",
    lambda original, boxes, window: (
        boxes.as_subclass(torch.Tensor) - torch.tensor([window[1], window[0]] * 2)
    ),
)


def order_ignored(patch):
    original = transforms.horizontal_flip
    patch.setattr(
        transforms, "horizontal_flip", lambda found, order=None: original(found, order and range(len(order)))
    )


def flip_in_place(patch):
    original = moving._flip

    def flip(found, axis):
        found["boxes"][:, [axis, axis + 2]] = original(found, axis)["boxes"][:, [axis, axis + 2]]
        return original(found, axis)

    patch.setattr(moving, "_flip", flip)


def masks_end_early(patch):
    original = moving.masks_to_boxes
    patch.setattr(moving, "masks_to_boxes", lambda masks: original(masks) - torch.tensor([0, 0, 1, 1]))


def all_have_extent(patch):
    original = moving.has_extent

    def has_extent(found):
        return original(found) if "masks" in found else torch.ones(len(found["labels"]), dtype=torch.bool)

    patch.setattr(moving, "has_extent", has_extent)


def draws_from_numpy(self, found, rng):
    return moving.vertical_flip(found) if np.random.random() < self.p else found


def every_second(patch):
    calls = []

    def call(self, found, rng):
        calls.append(1)
        return moving.vertical_flip(found) if len(calls) % 2 else found

    patch.setattr(RandomVerticalFlip, "__call__", call)


def darkened_in_place(self, found, rng):
    found["image"] //= 2
    return found


DEFECTS = {
    check_pixels_take_their_targets_along: {
        "left and right are not exchanged": order_ignored,
        "boxes are not clipped": boxes_not_clipped,
        "keypoints outside stay": patched(moving, "hide_outside", lambda found: found),
        "labels are not selected": patched(moving, "ROWS", ("boxes", "masks", "keypoints", "visibility")),
        "the box of a mask ends a pixel early": masks_end_early,
        "boxes are not drawn around what is left": patched(moving, "tighten", lambda found, which: found),
        "instances that are gone stay": all_have_extent,
    },
    check_two_flips_are_none: {
        "boxes become whole": function_from("horizontal_flip", rounded),
        "the input is changed": flip_in_place,
    },
    check_targets_scale_with_the_image: {
        "one factor is used for both sides": function_from("resize", scaled_alike),
    },
    check_the_generator_alone_decides: {
        "the generator of NumPy is drawn from": patched(
            transforms.RandomVerticalFlip, "__call__", draws_from_numpy
        ),
        "every second sample is flipped": every_second,
        "the image is changed in place": patched(
            photometric.RandomPhotometricDistort, "__call__", darkened_in_place
        ),
    },
    check_what_is_pasted_covers_what_lies_below: {
        "masks below stay": patched(copy_paste, "_covered", lambda found, cover: dict(found)),
        "boxes below stay": patched(copy_paste, "tighten", lambda found, which: found),
    },
}

test_property, test_planted_defect_is_caught = build_tests(globals(), DEFECTS)
