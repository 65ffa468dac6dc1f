"""How the four numbers of a box are to be read."""

import math
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
        if len(box) != 4 or not all(math.isfinite(value) for value in box):
            raise UserError(f"a box must be four finite numbers, not {list(box)}")
        x, y, third, fourth = (float(value) for value in box)
        modes = BoxMode(from_mode), BoxMode(to_mode)
        if modes == (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
            return [x, y, x + third, y + fourth]
        if modes == (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            return [x, y, third - x, fourth - y]
        return [x, y, third, fourth]
