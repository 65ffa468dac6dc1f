"""Parameter groups, optimizers, learning rate schedules and gradient clipping: plaintrain.solver."""

import copy
import math

import pytest
import torch
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.solver import (
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
    lr_factor,
    momentum_at,
)
from plaintrain.utils.errors import UserError

torch.set_num_threads(1)


def make_cfg(**solver):
    """Defaults with SOLVER keys set; `A__B` stands for A.B."""
    cfg = get_cfg()
    for key, value in solver.items():
        cfg.merge_from_list(["SOLVER." + key.replace("__", "."), value])
    return cfg


class SmallModel(nn.Module):
    """A backbone and a head with norms and biases of several kinds."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"conv": nn.Conv2d(3, 4, 3, bias=False), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(4, 4)}
        )
        self.head = nn.ModuleDict(
            {"gn": nn.GroupNorm(2, 4), "ln": nn.LayerNorm(4), "fc": nn.Linear(4, 2), "out": nn.Linear(2, 2)}
        )

    def forward(self, x):
        x = self.backbone["bn"](self.backbone["conv"](x))
        x = self.backbone["fc"](self.head["gn"](x).mean((2, 3)))
        return self.head["out"](self.head["fc"](self.head["ln"](x)))


def settings(optimizer, model):
    """{parameter name: (lr, weight decay)} of an optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


# ---- learning rate: Detectron2's formulas, written from fvcore's definitions -------------------


def reference_factor(where, schedule, length, method, rescale):
    """WarmupParamScheduler(schedule, 0.01, length, method, rescale) of Detectron2 at a share of MAX_ITER."""
    if where + 1e-6 <= length:
        start = 0.01 * schedule(0.0)
        end = schedule(0.0) if rescale else schedule(length)
        if method == "constant":
            return start
        return end * (where / length) + start * (1 - where / length)
    if rescale and length < 1:
        where = (where - length) / (1 - length)
    return schedule(where)


def multi_step(steps, gamma, max_iter):
    return lambda where: gamma ** sum(step <= int((where + 1e-6) * max_iter) for step in steps)


def cosine(end):
    return lambda where: end + 0.5 * (1 - end) * (1 + math.cos(math.pi * where))


def fixed_gamma(num_decays, gamma):
    # Detectron2 raises at where = 1, where the last value should go on.
    return lambda where: gamma ** min(int((where + 1e-6) * (num_decays + 1)), num_decays)


