"""FCOS (https://arxiv.org/abs/1904.01355) on torchvision's implementation."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FCOS as _FCOS
from torchvision.models.detection.fcos import FCOSHead

from plaintrain.config import CfgNode
from plaintrain.modeling.backbones import build_backbone
from plaintrain.modeling.detector import DenseDetector, build_anchor_generator, build_preprocess, keep_float32
from plaintrain.modeling.losses import compute_prior_bias, focal_loss, giou_loss
from plaintrain.modeling.matching import gather_rows, match_in_chunks
from plaintrain.modeling.postprocess import select_topk_per_class
from plaintrain.utils.errors import UserError

# GroupNorm groups of torchvision's heads.
_NUM_GROUPS = 32


class FCOS(DenseDetector, _FCOS):
    """torchvision's FCOS with the same parameters, in fixed shapes."""

    def _decode_candidates(self, outputs, anchors, num_anchors):
        scores = torch.sqrt(outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid())
        anchor_idxs, scores, labels = select_topk_per_class(
            scores, num_anchors, self.topk_candidates, self.score_thresh
        )
        deltas = gather_rows(outputs["bbox_regression"], anchor_idxs)
        return self.box_coder.decode(deltas, anchors[anchor_idxs]), scores, labels

    def _compute_losses(self, outputs, anchors, num_anchors, boxes, labels):
        matched_idxs, foreground = match_centers(
            boxes, labels >= 0, anchors, num_anchors, self.center_sampling_radius
        )
        num_foreground = foreground.sum().clamp(min=1)
        labels = gather_rows(labels, matched_idxs).masked_fill(~foreground, -1)
        gt_boxes = gather_rows(boxes, matched_idxs)
        loss = focal_loss(outputs["cls_logits"], labels).sum()
        predicted_boxes = self.box_coder.decode(outputs["bbox_regression"], anchors)
        centerness = _compute_centerness(self.box_coder.encode(anchors, gt_boxes)).masked_fill(~foreground, 0)
        logits = outputs["bbox_ctrness"].squeeze(2)
        loss_centerness = F.binary_cross_entropy_with_logits(logits, centerness, reduction="none")
        return {
            "loss_fcos_cls": loss / num_foreground,
            "loss_fcos_loc": giou_loss(predicted_boxes, gt_boxes, foreground).sum() / num_foreground,
            "loss_fcos_ctr": loss_centerness.masked_fill(~foreground, 0).sum() / num_foreground,
        }


def _compute_centerness(distances):
    """Return the centerness, 1 in the middle of a box and 0 at its edges, of distances `[..., 4]` to them."""
    left, top, right, bottom = distances.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    return torch.sqrt(horizontal * (torch.minimum(top, bottom) / torch.maximum(top, bottom)))


@torch.no_grad()
def match_centers(
    gt_boxes: Tensor, valid: Tensor, anchors: Tensor, num_anchors: list[int], radius: float
) -> list[Tensor]:
    """Match each location with the smallest ground-truth box near whose center it lies, as torchvision.

    The farthest edge of the box must be 4 to 8 strides away, less on the finest level, more on the coarsest.
    `radius` is the largest distance to the center along x and y, in strides.
    Anchors are `[N, 4]`, squares of a stride, with their number per level, finest first; for the rest, and
    the results matched_idxs and foreground, see `match_boxes`.
    """
    strides = anchors[:, 2] - anchors[:, 0]
    min_reach = strides * 4
    max_reach = strides * 8
    min_reach[: num_anchors[0]].zero_()
    max_reach[-num_anchors[-1] :].fill_(float("inf"))

    def _match(gt_boxes, valid, anchors):
        both = (anchors[:, None], gt_boxes[:, :, None])
        (x, y), (u, v) = (((b[..., :2] + b[..., 2:]) / 2).unbind(-1) for b in both)
        x0, y0, x1, y1 = gt_boxes[:, :, None].unbind(-1)
        inside = torch.maximum((x - u).abs_(), (y - v).abs_()) < radius * strides
        distances = x - x0, y - y0, x1 - x, y1 - y
        inside &= functools.reduce(torch.minimum, distances) > 0
        reach = functools.reduce(torch.maximum, distances)
        inside &= (reach > min_reach) & (reach < max_reach) & valid
        # As in torchvision, float32 cannot tell areas apart that differ by less than 8.
        value, matched_idxs = (inside * (1e8 - (x1 - x0) * (y1 - y0))).max(dim=1)
        return matched_idxs, value >= 1e-5

    return match_in_chunks(_match, gt_boxes, valid[:, :, None], anchors[None])


def build_fcos(cfg: CfgNode) -> FCOS:
    """Build FCOS from MODEL.BACKBONE, ANCHOR_GENERATOR (one square per location) and FCOS."""
    backbone = build_backbone(cfg)
    anchors = build_anchor_generator(cfg, backbone)
    fcos = cfg.MODEL.FCOS
    if set(anchors.num_anchors_per_location()) != {1}:
        raise UserError(
            "MODEL.ANCHOR_GENERATOR must have one anchor per location for FCOS: SIZES "
            f"{[[stride] for stride in backbone.strides]} and ASPECT_RATIOS [[1.0]], got "
            f"{anchors.sizes} and {anchors.aspect_ratios}; configs/Base-FCOS.yaml sets them for a ResNet"
        )
    if backbone.out_channels % _NUM_GROUPS:
        raise UserError(
            f"the backbone's output channels must be a multiple of {_NUM_GROUPS} for FCOS's GroupNorm, got "
            f"{backbone.out_channels}"
        )
    head = FCOSHead(backbone.out_channels, 1, fcos.NUM_CLASSES, fcos.NUM_CONVS)
    torch.nn.init.constant_(head.classification_head.cls_logits.bias, compute_prior_bias(fcos.PRIOR_PROB))
    # With a bias of 0, random weights can make all box outputs negative, where their ReLU has no gradient.
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
