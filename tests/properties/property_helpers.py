"""A property: a function `check_...` that asserts, and the cases for which it is to hold.

The same check, on the same kind of cases, must pass on the package and fail on a package with a
defect; otherwise it says nothing.
"""

import pytest
from hypothesis import Phase, given, settings


def for_all(*strategies, examples=None):
    """Say what a check is to hold for.

    Args:
        strategies: one for each argument of the check.
        examples: how many cases to draw; None for the profile's number.
    """

    def declare(check):
        check.strategies, check.limits = strategies, {} if examples is None else {"max_examples": examples}
        return check

    return declare


def checks_of(module):
    """The checks among the names of a module, in their order."""
    return [value for name, value in module.items() if name.startswith("check_")]


def examine(check):
    """Try a check on cases; raises what it raises on the simplest case that fails."""
    settings(**check.limits)(given(*check.strategies)(check))()


def assert_caught(check):
    """A check must fail on some case; which is the simplest does not matter.

    More cases are drawn than `examine` draws, so that another version of hypothesis may draw others.
    """
    with pytest.raises(AssertionError):
        settings(max_examples=1000, phases=[Phase.generate])(given(*check.strategies)(check))()


def patched(owner, name, value):
    """A defect that puts a value in the place of an attribute."""
    return lambda patch: patch.setattr(owner, name, value)


def defects_of(table):
    """Parameters of a test, (check, defect), from {check: {what is wrong: function that patches it in}}."""
    return [
        pytest.param(check, defect, id=f"{check.__name__}-{wrong}")
        for check, defects in table.items()
        for wrong, defect in defects.items()
    ]
