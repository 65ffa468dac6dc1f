"""Losses on validation data."""

import itertools
import logging
from typing import Any

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from plaintrain.evaluation.evaluator import inference_context
from plaintrain.utils import comm
from plaintrain.utils.env import fork_rng
from plaintrain.utils.logger import build_progress_bar
from plaintrain.utils.stop import end_evaluation_if_requested, is_requested

logger = logging.getLogger(__name__)

# In training mode, these modules would update their statistics or act at random.
_AS_IN_EVALUATION = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, StochasticDepth)


def compute_validation_losses(model: nn.Module, data_loaders: list[Any], seed: int = 0) -> dict[str, float]:
    """Return {"val/NAME": loss} and "val/total_loss", the means over the images of all loaders and ranks.

    Norms and dropout are in evaluation mode. `seed` makes the sampling in the model, such as of proposals,
    deterministic; the global random generators are not changed.
    """
    model = comm.unwrap_model(model)
    sums: dict[str, Any] = {}
    num_images = 0
    device = next(model.parameters()).device
    with inference_context(model), torch.no_grad(), fork_rng(seed, device):
        for module in model.modules():
            module.training = not isinstance(module, _AS_IN_EVALUATION)
        batches = itertools.chain.from_iterable(data_loaders)
        for samples in build_progress_bar(batches, desc="validation", total=sum(map(len, data_loaders))):
            if is_requested():
                break
            for name, value in model(samples).items():
                sums[name] = sums.get(name, 0) + value.float() * len(samples)
            num_images += len(samples)
    end_evaluation_if_requested()
    sums = {name: float(value) for name, value in sums.items()}  # device sync
    gathered = comm.all_gather((sums, num_images))  # all ranks
    total = sum(num_images for _, num_images in gathered)
    names = dict.fromkeys(name for sums, _ in gathered for name in sums)
    means = {name: sum(sums.get(name, 0) for sums, _ in gathered) / total for name in names}
    if not means:
        return {}
    means = {"total_loss": sum(value for name, value in means.items() if "loss" in name), **means}
    logger.info(f"validation on {total} images:  " + "  ".join(f"{k}: {v:.4g}" for k, v in means.items()))
    return {f"val/{name}": value for name, value in means.items()}
