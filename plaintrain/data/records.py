"""Join, check, filter and count the records of a training set."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Iterable
from typing import NoReturn

import numpy as np

from plaintrain.data import validation
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, get_common_class_names
from plaintrain.data.consistency import iterate_contradictions
from plaintrain.data.datasets.shapes import is_drawn
from plaintrain.data.serialized import SerializedRecords
from plaintrain.structures import find_segmentation_problem
from plaintrain.utils.errors import DataError, UserError
from plaintrain.utils.files import describe_dataset_root

logger = logging.getLogger(__name__)


def get_detection_dataset_dicts(
    names: str | Iterable[str], filter_empty: bool = True, min_keypoints: int = 0, need_masks: bool = False
) -> SerializedRecords:
    """Return the checked records of one or several datasets with equal classes, for training.

    Boxes without area or outside their image are dropped and logged. Crowds do not count.

    Args:
        filter_empty: skip images without annotations.
        min_keypoints: skip images with fewer labelled keypoints; above 0, also check keypoints.
        need_masks: reject annotations without a valid segmentation.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("DATASETS.TRAIN is empty; name at least one dataset")
    classes = get_common_class_names(names)
    counts: Counter[str] = Counter()
    histogram = np.zeros(len(classes), dtype=np.int64)
    datasets = []
    for name in names:
        records = DatasetCatalog.get(name)
        check_objects(records, name)
        table = records.annotations
        labels = range(len(classes))
        if records.columns is None or table is None or not np.isin(table.labels, labels).all():
            _raise_first_problem(name, records, len(classes))
        keep = _find_valid_boxes(records, counts)
        histogram += np.bincount(table.labels[keep], minlength=len(classes))
        indices = _filter_images(records, keep & ~table.crowd, counts, filter_empty, min_keypoints)
        datasets.append(_select(records, keep, indices))
        if need_masks or min_keypoints:
            num_keypoints = len(MetadataCatalog.get(name).get("keypoint_names") or ())
            _check_targets(datasets[-1], need_masks, min_keypoints and num_keypoints)
    _log_counts(", ".join(names), classes, counts, histogram)
    if not any(map(len, datasets)):
        raise UserError(
            f"no image with annotations is left in {', '.join(names)}: of {counts['images']} images "
            f"{counts['empty']} have none, and {counts['few_keypoints']} have too few labelled keypoints"
        )
    return SerializedRecords.join(datasets)


def check_objects(records: SerializedRecords, name: str) -> None:
    """Reject normalized boxes, and warn of duplicate objects and wrong areas."""
    if records.annotations:
        problems = (problem[::2] for problem in iterate_contradictions(records, records.annotations))
        for finding in validation.count_problems(problems):
            text = f"{name}: {validation.PROBLEM_TYPES[finding.type][0]}: {finding.count}"
            text += f", such as {finding.examples[0]}"
            if finding.fatal:
                raise DataError(finding.type, text)
            logger.warning(text)


def _raise_first_problem(name: str, records: SerializedRecords, num_classes: int) -> NoReturn:
    for record in records:
        problem = validation.find_image_problem(record)
        if not problem and not isinstance(record.get("annotations"), list | tuple):
            problem = "has no annotations list"
        if problem:
            raise UserError(f"a record of the dataset {name} {problem}: {str(record)[:200]}")
        for annotation in record["annotations"]:
            validation.check_annotation(annotation, record["file_name"], num_classes)
        if SerializedRecords([record]).annotations is None:
            raise UserError(f"the annotations of {record['file_name']} cannot be read: {str(record)[:300]}")
    raise UserError(f"the records of the dataset {name} cannot be read")


def _check_targets(records, need_masks, num_keypoints):
    for record in records:
        size = record["height"], record["width"]
        for annotation in record["annotations"]:
            if annotation.get("iscrowd"):
                continue
            source = f"an annotation of {record['file_name']}"
            problem = need_masks and find_segmentation_problem(annotation.get("segmentation"), *size)
            if problem:
                raise UserError(f"{source} {problem[1]}; MODEL.MASK_ON needs a segmentation of every object")
            keypoints = annotation.get("keypoints") if num_keypoints else None
            problem = keypoints and validation.find_keypoint_problem(keypoints, num_keypoints)
            if problem:
                raise UserError(f"{source} {problem[1]}")


def _find_valid_boxes(records, counts):
    """Return which annotations have a box with an area inside the image, bool `[A]`."""
    table = records.annotations
    width, height = (records.columns[key][table.record] for key in ("width", "height"))
    problems = validation.classify_boxes(*table.boxes.T, width, height)
    dropped = problems["empty_box"] | problems["outside_box"]
    # A box with several problems counts as the first.
    valid = np.ones(len(table.labels), dtype=bool)
    for key, mask in problems.items():
        counts[key] += int((mask & valid).sum())
        valid &= ~mask
    counts["crowd"] += int((table.crowd & ~dropped).sum())
    return ~dropped


def _filter_images(records, objects, counts, filter_empty, min_keypoints):
    """Return the indices of the records to train on; `objects`, bool `[A]`, are those that count."""
    table = records.annotations
    empty = np.bincount(table.record[objects], minlength=len(records)) == 0
    labelled = np.bincount(table.record, table.keypoints * objects, minlength=len(records))
    empty &= filter_empty
    few = (labelled < min_keypoints) & ~empty
    counts.update(images=len(records), empty=int(empty.sum()), few_keypoints=int(few.sum()))
    return np.flatnonzero(~(empty | few))


def _select(records, keep, indices):
    """Return the records at the indices with the annotations in `keep`; only changed records are copied."""
    record_of = records.annotations.record
    # `np.unique` would import numpy.ma.
    changed = np.flatnonzero(np.bincount(record_of[~keep]))
    order = np.arange(len(records))
    cleaned = []
    for index, start in zip(changed, np.searchsorted(record_of, changed), strict=True):
        record = records[index]
        record["annotations"] = [a for i, a in enumerate(record["annotations"], start) if keep[i]]
        order[index] = len(records) + len(cleaned)
        cleaned.append(record)
    return SerializedRecords.join([records, SerializedRecords(cleaned)]).take(order[indices])


def _log_counts(names, classes, counts, histogram):
    width = max(map(len, classes))
    lines = [f"  {name:<{width}}  {histogram[i]:>8}" for i, name in enumerate(classes)]
    logger.info(
        f"{names}: {counts['images']} images, {histogram.sum()} boxes ({counts['crowd']} crowds) of "
        f"{len(classes)} classes"
    )
    logger.debug("\n".join([f"{names}: boxes by class", *lines]))
    for key in ("empty_box", "outside_box", "clipped_box"):
        if counts[key]:
            logger.warning(f"{names}: {validation.PROBLEM_TYPES[key][0]}: {counts[key]}")
    for key, text in (("empty", "without annotations"), ("few_keypoints", "with too few labelled keypoints")):
        if counts[key]:
            logger.info(f"{names}: skipped {counts[key]} images {text}")


def check_image_files(records: SerializedRecords, source: str) -> None:
    """Reject records whose image files are missing, by listing each folder once."""

    @functools.cache
    def list_folder(folder):
        return set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()

    paths = records.columns["file_name"] if records.columns else [record["file_name"] for record in records]
    files = (path for path in paths if not is_drawn(path))
    missing = [path for path in files if os.path.basename(path) not in list_folder(os.path.dirname(path))]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = describe_dataset_root(missing[0])
        raise UserError(f"an image of {source} does not exist: {missing[0]}{more}{hint}")
