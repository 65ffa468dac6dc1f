"""How many cases the property tests draw, and that they draw the same ones every time."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "plaintrain",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    report_multiple_bugs=False,
    # A busy machine is no failure.
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("plaintrain")
