"""Arguments that are checked when an augmentation is made, as they may come from a config."""

import math
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real

from plaintrain.utils.errors import UserError


@dataclass(frozen=True)
class Numbers:
    """An argument: a number from `low` to `high`, or a list of `count` of them (0: of any length).

    Attributes:
        or_one: instead of a list, accept a number too.
        ascending: the smaller number of the list comes first.
        others: values beside numbers that are accepted.
    """

    low: float
    high: float = math.inf
    whole: bool = False
    count: int | None = None
    or_one: bool = False
    ascending: bool = False
    others: tuple = ()

    def check(self, name, value):
        """Return the value, a list as a tuple."""
        if value in self.others:
            return value
        in_list = self.count is not None and not (self.or_one and isinstance(value, Real))
        values, count = (value, self.count) if in_list else ([value], 1)
        has_length = isinstance(values, list | tuple) and len(values) == (count or len(values)) > 0
        if not has_length or not all(map(self._is_in_range, values)):
            amount = (count or "a list of") if in_list else "a"
            noun = f"{'whole ' if self.whole else ''}number{'s' if in_list else ''}"
            bounds = f"of at least {self.low}" if self.high == math.inf else f"from {self.low} to {self.high}"
            raise UserError(f"{name} must be {amount} {noun} {bounds}, not {value!r}")
        if self.ascending and list(values) != sorted(values):
            raise UserError(f"{name} must have its smaller end first, not {tuple(values)}")
        return tuple(values) if in_list else value

    def _is_in_range(self, value):
        right_type = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        return right_type and math.isfinite(value) and self.low <= value <= self.high


def argument(low, high=math.inf, *, default=MISSING, **options):
    """Return a dataclass field for `Numbers`, with its `options`."""
    return field(default=default, metadata={"numbers": Numbers(low, high, **options)})


class CheckedArguments:
    """Base of dataclasses with fields made by `argument`."""

    def __post_init__(self):
        for item in fields(self):
            if "numbers" in item.metadata:
                self._check(item.name, item.metadata["numbers"])

    def _check(self, name, allowed):
        object.__setattr__(self, name, allowed.check(name, getattr(self, name)))