_SCHEDULES = {
    "multi_step": (
        {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (40, 70), "GAMMA": 0.1},
        multi_step((40, 70), 0.1, 90),
    ),
    "multi_step_early": (
        {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (7, 90), "GAMMA": 0.5},
        multi_step((7, 90), 0.5, 90),
    ),
    "no_steps": (
        {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (), "GAMMA": 0.5},
        multi_step((), 0.5, 90),
    ),
    "cosine": ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 0.0}, cosine(0.0)),
    "cosine_with_end": ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 0.005}, cosine(0.25)),
    "fixed_gamma": (
        {"LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "NUM_DECAYS": 3, "GAMMA": 0.2},
        fixed_gamma(3, 0.2),
    ),
}


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("method", ["linear", "constant"])
@pytest.mark.parametrize("warmup_iters", [0, 1, 10, 90, 200])
@pytest.mark.parametrize("name", _SCHEDULES)
def test_learning_rates_are_detectron2s(name, warmup_iters, method, rescale):
    keys, schedule = _SCHEDULES[name]
    cfg = make_cfg(
        BASE_LR=0.02,
        MAX_ITER=90,
        WARMUP_ITERS=warmup_iters,
        WARMUP_FACTOR=0.01,
        WARMUP_METHOD=method,
        RESCALE_INTERVAL=rescale,
        **keys,
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.02)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(91):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    length = min(warmup_iters / 90, 1.0)
    factors = [reference_factor(i / 90, schedule, length, method, rescale) for i in range(91)]
    expected = [0.02 * factor for factor in factors]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("keys", "table"),
    [
        (
            {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (60, 80), "GAMMA": 0.1},
            {0: 0.0001, 5: 0.05005, 9: 0.09001, 10: 0.1, 59: 0.1, 60: 0.01, 79: 0.01, 80: 0.001, 99: 0.001},
        ),
        (
            {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (100,), "GAMMA": 0.1},
            {0: 0.0001, 10: 0.1, 99: 0.1, 100: 0.01},
        ),
        (
            {"LR_SCHEDULER_NAME": "WarmupCosineLR", "WARMUP_ITERS": 0},
            {0: 0.1, 25: 0.0853553, 50: 0.05, 75: 0.0146447, 100: 0.0},
        ),
        (
            {"LR_SCHEDULER_NAME": "WarmupCosineLR", "WARMUP_ITERS": 0, "BASE_LR_END": 0.02},
            {0: 0.1, 50: 0.06, 100: 0.02},
        ),
        (
            {"LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "NUM_DECAYS": 3, "GAMMA": 0.1},
            {0: 0.0001, 10: 0.1, 24: 0.1, 25: 0.01, 49: 0.01, 50: 0.001, 75: 0.0001, 99: 0.0001, 100: 0.0001},
        ),
        (
            {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (60,), "WARMUP_METHOD": "constant"},
            {0: 0.0001, 9: 0.0001, 10: 0.1},
        ),
        (
            # A warm-up that ends beyond a step aims at the rate that holds there.
            {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (5,), "GAMMA": 0.1},
            {0: 0.0001, 5: 0.00505, 10: 0.01},
        ),
        (
            # Squeezed into iterations 10 to 100: half of the schedule is done at 55.
            {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (50,), "RESCALE_INTERVAL": True},
            {0: 0.0001, 10: 0.1, 54: 0.1, 55: 0.01, 100: 0.01},
        ),
        (
            {"LR_SCHEDULER_NAME": "WarmupCosineLR", "RESCALE_INTERVAL": True},
            {0: 0.0001, 10: 0.1, 55: 0.05, 100: 0.0},
        ),
    ],
)
def test_learning_rates_by_hand(keys, table):
    cfg = make_cfg(**{"BASE_LR": 0.1, "MAX_ITER": 100, "WARMUP_ITERS": 10, "WARMUP_FACTOR": 0.001, **keys})
    factor = lr_factor(cfg)
    assert {i: 0.1 * factor(i) for i in table} == pytest.approx(table, abs=1e-7)


@pytest.mark.parametrize("name", _SCHEDULES)
@pytest.mark.parametrize("warmup_iters", [0, 10, 200])
def test_learning_rate_goes_on_beyond_the_last_iteration(name, warmup_iters):
    factor = lr_factor(make_cfg(BASE_LR=0.02, MAX_ITER=90, WARMUP_ITERS=warmup_iters, **_SCHEDULES[name][0]))
    assert [factor(i) for i in (91, 120, 900)] == [factor(90)] * 3


def test_steps_fall_on_their_iteration_however_the_division_rounds():
    for max_iter in (7, 49, 107, 90_000, 270_000):
        step = max_iter * 2 // 3
        factor = lr_factor(make_cfg(MAX_ITER=max_iter, STEPS=(step,), WARMUP_ITERS=0))
        assert (factor(step - 1), factor(step)) == (1.0, 0.1)


def test_even_decays_fall_on_their_iteration_however_the_division_rounds():
    for parts in range(2, 12):
        for max_iter in range(parts, 400, 7 * parts):
            keys = {"LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "NUM_DECAYS": parts - 1, "GAMMA": 0.5}
            factor = lr_factor(make_cfg(MAX_ITER=max_iter, WARMUP_ITERS=0, **keys))
            for k in range(1, parts):
                step = k * max_iter // parts
                assert (factor(step - 1), factor(step)) == (0.5 ** (k - 1), 0.5**k), (parts, max_iter, k)


def test_steps_beyond_the_end_are_reported_and_do_nothing(log):
    cfg = make_cfg(MAX_ITER=10, STEPS=(5, 20), WARMUP_ITERS=0)
    factor = build_lr_scheduler(cfg, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)).factor
    assert [factor(i) for i in (4, 5, 10, 30)] == [1.0, 0.1, 0.1, 0.1]
    assert "20" in log.text and "MAX_ITER" in log.text


