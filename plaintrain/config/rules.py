"""Rules of config values, for the table in `plaintrain.config.schema`."""

import fnmatch
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Condition on a value, in words for the error and as a predicate."""

    words: str
    accepts: Callable[[Any], bool]


def allow(*allowed: Any) -> Rule:
    """Return the rule of a set of allowed values."""
    return Rule(" or ".join(map(repr, allowed)), lambda value: value in allowed)


def number(words: str, is_in_range: Callable[[float], bool]) -> Rule:
    """Return the rule of an int or float, not a bool, in a range."""
    return Rule(words, lambda value: type(value) in (int, float) and is_in_range(value))


def between(low: float, high: float) -> Rule:
    """Return the rule of a number in a closed interval."""
    return number(f"at least {low:.10g} and at most {high:.10g}", lambda value: low <= value <= high)


def integer(low: int, high: int) -> Rule:
    """Return the rule of an integer in a closed interval, for items of lists."""
    return Rule(f"from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def list_of(rule: Rule, words: str, shortest: int = 0, longest: int = 100_000) -> Rule:
    """Return the rule of a list whose items obey a rule; {} in `words` are the words of that rule."""

    def accepts(values):
        is_list = isinstance(values, list | tuple) and shortest <= len(values) <= longest
        return is_list and all(map(rule.accepts, values))

    return Rule(words.format(rule.words), accepts)


def tuple_of(words: str, *rules: Rule) -> Rule:
    """Return the rule of a list with one rule per item."""

    def accepts(values):
        is_list = isinstance(values, list | tuple) and len(values) == len(rules)
        return is_list and all(rule.accepts(value) for rule, value in zip(rules, values, strict=True))

    return Rule(words, accepts)


def match_keys(patterns: dict[str, Rule], keys: Iterable[str]) -> dict[str, Rule]:
    """Return the rule of each key that one of the words of `patterns` matches; the last one counts."""
    rules = [(word, rule) for words, rule in patterns.items() for word in words.split()]
    return {key: rule for word, rule in rules for key in keys if fnmatch.fnmatchcase(key, word)}


def increasing(numbers: Rule, strictly: bool = False) -> Rule:
    """Return the rule of a list that obeys a rule and whose numbers, or pairs' first numbers, increase."""

    def accepts(values):
        if not numbers.accepts(values):
            return False
        firsts = [value[0] if isinstance(value, list | tuple) else value for value in values]
        return all(a < b or (a == b and not strictly) for a, b in itertools.pairwise(firsts))

    return Rule(numbers.words, accepts)


ANY_NUMBER = number("a number", lambda value: True)
ABOVE_0 = number("above 0", lambda value: value > 0)
BELOW_1 = number("at least 0 and below 1", lambda value: 0 <= value < 1)
FRACTION = number("above 0 and at most 1", lambda value: 0 < value <= 1)
INSIDE = number("above 0 and below 1", lambda value: 0 < value < 1)
PROBABILITY = between(0, 1)
# Larger factors and pixel values overflow float32 sums; larger counters do not fit in 32 bits.
FACTOR = between(0, 1e6)
POSITIVE = number("above 0 and at most 1000000", lambda value: 0 < value <= 1e6)
COUNT = between(0, 2**31 - 1)
STRING = Rule("a string", lambda value: isinstance(value, str))
NAMES = list_of(STRING, "a list of strings")


def list_per_level(item: Rule, shortest: int = 1) -> Rule:
    """Return the rule of one list of numbers per level, or one for all levels."""
    words = f"one list of numbers {item.words}, or one list per level"
    return list_of(list_of(item, "", shortest, 100), words, 1, 100)


def _is_augmentation(entry: Any) -> bool:
    """Return whether an entry is a name, or a mapping of one name to its arguments."""
    if not isinstance(entry, dict):
        return isinstance(entry, str)
    names_arguments = [isinstance(k, str) and isinstance(v or {}, dict) for k, v in entry.items()]
    return names_arguments == [True]


_FLOW = tuple_of("epochs at least 1, with a train flow", allow("train", "val"), integer(1, 1_000_000))
_FLOWS = list_of(_FLOW, '[["train" or "val", epochs], ...], {}')
WORKFLOW = Rule(_FLOWS.words, lambda flows: _FLOWS.accepts(flows) and "train" in dict(flows))
AUGMENTATIONS = list_of(Rule("a list of names or mappings {name: {argument: value}}", _is_augmentation), "{}")
_SIZE = list_of(integer(1, 16384), "(0, 0), or a height and a width {}", 2, 2)
FIXED_SIZE = Rule(_SIZE.words, lambda size: tuple(size) == (0, 0) or _SIZE.accepts(size))
_POINT = tuple_of("[[iteration, momentum], ...], iterations increasing, momenta in [0, 1)", COUNT, BELOW_1)
MOMENTUM_SCHEDULE = increasing(list_of(_POINT, "{}"), strictly=True)
_RESULT = tuple_of("[task, metric, value, tolerance]", STRING, STRING, ANY_NUMBER, ANY_NUMBER)
EXPECTED_RESULTS = list_of(_RESULT, "a list of {}")
_FACTOR = tuple_of("[[name, factor], ...], factors from 0 to 10000", STRING, between(0, 10_000))
REPEAT_FACTORS = list_of(_FACTOR, "{}")
_RANGE = increasing(list_of(ANY_NUMBER, "[] or two numbers [low, high]", 2, 2), strictly=True)
PIXEL_RANGE = Rule(_RANGE.words, lambda values: not values or _RANGE.accepts(values))
