"""Frozen batch norms that are folded into convolutions: modeling.frozen_norm."""

import copy

import pytest
import torch
from model_helpers import RESNET18, make_cfg
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.modeling.backbone import build_backbone
from plaintrain.modeling.frozen_norm import FoldedConv2d, FoldedNorm, fold_frozen_norms


@pytest.fixture
def plain():
    """A ResNet whose norms have factors and statistics of a trained network."""
    torch.manual_seed(0)
    module = ResNet(Bottleneck, [1, 2, 1, 1], width_per_group=8, norm_layer=FrozenBatchNorm2d)
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            for name, buffer in norm.named_buffers():
                buffer.uniform_(0.5, 1.5)
                buffer.sub_(1.0 * (name in ("bias", "running_mean")))
    return module


def test_outputs_and_gradients_are_those_of_norms_on_their_own(plain):
    folded = ResNet(Bottleneck, [1, 2, 1, 1], width_per_group=8, norm_layer=FrozenBatchNorm2d)
    fold_frozen_norms(folded)
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, FoldedConv2d) for m in convolutions) and len(convolutions) == 20
    # What is loaded after the folding counts.
    folded.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    outputs, expected = folded(x), plain(x)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    for out in (outputs, expected):
        out.square().sum().backward()
    for (name, ours), theirs in zip(folded.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
    # A copy has its own norms.
    copied = copy.deepcopy(folded)
    for norm in (m for m in folded.modules() if isinstance(m, FoldedNorm)):
        norm.bias.zero_()
    torch.testing.assert_close(copied(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(folded(x), expected, atol=1e-2)


def test_in_evaluation_nothing_is_folded(plain):
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    x = torch.randn(1, 3, 64, 64)
    assert folded.eval()(x).equal(plain.eval()(x))
    # What counts is the norm's mode alone.
    folded.conv1.train()
    assert folded(x).equal(plain(x))
    folded.bn1.train()
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)


def test_norms_that_learn_or_follow_no_convolution_are_left():
    parts = [nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4)]
    module = nn.Sequential(*parts, nn.ReLU(), FrozenBatchNorm2d(4))
    fold_frozen_norms(module)
    assert list(module)[:4] == parts and type(module[5]) is FrozenBatchNorm2d


def test_a_backbone_has_no_frozen_norm_of_its_own_left():
    backbone = build_backbone(make_cfg(*RESNET18, "MODEL.RESNETS.NORM", "FrozenBN"))
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 20 and all(isinstance(norm, FoldedNorm) for norm in norms)
