"""Averaged weights: plaintrain.solver.ema, and the checkpoints that hold them."""

import copy

import pytest
import torch
from run_files import load
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer, build_checkpointer
from plaintrain.checkpoint.pretrained import load_weights
from plaintrain.config import get_cfg
from plaintrain.solver.ema import ModelEMA, build_ema
from plaintrain.utils.errors import UserError


def fill(model, value):
    """Set all parameters and running statistics to a number, and the count of batches to it too."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


def make_model(value=0.0):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    fill(model, value)
    return model


def values(state):
    """Return the floating-point number of a state dict; all must be the same."""
    (value,) = {v for t in state.values() if t.is_floating_point() for v in t.flatten().tolist()}
    return value


def step(model, ema, *numbers):
    """Take a step to each of some numbers."""
    for number in numbers:
        fill(model, number)
        ema.update(model)


def test_average_of_every_tensor_equals_a_manual_one():
    model = make_model()
    ema = ModelEMA(model, decay=0.3, warmup=True)
    averages = {}
    for step in range(5):
        torch.manual_seed(step)
        for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
            tensor.data.normal_()
        model[1].num_batches_tracked.fill_(10 * step)
        # Decays of 2/11, 3/12 and 4/13, then the given one; the first weights are taken as they are.
        decay = min(0.3, (1 + step) / (10 + step)) if step else 0.0
        state = copy.deepcopy(model.state_dict())
        averages = {name: decay * averages.get(name, 0) + (1 - decay) * t for name, t in state.items()}
        ema.update(model)
        assert ema.num_steps == step + 1
    averages["1.num_batches_tracked"] = torch.tensor(40)
    torch.testing.assert_close(ema.module.state_dict(), type(ema.module.state_dict())(averages))
    # The model that is trained stays as it is.
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in ema.module.parameters())


@pytest.mark.parametrize(("evaluate", "wrap"), [("averaged", nn.DataParallel), ("raw", lambda model: model)])
def test_average_is_the_model_itself_before_the_first_step_or_where_disabled(log, evaluate, wrap):
    model = wrap(make_model(1.0))
    ema = ModelEMA(model, evaluate=evaluate)
    disabled = build_ema(get_cfg(), model)
    disabled.update(model)
    for average in (ema, disabled):
        assert average.num_steps == 0
        assert average.module is model and average.eval_model is model
    assert not disabled.enabled and log.text == ""
    assert disabled.state_dict() == {}
    disabled.load_state_dict({})


@pytest.mark.parametrize(("evaluate", "final"), [("averaged", "raw"), ("raw", "averaged")])
def test_config_decides_which_weights_are_evaluated_and_final(tmp_path, log, evaluate, final):
    cfg, model = get_cfg(), make_model()
    cfg.merge_from_list(["MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.5, "MODEL.EMA.WARMUP", False])
    cfg.merge_from_list(["MODEL.EMA.EVALUATE", evaluate, "MODEL.EMA.FINAL", final])
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "SOLVER.CHECKPOINT_PERIOD", 2])
    cfg.merge_from_list(["SOLVER.CHECKPOINT_MAX_TO_KEEP", 1])
    ema = build_ema(cfg, model)
    assert f"evaluating {evaluate} weights, model_final.pth has {final} weights" in log.text
    checkpointer = build_checkpointer(cfg, model, ema=ema)
    step(model, ema, 1.0, 2.0)
    for iteration in (1, 3, 5):
        checkpointer.save_iteration(iteration)
    checkpointer.save_final()
    assert {path.name for path in tmp_path.glob("*.pth")} == {"model_0000005.pth", "model_final.pth"}
    saved = load(tmp_path / "model_0000005.pth")
    assert (saved["config"], saved["class_names"]) == (cfg.dump(), None)
    assert values(load(tmp_path / "model_final.pth")["model"]) == (1.5 if final == "averaged" else 2.0)
    assert ema.module is not model and values(ema.module.state_dict()) == 1.5
    assert ema.eval_model is (ema.module if evaluate == "averaged" else model)


def save(folder, numbers, **settings):
    """Save a checkpoint of a run with one step for each number."""
    model = make_model(100.0)
    ema = ModelEMA(model, decay=0.5, warmup=False, **settings)
    step(model, ema, *numbers)
    DetectionCheckpointer(model, str(folder), ema=ema).save("model_0000001", iteration=1)


@pytest.mark.parametrize(
    ("enabled", "words"),
    [
        (True, "the checkpoint has no averaged weights; MODEL.EMA starts to average now"),
        (False, "MODEL.EMA.ENABLED is False; skipped the averaged weights of the checkpoint"),
    ],
)
def test_average_turned_on_or_off_at_a_resume_begins_or_is_dropped_with_a_warning(
    tmp_path, log, enabled, words
):
    save(tmp_path, [1.0, 2.0], enabled=not enabled)
    model = make_model()
    ema = ModelEMA(model, decay=0.5, warmup=False, enabled=enabled)
    DetectionCheckpointer(model, str(tmp_path), ema=ema).resume_or_load("", resume=True)
    assert [r.getMessage() for r in log.records if r.levelname == "WARNING"] == [words]
    assert values(model.state_dict()) == 2.0 and ema.module is model
    step(model, ema, 4.0, 5.0)
    assert values(ema.module.state_dict()) == (4.5 if enabled else 5.0)
    assert enabled or ema.state_dict() == {}


@pytest.mark.parametrize(
    ("averaged", "resume", "enabled", "expected"),
    [
        (False, True, True, 2.0),
        (True, False, True, 1.5),
        (True, True, True, 1.5),
        # Without averages the raw weights are loaded.
        (True, False, False, 2.0),
    ],
)
def test_checkpoint_loads_the_raw_or_the_averaged_weights(tmp_path, averaged, resume, enabled, expected):
    save(tmp_path, [1.0, 2.0], enabled=enabled)
    path, model = str(tmp_path / "model_0000001.pth"), make_model()
    found = DetectionCheckpointer(model, str(tmp_path)).resume_or_load(path, resume=resume, averaged=averaged)
    assert values(model.state_dict()) == expected
    assert found.get("iteration") == (1 if resume else None)
    model = make_model()
    load_weights(model, path, averaged=averaged)
    assert values(model.state_dict()) == expected
    for content in ([1, 2], {"ema": 5, "model": {}}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=r"odd\.pth"):
            load_weights(model, str(tmp_path / "odd.pth"), averaged=True)
