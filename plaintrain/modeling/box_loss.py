"""How an R-CNN learns its boxes: torchvision's recipe by default, Detectron2's from the config."""

from typing import NamedTuple

import torch
from torchvision.models.detection._utils import encode_boxes
from torchvision.ops import generalized_box_iou_loss

from plaintrain.modeling.matching import decode, regression_loss
from plaintrain.utils.errors import UserError


class BoxLoss(NamedTuple):
    """A loss of boxes.

    Attributes:
        kind: "smooth_l1" of the deltas, or "giou" of the boxes.
        beta: where smooth L1 turns from a parabola to a line, 0 or more; 0 is L1.
        weight: factor.
    """

    kind: str = "smooth_l1"
    beta: float = 1 / 9
    weight: float = 1.0


def get_box_loss(node, key):
    """The `BoxLoss` of a config node's BBOX_REG_LOSS_TYPE, SMOOTH_L1_BETA and BBOX_REG_LOSS_WEIGHT.

    Raises:
        UserError: names `key`, the node, if beta is below 0.
    """
    if not node.SMOOTH_L1_BETA >= 0:
        raise UserError(f"{key}.SMOOTH_L1_BETA is {node.SMOOTH_L1_BETA}, but must be at least 0")
    return BoxLoss(node.BBOX_REG_LOSS_TYPE, node.SMOOTH_L1_BETA, node.BBOX_REG_LOSS_WEIGHT)


def sum_box_loss(recipe, coder, deltas, priors, objects, counts):
    """The weighted loss summed over the boxes that count, 0-d.

    Args:
        recipe: the `BoxLoss`.
        coder: torchvision's `BoxCoder`, whose weights scale the deltas.
        deltas: what the network gives for `priors`, anchors or proposals; with `objects` all `[B, S, 4]`.
        counts: bool `[B, S]`.
    """
    if recipe.kind == "giou":
        # Padding is compared with itself: what it gives is finite, and left out.
        boxes = torch.where(counts[..., None], decode(deltas, priors, coder), objects)
        loss = generalized_box_iou_loss(boxes, objects)
        return recipe.weight * loss.masked_fill(~counts, 0).sum()
    wanted = encode_boxes(objects.flatten(0, 1), priors.flatten(0, 1), coder.weights).view_as(objects)
    return recipe.weight * regression_loss(deltas, wanted, counts, recipe.beta)
