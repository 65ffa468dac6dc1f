"""Gradient clipping."""

import torch


def build_gradient_clipper(cfg, model):
    """A function that clips the gradients in place, as SOLVER.CLIP_GRADIENTS says.

    Returns:
        Function `() -> norm`: that of all gradients before clipping, a 0-d tensor.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = clip.CLIP_TYPE if clip.ENABLED else None
    limit, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE if clip.ENABLED else 2.0

    def clip_gradients():
        """Clip now; see `build_gradient_clipper`."""
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
