"""Detections of a dataset as arrays and RLEs, and the base class of the evaluators that collect them."""

import abc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from plaintrain.data.catalog import DatasetCatalog, load_class_names
from plaintrain.data.serialized import SerializedRecords
from plaintrain.data.validation import check_annotation
from plaintrain.evaluation.evaluator import DatasetEvaluator
from plaintrain.structures import BoxMasks, BoxMode, encode_masks
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Detections:
    """N detections, ordered by image.

    Attributes:
        table: `[N, 7]` float64: index of the image in the dataset, x0, y0, x1, y1, score, label.
        seen: indices of the processed images, ascending.
        masks: counts of N compressed RLEs, in the size of the images.
        keypoints: `[N, Kp, 3]` float64: x, y, score.
    """

    table: np.ndarray
    seen: np.ndarray
    masks: list[bytes] | None = None
    keypoints: np.ndarray | None = None


def load_ground_truth(dataset_name: str) -> tuple[SerializedRecords, list[str], dict[int | str, int]]:
    """Return the checked records, the class names, and {image_id: index of the record} of a dataset."""
    records = DatasetCatalog.get(dataset_name)
    classes = load_class_names(dataset_name)
    index = {}
    for i, record in enumerate(records):
        index[record["image_id"]] = i
        for annotation in record["annotations"]:
            check_annotation(annotation, f"image {record['image_id']} of {dataset_name}", len(classes))
    if len(index) < len(records):
        raise UserError(f"image_id must be unique in the dataset {dataset_name}")
    return records, classes, index


def build_object_table(records: SerializedRecords) -> dict[str, np.ndarray]:
    """Return the objects as arrays `image` (index of the record), `boxes` (XYXY), `labels` and `crowd`."""
    table: Any = records.annotations or SerializedRecords(list(records)).annotations
    return {"image": table.record, "boxes": table.boxes, "labels": table.labels, "crowd": table.crowd}


def compute_overlaps(
    objects: dict[str, np.ndarray],
    detections: dict[str, np.ndarray],
    masks: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None,
) -> tuple[np.ndarray, ...]:
    """Return the IoU of all overlapping pairs of a detection and an object of the same image.

    Both need arrays `image` (ascending) and `boxes`, objects also `crowd`. `masks` are RLEs of the objects
    and of the detections, for mask IoU. Returns indices of the detections (ascending), of the objects, and
    IoUs, `[P]` each. The IoU with a crowd is the fraction of the detection inside it, as in COCO.
    """
    object_shapes, shapes = masks or (
        BoxMode.convert(table["boxes"], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) for table in (objects, detections)
    )
    pairs = [(np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0),)]
    for image in np.unique(detections["image"]):
        spans = [np.searchsorted(table["image"], [image, image + 1]) for table in (detections, objects)]
        (d0, d1), (o0, o1) = spans
        if o1 > o0:
            crowd = objects["crowd"][o0:o1].astype(np.uint8)
            iou = coco_mask.iou(shapes[d0:d1], object_shapes[o0:o1], crowd)
            detection, target = np.nonzero(iou)
            pairs.append((detection + d0, target + o0, iou[detection, target]))
    return tuple(np.concatenate(column) for column in zip(*pairs, strict=True))


