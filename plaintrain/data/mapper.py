"""From a record to a sample: read the image, augment it with its targets."""

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torchvision import tv_tensors

from plaintrain.data.images import check_image_size, read_image
from plaintrain.data.transforms import build_augmentation
from plaintrain.structures import BoxMode

# Boxes whose width or height falls below this many pixels are dropped.
_MIN_SIDE = 1e-5


class DatasetMapper:
    """A callable from (record, generator) to the sample that a model takes.

    A sample holds `image` (uint8 `[3, H, W]`, RGB, augmented), `image_id`, `file_name`, the
    original `height` and `width`, and in training `target`: `boxes` (float32 `[N, 4]`, XYXY, in
    the augmented image's pixels) and `labels` (int64 `[N]`, 0 to K-1). Crowds and boxes without
    area are left out of `target`.
    """

    def __init__(self, cfg=None, is_train=True, *, augmentations=None):
        """
        Args:
            cfg: config whose INPUT.* names the augmentations; not needed if they are given.
            is_train: make targets, and augment as in training.
            augmentations: callables `(tensors, generator) -> tensors`, applied in order.
        """
        if augmentations is None:
            augmentations = build_augmentation(cfg, is_train)
        self.augmentations = list(augmentations)
        self.is_train = is_train

    def __call__(self, record, rng=None):
        """Make the sample; `rng` is the `numpy.random.Generator` that augmentation draws from."""
        rng = np.random.default_rng() if rng is None else rng
        image = read_image(record["file_name"])
        check_image_size(record, image)
        tensors = {"image": tv_tensors.Image(image)}
        if self.is_train:
            annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
            tensors["boxes"] = _boxes(annotations, (record["height"], record["width"]))
        for augmentation in self.augmentations:
            tensors = augmentation(tensors, rng)
        sample = {key: record[key] for key in ("image_id", "file_name", "height", "width")}
        sample["image"] = tensors["image"].as_subclass(torch.Tensor).contiguous()
        if self.is_train:
            labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
            sample["target"] = _target(tensors["boxes"], labels)
        return sample


def _boxes(annotations, size):
    rows = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    data = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    boxes = tv_tensors.BoundingBoxes(data, format="XYXY", canvas_size=size)
    return F.clamp_bounding_boxes(boxes)


def _target(boxes, labels):
    boxes = F.clamp_bounding_boxes(boxes).as_subclass(torch.Tensor)
    keep = (boxes[:, 2:] - boxes[:, :2] > _MIN_SIDE).all(dim=1)
    return {"boxes": boxes[keep], "labels": labels[keep]}
