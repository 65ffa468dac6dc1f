"""Parameter groups, optimizers, learning rate schedules and gradient clipping: plaintrain.solver."""

import copy
import math

import pytest
import torch
from torch import nn

from plaintrain import solver
from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.solver.build import reduce_param_groups
from plaintrain.solver.lr_scheduler import build_lr_factor, build_momentum_factor
from plaintrain.utils.errors import UserError

POINTS = [[4, 0.8], [8, 0.6], [10, 0.9]]


def make_cfg(**solver):
    """Return the defaults with SOLVER keys set; `A__B` stands for A.B."""
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
    """Return {parameter name: (lr, weight decay)} of an optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


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


MULTI_STEP, COSINE, FIXED_GAMMA = (
    {"LR_SCHEDULER_NAME": f"Warmup{name}LR"} for name in ("MultiStep", "Cosine", "StepWithFixedGamma")
)
_SCHEDULES = {
    "multi_step": ({**MULTI_STEP, "STEPS": (40, 70), "GAMMA": 0.1}, multi_step((40, 70), 0.1, 90)),
    "multi_step_early": ({**MULTI_STEP, "STEPS": (7, 90), "GAMMA": 0.5}, multi_step((7, 90), 0.5, 90)),
    "cosine": ({**COSINE, "BASE_LR_END": 0.0}, cosine(0.0)),
    "cosine_with_end": ({**COSINE, "BASE_LR_END": 0.005}, cosine(0.25)),
    "fixed_gamma": ({**FIXED_GAMMA, "NUM_DECAYS": 3, "GAMMA": 0.2}, fixed_gamma(3, 0.2)),
}


# Pairwise: every schedule with and without a warm-up, and each warm-up in every mode.
@pytest.mark.parametrize(
    ("name", "warmup_iters", "method", "rescale"),
    [
        ("multi_step", 10, "linear", False),
        ("multi_step", 0, "constant", True),
        ("multi_step_early", 10, "linear", True),
        ("multi_step", 90, "linear", False),
        ("cosine", 10, "constant", True),
        ("cosine", 0, "linear", False),
        ("cosine_with_end", 90, "linear", True),
        ("fixed_gamma", 10, "linear", True),
        ("fixed_gamma", 200, "linear", False),
    ],
)
def test_lr_factor_equals_detectron2s(name, warmup_iters, method, rescale):
    keys, schedule = _SCHEDULES[name]
    warmup = {"WARMUP_ITERS": warmup_iters, "WARMUP_FACTOR": 0.01, "WARMUP_METHOD": method}
    factor = build_lr_factor(make_cfg(BASE_LR=0.02, MAX_ITER=90, RESCALE_INTERVAL=rescale, **warmup, **keys))
    length = min(warmup_iters / 90, 1.0)
    expected = [reference_factor(i / 90, schedule, length, method, rescale) for i in range(91)]
    assert [factor(i) for i in range(91)] == pytest.approx(expected, rel=1e-9)
    # It stays there after the last iteration.
    assert [factor(i) for i in (91, 120, 900)] == [factor(90)] * 3


def test_lr_multiplier_and_groups_as_in_detectron2():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=4.0)
    multiplier = solver.WarmupParamScheduler(lambda where: 1 - where, 0.5, 0.4)
    factor = solver.LRMultiplier(optimizer, multiplier, 5).factor
    assert [factor(i) for i in range(7)] == pytest.approx([0.5, 0.55, 0.6, 0.4, 0.2, 0.0, 0.0])
    groups = [{"params": ["a", "b"], "lr": 1}, {"params": ["c"], "lr": 1}, {"params": ["b"], "m": 3}]
    merged = [{"params": ["a", "c"], "lr": 1}, {"params": ["b"], "lr": 1, "m": 3}]
    assert reduce_param_groups(groups) == merged


@pytest.mark.parametrize("schedule", [MULTI_STEP, FIXED_GAMMA])
def test_lr_steps_fall_on_their_iteration_and_those_beyond_the_end_are_ignored(schedule, log):
    for parts in (2, 3, 7, 11):
        for max_iter in (*range(parts, 400, 7 * parts), 49, 107, 90_000, 270_000):
            steps = tuple(math.ceil(k * max_iter / parts) for k in range(1, parts))
            keys = schedule | {"STEPS": steps, "NUM_DECAYS": parts - 1, "GAMMA": 0.5}
            factor = build_lr_factor(make_cfg(MAX_ITER=max_iter, WARMUP_ITERS=0, **keys))
            for k, step in enumerate(steps, start=1):
                assert (factor(step - 1), factor(step)) == (0.5 ** (k - 1), 0.5**k), (parts, max_iter, k)
    cfg = make_cfg(MAX_ITER=10, STEPS=(5, 20), WARMUP_ITERS=0)
    factor = solver.build_lr_scheduler(cfg, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)).factor
    assert [factor(i) for i in (4, 5, 10, 30)] == [1.0, 0.1, 0.1, 0.1]
    assert "20" in log.text and "MAX_ITER" in log.text


def momenta(optimizer):
    """Return the momentum, or AdamW's beta1, of every group."""
    return [g["betas"][0] if "betas" in g else g["momentum"] for g in optimizer.param_groups]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("SGD", {"MOMENTUM_SCHEDULE": POINTS}, {"MOMENTUM_SCHEDULE": [[0, 0.1], [10, 0.9]]}),
        ("AdamW", {"MOMENTUM_SCHEDULE": POINTS}, {"MOMENTUM_SCHEDULE": [[0, 0.1], [10, 0.9]]}),
        ("SGD", {"MOMENTUM": 0.8}, {"MOMENTUM": 0.1}),
        ("AdamW", {"MOMENTUM": 0.8}, {"MOMENTUM": 0.1}),
    ],
)
def test_resumed_run_applies_changed_learning_rates_and_momenta(tmp_path, name, before, after):
    keys = {"OPTIMIZER": name, "MAX_ITER": 10, "WARMUP_ITERS": 4, "STEPS": (8,), "BACKBONE_MULTIPLIER": 0.5}

    factor = build_lr_factor(make_cfg(**keys))
    for base_lr, changed, iterations in ((0.01, before, range(5)), (0.03, after, range(5, 10))):
        model = SmallModel()
        cfg = make_cfg(BASE_LR=base_lr, MOMENTUM_INTERPOLATION="cosine", **keys, **changed)
        optimizer = solver.build_optimizer(cfg, model)
        bases = [group["lr"] for group in optimizer.param_groups]
        scheduler = solver.build_lr_scheduler(cfg, optimizer)
        checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler)
        # Of the optimizer's own state tests/properties/test_checkpoint_properties.py takes care.
        assert checkpointer.resume_or_load("").get("iteration", -1) == iterations[0] - 1
        momentum = build_momentum_factor(
            changed.get("MOMENTUM_SCHEDULE", [[0, cfg.SOLVER.MOMENTUM]]), "cosine"
        )
        for iteration in iterations:
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([base * factor(iteration) for base in bases])
            assert set(momenta(optimizer)) == {momentum(iteration)}
            # A momentum that stays is not logged.
            logged = {"momentum": momenta(optimizer)[0]} if "MOMENTUM_SCHEDULE" in changed else {}
            assert scheduler.scalars() == {"lr": rates[0], **logged}
            model(torch.ones(2, 3, 5, 5)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        assert sorted(set(bases)) == pytest.approx([base_lr / 2, base_lr])
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


@pytest.mark.parametrize(
    ("interpolation", "table"),
    [
        ("linear", {4: 0.8, 5: 0.75, 6: 0.7, 7: 0.65, 8: 0.6, 9: 0.75, 10: 0.9}),
        ("cosine", {4: 0.8, 5: 0.7707107, 6: 0.7, 7: 0.6292893, 8: 0.6, 9: 0.75, 10: 0.9}),
        ("step", {4: 0.8, 5: 0.8, 7: 0.8, 8: 0.6, 9: 0.6, 10: 0.9}),
    ],
)
def test_momentum_at_interpolates_between_the_points(interpolation, table):
    momentum = build_momentum_factor(POINTS, interpolation)
    assert {i: momentum(i) for i in table} == pytest.approx(table, abs=1e-7)
    assert [momentum(i) for i in (0, 3, 11, 1000)] == [0.8, 0.8, 0.9, 0.9]
    assert [build_momentum_factor([[5, 0.7]], interpolation)(i) for i in (0, 5, 6)] == [0.7] * 3


def test_param_groups_of_norms_biases_and_the_backbone():
    model = SmallModel()
    keys = {"BASE_LR": 0.1, "WEIGHT_DECAY": 0.01, "WEIGHT_DECAY_NORM": 0.002}
    keys |= {"BIAS_LR_FACTOR": 2.0, "BACKBONE_MULTIPLIER": 0.5}
    expected = {
        "backbone.conv.weight": (0.05, 0.01),
        "backbone.bn.weight": (0.05, 0.002),
        "backbone.fc.bias": (0.1, 0.0003),
        "head.gn.weight": (0.1, 0.002),
        "head.ln.weight": (0.1, 0.002),
        "head.fc.weight": (0.1, 0.01),
        "head.fc.bias": (0.2, 0.0003),
    }
    optimizer = solver.build_optimizer(make_cfg(**keys, WEIGHT_DECAY_BIAS=0.0003), model)
    found = settings(optimizer, model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name
    # As few as there are different settings.
    assert len(optimizer.param_groups) == len(set(found.values()))
    alike = make_cfg(WEIGHT_DECAY=0.1, WEIGHT_DECAY_NORM=0.1)
    assert len(solver.build_optimizer(alike, model).param_groups) == 1
    # By default, biases decay like the weights of their layer.
    found = settings(solver.build_optimizer(make_cfg(**keys), model), model)
    assert found["head.fc.bias"] == pytest.approx((0.2, 0.01))
    assert found["backbone.bn.bias"] == pytest.approx((0.1, 0.002))
    # A shared parameter is there once, a frozen one never.
    model.head["fc"] = nn.Linear(4, 4)
    model.head["fc"].weight = model.backbone["fc"].weight
    model.head["again"] = model.head["out"]
    optimizer = solver.build_optimizer(make_cfg(BACKBONE_MULTIPLIER=0.5), model)
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
    model.backbone.requires_grad_(False)
    found = settings(solver.build_optimizer(make_cfg(), model), model)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("keys", "expected_type", "options"),
    [
        ({"OPTIMIZER": "SGD", "MOMENTUM": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
        ({"MOMENTUM": 0.8, "NESTEROV": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ({"OPTIMIZER": "AdamW", "MOMENTUM": 0.85}, torch.optim.AdamW, {"betas": (0.85, 0.999)}),
    ],
)
def test_optimizer_steps_equal_those_of_torch(keys, expected_type, options):
    model = nn.Linear(4, 4)
    other = copy.deepcopy(model)
    optimizer = solver.build_optimizer(make_cfg(BASE_LR=0.1, WEIGHT_DECAY=0.02, **keys), model)
    expected = expected_type(other.parameters(), lr=0.1, weight_decay=0.02, fused=False, **options)
    for i in range(3):
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            twin.grad = parameter.grad.clone()
        optimizer.step()
        expected.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "trains", "words"),
    [
        ({}, False, "FREEZE_AT"),
        ({"NESTEROV": True, "MOMENTUM": 0.0}, True, r"MOMENTUM must be above 0 .*NESTEROV True"),
        ({"OPTIMIZER": "AdamW", "MOMENTUM": 1.5}, True, "SOLVER.MOMENTUM must be .*below 1"),
    ],
)
def test_optimizer_errors_name_the_key(keys, trains, words):
    with pytest.raises(UserError, match=words):
        solver.build_optimizer(make_cfg(**keys), SmallModel().requires_grad_(trains))


def clipping_model():
    """Two parameters with gradients of norm 5 and 12 (13 together), one frozen, one without."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(4)])
    model[0].grad = torch.tensor([3.0, -4.0])
    model[1].grad = torch.tensor([0.0, 12.0])
    model[2].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("kind", "norm_type", "first", "second", "before"),
    [
        (None, 2.0, [3.0, -4.0], [0.0, 12.0], 13.0),
        ("value", 2.0, [3.0, -3.5], [0.0, 3.5], 13.0),
        # Each parameter on its own: norm 5 -> 3.5, norm 12 -> 3.5.
        ("norm", 2.0, [2.1, -2.8], [0.0, 3.5], 13.0),
        # Both together: norm 13 -> 3.5, or the largest of 12 -> 3.5.
        ("full_model", 2.0, [3.0 * 3.5 / 13, -4.0 * 3.5 / 13], [0.0, 12.0 * 3.5 / 13], 13.0),
        ("full_model", float("inf"), [3.0 * 3.5 / 12, -4.0 * 3.5 / 12], [0.0, 3.5], 12.0),
    ],
)
def test_clipper_clips_gradients_and_returns_the_norm_before(kind, norm_type, first, second, before):
    keys = {"CLIP_GRADIENTS__ENABLED": kind is not None, "CLIP_GRADIENTS__CLIP_TYPE": kind or "value"}
    keys["CLIP_GRADIENTS__NORM_TYPE"] = norm_type
    model = clipping_model()
    norm = solver.build_gradient_clipper(make_cfg(**keys, CLIP_GRADIENTS__CLIP_VALUE=3.5), model)()
    assert model[0].grad.tolist() == pytest.approx(first, abs=1e-5)
    assert model[1].grad.tolist() == pytest.approx(second, abs=1e-5)
    assert model[2].grad is None and model[3].grad is None
    assert isinstance(norm, torch.Tensor) and norm.shape == ()
    assert norm.item() == pytest.approx(before)
    # Below the limit they are left alone.
    model = clipping_model()
    clip_gradients = solver.build_gradient_clipper(make_cfg(**keys, CLIP_GRADIENTS__CLIP_VALUE=100.0), model)
    clip_gradients()
    assert model[0].grad.tolist() == pytest.approx([3.0, -4.0])
    assert model[1].grad.tolist() == pytest.approx([0.0, 12.0])
    model[0].grad[0] = float("nan")
    assert math.isnan(clip_gradients().item())
