"""Predictions as files: COCO's results format, written and read again; results as a table and as JSON.

https://cocodataset.org/#format-results
"""

import json
import logging
import math
import os

import numpy as np
import torch
from pycocotools import mask as coco_mask

from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.data.datasets.coco import mark_keypoints_visible, read_coco_results
from plaintrain.data.datasets.write import get_category_ids
from plaintrain.data.serialized import disable_gc
from plaintrain.data.validation import find_coco_annotation_problem
from plaintrain.evaluation.detections import Detections, load_ground_truth
from plaintrain.evaluation.evaluator import format_table, print_csv_format
from plaintrain.structures import are_numbers, encode_segmentation
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import RESULTS_FILE, atomic_write, read_results_file

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "coco_instances_results.json"
# COCO's keypoints are numbers of pixels, whose centres are at half.
_HALF = (0.5, 0.5, 0.0)


def write_predictions(folder, dataset_name, detections):
    """Make a folder with `coco_instances_results.json`: `Detections` with the dataset's own ids."""
    records, category = DatasetCatalog.get(dataset_name), get_category_ids(MetadataCatalog.get(dataset_name))
    results = convert_to_coco_results(
        detections, records, [record["image_id"] for record in records], category
    )
    # Ids that came from an array are no int for JSON.
    write_json(os.path.join(folder, PREDICTIONS_FILE), results, default=int)


