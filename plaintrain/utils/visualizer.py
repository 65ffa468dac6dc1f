"""Detectron2's `Visualizer`, the only module outside of the tools that imports one; nothing imports it."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from plaintrain.visualization.drawing import (
    draw_instances,
    get_record_instances,
    get_skeleton,
    scale_longer_side,
)
from plaintrain.visualization.images import save_image


class Visualizer:
    """Draws instances on a copy of an image, uint8 `[H, W, 3]`, RGB; each method returns the result."""

    def __init__(self, img_rgb: np.ndarray, metadata: Any = None, scale: float = 1.0) -> None:
        self._original = torch.from_numpy(np.ascontiguousarray(img_rgb)).permute(2, 0, 1)
        self._longer_side = max(1, round(max(img_rgb.shape[:2]) * scale))
        self._image, _ = self._scale({"boxes": torch.zeros(0, 4)})
        self._metadata = metadata or {}

    def _scale(self, instances):
        return scale_longer_side(self._original, instances, self._longer_side)

    def _draw(self, instances: Mapping[str, Any], captions: Sequence[str] | None = None) -> Self:
        tensors = {name: torch.as_tensor(value) for name, value in instances.items()}
        tensors.setdefault("labels", torch.zeros(len(tensors["boxes"]), dtype=torch.int64))
        _, scaled = self._scale(tensors)
        classes = self._metadata.get("thing_classes") or ()
        skeleton = get_skeleton(self._metadata)
        self._image = draw_instances(self._image, scaled, classes, skeleton, captions)
        return self

    def draw_dataset_dict(self, dic: dict[str, Any]) -> Self:
        """Draw the annotations of a record."""
        return self._draw(get_record_instances(dic))

    def draw_instance_predictions(self, predictions: Mapping[str, Any]) -> Self:
        """Draw what a model returns for the image."""
        return self._draw(predictions)

    def overlay_instances(self, *, labels: Sequence[str] | None = None, **instances: Any) -> Self:
        """Draw `boxes` (XYXY), `masks` and `keypoints`, with texts as `labels`."""
        instances = {name: value for name, value in instances.items() if value is not None}
        return self._draw(instances, labels or [""] * len(instances["boxes"]))

    def get_output(self) -> Self:
        return self

    def get_image(self) -> np.ndarray:
        return self._image.permute(1, 2, 0).numpy()

    def save(self, filepath: str) -> None:
        save_image(filepath, self._image)