def test_learning_rates_of_all_groups_keep_their_ratio():
    model = SmallModel()
    cfg = make_cfg(
        BASE_LR=0.1, BACKBONE_MULTIPLIER=0.5, BIAS_LR_FACTOR=2.0, MAX_ITER=10, WARMUP_ITERS=5, STEPS=(8,)
    )
    optimizer = build_optimizer(cfg, model)
    bases = [group["lr"] for group in optimizer.param_groups]
    scheduler = build_lr_scheduler(cfg, optimizer)
    factor = lr_factor(cfg)
    assert len(set(bases)) > 2
    for i in range(11):
        assert scheduler.get_last_lr() == pytest.approx([base * factor(i) for base in bases])
        scheduler.step()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"LR_SCHEDULER_NAME": "WarmupCosine"}, ["LR_SCHEDULER_NAME", "WarmupCosine", "WarmupCosineLR"]),
        ({"MAX_ITER": 0}, ["MAX_ITER", "0"]),
        ({"WARMUP_ITERS": -1}, ["WARMUP_ITERS", "-1"]),
    ],
)
def test_impossible_schedules_are_clear_errors(keys, words):
    with pytest.raises(UserError) as error:
        lr_factor(make_cfg(**keys))
    assert all(word in str(error.value) for word in words)


def test_a_cosine_from_a_learning_rate_of_0_is_a_clear_error_or_stays_0():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.0)
    try:
        scheduler = build_lr_scheduler(make_cfg(LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR=0.0), optimizer)
    except UserError as e:
        assert "BASE_LR" in str(e)
    else:
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.0


# ---- learning rate: resuming -------------------------------------------------------------------


def _train(model, optimizer, scheduler, iterations):
    for _ in range(iterations):
        model(torch.ones(2, 3, 5, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_changed_base_lr_takes_effect_when_a_run_is_resumed(tmp_path, name):
    keys = {"OPTIMIZER": name, "MAX_ITER": 10, "WARMUP_ITERS": 4, "STEPS": (8,), "BACKBONE_MULTIPLIER": 0.5}
    model = SmallModel()
    cfg = make_cfg(BASE_LR=0.01, **keys)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    _train(model, optimizer, scheduler, 5)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler).save(
        "model_0000004", iteration=4
    )
    saved = copy.deepcopy(optimizer.state_dict()["state"])

    cfg = make_cfg(BASE_LR=0.03, **keys)
    model = SmallModel()
    optimizer = build_optimizer(cfg, model)
    bases = [group["lr"] for group in optimizer.param_groups]
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 4
    factor = lr_factor(cfg)
    assert sorted(set(bases)) == pytest.approx([0.015, 0.03])
    for iteration in range(5, 10):
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs == pytest.approx([base * factor(iteration) for base in bases])
        if iteration == 5:
            # The optimizer's own state did come back.
            for key, state in optimizer.state_dict()["state"].items():
                for what, value in state.items():
                    torch.testing.assert_close(value, saved[key][what], rtol=0, atol=0)
        _train(model, optimizer, scheduler, 1)


def test_an_unchanged_run_resumes_with_the_same_learning_rates():
    cfg = make_cfg(BASE_LR=0.1, MAX_ITER=10, WARMUP_ITERS=3, LR_SCHEDULER_NAME="WarmupCosineLR")

    def build():
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, build_lr_scheduler(cfg, optimizer)

    optimizer, scheduler = build()
    for _ in range(6):
        scheduler.step()
    other, resumed = build()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(5):
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        scheduler.step()
        resumed.step()


# ---- momentum ----------------------------------------------------------------------------------

POINTS = [[4, 0.8], [8, 0.6], [10, 0.9]]


@pytest.mark.parametrize(
    ("interpolation", "table"),
    [
        ("linear", {4: 0.8, 5: 0.75, 6: 0.7, 7: 0.65, 8: 0.6, 9: 0.75, 10: 0.9}),
        ("cosine", {4: 0.8, 5: 0.7707107, 6: 0.7, 7: 0.6292893, 8: 0.6, 9: 0.75, 10: 0.9}),
        ("step", {4: 0.8, 5: 0.8, 7: 0.8, 8: 0.6, 9: 0.6, 10: 0.9}),
    ],
)
def test_momentum_goes_from_point_to_point_and_stays_before_and_after(interpolation, table):
    momentum = momentum_at(POINTS, interpolation)
    assert {i: momentum(i) for i in table} == pytest.approx(table, abs=1e-7)
    assert [momentum(i) for i in (0, 3, 11, 1000)] == [0.8, 0.8, 0.9, 0.9]


@pytest.mark.parametrize("interpolation", ["linear", "cosine", "step"])
def test_one_point_holds_throughout(interpolation):
    assert [momentum_at([[5, 0.7]], interpolation)(i) for i in (0, 5, 6)] == [0.7] * 3


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([[0, 0.9], 5], r"has 5, not \[iteration, momentum\]"),
        ([[0, 0.9, 1]], r"has \[0, 0.9, 1\], not \[iteration, momentum\]"),
        ([[0, "0.9"]], r"has \[0, '0.9'\], not \[iteration, momentum\]"),
        ([[0, True]], r"has \[0, True\], not \[iteration, momentum\]"),
        ([[0, 1.0]], r"has the momentum 1.0, which is not in \[0, 1\)"),
        ([[0, 0.9], [1, -0.1]], r"has the momentum -0.1, which is not in \[0, 1\)"),
        ([[0, float("nan")]], r"has the momentum nan, which is not in \[0, 1\)"),
        ([[5, 0.9], [5, 0.8]], r"must have rising iterations, not \[\[5, 0.9\], \[5, 0.8\]\]"),
        ([[5, 0.9], [4, 0.8]], "must have rising iterations"),
    ],
)
def test_points_that_are_no_schedule_of_momentum_are_named(points, words):
    with pytest.raises(UserError, match="SOLVER.MOMENTUM_SCHEDULE " + words):
        momentum_at(points, "linear")


