"""FCOS (https://arxiv.org/abs/1904.01355) on torchvision's implementation."""

import functools

import torch
import torch.nn.functional as F
from torchvision.models.detection import FCOS as _FCOS
from torchvision.models.detection.fcos import FCOSHead

from plaintrain.modeling.backbones import build_backbone
from plaintrain.modeling.detector import (
    DenseOnSamples,
    build_anchor_generator,
    build_preprocess,
    compute_prior_bias,
    keep_float32,
)
from plaintrain.modeling.losses import focal_loss, giou_loss
from plaintrain.modeling.matching import assign_in_chunks, gather_rows
from plaintrain.modeling.postprocess import select_topk_per_class
from plaintrain.utils.errors import UserError

# torchvision's heads have GroupNorm with this many groups.
_GROUPS = 32


class FCOS(DenseOnSamples, _FCOS):
    """torchvision's FCOS, parameter for parameter, in fixed shapes."""

    def _candidates(self, outputs, anchors, counts):
        scores = torch.sqrt(outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid())
        rows, scores, labels = select_topk_per_class(self, scores, counts)
        return (
            self.box_coder.decode(gather_rows(outputs["bbox_regression"], rows), anchors[rows]),
            scores,
            labels,
        )

    def _losses(self, outputs, anchors, levels, boxes, labels):
        index, matched = assign_centres(boxes, labels >= 0, anchors, levels, self.center_sampling_radius)
        number = matched.sum().clamp(min=1)
        labels, objects = gather_rows(labels, index).masked_fill(~matched, -1), gather_rows(boxes, index)
        loss = focal_loss(outputs["cls_logits"], labels).sum()
        predicted = self.box_coder.decode(outputs["bbox_regression"], anchors)
        centred = _centredness(self.box_coder.encode(anchors, objects)).masked_fill(~matched, 0)
        logits = outputs["bbox_ctrness"].squeeze(2)
        loss_centre = F.binary_cross_entropy_with_logits(logits, centred, reduction="none")
        return {
            "loss_fcos_cls": loss / number,
            "loss_fcos_loc": giou_loss(predicted, objects, matched).sum() / number,
            "loss_fcos_ctr": loss_centre.masked_fill(~matched, 0).sum() / number,
        }


def _centredness(distances):
    """1 in the middle of a box, 0 at its edge, by the distances `[..., 4]` to its four edges."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    return torch.sqrt(across * (torch.minimum(top, bottom) / torch.maximum(top, bottom)))


@torch.no_grad()
def assign_centres(boxes, exists, anchors, levels, radius):
    """Give each location the smallest of the objects that it lies in, near their centre, as torchvision does.

    Args:
        boxes, exists: the objects `[B, M, 4]`, and bool `[B, M]`, False for padding.
        anchors: `[N, 4]`, the square of a location's stride around it.
        levels: how many of them are of each level, the finest first; a level has the objects of which
            the farthest edge is 4 to 8 of its strides away, the finest all below, the coarsest all above.
        radius: how far from an object's centre a location may lie, in strides.

    Returns:
        The index `[B, N]` of each location's object, and bool `[B, N]`, whether it has one.
    """
    sizes = anchors[:, 2] - anchors[:, 0]
    nearest, farthest = sizes * 4, sizes * 8
    nearest[: levels[0]].zero_()
    farthest[-levels[-1] :].fill_(float("inf"))

    def assign(boxes, exists, anchors):
        """The same for some of the images."""
        both = (anchors[:, None], boxes[:, :, None])
        (x, y), (u, v) = (((b[..., :2] + b[..., 2:]) / 2).unbind(-1) for b in both)
        x0, y0, x1, y1 = boxes[:, :, None].unbind(-1)
        inside = torch.maximum((x - u).abs_(), (y - v).abs_()) < radius * sizes
        edges = x - x0, y - y0, x1 - x, y1 - y
        inside &= functools.reduce(torch.minimum, edges) > 0
        edge = functools.reduce(torch.maximum, edges)
        inside &= (edge > nearest) & (edge < farthest) & exists
        # As exact as torchvision's, which takes areas that differ by less than 8 for the same.
        value, index = (inside * (1e8 - (x1 - x0) * (y1 - y0))).max(dim=1)
        return index, value >= 1e-5

    return assign_in_chunks(assign, boxes, exists[:, :, None], anchors[None])


def build_fcos(cfg):
    """FCOS from MODEL.BACKBONE, ANCHOR_GENERATOR (one square a location) and FCOS."""
    backbone = build_backbone(cfg)
    anchors = build_anchor_generator(cfg, backbone)
    fcos = cfg.MODEL.FCOS
    if any(number != 1 for number in anchors.num_anchors_per_location()):
        raise UserError(
            "FCOS needs one anchor a location, of the level's stride: MODEL.ANCHOR_GENERATOR.SIZES "
            f"{[[stride] for stride in backbone.strides]} and ASPECT_RATIOS [[1.0]]"
        )
    if backbone.out_channels % _GROUPS:
        raise UserError(
            f"FCOS normalises in {_GROUPS} groups, which the backbone's {backbone.out_channels} channels "
            "cannot be split into"
        )
    head = FCOSHead(backbone.out_channels, 1, fcos.NUM_CLASSES, fcos.NUM_CONVS)
    torch.nn.init.constant_(head.classification_head.cls_logits.bias, compute_prior_bias(fcos.PRIOR_PROB))
    # The box outputs pass a ReLU: from 0, random weights can push all of them below it for ever.
    torch.nn.init.constant_(head.regression_head.bbox_reg.bias, 0.5)
    model = FCOS(
        backbone,
        fcos.NUM_CLASSES,
        anchor_generator=anchors,
        head=head,
        center_sampling_radius=fcos.CENTER_SAMPLING_RADIUS,
        score_thresh=fcos.SCORE_THRESH_TEST,
        nms_thresh=fcos.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        topk_candidates=fcos.TOPK_CANDIDATES_TEST,
    )
    model.transform = build_preprocess(cfg)
    keep_float32(head)
    return model
