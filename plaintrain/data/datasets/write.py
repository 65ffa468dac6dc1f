"""Records -> COCO JSON."""

import json
import os
from pathlib import Path

from pycocotools import mask as coco_mask

from plaintrain.data.datasets.coco import shift_keypoints
from plaintrain.structures import BoxMode, encode_segmentation
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write


def make_folder(path):
    """Make a folder to write a dataset into."""
    try:
        os.makedirs(path, exist_ok=True)
        if os.listdir(path):
            raise UserError(f"the folder {path} is not empty, and nothing in it is to be overwritten")
    except OSError as e:
        raise UserError(f"cannot make the folder {path}: {e.strerror}") from e


def get_relative_names(paths, *folders):
    """(folder, names): a folder that holds these files and folders, and the files' paths from there on."""
    paths = [os.path.abspath(path) for path in paths]
    places = [*map(os.path.dirname, paths), *map(os.path.abspath, folders)]
    folder = os.path.commonpath(places or [os.getcwd()])
    return folder, [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


def get_category_ids(metadata):
    """The dataset's own category id of each label: as its files have it, otherwise 1, 2, ..."""
    mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    ids = {label: dataset_id for dataset_id, label in mapping.items()}
    return [ids.get(label, label + 1) for label in range(len(metadata.get("thing_classes")))]


def write_coco(json_file, records, metadata, file_names):
    """Write records as a COCO JSON, from which `load_coco_json` reads them again.

    Ids of images and categories stay as they are, `difficult` is kept beside COCO's own keys, and where
    there is no area, it is the mask's or the box'. `file_names` holds what to write for each record.
    """
    ids = get_category_ids(metadata)
    images, annotations = [], []
    for record, file_name in zip(records, file_names, strict=True):
        size = {"height": record["height"], "width": record["width"]}
        images.append({"id": record["image_id"], "file_name": file_name, **size})
        for annotation in record["annotations"]:
            try:
                written = convert_to_coco(annotation, record, ids)
            except UserError as e:
                raise UserError(f"an annotation of {record['file_name']}: {e}") from e
            annotations.append({"id": len(annotations) + 1, "image_id": record["image_id"], **written})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": _categories(metadata, ids, records),
    }
    with atomic_write(json_file) as f:
        json.dump(content, f)


def _categories(metadata, ids, records):
    names = metadata["thing_classes"]
    categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    if metadata.get("keypoint_names"):
        keys = {"keypoints": list(metadata["keypoint_names"]), "skeleton": metadata.get("skeleton") or []}
        with_keypoints = {a["category_id"] for r in records for a in r["annotations"] if a.get("keypoints")}
        for label in with_keypoints or range(len(names)):
            categories[label] |= keys
    return categories


def get_area(annotation, record):
    """Return the pixels of an object: its `area`, or else that of its segmentation, or else of its box."""
    if annotation.get("area") is not None:
        return float(annotation["area"])
    if annotation.get("segmentation"):
        rle = encode_segmentation(annotation["segmentation"], record["height"], record["width"])
        return float(coco_mask.area(rle))
    _, _, width, height = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return width * height


def convert_to_coco(annotation, record, ids):
    """Return an annotation of a record as COCO has it, without its ids; `ids` are those of the labels."""
    written = {
        "category_id": ids[annotation["category_id"]],
        "bbox": BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS),
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "area": get_area(annotation, record),
    }
    written |= {key: annotation[key] for key in ("difficult", "score") if key in annotation}
    segmentation = annotation.get("segmentation")
    if segmentation:
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
            segmentation = {**segmentation, "counts": segmentation["counts"].decode("ascii")}
        written["segmentation"] = segmentation
    if annotation.get("keypoints"):
        # COCO's numbers are those of pixels, whose centres are at half.
        written["keypoints"] = shift_keypoints(annotation["keypoints"], -0.5)
        written["num_keypoints"] = sum(v > 0 for v in written["keypoints"][2::3])
    return written
