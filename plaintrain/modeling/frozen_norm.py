"""Frozen batch norms that cost little in training: folded into the convolutions before them, at each step.

torchvision's `FrozenBatchNorm2d` reads and writes all activations twice, and in the backward pass once;
a factor on the weights is the same arithmetic on far fewer numbers, but for rounding. In evaluation nothing
is folded, so that published weights find what they find in torchvision, to the last digits.
"""

import itertools

from torch import nn
from torchvision.ops import FrozenBatchNorm2d


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm whose work the convolution before it does while `training` is set."""

    def forward(self, x):
        return x if self.training else super().forward(x)


class FoldedConv2d(nn.Conv2d):
    """A convolution with the frozen batch norm that follows it; its parameters are the convolution's."""

    def __init__(self, conv, norm):
        """
        Args:
            conv: the `Conv2d` without a bias whose weight is taken over.
            norm: the `FoldedNorm` after it.
        """
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, bias=False, padding_mode=conv.padding_mode, device="meta",
        )  # fmt: skip
        self.weight = conv.weight
        # In a tuple it is not a child, and the names in state dicts stay.
        self._norm = (norm,)

    def forward(self, x):
        (norm,) = self._norm
        if not norm.training:
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(
            x, self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        )


def fold_frozen_norms(module):
    """Fold each frozen batch norm that follows a convolution without a bias, in place.

    Following means in the order in which a parent registers its children, which is that of the data in
    torchvision's backbones. The names and shapes of a state dict stay. Statistics are read at each step, so
    that they may be loaded later; whoever replaces one of the two modules later must replace both.
    """
    for parent in list(module.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if type(conv) is nn.Conv2d and conv.bias is None and type(norm) is FrozenBatchNorm2d:
                folded = FoldedNorm(len(norm.weight), norm.eps)
                folded.load_state_dict(norm.state_dict())
                setattr(parent, norm_name, folded)
                setattr(parent, name, FoldedConv2d(conv, folded))
