"""Predictions in COCO's format (https://cocodataset.org/#format-results), and results as table and JSON."""

import json
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

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
from plaintrain.structures import are_numbers, encode_segmentation, find_segmentation_problem
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import RESULTS_FILE, atomic_write, read_results_file

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "coco_instances_results.json"
# COCO's keypoints are indices of pixels, whose centers are at 0.5.
_HALF_PIXEL = (0.5, 0.5, 0.0)


def write_predictions(folder: str, dataset_name: str, detections: Detections) -> None:
    """Write `coco_instances_results.json` with the ids of the dataset."""
    records = DatasetCatalog.get(dataset_name)
    category_ids = get_category_ids(MetadataCatalog.get(dataset_name))
    image_ids = [record["image_id"] for record in records]
    results = convert_to_coco_results(detections, records, image_ids, category_ids)
    # `default` is for ids that are NumPy integers.
    write_json(os.path.join(folder, PREDICTIONS_FILE), results, default=int)


def convert_to_coco_results(
    detections: Detections,
    records: Sequence[dict[str, Any]],
    image_ids: Sequence[int | str],
    category_ids: Sequence[int] | dict[int, int],
    fields: Sequence[str] = ("masks", "keypoints"),
) -> list[dict[str, Any]]:
    """Convert detections to COCO's results format, with the ids of the records and the labels."""
    results = [
        {
            "image_id": image_ids[int(index)],
            "category_id": category_ids[int(label)],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for index, x0, y0, x1, y1, score, label in detections.table.tolist()
    ]
    if "masks" in fields and detections.masks is not None:
        for result, rle in zip(results, encode_detection_masks(detections, records), strict=True):
            result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    if "keypoints" in fields and detections.keypoints is not None:
        for result, keypoints in zip(results, (detections.keypoints - _HALF_PIXEL).tolist(), strict=True):
            result["keypoints"] = sum(keypoints, [])
    return results


def encode_detection_masks(detections: Detections, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the masks as COCO's compressed RLEs; [] without masks."""
    if not detections.masks:
        return []
    sizes = [[record["height"], record["width"]] for record in records]
    images = detections.table[:, 0].astype(int).tolist()
    return [{"size": sizes[i], "counts": c} for i, c in zip(images, detections.masks, strict=True)]


def read_detections(path: str | os.PathLike, dataset_name: str) -> Detections:
    """Read predictions with the ids of a dataset from a JSON file in COCO's results format.

    All detections must have a segmentation (polygons or RLE) or none, and keypoints likewise. A missing bbox
    is that of the segmentation or keypoints. The detections of an image keep their order.
    """
    records, _, index = load_ground_truth(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    labels = {dataset_id: label for label, dataset_id in enumerate(get_category_ids(metadata))}
    num_keypoints = dict.fromkeys(labels, len(metadata.get("keypoint_names") or ()))
    sizes = [(record["height"], record["width"]) for record in records]
    entries = []
    masks = []
    points = []
    with disable_gc():
        results = read_coco_results(os.fspath(path))
        for result in results:
            problem = find_coco_annotation_problem(mark_keypoints_visible(result), index, num_keypoints)
            if problem or (problem := _find_problem(result, *sizes[index[result["image_id"]]])):
                raise UserError(f"detection {result['id']} in {path}, for {dataset_name}, {problem[1]}")
        for result in sorted(results, key=lambda result: index[result["image_id"]]):
            image = index[result["image_id"]]
            x, y, width, height = result["bbox"]
            label = labels[result["category_id"]]
            entries.append([image, x, y, x + width, y + height, result["score"], label])
            if result.get("segmentation"):
                masks.append(encode_segmentation(result["segmentation"], *sizes[image])["counts"])
            if result.get("keypoints"):
                points.append(result["keypoints"])
    if len({len(keypoints) for keypoints in points}) > 1:
        raise UserError(f"the detections in {path} have different numbers of keypoints")
    table = np.array(entries, dtype=np.float64).reshape(-1, 7)
    for name, values in (("a segmentation", masks), ("keypoints", points)):
        if values and len(values) < len(table):
            raise UserError(f"all {len(table)} detections in {path} must have {name}, got {len(values)}")
    keypoints = np.array(points).reshape(len(points), -1, 3) + _HALF_PIXEL if points else None
    return Detections(table, np.arange(len(records)), masks or None, keypoints)


def get_image_detections(
    detections: Detections, index: int, score_threshold: float, record: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the detections of image `index`, with its `record`, in the format of a model's output."""
    table = detections.table
    selected = np.arange(*np.searchsorted(table[:, 0], [index, index + 1]))
    selected = selected[table[selected, 5] >= score_threshold]
    output = {
        "boxes": torch.from_numpy(table[selected, 1:5]),
        "scores": torch.from_numpy(table[selected, 5]),
        "labels": torch.from_numpy(table[selected, 6]).long(),
    }
    if detections.masks is not None:
        size = [record["height"], record["width"]]
        masks = [coco_mask.decode({"size": size, "counts": detections.masks[i]}) for i in selected]
        output["masks"] = torch.from_numpy(np.array(masks).reshape(-1, *size)).bool()
    if detections.keypoints is not None:
        output["keypoints"] = torch.from_numpy(detections.keypoints[selected])
    return output


def _find_problem(result: dict[str, Any], height: int, width: int) -> tuple[str, str] | None:
    """Return (error type, message) of a value that is valid in annotations only."""
    if min(result["bbox"][2:]) < 0:
        return "bad_box", f"has bbox {result['bbox']}, whose width or height is negative"
    if not are_numbers(result.get("keypoints") or []):
        return "wrong_keypoints", f"has keypoints that are not finite numbers: {result['keypoints']!s:.80}"
    segmentation = result.get("segmentation")
    return find_segmentation_problem(segmentation, height, width) if segmentation else None


def report_results(dataset_name: str, results: dict[str, dict[str, float]], folder: str) -> None:
    """Log {task: {metric: value}} with the change since results.json in `folder`, and update that file.

    Does nothing on ranks other than 0. The metrics of classes (`AP-NAME`) are only written to the file.
    """
    if not comm.is_main_process():
        return
    before = read_results_file(folder).get(dataset_name, {})
    table = format_results(results, before)
    since = ", and the change since the last evaluation" if before else ""
    logger.info(f"results on {dataset_name}{since}:\n{table}")
    print_csv_format(results, logging.DEBUG)
    content = convert_to_json_types({dataset_name: results})
    write_json(os.path.join(folder, RESULTS_FILE), content, indent=1)


def format_results(results: dict[str, dict[str, float]], before: dict[str, dict[str, float | None]]) -> str:
    """Format the results of each task as a text table, with the changes from `before` as second row."""
    tables = []
    for task, metrics in results.items():
        names = [name for name in metrics if "-" not in name]
        cells: list[list[Any]] = [[task, *(float(metrics[name]) for name in names)]]
        changes = [_format_change(before.get(task, {}).get(name), metrics[name]) for name in names]
        if any(changes):
            cells.append(["", *changes])
        tables.append(format_table(cells, ["", *names]))
    return "\n".join(tables)


def _format_change(before: float | None, now: float) -> str:
    if isinstance(before, int | float) and math.isfinite(before) and math.isfinite(now):
        return f"{now - before:+.2f}"
    return ""


def convert_to_json_types(value: Any) -> Any:
    """Convert the numbers in dicts and lists to int and float, and NaN and infinity to None."""
    return json.loads(json.dumps(value, default=float), parse_constant=lambda name: None)


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """Write a JSON file atomically, with options of `json.dumps`."""
    with atomic_write(path) as f:
        # `json.dump` is several times slower.
        f.write(json.dumps(content, **options))
