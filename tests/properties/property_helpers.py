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


def build_tests(module, check, *defect):
    """Return the tests of the checks of a module, and that one of them fails with a planted defect.

    tests/mutation_list.py has the defects for the other checks.

    Args:
        module: its globals.
        check: the check that is to fail.
        defect: (owner, name, value) of the attribute that is replaced.
    """
    checks = [value for value in module.values() if hasattr(value, "strategies")]

    @pytest.mark.parametrize("check", checks, ids=lambda check: check.__name__)
    def test_property(check):
        settings(**check.limits)(given(*check.strategies)(check))()

    def test_planted_defect_is_caught(monkeypatch):
        monkeypatch.setattr(*defect)
        # More cases than of the property, so that another version of hypothesis may draw others.
        with pytest.raises(AssertionError):
            settings(max_examples=1000, phases=[Phase.generate])(given(*check.strategies)(check))()

    return test_property, test_planted_defect_is_caught
