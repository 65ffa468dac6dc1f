"""Map a record to a sample: read the image, augment it together with its targets."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from pycocotools import mask as coco_mask
from torchvision import tv_tensors

from plaintrain.config import CfgNode
from plaintrain.data.images import ImageCache, check_image_size, get_pixel_range, read_image
from plaintrain.data.keypoints import create_keypoint_hflip_indices
from plaintrain.data.transforms.augmentation import Augmentation, Transform, augment_tensors
from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.transforms.copy_paste import SimpleCopyPaste
from plaintrain.data.transforms.tensors import (
    clear_outside_keypoints,
    has_extent,
    select_instances,
    unwrap_image,
)
from plaintrain.structures import BoxMode, encode_segmentation
from plaintrain.utils.errors import UserError

# Keys that a sample takes from its record.
SAMPLE_KEYS = ("image_id", "file_name", "height", "width")


class DatasetMapper:
    """A callable that maps (record, generator) to the sample that a model takes.

    A sample has `image` (uint8 `[3, H, W]`, RGB), `image_id`, `file_name`, the original `height` and `width`,
    and in training `target`, in pixels of `image`: `boxes` (float32 `[N, 4]`, XYXY), `labels` (int64 `[N]`, 0
    to K-1), `masks` (uint8 `[N, H, W]`, 0 or 1) and `keypoints` (float32 `[N, Kp, 3]`: x, y, visibility 0
    unlabelled or outside, 1 hidden, 2 visible). Crowds and instances without area are skipped.
    """

    thread_safe = True
    image_cache: ImageCache | None = None
    # See `convert_to_rgb`.
    pixel_range: tuple[float, ...] = ()

    def __init__(
        self,
        cfg: CfgNode | None = None,
        is_train: bool = True,
        *,
        augmentations: Iterable[Callable] | None = None,
        use_masks: bool | None = None,
        num_keypoints: int | None = None,
        records: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """
        Args:
            cfg: sets the defaults of the other arguments.
            augmentations: callables `(tensors, generator) -> tensors`, see `data.transforms.tensors`, or
                augmentations and transforms of Detectron2's type, see `data.transforms.augmentation`.
            num_keypoints: 0 for targets without keypoints.
            records: the records from which SimpleCopyPaste draws.
        """
        flip_indices = None
        if cfg is not None:
            self.pixel_range = get_pixel_range(cfg)
            if is_train and cfg.MODEL.KEYPOINT_ON and num_keypoints != 0:
                config_keypoints, flip_indices = _get_keypoints(cfg)
                num_keypoints = num_keypoints or config_keypoints
            if use_masks is None:
                use_masks = cfg.MODEL.MASK_ON
            if augmentations is None:
                augmentations = build_augmentation(cfg, is_train, flip_indices)
        self.augmentations = list(augmentations or ())
        self.thread_safe &= not any(isinstance(a, Augmentation) for a in self.augmentations)
        self._flip_indices = flip_indices
        self.is_train = is_train
        self.use_masks = bool(use_masks)
        self.num_keypoints = num_keypoints or 0
        self.records = records
        if any(isinstance(augmentation, SimpleCopyPaste) for augmentation in self.augmentations):
            if not self.use_masks:
                raise UserError("SimpleCopyPaste needs masks; set MODEL.MASK_ON True, or remove it")
            if not records:
                raise UserError("SimpleCopyPaste needs records to paste from: DatasetMapper(records=...)")

    def __call__(self, record: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        rng = np.random.default_rng() if rng is None else rng
        tensors = self._augment(record, self.augmentations, rng)
        sample = {key: record[key] for key in SAMPLE_KEYS}
        sample["image"] = unwrap_image(tensors)
        if self.is_train:
            sample["target"] = _make_target(tensors)
        return sample

    def _augment(self, record, augmentations, rng):
        tensors = self._read(record)
        for i, augmentation in enumerate(augmentations):
            if isinstance(augmentation, Augmentation | Transform):
                tensors = augment_tensors(augmentation, tensors, rng)
                continue
            if not isinstance(augmentation, SimpleCopyPaste):
                tensors = augmentation(tensors, rng)
                continue
            partner = self.records[int(rng.integers(len(self.records)))]
            if partner["file_name"] != record["file_name"]:
                tensors = augmentation(tensors, rng, self._augment(partner, augmentations[:i], rng))
        return tensors

    def _read(self, record):
        image = (self.image_cache or read_image)(record["file_name"], self.pixel_range)
        check_image_size(record, image)
        tensors = {"image": tv_tensors.Image(image)}
        if not self.is_train:
            return tensors
        size = record["height"], record["width"]
        annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        tensors["boxes"] = _make_boxes(annotations, size)
        tensors["labels"] = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        try:
            if self.use_masks:
                tensors["masks"] = _make_masks(annotations, size)
            if self.num_keypoints:
                keypoints = _make_keypoints(annotations, self.num_keypoints)
                tensors["keypoints"] = tv_tensors.KeyPoints(keypoints[..., :2], canvas_size=size)
                tensors["visibility"] = keypoints[..., 2].to(torch.int64)
                tensors["flip_indices"] = self._flip_indices
        except UserError as e:
            raise UserError(f"an annotation of {record['file_name']}: {e}") from e
        return clear_outside_keypoints(tensors)


def _get_keypoints(cfg):
    """Return (number of keypoints, their order after a flip) for a config with MODEL.KEYPOINT_ON."""
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if cfg.DATASETS.TRAIN:
        flip_indices = create_keypoint_hflip_indices(cfg.DATASETS.TRAIN, num_keypoints)
        return len(flip_indices), flip_indices
    if num_keypoints == 0:
        raise UserError("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 0, but DATASETS.TRAIN names no dataset")
    return num_keypoints, None


def _make_boxes(annotations, size):
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    data = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return F.clamp_bounding_boxes(tv_tensors.BoundingBoxes(data, format="XYXY", canvas_size=size))


def _make_masks(annotations, size):
    if not annotations:
        return tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8))
    decoded = coco_mask.decode([encode_segmentation(a.get("segmentation"), *size) for a in annotations])
    return tv_tensors.Mask(torch.from_numpy(decoded).permute(2, 0, 1).contiguous())


def _make_keypoints(annotations, num_keypoints):
    keypoints = [a.get("keypoints") or [0] * (3 * num_keypoints) for a in annotations]
    for values in keypoints:
        if len(values) != 3 * num_keypoints:
            raise UserError(f"keypoints must have 3 x {num_keypoints} numbers, got {len(values)}")
    return torch.tensor(keypoints, dtype=torch.float32).reshape(-1, num_keypoints, 3)


def _make_target(tensors):
    tensors = clear_outside_keypoints({**tensors, "boxes": F.clamp_bounding_boxes(tensors["boxes"])})
    tensors = select_instances(tensors, has_extent(tensors))
    target = {"boxes": tensors["boxes"].as_subclass(torch.Tensor), "labels": tensors["labels"]}
    if "masks" in tensors:
        target["masks"] = tensors["masks"].as_subclass(torch.Tensor).contiguous()
    if "keypoints" in tensors:
        visibility = tensors["visibility"][..., None]
        keypoints = tensors["keypoints"].as_subclass(torch.Tensor) * (visibility > 0)
        target["keypoints"] = torch.cat([keypoints, visibility], dim=2)
    return target
