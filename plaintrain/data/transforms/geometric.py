"""Geometric augmentations: resize, flip and zoom.

An augmentation takes the tensors of an image (see `tensors.py`) and a generator, and returns a new dict.
It draws from that generator only, so a sample does not depend on the worker. Names and defaults are
those of torchvision.transforms.v2, torchvision's detection references or Detectron2.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plaintrain.data.transforms.arguments import CheckedArguments, Numbers, argument
from plaintrain.data.transforms.tensors import (
    Tensors,
    get_image_size,
    horizontal_flip,
    pad,
    resize,
    vertical_flip,
)
from plaintrain.utils.errors import UserError


def get_shortest_edge_size(height: int, width: int, short_edge: int, max_size: int) -> tuple[int, int]:
    """Return Detectron2's (height, width) with the shorter side `short_edge`, the longer <= `max_size`."""
    scale = short_edge / min(height, width)
    size = [short_edge, scale * width] if height < width else [scale * height, short_edge]
    if max(size) > max_size:
        scale = max_size / max(size)
        size = [side * scale for side in size]
    return max(1, int(size[0] + 0.5)), max(1, int(size[1] + 0.5))


@dataclass(frozen=True)
class ResizeShortestEdge(CheckedArguments):
    """Detectron2's ResizeShortestEdge; `sample_style` is choice or range."""

    short_edge_length: tuple[int, ...] = argument(1, length=0, integer=True)
    max_size: int = argument(1, integer=True)
    sample_style: str = "choice"

    def __post_init__(self):
        super().__post_init__()
        if self.sample_style not in ("choice", "range"):
            raise UserError(f"sample_style must be choice or range, got {self.sample_style!r}")
        if self.sample_style == "range":
            self._check("short_edge_length", Numbers(1, length=2, ascending=True))

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        if self.sample_style == "range":
            low, high = self.short_edge_length
            short_edge = int(rng.integers(low, high + 1))
        else:
            short_edge = self.short_edge_length[int(rng.integers(len(self.short_edge_length)))]
        return resize(tensors, get_shortest_edge_size(*get_image_size(tensors), short_edge, self.max_size))


class _ResizeShortestEdge(ResizeShortestEdge):
    get_output_shape = staticmethod(get_shortest_edge_size)

    def __init__(self, short_edge_length, max_size=sys.maxsize, sample_style="range", interp=None):
        edges = [short_edge_length] * 2 if isinstance(short_edge_length, int) else short_edge_length
        super().__init__(edges, max_size, sample_style)


@dataclass(frozen=True)
class RandomShortestSize(CheckedArguments):
    """torchvision's RandomShortestSize: like ResizeShortestEdge, but rounds down."""

    min_size: int | tuple[int, ...] = argument(1, length=0, integer=True, or_scalar=True)
    max_size: int | None = argument(1, integer=True, default=None, others=(None,))

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        size = get_image_size(tensors)
        min_sizes = np.atleast_1d(self.min_size)
        scale = min_sizes[int(rng.integers(len(min_sizes)))] / min(size)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(size))
        return resize(tensors, _scale_size(size, scale))


def _scale_size(size: Sequence[int], scale: float) -> list[int]:
    return [max(1, int(side * scale)) for side in size]


@dataclass(frozen=True)
class Resize(CheckedArguments):
    """Resize to exactly `size`, (height, width)."""

    size: tuple[int, int] = argument(1, length=2, integer=True)

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        return resize(tensors, self.size)


@dataclass(frozen=True)
class ScaleJitter(CheckedArguments):
    """Large scale jitter (arXiv 2012.07177): resize to fit `target_size`, (height, width), times a factor."""

    target_size: tuple[int, int] = argument(1, length=2, integer=True, default=(1024, 1024))
    scale_range: tuple[float, float] = argument(0.01, length=2, ascending=True, default=(0.1, 2.0))

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        height, width = get_image_size(tensors)
        scale = min(self.target_size[0] / height, self.target_size[1] / width)
        return resize(tensors, _scale_size((height, width), scale * rng.uniform(*self.scale_range)))


@dataclass(frozen=True)
class RandomHorizontalFlip(CheckedArguments):
    """Horizontal flip with probability `p`; `build_augmentation` sets `keypoint_flip_indices`."""

    p: float = argument(0, 1, default=0.5)
    keypoint_flip_indices: Sequence[int] | None = None

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        return horizontal_flip(tensors, self.keypoint_flip_indices) if rng.random() < self.p else tensors


@dataclass(frozen=True)
class RandomVerticalFlip(CheckedArguments):
    """Vertical flip with probability `p`."""

    p: float = argument(0, 1, default=0.5)

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        return vertical_flip(tensors) if rng.random() < self.p else tensors


@dataclass(frozen=True)
class RandomZoomOut(CheckedArguments):
    """Random placement on a larger canvas, `side_range` times the image's size (SSD, arXiv 1512.02325)."""

    fill: float | tuple = argument(0, 255, length=3, or_scalar=True, default=0)
    side_range: tuple[float, float] = argument(1, length=2, ascending=True, default=(1.0, 4.0))
    p: float = argument(0, 1, default=0.5)

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        if rng.random() >= self.p:
            return tensors
        size = np.array(get_image_size(tensors))
        margin = (size * rng.uniform(*self.side_range)).astype(int) - size
        top, left = (int(v) for v in rng.integers(0, margin + 1))
        padding = (left, top, int(margin[1]) - left, int(margin[0]) - top)
        return pad(tensors, padding, self.fill)
