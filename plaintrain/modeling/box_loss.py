"""How a detector learns its boxes: torchvision's recipe by default, Detectron2's from the config."""

from typing import NamedTuple

from torchvision.models.detection._utils import encode_boxes

from plaintrain.modeling.losses import giou_loss, smooth_l1_loss
from plaintrain.modeling.matching import decode
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


def box_losses(recipe, coder, deltas, priors, objects, counts):
    """The weighted losses of boxes, `[B, S]`, 0 where they do not count.

    Args:
        recipe: the `BoxLoss`.
        coder: torchvision's `BoxCoder`, whose weights scale the deltas.
        deltas: what the network gives for each prior, float32 `[B, S, 4]`.
        priors: anchors or proposals, `[B, S, 4]`, or `[S, 4]`, the same for all images.
        objects: the boxes to be learned, `[B, S, 4]`.
        counts: bool `[B, S]`.
    """
    if recipe.kind == "giou":
        return recipe.weight * giou_loss(decode(deltas, priors, coder), objects, counts)
    priors = priors.expand_as(objects).flatten(0, 1)
    wanted = encode_boxes(objects.flatten(0, 1), priors, coder.weights).view_as(objects)
    return recipe.weight * smooth_l1_loss(deltas, wanted, counts, recipe.beta)
