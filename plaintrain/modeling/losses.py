"""Losses in fixed shapes: what does not count is masked.

B is the number of images, N that of anchors, K that of classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torchvision.models.detection._utils import encode_boxes

from plaintrain.modeling.matching import decode


class _FocalSum(torch.autograd.Function):
    """sigmoid(x) ** gamma * softplus(x), the focal loss of what is not there, summed over the last dimension.

    Keeps one number for each of `x`, the derivative, where autograd would keep four.
    """

    @staticmethod
    def forward(ctx, x, gamma):
        p, loss = x.sigmoid(), F.softplus(x)
        factor = p**gamma
        total = (factor * loss).sum(dim=-1)
        ctx.save_for_backward(loss.mul_(1 - p).mul_(gamma).add_(p).mul_(factor))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient[..., None], None


def focal_loss(logits, labels, alpha=0.25, gamma=2.0):
    """torchvision's `sigmoid_focal_loss` of each anchor, `[B, N]`.

    Args:
        logits: float32 `[B, N, K]`.
        labels: `[B, N]` in 0..K-1, or -1 for an anchor without an object.
        alpha: weight of the class that is there, 0..1, that of the others being 1 - alpha; -1 for no weights.
        gamma: 0 or more; the higher, the less the easy ones count.
    """
    weight, others = (alpha, 1 - alpha) if alpha >= 0 else (1, 1)
    true = logits.gather(2, labels.clamp(min=0)[..., None])
    extra = weight * _FocalSum.apply(-true, gamma) - others * _FocalSum.apply(true, gamma)
    return others * _FocalSum.apply(logits, gamma) + extra.masked_fill(labels < 0, 0)


def giou_loss(boxes, targets, counts):
    """torchvision's `generalized_box_iou_loss` of pairs of boxes `[B, N, 4]`,
    0 where bool `[B, N]` is False.
    """
    # Where they do not count, boxes may be infinite.
    boxes, eps = torch.where(counts[..., None], boxes, targets), 1e-7
    (x0, y0, x1, y1), (u0, v0, u1, v1) = boxes.unbind(-1), targets.unbind(-1)
    width = torch.minimum(x1, u1) - torch.maximum(x0, u0)
    height = torch.minimum(y1, v1) - torch.maximum(y0, v0)
    overlap = (width * height).masked_fill((width <= 0) | (height <= 0), 0)
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - overlap
    around = (torch.maximum(x1, u1) - torch.minimum(x0, u0)) * (torch.maximum(y1, v1) - torch.minimum(y0, v0))
    loss = 1 - overlap / (union + eps) + (around - union) / (around + eps)
    return loss.masked_fill(~counts, 0)


class BoxLoss(NamedTuple):
    """A loss of boxes: torchvision's recipe by default, Detectron2's from the config."""

    # "smooth_l1" of the deltas, or "giou" of the boxes.
    kind: str = "smooth_l1"
    # Where smooth L1 turns from a parabola to a line; 0 is L1.
    beta: float = 1 / 9
    weight: float = 1.0


def compute_box_losses(recipe, coder, deltas, priors, objects, counts):
    """Return the weighted losses of boxes, `[B, S]`, 0 where bool `counts` is False.

    Args:
        recipe: the `BoxLoss`.
        coder: torchvision's `BoxCoder`, whose weights scale the deltas.
        deltas: what the network gives for each prior, float32 `[B, S, 4]`.
        priors: anchors or proposals, `[B, S, 4]`, or `[S, 4]`, the same for all images.
        objects: the boxes to be learned, `[B, S, 4]`.
    """
    if recipe.kind == "giou":
        return recipe.weight * giou_loss(decode(deltas, priors, coder), objects, counts)
    priors = priors.expand_as(objects).flatten(0, 1)
    wanted = encode_boxes(objects.flatten(0, 1), priors, coder.weights).view_as(objects)
    missing = ~counts[..., None]
    # Where they do not count, targets may be infinite or not a number.
    wanted = wanted.masked_fill(missing, 0)
    losses = F.smooth_l1_loss(deltas, wanted, beta=recipe.beta, reduction="none").masked_fill(missing, 0)
    return recipe.weight * losses.sum(dim=-1)
