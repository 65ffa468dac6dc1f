"""The records of a COCO file as a few long arrays: shared by processes, kept in a file without pickle."""

import json
import os
import re
from array import array
from dataclasses import dataclass

import numpy as np
import torch

from plaintrain.structures import BoxMode, make_record
from plaintrain.utils.files import is_below

_XYWH = BoxMode.XYWH_ABS
# What is kept as JSON; polygons only where they are none.
_RARE = ("keypoints", "score", "difficult")
# name -> dtype and number of dimensions.
_KINDS = {
    # Of each record `["FILE", ID, HEIGHT, WIDTH],` one after the other, and the end of each, from 0 [N + 1].
    "heads": ("|u1", 1),
    "head_ends": ("<i8", 1),
    # The number of annotations before each record [N + 1].
    "ends": ("<i8", 1),
    # Of each annotation: x, y, w, h [A, 4]; NaN for no area; number of labelled keypoints.
    "boxes": ("<f8", 2),
    "labels": ("<i8", 1),
    "crowd": ("|u1", 1),
    "areas": ("<f8", 1),
    "keypoints": ("<i8", 1),
    # The number of polygons before each annotation [A + 1], of numbers before each polygon, and the numbers.
    "polygons": ("<i8", 1),
    "polygon_ends": ("<i8", 1),
    "points": ("<f8", 1),
    # JSON of what is rare in an annotation, or nothing, and the ends [A + 1].
    "rest": ("|u1", 1),
    "rest_ends": ("<i8", 1),
}


@dataclass(frozen=True)
class AnnotationTable:
    """All annotations of a list of records, in their order."""

    # Index of the record that an annotation belongs to, [A].
    record: np.ndarray
    # XYXY corners in pixels, float64 [A, 4].
    boxes: np.ndarray
    # category_id, int64 [A].
    labels: np.ndarray
    # Whether it is a crowd, bool [A].
    crowd: np.ndarray
    # Number of labelled keypoints, int64 [A].
    keypoints: np.ndarray


class RecordColumns:
    """Records whose boxes are XYWH_ABS, made again from arrays when they are asked for.

    The numbers of boxes, areas and polygons come back as floats, whole ones too.

    Attributes:
        columns: `{"file_name": [N], "height": [N], "width": [N]}`, arrays.
    """

    def __init__(self, arrays, image_root):
        """
        Args:
            arrays: what `to_columns` has made.
            image_root: folder that the file names start from.

        Raises:
            ValueError, TypeError: arrays that do not fit together, or a file name that leaves the folder.
        """
        _check(arrays)
        self.columns = _columns(arrays, image_root)
        self._tensors = {name: torch.from_numpy(arrays[name]) for name in _KINDS}
        self._root, self._arrays = image_root, arrays

    def __getstate__(self):
        # Other processes share the memory of tensors.
        return {"_tensors": self._tensors, "_root": self._root}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._arrays = {name: tensor.numpy() for name, tensor in self._tensors.items()}

    def __len__(self):
        return len(self._arrays["ends"]) - 1

    def __getitem__(self, index):
        a = self._arrays
        start, end = a["head_ends"][index : index + 2].tolist()
        name, image_id, height, width = json.loads(a["heads"][start : end - 1].tobytes())
        first, last = a["ends"][index : index + 2].tolist()
        boxes, labels, crowd, areas = (
            a[key][first:last].tolist() for key in ("boxes", "labels", "crowd", "areas")
        )
        rest, annotations = a["rest_ends"][first : last + 1].tolist(), []
        for i, box in enumerate(boxes):
            one = {"bbox": box, "bbox_mode": _XYWH, "category_id": labels[i], "iscrowd": crowd[i]}
            if areas[i] == areas[i]:
                one["area"] = areas[i]
            if rest[i + 1] > rest[i]:
                one |= json.loads(a["rest"][rest[i] : rest[i + 1]].tobytes())
            annotations.append(one)
        self._add_polygons(annotations, a["polygons"][first : last + 1].tolist())
        return make_record(os.path.join(self._root, name), image_id, height, width, annotations)

    def _add_polygons(self, annotations, polygons):
        ends = self._arrays["polygon_ends"][polygons[0] : polygons[-1] + 1].tolist()
        points = self._arrays["points"][ends[0] : ends[-1]].tolist()
        for annotation, first, last in zip(annotations, polygons, polygons[1:], strict=False):
            if last > first:
                spans = ends[first - polygons[0] : last - polygons[0] + 1]
                annotation["segmentation"] = [
                    points[i - ends[0] : j - ends[0]] for i, j in zip(spans, spans[1:], strict=False)
                ]

    def table(self):
        """The `AnnotationTable`."""
        a, boxes = self._arrays, self._arrays["boxes"].copy()
        boxes[:, 2:] += boxes[:, :2]
        record = np.repeat(np.arange(len(self)), np.diff(a["ends"]))
        return AnnotationTable(record, boxes, a["labels"], a["crowd"] > 0, a["keypoints"])

    def have_masks(self):
        """Whether each annotation has a segmentation, bool [A]."""
        a = self._arrays
        found = np.diff(a["polygons"]) > 0
        places = [match.start() for match in re.finditer(b'"segmentation"', a["rest"].tobytes())]
        found[np.searchsorted(a["rest_ends"], places, side="right") - 1] = True
        return found


