"""Cropping augmentations."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from plaintrain.data.transforms.arguments import CheckedArguments, Numbers, argument
from plaintrain.data.transforms.tensors import Tensors, crop, get_image_size, pad, select_instances
from plaintrain.utils.errors import UserError


def _crop_at_random(tensors, size, rng):
    top, left = rng.integers(0, np.array(get_image_size(tensors)) - size + 1)
    return crop(tensors, int(top), int(left), *size.tolist())


@dataclass(frozen=True)
class RandomCrop(CheckedArguments):
    """Detectron2's random crop; see INPUT.CROP.TYPE and INPUT.CROP.SIZE."""

    crop_type: str
    crop_size: tuple[float, float]

    def __post_init__(self):
        types = ("relative", "relative_range", "absolute", "absolute_range")
        if self.crop_type not in types:
            raise UserError(f"crop_type must be one of {', '.join(types)}, got {self.crop_type!r}")
        low, high = (0.0001, 1) if self.crop_type.startswith("relative") else (1, 1_000_000)
        self._check("crop_size", Numbers(low, high, length=2, ascending=self.crop_type == "absolute_range"))

    def draw_crop_size(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Return the (height, width) of the crop of an image of this size."""
        image_size = np.array([height, width])
        size = np.array(self.crop_size, dtype=float)
        if self.crop_type == "absolute":
            return np.minimum(size, image_size).astype(int)
        if self.crop_type == "absolute_range":
            low, high = (np.minimum(image_size, limit).astype(int) for limit in size)
            return rng.integers(low, high + 1)
        if self.crop_type == "relative_range":
            size = size + rng.random(2) * (1 - size)
        return np.maximum(1, (image_size * size + 0.5).astype(int))

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        return _crop_at_random(tensors, self.draw_crop_size(*get_image_size(tensors), rng), rng)


@dataclass(frozen=True)
class FixedSizeCrop(CheckedArguments):
    """Random crop and padding at the right and the bottom to exactly `size`, (height, width)."""

    size: tuple[int, int] = argument(1, length=2, integer=True, default=(1024, 1024))
    fill: float | tuple = argument(0, 255, length=3, or_scalar=True, default=0)

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        crop_size = np.minimum(get_image_size(tensors), self.size)
        cropped = _crop_at_random(tensors, crop_size, rng)
        bottom, right = (int(v) for v in np.array(self.size) - crop_size)
        return pad(cropped, (0, 0, right, bottom), self.fill) if bottom or right else cropped


@dataclass(frozen=True)
class RandomIoUCrop(CheckedArguments):
    """torchvision's RandomIoUCrop: crop with a minimum IoU to an instance (SSD, arXiv 1512.02325).

    The minimum IoU is drawn from `sampler_options` (>= 1: no crop), and again after `trials` failed crops.
    Instances with the centre outside are removed. An image without instances is unchanged.
    """

    min_scale: float = argument(0.01, 1, default=0.3)
    max_scale: float = 1.0
    min_aspect_ratio: float = argument(0.01, default=0.5)
    max_aspect_ratio: float = 2.0
    sampler_options: tuple = argument(0, length=0, default=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
    trials: int = argument(1, 10_000, integer=True, default=40)

    def __post_init__(self):
        super().__post_init__()
        self._check("max_scale", Numbers(self.min_scale, 1))
        self._check("max_aspect_ratio", Numbers(self.min_aspect_ratio))
        if max(self.sampler_options) < 1:
            raise UserError("sampler_options must hold a 1, which leaves the image unchanged")

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        boxes = tensors.get("boxes", torch.zeros(0, 4)).as_subclass(Tensor)
        x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unbind(1)
        while len(boxes):
            min_iou = self.sampler_options[int(rng.integers(len(self.sampler_options)))]
            if min_iou >= 1:
                break
            for _ in range(self.trials):
                box = left, top, right, bottom = self._draw_box(*get_image_size(tensors), rng)
                inside = (left < x) & (x < right) & (top < y) & (y < bottom)
                if inside.any() and box_iou(boxes[inside], boxes.new_tensor([box])).max() >= min_iou:
                    return crop(select_instances(tensors, inside), top, left, bottom - top, right - left)
        return tensors

    def _draw_box(self, height, width, rng):
        """Draw the XYXY box of a crop; its area is 0 if the aspect ratio is out of range."""
        h, w = (int(v) for v in [height, width] * rng.uniform(self.min_scale, self.max_scale, 2))
        top, left = (int(v) for v in rng.integers(0, [height - h + 1, width - w + 1]))
        if not self.min_aspect_ratio * h <= w <= self.max_aspect_ratio * h:
            h = w = 0
        return left, top, left + w, top + h
