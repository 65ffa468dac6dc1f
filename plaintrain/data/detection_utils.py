"""Detectron2's functions for a mapper: read an image, transform annotations and make a target of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from pycocotools import mask as coco_mask

from plaintrain.data import images
from plaintrain.data.keypoints import create_keypoint_hflip_indices  # noqa: F401
from plaintrain.data.transforms.augmentation import TransformList
from plaintrain.data.transforms.build import build_augmentation  # noqa: F401
from plaintrain.data.transforms.tensors import has_extent, select_instances
from plaintrain.structures import BoxMode, encode_segmentation
from plaintrain.utils.errors import UserError


def _read_image(file_name: str, format: str | None = None) -> np.ndarray:  # noqa: A002 - Detectron2's
    """Read an image, uint8 `[H, W, 3]`; samples have RGB images for any INPUT.FORMAT."""
    if format not in (None, "RGB", "BGR"):
        raise UserError(f"the format of read_image must be RGB or BGR, got {format!r}")
    image = images.read_image(file_name).permute(1, 2, 0).numpy()
    return image[:, :, ::-1] if format == "BGR" else image


def _check_image_size(record: dict[str, Any], image: np.ndarray) -> None:
    """Set a missing `height` or `width`, and reject an image of another size."""
    record.setdefault("height", image.shape[0])
    record.setdefault("width", image.shape[1])
    images.check_image_size(record, torch.from_numpy(image.transpose(2, 0, 1).copy()))


def transform_instance_annotations(
    annotation: dict[str, Any],
    transforms: Any,
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Transform an annotation in place, to XYXY; `image_size` is (height, width) after the transforms."""
    transforms = TransformList(transforms) if isinstance(transforms, list | tuple) else transforms
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    limit = np.array([*image_size[::-1]] * 2)
    annotation["bbox"] = transforms.apply_box(np.array([box]))[0].clip(0, limit)
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        mask = coco_mask.decode(encode_segmentation(segmentation, *segmentation["size"]))
        annotation["segmentation"] = transforms.apply_segmentation(mask)
    elif segmentation:
        polygons = [np.asarray(polygon, dtype=float).reshape(-1, 2) for polygon in segmentation]
        annotation["segmentation"] = [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
    if annotation.get("keypoints") is not None:
        points = np.array(annotation["keypoints"], dtype=float).reshape(-1, 3)
        points[:, :2] = transforms.apply_coords(points[:, :2])
        inside = (points[:, :2] >= 0) & (points[:, :2] <= limit[:2])
        points *= inside.all(axis=1, keepdims=True) & (points[:, 2:] > 0)
        if transforms.flips_horizontally():
            if keypoint_hflip_indices is None:
                raise UserError("a horizontal flip of keypoints requires keypoint_hflip_indices")
            points = points[list(keypoint_hflip_indices)]
        annotation["keypoints"] = points
    return annotation


def annotations_to_target(
    annos: Sequence[Mapping[str, Any]], image_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Return annotations as boxes, labels, and masks or keypoints if any annotation has them.

    Call `filter_empty_instances` for a target to train on.
    """
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([a["category_id"] for a in annos], dtype=torch.int64),
    }
    if any(len(a.get("segmentation") or ()) for a in annos):
        masks = [_decode_mask(a.get("segmentation"), image_size) for a in annos]
        target["masks"] = torch.from_numpy(np.stack(masks))
    length = max((np.size(a["keypoints"]) for a in annos if a.get("keypoints") is not None), default=0)
    if length:
        points = [a["keypoints"] if a.get("keypoints") is not None else np.zeros(length) for a in annos]
        target["keypoints"] = torch.tensor(np.array(points), dtype=torch.float32).reshape(len(points), -1, 3)
    return target


def _decode_mask(segmentation, image_size):
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(np.uint8)
    if not segmentation:
        return np.zeros(image_size, dtype=np.uint8)
    if isinstance(segmentation, list | tuple):
        limit = 10 * sum(image_size)
        segmentation = [np.clip(polygon, -limit, limit).tolist() for polygon in segmentation]
    return coco_mask.decode(encode_segmentation(segmentation, *image_size))


def filter_empty_instances(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the instances of a target with an empty box or mask."""
    return select_instances(target, has_extent(target))


def annotations_to_instances(*args: Any, **options: Any) -> NoReturn:
    """Reject Detectron2's `Instances`."""
    hint = 'return {"image": ..., "target": annotations_to_target(annotations, image_size)}'
    raise UserError(f"plaintrain has no Instances; {hint}, with boxes, labels, masks and keypoints")


check_image_size = _check_image_size
read_image = _read_image
