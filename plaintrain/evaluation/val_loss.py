"""The losses on data that is not trained on."""

import itertools
import logging

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from plaintrain.evaluation.evaluator import inference_context
from plaintrain.utils import comm
from plaintrain.utils.env import fork_rng
from plaintrain.utils.logger import build_progress_bar
from plaintrain.utils.stop import end_evaluation_if_requested, is_requested

logger = logging.getLogger(__name__)

# In training mode these would learn from the data, or act at random.
_AS_IN_EVALUATION = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    StochasticDepth,
)


def compute_validation_losses(model, data_loaders, seed=0):
    """The losses of a model on validation data, as means over images.

    Norms use their running statistics and dropout is off, as in evaluation; neither the model nor the
    state of the random generators is changed.

    Args:
        data_loaders: loaders of this rank's batches, `list[sample]` with targets; taken together.
        seed: of what the model draws, such as proposals; the same in each call.

    Returns:
        {"val/NAME": number} for each key, and `val/total_loss`, the sum of those containing "loss"; over
        the images of all ranks, on every rank. {} without images.
    """
    model, sums, num_images = comm.unwrap_model(model), {}, 0
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
    parts = comm.all_gather(({name: float(value) for name, value in sums.items()}, num_images))  # sync point
    total = sum(number for _, number in parts)
    names = dict.fromkeys(name for part, _ in parts for name in part)
    means = {name: sum(part.get(name, 0) for part, _ in parts) / total for name in names}
    if not means:
        return {}
    means = {"total_loss": sum(value for name, value in means.items() if "loss" in name), **means}
    logger.info(f"validation on {total} images:  " + "  ".join(f"{k}: {v:.4g}" for k, v in means.items()))
    return {f"val/{name}": value for name, value in means.items()}
