"""Augmentation that moves pixels and targets: frozen parameters, called with tensors and a generator.

An augmentation takes a dict of the tensors of one image, as `plaintrain.data.transforms.tensors` describes
it, and a `numpy.random.Generator`, and returns a new dict. It draws from that generator only, so a
sample is the same in whatever worker it is made. Names and defaults are those of
torchvision.transforms.v2, its detection references or Detectron2.
"""

from dataclasses import dataclass

import numpy as np

from plaintrain.data.transforms.arguments import check_colour, check_list, check_number, check_range
from plaintrain.data.transforms.tensors import horizontal_flip, image_size, pad, resize, vertical_flip
from plaintrain.utils.errors import UserError


def shortest_edge_size(height, width, short_edge, max_size):
    """The (height, width) that brings the shorter side to `short_edge`, the longer to <= `max_size`.

    Rounds as Detectron2's ResizeShortestEdge does; a side is at least 1.
    """
    scale = short_edge / min(height, width)
    new = [short_edge, scale * width] if height < width else [scale * height, short_edge]
    if max(new) > max_size:
        shrink = max_size / max(new)
        new = [side * shrink for side in new]
    return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))


@dataclass(frozen=True)
class ResizeShortestEdge:
    """Scale the shorter side to a drawn length; the longer one stays within `max_size` (Detectron2).

    Attributes:
        short_edge_length: lengths in pixels to choose from, or two ends if `sample_style` is range.
        max_size: largest length of the longer side, pixels.
        sample_style: choice or range.
    """

    short_edge_length: tuple
    max_size: int
    sample_style: str = "choice"

    def __post_init__(self):
        if self.sample_style not in ("choice", "range"):
            raise UserError(f"sample_style must be choice or range, not {self.sample_style!r}")
        check_number(self, "max_size", 1, whole=True)
        check_list(self, "short_edge_length", 1, whole=True)
        if self.sample_style == "range":
            check_range(self, "short_edge_length", 1)

    def __call__(self, tensors, rng):
        if self.sample_style == "range":
            low, high = self.short_edge_length
            short_edge = int(rng.integers(low, high + 1))
        else:
            short_edge = self.short_edge_length[int(rng.integers(len(self.short_edge_length)))]
        return resize(tensors, shortest_edge_size(*image_size(tensors), short_edge, self.max_size))


@dataclass(frozen=True)
class RandomShortestSize:
    """Scale to one of several shorter sides, the longer one at most `max_size` (torchvision).

    Attributes:
        min_size: lengths of the shorter side to choose from, pixels, or one number.
        max_size: largest length of the longer side, or None.
    """

    min_size: int | tuple
    max_size: int | None = None

    def __post_init__(self):
        if not isinstance(self.min_size, list | tuple):
            object.__setattr__(self, "min_size", (self.min_size,))
        check_list(self, "min_size", 1, whole=True)
        if self.max_size is not None:
            check_number(self, "max_size", 1, whole=True)

    def __call__(self, tensors, rng):
        size = image_size(tensors)
        scale = self.min_size[int(rng.integers(len(self.min_size)))] / min(size)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(size))
        return resize(tensors, _scaled(size, scale))


def _scaled(size, scale):
    return [max(1, int(side * scale)) for side in size]


@dataclass(frozen=True)
class Resize:
    """Scale to exactly `size`, (height, width) in pixels."""

    size: tuple

    def __post_init__(self):
        check_list(self, "size", 1, count=2, whole=True)

    def __call__(self, tensors, rng):
        return resize(tensors, self.size)


@dataclass(frozen=True)
class ScaleJitter:
    """Large scale jitter (arXiv 2012.07177): fit into `target_size`, times a drawn factor.

    Attributes:
        target_size: (height, width) in pixels.
        scale_range: range of the factor; the aspect ratio is kept.
    """

    target_size: tuple = (1024, 1024)
    scale_range: tuple = (0.1, 2.0)

    def __post_init__(self):
        check_list(self, "target_size", 1, count=2, whole=True)
        check_range(self, "scale_range", 0.01)

    def __call__(self, tensors, rng):
        height, width = image_size(tensors)
        fit = min(self.target_size[0] / height, self.target_size[1] / width)
        return resize(tensors, _scaled((height, width), fit * rng.uniform(*self.scale_range)))


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirror left and right with probability `p`.

    `keypoint_flip_indices` says which keypoint takes the place of which; the config's flips get it
    from the dataset.
    """

    p: float = 0.5
    keypoint_flip_indices: tuple | None = None

    def __post_init__(self):
        check_number(self, "p", 0, 1)

    def __call__(self, tensors, rng):
        return horizontal_flip(tensors, self.keypoint_flip_indices) if rng.random() < self.p else tensors


@dataclass(frozen=True)
class RandomVerticalFlip:
    """Mirror top and bottom with probability `p`."""

    p: float = 0.5

    def __post_init__(self):
        check_number(self, "p", 0, 1)

    def __call__(self, tensors, rng):
        return vertical_flip(tensors) if rng.random() < self.p else tensors


@dataclass(frozen=True)
class RandomZoomOut:
    """Put the image somewhere on a larger canvas (SSD, arXiv 1512.02325).

    Attributes:
        fill: colour of the canvas, one number or (R, G, B), 0 to 255.
        side_range: range of the canvas's side as a multiple of the image's.
        p: probability.
    """

    fill: float | tuple = 0
    side_range: tuple = (1.0, 4.0)
    p: float = 0.5

    def __post_init__(self):
        check_colour(self, "fill")
        check_range(self, "side_range", 1)
        check_number(self, "p", 0, 1)

    def __call__(self, tensors, rng):
        if rng.random() >= self.p:
            return tensors
        size = np.array(image_size(tensors))
        free = (size * rng.uniform(*self.side_range)).astype(int) - size
        top, left = (int(v) for v in rng.integers(0, free + 1))
        padding = (left, top, int(free[1]) - left, int(free[0]) - top)
        return pad(tensors, padding, self.fill)
