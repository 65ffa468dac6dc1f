"""A property: a function `check_...` that asserts, and the cases for which it is to hold.

The same check, on the same kind of cases, must pass on the package and fail on a package with a
defect; otherwise it says nothing.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

# The same cases every time; a busy machine is no failure.
settings.register_profile(
    "plaintrain",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("plaintrain")


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


def patched(owner, name, value):
    """A defect that puts a value in the place of an attribute."""
    return lambda patch: patch.setattr(owner, name, value)


def build_tests(module, defects):
    """Return the tests of the checks of a module, and of the defects planted for each of them.

    Args:
        module: its globals.
        defects: {check: {what is wrong: function that patches it in}}; only the first is not long.
    """
    assert list(defects) == [value for value in module.values() if hasattr(value, "strategies")]
    planted = []
    for check, of_check in defects.items():
        for wrong, defect in of_check.items():
            marks = [pytest.mark.long] if planted else []
            planted.append(pytest.param(check, defect, id=f"{check.__name__}-{wrong}", marks=marks))

    @pytest.mark.parametrize("check", defects, ids=lambda check: check.__name__)
    def test_property(check):
        settings(**check.limits)(given(*check.strategies)(check))()

    @pytest.mark.parametrize(("check", "defect"), planted)
    def test_planted_defect_is_caught(check, defect, monkeypatch):
        defect(monkeypatch)
        # More cases than of the property, so that another version of hypothesis may draw others.
        with pytest.raises(AssertionError):
            settings(max_examples=1000, phases=[Phase.generate])(given(*check.strategies)(check))()

    return test_property, test_planted_defect_is_caught