def convert_to_coco_results(detections, records, image_ids, category_ids, parts=("masks", "keypoints")):
    """Return `Detections` in COCO's results format, a list of dicts.

    `image_ids` and `category_ids` are those of each record and of each label; `parts` are what to include
    where it is there.
    """
    results = [
        {
            "image_id": image_ids[int(index)],
            "category_id": category_ids[int(label)],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for index, x0, y0, x1, y1, score, label in detections.rows.tolist()
    ]
    if "masks" in parts and detections.masks is not None:
        for result, rle in zip(results, encode_detection_masks(detections, records), strict=True):
            result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    if "keypoints" in parts and detections.keypoints is not None:
        # A list [x, y, score, ...] each.
        for result, keypoints in zip(results, (detections.keypoints - _HALF).tolist(), strict=True):
            result["keypoints"] = sum(keypoints, [])
    return results


def encode_detection_masks(detections, records):
    """Return the masks of `Detections` in COCO's compressed encoding; [] without masks."""
    if not detections.masks:
        return []
    sizes = [[record["height"], record["width"]] for record in records]
    images = detections.rows[:, 0].astype(int).tolist()
    return [{"size": sizes[i], "counts": c} for i, c in zip(images, detections.masks, strict=True)]


def read_detections(path, dataset_name):
    """Read predictions for a dataset from a JSON in COCO's results format.

    A detection without a box has the one around its segmentation or its keypoints.

    Args:
        path: a JSON list of `{image_id, category_id, score, bbox, segmentation, keypoints}`, of which
            all detections have a segmentation (polygons or RLE) or none, and keypoints likewise.
        dataset_name: a registered dataset, whose image and category ids these are.

    Returns:
        `Detections` in the order of the file in each image; masks keep the outline that the file has.

    Raises:
        UserError: names the file, and the detection, and what is wrong with it.
    """
    records, _, index = load_ground_truth(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    labels = {dataset_id: label for label, dataset_id in enumerate(get_category_ids(metadata))}
    num_keypoints = dict.fromkeys(labels, len(metadata.get("keypoint_names") or ()))
    sizes = [(record["height"], record["width"]) for record in records]
    rows, masks, points = [], [], []
    with disable_gc():
        results = read_coco_results(path)
        for result in results:
            mistake = find_coco_annotation_problem(mark_keypoints_visible(result), index, num_keypoints)
            if mistake or (mistake := _mistake(result)):
                raise UserError(f"detection {result['id']} in {path}, for {dataset_name}, {mistake[1]}")
        for result in sorted(results, key=lambda result: index[result["image_id"]]):
            image, label = index[result["image_id"]], labels[result["category_id"]]
            x, y, width, height = result["bbox"]
            rows.append([image, x, y, x + width, y + height, result["score"], label])
            if result.get("segmentation"):
                masks.append(_rle(path, result, *sizes[image])["counts"])
            if result.get("keypoints"):
                points.append(result["keypoints"])
    if len({len(keypoints) for keypoints in points}) > 1:
        raise UserError(f"the detections in {path} have different numbers of keypoints")
    for name, values in (("a segmentation", masks), ("keypoints", points)):
        if values and len(values) < len(rows):
            raise UserError(f"in {path} only {len(values)} of {len(rows)} detections have {name}, not all")
    rows, points = np.array(rows, dtype=np.float64), np.array(points, dtype=np.float64)
    keypoints = points.reshape(len(points), -1, 3) + _HALF if len(points) else None
    return Detections(rows.reshape(-1, 7), np.arange(len(records)), masks or None, keypoints)


def get_image_detections(detections, index, score_threshold, record):
    """Return the detections of image `index`, of scores from a threshold on, as a model returns them.

    `record` is the image's, for its size.
    """
    rows = detections.rows
    places = np.arange(*np.searchsorted(rows[:, 0], [index, index + 1]))
    places = places[rows[places, 5] >= score_threshold]
    found = {
        "boxes": torch.from_numpy(rows[places, 1:5]),
        "scores": torch.from_numpy(rows[places, 5]),
        "labels": torch.from_numpy(rows[places, 6]).long(),
    }
    if detections.masks is not None:
        size = [record["height"], record["width"]]
        masks = [coco_mask.decode({"size": size, "counts": detections.masks[i]}) for i in places]
        found["masks"] = torch.from_numpy(np.array(masks).reshape(-1, *size)).bool()
    if detections.keypoints is not None:
        found["keypoints"] = torch.from_numpy(detections.keypoints[places])
    return found


def _mistake(result):
    """Return what is wrong with a detection that may be right in an annotation: (type, end of a sentence)."""
    if min(result["bbox"][2:]) < 0:
        return "bad_box", f"has bbox {result['bbox']}, whose width or height is negative"
    if not are_numbers(result.get("keypoints") or []):
        keypoints = str(result["keypoints"])[:80]
        return "wrong_keypoints", f"has keypoints that are not finite numbers: {keypoints}"
    return None


def _rle(path, result, height, width):
    try:
        return encode_segmentation(result["segmentation"], height, width)
    except UserError as e:
        raise UserError(f"detection {result['id']} in {path}: {e}") from e


def write_results(path, results):
    """Write {name: number}, or dicts of such dicts, as JSON; what is no finite number as null."""
    write_json(path, convert_to_json_types(results), indent=1)


def report_results(dataset_name, results, folder):
    """Log {task: {metric: number}} with the change since results.json in a folder, and write them there.

    Does nothing on ranks other than 0. A class' own numbers (`AP-NAME`) are in the file, not in the table.
    """
    if not comm.is_main_process():
        return
    before = read_results_file(folder).get(dataset_name, {})
    table = format_results(results, before)
    since = ", and the change since the last evaluation" if before else ""
    text = f"results on {dataset_name}{since}:\n{table}"
    logger.info(text)
    print_csv_format(results)
    write_results(os.path.join(folder, RESULTS_FILE), {dataset_name: results})


def format_results(results, before):
    """Each task's numbers as an aligned text table; below them, the change from those of `before`."""
    tables = []
    for task, metrics in results.items():
        names = [name for name in metrics if "-" not in name]
        rows = [[task, *(float(metrics[name]) for name in names)]]
        changes = [_change(before.get(task, {}).get(name), metrics[name]) for name in names]
        rows += [["", *changes]] if any(changes) else []
        tables.append(format_table(rows, ["", *names]))
    return "\n".join(tables)


def _change(before, now):
    known = isinstance(before, int | float) and math.isfinite(before) and math.isfinite(now)
    return f"{now - before:+.2f}" if known else ""


def convert_to_json_types(value):
    """Return dicts and lists as JSON holds them: each number an int or a float, None for NaN and infinity."""
    return json.loads(json.dumps(value, default=float), parse_constant=lambda name: None)


def write_json(path, content, **options):
    """Write JSON as a whole, and make its folder; `options` are those of `json.dumps`."""
    with atomic_write(path) as f:
        # In one string: `json.dump` makes small pieces, which takes several times as long.
        f.write(json.dumps(content, **options))
