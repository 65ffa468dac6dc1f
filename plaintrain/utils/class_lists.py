"""Compare two lists of class names whose order is the order of the labels."""

from plaintrain.utils.errors import UserError

# Class names that an error lists.
_LISTED = 12


def class_difference(expected: list[str], actual: list[str]) -> str:
    """Return how a list of class names differs from the expected one; "" if they are equal."""
    if expected == actual:
        return ""
    missing = [name for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected]
    if not missing and not extra:
        return "the same in another order"
    reasons = [f"missing {_listed(missing)}"] if missing else []
    reasons += [f"additional {_listed(extra)}"] if extra else []
    others = {_plain(name): name for name in extra}
    respelled = [name for name in missing if _plain(name) in others]
    reasons += [f"{name!r} is spelled {others[_plain(name)]!r}" for name in respelled[:_LISTED]]
    return ", ".join(reasons)


def class_remedy(expected: list[str], actual: list[str], dataset: str = "") -> str:
    """Return how to give a dataset the expected classes."""
    known = dataset or "the dataset"
    classes = expected if len(expected) <= _LISTED else "[the first list]"
    if set(expected) <= set(actual):
        return f"declare {known} in DATASETS.DECLARE with CLASSES: {classes}"
    if set(expected) & set(actual):
        declaration = f"{{FORMAT: concat, DATASETS: [{dataset or 'NAME'}], CLASSES: {classes}}}"
        return f"DATASETS.DECLARE with {declaration} accepts classes that are missing"
    return f"rename the classes of {known}, or use another dataset"


def is_reordered(expected: list[str], actual: list[str]) -> bool:
    """Return whether two lists hold the same names, apart from case and spaces, in another order."""
    first, second = [_plain(name) for name in expected], [_plain(name) for name in actual]
    return first != second and sorted(first) == sorted(second)


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
    difference = class_difference(trained_for, list(class_names))
    if not difference:
        return ""
    classes = f"{source} was trained for the classes {_listed(trained_for)}"
    if strict or is_reordered(trained_for, class_names):
        raise UserError(
            f"{classes}, but the dataset has {_listed(class_names)} ({difference}); "
            + class_remedy(trained_for, class_names)
        )
    return f"{classes}, here they are {_listed(class_names)}"


def _listed(names):
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{list(names[:_LISTED])}{more}"


def _plain(name):
    return " ".join(str(name).split()).casefold()
