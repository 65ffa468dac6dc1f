"""How the numbers of a box and of a segmentation are to be read."""

import math
import numbers
from enum import IntEnum, unique

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


def _check_polygons(polygons):
    for polygon in polygons:
        if not isinstance(polygon, list | tuple) or len(polygon) < 6 or len(polygon) % 2:
            raise UserError(f"a polygon must be a list x, y, x, y, ... of 3 points or more, not {polygon}")
        if not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in polygon):
            raise UserError(f"a polygon must hold finite numbers, not {polygon}")


def segmentation_to_rle(segmentation, height, width):
    """A record's segmentation as COCO's compressed run-length encoding.

    Args:
        segmentation: polygons (list of `[x, y, x, y, ...]` in pixels, whose union is meant), or an
            RLE dict `{size: [height, width], counts}` with the counts as a list, str or bytes.
        height, width: size of the image in pixels.

    Returns:
        `{"size": [height, width], "counts": bytes}`, as pycocotools takes it.

    Raises:
        UserError: a polygon of fewer than 3 points, an RLE of another size, or neither of both.
    """
    if isinstance(segmentation, list | tuple) and segmentation:
        _check_polygons(segmentation)
        parts = coco_mask.frPyObjects([list(map(float, p)) for p in segmentation], height, width)
        return coco_mask.merge(parts)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise UserError(f"a segmentation must be polygons or an RLE, not {str(segmentation)[:80]}")
    size, counts = segmentation["size"], segmentation["counts"]
    if size not in ([height, width], (height, width)):
        raise UserError(f"an RLE has the size {size}, but its image is {[height, width]}")
    if isinstance(counts, list | tuple):
        if not all(isinstance(count, numbers.Integral) and count >= 0 for count in counts):
            raise UserError(f"the counts of an RLE must be whole numbers from 0 up, not {str(counts)[:80]}")
        if sum(counts) != height * width:
            raise UserError(f"the counts of an RLE add up to {sum(counts)}, not to {height} x {width}")
        return coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    if not isinstance(counts, str | bytes):
        raise UserError(f"the counts of an RLE must be a list, a string or bytes, not {counts!r}")
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
