"""Compare two lists of class names whose order is the order of the labels."""

from plaintrain.utils.errors import UserError

# Class names that an error lists.
_LISTED = 12
REMEDY = (
    "CLASSES in DATASETS.DECLARE chooses and orders the classes of a dataset; FORMAT concat accepts classes "
    "that are missing"
)


def describe_class_difference(expected: list[str], actual: list[str]) -> str:
    """Return how a list of class names differs from the expected one; "" if they are equal."""
    if expected == actual:
        return ""
    differences = {
        "missing": [name for name in expected if name not in actual],
        "additional": [name for name in actual if name not in expected],
    }
    reasons = [f"{word} {_listed(names)}" for word, names in differences.items() if names]
    return ", ".join(reasons) or "the same in another order"


def check_trained_classes(
    source: str, trained_for: list[str] | None, class_names: list[str] | None, *, strict: bool
) -> str:
    """Reject weights whose classes contradict those of the dataset; return how they differ, "" if not.

    Args:
        source: the name of the weights.
        trained_for: the class names that their file holds, or None.
        class_names: those of the dataset, or None.
        strict: any difference is an error, as in evaluation and after --resume. Training may start from
            weights of other classes, but not from the same classes in another order.
    """
    if not (isinstance(trained_for, list | tuple) and trained_for and class_names):
        return ""
    trained_for = [str(name) for name in trained_for]
    difference = describe_class_difference(trained_for, list(class_names))
    if not difference:
        return ""
    classes = f"{source} was trained for the classes {_listed(trained_for)}"
    first, second = (list(map(_plain, names)) for names in (trained_for, class_names))
    if strict or (first != second and sorted(first) == sorted(second)):
        raise UserError(f"{classes}, but the dataset has {_listed(class_names)} ({difference}); {REMEDY}")
    return f"{classes}, here they are {_listed(class_names)}"


def _listed(names):
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{list(names[:_LISTED])}{more}"


def _plain(name):
    """A name apart from case and spaces."""
    return " ".join(str(name).split()).casefold()
