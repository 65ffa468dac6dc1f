"""Augmentation: frozen parameters, called with the tensors of one image and a generator.

An augmentation takes a dict of image and targets (`torchvision.tv_tensors`) and a
`numpy.random.Generator`, and returns a new dict. It draws from that generator only, so a sample
is the same in whatever worker it is made.
"""

from dataclasses import dataclass

import numpy as np
import torchvision.transforms.v2.functional as F

from plaintrain.utils.errors import UserError


def _size(tensors):
    return F.get_size(tensors["image"])


def shortest_edge_size(height, width, short_edge, max_size):
    """The (height, width) that brings the shorter side to `short_edge`, the longer to <= `max_size`.

    Rounds as Detectron2's ResizeShortestEdge does.
    """
    scale = short_edge / min(height, width)
    new = [short_edge, scale * width] if height < width else [scale * height, short_edge]
    if max(new) > max_size:
        shrink = max_size / max(new)
        new = [side * shrink for side in new]
    return int(new[0] + 0.5), int(new[1] + 0.5)


@dataclass(frozen=True)
class ResizeShortestEdge:
    """Scale the shorter side to a drawn length; the longer one stays within `max_size`.

    Attributes:
        short_edge_length: lengths in pixels to choose from, or two ends if `sample_style` is range.
        max_size: largest length of the longer side, pixels.
        sample_style: choice or range.
    """

    short_edge_length: tuple
    max_size: int
    sample_style: str = "choice"

    def __post_init__(self):
        if not self.short_edge_length or min(self.short_edge_length) < 1:
            raise UserError(f"INPUT.MIN_SIZE must be pixels >= 1, not {self.short_edge_length}")
        if self.max_size < 1:
            raise UserError(f"INPUT.MAX_SIZE must be at least 1 pixel, not {self.max_size}")
        if self.sample_style not in ("choice", "range"):
            raise UserError(f"INPUT.MIN_SIZE_TRAIN_SAMPLING is choice or range, not {self.sample_style!r}")
        ends = self.short_edge_length
        if self.sample_style == "range" and (len(ends) != 2 or ends[0] > ends[1]):
            raise UserError(
                "INPUT.MIN_SIZE_TRAIN_SAMPLING range needs the two ends, the smaller first, in "
                f"INPUT.MIN_SIZE_TRAIN, not {ends}"
            )

    def __call__(self, tensors, rng):
        if self.sample_style == "range":
            low, high = self.short_edge_length
            short_edge = int(rng.integers(low, high + 1))
        else:
            short_edge = self.short_edge_length[int(rng.integers(len(self.short_edge_length)))]
        size = shortest_edge_size(*_size(tensors), short_edge, self.max_size)
        if list(size) == list(_size(tensors)):
            return tensors
        return {name: F.resize(value, list(size)) for name, value in tensors.items()}


@dataclass(frozen=True)
class RandomFlip:
    """Flip with probability `prob`, horizontally or vertically."""

    prob: float = 0.5
    direction: str = "horizontal"

    def __post_init__(self):
        if self.direction not in ("horizontal", "vertical"):
            raise UserError(f"INPUT.RANDOM_FLIP is horizontal or vertical, not {self.direction!r}")

    def __call__(self, tensors, rng):
        if rng.random() >= self.prob:
            return tensors
        flip = F.horizontal_flip if self.direction == "horizontal" else F.vertical_flip
        return {name: flip(value) for name, value in tensors.items()}


@dataclass(frozen=True)
class RandomCrop:
    """Cut out a window at a random place; boxes are cut with it.

    Attributes:
        crop_type: relative, relative_range, absolute or absolute_range, as INPUT.CROP.TYPE says.
        crop_size: two numbers, (height, width) or the range, as INPUT.CROP.SIZE says.
    """

    crop_type: str
    crop_size: tuple

    def __post_init__(self):
        kinds = ("relative", "relative_range", "absolute", "absolute_range")
        if self.crop_type not in kinds:
            raise UserError(f"INPUT.CROP.TYPE must be one of {', '.join(kinds)}, not {self.crop_type!r}")
        low, high = (0, 1) if self.crop_type.startswith("relative") else (1, float("inf"))
        if len(self.crop_size) != 2 or not all(low < side <= high for side in self.crop_size):
            wanted = "two shares in (0, 1]" if high == 1 else "two lengths in pixels"
            raise UserError(
                f"INPUT.CROP.SIZE must be {wanted} for TYPE {self.crop_type}, not {self.crop_size}"
            )
        if self.crop_type == "absolute_range" and self.crop_size[0] > self.crop_size[1]:
            raise UserError(f"INPUT.CROP.SIZE {self.crop_size} must have its smaller end first")

    def window(self, height, width, rng):
        """(height, width) of the window to cut from an image of this size."""
        image, size = np.array([height, width]), np.array(self.crop_size, dtype=float)
        if self.crop_type == "absolute":
            return np.minimum(size, image).astype(int)
        if self.crop_type == "absolute_range":
            low, high = np.minimum(image, size[0]), np.minimum(image, size[1])
            return rng.integers(low.astype(int), high.astype(int) + 1)
        if self.crop_type == "relative_range":
            size = size + rng.random(2) * (1 - size)
        return np.maximum(1, (image * size + 0.5).astype(int))

    def __call__(self, tensors, rng):
        size = np.array(_size(tensors))
        window = self.window(*size, rng)
        top, left = rng.integers(0, size - window + 1)
        args = (int(top), int(left), int(window[0]), int(window[1]))
        return {name: F.crop(value, *args) for name, value in tensors.items()}


def build_augmentation(cfg, is_train):
    """The augmentations that INPUT.* names, in the order crop, resize, flip."""
    if not is_train:
        if cfg.INPUT.MIN_SIZE_TEST == 0:
            return []
        return [ResizeShortestEdge((cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST)]
    augmentations = []
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(RandomCrop(cfg.INPUT.CROP.TYPE, tuple(cfg.INPUT.CROP.SIZE)))
    if cfg.INPUT.MIN_SIZE_TRAIN != (0,):
        style = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        sizes = cfg.INPUT.MIN_SIZE_TRAIN
        augmentations.append(ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TRAIN, style))
    if cfg.INPUT.RANDOM_FLIP != "none":
        augmentations.append(RandomFlip(direction=cfg.INPUT.RANDOM_FLIP))
    return augmentations
