"""Box formats, segmentations as RLE, and masks relative to their boxes."""

import math
import numbers
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.ops import roi_align

from plaintrain.utils.errors import UserError

# As in a package, a name that is missing is looked up by the finder of `utils.unsupported`.
__path__: list[str] = []
_THRESHOLD = 0.5


class BoxMode(IntEnum):
    """Box formats, with the values of Detectron2; a record has one of the first two, in absolute pixels."""

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2
    XYWH_REL = 3
    XYWHA_ABS = 4

    @staticmethod
    def convert(box: Any, from_mode: "BoxMode", to_mode: "BoxMode") -> Any:
        """Return a box, or an array or tensor `[N, 4]` of boxes with its dtype, in another format."""
        for mode in (from_mode, to_mode):
            if mode not in BOX_MODES:
                raise UserError(f"bbox_mode must be one of {BOX_MODES}, got {mode!r}")
        sign = int(from_mode) - int(to_mode)
        if isinstance(box, np.ndarray | Tensor) and box.ndim == 2 and box.shape[1] == 4:
            boxes: Any = box.clone() if isinstance(box, Tensor) else box.copy()
            # In place, which keeps the dtype.
            if sign > 0:
                boxes[:, 2:] += box[:, :2]
            elif sign < 0:
                boxes[:, 2:] -= box[:, :2]
            return boxes
        if not is_box(box):
            raise UserError(f"a box must be four finite numbers, got {box!r}")
        x, y, third, fourth = (float(value) for value in box)
        converted = [x, y, third + sign * x, fourth + sign * y]
        return tuple(converted) if isinstance(box, tuple) else converted


# What a record may have.
BOX_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def is_box(box: Any) -> bool:
    """Return whether a value holds four finite numbers."""
    try:
        a, b, c, d = box
        return math.isfinite(a + b + c + d)
    except (TypeError, ValueError, OverflowError):
        return False


