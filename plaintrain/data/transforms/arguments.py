"""Checks of an augmentation's arguments, which may come from a config: lists become tuples."""

import math
import numbers

from plaintrain.utils.errors import UserError


def _is_number(value, low, high, whole=False):
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    return math.isfinite(value) and low <= value <= high


def _bounds(low, high):
    return f"of at least {low}" if high == math.inf else f"from {low} to {high}"


def check_number(augmentation, name, low, high=math.inf, *, whole=False):
    """Refuse an attribute that is not a number from `low` to `high`."""
    value = getattr(augmentation, name)
    if not _is_number(value, low, high, whole):
        kind = "whole number" if whole else "number"
        raise UserError(f"{name} must be a {kind} {_bounds(low, high)}, not {value!r}")


def check_list(augmentation, name, low, high=math.inf, *, count=None, whole=False):
    """Refuse an attribute that is not a list of `count` (or any) numbers; make it a tuple."""
    value = getattr(augmentation, name)
    right = isinstance(value, list | tuple) and len(value) == (count or len(value)) > 0
    if not right or not all(_is_number(item, low, high, whole) for item in value):
        kind = f"{count or 'a list of'} {'whole ' if whole else ''}numbers"
        raise UserError(f"{name} must be {kind} {_bounds(low, high)}, not {value!r}")
    object.__setattr__(augmentation, name, tuple(value))


def check_range(augmentation, name, low, high=math.inf):
    """Refuse an attribute that is not two numbers, the smaller first; make it a tuple."""
    check_list(augmentation, name, low, high, count=2)
    value = getattr(augmentation, name)
    if value[0] > value[1]:
        raise UserError(f"{name} must have its smaller end first, not {value}")


def check_colour(augmentation, name):
    """Refuse an attribute that is neither a number from 0 to 255 nor three of them, R, G, B."""
    value = getattr(augmentation, name)
    if isinstance(value, list | tuple):
        check_list(augmentation, name, 0, 255, count=3)
    elif not _is_number(value, 0, 255):
        raise UserError(f"{name} must be one number or three (R, G, B) from 0 to 255, not {value!r}")
