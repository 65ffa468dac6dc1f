"""How the four numbers of a box are to be read."""

import math
import numbers
from enum import IntEnum, unique

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
