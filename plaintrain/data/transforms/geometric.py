"""Augmentation that moves pixels and targets: frozen parameters, called with tensors and a generator.

An augmentation takes a dict of the tensors of one image, as `plaintrain.data.transforms.tensors` describes
it, and a `numpy.random.Generator`, and returns a new dict. It draws from that generator only, so a
sample is the same in whatever worker it is made. Names and defaults are those of
torchvision.transforms.v2, its detection references or Detectron2.
"""

from dataclasses import dataclass

import numpy as np

from plaintrain.data.transforms.arguments import CheckedArguments, Numbers, argument
from plaintrain.data.transforms.tensors import get_image_size, horizontal_flip, pad, resize, vertical_flip
from plaintrain.utils.errors import UserError


def get_shortest_edge_size(height, width, short_edge, max_size):
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
class ResizeShortestEdge(CheckedArguments):
    """Scale the shorter side to a drawn length; the longer one stays within `max_size` (Detectron2).

    Attributes:
        short_edge_length: lengths in pixels to choose from, or two ends if `sample_style` is range.
        max_size: largest length of the longer side, pixels.
        sample_style: choice or range.
    """

    short_edge_length: tuple = argument(1, count=0, whole=True)
    max_size: int = argument(1, whole=True)
    sample_style: str = "choice"

    def __post_init__(self):
        super().__post_init__()
        if self.sample_style not in ("choice", "range"):
            raise UserError(f"sample_style must be choice or range, not {self.sample_style!r}")
        if self.sample_style == "range":
            self._check("short_edge_length", Numbers(1, count=2, ascending=True))

    def __call__(self, tensors, rng):
        if self.sample_style == "range":
            low, high = self.short_edge_length
            short_edge = int(rng.integers(low, high + 1))
        else:
            short_edge = self.short_edge_length[int(rng.integers(len(self.short_edge_length)))]
        return resize(tensors, get_shortest_edge_size(*get_image_size(tensors), short_edge, self.max_size))


@dataclass(frozen=True)
class RandomShortestSize(CheckedArguments):
    """Scale to one of several shorter sides, the longer one at most `max_size` (torchvision).

    Attributes:
        min_size: lengths of the shorter side to choose from, pixels, or one number.
        max_size: largest length of the longer side, or None.
    """

    min_size: int | tuple = argument(1, count=0, whole=True, or_one=True)
    max_size: int | None = argument(1, whole=True, default=None, others=(None,))

    def __call__(self, tensors, rng):
        size, lengths = get_image_size(tensors), np.atleast_1d(self.min_size)
        scale = lengths[int(rng.integers(len(lengths)))] / min(size)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(size))
        return resize(tensors, _scaled(size, scale))


def _scaled(size, scale):
    return [max(1, int(side * scale)) for side in size]


@dataclass(frozen=True)
class Resize(CheckedArguments):
    """Scale to exactly `size`, (height, width) in pixels."""

    size: tuple = argument(1, count=2, whole=True)

    def __call__(self, tensors, rng):
        return resize(tensors, self.size)


@dataclass(frozen=True)
class ScaleJitter(CheckedArguments):
    """Large scale jitter (arXiv 2012.07177): fit into `target_size`, times a drawn factor.

    Attributes:
        target_size: (height, width) in pixels.
        scale_range: range of the factor; the aspect ratio is kept.
    """

    target_size: tuple = argument(1, count=2, whole=True, default=(1024, 1024))
    scale_range: tuple = argument(0.01, count=2, ascending=True, default=(0.1, 2.0))

    def __call__(self, tensors, rng):
        height, width = get_image_size(tensors)
        fit = min(self.target_size[0] / height, self.target_size[1] / width)
        return resize(tensors, _scaled((height, width), fit * rng.uniform(*self.scale_range)))


@dataclass(frozen=True)
class RandomHorizontalFlip(CheckedArguments):
    """Mirror left and right with probability `p`.

    `keypoint_flip_indices` says which keypoint takes the place of which; the config's flips get it
    from the dataset.
    """

    p: float = argument(0, 1, default=0.5)
    keypoint_flip_indices: tuple | None = None

    def __call__(self, tensors, rng):
        return horizontal_flip(tensors, self.keypoint_flip_indices) if rng.random() < self.p else tensors


@dataclass(frozen=True)
class RandomVerticalFlip(CheckedArguments):
    """Mirror top and bottom with probability `p`."""

    p: float = argument(0, 1, default=0.5)

    def __call__(self, tensors, rng):
        return vertical_flip(tensors) if rng.random() < self.p else tensors


@dataclass(frozen=True)
class RandomZoomOut(CheckedArguments):
    """Put the image somewhere on a larger canvas (SSD, arXiv 1512.02325).

    Attributes:
        fill: colour of the canvas, one number or (R, G, B), 0 to 255.
        side_range: range of the canvas's side as a multiple of the image's.
        p: probability.
    """

    fill: float | tuple = argument(0, 255, count=3, or_one=True, default=0)
    side_range: tuple = argument(1, count=2, ascending=True, default=(1.0, 4.0))
    p: float = argument(0, 1, default=0.5)

    def __call__(self, tensors, rng):
        if rng.random() >= self.p:
            return tensors
        size = np.array(get_image_size(tensors))
        free = (size * rng.uniform(*self.side_range)).astype(int) - size
        top, left = (int(v) for v in rng.integers(0, free + 1))
        padding = (left, top, int(free[1]) - left, int(free[0]) - top)
        return pad(tensors, padding, self.fill)
