"""Augmentation that cuts windows out of an image; what is cut away of an instance is gone."""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_iou

from plaintrain.data.transforms.arguments import CheckedArguments, Numbers, argument
from plaintrain.data.transforms.tensors import crop, get_image_size, pad, select_instances
from plaintrain.utils.errors import UserError


def _crop_at_random(tensors, window, rng):
    """Cut a window, (height, width), anywhere."""
    size, window = np.array(get_image_size(tensors)), np.array(window)
    top, left = rng.integers(0, size - window + 1)
    return crop(tensors, int(top), int(left), int(window[0]), int(window[1]))


@dataclass(frozen=True)
class RandomCrop(CheckedArguments):
    """Cut out a window at a random place (Detectron2).

    Attributes:
        crop_type: relative, relative_range, absolute or absolute_range, as INPUT.CROP.TYPE says.
        crop_size: two numbers, (height, width) or the range, as INPUT.CROP.SIZE says.
    """

    crop_type: str
    crop_size: tuple

    def __post_init__(self):
        types = ("relative", "relative_range", "absolute", "absolute_range")
        if self.crop_type not in types:
            raise UserError(f"crop_type must be one of {', '.join(types)}, not {self.crop_type!r}")
        low, high = (0.0001, 1) if self.crop_type.startswith("relative") else (1, np.inf)
        self._check("crop_size", Numbers(low, high, count=2, ascending=self.crop_type == "absolute_range"))

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
        return _crop_at_random(tensors, self.window(*get_image_size(tensors), rng), rng)


@dataclass(frozen=True)
class FixedSizeCrop(CheckedArguments):
    """Bring to exactly `size`: cut a random window out of what is larger, pad right and bottom.

    Attributes:
        size: (height, width) in pixels.
        fill: colour of what is added, one number or (R, G, B), 0 to 255.
    """

    size: tuple = argument(1, count=2, whole=True, default=(1024, 1024))
    fill: float | tuple = argument(0, 255, count=3, or_one=True, default=0)

    def __call__(self, tensors, rng):
        window = np.minimum(get_image_size(tensors), self.size)
        cropped = _crop_at_random(tensors, window, rng)
        bottom, right = (int(v) for v in np.array(self.size) - window)
        return pad(cropped, (0, 0, right, bottom), self.fill) if bottom or right else cropped


@dataclass(frozen=True)
class RandomIoUCrop(CheckedArguments):
    """Cut a window that overlaps an instance enough (SSD, arXiv 1512.02325).

    Instances whose centre is outside the window are removed. Without instances nothing is cut.

    Attributes:
        min_scale, max_scale: range of the window's sides as shares of the image's.
        min_aspect_ratio, max_aspect_ratio: range of its width / height.
        sampler_options: least IoU of the window and an instance, one of which is drawn each time;
            one of at least 1 leaves the image as it is.
        trials: windows to try before another option is drawn.
    """

    min_scale: float = argument(0.01, 1, default=0.3)
    max_scale: float = 1.0
    min_aspect_ratio: float = argument(0.01, default=0.5)
    max_aspect_ratio: float = 2.0
    sampler_options: tuple = argument(0, count=0, default=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
    trials: int = argument(1, whole=True, default=40)

    def __post_init__(self):
        super().__post_init__()
        self._check("max_scale", Numbers(self.min_scale, 1))
        self._check("max_aspect_ratio", Numbers(self.min_aspect_ratio))
        if max(self.sampler_options) < 1:
            raise UserError("sampler_options must hold a 1, which leaves the image as it is")

    def __call__(self, tensors, rng):
        boxes = tensors.get("boxes", torch.zeros(0, 4)).as_subclass(torch.Tensor)
        x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unbind(1)
        while len(boxes):
            least = self.sampler_options[int(rng.integers(len(self.sampler_options)))]
            if least >= 1:
                break
            for _ in range(self.trials):
                window = left, top, right, bottom = self._window(*get_image_size(tensors), rng)
                inside = (left < x) & (x < right) & (top < y) & (y < bottom)
                if inside.any() and box_iou(boxes[inside], boxes.new_tensor([window])).max() >= least:
                    return crop(select_instances(tensors, inside), top, left, bottom - top, right - left)
        return tensors

    def _window(self, height, width, rng):
        """x0, y0, x1, y1 of a window, or one without area if its aspect ratio is not allowed."""
        h, w = (int(v) for v in [height, width] * rng.uniform(self.min_scale, self.max_scale, 2))
        top, left = (int(v) for v in rng.integers(0, [height - h + 1, width - w + 1]))
        if not self.min_aspect_ratio * h <= w <= self.max_aspect_ratio * h:
            h = w = 0
        return left, top, left + w, top + h
