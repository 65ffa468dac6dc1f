"""Records in blocks of bytes that processes share, and what training asks of all of them in arrays."""

import contextlib
import copy
import gc
import io
import json
import numbers
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plaintrain.structures import BoxMode

_RECORD_KEYS = {"file_name", "image_id", "height", "width", "annotations"}
# What comes up where records are not as their arrays need them.
_UNREADABLE = (AttributeError, LookupError, TypeError, ValueError, OverflowError)


@contextlib.contextmanager
def disable_gc():
    """Switch Python's cycle collector off: millions of new objects without cycles take half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class AnnotationTable:
    """All annotations of a list of records, in their order: arrays of the length A."""

    record: np.ndarray  # index of the record that an annotation belongs to
    boxes: np.ndarray  # XYXY corners in pixels, float64 [A, 4]
    labels: np.ndarray  # category_id, int64
    crowd: np.ndarray  # whether it is a crowd, bool
    keypoints: np.ndarray  # number of labelled keypoints, int64


class SerializedRecords(Sequence):
    """A list of records that cannot be changed, in blocks of bytes; indexing gives a fresh dict.

    Worker processes share the blocks instead of copying, object by object, what they touch. The
    attributes stay in the process that made them.

    Attributes:
        columns: `{"file_name": [N], "height": [N], "width": [N]}`, arrays; None if a record lacks one.
        annotations: `AnnotationTable`; None if an annotation cannot be read, or after `join` and `take`.
        lengths: how many records come from each of the parts that were joined; empty if none were.
    """

    columns = annotations = None
    lengths = ()

    def __init__(self, records):
        records = list(records)
        blobs = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        ends = np.cumsum([0, *map(len, blobs)], dtype=np.int64)
        self._set_block(np.frombuffer(bytearray().join(blobs), dtype=np.uint8), ends, pickle.loads)
        with contextlib.suppress(*_UNREADABLE):
            self.columns = _columns(records)
        with contextlib.suppress(*_UNREADABLE):
            self.annotations = _annotation_table(records)

    def _set_block(self, data, ends, loads):
        # Tensors, because other processes share their memory.
        self._blocks = [(torch.from_numpy(data), loads)]
        # Block, start and end of each record.
        spans = np.stack([np.zeros_like(ends[1:]), ends[:-1], ends[1:]], axis=1)
        self._spans = torch.from_numpy(spans)

    def to_arrays(self):
        """Return the arrays to keep in a file, of records of plain data that were never joined."""
        names = json.dumps(self.columns["file_name"].tolist()).encode()
        ends = np.append(0, self._spans[:, 2].numpy())
        arrays = {"data": self._blocks[0][0].numpy(), "ends": ends, "names": np.frombuffer(names, np.uint8)}
        return {**arrays, **vars(self.annotations), **{key: self.columns[key] for key in ("height", "width")}}

    @classmethod
    def from_arrays(cls, arrays):
        """Return the records of `to_arrays`; nothing in the arrays is run."""
        records, arrays = cls.__new__(cls), dict(arrays)
        records._set_block(arrays.pop("data"), arrays.pop("ends"), _load_plain)
        names = np.array(json.loads(arrays.pop("names").tobytes()), dtype=object)
        records.columns = {"file_name": names} | {key: arrays.pop(key) for key in ("height", "width")}
        records.annotations = AnnotationTable(**arrays)
        return records

    @staticmethod
    def join(parts):
        """The records of several `SerializedRecords` with columns, in their order; the bytes are shared."""
        joined, spans, blocks = copy.copy(parts[0]), [], []
        for part in parts:
            spans.append(part._spans + torch.tensor([len(blocks), 0, 0]))
            blocks += part._blocks
        joined._spans, joined._blocks = torch.cat(spans), blocks
        joined.columns = {k: np.concatenate([p.columns[k] for p in parts]) for k in parts[0].columns}
        joined.lengths = [len(part) for part in parts]
        return joined

    def take(self, indices):
        """The records at some indices, an int array, of those with columns; the bytes are shared."""
        taken = copy.copy(self)
        taken._spans = self._spans[torch.from_numpy(indices)]
        taken.columns = {key: column[indices] for key, column in self.columns.items()}
        return taken

    def __getstate__(self):
        # What copies and other processes get.
        return {"_spans": self._spans, "_blocks": self._blocks}

    def __len__(self):
        return len(self._spans)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        block, start, end = self._spans[index].tolist()
        data, loads = self._blocks[block]
        return loads(data[start:end].numpy())


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle plain data and `BoxMode`, and nothing that could run code."""

    def find_class(self, module, name):
        if (module, name) == (BoxMode.__module__, BoxMode.__name__):
            return BoxMode
        raise pickle.UnpicklingError(f"a record must be plain data, got {module}.{name}")


def _load_plain(data):
    return _PlainUnpickler(io.BytesIO(data)).load()


def _columns(records):
    columns = {}
    for key, kind in (("file_name", str), ("height", numbers.Integral), ("width", numbers.Integral)):
        values = [record[key] for record in records]
        _check_kind(values, kind)
        columns[key] = np.array(values, dtype=object if kind is str else np.int64)
    return columns


def _check_kind(values, kind):
    if not all(issubclass(found, kind) and found is not bool for found in set(map(type, values))):
        raise TypeError(f"not all are {kind}")


def _annotation_table(records):
    """The annotations as arrays; raises one of `_UNREADABLE` where one is not as it must be."""
    if not all(record.keys() >= _RECORD_KEYS for record in records):
        raise LookupError("a key is missing")
    numbers_of = [len(record["annotations"]) for record in records]
    annotations = [annotation for record in records for annotation in record["annotations"]]
    labels = [annotation["category_id"] for annotation in annotations]
    _check_kind(labels, numbers.Integral)
    return AnnotationTable(
        record=np.repeat(np.arange(len(records)), numbers_of),
        boxes=_corners([a["bbox"] for a in annotations], [a["bbox_mode"] for a in annotations]),
        labels=np.array(labels, dtype=np.int64),
        crowd=np.array([bool(a.get("iscrowd")) for a in annotations], dtype=bool),
        keypoints=np.array([_num_labelled(a.get("keypoints")) for a in annotations], dtype=np.int64),
    )


def _num_labelled(keypoints):
    return sum(v > 0 for v in keypoints[2::3]) if keypoints else 0


def _corners(boxes, modes):
    boxes = np.array(boxes) if boxes else np.zeros((0, 4))
    modes = np.array(modes)
    known = ((modes == BoxMode.XYXY_ABS) | (modes == BoxMode.XYWH_ABS)).all()
    if boxes.dtype.kind not in "biuf" or boxes.shape[1:] != (4,) or not np.isfinite(boxes).all() or not known:
        raise ValueError("a box or its mode cannot be read")
    boxes = boxes.astype(np.float64)
    boxes[:, 2:] += boxes[:, :2] * (modes == BoxMode.XYWH_ABS)[:, None]
    return boxes
