"""Averaged weights: an exponential moving average beside the weights that are trained.

Polyak and Juditsky's averaging in the form that TensorFlow's ExponentialMovingAverage made usual; the
average is kept by `torch.optim.swa_utils.AveragedModel`.
"""

import logging

import torch
from torch.optim.swa_utils import AveragedModel

from plaintrain.utils import comm

logger = logging.getLogger(__name__)


class ModelEMA:
    """The average of a model's parameters and buffers.

    Attributes:
        enabled: False keeps nothing, and makes `update` do nothing.
    """

    def __init__(self, model, *, enabled=True, decay=0.999, warmup=True, evaluate="averaged"):
        """
        Args:
            model: the module, possibly wrapped for several GPUs.
            decay: weight of the average so far, in [0, 1).
            warmup: begin with min(decay, (1 + n) / (10 + n)) at step n.
            evaluate: which weights `eval_model` has, "averaged" or "raw".
        """
        self.enabled, self._model, self._decay, self._warmup = enabled, model, decay, warmup
        self._evaluate = evaluate
        if enabled:
            self._average = AveragedModel(comm.unwrap_model(model), multi_avg_fn=self._lerp, use_buffers=True)
            self._average.requires_grad_(False)

    @property
    def module(self):
        """The averaged model; before the first step, and if disabled, the model that is trained."""
        return self._average.module if self.num_steps else self._model

    @property
    def eval_model(self):
        """The model to evaluate, averaged or raw."""
        return self.module if self._evaluate == "averaged" else self._model

    @property
    def num_steps(self):
        """How many steps the average is made of; no device sync, it is counted on the CPU."""
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

    def update(self, model):
        """Average the model's weights in; call it after each step, also one that a scaler skipped."""
        if self.enabled:
            self._average.update_parameters(comm.unwrap_model(model))

    def state_dict(self):
        """{"n_averaged": ..., "module.NAME": tensor}; {} when disabled."""
        return self._average.state_dict() if self.enabled else {}

    def load_state_dict(self, state_dict):
        if self.enabled and state_dict:
            self._average.load_state_dict(state_dict)
        elif self.enabled:
            logger.warning("the checkpoint has no averaged weights: MODEL.EMA begins to average here")
        elif state_dict:
            logger.warning("MODEL.EMA.ENABLED is False: the checkpoint's averaged weights are left out")


def build_ema(cfg, model):
    """Build the `ModelEMA` of MODEL.EMA; log which weights are evaluated, and which become the final ones."""
    ema = cfg.MODEL.EMA
    if ema.ENABLED:
        logger.info(
            f"MODEL.EMA: the {ema.EVALUATE} weights are evaluated, the {ema.FINAL} become model_final.pth"
        )
    return ModelEMA(model, enabled=ema.ENABLED, decay=ema.DECAY, warmup=ema.WARMUP, evaluate=ema.EVALUATE)
