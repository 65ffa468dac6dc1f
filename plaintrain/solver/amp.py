"""Automatic mixed precision: autocast and gradient scaler from a config.

https://docs.pytorch.org/docs/stable/notes/amp_examples.html
"""

import contextlib
from typing import NamedTuple

import torch
from torch import nn

from plaintrain.config import CfgNode
from plaintrain.utils.errors import UserError


class Amp(NamedTuple):
    """Autocast context and gradient scaler; both do nothing if mixed precision is off."""

    autocast: contextlib.AbstractContextManager
    scaler: torch.amp.GradScaler

    def scalars(self) -> dict[str, float]:
        """Return {"amp_scale": loss scale}, which is a device sync; {} without a scaler."""
        return {"amp_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}


def build_autocast(enabled: bool, precision: str, device_type: str) -> contextlib.AbstractContextManager:
    """Build a reusable autocast context; `precision` is "float16" or "bfloat16"."""
    if not enabled:
        # A disabled torch.autocast has an overhead.
        return contextlib.nullcontext()
    if device_type == "cuda" and precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UserError("SOLVER.AMP.PRECISION is bfloat16, which this GPU does not support; use float16")
    # The cache of cast weights lasts for the whole evaluation, and for one forward pass in training.
    return torch.autocast(device_type, getattr(torch, precision))


def build_test_autocast(cfg: CfgNode, model: nn.Module) -> contextlib.AbstractContextManager:
    """Build the autocast context of TEST.AMP for the model's device."""
    return build_autocast(cfg.TEST.AMP, cfg.SOLVER.AMP.PRECISION, next(model.parameters()).device.type)


def build_amp(cfg: CfgNode, model: nn.Module) -> Amp:
    """Build the `Amp` of SOLVER.AMP for the model's device."""
    amp = cfg.SOLVER.AMP
    device_type = next(model.parameters()).device.type
    # Only float16 gradients can underflow.
    scaler = torch.amp.GradScaler(device_type, enabled=amp.ENABLED and amp.PRECISION == "float16")
    return Amp(build_autocast(amp.ENABLED, amp.PRECISION, device_type), scaler)
