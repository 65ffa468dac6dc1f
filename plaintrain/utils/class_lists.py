"""Comparison of two lists of class names, whose order is that of the labels."""

from collections.abc import Sequence

from plaintrain.utils.errors import UserError

# Maximum number of class names in a message.
_MAX_NAMES = 12
REMEDY = (
    "CLASSES in DATASETS.DECLARE chooses and orders the classes of a dataset; FORMAT concat accepts classes "
    "that are missing"
)


def describe_class_difference(expected: list[str], actual: list[str]) -> str:
    """Return how the actual class names differ from the expected ones, or ""."""
    if expected == actual:
        return ""
    differences = {
        "missing": [name for name in expected if name not in actual],
        "additional": [name for name in actual if name not in expected],
    }
    reasons = [f"{word} {_format_names(names)}" for word, names in differences.items() if names]
    return ", ".join(reasons) or "the same in another order"


def check_trained_classes(
    source: str, trained_for: list[str] | None, class_names: list[str] | None, *, strict: bool
) -> str:
    """Reject weights whose classes contradict the `class_names` of the dataset; return accepted differences.

    `strict` (evaluation and --resume) rejects any difference, otherwise only a different order.
    """
    if not (isinstance(trained_for, list | tuple) and trained_for and class_names):
        return ""
    trained_for = [str(name) for name in trained_for]
    if not (difference := describe_class_difference(trained_for, list(class_names))):
        return ""
    classes = f"{source} was trained for the classes {_format_names(trained_for)}"
    first, second = (list(map(_normalize, names)) for names in (trained_for, class_names))
    if strict or (first != second and sorted(first) == sorted(second)):
        raise UserError(
            f"{classes}, but the dataset has {_format_names(class_names)} ({difference}); {REMEDY}"
        )
    return f"{classes}, here they are {_format_names(class_names)}"


def _format_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"{list(names[:_MAX_NAMES])}{more}"


def _normalize(name: str) -> str:
    """Return a name without differences of case and spaces."""
    return " ".join(str(name).split()).casefold()
