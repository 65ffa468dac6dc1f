"""Predictions as files: COCO's results format, written and read again, and the scores as JSON.

https://cocodataset.org/#format-results
"""

import json
import math
import os

import numpy as np
import torch
from pycocotools import mask as coco_mask

from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.data.datasets.coco import read_results, visible_keypoints
from plaintrain.data.datasets.write import category_ids
from plaintrain.data.serialized import no_garbage_collection
from plaintrain.data.validation import coco_annotation_mistake
from plaintrain.evaluation.detections import Detections, ground_truth
from plaintrain.structures import are_numbers, segmentation_to_rle
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write

PREDICTIONS_FILE = "coco_instances_results.json"
# COCO's keypoints are numbers of pixels, whose centres are at half.
_HALF = (0.5, 0.5, 0.0)


def write_predictions(folder, dataset_name, detections):
    """Write `coco_instances_results.json` into a folder: COCO's results format, with the dataset's own ids.

    Args:
        folder: it is made.
        dataset_name: a registered dataset.
        detections: `Detections`, of which all parts that are there are written.
    """
    records, category = DatasetCatalog.get(dataset_name), category_ids(MetadataCatalog.get(dataset_name))
    results = coco_results(detections, records, [record["image_id"] for record in records], category)
    # Ids that came from an array are no int for JSON.
    write_json(os.path.join(folder, PREDICTIONS_FILE), results, default=int)


def coco_results(detections, records, image_ids, category_ids, parts=("masks", "keypoints")):
    """Return `Detections` in COCO's results format, a list of dicts.

    Args:
        detections, records: the detections, and the records of the dataset that they are of.
        image_ids, category_ids: the id of each record, and of each label.
        parts: which of "masks" and "keypoints" to include where they are there.
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
        for result, rle in zip(results, rles(detections, records), strict=True):
            result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    if "keypoints" in parts and detections.keypoints is not None:
        # A list [x, y, score, ...] each.
        for result, keypoints in zip(results, (detections.keypoints - _HALF).tolist(), strict=True):
            result["keypoints"] = sum(keypoints, [])
    return results


def rles(detections, records):
    """Return the masks of `Detections` in COCO's compressed encoding; [] without masks."""
    if not detections.masks:
        return []
    sizes = [[record["height"], record["width"]] for record in records]
    images = detections.rows[:, 0].astype(int).tolist()
    return [{"size": sizes[i], "counts": c} for i, c in zip(images, detections.masks, strict=True)]


def read_detections(path, dataset_name, parts=("masks", "keypoints")):
    """Read predictions for a dataset from a JSON in COCO's results format.

    A detection without a box has the one around its segmentation or its keypoints.

    Args:
        path: a JSON list of `{image_id, category_id, score, bbox, segmentation, keypoints}`, of which
            all detections have a segmentation (polygons or RLE) or none, and keypoints likewise.
        dataset_name: a registered dataset, whose image and category ids these are.
        parts: which of "masks" and "keypoints" to read where the file has them.

    Returns:
        `Detections` in the order of the file in each image; masks keep the outline that the file has.

    Raises:
        UserError: names the file, and the detection, and what is wrong with it.
    """
    records, _, index = ground_truth(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    labels = {dataset_id: label for label, dataset_id in enumerate(category_ids(metadata))}
    num_keypoints = dict.fromkeys(labels, len(metadata.get("keypoint_names") or ()))
    sizes = [(record["height"], record["width"]) for record in records]
    rows, masks, points = [], [], []
    with no_garbage_collection():
        results = read_results(path)
        for result in results:
            mistake = coco_annotation_mistake(visible_keypoints(result), index, num_keypoints)
            if mistake or (mistake := _mistake(result)):
                raise UserError(f"detection {result['id']} in {path}, for {dataset_name}, {mistake[1]}")
        for result in sorted(results, key=lambda result: index[result["image_id"]]):
            image, label = index[result["image_id"]], labels[result["category_id"]]
            x, y, width, height = result["bbox"]
            rows.append([image, x, y, x + width, y + height, result["score"], label])
            if "masks" in parts and result.get("segmentation"):
                masks.append(_rle(path, result, *sizes[image])["counts"])
            if "keypoints" in parts and result.get("keypoints"):
                points.append(result["keypoints"])
    if len({len(keypoints) for keypoints in points}) > 1:
        raise UserError(f"the detections in {path} have different numbers of keypoints")
    for name, values in (("a segmentation", masks), ("keypoints", points)):
        if values and len(values) < len(rows):
            raise UserError(f"in {path} only {len(values)} of {len(rows)} detections have {name}, not all")
    rows, points = np.array(rows, dtype=np.float64), np.array(points, dtype=np.float64)
    keypoints = points.reshape(len(points), -1, 3) + _HALF if len(points) else None
    return Detections(rows.reshape(-1, 7), np.arange(len(records)), masks or None, keypoints)


def detections_of_image(detections, index, score_threshold, record):
    """Return the detections of one image, of scores from a threshold on, as a model returns them.

    Args:
        detections, index: `Detections`, and which image.
        score_threshold, record: the lowest score, and the image's record, for its size.
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
        return segmentation_to_rle(result["segmentation"], height, width)
    except UserError as e:
        raise UserError(f"detection {result['id']} in {path}: {e}") from e


def write_results(path, results):
    """Write scores as JSON, what is no finite number as null.

    Args:
        path: the file; its folder is made.
        results: {name: number}, or dicts of such dicts: {dataset: {task: {metric: number}}}.
    """
    write_json(path, plain(results), indent=1)


def plain(value):
    """Return dicts and lists as JSON holds them: each number an int or a float, None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None


def write_json(path, content, **options):
    """Write JSON as a whole, and make its folder; `options` are those of `json.dumps`."""
    with atomic_write(path) as f:
        # In one string: `json.dump` makes small pieces, which takes several times as long.
        f.write(json.dumps(content, **options))
