"""Parameter groups, optimizers and gradient clipping."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from plaintrain.config import CfgNode, check_cfg
from plaintrain.utils.errors import UserError

# _NormBase is the base of batch and instance norms.
_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def build_param_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay, as in Detectron2.

    WEIGHT_DECAY_NORM applies to norm layers, WEIGHT_DECAY_BIAS (unless None) to parameters named `bias`.
    """
    solver = cfg.SOLVER
    groups = []
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A shared parameter takes the settings of its first module.
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr = solver.BASE_LR
            decay = solver.WEIGHT_DECAY_NORM if isinstance(module, _NORM_LAYERS) else solver.WEIGHT_DECAY
            if name == "bias":
                lr *= solver.BIAS_LR_FACTOR
                decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
            if "backbone" in module_name.split("."):
                lr *= solver.BACKBONE_MULTIPLIER
            groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return reduce_param_groups(groups)


def reduce_param_groups(params: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the groups with equal options; of a parameter in several groups, the last options apply."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in _expand_param_groups(params):
        key = tuple(sorted((name, value) for name, value in group.items() if name != "params"))
        groups.setdefault(key, {**group, "params": []})["params"] += group["params"]
    return list(groups.values())


def _expand_param_groups(params):
    groups = defaultdict(dict)
    for group in params:
        for parameter in group["params"]:
            groups[parameter] |= {**group, "params": [parameter]}
    return list(groups.values())


def _match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the strides of its parameter, which fused kernels require."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build SGD or AdamW for the trainable parameters."""
    solver = cfg.SOLVER
    momentum = solver.MOMENTUM
    groups = build_param_groups(cfg, model)
    if not groups:
        raise UserError("the model has no trainable parameters; lower MODEL.BACKBONE.FREEZE_AT")
    check_cfg(cfg)
    if solver.OPTIMIZER == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=(momentum, 0.999), fused=True)
    else:
        optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=solver.NESTEROV, fused=True)
    # If the gradient scaler skips the first step, PyTorch would leave these buffers uninitialized.
    if solver.OPTIMIZER == "SGD" and (momentum or solver.MOMENTUM_SCHEDULE):
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizer.register_load_state_dict_post_hook(_match_memory_format)
    return optimizer


def build_gradient_clipper(cfg: CfgNode, model: nn.Module) -> Callable[[], Tensor]:
    """Build the function that clips the gradients in place by SOLVER.CLIP_GRADIENTS."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [p for p in model.parameters() if p.requires_grad]
    clip_type = clip.CLIP_TYPE if clip.ENABLED else None
    limit = clip.CLIP_VALUE
    norm_type = clip.NORM_TYPE if clip.ENABLED else 2.0

    def clip_gradients() -> Tensor:
        """Clip the gradients, and return their total norm before as a 0-d tensor."""
        if clip_type == "full_model":
            return nn.utils.clip_grad_norm_(parameters, limit, norm_type)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads, norm_type)
        if clip_type == "value":
            nn.utils.clip_grad_value_(parameters, limit)
        elif clip_type == "norm":
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, limit, norm_type)
        return norm

    return clip_gradients
