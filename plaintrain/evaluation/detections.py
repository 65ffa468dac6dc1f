"""Detections collected as arrays and run-length encodings: little to keep, little to gather."""

import abc
import logging
from dataclasses import dataclass

import numpy as np
import torch

from plaintrain.data.catalog import DatasetCatalog, class_names
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


def ground_truth(dataset_name):
    """What a dataset is scored by: (records, class names, {image_id: index of its record})."""
    records, classes, index = DatasetCatalog.get(dataset_name), class_names(dataset_name), {}
    for i, record in enumerate(records):
        index[record["image_id"]] = i
        for annotation in record["annotations"]:
            check_annotation(annotation, f"image {record['image_id']} of {dataset_name}", len(classes))
    if len(index) < len(records):
        raise UserError(f"the dataset {dataset_name} holds an image_id twice")
    return records, classes, index


def object_table(records):
    """Return the objects as arrays: `image` (index of the record), `boxes` (XYXY), `labels`, `crowd`."""
    table = records.annotations or SerializedRecords(list(records)).annotations
    return {"image": table.record, "boxes": table.boxes, "labels": table.labels, "crowd": table.crowd}


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
        self.records, self.classes, self._index = ground_truth(dataset_name)
        self.reset()

    def reset(self):
        self._rows, self._seen = [], []
        # Parts that outputs held; an image without detections tells which, too.
        self._held, self._masks, self._keypoints = set(), [], []

    def process(self, inputs, outputs):
        """Take in a `list[sample]` and, for each, what the model found in the original image's pixels."""
        for sample, output in zip(inputs, outputs, strict=True):
            try:
                self._process(sample["image_id"], output)
            except Exception as e:
                e.add_note(f"while taking in what was found in image {sample['image_id']!r}")
                raise

    def _process(self, image_id, output):
        index = self._index.get(image_id)
        if index is None:
            raise UserError(f"the dataset {self.dataset_name} has no image {image_id!r}")
        self._seen.append(index)
        columns = [output["boxes"], output["scores"][:, None], output["labels"][:, None]]
        # Not every device has numbers of double precision.
        rows = torch.cat([column.cpu().double() for column in columns], dim=1).numpy()
        self._check_labels(rows[:, 5])
        self._rows.append(np.concatenate([np.full((len(rows), 1), index), rows], axis=1))
        held = {part for part in self._parts if part in output}
        self._held |= held
        if "masks" in held and len(rows):
            self._masks += self._encode(output["masks"], self.records[index])
        if "keypoints" in held and len(rows):
            self._keypoints.append(output["keypoints"].cpu().double().numpy())

    def _check_labels(self, labels):
        wrong = labels[(labels < 0) | (labels >= len(self.classes))]
        if len(wrong):
            raise UserError(
                f"the model finds the label {int(wrong[0])}, but {self.dataset_name} has {len(self.classes)} "
                f"classes, 0 to {len(self.classes) - 1}"
            )

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
            "rows": np.concatenate([np.zeros((0, 7)), *self._rows]),
            "seen": np.array(self._seen, dtype=np.int64),
            "held": self._held,
            "masks": self._masks,
            "keypoints": self._keypoints,
        }
        parts = comm.gather(part) if self._distributed else [part]
        if self._distributed and not comm.is_main_process():
            return None
        self._warn_of_wrong_images(np.concatenate([part["seen"] for part in parts]))
        return self.score(_joined(parts))

    def _warn_of_wrong_images(self, seen):
        number = len(np.unique(seen))
        if number < len(self.records):
            logger.warning(
                f"only {number} of the {len(self.records)} images of {self.dataset_name} are scored; the "
                "model was not run on the others"
            )
        if number < len(seen):
            logger.warning(
                f"of {self.dataset_name}, {len(seen) - number} images were given to the model once again; "
                "what it found there counts each time"
            )

    @abc.abstractmethod
    def score(self, detections):
        """{task: {metric: number}} from the `Detections` of all ranks."""


def _joined(parts):
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
