"""Losses of B images, N anchors and K classes, in fixed shapes: anchors that do not count are masked."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.models.detection._utils import BoxCoder, encode_boxes

from plaintrain.modeling.matching import decode


def compute_prior_bias(probability: float) -> float:
    """Return the bias at which a sigmoid gives `probability` (focal loss paper, 4.1)."""
    return -math.log((1 - probability) / probability)


class _NegativeLoss(torch.autograd.Function):
    """Focal loss of negatives, sigmoid(x) ** gamma * softplus(x), summed over the last dimension.

    It saves one tensor for the backward pass where autograd would save four.
    """

    @staticmethod
    def forward(ctx, x, gamma):
        p = x.sigmoid()
        loss = F.softplus(x)
        factor = p**gamma
        total = (factor * loss).sum(dim=-1)
        ctx.save_for_backward(loss.mul_(1 - p).mul_(gamma).add_(p).mul_(factor))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient[..., None], None


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute torchvision's `sigmoid_focal_loss` of logits `[B, N, K]`, summed to `[B, N]`.

    Labels are 0 to K-1, or -1 for background.
    """
    pos_weight, neg_weight = (alpha, 1 - alpha) if alpha >= 0 else (1, 1)
    x = logits.gather(2, labels.clamp(min=0)[..., None])
    correction = pos_weight * _NegativeLoss.apply(-x, gamma) - neg_weight * _NegativeLoss.apply(x, gamma)
    return neg_weight * _NegativeLoss.apply(logits, gamma) + correction.masked_fill(labels < 0, 0)


def giou_loss(boxes: Tensor, gt_boxes: Tensor, fg_mask: Tensor) -> Tensor:
    """Compute torchvision's `generalized_box_iou_loss` of pairs `[B, N, 4]`, 0 outside `fg_mask`."""
    # Background boxes may be infinite.
    boxes = torch.where(fg_mask[..., None], boxes, gt_boxes)
    eps = 1e-7
    x0, y0, x1, y1 = boxes.unbind(-1)
    u0, v0, u1, v1 = gt_boxes.unbind(-1)
    width = torch.minimum(x1, u1) - torch.maximum(x0, u0)
    height = torch.minimum(y1, v1) - torch.maximum(y0, v0)
    intersection = (width * height).masked_fill((width <= 0) | (height <= 0), 0)
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection
    hull = (torch.maximum(x1, u1) - torch.minimum(x0, u0)) * (torch.maximum(y1, v1) - torch.minimum(y0, v0))
    loss = 1 - intersection / (union + eps) + (hull - union) / (hull + eps)
    return loss.masked_fill(~fg_mask, 0)


class BoxLoss(NamedTuple):
    """Settings of a box regression loss; the defaults are torchvision's."""

    # "smooth_l1" of the deltas, or "giou" of the boxes.
    loss_type: str = "smooth_l1"
    # Transition point of smooth L1; 0 is L1.
    beta: float = 1 / 9
    weight: float = 1.0


def compute_box_losses(
    box_loss: BoxLoss, box_coder: BoxCoder, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, fg_mask: Tensor
) -> Tensor:
    """Return the weighted losses of predicted deltas `[B, S, 4]`, 0 outside `fg_mask`.

    `anchors` (or proposals) are `[B, S, 4]`, or `[S, 4]` for all images.
    """
    if box_loss.loss_type == "giou":
        return box_loss.weight * giou_loss(decode(deltas, anchors, box_coder), gt_boxes, fg_mask)
    anchors = anchors.expand_as(gt_boxes).flatten(0, 1)
    targets = encode_boxes(gt_boxes.flatten(0, 1), anchors, box_coder.weights).view_as(gt_boxes)
    bg_mask = ~fg_mask[..., None]
    # Targets of background may be infinite or NaN.
    targets = targets.masked_fill(bg_mask, 0)
    losses = F.smooth_l1_loss(deltas, targets, beta=box_loss.beta, reduction="none").masked_fill(bg_mask, 0)
    return box_loss.weight * losses.sum(dim=-1)
