"""Detectron2's augmentations, which draw transforms of NumPy images `[H, W, C]`, coordinates and boxes."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from plaintrain.data.loader import seeded_globals
from plaintrain.data.transforms import tensors as ops
from plaintrain.utils.errors import UserError


class Transform:
    """Base class: a subclass implements `apply_image` and `apply_coords` (`[N, 2]`, x and y in pixels)."""

    apply_image: Callable
    apply_coords: Callable

    def _set_attributes(self, params):
        vars(self).update({k: v for k, v in params.items() if k != "self" and not k.startswith("_")})

    def get_transform(self, image: np.ndarray) -> "Transform":
        return self

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation)

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        corners = np.asarray(box, dtype=float).reshape(-1, 4)[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
        points = self.apply_coords(corners).reshape(-1, 4, 2)
        return np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)

    def apply_tensors(self, tensors: Any) -> Any:
        raise UserError(f"DatasetMapper cannot apply a {type(self).__name__}; it needs a mapper of your own")


class TensorTransform(Transform):
    """A function of the tensors of `tensors.py` that maps a point to scale * point + shift."""

    def __init__(self, function: Callable = dict, height: int = 1, width: int = 1, **attributes: Any) -> None:
        """Set `attributes`, as Detectron2 has them; height and width are the image's, if they matter."""
        self._set_attributes({**attributes, "apply_tensors": function})
        corners = torch.tensor([[0, 0], [width, height]], dtype=torch.float64)
        blank = tv_tensors.Mask(torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, height, width))
        points = tv_tensors.KeyPoints(corners, canvas_size=(height, width))
        self._shift, end = function({"image": blank, "corners": points})["corners"].numpy()
        self._scale = (end - self._shift) / (width, height)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return np.asarray(coords) * self._scale + self._shift

    def apply_image(self, img: np.ndarray, wrapper: Callable = tv_tensors.Image) -> np.ndarray:
        channels = torch.from_numpy(np.ascontiguousarray(img)).reshape(*img.shape[:2], -1).permute(2, 0, 1)
        result = self.apply_tensors({"image": wrapper(channels)})["image"].as_subclass(Tensor)
        return result.permute(1, 2, 0).numpy().reshape(*result.shape[1:], *img.shape[2:])

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, tv_tensors.Mask)


class NoOpTransform(TensorTransform):
    """The identity."""


class HFlipTransform(TensorTransform):
    def __init__(self, width: int) -> None:
        super().__init__(ops.horizontal_flip, 1, width)


class ResizeTransform(TensorTransform):
    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: Any = None) -> None:
        super().__init__(partial(ops.resize, size=(new_h, new_w)), h, w, new_h=new_h, new_w=new_w)


class CropTransform(TensorTransform):
    def __init__(self, x0: int, y0: int, w: int, h: int) -> None:
        crop = partial(ops.crop, top=y0, left=x0, height=h, width=w)
        super().__init__(crop, x0=x0, y0=y0, w=w, h=h)


class TransformList(Transform):
    """Transforms that are applied one after the other, by any method apply_*."""

    def __init__(self, transforms: Iterable[Transform]) -> None:
        self.transforms = list(transforms)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("apply_"):
            return super().__getattribute__(name)
        return lambda value: reduce(lambda v, t: getattr(t, name)(v), self.transforms, value)


class AugInput:
    """An image and boxes, `[N, 4]`, XYXY, which augmentations transform in place."""

    def __init__(self, image: np.ndarray, *, boxes: Any = None) -> None:
        self.image = image
        self.boxes = boxes

    def transform(self, tfm: Transform) -> None:
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)


class Augmentation:
    """Base class: a subclass implements `get_transform`, whose arguments are attributes of the input."""

    get_transform: Callable

    def __call__(self, aug_input: Any) -> Transform:
        names = list(inspect.signature(self.get_transform).parameters)
        names = names if len(names) > 1 else ["image"]
        transform = self.get_transform(*[getattr(aug_input, name) for name in names])
        aug_input.transform(transform)
        return transform

    _init: Any = Transform._set_attributes

    def _rand_range(self, low=1.0, high=None, size=None):
        return np.random.uniform(*((0, low) if high is None else (low, high)), size)


class AugmentationList(Augmentation):
    """Augmentations and transforms that are applied one after the other."""

    def __init__(self, augs: Iterable[Any]) -> None:
        self.augs = list(augs)

    def __call__(self, aug_input: Any) -> TransformList:
        calls = [a if isinstance(a, Augmentation) else partial(Augmentation.__call__, a) for a in self.augs]
        return TransformList([call(aug_input) for call in calls])


def augment_tensors(augmentation: Any, tensors: ops.Tensors, rng: np.random.Generator) -> ops.Tensors:
    """Apply an augmentation or a transform of Detectron2's type in `DatasetMapper`."""
    boxes = tensors["boxes"].as_subclass(Tensor).numpy() if "boxes" in tensors else None
    aug_input = AugInput(ops.unwrap_image(tensors).numpy().transpose(1, 2, 0), boxes=boxes)
    with seeded_globals(int(rng.integers(2**63)), 0):
        return AugmentationList([augmentation])(aug_input).apply_tensors(tensors)


class RandomFlip(Augmentation):
    """A horizontal flip with probability `prob`."""

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = prob

    def get_transform(self, image: np.ndarray) -> Transform:
        return HFlipTransform(image.shape[1]) if self._rand_range() < self.prob else NoOpTransform()
