"""Records serialized in shared memory, with arrays of their sizes and annotations."""

import contextlib
import copy
import gc
import hashlib
import io
import json
import numbers
import os
import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from plaintrain.structures import BoxMode

_RECORD_KEYS = {"file_name", "image_id", "height", "width", "annotations"}
# Errors that malformed records raise when they are converted to arrays.
_MALFORMED = (AttributeError, LookupError, TypeError, ValueError, OverflowError)


@contextlib.contextmanager
def disable_gc() -> Iterator[None]:
    """Disable the garbage collector within the block, which halves the time to create millions of objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class AnnotationTable:
    """All annotations of a list of records, in their order: arrays of length A, and `shapes` of length N."""

    record: np.ndarray  # index of its record
    boxes: np.ndarray  # XYXY corners in pixels, float64 [A, 4]
    labels: np.ndarray  # category_id, int64
    crowd: np.ndarray  # bool
    keypoints: np.ndarray  # number of labelled keypoints, int64
    shapes: np.ndarray  # checksum of segmentations and keypoints of each record, int64
    area: np.ndarray  # as annotated, float64, NaN without one


class SerializedRecords(Sequence):
    """An immutable list of records, pickled into blocks of bytes that worker processes share.

    Indexing returns a fresh dict. Worker processes do not get the attributes.
    """

    # Arrays [N] of "file_name", "height" and "width"; None if a record is malformed.
    columns: dict[str, np.ndarray] | None = None
    # None if an annotation is malformed, and after `join` and `take`.
    annotations: AnnotationTable | None = None
    # The number of records of each list that was joined.
    lengths: Sequence[int] = ()

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        records = list(records)
        blobs = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        ends = np.cumsum([0, *map(len, blobs)], dtype=np.int64)
        self._set_block(np.frombuffer(bytearray().join(blobs), dtype=np.uint8), ends, pickle.loads)
        with contextlib.suppress(*_MALFORMED):
            self.columns = _build_columns(records)
        with contextlib.suppress(*_MALFORMED):
            self.annotations = build_annotation_table(records)

    def _set_block(self, data, ends, loads):
        # Other processes share the memory of tensors.
        self._blocks = [(torch.from_numpy(data), loads)]
        # Block, start and end of each record.
        self._spans = torch.from_numpy(np.stack([np.zeros_like(ends[1:]), ends[:-1], ends[1:]], axis=1))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save in a file; for records with annotations that were never joined."""
        columns = self._get_columns()
        names = json.dumps(columns["file_name"].tolist()).encode()
        ends = np.append(0, self._spans[:, 2].numpy())
        arrays = {"data": self._blocks[0][0].numpy(), "ends": ends, "names": np.frombuffer(names, np.uint8)}
        return {**arrays, **vars(self.annotations), "height": columns["height"], "width": columns["width"]}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "SerializedRecords":
        """Return the records of `to_arrays`, without running code from the arrays."""
        records = cls.__new__(cls)
        arrays = dict(arrays)
        records._set_block(arrays.pop("data"), arrays.pop("ends"), _load_plain)
        names = np.array(json.loads(arrays.pop("names").tobytes()), dtype=object)
        records.columns = {"file_name": names} | {key: arrays.pop(key) for key in ("height", "width")}
        records.annotations = AnnotationTable(**arrays)
        return records

    def compute_hashes(self) -> list[Any]:
        """Return [number of records, hash of the images, hash of the annotations], wherever the folder is."""
        hashes = ["", ""]
        if self.columns:
            names = self.columns["file_name"].tolist()
            start = len(os.path.commonprefix(names).rpartition("/")[0])
            text = json.dumps([name[start:] for name in names]).encode()
            hashes[0] = _hash([np.frombuffer(text, np.uint8), self.columns["height"], self.columns["width"]])
        if self.annotations:
            hashes[1] = _hash(vars(self.annotations).values())
        return [len(self), *hashes]

    @staticmethod
    def join(datasets: Sequence["SerializedRecords"]) -> "SerializedRecords":
        """Concatenate records that have columns, without copying their bytes."""
        joined = copy.copy(datasets[0])
        spans = []
        joined._blocks = []
        for records in datasets:
            spans.append(records._spans + torch.tensor([len(joined._blocks), 0, 0]))
            joined._blocks += records._blocks
        joined._spans = torch.cat(spans)
        columns = [records._get_columns() for records in datasets]
        joined.columns = {key: np.concatenate([c[key] for c in columns]) for key in columns[0]}
        joined.lengths = [len(records) for records in datasets]
        return joined

    def take(self, indices: np.ndarray) -> "SerializedRecords":
        """Return the records at some indices, without copying their bytes; they must have columns."""
        taken = copy.copy(self)
        taken._spans = self._spans[torch.from_numpy(indices)]
        taken.columns = {key: column[indices] for key, column in self._get_columns().items()}
        return taken

    def _get_columns(self) -> dict[str, np.ndarray]:
        if self.columns is None:
            raise ValueError("a record has no valid file_name, height and width")
        return self.columns

    def __getstate__(self):
        # Copies and other processes get only these.
        return {"_spans": self._spans, "_blocks": self._blocks}

    def __len__(self):
        return len(self._spans)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        block, start, end = self._spans[index].tolist()
        data, loads = self._blocks[block]
        return loads(data[start:end].numpy())


