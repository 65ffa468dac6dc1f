"""Writer of COCO JSON, and conversions of annotations."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from plaintrain.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from plaintrain.data.keypoints import shift_keypoints
from plaintrain.structures import BoxMode, encode_segmentation, find_segmentation_problem
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write


def make_folder(path: str) -> None:
    """Create a folder for a dataset; raise a `UserError` if it exists and is not empty."""
    try:
        os.makedirs(path, exist_ok=True)
        if os.listdir(path):
            raise UserError(f"the folder {path} is not empty; its files would be overwritten")
    except OSError as e:
        raise UserError(f"cannot create the folder {path}: {e.strerror}") from e


def get_relative_names(paths: Iterable[str], *folders: str) -> tuple[str, list[str]]:
    """Return a common parent folder of all files and `folders`, and the files' paths relative to it."""
    paths = [os.path.abspath(path) for path in paths]
    all_folders = [*map(os.path.dirname, paths), *map(os.path.abspath, folders)]
    folder = os.path.commonpath(all_folders or [os.getcwd()])
    return folder, [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


def get_category_ids(metadata: Metadata | Mapping[str, Any]) -> list[int]:
    """Return the dataset's own category id of each label, or label + 1 if it has none."""
    mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    ids = {label: dataset_id for dataset_id, label in mapping.items()}
    return [ids.get(label, label + 1) for label in range(len(metadata.get("thing_classes", ())))]


def write_coco(
    json_file: str, records: Sequence[dict[str, Any]], metadata: Mapping[str, Any], file_names: Iterable[str]
) -> None:
    """Write records as COCO JSON with these file names; `load_coco_json` reads it."""
    content = build_coco_content(records, metadata, file_names)
    with atomic_write(json_file) as f:
        json.dump(content, f)


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """Return the content of a COCO annotation file for a registered dataset."""
    records = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name).as_dict()
    return build_coco_content(records, metadata, [record["file_name"] for record in records])


def build_coco_content(
    records: Sequence[dict[str, Any]], metadata: Mapping[str, Any], file_names: Iterable[str]
) -> dict[str, Any]:
    """Return the images, annotations and categories of COCO JSON."""
    ids = get_category_ids(metadata)
    images = []
    annotations: list[dict[str, Any]] = []
    for record, file_name in zip(records, file_names, strict=True):
        size = {"height": record["height"], "width": record["width"]}
        images.append({"id": record["image_id"], "file_name": file_name, **size})
        for annotation in record["annotations"]:
            try:
                if annotation.get("segmentation") and annotation.get("area") is None:
                    encode_segmentation(annotation["segmentation"], record["height"], record["width"])
                converted = convert_to_coco(annotation, record, ids)
            except UserError as e:
                raise UserError(f"an annotation of {record['file_name']}: {e}") from e
            annotations.append({"id": len(annotations) + 1, "image_id": record["image_id"], **converted})
    categories = [{"id": i, "name": name} for i, name in zip(ids, metadata["thing_classes"], strict=True)]
    if metadata.get("keypoint_names"):
        keys = {"keypoints": list(metadata["keypoint_names"]), "skeleton": metadata.get("skeleton") or []}
        with_keypoints = {a["category_id"] for a in annotations if "keypoints" in a}
        for category in categories:
            if not with_keypoints or category["id"] in with_keypoints:
                category.update(keys)
    return {"images": images, "annotations": annotations, "categories": categories}


def get_area(annotation: dict[str, Any], record: dict[str, Any]) -> float:
    """Return the area of an object in pixels: its `area`, or that of its valid segmentation or its box."""
    if annotation.get("area") is not None:
        return float(annotation["area"])
    size = record["height"], record["width"]
    if not find_segmentation_problem(annotation.get("segmentation"), *size):
        return float(coco_mask.area(encode_segmentation(annotation["segmentation"], *size)))
    _, _, width, height = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return width * height


def convert_to_coco(
    annotation: dict[str, Any], record: dict[str, Any], category_ids: Sequence[int]
) -> dict[str, Any]:
    """Convert an annotation to COCO's format, without `id` and `image_id`; keep `difficult` and `score`."""
    converted = {
        "category_id": category_ids[annotation["category_id"]],
        "bbox": BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS),
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "area": get_area(annotation, record),
    }
    converted |= {key: annotation[key] for key in ("difficult", "score") if key in annotation}
    segmentation = annotation.get("segmentation")
    if segmentation:
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
            segmentation = {**segmentation, "counts": segmentation["counts"].decode("ascii")}
        converted["segmentation"] = segmentation
    if annotation.get("keypoints"):
        converted["keypoints"] = shift_keypoints(annotation["keypoints"], -0.5)
        converted["num_keypoints"] = sum(v > 0 for v in converted["keypoints"][2::3])
    return converted


def is_scaled(record: dict[str, Any], old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Return whether the size `new` is `old` times one factor for both sides."""
    for annotation in record["annotations"]:
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict) and segmentation.get("size") in (list(new), new):
            # The annotations were made on the resized image.
            return False
    # Rounding changes each side by up to a pixel.
    tolerance = sum(1 / min(sides) for sides in zip(old, new, strict=True))
    return abs(new[0] * old[1] / (old[0] * new[1]) - 1) < tolerance


def scale_annotation(
    annotation: dict[str, Any], old: tuple[int, int], new: tuple[int, int]
) -> dict[str, Any]:
    """Scale a valid annotation from the image size `old`, (height, width), to `new`."""
    x = new[1] / old[1]
    y = new[0] / old[0]

    def scale_mask(mask):
        return np.asarray(Image.fromarray(mask).resize(new[::-1], Image.Resampling.NEAREST))

    annotation = _transform(annotation, old, lambda points: points * (x, y), scale_mask)
    if annotation.get("area") is not None:
        annotation["area"] *= x * y
    return annotation


def rotate_annotation(annotation: dict[str, Any], size: tuple[int, int], orientation: int) -> dict[str, Any]:
    """Rotate a valid annotation of stored pixels, of (height, width) `size`, as the EXIF orientation says."""
    flip_x = orientation in (2, 3, 7, 8)
    flip_y = orientation in (3, 4, 6, 7)
    is_transposed = orientation >= 5
    corner = np.array([size[1] * flip_x, size[0] * flip_y])
    signs = np.array([1 - 2 * flip_x, 1 - 2 * flip_y])

    def rotate_points(points):
        points = corner + signs * points
        return points[:, ::-1] if is_transposed else points

    def rotate_mask(mask):
        mask = mask[:: signs[1], :: signs[0]]
        return mask.T if is_transposed else mask

    return _transform(annotation, size, rotate_points, rotate_mask)


def _transform(annotation, size, transform_points, transform_mask):
    """Transform box, keypoints and segmentation by functions of points `[N, 2]` and of a mask."""

    def transform(values):
        return transform_points(np.reshape(values, (-1, 2)).astype(float))

    corners = transform(BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS))
    box = [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]
    annotation = {**annotation, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
    if annotation.get("keypoints"):
        keypoints = np.reshape(annotation["keypoints"], (-1, 3)).astype(float)
        is_labelled = keypoints[:, 2] > 0
        keypoints[is_labelled, :2] = transform(keypoints[is_labelled, :2])
        annotation["keypoints"] = [v for x, y, v in keypoints.tolist() for v in (x, y, int(v))]
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        mask = transform_mask(coco_mask.decode(encode_segmentation(segmentation, *size)))
        annotation["segmentation"] = coco_mask.encode(np.asfortranarray(mask))
    elif segmentation:
        annotation["segmentation"] = [transform(polygon).ravel().tolist() for polygon in segmentation]
    return annotation
