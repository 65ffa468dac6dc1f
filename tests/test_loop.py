"""The loop of plain_train_net.py between two writes, and when a step is not finite."""

import importlib.util
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from processes import ROOT, STEP, Run, change_losses, write_config
from run_files import load
from shared.syncs import SyncCounter, _CopyCounter

from plaintrain.config import get_cfg
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.modeling import build_model
from plaintrain.solver.ema import ModelEMA
from plaintrain.utils.events import get_event_storage
from plaintrain.utils.stop import StopSignal


@pytest.fixture(scope="module")
def do_train():
    """The function (cfg, model) of the script, imported as a module."""
    spec = importlib.util.spec_from_file_location("plain_train", ROOT / "scripts" / "plain_train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.do_train


@pytest.mark.parametrize(
    "options",
    [
        ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"],
        ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"],
        STEP,
        ["SOLVER.OPTIMIZER", "SGD"],
    ],
    ids=["clipped by value", "clipped by norm", "bfloat16, accumulation, averages, clipping", "SGD"],
)
def test_loop_has_no_sync_point_and_no_upload_between_two_writes(do_train, tmp_path, monkeypatch, options):
    cfg = get_cfg()
    cfg.merge_from_file(write_config(tmp_path))
    cfg.merge_from_list([*options, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 9, "LOG_PERIOD", 4])
    # A worker loads the images where nothing is counted.
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 1, "SOLVER.CHECKPOINT_PERIOD", 0, "TEST.EVAL_PERIOD", 0])
    declare_datasets(cfg)
    cfg.DATASETS.TEST, cfg.MODEL.ROI_HEADS.NUM_CLASSES = (), 3
    model, counter = build_model(cfg), SyncCounter()
    counts, of_model, totals = counter.counts, [], []

    def set_apart(function):
        def call(*args, **kwargs):
            before = Counter(counts)
            result = function(*args, **kwargs)
            of_model.append(counts.total() - before.total())
            counts.clear()
            counts.update(before)
            return result

        return call

    requested = StopSignal.requested_on_any_rank
    model.forward = set_apart(model.forward)
    monkeypatch.setattr(torch.Tensor, "backward", set_apart(torch.Tensor.backward))
    # AveragedModel counts its steps in a tensor of the host: to look at it is no sync point.
    monkeypatch.setattr(ModelEMA, "update", set_apart(ModelEMA.update))
    # Each iteration begins with this question.
    monkeypatch.setattr(
        StopSignal, "requested_on_any_rank", lambda self: totals.append(counts.total()) or requested(self)
    )
    with counter, _CopyCounter(counts):
        do_train(cfg, model)
    assert len(totals) == 9
    assert [i for i, (before, after) in enumerate(pairwise(totals)) if after > before] == [3, 7]
    # Those of the model are limited elsewhere; here they show that sync points are seen.
    assert sum(map(bool, of_model)) >= 9


def infinite_loss(model, losses):
    return {name: value * float("inf") for name, value in losses.items()}


def infinite_gradient(model, losses):
    # The square root's slope at 0 is infinite, its value is not.
    weight = next(p for p in model.parameters() if p.requires_grad)
    return {name: value + (weight * 0).sum().sqrt() for name, value in losses.items()}


def change_from_7_on(change):
    change_losses(lambda model, losses: change(model, losses) if get_event_storage().iter >= 7 else losses)


@pytest.mark.parametrize(("change", "period"), [(infinite_loss, 8), (infinite_gradient, 3)])
def test_poisoned_state_is_never_saved(tmp_path, change, period):
    options = ["SOLVER.CHECKPOINT_PERIOD", period, "TEST.EVAL_PERIOD", 0, "LOG_PERIOD", 20]
    run = Run(tmp_path / "out", options, faults=partial(change_from_7_on, change)).wait(code=1)
    assert "Traceback" not in run.output
    assert "became NaN or infinite at iteration 7" in run.output and "shapes://train/" in run.output
    saved = sorted(path.name for path in (tmp_path / "out").glob("*.pth"))
    assert saved == ([] if period == 8 else ["model_0000002.pth", "model_0000005.pth"])
    states = [load(tmp_path / "out" / name)["model"] for name in saved]
    assert all(value.isfinite().all() for state in states for value in state.values())
