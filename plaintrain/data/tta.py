"""Test-time augmentation: resized and flipped views of an image."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torchvision import tv_tensors

from plaintrain.config import CfgNode, check_cfg
from plaintrain.data.dataset_mapper import SAMPLE_KEYS, DatasetMapper
from plaintrain.data.keypoints import create_keypoint_hflip_indices
from plaintrain.data.transforms.geometric import Resize, ResizeShortestEdge, get_shortest_edge_size
from plaintrain.data.transforms.tensors import Tensors, horizontal_flip, unwrap_image


class TTAMapper(DatasetMapper):
    """Mapper to the samples of `DetectorWithTTA`.

    A sample has `image_id`, `file_name`, the original `height` and `width`, and `views`: one for each of
    `resizes` (None keeps the size), with `flip` followed by its horizontal flip. A view has `image` (uint8
    `[3, h, w]`, RGB), `flipped` and `keypoint_flip_indices` (None if not flipped). A sample has no `image`,
    so that a model without support for views fails.
    """

    def __init__(
        self,
        cfg: CfgNode,
        resizes: Sequence[Callable[..., Tensors] | None],
        flip: bool = True,
        keypoint_flip_indices: Sequence[int] | None = None,
    ):
        super().__init__(cfg, is_train=False, augmentations=[])
        self.resizes = resizes
        self.flip = flip
        self.keypoint_flip_indices = keypoint_flip_indices

    def __call__(self, record: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        """Create the sample of a record; `rng` is not used."""
        image = self._read(record)["image"]
        return {**{key: record[key] for key in SAMPLE_KEYS}, "views": self.create_views(image)}

    def create_views(self, image: Tensor) -> list[dict[str, Any]]:
        """Return the views of an image, uint8 `[3, H, W]`."""
        tensors: Tensors = {"image": tv_tensors.Image(image)}
        views = []
        # Each of `resizes` has one size: nothing is drawn.
        rng = np.random.default_rng(0)
        for resize in self.resizes:
            resized = resize(tensors, rng) if resize else tensors
            views.append({"image": unwrap_image(resized), "flipped": False, "keypoint_flip_indices": None})
            if self.flip:
                image = unwrap_image(horizontal_flip(resized))
                order = self.keypoint_flip_indices
                views.append({"image": image, "flipped": True, "keypoint_flip_indices": order})
        return views


def build_tta_mapper(cfg: CfgNode, dataset_name: str | None) -> TTAMapper:
    """Build the `TTAMapper` of TEST.AUG and INPUT.FIXED_SIZE."""
    check_cfg(cfg)
    aug = cfg.TEST.AUG
    height, width = cfg.INPUT.FIXED_SIZE
    order = None
    resizes: list[Callable[..., Tensors] | None]
    if (height, width) == (0, 0):
        resizes = [ResizeShortestEdge((size,), aug.MAX_SIZE) if size else None for size in aug.MIN_SIZES]
    else:
        resizes = [
            Resize(get_shortest_edge_size(height, width, size, aug.MAX_SIZE) if size else (height, width))
            for size in aug.MIN_SIZES
        ]
    if dataset_name is not None and cfg.MODEL.KEYPOINT_ON and aug.FLIP:
        order = create_keypoint_hflip_indices([dataset_name], cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
    return TTAMapper(cfg, resizes, aug.FLIP, order)
