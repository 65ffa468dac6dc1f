"""Records as the ground truth that COCO's metrics are computed on."""

import numbers

import numpy as np
from pycocotools import mask as coco_mask

from plaintrain.data.datasets.coco import shift_keypoints
from plaintrain.structures import BoxMode, segmentation_to_rle
from plaintrain.utils.errors import UserError

_NEEDED = {"segm": "segmentation", "keypoints": "keypoints"}


def annotated(records, task):
    """True if some annotation can be scored in a task, or none is there at all."""
    if task not in _NEEDED:
        return True
    found = (bool(a.get(_NEEDED[task])) for record in records for a in record["annotations"])
    # The first one decides if it can be scored; without any the default is taken.
    return next(found, True) or any(found)


def num_keypoints(records):
    """How many keypoints the first annotation with any has; 0 if none has."""
    annotations = (a for record in records for a in record["annotations"])
    return next((len(a["keypoints"]) // 3 for a in annotations if a.get("keypoints")), 0)


def ranks(ids):
    """Numbers from 1, `[N]`, in the order in which pycocotools goes through ids.

    Integers are ordered by value, names by their place.
    """
    if not all(isinstance(i, numbers.Integral) for i in ids):
        return np.arange(1, len(ids) + 1)
    return np.argsort(np.argsort(ids)) + 1


def box_xywh(annotation):
    """An annotation's box as [x, y, width, height]."""
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)


def _rle(annotation, record):
    try:
        return segmentation_to_rle(annotation["segmentation"], record["height"], record["width"])
    except UserError as e:
        raise UserError(f"an annotation of image {record['image_id']} cannot be scored: {e}") from e


def area(annotation, record):
    """Pixels of an object: its `area`, or else that of its segmentation, or else of its box."""
    if annotation.get("area") is not None:
        return float(annotation["area"])
    if annotation.get("segmentation"):
        return float(coco_mask.area(_rle(annotation, record)))
    x, y, width, height = box_xywh(annotation)
    return width * height


def coco_truth(task, records, image_numbers, category_numbers):
    """Records as COCO JSON has them.

    Args:
        task: "bbox", "segm" or "keypoints"; the others' parts are left out.
        records: list of records.
        image_numbers: id to give to each image.
        category_numbers: id to give to each label.

    Returns:
        dict of images, categories and annotations.

    Raises:
        UserError: names the image with a segmentation that cannot be read.
    """
    images, annotations = [], []
    blank = [0] * 3 * (num_keypoints(records) if task == "keypoints" else 0)
    for number, record in zip(image_numbers, records, strict=True):
        images.append({"id": number, "height": record["height"], "width": record["width"]})
        for a in record["annotations"]:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": category_numbers[a["category_id"]],
                "bbox": box_xywh(a),
                "area": area(a, record),
                "iscrowd": int(a.get("iscrowd", 0)),
            }
            if task == "segm":
                annotation |= _mask(a, annotation["bbox"], record)
            elif task == "keypoints":
                # COCO's numbers are those of pixels, whose centres are at half.
                keypoints = shift_keypoints(a.get("keypoints") or blank, -0.5)
                visible = sum(v > 0 for v in keypoints[2::3])
                annotation |= {"keypoints": keypoints, "num_keypoints": visible}
            annotations.append(annotation)
    categories = [{"id": number, "name": str(number)} for number in category_numbers]
    return {"images": images, "categories": categories, "annotations": annotations}


def _mask(annotation, box, record):
    if annotation.get("segmentation"):
        return {"segmentation": _rle(annotation, record)}
    # Nobody knows its outline: what is found in its box is neither right nor wrong.
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    rle = segmentation_to_rle([corners], record["height"], record["width"])
    return {"segmentation": rle, "iscrowd": 1}
