"""Detectron2's augmentations, which draw transforms of NumPy images `[H, W, C]`, coordinates and boxes.

They draw from the global generators, which `DatasetMapper` and the loader seed for each sample.
"""

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

    def apply_polygons(self, polygons: Iterable[np.ndarray]) -> list[np.ndarray]:
        return [self.apply_coords(polygon) for polygon in polygons]

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """Return the boxes, `[N, 4]`, XYXY, around the transformed corners."""
        corners = np.asarray(box, dtype=float).reshape(-1, 4)[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
        points = self.apply_coords(corners).reshape(-1, 4, 2)
        return np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)

    def flips_horizontally(self) -> bool:
        left, right = self.apply_coords(np.array([[0.0, 0.0], [1.0, 0.0]]))[:, 0]
        return bool(right < left)

    def apply_tensors(self, tensors: ops.Tensors) -> ops.Tensors:
        """Transform the tensors of `DatasetMapper`; `tensors.crop` removes what is outside the image."""
        pixels = self.apply_image(ops.unwrap_image(tensors).numpy().transpose(1, 2, 0).copy())
        size = pixels.shape[:2]
        image = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.uint8)).permute(2, 0, 1)
        result = {**tensors, "image": tv_tensors.Image(image)}
        if "boxes" in tensors:
            boxes = torch.tensor(self.apply_box(tensors["boxes"].numpy()), dtype=torch.float32)
            result["boxes"] = tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=size)
        if "masks" in tensors:
            masks = [self.apply_segmentation(mask) for mask in tensors["masks"].numpy().copy()]
            result["masks"] = tv_tensors.Mask(np.array(masks, dtype=np.uint8).reshape(-1, *size))
        if "keypoints" in tensors:
            points = self.apply_coords(tensors["keypoints"].numpy().astype(float).reshape(-1, 2))
            data = torch.tensor(points, dtype=torch.float32).reshape(tensors["keypoints"].shape)
            result["keypoints"] = tv_tensors.KeyPoints(data, canvas_size=size)
            if self.flips_horizontally():
                result = ops.reorder_keypoints(result)
        return ops.crop(result, 0, 0, *size)


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


class VFlipTransform(TensorTransform):
    def __init__(self, height: int) -> None:
        super().__init__(ops.vertical_flip, height)


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
    """An image and its boxes, which augmentations transform in place."""

    def __init__(self, image: np.ndarray, *, boxes: Any = None) -> None:
        self.image = image
        self.boxes = boxes

    def transform(self, tfm: Transform) -> None:
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)

    def apply_augmentations(self, augmentations: Iterable[Any]) -> TransformList:
        return AugmentationList(augmentations)(self)


class Augmentation:
    """Base class: a subclass implements `get_transform`, whose arguments are attributes of the input."""

    get_transform: Callable

    def __call__(self, aug_input: Any) -> Transform:
        """Transform the input in place, and return the transform."""
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
        # Transforms and augmentations of tensors have `get_transform` too.
        calls = [a if isinstance(a, Augmentation) else partial(Augmentation.__call__, a) for a in self.augs]
        return TransformList([call(aug_input) for call in calls])


def apply_augmentations(augmentations: Iterable[Any], inputs: Any) -> tuple[Any, TransformList]:
    """Return the augmented image or `AugInput`, and the transforms."""
    aug_input = AugInput(inputs) if isinstance(inputs, np.ndarray) else inputs
    transforms = AugmentationList(augmentations)(aug_input)
    return (aug_input.image if isinstance(inputs, np.ndarray) else aug_input), transforms


def augment_tensors(augmentation: Any, tensors: ops.Tensors, rng: np.random.Generator) -> ops.Tensors:
    """Apply an augmentation or a transform of Detectron2's type in `DatasetMapper`."""
    boxes = tensors["boxes"].as_subclass(Tensor).numpy() if "boxes" in tensors else None
    aug_input = AugInput(ops.unwrap_image(tensors).numpy().transpose(1, 2, 0), boxes=boxes)
    with seeded_globals(int(rng.integers(2**63)), 0):
        return AugmentationList([augmentation])(aug_input).apply_tensors(tensors)


class RandomFlip(Augmentation):
    """A horizontal or vertical flip with probability `prob`."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False) -> None:
        if horizontal == vertical:
            raise UserError("RandomFlip must be either horizontal or vertical; use two of them for both")
        self.prob = prob
        self.horizontal = horizontal

    def get_transform(self, image: np.ndarray) -> Transform:
        if self._rand_range() >= self.prob:
            return NoOpTransform()
        height, width = image.shape[:2]
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)
