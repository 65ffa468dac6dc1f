"""Averaged weights: plaintrain.ema, and the checkpoints that hold them."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import rank_functions
from processes import Job

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.ema import ModelEMA, build_ema, final_model
from plaintrain.utils.errors import UserError
from plaintrain.weights import load_weights


def make_model(value=0.0):
    """A layer and a batch norm; every number is `value`, every count is 0."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    fill(model, value)
    return model


def fill(model, value):
    """Set all parameters and running statistics to a number, and the count of batches to it too."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


def values(state):
    """The floating-point numbers of a state dict; all must be the same."""
    (value,) = {v for t in state.values() if t.is_floating_point() for v in t.flatten().tolist()}
    return value


def average_of(numbers, decay, warmup):
    """The average by hand: the first number, then each with 1 - decay."""
    average = numbers[0]
    for step, number in enumerate(numbers[1:], start=1):
        weight = min(decay, (1 + step) / (10 + step)) if warmup else decay
        average = weight * average + (1 - weight) * number
    return average


NUMBERS = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0, 5.0, 3.5]


def averaged_over(numbers, wrap=lambda model: model, **settings):
    """(model, its `ModelEMA`) after one step for each number."""
    model = make_model(100.0)
    ema = ModelEMA(wrap(model), **settings)
    for number in numbers:
        fill(model, number)
        ema.update()
    return model, ema


# ---- the average -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_parameters_and_statistics_are_averaged_as_by_hand(decay, warmup, steps):
    _, ema = averaged_over(NUMBERS[:steps], decay=decay, warmup=warmup)
    expected = average_of(NUMBERS[:steps], decay, warmup)
    assert values(ema.module.state_dict()) == pytest.approx(expected, abs=1e-5)
    assert ema.num_steps == steps


def test_warmup_makes_a_difference_until_the_decay_is_reached():
    plain = averaged_over(NUMBERS, decay=0.9, warmup=False)[1]
    warm = averaged_over(NUMBERS, decay=0.9, warmup=True)[1]
    assert values(plain.module.state_dict()) != pytest.approx(values(warm.module.state_dict()), abs=0.5)


def test_integers_are_copied():
    _, ema = averaged_over([3.0, 8.0, 20.0], decay=0.9)
    count = ema.module[1].num_batches_tracked
    assert count.item() == 20 and count.dtype == torch.int64


def test_every_tensor_has_an_average_of_its_own():
    model = make_model()
    ema = ModelEMA(model, decay=0.5, warmup=False)
    before = []
    for seed in range(3):
        torch.manual_seed(seed)
        for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
            tensor.data.normal_()
        before.append(copy.deepcopy(model.state_dict()))
        ema.update()
    for name, tensor in ema.module.state_dict().items():
        if tensor.is_floating_point():
            expected = 0.25 * before[0][name] + 0.25 * before[1][name] + 0.5 * before[2][name]
            torch.testing.assert_close(tensor, expected)
        assert model.state_dict()[name].equal(before[2][name])


def test_the_average_is_not_trained_and_the_model_stays_as_it_is():
    model, ema = averaged_over([1.0, 2.0], decay=0.5, warmup=False)
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert values(model.state_dict()) == 2.0
    fill(model, 7.0)
    assert values(ema.module.state_dict()) == 1.5


def test_a_model_wrapped_for_several_processes_is_averaged_under_its_own_names():
    model, ema = averaged_over([1.0, 2.0], wrap=nn.DataParallel, decay=0.5, warmup=False)
    assert ema.module.state_dict().keys() == model.state_dict().keys()
    assert values(ema.module.state_dict()) == 1.5


def test_two_ranks_average_what_their_gradients_are_sent_for(tmp_path):
    job = Job(rank_functions.average_a_wrapped_model, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    expected = {"names": ["module.weight", "n_averaged"], "own": ["Linear", 1.5], "wrapped": False}
    assert job.results() == [expected, expected]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UserError, match=f"MODEL.EMA.DECAY is {decay}, but must be at least 0 and below 1"):
        ModelEMA(make_model(), decay=decay)
    cfg = get_cfg()
    cfg.MODEL.EMA.DECAY = decay
    with pytest.raises(UserError, match="MODEL.EMA.DECAY"):
        build_ema(cfg, make_model())


# ---- which model is which --------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", ["averaged", "raw"])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_before_the_first_step_the_average_is_the_model_itself(evaluate, wrap):
    model = wrap(make_model())
    ema = ModelEMA(model, evaluate=evaluate)
    # Weights that are loaded after it was made count.
    fill(model, 4.0)
    assert ema.num_steps == 0
    assert ema.module is model and ema.evaluated is model


@pytest.mark.parametrize("evaluate", ["averaged", "raw"])
def test_the_model_that_is_evaluated_is_the_averaged_or_the_raw_one(evaluate):
    model, ema = averaged_over([1.0, 2.0], decay=0.5, warmup=False, evaluate=evaluate)
    assert ema.evaluated is (ema.module if evaluate == "averaged" else model)
    assert ema.module is not model
    assert values(ema.evaluated.state_dict()) == {"averaged": 1.5, "raw": 2.0}[evaluate]


def test_disabled_nothing_is_kept():
    model, ema = averaged_over([1.0, 2.0], enabled=False)
    assert not ema.enabled and ema.num_steps == 0
    assert ema.module is model and ema.evaluated is model
    assert ema.state_dict() == {}
    ema.load_state_dict({})


# ---- from the config -------------------------------------------------------------------------


def test_the_config_decides_over_decay_warmup_and_what_is_evaluated(log):
    cfg, model = get_cfg(), make_model()
    cfg.merge_from_list(["MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.5, "MODEL.EMA.WARMUP", False])
    cfg.merge_from_list(["MODEL.EMA.EVALUATE", "raw"])
    ema = build_ema(cfg, model)
    assert "the raw weights are evaluated, the averaged become model_final.pth" in log.text
    for number in (1.0, 2.0):
        fill(model, number)
        ema.update()
    assert values(ema.module.state_dict()) == 1.5 and ema.evaluated is model


def test_by_default_nothing_is_averaged_or_said(log):
    ema = build_ema(get_cfg(), make_model())
    assert not ema.enabled and log.text == ""
    assert final_model(get_cfg(), ema) is None


@pytest.mark.parametrize(("final", "is_averaged"), [("averaged", True), ("raw", False)])
def test_the_final_model_is_the_averaged_one_if_the_config_says_so(final, is_averaged):
    cfg, model = get_cfg(), make_model(1.0)
    cfg.merge_from_list(["MODEL.EMA.ENABLED", True, "MODEL.EMA.FINAL", final])
    ema = build_ema(cfg, model)
    function = final_model(cfg, ema)
    assert (function is not None) == is_averaged
    if is_averaged:
        # Of the moment when it is called.
        assert function() is model
        ema.update()
        assert function() is ema.module is not model


# ---- checkpoints -----------------------------------------------------------------------------


def save(folder, numbers, **settings):
    """A checkpoint of a run with one step for each number."""
    model, ema = averaged_over(numbers, decay=0.5, warmup=False, **settings)
    DetectionCheckpointer(model, str(folder), ema=ema).save("model_0000001", iteration=1)
    return model, ema


def test_a_resumed_run_has_the_average_of_one_that_was_not(tmp_path):
    save(tmp_path, NUMBERS[:4])
    model = make_model()
    ema = ModelEMA(nn.DataParallel(model), decay=0.5, warmup=False)
    DetectionCheckpointer(model, str(tmp_path), ema=ema).resume_or_load("", resume=True)
    assert ema.num_steps == 4
    whole = averaged_over(NUMBERS[:4], decay=0.5, warmup=False)[1]
    assert values(ema.module.state_dict()) == values(whole.module.state_dict())
    for number in NUMBERS[4:]:
        fill(model, number)
        ema.update()
    whole = averaged_over(NUMBERS, decay=0.5, warmup=False)[1]
    assert values(ema.module.state_dict()) == values(whole.module.state_dict())


def test_averaging_that_is_turned_on_when_a_run_is_resumed_begins_there_with_a_warning(tmp_path, log):
    save(tmp_path, [1.0, 2.0], enabled=False)
    model = make_model()
    ema = ModelEMA(model, decay=0.5, warmup=False)
    DetectionCheckpointer(model, str(tmp_path), ema=ema).resume_or_load("", resume=True)
    assert [r.getMessage() for r in log.records if r.levelname == "WARNING"] == [
        "the checkpoint has no averaged weights: MODEL.EMA begins to average here"
    ]
    assert ema.module is model
    for number in (4.0, 5.0):
        fill(model, number)
        ema.update()
    assert values(ema.module.state_dict()) == 4.5


def test_averaging_that_is_turned_off_when_a_run_is_resumed_is_left_out_with_a_warning(tmp_path, log):
    save(tmp_path, [1.0, 2.0])
    model = make_model()
    ema = ModelEMA(model, enabled=False)
    DetectionCheckpointer(model, str(tmp_path), ema=ema).resume_or_load("", resume=True)
    assert [r.getMessage() for r in log.records if r.levelname == "WARNING"] == [
        "MODEL.EMA.ENABLED is False: the checkpoint's averaged weights are left out"
    ]
    assert values(model.state_dict()) == 2.0 and ema.module is model and ema.state_dict() == {}


@pytest.mark.parametrize(("averaged", "expected"), [(False, 2.0), (True, 1.5)])
@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_of_both_gives_the_raw_or_the_averaged_weights(
    tmp_path, log, averaged, expected, resume
):
    save(tmp_path, [1.0, 2.0])
    path, model = str(tmp_path / "model_0000001.pth"), make_model()
    found = DetectionCheckpointer(model, str(tmp_path)).resume_or_load(path, resume=resume, averaged=averaged)
    assert values(model.state_dict()) == expected
    assert found.get("iteration") == (1 if resume else None)
    assert ("averaged weights" in log.text) == averaged
    model = make_model()
    load_weights(model, path, averaged=averaged)
    assert values(model.state_dict()) == expected


@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_without_averages_gives_the_raw_weights(tmp_path, log, resume):
    save(tmp_path, [1.0, 2.0], enabled=False)
    path, model = str(tmp_path / "model_0000001.pth"), make_model()
    DetectionCheckpointer(model, str(tmp_path)).resume_or_load(path, resume=resume, averaged=True)
    assert values(model.state_dict()) == 2.0 and "averaged" not in log.text


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {"ema": 5, "model": {}}])
def test_a_file_without_weights_is_refused_also_when_the_average_is_asked_for(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd\.pth"):
        load_weights(make_model(), str(tmp_path / "odd.pth"), averaged=True)