def serialize(records: Iterable[dict[str, Any]]) -> SerializedRecords:
    """Return the records as `SerializedRecords`, without a copy if they already are."""
    return records if isinstance(records, SerializedRecords) else SerializedRecords(records)


def _hash(arrays):
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of plain data and `BoxMode` that rejects all that could run code."""

    def find_class(self, module, name):
        if (module, name) == (BoxMode.__module__, BoxMode.__name__):
            return BoxMode
        raise pickle.UnpicklingError(f"a record must be plain data, got {module}.{name}")


def _load_plain(data):
    return _PlainUnpickler(io.BytesIO(data)).load()


def _build_columns(records):
    columns = {}
    for key, value_type in (("file_name", str), ("height", numbers.Integral), ("width", numbers.Integral)):
        values = [record[key] for record in records]
        _check_types(values, value_type)
        columns[key] = np.array(values, dtype=object if value_type is str else np.int64)
    return columns


def _check_types(values, expected):
    if not all(issubclass(actual, expected) and actual is not bool for actual in set(map(type, values))):
        raise TypeError(f"not all are {expected}")


def build_annotation_table(records: Sequence[dict[str, Any]]) -> AnnotationTable:
    """Return the annotations as arrays; raise one of `_MALFORMED` if one is malformed."""
    if not all(record.keys() >= _RECORD_KEYS for record in records):
        raise LookupError("a key is missing")
    lengths = [len(record["annotations"]) for record in records]
    annotations = [annotation for record in records for annotation in record["annotations"]]
    labels = [annotation["category_id"] for annotation in annotations]
    _check_types(labels, numbers.Integral)
    areas = [np.nan if a.get("area") is None else a["area"] for a in annotations]
    _check_types(areas, numbers.Real)
    if np.isfinite(areas).sum() < sum(a.get("area") is not None for a in annotations):
        raise ValueError("an area is not finite")
    keypoints = [annotation.get("keypoints") or () for annotation in annotations]
    shapes = [[(a.get("segmentation"), a.get("keypoints")) for a in r["annotations"]] for r in records]
    return AnnotationTable(
        record=np.repeat(np.arange(len(records)), lengths),
        boxes=_convert_to_xyxy([a["bbox"] for a in annotations], [a["bbox_mode"] for a in annotations]),
        labels=np.array(labels, dtype=np.int64),
        crowd=np.array([bool(a.get("iscrowd")) for a in annotations], dtype=bool),
        keypoints=np.array([sum(v > 0 for v in points[2::3]) for points in keypoints], dtype=np.int64),
        shapes=np.array([zlib.crc32(pickle.dumps(shape, protocol=4)) for shape in shapes], dtype=np.int64),
        area=np.array(areas, dtype=np.float64),
    )


def _convert_to_xyxy(boxes, modes):
    boxes = np.array(boxes) if boxes else np.zeros((0, 4))
    modes = np.array(modes)
    known = ((modes == BoxMode.XYXY_ABS) | (modes == BoxMode.XYWH_ABS)).all()
    if boxes.dtype.kind not in "biuf" or boxes.shape[1:] != (4,) or not np.isfinite(boxes).all() or not known:
        raise ValueError("a box or its mode is malformed")
    boxes = boxes.astype(np.float64)
    boxes[:, 2:] += boxes[:, :2] * (modes == BoxMode.XYWH_ABS)[:, None]
    return boxes
