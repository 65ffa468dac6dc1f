"""The records of a training set: joined, checked, cleaned and counted."""

import logging
import numbers
import os
from collections import Counter

from plaintrain.data.catalog import DatasetCatalog, common_class_names
from plaintrain.data.shapes import SCHEME
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_RECORD_KEYS = ("file_name", "image_id", "height", "width", "annotations")


def get_detection_dataset_dicts(names, filter_empty=True):
    """The records of one or several datasets for training, checked.

    Boxes without area or outside their image are dropped, and counted in the log. Of several
    datasets the class lists must be equal.

    Args:
        names: a dataset name or several.
        filter_empty: leave out images that have no annotation but crowds.

    Returns:
        list of records.

    Raises:
        UserError: an unknown or empty dataset, differing classes, a class id out of range.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("DATASETS.TRAIN is empty: name at least one dataset")
    classes = common_class_names(names)
    counts, histogram, records = Counter(), Counter(), []
    for name in names:
        for record in DatasetCatalog.get(name):
            for key in _RECORD_KEYS:
                if key not in record:
                    raise UserError(f"a record of the dataset {name} has no {key}: {str(record)[:200]}")
            record["annotations"] = _clean(record, len(classes), counts)
            histogram.update(a["category_id"] for a in record["annotations"])
            counts["images"] += 1
            if filter_empty and all(a.get("iscrowd", 0) for a in record["annotations"]):
                counts["empty"] += 1
            else:
                records.append(record)
    _report(", ".join(names), classes, counts, histogram)
    if not records:
        raise UserError(f"no image with annotations is left in {', '.join(names)}")
    return records


def _clean(record, num_classes, counts):
    """The annotations of a record whose boxes have an area inside the image."""
    kept = []
    width, height = record["width"], record["height"]
    for annotation in record["annotations"]:
        for key in ("bbox", "bbox_mode", "category_id"):
            if key not in annotation:
                raise UserError(f"an annotation of {record['file_name']} has no {key}")
        label = annotation["category_id"]
        whole = isinstance(label, numbers.Integral) and not isinstance(label, bool)
        if not (whole and 0 <= label < num_classes):
            raise UserError(
                f"an annotation of {record['file_name']} has category_id {label!r}, but the "
                f"dataset's {num_classes} classes have the ids 0 to {num_classes - 1}"
            )
        try:
            corners = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        except UserError as e:
            raise UserError(f"an annotation of {record['file_name']}: {e}") from e
        x0, y0, x1, y1 = corners
        if x1 <= x0 or y1 <= y0:
            counts["degenerate"] += 1
        elif x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            counts["outside"] += 1
        else:
            # Half a pixel over the edge is rounding, not a mistake.
            over = max(-x0, -y0, x1 - width, y1 - height) > 0.5
            counts["clipped"] += over
            counts["crowd"] += annotation.get("iscrowd", 0)
            kept.append(annotation)
    return kept


def _report(names, classes, counts, histogram):
    total = sum(histogram.values())
    width = max(map(len, classes))
    rows = [f"  {name:<{width}}  {histogram[i]:>8}" for i, name in enumerate(classes)]
    logger.info(
        f"{names}: {counts['images']} images, {total} boxes ({counts['crowd']} crowds) of "
        f"{len(classes)} classes\n" + "\n".join(rows)
    )
    texts = {
        "degenerate": "boxes without area are dropped",
        "outside": "boxes outside their image are dropped",
        "clipped": "boxes reach beyond their image and are clipped",
    }
    for key, text in texts.items():
        if counts[key]:
            logger.warning(f"{names}: {counts[key]} {text}")
    if counts["empty"]:
        logger.info(f"{names}: {counts['empty']} images without annotations are left out")


def check_image_files(records, what):
    """Refuse records whose image files are missing, by listing each folder once.

    Raises:
        UserError: names the first missing file and how many there are.
    """
    folders, missing = {}, []
    for record in records:
        path = record["file_name"]
        if path.startswith(SCHEME):
            continue
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in folders[folder]:
            missing.append(path)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"an image of {what} does not exist: {missing[0]}{more}")
