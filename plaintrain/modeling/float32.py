"""What stays in float32 under autocast: anchors, and all that is computed from a head's outputs.

torchvision makes anchors, and decodes boxes, in the precision of the features and of the head. In
bfloat16, with 8 bits, a coordinate of 700 is off by up to 2 pixels.
"""

import torch

_LOW = (torch.float16, torch.bfloat16)


def _raised(value):
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in _LOW else value
    if isinstance(value, dict):
        return {name: _raised(item) for name, item in value.items()}
    return type(value)(_raised(item) for item in value)


def raise_outputs(module, inputs, outputs):
    """A forward hook: the outputs (see `keep_float32`) in float32, if they are not."""
    return _raised(outputs)


def _raise_features(module, inputs):
    images, features = inputs
    # Anchors read shape, type and device only; an expanded scalar has them and no memory.
    stand_ins = [torch.empty((), device=f.device).expand(f.shape) if f.dtype in _LOW else f for f in features]
    return images, stand_ins


def keep_float32(*, heads=(), anchors=()):
    """Give modules float32 results whatever autocast computes them in; nothing changes without it.

    Args:
        heads: modules whose outputs (tensors, or dicts, lists and tuples of them) become float32.
        anchors: anchor generators, called with (images, features).
    """
    for module in heads:
        module.register_forward_hook(raise_outputs)
    for module in anchors:
        module.register_forward_pre_hook(_raise_features)
