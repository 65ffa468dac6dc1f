"""Parameter groups, optimizers and gradient clipping."""

import torch
from torch import nn

from plaintrain.utils.errors import UserError

_NORM_LAYERS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)


def build_param_groups(cfg, model):
    """Group the trainable parameters by learning rate and weight decay, as SOLVER.* says.

    A parameter of a normalisation layer takes WEIGHT_DECAY_NORM; one named `bias`, of whatever
    layer, takes WEIGHT_DECAY_BIAS if that is given, as in Detectron2.

    Returns:
        list of {params, lr, weight_decay}, as few as there are different settings.
    """
    solver, groups, seen = cfg.SOLVER, {}, set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A parameter that two modules share is listed once, with the settings of the first.
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
            group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def _as_parameters(optimizer):
    """Give loaded state the memory format of its parameter; fused steps go through both side by side."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def build_optimizer(cfg, model):
    """Build SGD or AdamW over the trainable parameters of `model`, as SOLVER.* says.

    Raises:
        UserError: settings that do not fit the optimizer, or a model with nothing to train.
    """
    solver, momentum = cfg.SOLVER, cfg.SOLVER.MOMENTUM
    groups = build_param_groups(cfg, model)
    if not groups:
        raise UserError("the model has no parameter to train; lower MODEL.BACKBONE.FREEZE_AT")
    try:
        if solver.OPTIMIZER == "AdamW":
            optimizer = torch.optim.AdamW(groups, betas=(momentum, 0.999), fused=True)
        else:
            optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=solver.NESTEROV, fused=True)
    except ValueError as e:
        raise UserError(f"SOLVER.* does not fit {solver.OPTIMIZER}: {e}") from e
    # Otherwise a first step that the gradient scaler leaves out makes them of uninitialised memory.
    if solver.OPTIMIZER == "SGD" and (momentum or solver.MOMENTUM_SCHEDULE):
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizer.register_load_state_dict_post_hook(_as_parameters)
    return optimizer


def build_gradient_clipper(cfg, model):
    """Build the function that clips the gradients in place, as SOLVER.CLIP_GRADIENTS says."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = clip.CLIP_TYPE if clip.ENABLED else None
    limit, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE if clip.ENABLED else 2.0

    def clip_gradients():
        """Clip, and return the norm of all gradients before it, a 0-d tensor."""
        if kind == "full_model":
            return torch.nn.utils.clip_grad_norm_(parameters, limit, norm_type)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, norm_type)
        if kind == "value":
            torch.nn.utils.clip_grad_value_(parameters, limit)
        elif kind == "norm":
            for parameter in parameters:
                torch.nn.utils.clip_grad_norm_(parameter, limit, norm_type)
        return norm

    return clip_gradients
