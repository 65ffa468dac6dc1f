"""Mistakes that an augmentation could have, to patch into plaintrain.data."""

from types import SimpleNamespace

import torch
from torchvision import tv_tensors

from plaintrain.data import copy_paste, tensors, transforms
from plaintrain.data.transforms import RandomVerticalFlip


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
        patch.setattr(tensors.F, name, _boxes_only(change)(getattr(tensors.F, name)))

    return defect


def one_pixel_less(original, boxes, arguments):
    moved = original(boxes).as_subclass(torch.Tensor) - torch.tensor([1, 0, 1, 0])
    return moved.clamp(min=0)


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


def flip_by_torchvision(patch):
    def flip(found, axis):
        return tensors._move(found, tensors.F.vertical_flip if axis else tensors.F.horizontal_flip)

    patch.setattr(tensors, "_flip", flip)


def left_where_it_is(part):
    def defect(patch):
        original = tensors._move
        patch.setattr(tensors, "_move", lambda found, f: {**original(found, f), **_stays(found, f, part)})

    return defect


def _stays(found, function, part):
    """The part as it was, but for the size of the image that it belongs to."""
    if part not in found:
        return {}
    moved, old = function(found[part]), found[part].as_subclass(torch.Tensor)
    if part == "keypoints":
        return {part: tv_tensors.wrap(old.clone(), like=moved)}
    height, width = moved.shape[-2:]
    same = torch.zeros(moved.shape, dtype=old.dtype)
    cut = old[:, :height, :width]
    same[:, : cut.shape[1], : cut.shape[2]] = cut
    return {part: tv_tensors.wrap(same, like=moved)}


def visibility_stays(patch):
    original = transforms.horizontal_flip

    def flip(found, order=None):
        kept = {"visibility": found["visibility"]} if "visibility" in found else {}
        return {**original(found, order), **kept}

    patch.setattr(transforms, "horizontal_flip", flip)


def order_ignored(patch):
    original = transforms.horizontal_flip
    patch.setattr(
        transforms, "horizontal_flip", lambda found, order=None: original(found, order and range(len(order)))
    )


def order_rolled(patch):
    original = tensors.horizontal_flip

    def flip(found, order=None):
        return original(found, order and [*order[1:], order[0]])

    patch.setattr(tensors, "horizontal_flip", flip)


def flip_in_place(patch):
    original = tensors._flip

    def flip(found, axis):
        found["boxes"][:, [axis, axis + 2]] = original(found, axis)["boxes"][:, [axis, axis + 2]]
        return original(found, axis)

    patch.setattr(tensors, "_flip", flip)


def masks_end_early(patch):
    original = tensors.masks_to_boxes
    patch.setattr(tensors, "masks_to_boxes", lambda masks: original(masks) - torch.tensor([0, 0, 1, 1]))


def first_visibility(patch):
    original = tensors.select

    def select(found, keep):
        if "visibility" not in found:
            return original(found, keep)
        return {**original(found, keep), "visibility": found["visibility"][: int(keep.sum())]}

    patch.setattr(tensors, "select", select)


def nearest_not_exact(patch):
    nearest = tensors.InterpolationMode.NEAREST
    patch.setattr(tensors, "InterpolationMode", SimpleNamespace(NEAREST_EXACT=nearest))


def all_have_extent(patch):
    original = tensors.has_extent

    def has_extent(found):
        return original(found) if "masks" in found else torch.ones(len(found["labels"]), dtype=torch.bool)

    patch.setattr(tensors, "has_extent", has_extent)


def size_from(change):
    """A defect in the size to resize to: `change(original, height, width, short)`."""

    def defect(patch):
        original = transforms.shortest_edge_size
        patch.setattr(transforms, "shortest_edge_size", lambda h, w, short, _: change(original, h, w, short))

    return defect


def floored(original, height, width, short):
    scale = short / min(height, width)
    return max(1, int(height * scale)), max(1, int(width * scale))


def draws_from(random):
    def call(self, found, rng):
        return tensors.vertical_flip(found) if random() < self.p else found

    return lambda patch: patch.setattr(RandomVerticalFlip, "__call__", call)


def every_second(patch):
    calls = []

    def call(self, found, rng):
        calls.append(1)
        return tensors.vertical_flip(found) if len(calls) % 2 else found

    patch.setattr(RandomVerticalFlip, "__call__", call)


def darkened_in_place(self, found, rng):
    found["image"] //= 2
    return found


def labels_from_below(patch):
    original = copy_paste.SimpleCopyPaste.__call__

    def call(self, found, rng, partner):
        return original(self, found, rng, {**partner, "labels": torch.zeros_like(partner["labels"])})

    patch.setattr(copy_paste.SimpleCopyPaste, "__call__", call)


def pasted_in_place(patch):
    original = copy_paste._paste

    def paste(image, other, cover, blending):
        image.copy_(original(image, other, cover, blending))
        return image

    patch.setattr(copy_paste, "_paste", paste)
