"""The best model of a run and its patience: plaintrain.best."""

import pytest
import torch

from plaintrain.best import BestMetric
from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.utils.errors import UserError

NAN = float("nan")
RESULTS = {"cells/bbox/AP": 30.0, "cells/bbox/AP50": 50.0, "cells/segm/AP": 20.0, "more/bbox/AP": 10.0}
LOSSES = {"val/total_loss": 3.0, "val/loss_cls": 1.0, "val/accuracy": 0.5}


def updates(best, values, name="bbox/AP", start=0):
    """What `update` says of one value after another."""
    return [best.update(i, {name: value}) for i, value in enumerate(values, start)]


def state(best):
    return best.value, best.iteration, best.num_waited


# ---- what is better --------------------------------------------------------------------------


def test_only_what_is_strictly_better_is_the_best():
    best = BestMetric("bbox/AP")
    assert updates(best, [10.0, 10.0, 9.0, 10.5, 10.5]) == [True, False, False, True, False]
    assert state(best) == (10.5, 3, 1)


def test_the_first_value_is_the_best_also_if_it_is_0():
    best = BestMetric("bbox/AP")
    assert updates(best, [0.0, 0.0, 0.1]) == [True, False, True]
    best = BestMetric("bbox/AP")
    assert updates(best, [-1.0, 0.0]) == [True, True]


@pytest.mark.parametrize("name", ["bbox/AP", "val/total_loss"])
def test_nan_is_never_the_best_and_never_stays_it(name):
    best = BestMetric(name)
    assert updates(best, [NAN, NAN, 5.0, NAN], name) == [False, False, True, False]
    assert state(best) == (5.0, 2, 1)


@pytest.mark.parametrize("name", ["val/total_loss", "val/loss_cls", "set/loss"])
def test_the_lowest_loss_is_the_best(name):
    best = BestMetric(name)
    assert updates(best, [3.0, 4.0, 3.0, 0.0, -1.0], name) == [True, False, False, True, True]


@pytest.mark.parametrize("name", ["lossless_val/bbox/AP", "cells/bbox/AP-floss", "val/accuracy"])
def test_of_anything_else_the_highest_is_the_best(name):
    best = BestMetric(name)
    assert updates(best, [3.0, 2.0, 4.0], name) == [True, False, True]


def test_tensors_and_whole_numbers_count_as_numbers():
    best = BestMetric("bbox/AP")
    assert updates(best, [torch.tensor(1.0), 2, torch.tensor(2.0)]) == [True, True, False]
    assert type(best.value) is float


# ---- which result ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("auto", 30.0),
        ("AP", 30.0),
        ("bbox/AP", 30.0),
        ("bbox/AP50", 50.0),
        ("segm/AP", 20.0),
        ("more/bbox/AP", 10.0),
        ("cells/bbox/AP", 30.0),
        ("val/total_loss", 3.0),
        ("val/loss_cls", 1.0),
        ("val/accuracy", 0.5),
    ],
)
def test_the_metric_is_the_first_of_its_name_or_of_the_end_of_it(metric, value):
    best = BestMetric(metric)
    assert best.update(7, {**LOSSES, **RESULTS})
    assert state(best) == (value, 7, 0)


def test_the_first_of_an_evaluation_may_be_a_loss():
    best = BestMetric("auto")
    assert updates(best, [2.0, 1.0], "set/loss") == [True, True]


def test_without_a_metric_nothing_is_the_best(log):
    best = BestMetric("", patience=1)
    assert not best.update(0, {**LOSSES, **RESULTS})
    assert state(best) == (None, None, 0) and not best.is_stale() and log.text == ""


@pytest.mark.parametrize(
    ("metric", "results"),
    [("auto", LOSSES), ("bbox/AP", LOSSES), ("val/total_loss", RESULTS), ("auto", {}), ("bbox/AP", {})],
)
def test_results_of_the_other_kind_are_passed_over(metric, results):
    best = BestMetric(metric, patience=1)
    assert not best.update(4, results)
    assert state(best) == (None, None, 0) and not best.is_stale()
    # Nor do they make the iteration one that was seen.
    assert best.update(4, {**LOSSES, **RESULTS})


@pytest.mark.parametrize(
    ("metric", "near", "far"),
    [
        ("bbox/AP5O", "cells/bbox/AP50", "val/"),
        ("ox/AP", "cells/bbox/AP", "val/"),
        ("val/totalloss", "val/total_loss", "bbox"),
        ("nonsense", "bbox", "val/"),
    ],
)
def test_a_metric_that_is_not_among_the_results_is_refused_with_the_nearest(metric, near, far):
    with pytest.raises(UserError) as error:
        BestMetric(metric).update(0, {**LOSSES, **RESULTS})
    said, _, names = str(error.value).partition("; did you mean ")
    assert said == f"TEST.BEST_METRIC is {metric!r}, which the evaluation does not give"
    assert near in names and far not in names


# ---- what is said ----------------------------------------------------------------------------


