"""Records as the ground truth that COCO's metrics are computed on."""

import numbers

import numpy as np

from plaintrain.data.datasets.write import convert_to_coco
from plaintrain.structures import encode_segmentation
from plaintrain.utils.errors import UserError

_NEEDED = {"segm": "segmentation", "keypoints": "keypoints"}


def has_annotations(records, task):
    """True if some annotation can be scored in a task, or none is there at all."""
    if task not in _NEEDED:
        return True
    found = (bool(a.get(_NEEDED[task])) for record in records for a in record["annotations"])
    # The first one decides if it can be scored; without any the default is taken.
    return next(found, True) or any(found)


def get_num_keypoints(records):
    """How many keypoints the first annotation with any has; 0 if none has."""
    annotations = (a for record in records for a in record["annotations"])
    return next((len(a["keypoints"]) // 3 for a in annotations if a.get("keypoints")), 0)


def rank_ids(ids):
    """Numbers from 1, `[N]`, in the order in which pycocotools goes through ids.

    Integers are ordered by value, names by their place.
    """
    if not all(isinstance(i, numbers.Integral) for i in ids):
        return np.arange(1, len(ids) + 1)
    return np.argsort(np.argsort(ids)) + 1


def build_coco_gt(task, records, image_numbers, category_numbers):
    """Return records as COCO JSON has them, a dict of images, categories and annotations.

    What only tasks other than `task` need is left out; `image_numbers` and `category_numbers` are the ids to
    give to each image and each label.
    """
    images, annotations = [], []
    blank = (
        {"keypoints": [0] * 3 * get_num_keypoints(records), "num_keypoints": 0} if task == "keypoints" else {}
    )
    for number, record in zip(image_numbers, records, strict=True):
        images.append({"id": number, "height": record["height"], "width": record["width"]})
        for a in record["annotations"]:
            try:
                annotation = {**blank, **convert_to_coco(a, record, category_numbers)}
                outline = _outline(annotation, record) if task == "segm" else {"segmentation": None}
            except UserError as e:
                raise UserError(f"an annotation of image {record['image_id']} cannot be scored: {e}") from e
            annotations.append({**annotation, **outline, "id": len(annotations) + 1, "image_id": number})
    categories = [{"id": number, "name": str(number)} for number in category_numbers]
    return {"images": images, "categories": categories, "annotations": annotations}


def _outline(annotation, record):
    size = record["height"], record["width"]
    if annotation.get("segmentation"):
        return {"segmentation": encode_segmentation(annotation["segmentation"], *size)}
    # Nobody knows its outline: what is found in its box is neither right nor wrong.
    x, y, width, height = annotation["bbox"]
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"segmentation": encode_segmentation([corners], *size), "iscrowd": 1}
