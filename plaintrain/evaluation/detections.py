"""Detections collected as arrays and run-length encodings: little to keep, little to gather."""

import abc
import logging
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask

from plaintrain.data.catalog import DatasetCatalog, load_class_names
from plaintrain.data.serialized import SerializedRecords
from plaintrain.data.validation import check_annotation
from plaintrain.evaluation.evaluator import DatasetEvaluator
from plaintrain.structures import BoxMasks, encode_masks
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Detections:
    """What was found, N detections ordered by image.

    Attributes:
        rows: `[N, 7]` float64: index of the image in the dataset, x0, y0, x1, y1, score, label.
        seen: indices of the images that were processed, ascending.
        masks: the counts (bytes) of N compressed RLEs of the images' sizes, or None without masks.
        keypoints: `[N, Kp, 3]` float64, x, y, score; or None without keypoints.
    """

    rows: np.ndarray
    seen: np.ndarray
    masks: list | None = None
    keypoints: np.ndarray | None = None


def load_ground_truth(dataset_name):
    """What a dataset is scored by: (records, class names, {image_id: index of its record})."""
    records, classes, index = DatasetCatalog.get(dataset_name), load_class_names(dataset_name), {}
    for i, record in enumerate(records):
        index[record["image_id"]] = i
        for annotation in record["annotations"]:
            check_annotation(annotation, f"image {record['image_id']} of {dataset_name}", len(classes))
    if len(index) < len(records):
        raise UserError(f"the dataset {dataset_name} holds an image_id twice")
    return records, classes, index


def build_object_table(records):
    """Return the objects as arrays: `image` (index of the record), `boxes` (XYXY), `labels`, `crowd`."""
    table = records.annotations or SerializedRecords(list(records)).annotations
    return {"image": table.record, "boxes": table.boxes, "labels": table.labels, "crowd": table.crowd}


