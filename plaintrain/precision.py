"""Mixed precision from the config: autocast and the gradient scaler of PyTorch.

https://docs.pytorch.org/docs/stable/notes/amp_examples.html
"""

import contextlib

import torch

from plaintrain.utils.errors import UserError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# The scaler halves its scale at each step whose gradients overflow. Far below 1 it no longer helps.
_LEAST_SCALE = 2.0**-14


def build_autocast(enabled, precision, device_type):
    """A context manager under which a forward pass runs in mixed precision; it may be entered again.

    Args:
        enabled: False makes it do nothing.
        precision: "float16" or "bfloat16".
        device_type: "cpu", "cuda" or "mps".

    Raises:
        UserError: another precision, or one that the device cannot compute in.
    """
    if precision not in _DTYPES:
        raise UserError(f"SOLVER.AMP.PRECISION is {precision!r}, but must be one of {', '.join(_DTYPES)}")
    if enabled and device_type == "cuda" and precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UserError("SOLVER.AMP.PRECISION is bfloat16, which this GPU does not have; use float16")
    if not enabled:
        # torch.autocast takes its time also where it does nothing.
        return contextlib.nullcontext()
    # The cache keeps cast weights for as long as autocast lasts: over a whole evaluation that is a gain,
    # in training autocast ends with each forward pass.
    return torch.autocast(device_type, _DTYPES[precision])


def build_grad_scaler(enabled, precision, device_type):
    """The scaler that keeps float16 gradients from vanishing; disabled otherwise, all its steps plain.

    Args:
        enabled, precision, device_type: see `build_autocast`.
    """
    return torch.amp.GradScaler(device_type, enabled=enabled and precision == "float16")


def build_amp(cfg, model):
    """(autocast, scaler) for training as SOLVER.AMP says, on the model's device."""
    amp = cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION, next(model.parameters()).device.type
    return build_autocast(*amp), build_grad_scaler(*amp)


def check_finite(storage, scaler, images_of=None):
    """Read the window of losses that waits in the storage, and stop all ranks if one is not finite.

    With a scaler, `grad_norm` may be infinite, for such a step is not taken; its scale is stored as
    `amp_scale`.

    Args:
        storage: the `EventStorage`; reading it is a sync point.
        scaler: what `build_grad_scaler` returned.
        images_of: see `EventStorage.raise_if_nonfinite`.

    Raises:
        FloatingPointError: names the iteration, the terms and the images; or no step is taken any more.
    """
    storage.raise_if_nonfinite(images_of, norm_too=not scaler.is_enabled())
    if not scaler.is_enabled():
        return
    scale = scaler.get_scale()
    storage.put_scalar("amp_scale", scale, smoothing_hint=False)
    if scale < _LEAST_SCALE:
        raise FloatingPointError(
            f"gradients overflow in float16 even at a loss scale of {scale:.2g}, so nothing is learned; "
            "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set SOLVER.AMP.PRECISION bfloat16"
        )
