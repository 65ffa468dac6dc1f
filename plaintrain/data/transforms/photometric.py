"""Photometric augmentations: the targets do not change."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as F

from plaintrain.data.transforms.arguments import CheckedArguments, argument
from plaintrain.data.transforms.tensors import Tensors, get_image_size


@dataclass(frozen=True)
class RandomPhotometricDistort(CheckedArguments):
    """torchvision's RandomPhotometricDistort (SSD, arXiv 1512.02325): each step with probability `p`.

    The steps are brightness, contrast (here or after hue), saturation, hue and channel permutation.
    """

    brightness: tuple[float, float] = argument(0, length=2, ascending=True, default=(0.875, 1.125))
    contrast: tuple[float, float] = argument(0, length=2, ascending=True, default=(0.5, 1.5))
    saturation: tuple[float, float] = argument(0, length=2, ascending=True, default=(0.5, 1.5))
    hue: tuple[float, float] = argument(-0.5, 0.5, length=2, ascending=True, default=(-0.05, 0.05))
    p: float = argument(0, 1, default=0.5)

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        contrast_first = rng.random() < 0.5
        steps = [
            (F.adjust_brightness, self.brightness),
            (F.adjust_saturation, self.saturation),
            (F.adjust_hue, self.hue),
        ]
        steps.insert(1 if contrast_first else 3, (F.adjust_contrast, self.contrast))
        image = tensors["image"]
        for step, (low, high) in steps:
            if rng.random() < self.p:
                image = step(image, float(rng.uniform(low, high)))
        if rng.random() < self.p:
            image = F.permute_channels(image, rng.permutation(3).tolist())
        return {**tensors, "image": image}


@dataclass(frozen=True)
class RandomErasing(CheckedArguments):
    """Random erasing (arXiv 1708.04896), as in torchvision; `value` is a colour or "random" for noise."""

    p: float = argument(0, 1, default=0.5)
    scale: tuple[float, float] = argument(0, 1, length=2, ascending=True, default=(0.02, 0.33))
    ratio: tuple[float, float] = argument(0.01, length=2, ascending=True, default=(0.3, 3.3))
    value: float | tuple | str = argument(0, 255, length=3, or_scalar=True, default=0, others=("random",))

    def __call__(self, tensors: Tensors, rng: np.random.Generator) -> Tensors:
        if rng.random() >= self.p:
            return tensors
        height, width = get_image_size(tensors)
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(*np.log(self.ratio)))
            h = round(math.sqrt(area * ratio))
            w = round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = (int(v) for v in rng.integers(0, [height - h + 1, width - w + 1]))
                if self.value == "random":
                    value = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
                else:
                    value = torch.tensor(self.value, dtype=torch.uint8).reshape(-1, 1, 1)
                return {**tensors, "image": F.erase(tensors["image"], top, left, h, w, value)}
        return tensors
