"""How the numbers of a box and of a segmentation are to be read."""

import math
import numbers
from enum import IntEnum, unique

import numpy as np
from pycocotools import mask as coco_mask

from plaintrain.utils.errors import UserError


@unique
class BoxMode(IntEnum):
    """Box formats of a record, in absolute pixels; values are Detectron2's."""

    XYXY_ABS = 0
    XYWH_ABS = 1

    @staticmethod
    def convert(box, from_mode, to_mode):
        """A box, 4 numbers, in another mode, as a list of floats.

        Raises:
            UserError: not four finite numbers, or an unknown mode.
        """
        if len(box) != 4 or not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in box):
            raise UserError(f"a box must be four finite numbers, not {list(box)}")
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


def is_polygon(polygon):
    """Whether it is a list x, y, x, y, ... of three points or more."""
    points = isinstance(polygon, list | tuple) and len(polygon) >= 6 and len(polygon) % 2 == 0
    return points and are_numbers(polygon)


def segmentation_mistake(segmentation, height, width):
    """What is wrong with a segmentation: (kind, end of a sentence), or None.

    What has none can be read by `segmentation_to_rle` and decoded by pycocotools, which itself
    reads on past the end of a string that was cut off.
    """
    if not segmentation:
        return "bad_polygon", "has no segmentation"
    if isinstance(segmentation, list | tuple):
        wrong = [str(polygon)[:60] for polygon in segmentation if not is_polygon(polygon)]
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


# Of a run in pycocotools' strings: 5 bits each, and 32 in all.
_MAX_LETTERS = 7


def _sum_of_runs(counts):
    """Pixels that an RLE's counts cover, or None if they are malformed."""
    if isinstance(counts, list | tuple):
        right = all(isinstance(count, numbers.Integral) and count >= 0 for count in counts)
        return sum(counts) if right else None
    if not isinstance(counts, str | bytes):
        return None
    # As `rleFrString` in pycocotools' maskApi.c.
    data = counts.encode(errors="replace") if isinstance(counts, str) else counts
    letters = np.frombuffer(data, dtype=np.uint8)
    letters = letters.astype(np.int64) - 48
    if not letters.size or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        return None
    ends = np.flatnonzero(letters < 32)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > _MAX_LETTERS:
        return None
    places = 5 * (np.arange(letters.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((letters & 31) << places, starts)
    runs -= (letters[ends] >> 4) << (5 * lengths)
    # From the fourth on, a run is given by what it has more than the one but one before it.
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return None if runs.min() < 0 or runs.max() >= 2**32 else int(runs.sum())


def segmentation_to_rle(segmentation, height, width):
    """A record's segmentation as COCO's compressed run-length encoding.

    Args:
        segmentation: polygons (list of `[x, y, x, y, ...]` in pixels, whose union is meant), or an
            RLE dict `{size: [height, width], counts}` with the counts as a list, str or bytes.
        height, width: size of the image in pixels.

    Returns:
        `{"size": [height, width], "counts": bytes}`, as pycocotools takes it.

    Raises:
        UserError: what `segmentation_mistake` finds.
    """
    wrong = segmentation_mistake(segmentation, height, width)
    if wrong:
        raise UserError(f"it {wrong[1]}")
    if isinstance(segmentation, list | tuple):
        parts = coco_mask.frPyObjects([list(map(float, p)) for p in segmentation], height, width)
        return coco_mask.merge(parts)
    counts = segmentation["counts"]
    if isinstance(counts, list | tuple):
        return coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