def make_record(
    file_name: str, image_id: int | str, height: int, width: int, annotations: Iterable[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return a record of a dataset, with a new list of the annotations."""
    size = {"height": height, "width": width}
    return {"file_name": file_name, "image_id": image_id, **size, "annotations": list(annotations)}


def are_numbers(values: Sequence[Any]) -> bool:
    """Return whether a list or tuple holds only finite numbers."""
    try:
        types = set(map(type, values))
        are_real = types <= {int, float} or all(issubclass(type_, numbers.Real) for type_ in types)
        return are_real and math.isfinite(sum(values))
    except OverflowError:
        return False


def _is_polygon(polygon: Any) -> bool:
    has_points = isinstance(polygon, list | tuple) and len(polygon) >= 6 and len(polygon) % 2 == 0
    return has_points and are_numbers(polygon)


def find_segmentation_problem(segmentation: Any, height: int, width: int) -> tuple[str, str] | None:
    """Return (problem type, description) of a segmentation that `encode_segmentation` rejects, or None.

    pycocotools itself does not check its input and reads beyond the end of a truncated string.
    """
    if not segmentation:
        return "bad_polygon", "has no segmentation"
    if isinstance(segmentation, list | tuple):
        wrong = [str(polygon)[:60] for polygon in segmentation if not _is_polygon(polygon)]
        if wrong:
            expected = "a list [x, y, x, y, ...] of 3 finite points or more"
            return "bad_polygon", f"has a polygon that must be {expected}, got {wrong[0]}"
        largest = max(max(map(abs, polygon)) for polygon in segmentation)
        if largest > 10 * (height + width):
            # pycocotools allocates memory in proportion to the length of the outline.
            return "bad_polygon", f"has a polygon with the coordinate {largest:g}, far outside its image"
        return None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "bad_rle", f"has a segmentation that is neither polygons nor an RLE: {str(segmentation)[:60]}"
    size = segmentation["size"]
    if size not in ([height, width], (height, width)):
        return "bad_rle", f"has an RLE of the size {size}, but the image has {[height, width]}"
    if _count_pixels(segmentation["counts"]) != height * width:
        return "bad_rle", f"has an RLE whose counts do not add up to {height} x {width}"
    return None


# Runs in pycocotools' strings: at most 32 bits, 5 per character; a sixth bit marks a continuation.
_RUNS = re.compile(rb"(?:[P-o]{0,6}+[0-O])++")


def _count_pixels(counts: Any) -> int | None:
    """Return the number of pixels of an RLE's counts, or None if they are malformed."""
    if isinstance(counts, list | tuple):
        are_integers = all(isinstance(count, numbers.Integral) for count in counts)
        return sum(counts) if are_integers and min(counts, default=0) >= 0 else None
    if not isinstance(counts, str | bytes):
        return None
    # The format of `rleFrString` in pycocotools' maskApi.c.
    data = counts.encode(errors="replace") if isinstance(counts, str) else counts
    if not _RUNS.fullmatch(data):
        return None
    letters = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(letters < 32)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    shifts = 5 * (np.arange(letters.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((letters & 31) << shifts, starts)
    runs -= (letters[ends] >> 4) << (5 * lengths)
    # From the fourth on, a run is stored as the difference to the one two before it.
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return None if runs.min() < 0 or runs.max() >= 2**32 else int(runs.sum())


def encode_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return a segmentation as COCO's compressed RLE, {"size": [height, width], "counts": bytes}.

    It may be a union of polygons `[x, y, x, y, ...]` in pixels, or an RLE with counts as list, str or bytes.
    """
    problem = find_segmentation_problem(segmentation, height, width)
    if problem:
        raise UserError(f"it {problem[1]}")
    if isinstance(segmentation, list | tuple):
        polygons = coco_mask.frPyObjects([list(map(float, p)) for p in segmentation], height, width)
        return coco_mask.merge(polygons)
    counts = segmentation["counts"]
    if isinstance(counts, list | tuple):
        return coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}


@dataclass(frozen=True)
class BoxMasks:
    """Masks of an image before pasting: N small ones, relative to their boxes.

    Attributes:
        probabilities: `[N, 1, M, M]`, inside each box.
        boxes: `[N, 4]`, XYXY, in pixels of the image.
        aligned: masks are sampled as in Detectron2, otherwise as in torchvision.
    """

    probabilities: Tensor
    boxes: Tensor
    height: int
    width: int
    aligned: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.boxes), self.height, self.width

    @property
    def device(self) -> torch.device:
        return self.boxes.device

    @property
    def is_cuda(self) -> bool:
        return self.boxes.is_cuda

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "BoxMasks":
        probabilities = self.probabilities.to(device, non_blocking=non_blocking)
        boxes = self.boxes.to(device, non_blocking=non_blocking)
        return BoxMasks(probabilities, boxes, self.height, self.width, self.aligned)

    def paste(self) -> Tensor:
        """Return the masks, bool `[N, height, width]`, of the pixels with a probability of at least 0.5."""
        pasted = torch.zeros(self.shape, dtype=torch.bool, device=self.boxes.device)
        for target, (inside, top, left) in zip(pasted, self._windows(), strict=True):
            height, width = inside.shape
            target[top : top + height, left : left + width] = inside
        return pasted

    def encode(self) -> list[bytes]:
        """Return the counts of each mask's compressed RLE, without pasting."""
        size = (self.height, self.width)
        masks = [{"size": size, "counts": _compute_runs(*window, *size)} for window in self._windows()]
        return [rle["counts"] for rle in coco_mask.frPyObjects(masks, *size)] if masks else []

    def _windows(self) -> Iterator[tuple[Tensor, int, int]]:
        """Yield each mask as bool `[h, w]` in a window of the image, and the window's top and left."""
        masks = self.probabilities
        boxes = self.boxes
        if self.aligned:
            # Pixels with their centre outside the box have a probability below 0.5.
            corners = torch.cat([(boxes[:, :2] - 0.5).ceil(), (boxes[:, 2:] - 0.5).floor()], dim=1)
        else:
            masks, scale = expand_masks(masks, padding=1)
            corners = expand_boxes(boxes, scale)
        windows = corners.long().tolist()  # device sync
        for mask, box, (x0, y0, x1, y1) in zip(masks, boxes, windows, strict=True):
            top = max(y0, 0)
            left = max(x0, 0)
            bottom = max(min(y1 + 1, self.height), top)
            right = max(min(x1 + 1, self.width), left)
            if self.aligned:
                yield _sample_mask(mask, box, (left, top, right, bottom)) >= _THRESHOLD, top, left
                continue
            size = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
            inside = F.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)[0, 0]
            yield inside[top - y0 : bottom - y0, left - x0 : right - x0] > _THRESHOLD, top, left


def _sample_mask(mask: Tensor, box: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """Interpolate a mask `[1, M, M]` linearly at the pixel centres of a window; outside its box it is 0."""
    left, top, right, bottom = window
    # In the coordinates of grid_sample the box is from -1 to 1.
    x = (torch.arange(left, right, device=box.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(top, bottom, device=box.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return F.grid_sample(mask[None].to(grid), grid[None], align_corners=False)[0, 0]


def sample_masks(masks: Tensor, boxes: Tensor, index: Tensor, side: int, aligned: bool = True) -> Tensor:
    """Return the targets of a mask head, `[N, side, side]`: 0 or 1 if aligned (Detectron2), else in [0, 1].

    `masks` are `[G, H, W]`, `boxes` are XYXY `[N, 4]` in their pixels, `index` `[N]` is the mask of each box.
    """
    rois = torch.cat([index[:, None].to(boxes), boxes], dim=1)
    covered = roi_align(masks[:, None].to(rois), rois, (side, side), aligned=aligned)[:, 0]
    return (covered >= _THRESHOLD).to(covered) if aligned else covered


def _compute_runs(mask: Tensor, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Return the run lengths, zeros first, in column order, of an image's mask from its window."""
    num_rows, num_columns = mask.shape
    columns = np.zeros((num_columns, height), dtype=bool)
    columns[:, top : top + num_rows] = mask.cpu().numpy().T
    changes = left * height + np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False))
    runs = np.diff(changes, prepend=0, append=height * width)
    return runs if runs[-1] else runs[:-1]


def encode_masks(masks: Tensor) -> list[bytes]:
    """Return the counts of each mask's compressed RLE, for bool or uint8 masks `[N, H, W]`."""
    # pycocotools expects [H, W, N] in Fortran order, which is [N, W, H] in C order.
    columns = masks.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return [rle["counts"] for rle in coco_mask.encode(columns.transpose(2, 1, 0))]
