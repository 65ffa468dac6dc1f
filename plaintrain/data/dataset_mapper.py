"""From a record to a sample: read the image, augment it with its targets."""

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from pycocotools import mask as coco_mask
from torchvision import tv_tensors

from plaintrain.data.images import check_image_size, get_pixel_range, read_image
from plaintrain.data.keypoints import create_keypoint_hflip_indices
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

# What a sample has of its record.
SAMPLE_KEYS = ("image_id", "file_name", "height", "width")


class DatasetMapper:
    """A callable from (record, generator) to the sample that a model takes.

    A sample holds `image` (uint8 `[3, H, W]`, RGB, augmented), `image_id`, `file_name`, the
    original `height` and `width`, and in training `target`, in the augmented image's pixels:
    `boxes` (float32 `[N, 4]`, XYXY), `labels` (int64 `[N]`, 0 to K-1), with masks `masks` (uint8
    `[N, H, W]`, 0 or 1), with keypoints `keypoints` (float32 `[N, Kp, 3]`: x, y, and 0 unlabelled
    or outside, then x and y are 0 too, 1 hidden, 2 seen). Crowds and instances without area are
    left out of `target`.
    """

    # Several threads may call it at a time: it and the augmentations change nothing that they share.
    thread_safe = True
    # An `ImageCache` to read through.
    image_cache = None
    # See `read_image`; that of the config where there is one.
    pixel_range = ()

    def __init__(
        self, cfg=None, is_train=True, *, augmentations=None, use_masks=None, num_keypoints=None, records=None
    ):
        """
        Args:
            cfg: config whose INPUT.* names the augmentations, and whose MODEL.* says whether
                targets have masks and keypoints; not needed if these are given.
            is_train: make targets, and augment as in training.
            augmentations: callables `(tensors, generator) -> tensors`, applied in order, on a dict
                that `plaintrain.data.transforms.tensors` describes.
            use_masks: put masks into targets.
            num_keypoints: keypoints of an instance; 0 leaves them out of targets.
            records: sequence of records from which SimpleCopyPaste takes the images to paste from.
        """
        order = None
        if cfg is not None:
            self.pixel_range = get_pixel_range(cfg)
        if cfg is not None and is_train and cfg.MODEL.KEYPOINT_ON and num_keypoints != 0:
            number, order = _keypoints_of(cfg)
            num_keypoints = num_keypoints or number
        if cfg is not None and use_masks is None:
            use_masks = cfg.MODEL.MASK_ON
        if augmentations is None:
            augmentations = build_augmentation(cfg, is_train, order)
        self.augmentations, self.is_train = list(augmentations), is_train
        self.use_masks, self.num_keypoints, self.records = bool(use_masks), num_keypoints or 0, records
        if any(isinstance(step, SimpleCopyPaste) for step in self.augmentations):
            if not self.use_masks:
                raise UserError("SimpleCopyPaste needs masks: set MODEL.MASK_ON, or leave it out")
            if not records:
                raise UserError("SimpleCopyPaste needs the records to paste from: DatasetMapper(records=...)")

    def __call__(self, record, rng=None):
        """Make the sample; `rng` is the `numpy.random.Generator` that augmentation draws from."""
        rng = np.random.default_rng() if rng is None else rng
        tensors = self._augmented(record, self.augmentations, rng)
        sample = {key: record[key] for key in SAMPLE_KEYS}
        sample["image"] = unwrap_image(tensors)
        if self.is_train:
            sample["target"] = _target(tensors)
        return sample

    def _augmented(self, record, steps, rng):
        tensors = self._read(record)
        for i, step in enumerate(steps):
            if not isinstance(step, SimpleCopyPaste):
                tensors = step(tensors, rng)
                continue
            partner = self.records[int(rng.integers(len(self.records)))]
            if partner["file_name"] != record["file_name"]:
                tensors = step(tensors, rng, self._augmented(partner, steps[:i], rng))
        return tensors

    def _read(self, record):
        image = (self.image_cache or read_image)(record["file_name"], self.pixel_range)
        check_image_size(record, image)
        tensors = {"image": tv_tensors.Image(image)}
        if not self.is_train:
            return tensors
        size = record["height"], record["width"]
        annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        tensors["boxes"] = _boxes(annotations, size)
        tensors["labels"] = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        try:
            if self.use_masks:
                tensors["masks"] = _masks(annotations, size)
            if self.num_keypoints:
                points = _keypoints(annotations, self.num_keypoints)
                tensors["keypoints"] = tv_tensors.KeyPoints(points[..., :2], canvas_size=size)
                tensors["visibility"] = points[..., 2].to(torch.int64)
        except UserError as e:
            raise UserError(f"an annotation of {record['file_name']}: {e}") from e
        return clear_outside_keypoints(tensors)


def _keypoints_of(cfg):
    """(number of keypoints, their order after a flip) for a config with MODEL.KEYPOINT_ON."""
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if not cfg.DATASETS.TRAIN:
        if number == 0:
            raise UserError("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 0, but DATASETS.TRAIN names no dataset")
        return number, None
    order = create_keypoint_hflip_indices(cfg.DATASETS.TRAIN, number)
    return len(order), order


def _boxes(annotations, size):
    rows = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    data = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    boxes = tv_tensors.BoundingBoxes(data, format="XYXY", canvas_size=size)
    return F.clamp_bounding_boxes(boxes)


def _masks(annotations, size):
    if not annotations:
        return tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8))
    decoded = coco_mask.decode([encode_segmentation(a.get("segmentation"), *size) for a in annotations])
    return tv_tensors.Mask(torch.from_numpy(decoded).permute(2, 0, 1).contiguous())


def _keypoints(annotations, number):
    rows = [a.get("keypoints") or [0] * (3 * number) for a in annotations]
    for row in rows:
        if len(row) != 3 * number:
            raise UserError(f"it has {len(row)} numbers of keypoints, but {number} keypoints have 3 each")
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, number, 3)


def _target(tensors):
    tensors = clear_outside_keypoints({**tensors, "boxes": F.clamp_bounding_boxes(tensors["boxes"])})
    tensors = select_instances(tensors, has_extent(tensors))
    target = {"boxes": tensors["boxes"].as_subclass(torch.Tensor), "labels": tensors["labels"]}
    if "masks" in tensors:
        target["masks"] = tensors["masks"].as_subclass(torch.Tensor).contiguous()
    if "keypoints" in tensors:
        visibility = tensors["visibility"][..., None]
        points = tensors["keypoints"].as_subclass(torch.Tensor) * (visibility > 0)
        target["keypoints"] = torch.cat([points, visibility], dim=2)
    return target
