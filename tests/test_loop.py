"""What `do_train` does, and what it does not do, between two writes."""

import json
import runpy
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from model_helpers import RESNET18, SMALL_HEAD, make_cfg, two_samples
from shared.syncs import SyncCounter, _CopyCounter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from plaintrain.config import get_cfg
from plaintrain.ema import ModelEMA
from plaintrain.modeling import build_model
from plaintrain.utils.events import get_event_storage

TRAIN = Path(__file__).resolve().parent.parent / "scripts" / "plain_train_net.py"
# Whatever brings a value of a tensor to Python makes the host wait for the device.
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, data):
        loss_a, loss_b, *_ = self.layer(data).square().mean(0).unbind()
        return {"loss_a": loss_a, "loss_b": loss_b, "accuracy": loss_a.detach() + 7}


class Batches:
    """A loader that yields one batch for ever."""

    def __iter__(self):
        while True:
            yield torch.ones(8, 4)

    def image_names(self, iteration):
        return [f"{iteration} (image-{iteration}.jpg)"]

    def state_dict(self):
        return {}


class _Scalars(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self._note(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def do_train(tmp_path):
    function = runpy.run_path(str(TRAIN))["do_train"]
    function.__globals__["build_detection_train_loader"] = lambda cfg: Batches()
    return function


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 50, "SOLVER.CHECKPOINT_PERIOD", 0])
    return cfg


def _spy(name, note):
    original = getattr(torch.Tensor, name)

    def call(self, *args, **kwargs):
        note(name)
        return original(self, *args, **kwargs)

    return mock.patch.object(torch.Tensor, name, call)


@pytest.mark.parametrize("clip", ["value", "norm", "full_model", None])
def test_no_value_is_read_from_the_device_between_two_writes(do_train, cfg, clip):
    if clip:
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip
    reads = {}

    def note(what):
        reads.setdefault(get_event_storage().iter, []).append(what)

    with ExitStack() as stack:
        for name in _READS:
            stack.enter_context(_spy(name, lambda what: note(what) if _inside() else None))
        stack.enter_context(_Scalars(lambda what: note(what) if _inside() else None))
        do_train(cfg, Model())
    assert set(reads) == {19, 39, 49}


class CountedSteps:
    """Counts the sync points and uploads of each iteration: those of the loop, and those of the model."""

    def __init__(self, do_train, model):
        self.counter = SyncCounter()
        self.of_loop, self.of_model, self._start, self._apart = [], [], 0, 0
        do_train.__globals__["build_detection_train_loader"] = lambda cfg: self
        model.forward = self.counted_apart(model.forward)
        self._backward = self.counted_apart(torch.Tensor.backward)

    def counted_apart(self, function):
        def call(*args, **kwargs):
            before = self.counter.counts.total()
            result = function(*args, **kwargs)
            self._apart += self.counter.counts.total() - before
            return result

        return call

    def __iter__(self):
        samples = two_samples()
        while True:
            self._start, self._apart = self.counter.counts.total(), 0
            yield samples
            self.of_loop.append(self.counter.counts.total() - self._start - self._apart)
            self.of_model.append(self._apart)

    def state_dict(self):
        return {}

    def __enter__(self):
        self._stack = ExitStack()
        self._stack.enter_context(mock.patch.object(torch.Tensor, "backward", self._backward))
        self._stack.enter_context(self.counter)
        self._stack.enter_context(_CopyCounter(self.counter.counts))

    def __exit__(self, *exc_info):
        self._stack.close()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["SOLVER.ACCUMULATE_STEPS", 2, "MODEL.EMA.ENABLED", True],
        ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"],
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16", "SOLVER.OPTIMIZER", "AdamW"],
    ],
    ids=["plain", "accumulation and averages", "clipping", "bfloat16 and AdamW"],
)
def test_the_loop_around_a_detector_has_no_sync_point_and_no_upload_between_two_writes(
    do_train, tmp_path, options
):
    cfg = make_cfg(*RESNET18, *SMALL_HEAD, *options, "SOLVER.CHECKPOINT_PERIOD", 0, "TEST.EVAL_PERIOD", 0)
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 9, "LOG_PERIOD", 4])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    model = build_model(cfg)
    steps = CountedSteps(do_train, model)
    # AveragedModel counts its steps in a tensor of the host: to look at it is no sync point.
    average = steps.counted_apart(ModelEMA.update)
    with mock.patch.object(ModelEMA, "update", average), steps:
        do_train(cfg, model)
    written = {3, 7}
    assert all((steps.of_loop[i] > 0) == (i in written) for i in range(8)), steps.of_loop
    # Those of the model are limited elsewhere; here they show that sync points are seen.
    assert min(steps.of_model) > 0, steps.of_model


def _inside():
    try:
        get_event_storage()
    except RuntimeError:
        return False
    return True


def test_only_losses_are_summed_and_the_rest_is_logged(do_train, cfg, tmp_path):
    torch.manual_seed(0)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.LOG_PERIOD = 2, 0.0, 1
    do_train(cfg, Model())
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["total_loss"] == pytest.approx(first["loss_a"] + first["loss_b"])
    assert first["accuracy"] == pytest.approx(first["loss_a"] + 7)


class Poisoned(Model):
    """Infinite from its 8th step on; or with finite losses and infinite gradients."""

    def __init__(self, gradient_only):
        super().__init__()
        self.steps, self.gradient_only = 0, gradient_only

    def forward(self, data):
        losses = super().forward(data)
        self.steps += 1
        if self.steps == 8 and self.gradient_only:
            # The square root's slope at 0 is infinite, its value is not.
            losses["loss_a"] = losses["loss_a"] + (self.layer.weight * 0).sum().sqrt()
        elif self.steps >= 8:
            losses["loss_a"] = losses["loss_a"] * float("inf")
        return losses


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("period", [3, 8])
def test_a_poisoned_state_is_never_saved(do_train, cfg, tmp_path, gradient_only, period):
    cfg.SOLVER.CHECKPOINT_PERIOD = period
    with pytest.raises(FloatingPointError, match=r"image-\d+\.jpg"):
        do_train(cfg, Poisoned(gradient_only))
    for path in tmp_path.glob("*.pth"):
        state = torch.load(path, weights_only=True)["model"]
        assert all(value.isfinite().all() for value in state.values()), path
    assert (tmp_path / "model_0000005.pth").exists() == (period == 3)


def test_the_checkpoint_is_written_before_the_evaluation(do_train, cfg, tmp_path):
    seen = []

    def failing_test(cfg, model):
        seen.append((tmp_path / "model_0000003.pth").exists())
        raise RuntimeError("the evaluator broke")

    do_train.__globals__["do_test"] = failing_test
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = 4
    with pytest.raises(RuntimeError, match="the evaluator broke"):
        do_train(cfg, Model())
    assert seen == [True]


def test_results_are_written_at_the_iteration_of_their_evaluation(do_train, cfg, tmp_path):
    do_train.__globals__["do_test"] = lambda cfg, model: {"set": {"bbox": {"AP": 12.5}}}
    cfg.TEST.EVAL_PERIOD = 7
    do_train(cfg, Model())
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {m["iteration"] for m in lines if m.get("set/bbox/AP") == 12.5} == {6, 13, 20, 27, 34, 41, 48, 49}
