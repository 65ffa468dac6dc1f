"""Early stopping and the best value: plaintrain.engine.early_stopping."""

import pytest
import torch

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.engine.early_stopping import EarlyStopping
from plaintrain.utils.errors import UserError

NAN = float("nan")
RESULTS = {"cells/bbox/AP": 30.0, "cells/bbox/AP50": 50.0, "cells/segm/AP": 20.0, "more/bbox/AP": 10.0}
LOSSES = {"val/total_loss": 3.0, "val/loss_cls": 1.0, "val/accuracy": 0.5}


def updates(best, values, name="bbox/AP", start=0):
    """Return what `update` returns for one value after another."""
    return [best.update(i, {name: value}) for i, value in enumerate(values, start)]


def state(best):
    return best.value, best.iteration, best.num_waited


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        # Only what is strictly better; 0 and -1 are numbers like others.
        ("bbox/AP", [-1.0, 0.0, 0.0, -0.5, 10.5, 10.5], [True, True, False, False, True, False]),
        ("bbox/AP", [torch.tensor(1.0), 2, torch.tensor(2.0)], [True, True, False]),
        ("bbox/AP", [NAN, NAN, 5.0, NAN], [False, False, True, False]),
        # The lowest loss, the highest of anything else.
        ("val/total_loss", [3.0, 4.0, 3.0, NAN, 0.0, -1.0], [True, False, False, False, True, True]),
        ("set/loss", [3.0, 2.0], [True, True]),
        ("lossless_val/bbox/AP", [3.0, 2.0, 4.0], [True, False, True]),
        ("cells/bbox/AP-floss", [3.0, 2.0, 4.0], [True, False, True]),
        ("val/accuracy", [3.0, 2.0, 4.0], [True, False, True]),
    ],
)
def test_update_returns_whether_the_value_is_the_best(name, values, expected):
    best = EarlyStopping(name)
    assert updates(best, values, name) == expected
    last = len(expected) - 1 - expected[::-1].index(True)
    assert state(best) == (float(values[last]), last, len(expected) - 1 - last)
    assert type(best.value) is float


@pytest.mark.parametrize(
    ("metric", "other_results", "value"),
    [
        ("", RESULTS, None),
        ("auto", LOSSES, 30.0),
        ("bbox/AP", LOSSES, 30.0),
        ("more/bbox/AP", LOSSES, 10.0),
        ("val/total_loss", RESULTS, 3.0),
        ("val/accuracy", RESULTS, 0.5),
    ],
)
def test_metric_is_the_first_that_ends_with_its_name_and_other_results_are_skipped(
    metric, other_results, value
):
    best = EarlyStopping(metric, patience=1)
    # Before the first iteration.
    assert not best.update(-1, other_results) and not best.update(-1, {})
    assert state(best) == (None, None, 0) and not best.triggered
    # The iteration may still be evaluated.
    assert best.update(-1, {**LOSSES, **RESULTS}) == (value is not None)
    assert state(best) == (value, None if value is None else -1, 0)


@pytest.mark.parametrize(
    ("metric", "near", "far"),
    [
        ("bbox/AP5O", "cells/bbox/AP50", "val/"),
        ("ox/AP", "cells/bbox/AP", "val/"),
        ("val/totalloss", "val/total_loss", "bbox"),
    ],
)
def test_unknown_metric_is_rejected_with_the_nearest(metric, near, far):
    with pytest.raises(UserError) as error:
        EarlyStopping(metric).update(0, {**LOSSES, **RESULTS})
    message, _, names = str(error.value).partition("; did you mean ")
    assert message == f"TEST.BEST_METRIC must be a metric of the evaluation, got {metric!r}"
    assert near in names and far not in names


@pytest.mark.parametrize(
    ("patience", "expected"),
    [
        (0, [False] * 7),
        (1, [True, False, True, False, True, True, True]),
        (2, [False, False, False, False, False, True, True]),
    ],
)
def test_patience_counts_evaluations_in_a_row_without_a_new_best(log, patience, expected):
    best = EarlyStopping("bbox/AP", patience)
    triggered = []
    for i, value in enumerate([NAN, 1.0, 1.0, 2.0, 0.0, NAN, 1.0]):
        best.update(i, {"bbox/AP": value})
        # One that is repeated, or earlier, does not count.
        assert not best.update(i, {"bbox/AP": 9.0}) and not best.update(i - 1, {"bbox/AP": 9.0})
        triggered.append(best.triggered)
    assert triggered == expected
    assert ("early stopping: bbox/AP has not improved for" in log.text) == any(expected)


def test_resumed_run_continues_from_the_state_in_its_checkpoint(tmp_path, log):
    best, model = EarlyStopping("bbox/AP", patience=3), torch.nn.Linear(1, 1)
    updates(best, [5.0, 4.0, 3.0])
    DetectionCheckpointer(model, str(tmp_path), early_stopping=best).save("model_0000002", iteration=2)
    again = EarlyStopping("bbox/AP", patience=3)
    DetectionCheckpointer(model, str(tmp_path), early_stopping=again).resume_or_load("", resume=True)
    assert state(again) == (5.0, 0, 2)
    # The evaluation after the checkpoint's own iteration was in it.
    assert not again.update(2, {"bbox/AP": 9.0}) and not again.triggered
    assert updates(again, [5.0], start=3) == [False] and again.triggered
    # A changed patience takes effect.
    for patience, triggered in ((2, True), (4, False)):
        log.clear()
        other = EarlyStopping("bbox/AP", patience=patience)
        other.load_state_dict(best.state_dict())
        assert other.triggered is triggered
        assert ("larger SOLVER.PATIENCE" in log.text) is triggered


@pytest.mark.parametrize("metric", ["segm/AP", "auto", ""])
def test_best_of_another_metric_is_forgotten_with_a_warning_and_a_new_metric_begins(metric, log):
    for before in ("", "bbox/AP"):
        best = EarlyStopping("bbox/AP")
        best.load_state_dict(EarlyStopping(before).state_dict())
        assert state(best) == (None, None, 0) and log.text == ""
    assert best.update(0, {"bbox/AP": 0.0})
    updates(best, [50.0, 1.0], start=1)
    other = EarlyStopping(metric)
    other.load_state_dict(best.state_dict())
    assert state(other) == (None, None, 0)
    assert log.records[-1].levelname == "WARNING"
    assert f"TEST.BEST_METRIC was 'bbox/AP' and is {metric!r}" in log.text.split("WARNING")[-1]
    assert other.update(0, RESULTS) == (metric != "")
