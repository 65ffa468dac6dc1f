"""Exponential moving average (EMA) of the weights, kept by `torch.optim.swa_utils.AveragedModel`."""

import logging
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from plaintrain.config import CfgNode
from plaintrain.utils import comm

logger = logging.getLogger(__name__)


class ModelEMA:
    """Moving average of a model's parameters and buffers; if not `enabled`, `update` does nothing."""

    def __init__(
        self,
        model: nn.Module,
        *,
        enabled: bool = True,
        decay: float = 0.999,
        warmup: bool = True,
        evaluate: str = "averaged",
    ):
        """
        Args:
            decay: weight of the previous average, in [0, 1).
            warmup: decay by min(decay, (1 + n) / (10 + n)) in step n, as in TensorFlow.
            evaluate: the weights of `eval_model`, "averaged" or "raw".
        """
        self.enabled = enabled
        self._model = model
        self._decay = decay
        self._warmup = warmup
        self._evaluate = evaluate
        if enabled:
            self._average = AveragedModel(comm.unwrap_model(model), multi_avg_fn=self._lerp, use_buffers=True)
            self._average.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """Return the averaged model; before the first step, or if disabled, the trained model."""
        return self._average.module if self.num_steps else self._model

    @property
    def eval_model(self) -> nn.Module:
        return self.module if self._evaluate == "averaged" else self._model

    @property
    def num_steps(self) -> int:
        """Return the number of averaged steps, which is on the CPU: no device sync."""
        return int(self._average.n_averaged) if self.enabled else 0

    @torch.no_grad()
    def _lerp(self, averages, values, num_averaged):
        decay = self._decay
        if self._warmup:
            decay = min(decay, (1 + self.num_steps) / (10 + self.num_steps))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    def update(self, model: nn.Module) -> None:
        """Update the average; call it after each step, even if the scaler skipped it."""
        if self.enabled:
            self._average.update_parameters(comm.unwrap_model(model))

    def state_dict(self) -> dict[str, Any]:
        """Return {"n_averaged": ..., "module.NAME": tensor}; {} if disabled."""
        return self._average.state_dict() if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.enabled and state_dict:
            self._average.load_state_dict(state_dict)
        elif self.enabled:
            logger.warning("the checkpoint has no averaged weights; MODEL.EMA starts to average now")
        elif state_dict:
            logger.warning("MODEL.EMA.ENABLED is False; skipped the averaged weights of the checkpoint")


def build_ema(cfg: CfgNode, model: nn.Module) -> ModelEMA:
    """Build the `ModelEMA` of MODEL.EMA, and log which weights are evaluated and which are final."""
    ema = cfg.MODEL.EMA
    if ema.ENABLED:
        logger.info(f"MODEL.EMA: evaluating {ema.EVALUATE} weights, model_final.pth has {ema.FINAL} weights")
    return ModelEMA(model, enabled=ema.ENABLED, decay=ema.DECAY, warmup=ema.WARMUP, evaluate=ema.EVALUATE)
