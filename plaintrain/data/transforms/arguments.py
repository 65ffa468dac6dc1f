"""Range checks for the arguments of augmentations."""

import math
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from plaintrain.data.transforms.augmentation import TensorTransform
from plaintrain.utils.errors import UserError


@dataclass(frozen=True)
class Numbers:
    """Rule for a number from `low` to `high`, or for a list of `length` numbers (0: any length but 0).

    With `or_scalar` a number is accepted instead of a list; so are the values `others`.
    """

    low: float
    high: float = 1_000_000
    integer: bool = False
    length: int | None = None
    or_scalar: bool = False
    ascending: bool = False
    others: tuple = ()

    def check(self, name: str, value: Any) -> Any:
        """Return the value, a list as a tuple, or raise a `UserError`."""
        if value in self.others:
            return value
        is_scalar = self.length is None or (self.or_scalar and isinstance(value, Real))
        values = [value] if is_scalar else value
        length = 1 if is_scalar else self.length
        has_length = isinstance(values, list | tuple) and len(values) == (length or len(values)) > 0
        if not has_length or not all(map(self._is_in_range, values)):
            singular, plural = ("an integer", "integers") if self.integer else ("a number", "numbers")
            noun = singular if is_scalar else f"{length or 'a list of'} {plural}"
            raise UserError(f"{name} must be {noun} from {self.low} to {self.high}, got {value!r}")
        if self.ascending and list(values) != sorted(values):
            raise UserError(f"{name} must be in ascending order, got {tuple(values)}")
        return value if is_scalar else tuple(values)

    def _is_in_range(self, value):
        right_type = isinstance(value, Integral if self.integer else Real) and not isinstance(value, bool)
        return right_type and math.isfinite(value) and self.low <= value <= self.high


def argument(low: float, high: float = 1_000_000, *, default: Any = MISSING, **options: Any) -> Any:
    """Return a dataclass field that is checked by `Numbers(low, high, **options)`."""
    return field(default=default, metadata={"numbers": Numbers(low, high, **options)})


class CheckedArguments:
    """Base of dataclasses with fields made by `argument`."""

    def get_transform(self, image: np.ndarray) -> TensorTransform:
        """Draw Detectron2's transform for an image, from the global generator."""
        seed = np.random.randint(2**31)
        return TensorTransform(lambda t: self(t, np.random.default_rng(seed)), *image.shape[:2])  # type: ignore

    def __post_init__(self):
        for item in fields(self):
            if "numbers" in item.metadata:
                self._check(item.name, item.metadata["numbers"])

    def _check(self, name, numbers):
        object.__setattr__(self, name, numbers.check(name, getattr(self, name)))
