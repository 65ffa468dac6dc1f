"""Mistakes that checkpoints could have, patched in under them: what is written, read and sorted."""

import os

import torch

from plaintrain.checkpoint import PeriodicCheckpointer
from plaintrain.ema import ModelEMA
from plaintrain.utils import checkpoint_files
from plaintrain.utils.background import Background, HostCopy


def _mapped(value, change):
    """A value with a change to it and to all in it."""
    if isinstance(value, dict):
        value = type(value)((key, _mapped(item, change)) for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = type(value)(_mapped(item, change) for item in value)
    return change(value)


def saved(change):
    """A defect in what is written: `change` gets every value, at any depth."""

    def defect(patch):
        original = torch.save
        patch.setattr(torch, "save", lambda data, f: original(_mapped(data, change), f))

    return defect


def saved_tensors(change):
    """A defect in what is written of tensors."""
    return saved(lambda value: change(value) if isinstance(value, torch.Tensor) else value)


def in_storage_order(tensor):
    """The numbers as they lie in memory, whatever the strides."""
    flat = torch.tensor(tensor.untyped_storage().tolist(), dtype=torch.uint8).view(tensor.dtype)
    return flat[: tensor.numel()].reshape(tensor.shape) if flat.numel() >= tensor.numel() else tensor


def through_float(tensor):
    return tensor.double().to(tensor.dtype) if tensor.dtype == torch.int64 else tensor


def optimizer_state_lost(patch):
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        original = kind.load_state_dict

        def load(self, state, original=original):
            original(self, {**state, "state": self.state_dict()["state"]})

        patch.setattr(kind, "load_state_dict", load)


def one_step_ahead(self, state):
    self.last_epoch = state["last_epoch"] + 1
    self._apply()


def not_applied(self, state):
    """The optimizer has the learning rate that it was built with."""
    self.last_epoch = state["last_epoch"]
    for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
        group["lr"] = base


def averages_counted_anew(patch):
    original = ModelEMA.load_state_dict
    patch.setattr(
        ModelEMA,
        "load_state_dict",
        lambda self, state: original(self, {**state, "n_averaged": torch.zeros_like(state["n_averaged"])}),
    )


def last_is_not_noted(patch):
    original = os.replace

    def replace(source, target):
        return None if os.path.basename(target) == "last_checkpoint" else original(source, target)

    patch.setattr(os, "replace", replace)


def damage_is_silent(patch):
    original = torch.load

    def load(path, **options):
        try:
            return original(path, **options)
        except Exception:
            return {"model": torch.nn.Linear(1, 1).state_dict(), "iteration": 0}

    patch.setattr(torch, "load", load)


def periodic_with(**more):
    """A defect that adds to arguments of `PeriodicCheckpointer`."""

    def defect(patch):
        original = PeriodicCheckpointer.__init__

        def init(self, checkpointer, period, max_iter=None, max_to_keep=0, **options):
            period, max_to_keep = period + more.get("period", 0), max_to_keep + more.get("max_to_keep", 0)
            original(self, checkpointer, period, max_iter, max_to_keep, **options)

        patch.setattr(PeriodicCheckpointer, "__init__", init)

    return defect


def steps_counted_from_one(patch):
    original = PeriodicCheckpointer.step
    patch.setattr(PeriodicCheckpointer, "step", lambda self, i, **options: original(self, i + 1, **options))


def sorted_as_text(patch):
    patch.setattr(checkpoint_files, "sorted", lambda names, key: sorted(names), raising=False)


def nothing_is_copied(patch):
    """Files are written as late as may be, and not from a copy."""
    jobs = []

    def wait(self):
        while jobs:
            function, arguments = jobs.pop(0)
            function(*arguments)

    patch.setattr(Background, "submit", lambda self, *job: jobs.append((job[0], job[1:])))
    patch.setattr(Background, "wait", wait)
    patch.setattr(HostCopy, "__call__", lambda self, data: data)