def momenta(optimizer):
    """The momentum, or AdamW's beta1, of every group."""
    return [g["betas"][0] if "betas" in g else g["momentum"] for g in optimizer.param_groups]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_every_group_has_the_momentum_of_its_iteration_also_after_a_resume(tmp_path, name):
    keys = {"OPTIMIZER": name, "MAX_ITER": 10, "BACKBONE_MULTIPLIER": 0.5, "STEPS": ()}

    def build(points):
        model = SmallModel()
        cfg = make_cfg(MOMENTUM_SCHEDULE=points, MOMENTUM_INTERPOLATION="cosine", **keys)
        optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, optimizer)
        parts = {"optimizer": optimizer, "scheduler": scheduler}
        return model, optimizer, scheduler, DetectionCheckpointer(model, str(tmp_path), **parts)

    model, optimizer, scheduler, checkpointer = build(POINTS)
    assert len(optimizer.param_groups) > 1
    for iteration in range(7):
        assert set(momenta(optimizer)) == {momentum_at(POINTS, "cosine")(iteration)}
        assert scheduler.scalars() == {
            "lr": optimizer.param_groups[0]["lr"],
            "momentum": momenta(optimizer)[0],
        }
        _train(model, optimizer, scheduler, 1)
    checkpointer.save("model_0000006", iteration=6)

    # The schedule counts, not what the optimizer had when it was saved.
    other = [[0, 0.1], [10, 0.9]]
    model, optimizer, scheduler, checkpointer = build(other)
    checkpointer.resume_or_load("", resume=True)
    for iteration in range(7, 10):
        assert set(momenta(optimizer)) == {momentum_at(other, "cosine")(iteration)}
        _train(model, optimizer, scheduler, 1)
    if name == "AdamW":
        assert {group["betas"][1] for group in optimizer.param_groups} == {0.999}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_without_a_schedule_the_momentum_stays_and_is_not_logged(name):
    cfg = make_cfg(OPTIMIZER=name, MOMENTUM=0.7, BASE_LR=0.1, MAX_ITER=10, WARMUP_ITERS=0, STEPS=(5,))
    model = SmallModel()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(10):
        found.append(scheduler.scalars())
        _train(model, optimizer, scheduler, 1)
    assert found == [{"lr": pytest.approx(lr)} for lr in [0.1] * 5 + [0.01] * 5]
    assert set(momenta(optimizer)) == {0.7}


def test_a_momentum_that_begins_at_0_may_rise():
    model = nn.Linear(1, 1, bias=False)
    cfg = make_cfg(MOMENTUM_SCHEDULE=[[0, 0.0], [1, 0.5]], BASE_LR=1.0, WEIGHT_DECAY=0.0, WARMUP_ITERS=0)
    optimizer = build_optimizer(cfg, model)
    scheduler, start = build_lr_scheduler(cfg, optimizer), model.weight.item()
    moved = []
    for _ in range(3):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        scheduler.step()
        moved.append(start - model.weight.item())
    # Steps of 1; then 1 and 1.5 with half of the step before, the first of which is not remembered.
    assert moved == pytest.approx([1.0, 2.0, 3.5], abs=1e-5)


