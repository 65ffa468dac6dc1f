"""Mixed precision from the config: autocast and the gradient scaler of PyTorch.

https://docs.pytorch.org/docs/stable/notes/amp_examples.html
"""

import contextlib
from typing import NamedTuple

import torch

from plaintrain.utils.errors import UserError


class Amp(NamedTuple):
    """Mixed precision in training; both parts do nothing where it is off."""

    autocast: contextlib.AbstractContextManager
    scaler: torch.amp.GradScaler

    def scalars(self):
        """Return {"amp_scale": the loss scale}, a device sync; {} without a scaler."""
        return {"amp_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}


def build_autocast(enabled, precision, device_type):
    """Return a context manager under which a forward pass runs in mixed precision; it may be entered again.

    Args:
        precision: "float16" or "bfloat16".
        device_type: "cpu", "cuda" or "mps".
    """
    if not enabled:
        # torch.autocast takes its time also where it does nothing.
        return contextlib.nullcontext()
    if device_type == "cuda" and precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UserError("SOLVER.AMP.PRECISION is bfloat16, which this GPU does not have; use float16")
    # The cache keeps cast weights for as long as autocast lasts: over a whole evaluation that is a gain,
    # in training autocast ends with each forward pass.
    return torch.autocast(device_type, getattr(torch, precision))


def build_test_autocast(cfg, model):
    """Build the autocast context of an evaluation, as TEST.AMP says, on the model's device."""
    return build_autocast(cfg.TEST.AMP, cfg.SOLVER.AMP.PRECISION, next(model.parameters()).device.type)


def build_amp(cfg, model):
    """Build the `Amp` of SOLVER.AMP on the model's device."""
    amp, device_type = cfg.SOLVER.AMP, next(model.parameters()).device.type
    # It keeps float16 gradients from vanishing; disabled, all its steps are plain.
    scaler = torch.amp.GradScaler(device_type, enabled=amp.ENABLED and amp.PRECISION == "float16")
    return Amp(build_autocast(amp.ENABLED, amp.PRECISION, device_type), scaler)
