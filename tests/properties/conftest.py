"""Settings of hypothesis. tests/mutations.txt has the defects that each file of properties must catch."""

from hypothesis import HealthCheck, settings

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
