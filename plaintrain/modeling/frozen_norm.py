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
    """A convolution without a bias, with the `FoldedNorm` that follows it as `_norm[0]`."""

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
    torchvision's backbones. Names and shapes of a state dict stay. Statistics are read at each step, so that
    they may be loaded later; whoever replaces one of the two modules later must replace both.
    """
    for parent in module.modules():
        for conv, norm in itertools.pairwise(parent.children()):
            if type(conv) is nn.Conv2d and conv.bias is None and type(norm) is FrozenBatchNorm2d:
                conv.__class__, norm.__class__ = FoldedConv2d, FoldedNorm
                # In a tuple it is not a child.
                conv._norm = (norm,)