def _columns(arrays, image_root):
    heads = json.loads(b"[" + arrays["heads"].tobytes()[:-1] + b"]")
    for name, *_ in heads:
        if os.path.isabs(name) or not is_below("", name):
            raise ValueError(f"{name} leaves the images' folder")
    sizes = np.array([head[2:] for head in heads], dtype=np.int64).reshape(len(arrays["ends"]) - 1, 2)
    names = np.array([os.path.join(image_root, head[0]) for head in heads], dtype=object)
    return {"file_name": names, "height": sizes[:, 0], "width": sizes[:, 1]}


def _check(arrays):
    """Refuse, with a `ValueError`, arrays by which a record would be made of what is another's."""
    kinds = {name: (array.dtype.str, array.ndim) for name, array in arrays.items()}
    size = {name: len(array) for name, array in arrays.items() if array.ndim}
    right = kinds == _KINDS and all(size[f"{name}ends"] for name in ("", "head_", "polygon_", "rest_"))
    if right:
        number = size["labels"]
        ends = {"head_ends": size["heads"], "ends": number, "rest_ends": size["rest"]}
        ends |= {"polygon_ends": size["points"], "polygons": size["polygon_ends"] - 1}
        for name, last in ends.items():
            array = arrays[name]
            right &= array[:1] == 0 and array[-1:] == last and (array[1:] >= array[:-1]).all()
        right &= arrays["boxes"].shape == (number, 4) and size["head_ends"] == size["ends"]
        right &= {size[name] for name in ("crowd", "areas", "keypoints")} == {number}
        right &= size["polygons"] == size["rest_ends"] == number + 1
    if not right:
        raise ValueError("its columns do not fit together")


def to_columns(records, image_root):
    """The arrays of `RecordColumns` for records that `load_coco_json` has read from a folder of images.

    Raises:
        ValueError, OverflowError: an image outside the folder, or a number that is none of 64 bits.
    """
    annotations = [annotation for record in records for annotation in record["annotations"]]
    heads, head_ends = _joined([_head(record, image_root) for record in records])
    polygons, polygon_ends, points, rest = _split_segmentations(annotations)
    rest, rest_ends = _joined(rest)
    lengths = [0, *(len(record["annotations"]) for record in records)]
    areas = [a.get("area", float("nan")) for a in annotations]
    keypoints = [num_labelled(a.get("keypoints")) for a in annotations]
    found = {
        "ends": np.cumsum(lengths),
        "boxes": np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4),
        "labels": [a["category_id"] for a in annotations],
        "crowd": [a["iscrowd"] for a in annotations],
    }
    found |= {"heads": heads, "head_ends": head_ends, "areas": areas, "keypoints": keypoints}
    found |= {"polygons": polygons, "polygon_ends": polygon_ends, "points": points}
    found |= {"rest": rest, "rest_ends": rest_ends}
    return {name: np.asarray(found[name], dtype=kind) for name, (kind, _) in _KINDS.items()}


def _head(record, image_root):
    name = record["file_name"][len(os.path.join(image_root, "")) :]
    if os.path.join(image_root, name) != record["file_name"]:
        raise ValueError(f"{record['file_name']} is not in {image_root}")
    return json.dumps([name, record["image_id"], record["height"], record["width"]]) + ","


def num_labelled(keypoints):
    """The number of labelled ones in `[x, y, v, ...]` or None."""
    return sum(v > 0 for v in keypoints[2::3]) if keypoints else 0


def _joined(texts):
    """Texts one after the other, uint8, and where each ends, from 0, int64."""
    texts = [text.encode("ascii") for text in texts]
    return np.frombuffer(bytearray(b"".join(texts)), dtype=np.uint8), np.cumsum([0, *map(len, texts)])


def _split_segmentations(annotations):
    """What `_KINDS` calls polygons, polygon_ends and points, and the texts of the rest."""
    points, ends, polygons, rest = array("d"), array("q", [0]), array("q", [0]), []
    for annotation in annotations:
        kept = {key: annotation[key] for key in _RARE if key in annotation}
        if (segmentation := annotation.get("segmentation")) is not None:
            before = len(points), len(ends)
            try:
                _append(segmentation, points, ends)
            except (TypeError, OverflowError):
                del points[before[0] :], ends[before[1] :]
                kept["segmentation"] = segmentation
        polygons.append(len(ends) - 1)
        rest.append(json.dumps(kept) if kept else "")
    return polygons, ends, points, rest


def _append(segmentation, points, ends):
    """Add polygons; a TypeError or OverflowError, and some of them added, if they are none."""
    if type(segmentation) is not list:
        raise TypeError("it is an RLE")
    for polygon in segmentation:
        if type(polygon) is not list:
            raise TypeError("it holds other things than lists")
        points.extend(polygon)
        ends.append(len(points))