# ---- parameter groups --------------------------------------------------------------------------


def test_norms_biases_and_the_backbone_have_their_own_settings():
    model = SmallModel()
    cfg = make_cfg(
        BASE_LR=0.1,
        WEIGHT_DECAY=0.01,
        WEIGHT_DECAY_NORM=0.002,
        WEIGHT_DECAY_BIAS=0.0003,
        BIAS_LR_FACTOR=2.0,
        BACKBONE_MULTIPLIER=0.5,
    )
    found = settings(build_optimizer(cfg, model), model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["backbone.conv.weight"] == pytest.approx((0.05, 0.01))
    assert found["backbone.bn.weight"] == pytest.approx((0.05, 0.002))
    assert found["backbone.fc.weight"] == pytest.approx((0.05, 0.01))
    assert found["backbone.fc.bias"] == pytest.approx((0.1, 0.0003))
    assert found["head.gn.weight"] == pytest.approx((0.1, 0.002))
    assert found["head.ln.weight"] == pytest.approx((0.1, 0.002))
    assert found["head.fc.weight"] == pytest.approx((0.1, 0.01))
    assert found["head.fc.bias"] == pytest.approx((0.2, 0.0003))


def test_biases_decay_like_weights_unless_told_otherwise():
    model = SmallModel()
    found = settings(build_optimizer(make_cfg(WEIGHT_DECAY=0.01, WEIGHT_DECAY_NORM=0.002), model), model)
    assert found["head.fc.bias"][1] == found["head.fc.weight"][1] == 0.01
    assert found["backbone.bn.bias"][1] == found["backbone.bn.weight"][1] == 0.002
    cfg = make_cfg(WEIGHT_DECAY=0.01, WEIGHT_DECAY_NORM=0.002, WEIGHT_DECAY_BIAS=0.0)
    found = settings(build_optimizer(cfg, model), model)
    assert found["head.fc.bias"][1] == 0.0
    assert found["head.fc.weight"][1] == 0.01


def test_there_are_as_few_groups_as_settings():
    model = SmallModel()
    assert len(build_optimizer(make_cfg(WEIGHT_DECAY=0.1, WEIGHT_DECAY_NORM=0.1), model).param_groups) == 1
    assert len(build_optimizer(make_cfg(WEIGHT_DECAY=0.1, WEIGHT_DECAY_NORM=0.0), model).param_groups) == 2


def test_frozen_parameters_are_left_out():
    model = SmallModel()
    model.backbone.requires_grad_(False)
    found = settings(build_optimizer(make_cfg(), model), model)
    assert set(found) == {name for name, _ in model.named_parameters() if name.startswith("head.")}
    model.requires_grad_(False)
    with pytest.raises(UserError, match="FREEZE_AT"):
        build_optimizer(make_cfg(), model)


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_a_shared_parameter_is_optimized_once(multiplier):
    model = SmallModel()
    model.head["fc"] = nn.Linear(4, 4)
    model.head["fc"].weight = model.backbone["fc"].weight
    model.head["again"] = model.head["out"]
    optimizer = build_optimizer(make_cfg(BACKBONE_MULTIPLIER=multiplier), model)
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters()}


# ---- optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "build"),
    [
        (
            {"OPTIMIZER": "SGD", "MOMENTUM": 0.8},
            lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, fused=False),
        ),
        (
            {"OPTIMIZER": "SGD", "MOMENTUM": 0.8, "NESTEROV": True},
            lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, nesterov=True, fused=False),
        ),
        (
            {"OPTIMIZER": "AdamW", "MOMENTUM": 0.85},
            lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.85, 0.999), fused=False),
        ),
    ],
)
def test_steps_equal_those_of_torchs_optimizers(keys, build):
    torch.manual_seed(0)
    model = SmallModel()
    other = copy.deepcopy(model)
    optimizer = build_optimizer(
        make_cfg(BASE_LR=0.1, WEIGHT_DECAY=0.02, WEIGHT_DECAY_NORM=0.0, **keys), model
    )
    norms = [p for name, p in other.named_parameters() if name.split(".")[1] in ("bn", "gn", "ln")]
    rest = [p for p in other.parameters() if not any(p is norm for norm in norms)]
    expected = build([{"params": rest, "weight_decay": 0.02}, {"params": norms, "weight_decay": 0.0}])
    before = copy.deepcopy(model.state_dict())
    for i in range(3):
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            twin.grad = parameter.grad.clone()
        optimizer.step()
        expected.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-5, atol=1e-6)
        assert not parameter.equal(before[name])


