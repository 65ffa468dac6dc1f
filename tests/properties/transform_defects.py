"""Mistakes that an augmentation could have, to patch into plaintrain.data."""

import numpy as np
import torch
from torchvision import tv_tensors

from plaintrain.data import tensors, transforms
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
    original = tensors._flip

    def flip(found, axis):
        found["boxes"][:, [axis, axis + 2]] = original(found, axis)["boxes"][:, [axis, axis + 2]]
        return original(found, axis)

    patch.setattr(tensors, "_flip", flip)


def masks_end_early(patch):
    original = tensors.masks_to_boxes
    patch.setattr(tensors, "masks_to_boxes", lambda masks: original(masks) - torch.tensor([0, 0, 1, 1]))


def all_have_extent(patch):
    original = tensors.has_extent

    def has_extent(found):
        return original(found) if "masks" in found else torch.ones(len(found["labels"]), dtype=torch.bool)

    patch.setattr(tensors, "has_extent", has_extent)


def draws_from_numpy(self, found, rng):
    return tensors.vertical_flip(found) if np.random.random() < self.p else found


def every_second(patch):
    calls = []

    def call(self, found, rng):
        calls.append(1)
        return tensors.vertical_flip(found) if len(calls) % 2 else found

    patch.setattr(RandomVerticalFlip, "__call__", call)


def darkened_in_place(self, found, rng):
    found["image"] //= 2
    return found
