"""The records of a training set: joined, checked, cleaned and counted."""

import functools
import logging
import os
from collections import Counter

import numpy as np

from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, get_common_class_names
from plaintrain.data.datasets.shapes import is_drawn
from plaintrain.data.serialized import SerializedRecords
from plaintrain.data.validation import (
    KINDS,
    check_annotation,
    classify_boxes,
    find_image_problem,
    find_keypoint_problem,
)
from plaintrain.structures import find_segmentation_problem
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)


def get_detection_dataset_dicts(names, filter_empty=True, min_keypoints=0, need_masks=False):
    """The records of one or several datasets for training, checked as `checks` does.

    Boxes without area or outside their image are dropped, and counted in the log. Of several
    datasets the class lists must be equal.

    Args:
        names: a dataset name or several.
        filter_empty: leave out images that have no annotation but crowds.
        min_keypoints: leave out images with fewer labelled keypoints than this, crowds not counted;
            above 0, refuse malformed keypoints.
        need_masks: refuse an annotation without a usable segmentation, unless it is a crowd.

    Returns:
        `SerializedRecords`, a sequence of fresh dicts; its `lengths` are those of the datasets.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("DATASETS.TRAIN is empty: name at least one dataset")
    classes = get_common_class_names(names)
    counts, histogram, parts = Counter(), np.zeros(len(classes), dtype=np.int64), []
    for name in names:
        records = DatasetCatalog.get(name)
        table = records.annotations
        known = table and ((table.labels >= 0) & (table.labels < len(classes))).all()
        if records.columns is None or not known:
            _raise_first_mistake(name, records, len(classes))
        kept = _usable(records, counts)
        histogram += np.bincount(table.labels[kept], minlength=len(classes))
        chosen = _chosen(records, kept & ~table.crowd, counts, filter_empty, min_keypoints)
        parts.append(_select(records, kept, chosen))
        if need_masks or min_keypoints:
            num_keypoints = len(MetadataCatalog.get(name).get("keypoint_names") or ())
            _check_targets(parts[-1], need_masks, min_keypoints and num_keypoints)
    _report(", ".join(names), classes, counts, histogram)
    if not any(map(len, parts)):
        raise UserError(
            f"no image with annotations is left in {', '.join(names)}: of {counts['images']} images "
            f"{counts['empty']} have none, and {counts['poor']} have too few labelled keypoints"
        )
    return SerializedRecords.join(parts)


def _raise_first_mistake(name, records, num_classes):
    for record in records:
        mistake = find_image_problem(record)
        if not mistake and not isinstance(record.get("annotations"), list | tuple):
            mistake = "has no annotations list"
        if mistake:
            raise UserError(f"a record of the dataset {name} {mistake}: {str(record)[:200]}")
        for annotation in record["annotations"]:
            check_annotation(annotation, record["file_name"], num_classes)
        if SerializedRecords([record]).annotations is None:
            raise UserError(f"the annotations of {record['file_name']} cannot be read: {str(record)[:300]}")


def _check_targets(records, masks, num_keypoints):
    """Refuse objects of which no mask or no keypoints can be made, before training comes to them."""
    for record in records:
        for annotation in record["annotations"]:
            if annotation.get("iscrowd"):
                continue
            where = f"an annotation of {record['file_name']}"
            segmentation, keypoints = annotation.get("segmentation"), annotation.get("keypoints")
            mistake = masks and find_segmentation_problem(segmentation, record["height"], record["width"])
            if mistake:
                needs = "MODEL.MASK_ON needs a segmentation of every object"
                raise UserError(f"{needs}, but {where} {mistake[1]}")
            mistake = num_keypoints and keypoints and find_keypoint_problem(keypoints, num_keypoints)
            if mistake:
                raise UserError(f"{where} {mistake[1]}")


def _usable(records, counts):
    """Which annotations have a box with an area inside the image, bool [A]."""
    table = records.annotations
    width, height = (records.columns[key][table.record] for key in ("width", "height"))
    kinds = classify_boxes(*table.boxes.T, width, height)
    dropped = kinds["empty_box"] | kinds["outside_box"]
    # Each box counts as the first kind that it is of.
    counts.update(np.select(list(kinds.values()), list(kinds), "").tolist())
    counts["crowd"] += int((table.crowd & ~dropped).sum())
    return ~dropped


def _chosen(records, objects, counts, filter_empty, min_keypoints):
    """The indices of the records to train on."""
    table = records.annotations
    empty = np.bincount(table.record[objects], minlength=len(records)) == 0
    labelled = np.bincount(table.record, table.keypoints * objects, minlength=len(records))
    empty &= filter_empty
    poor = (labelled < min_keypoints) & ~empty
    counts.update(images=len(records), empty=int(empty.sum()), poor=int(poor.sum()))
    return np.flatnonzero(~(empty | poor))


def _select(records, kept, chosen):
    """The records at the chosen indices, with only the annotations that are kept; most are not touched."""
    record_of = records.annotations.record
    # `np.unique` would import numpy.ma.
    changed = np.flatnonzero(np.bincount(record_of[~kept]))
    order, cleaned = np.arange(len(records)), []
    for index, start in zip(changed, np.searchsorted(record_of, changed), strict=True):
        record = records[index]
        record["annotations"] = [a for i, a in enumerate(record["annotations"], start) if kept[i]]
        order[index] = len(records) + len(cleaned)
        cleaned.append(record)
    return SerializedRecords.join([records, SerializedRecords(cleaned)]).take(order[chosen])


def _report(names, classes, counts, histogram):
    width = max(map(len, classes))
    rows = [f"  {name:<{width}}  {histogram[i]:>8}" for i, name in enumerate(classes)]
    logger.info(
        f"{names}: {counts['images']} images, {histogram.sum()} boxes ({counts['crowd']} crowds) of "
        f"{len(classes)} classes\n" + "\n".join(rows)
    )
    for kind in ("empty_box", "outside_box", "clipped_box"):
        if counts[kind]:
            logger.warning(f"{names}: {KINDS[kind][0]}: {counts[kind]}")
    for key, text in (("empty", "without annotations"), ("poor", "with too few labelled keypoints")):
        if counts[key]:
            logger.info(f"{names}: {counts[key]} images {text} are left out")


def check_image_files(records, what):
    """Refuse `SerializedRecords` whose image files are missing, by listing each folder once."""

    @functools.cache
    def list_folder(folder):
        return set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()

    paths = records.columns["file_name"] if records.columns else [record["file_name"] for record in records]
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if not is_drawn(path) and name not in list_folder(folder):
            missing.append(path)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"an image of {what} does not exist: {missing[0]}{more}")