def test_each_evaluation_is_logged_with_the_best_so_far(log):
    best = BestMetric("bbox/AP", patience=2)
    updates(best, [NAN, 12.345678, 11.0, 10.0])
    said = [record.getMessage() for record in log.records]
    assert said == [
        "bbox/AP is nan; nothing was yet",
        "bbox/AP is 12.35, the best so far",
        "bbox/AP is 11; the best is 12.35 after iteration 1",
        "bbox/AP is 10; the best is 12.35 after iteration 1",
        "no better bbox/AP in SOLVER.PATIENCE 2 evaluations: the run ends here",
    ]


# ---- patience --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience", "expected"),
    [
        (0, [False] * 6),
        (1, [False, True, False, True, True, True]),
        (2, [False, False, False, False, True, True]),
        (3, [False, False, False, False, False, True]),
    ],
)
def test_patience_counts_evaluations_in_a_row_without_a_new_best(patience, expected):
    best = BestMetric("bbox/AP", patience)
    found = []
    for i, value in enumerate([1.0, 1.0, 2.0, 0.0, NAN, 1.0]):
        best.update(i, {"bbox/AP": value})
        found.append(best.is_stale())
    assert found == expected


def test_patience_counts_evaluations_before_the_first_number_too():
    best = BestMetric("bbox/AP", patience=2)
    updates(best, [NAN, NAN])
    assert best.is_stale()


# ---- resuming --------------------------------------------------------------------------------


def test_an_evaluation_that_is_repeated_counts_once():
    best = BestMetric("bbox/AP", patience=2)
    assert best.update(9, {"bbox/AP": 1.0})
    assert not best.update(19, {"bbox/AP": 0.5})
    for iteration, value in ((19, 0.5), (19, 3.0), (9, 4.0)):
        assert not best.update(iteration, {"bbox/AP": value})
    assert state(best) == (1.0, 9, 1) and not best.is_stale()
    assert best.update(29, {"bbox/AP": 1.5})


def test_a_resumed_run_goes_on_from_the_state_in_its_checkpoint(tmp_path):
    best, model = BestMetric("bbox/AP", patience=3), torch.nn.Linear(1, 1)
    updates(best, [5.0, 4.0, 3.0])
    DetectionCheckpointer(model, str(tmp_path), best=best).save("model_0000002", iteration=2)
    again = BestMetric("bbox/AP", patience=3)
    DetectionCheckpointer(model, str(tmp_path), best=again).resume_or_load("", resume=True)
    assert state(again) == (5.0, 0, 2)
    # The evaluation after the checkpoint's own iteration was in it.
    assert not again.update(2, {"bbox/AP": 9.0}) and not again.is_stale()
    assert updates(again, [5.0], start=3) == [False] and again.is_stale()


def test_the_state_before_the_first_evaluation_can_be_loaded():
    best = BestMetric("bbox/AP")
    best.load_state_dict(BestMetric("bbox/AP").state_dict())
    assert state(best) == (None, None, 0)
    assert best.update(0, {"bbox/AP": 0.0})


@pytest.mark.parametrize("metric", ["segm/AP", "auto", ""])
def test_the_best_of_another_metric_is_forgotten_with_a_warning(metric, log):
    saved = BestMetric("bbox/AP")
    updates(saved, [50.0, 1.0])
    best = BestMetric(metric)
    best.load_state_dict(saved.state_dict())
    assert state(best) == (None, None, 0)
    assert log.records[-1].levelname == "WARNING"
    assert f"TEST.BEST_METRIC was 'bbox/AP' and is {metric!r}" in log.text.split("WARNING")[-1]
    if metric:
        assert best.update(0, RESULTS)


def test_a_metric_that_is_new_on_resume_begins_without_a_warning(log):
    best = BestMetric("bbox/AP")
    best.load_state_dict(BestMetric("").state_dict())
    assert state(best) == (None, None, 0) and log.text == ""


def test_a_changed_patience_takes_effect_on_resume():
    saved = BestMetric("bbox/AP", patience=5)
    updates(saved, [5.0, 4.0, 3.0])
    best = BestMetric("bbox/AP", patience=2)
    best.load_state_dict(saved.state_dict())
    assert not saved.is_stale() and best.is_stale()


def test_what_is_known_before_the_first_step_counts():
    best = BestMetric("val/total_loss")
    assert best.update(-1, {"val/total_loss": 2.0}) and best.iteration == -1
    assert best.update(0, {"val/total_loss": 1.0}) and best.iteration == 0


def test_a_run_whose_patience_is_over_says_so_when_it_is_resumed(log):
    best = BestMetric("bbox/AP", patience=1)
    best.update(0, {"a/bbox/AP": 2.0})
    best.update(1, {"a/bbox/AP": 1.0})
    log.clear()
    BestMetric("bbox/AP", patience=1).load_state_dict(best.state_dict())
    assert "it goes on with a larger SOLVER.PATIENCE" in log.text
    log.clear()
    BestMetric("bbox/AP", patience=2).load_state_dict(best.state_dict())
    assert not log.text
