"""Box formats, segmentations as RLE, and masks in the frame of their boxes."""

import math
import numbers
import re
from dataclasses import dataclass
from enum import IntEnum, unique

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.ops import roi_align

from plaintrain.utils.errors import UserError

_THRESHOLD = 0.5


@unique
class BoxMode(IntEnum):
    """Box formats of a record, in absolute pixels; values are Detectron2's."""

    XYXY_ABS = 0
    XYWH_ABS = 1

    @staticmethod
    def convert(box, from_mode, to_mode):
        """Return a box, 4 numbers, in another mode, as a list of floats."""
        if not is_box(box):
            raise UserError(f"a box must be four finite numbers, not {box!r}")
        for mode in (from_mode, to_mode):
            if mode not in tuple(BoxMode):
                raise UserError(f"bbox_mode must be one of {', '.join(map(str, BoxMode))}, not {mode!r}")
        x, y, third, fourth = (float(value) for value in box)
        modes = BoxMode(from_mode), BoxMode(to_mode)
        if modes == (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
            return [x, y, x + third, y + fourth]
        if modes == (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            return [x, y, third - x, fourth - y]
        return [x, y, third, fourth]


def is_box(box):
    """Return whether a value holds four finite numbers."""
    try:
        a, b, c, d = box
        return math.isfinite(a + b + c + d)
    except (TypeError, ValueError, OverflowError):
        return False


def make_record(file_name, image_id, height, width, annotations=()):
    """A record of a dataset, with a list of annotations of its own."""
    size = {"height": height, "width": width}
    return {"file_name": file_name, "image_id": image_id, **size, "annotations": list(annotations)}


def are_numbers(values):
    """Whether a list or tuple holds nothing but finite numbers."""
    try:
        kinds = set(map(type, values))
        known = kinds <= {int, float} or all(issubclass(kind, numbers.Real) for kind in kinds)
        return known and math.isfinite(sum(values))
    except OverflowError:
        return False


def _is_polygon(polygon):
    points = isinstance(polygon, list | tuple) and len(polygon) >= 6 and len(polygon) % 2 == 0
    return points and are_numbers(polygon)


def find_segmentation_problem(segmentation, height, width):
    """What is wrong with a segmentation: (kind, end of a sentence), or None.

    What has none can be read by `encode_segmentation` and decoded by pycocotools, which itself
    reads on past the end of a string that was cut off.
    """
    if not segmentation:
        return "bad_polygon", "has no segmentation"
    if isinstance(segmentation, list | tuple):
        wrong = [str(polygon)[:60] for polygon in segmentation if not _is_polygon(polygon)]
        what = "has a polygon that is no list x, y, x, y, ... of 3 finite points or more: "
        if wrong:
            return "bad_polygon", what + wrong[0]
        reach = max(max(map(abs, polygon)) for polygon in segmentation)
        if reach > 10 * (height + width):
            # pycocotools takes memory for the length of its outline.
            return "bad_polygon", f"has a polygon that reaches to {reach:g}, far outside its image"
        return None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "bad_rle", f"has a segmentation that is neither polygons nor an RLE: {str(segmentation)[:60]}"
    size = segmentation["size"]
    if size not in ([height, width], (height, width)):
        return "bad_rle", f"has an RLE of the size {size}, but its image is {[height, width]}"
    if _sum_of_runs(segmentation["counts"]) != height * width:
        return "bad_rle", f"has an RLE whose counts do not add up to {height} x {width}"
    return None


# Runs in pycocotools' strings: 32 bits each at most, 5 in a letter, whose sixth says that more follow.
_RUNS = re.compile(rb"(?:[P-o]{0,6}+[0-O])++")


def _sum_of_runs(counts):
    """Pixels that an RLE's counts cover, or None if they are malformed."""
    if isinstance(counts, list | tuple):
        right = all(isinstance(count, numbers.Integral) and count >= 0 for count in counts)
        return sum(counts) if right else None
    if not isinstance(counts, str | bytes):
        return None
    # As `rleFrString` in pycocotools' maskApi.c.
    data = counts.encode(errors="replace") if isinstance(counts, str) else counts
    if not _RUNS.fullmatch(data):
        return None
    letters = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(letters < 32)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    places = 5 * (np.arange(letters.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((letters & 31) << places, starts)
    runs -= (letters[ends] >> 4) << (5 * lengths)
    # From the fourth on, a run is given by what it has more than the one but one before it.
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return None if runs.min() < 0 or runs.max() >= 2**32 else int(runs.sum())


def encode_segmentation(segmentation, height, width):
    """Return a record's segmentation as COCO's compressed RLE, `{"size": [height, width], "counts": bytes}`.

    Args:
        segmentation: polygons (list of `[x, y, x, y, ...]` in pixels, whose union is meant), or an
            RLE dict `{size: [height, width], counts}` with the counts as a list, str or bytes.
    """
    mistake = find_segmentation_problem(segmentation, height, width)
    if mistake:
        raise UserError(f"it {mistake[1]}")
    if isinstance(segmentation, list | tuple):
        parts = coco_mask.frPyObjects([list(map(float, p)) for p in segmentation], height, width)
        return coco_mask.merge(parts)
    counts = segmentation["counts"]
    if isinstance(counts, list | tuple):
        return coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}


@dataclass(frozen=True)
class BoxMasks:
    """The masks of an image that are not pasted into it yet: N small ones instead of N of its size."""

    # Of each box's inside, [N, 1, M, M].
    probabilities: torch.Tensor
    # XYXY in the image's pixels, [N, 4].
    boxes: torch.Tensor
    height: int
    width: int
    # Whether masks lie in their boxes as Detectron2's do; otherwise as torchvision's.
    aligned: bool = True

    @property
    def shape(self):
        return len(self.boxes), self.height, self.width

    @property
    def device(self):
        return self.boxes.device

    @property
    def is_cuda(self):
        return self.boxes.is_cuda

    def to(self, device, non_blocking=False):
        """The same on another device, as `torch.Tensor.to`."""
        parts = (part.to(device, non_blocking=non_blocking) for part in (self.probabilities, self.boxes))
        return BoxMasks(*parts, self.height, self.width, self.aligned)

    def paste(self):
        """Return the pixels of a probability of at least 0.5, bool `[N, height, width]`, made box by box."""
        pasted = torch.zeros(self.shape, dtype=torch.bool, device=self.boxes.device)
        for target, (inside, top, left) in zip(pasted, self._windows(), strict=True):
            height, width = inside.shape
            target[top : top + height, left : left + width] = inside
        return pasted

    def encode(self):
        """The counts of each pasted mask's compressed RLE, a list of N bytes; nothing is pasted for it."""
        size = self.height, self.width
        found = [{"size": size, "counts": _runs(*window, *size)} for window in self._windows()]
        return [rle["counts"] for rle in coco_mask.frPyObjects(found, *size)] if found else []

    def _windows(self):
        """Yield each mask's pixels in a window of the image, bool `[h, w]`, and the window's top and left."""
        masks, boxes = self.probabilities, self.boxes
        if self.aligned:
            # No pixel whose centre lies outside of the box has a probability above 0.5.
            corners = torch.cat([(boxes[:, :2] - 0.5).ceil(), (boxes[:, 2:] - 0.5).floor()], dim=1)
        else:
            masks, scale = expand_masks(masks, padding=1)
            corners = expand_boxes(boxes, scale)
        corners = corners.long().tolist()  # sync point
        for mask, box, (x0, y0, x1, y1) in zip(masks, boxes, corners, strict=True):
            top, left = max(y0, 0), max(x0, 0)
            bottom, right = max(min(y1 + 1, self.height), top), max(min(x1 + 1, self.width), left)
            if self.aligned:
                yield _sample(mask, box, (left, top, right, bottom)) >= _THRESHOLD, top, left
                continue
            size = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
            inside = F.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)[0, 0]
            yield inside[top - y0 : bottom - y0, left - x0 : right - x0] > _THRESHOLD, top, left


def _sample(mask, box, window):
    """A mask `[1, M, M]` of a box at the centres of a window's pixels; between them linear, around it 0."""
    left, top, right, bottom = window
    x = torch.arange(left, right, device=box.device) + 0.5
    y = torch.arange(top, bottom, device=box.device) + 0.5
    # The box reaches from -1 to 1.
    x, y = (x - box[0]) / (box[2] - box[0]) * 2 - 1, (y - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return F.grid_sample(mask[None].to(grid), grid[None], align_corners=False)[0, 0]


def sample_masks(masks, boxes, index, side, aligned=True):
    """Return the training targets of a mask head; those of aligned masks are thresholded, as in Detectron2.

    Args:
        masks: `[G, H, W]`, 0 or 1.
        boxes: `[N, 4]`, XYXY, in the masks' pixels.
        index: int64 `[N]`, the mask of each box.
        side: M, cells along a side of a box.
        aligned: as in `BoxMasks`.

    Returns:
        `[N, M, M]`, 0 or 1, or in 0..1.
    """
    rois = torch.cat([index[:, None].to(boxes), boxes], dim=1)
    covered = roi_align(masks[:, None].to(rois), rois, (side, side), aligned=aligned)[:, 0]
    return (covered >= _THRESHOLD).to(covered) if aligned else covered


def _runs(inside, top, left, height, width):
    """The lengths of the runs, first of zeros, of an image's mask that lies in a window, column by column."""
    rows, columns = inside.shape
    whole = np.zeros((columns, height), dtype=bool)
    whole[:, top : top + rows] = inside.cpu().numpy().T
    changes = left * height + np.flatnonzero(np.diff(whole.ravel(), prepend=False, append=False))
    runs = np.diff(changes, prepend=0, append=height * width)
    return runs if runs[-1] else runs[:-1]


def encode_masks(masks):
    """Return the counts (bytes) of the compressed RLE of each mask of a bool or uint8 tensor `[N, H, W]`."""
    # pycocotools wants [H, W, N] in Fortran's order, which is [N, W, H] in C's.
    columns = masks.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return [rle["counts"] for rle in coco_mask.encode(columns.transpose(2, 1, 0))]
