"""Records in blocks of bytes that processes share, and what training asks of all of them in arrays."""

import contextlib
import copy
import gc
import numbers
import pickle
from collections.abc import Sequence

import numpy as np
import torch

from plaintrain.data.columns import AnnotationTable, RecordColumns, num_labelled
from plaintrain.structures import BoxMode

RECORD_KEYS = ("file_name", "image_id", "height", "width", "annotations")


@contextlib.contextmanager
def no_garbage_collection():
    """Switch Python's cycle collector off: millions of new objects without cycles take half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Pickled:
    """Records of any kind as bytes."""

    def __init__(self, records):
        blobs = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, blobs)], dtype=np.int64))
        self._bytes = torch.frombuffer(bytearray(b"".join(blobs) or b"\0"), dtype=torch.uint8)

    def __getitem__(self, index):
        start, end = self._ends[index : index + 2].tolist()
        return pickle.loads(self._bytes[start:end].numpy())  # noqa: S301 - bytes made above


class SerializedRecords(Sequence):
    """A list of records that cannot be changed, in blocks of bytes; indexing gives a fresh dict.

    Worker processes share the blocks instead of copying, object by object, what they touch. The
    attributes stay in the process that made them.

    Attributes:
        columns: `{"file_name": [N], "height": [N], "width": [N]}`, arrays; None if a record lacks one.
        annotations: `AnnotationTable`; None if an annotation cannot be read, or after `join` and `take`.
        lengths: how many records come from each of the parts that were joined.
        files_exist: whether the image files were looked for, and all are there.
    """

    columns = annotations = lengths = None
    files_exist = False

    def __init__(self, records):
        """records: iterable of dicts, or `RecordColumns`, which are kept as they are."""
        in_columns = isinstance(records, RecordColumns)
        if not in_columns:
            records = list(records)
        self._blocks = [records if in_columns else _Pickled(records)]
        # Block, and place in the block.
        self._places = torch.stack(
            [torch.zeros(len(records), dtype=torch.int64), torch.arange(len(records))], 1
        )
        self.columns = records.columns if in_columns else _or_none(_columns, records)
        self.annotations = records.table() if in_columns else _or_none(_annotation_table, records)
        self.lengths = [len(records)]

    @staticmethod
    def join(parts):
        """The records of several `SerializedRecords`, in their order; the bytes are shared."""
        joined, places, blocks = copy.copy(parts[0]), [], []
        for part in parts:
            places.append(part._places + torch.tensor([len(blocks), 0]))
            blocks += part._blocks
        joined._places, joined._blocks = torch.cat(places), blocks
        if all(part.columns for part in parts):
            joined.columns = {k: np.concatenate([p.columns[k] for p in parts]) for k in parts[0].columns}
        joined.lengths = [len(part) for part in parts]
        return joined

    def take(self, indices):
        """The records at some indices, an int array; the bytes are shared."""
        taken = copy.copy(self)
        taken._places = self._places[torch.from_numpy(indices)]
        taken.columns = self.columns and {key: column[indices] for key, column in self.columns.items()}
        taken.lengths = [len(indices)]
        return taken

    def have_masks(self):
        """Whether each annotation has a segmentation, bool [A], in the order of the records."""
        if len(self._blocks) == 1 and isinstance(self._blocks[0], RecordColumns) and self.annotations:
            return self._blocks[0].have_masks()
        return np.array([bool(a.get("segmentation")) for r in self for a in r["annotations"]], dtype=bool)

    def __getstate__(self):
        # What copies and other processes get.
        return {"_places": self._places, "_blocks": self._blocks}

    def __len__(self):
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        block, place = self._places[index].tolist()
        return self._blocks[block][place]


def _or_none(make, records):
    """What `make` makes of the records, or None where they are not as it needs them."""
    try:
        return make(records)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        return None


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
    """The annotations as arrays, or an error that `_or_none` knows where one is not as it must be."""
    if not all(record.keys() >= {*RECORD_KEYS} for record in records):
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
        keypoints=np.array([num_labelled(a.get("keypoints")) for a in annotations], dtype=np.int64),
    )


def _corners(boxes, modes):
    boxes = np.array(boxes) if boxes else np.zeros((0, 4))
    modes = np.array(modes)
    known = ((modes == BoxMode.XYXY_ABS) | (modes == BoxMode.XYWH_ABS)).all()
    if boxes.dtype.kind not in "biuf" or boxes.shape[1:] != (4,) or not np.isfinite(boxes).all() or not known:
        raise ValueError("a box or its mode cannot be read")
    boxes = boxes.astype(np.float64)
    boxes[:, 2:] += boxes[:, :2] * (modes == BoxMode.XYWH_ABS)[:, None]
    return boxes