def compute_overlaps(objects, detections, masks=None):
    """Return all pairs of a detection and an object of the same image that overlap.

    Args:
        objects, detections: dicts of `image` (ascending), `boxes`, and of objects `crowd`, as in `Errors`.
        masks: RLEs of the objects and of the detections, to compare in place of the boxes.

    Returns:
        (index of the detection, index of the object, IoU), `[P]` each, the detections ascending. Of a crowd
        the IoU is as COCO has it, the share of the detection inside it.
    """
    object_shapes, shapes = masks or (_to_xywh(table["boxes"]) for table in (objects, detections))
    parts = [(np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0),)]
    for image in np.unique(detections["image"]):
        spans = [np.searchsorted(table["image"], [image, image + 1]) for table in (detections, objects)]
        (d0, d1), (o0, o1) = spans
        if o1 > o0:
            crowd = objects["crowd"][o0:o1].astype(np.uint8)
            iou = coco_mask.iou(shapes[d0:d1], object_shapes[o0:o1], crowd)
            detection, target = np.nonzero(iou)
            parts.append((detection + d0, target + o0, iou[detection, target]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _to_xywh(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


class InstanceEvaluator(DatasetEvaluator, abc.ABC):
    """Collects detections, gathers them on rank 0, and hands them to `score`."""

    in_background = True

    def __init__(self, dataset_name, distributed=True, parts=()):
        """
        Args:
            dataset_name: a registered dataset; its records are the ground truth.
            distributed: gather over all ranks; otherwise each rank scores what it saw.
            parts: which of "masks" and "keypoints" to collect where outputs hold them.
        """
        self.dataset_name, self._distributed, self._parts = dataset_name, distributed, parts
        self.records, self.classes, self._index = load_ground_truth(dataset_name)
        self.reset()

    def reset(self):
        # "held" are the parts that outputs had; an image without detections tells which, too.
        self._collected = {"seen": [], "rows": [], "held": set(), "masks": [], "keypoints": []}

    def process(self, inputs, outputs):
        """Take in a `list[sample]` and, for each, what the model found in the original image's pixels."""
        for sample, output in zip(inputs, outputs, strict=True):
            try:
                self._collect(sample["image_id"], output)
            except Exception as e:
                e.add_note(f"while taking in what was found in image {sample['image_id']!r}")
                raise

    def _collect(self, image_id, output):
        index, collected = self._index.get(image_id), self._collected
        if index is None:
            raise UserError(f"the dataset {self.dataset_name} has no image {image_id!r}")
        columns = [output["boxes"], output["scores"][:, None], output["labels"][:, None]]
        # Not every device has numbers of double precision.
        rows = torch.cat([column.cpu().double() for column in columns], dim=1).numpy()
        wrong = rows[(rows[:, 5] < 0) | (rows[:, 5] >= len(self.classes)), 5]
        if len(wrong):
            raise UserError(
                f"the model finds the label {int(wrong[0])}, but {self.dataset_name} has {len(self.classes)} "
                f"classes, 0 to {len(self.classes) - 1}"
            )
        collected["seen"].append(index)
        collected["rows"].append(np.concatenate([np.full((len(rows), 1), index), rows], axis=1))
        held = {part for part in self._parts if part in output}
        collected["held"] |= held
        if "masks" in held and len(rows):
            collected["masks"] += self._encode(output["masks"], self.records[index])
        if "keypoints" in held and len(rows):
            collected["keypoints"].append(output["keypoints"].cpu().double().numpy())

    def _encode(self, masks, record):
        size = record["height"], record["width"]
        if tuple(masks.shape[1:]) != size:
            raise UserError(
                f"masks of image {record['image_id']} in {self.dataset_name} are "
                f"{tuple(masks.shape[1:])}, but the image is {size}"
            )
        return masks.encode() if isinstance(masks, BoxMasks) else encode_masks(masks)

    def evaluate(self):
        """Gather what all ranks processed, and score it on rank 0; None on the others."""
        # Arrays and bytes: as many dicts would take far longer to send.
        part = {
            **self._collected,
            "rows": np.concatenate([np.zeros((0, 7)), *self._collected["rows"]]),
            "seen": np.array(self._collected["seen"], dtype=np.int64),
        }
        parts = comm.gather(part) if self._distributed else [part]
        if self._distributed and not comm.is_main_process():
            return None
        detections = _join(parts)
        num_seen, num_given = len(detections.seen), sum(len(part["seen"]) for part in parts)
        if num_seen < len(self.records):
            logger.warning(
                f"only {num_seen} of the {len(self.records)} images of {self.dataset_name} are scored; the "
                "model was not run on the others"
            )
        if num_seen < num_given:
            logger.warning(
                f"of {self.dataset_name}, {num_given - num_seen} images were given to the model once again; "
                "what it found there counts each time"
            )
        return self.score(detections)

    @abc.abstractmethod
    def score(self, detections):
        """{task: {metric: number}} from the `Detections` of all ranks."""


def _join(parts):
    rows, seen = (np.concatenate([part[key] for part in parts]) for key in ("rows", "seen"))
    masks, keypoints = ([v for part in parts for v in part[key]] for key in ("masks", "keypoints"))
    held = set().union(*(part["held"] for part in parts))
    keypoints = np.concatenate(keypoints) if keypoints else np.zeros((0, 0, 3))
    for name, values in (("masks", masks), ("keypoints", keypoints)):
        if name in held and len(values) != len(rows):
            raise UserError(f"only {len(values)} of {len(rows)} detections have {name}, not all")
    # By image: results depend neither on how images were split over ranks, nor on the order they came in.
    order = np.argsort(rows[:, 0], kind="stable")
    return Detections(
        rows=rows[order],
        seen=np.unique(seen),
        masks=[masks[i] for i in order] if "masks" in held else None,
        keypoints=keypoints[order] if "keypoints" in held else None,
    )
