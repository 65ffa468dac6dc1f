"""The records of a training set: joined, checked, cleaned and counted."""

import logging
import numbers
import os
from collections import Counter

import numpy as np

from plaintrain.data.catalog import DatasetCatalog, common_class_names
from plaintrain.data.serialized import RECORD_KEYS, SerializedRecords
from plaintrain.data.shapes import SCHEME
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)


def get_detection_dataset_dicts(names, filter_empty=True, min_keypoints=0, need_masks=False):
    """The records of one or several datasets for training, checked.

    Boxes without area or outside their image are dropped, and counted in the log. Of several
    datasets the class lists must be equal.

    Args:
        names: a dataset name or several.
        filter_empty: leave out images that have no annotation but crowds.
        min_keypoints: leave out images with fewer labelled keypoints than this, crowds not counted.
        need_masks: refuse an annotation without segmentation, unless it is a crowd.

    Returns:
        `SerializedRecords`, a sequence of fresh dicts; its `lengths` are those of the datasets.

    Raises:
        UserError: an unknown or empty dataset, differing classes, a class id out of range.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("DATASETS.TRAIN is empty: name at least one dataset")
    classes = common_class_names(names)
    counts, histogram, parts = Counter(), np.zeros(len(classes), dtype=np.int64), []
    for name in names:
        records = DatasetCatalog.get(name)
        table = records.annotations
        known = table and ((table.labels >= 0) & (table.labels < len(classes))).all()
        if records.columns is None or not known:
            _raise_first_mistake(name, records, len(classes))
        kept = _usable(records, counts)
        histogram += np.bincount(table.labels[kept], minlength=len(classes))
        objects = kept & ~table.crowd
        if need_masks and not table.segmented[objects].all():
            first = records[table.record[objects & ~table.segmented][0]]
            raise UserError(
                f"MODEL.MASK_ON needs a segmentation of every object, but one of {first['file_name']} "
                "has none"
            )
        chosen = _chosen(records, objects, counts, filter_empty, min_keypoints)
        parts.append(_without(records, kept).take(chosen))
    _report(", ".join(names), classes, counts, histogram)
    if not any(map(len, parts)):
        raise UserError(f"no image with annotations is left in {', '.join(names)}")
    return SerializedRecords.join(parts)


def _raise_first_mistake(name, records, num_classes):
    for record in records:
        for key in RECORD_KEYS:
            if key not in record:
                raise UserError(f"a record of the dataset {name} has no {key}: {str(record)[:200]}")
        for annotation in record["annotations"]:
            _check_annotation(annotation, record["file_name"], num_classes)
    raise UserError(f"the records of the dataset {name} are not as a record must be")


def _check_annotation(annotation, file_name, num_classes):
    for key in ("bbox", "bbox_mode", "category_id"):
        if key not in annotation:
            raise UserError(f"an annotation of {file_name} has no {key}")
    label = annotation["category_id"]
    whole = isinstance(label, numbers.Integral) and not isinstance(label, bool)
    if not (whole and 0 <= label < num_classes):
        raise UserError(
            f"an annotation of {file_name} has category_id {label!r}, but the "
            f"dataset's {num_classes} classes have the ids 0 to {num_classes - 1}"
        )
    try:
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    except UserError as e:
        raise UserError(f"an annotation of {file_name}: {e}") from e


def _usable(records, counts):
    """Which annotations have a box with an area inside the image, bool [A]."""
    table = records.annotations
    x0, y0, x1, y1 = table.boxes.T
    width, height = (records.columns[key][table.record] for key in ("width", "height"))
    degenerate = (x1 <= x0) | (y1 <= y0)
    outside = ~degenerate & ((x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0))
    kept = ~(degenerate | outside)
    # Half a pixel over the edge is rounding, not a mistake.
    over = kept & (np.maximum.reduce([-x0, -y0, x1 - width, y1 - height]) > 0.5)
    masks = {"degenerate": degenerate, "outside": outside, "clipped": over, "crowd": kept & table.crowd}
    counts.update({key: int(mask.sum()) for key, mask in masks.items()})
    return kept


def _chosen(records, objects, counts, filter_empty, min_keypoints):
    """The indices of the records to train on."""
    table = records.annotations
    empty = np.bincount(table.record[objects], minlength=len(records)) == 0
    labelled = np.bincount(table.record, table.keypoints * objects, minlength=len(records))
    empty &= filter_empty
    poor = (labelled < min_keypoints) & ~empty
    counts.update(images=len(records), empty=int(empty.sum()), poor=int(poor.sum()))
    return np.flatnonzero(~(empty | poor))


def _without(records, kept):
    """The records with only the annotations that are kept; most records need not be touched."""
    record_of = records.annotations.record
    changed, order, cleaned = np.unique(record_of[~kept]), np.arange(len(records)), []
    for index, start in zip(changed, np.searchsorted(record_of, changed), strict=True):
        record = records[index]
        record["annotations"] = [a for i, a in enumerate(record["annotations"], start) if kept[i]]
        order[index] = len(records) + len(cleaned)
        cleaned.append(record)
    return SerializedRecords.join([records, SerializedRecords(cleaned)]).take(order)


def _report(names, classes, counts, histogram):
    width = max(map(len, classes))
    rows = [f"  {name:<{width}}  {histogram[i]:>8}" for i, name in enumerate(classes)]
    logger.info(
        f"{names}: {counts['images']} images, {histogram.sum()} boxes ({counts['crowd']} crowds) of "
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
    texts = {
        "empty": "images without annotations are left out",
        "poor": "images with too few labelled keypoints are left out",
    }
    for key, text in texts.items():
        if counts[key]:
            logger.info(f"{names}: {counts[key]} {text}")


def check_image_files(records, what):
    """Refuse records whose image files are missing, by listing each folder once.

    `SerializedRecords` that were found complete are not checked again in this process.

    Raises:
        UserError: names the first missing file and how many there are.
    """
    if getattr(records, "files_exist", False):
        return
    columns = getattr(records, "columns", None)
    paths = columns["file_name"] if columns else [record["file_name"] for record in records]
    folders, missing = {}, []
    for path in paths:
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
    if columns:
        records.files_exist = True