class InstanceEvaluator(DatasetEvaluator, abc.ABC):
    """Base class of evaluators that gather the detections of all ranks on rank 0 and `score` them."""

    in_background = True
    _collected: dict[str, Any]

    def __init__(self, dataset_name: str, distributed: bool = True, fields: Sequence[str] = ()) -> None:
        """Load the records; `fields` are the outputs to collect, of "masks" and "keypoints"."""
        self.dataset_name = dataset_name
        self._distributed = distributed
        self._fields = fields
        self.records, self.classes, self._index = load_ground_truth(dataset_name)
        self.reset()

    def reset(self) -> None:
        # "fields" are those of any output, including images without detections.
        self._collected = {"seen": [], "table": [], "fields": set(), "masks": [], "keypoints": []}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collect the outputs for samples, in pixels of the original images."""
        for sample, output in zip(inputs, outputs, strict=True):
            try:
                self._collect(sample["image_id"], output)
            except Exception as e:
                e.add_note(f"while processing the detections of image {sample['image_id']!r}")
                raise

    def _collect(self, image_id: int | str, output: dict[str, Any]) -> None:
        collected = self._collected
        index = self._index.get(image_id)
        if index is None:
            raise UserError(f"the dataset {self.dataset_name} has no image {image_id!r}")
        columns = [output["boxes"], output["scores"][:, None], output["labels"][:, None]]
        # On the CPU, since MPS has no float64.
        table = torch.cat([column.cpu().double() for column in columns], dim=1).numpy()
        wrong = table[(table[:, 5] < 0) | (table[:, 5] >= len(self.classes)), 5]
        if len(wrong):
            classes = f"0 to {len(self.classes) - 1}, the classes of {self.dataset_name}"
            raise UserError(f"labels of the model must be {classes}, got {int(wrong[0])}")
        collected["seen"].append(index)
        collected["table"].append(np.concatenate([np.full((len(table), 1), index), table], axis=1))
        fields = {name for name in self._fields if name in output}
        collected["fields"] |= fields
        if "masks" in fields and len(table):
            collected["masks"] += self._encode(output["masks"], self.records[index])
        if "keypoints" in fields and len(table):
            collected["keypoints"].append(output["keypoints"].cpu().double().numpy())

    def _encode(self, masks: torch.Tensor | BoxMasks, record: dict[str, Any]) -> list[bytes]:
        size = record["height"], record["width"]
        if (actual := tuple(masks.shape[1:])) != size:
            image = f"image {record['image_id']} of {self.dataset_name}"
            raise UserError(f"masks of {image} must have its size {size}, got {actual}")
        return masks.encode() if isinstance(masks, BoxMasks) else encode_masks(masks)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Score the detections of all ranks on rank 0; return None on the others."""
        # Arrays and bytes, which are much faster to gather than dicts.
        collected = {
            **self._collected,
            "table": np.concatenate([np.zeros((0, 7)), *self._collected["table"]]),
            "seen": np.array(self._collected["seen"], dtype=np.int64),
        }
        gathered = comm.gather(collected) if self._distributed else [collected]
        if self._distributed and not comm.is_main_process():
            return None
        detections = _merge(gathered)
        num_seen = len(detections.seen)
        num_repeated = sum(len(of_rank["seen"]) for of_rank in gathered) - num_seen
        images = f"images of {self.dataset_name}"
        if num_seen < len(self.records):
            logger.warning(f"only {num_seen} of {len(self.records)} {images} were processed and are scored")
        if num_repeated:
            logger.warning(f"{num_repeated} {images} were processed more than once, and count as often")
        return self.score(detections)

    @abc.abstractmethod
    def score(self, detections: Detections) -> dict[str, dict[str, float]]:
        """Return {task: {metric: value}}."""


def _merge(gathered: list[dict[str, Any]]) -> Detections:
    table, seen = (np.concatenate([of_rank[key] for of_rank in gathered]) for key in ("table", "seen"))
    masks, points = ([v for of_rank in gathered for v in of_rank[key]] for key in ("masks", "keypoints"))
    fields = set().union(*(of_rank["fields"] for of_rank in gathered))
    keypoints = np.concatenate(points) if points else np.zeros((0, 0, 3))
    for name, values in (("masks", masks), ("keypoints", keypoints)):
        if name in fields and len(values) != len(table):
            raise UserError(f"all {len(table)} detections must have {name}, got {len(values)}")
    # Sorted, so that results do not depend on the split over ranks and the order of the images.
    order = np.argsort(table[:, 0], kind="stable")
    return Detections(
        table=table[order],
        seen=np.unique(seen),
        masks=[masks[i] for i in order] if "masks" in fields else None,
        keypoints=keypoints[order] if "keypoints" in fields else None,
    )