def test_an_unknown_optimizer_is_a_clear_error():
    with pytest.raises(UserError, match=r"SOLVER.OPTIMIZER.*'Adam'.*SGD.*AdamW"):
        build_optimizer(make_cfg(OPTIMIZER="Adam"), SmallModel())


@pytest.mark.parametrize(
    "keys", [{"NESTEROV": True, "MOMENTUM": 0.0}, {"BASE_LR": -0.1}, {"OPTIMIZER": "AdamW", "MOMENTUM": 1.5}]
)
def test_impossible_settings_of_the_optimizer_are_clear_errors(keys):
    with pytest.raises(UserError, match=r"SOLVER\."):
        build_optimizer(make_cfg(**keys), SmallModel())


# ---- clipping ----------------------------------------------------------------------------------


def clipping_model():
    """Two parameters with gradients of norm 5 and 12 (13 together), one frozen, one without."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(4)])
    model[0].grad = torch.tensor([3.0, -4.0])
    model[1].grad = torch.tensor([0.0, 12.0])
    model[2].requires_grad_(False)
    return model


def clip_cfg(kind, value, **more):
    return make_cfg(
        CLIP_GRADIENTS__ENABLED=True, CLIP_GRADIENTS__CLIP_TYPE=kind, CLIP_GRADIENTS__CLIP_VALUE=value, **more
    )


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("value", [3.0, -3.5], [0.0, 3.5]),
        # Each parameter on its own: norm 5 -> 3.5, norm 12 -> 3.5.
        ("norm", [2.1, -2.8], [0.0, 3.5]),
        # Both together: norm 13 -> 3.5.
        ("full_model", [3.0 * 3.5 / 13, -4.0 * 3.5 / 13], [0.0, 12.0 * 3.5 / 13]),
    ],
)
def test_gradients_are_clipped_and_the_norm_is_that_before(kind, first, second):
    model = clipping_model()
    scalars = build_gradient_clipper(clip_cfg(kind, 3.5), model)()
    assert model[0].grad.tolist() == pytest.approx(first, abs=1e-5)
    assert model[1].grad.tolist() == pytest.approx(second, abs=1e-5)
    assert model[2].grad is None and model[3].grad is None
    (norm,) = scalars.values()
    assert scalars == {"grad_norm": norm} and isinstance(norm, torch.Tensor) and norm.shape == ()
    assert norm.item() == pytest.approx(13.0)


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_gradients_below_the_limit_are_left_alone(kind):
    model = clipping_model()
    build_gradient_clipper(clip_cfg(kind, 100.0), model)()
    assert model[0].grad.tolist() == pytest.approx([3.0, -4.0])
    assert model[1].grad.tolist() == pytest.approx([0.0, 12.0])


def test_norm_type_is_honoured():
    model = clipping_model()
    cfg = clip_cfg("full_model", 6.0, CLIP_GRADIENTS__NORM_TYPE=float("inf"))
    norm = build_gradient_clipper(cfg, model)()["grad_norm"]
    assert norm.item() == 12.0
    assert model[0].grad.tolist() == pytest.approx([1.5, -2.0], rel=1e-4)


def test_without_clipping_gradients_stay_and_the_norm_is_given():
    model = clipping_model()
    clip_gradients = build_gradient_clipper(make_cfg(CLIP_GRADIENTS__CLIP_VALUE=0.1), model)
    assert clip_gradients()["grad_norm"].item() == pytest.approx(13.0)
    assert model[0].grad.tolist() == [3.0, -4.0]
    assert model[1].grad.tolist() == [0.0, 12.0]


def test_the_norm_tells_of_a_gradient_that_is_not_finite():
    model = clipping_model()
    model[0].grad[0] = float("nan")
    assert math.isnan(build_gradient_clipper(make_cfg(), model)()["grad_norm"].item())
