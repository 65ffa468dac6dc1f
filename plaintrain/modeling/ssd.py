"""SSD (https://arxiv.org/abs/1512.02325) and SSDlite (https://arxiv.org/abs/1801.04381), of torchvision."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.ssd import SSD as _SSD
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead

from plaintrain.config import CfgNode
from plaintrain.modeling.anchors import CachedBoxGenerator
from plaintrain.modeling.backbones import SSDLITE_NORM, build_backbone, get_tiny_norm
from plaintrain.modeling.detector import DenseDetector, build_preprocess, keep_float32
from plaintrain.modeling.losses import BoxLoss, compute_box_losses
from plaintrain.modeling.matching import decode, gather_rows, match_boxes
from plaintrain.utils.errors import UserError

# The paper's smooth L1.
_BOX_LOSS = BoxLoss(beta=1.0)


class SSD(DenseDetector, _SSD):
    """torchvision's SSD with the same parameters, on images of one size, in fixed shapes."""

    label_offset = 1

    def _decode_candidates(self, outputs, anchors, num_anchors):
        """Return the top-k boxes of each class."""
        boxes = decode(outputs["bbox_regression"], anchors, self.box_coder)
        scores = outputs["cls_logits"].softmax(-1)[..., 1:].transpose(1, 2)
        scores, idxs = scores.topk(min(self.topk_candidates, scores.shape[2]), dim=2)
        labels = torch.arange(scores.shape[1], device=scores.device)[:, None].expand_as(scores)
        scores = scores.masked_fill(~(scores > self.score_thresh), -1)
        return gather_rows(boxes, idxs.flatten(1)), scores.flatten(1), labels.flatten(1)

    def _compute_losses(self, outputs, anchors, num_anchors, boxes, labels):
        matched_idxs, foreground, _ = match_boxes(boxes, labels >= 0, anchors[None], self.proposal_matcher)
        num_foreground = foreground.sum().clamp(min=1)
        gt_boxes = gather_rows(boxes, matched_idxs)
        deltas = outputs["bbox_regression"]
        loss_box = compute_box_losses(_BOX_LOSS, self.box_coder, deltas, anchors, gt_boxes, foreground)
        labels = (gather_rows(labels, matched_idxs) + self.label_offset).masked_fill(~foreground, 0)
        loss = F.cross_entropy(outputs["cls_logits"].flatten(0, 1), labels.flatten(), reduction="none")
        loss = mine_hard_negatives(loss.view_as(labels), foreground, self.neg_to_pos_ratio)
        return {"loss_cls": loss.sum() / num_foreground, "loss_box_reg": loss_box.sum() / num_foreground}


def mine_hard_negatives(loss: Tensor, foreground: Tensor, ratio: float) -> Tensor:
    """Return the losses `[B, N]` of foreground anchors and of the hardest negatives, `ratio` per foreground.

    Where negatives are too few, foreground anchors count twice, as in torchvision.
    """
    order = loss.detach().masked_fill(foreground, -float("inf")).argsort(dim=1, descending=True)
    num_negatives = ratio * foreground.sum(dim=1, keepdim=True)
    hard = torch.arange(loss.shape[1], device=loss.device) < num_negatives
    return loss * foreground + loss.gather(1, order) * hard


def build_ssd(cfg: CfgNode) -> SSD:
    """Build SSD from MODEL.BACKBONE, SSD and INPUT.FIXED_SIZE."""
    size = tuple(cfg.INPUT.FIXED_SIZE)
    ssd = cfg.MODEL.SSD
    backbone = build_backbone(cfg)
    channels = retrieve_out_channels(backbone, size)
    num_levels = len(channels)
    for key, values, length in (
        ("ASPECT_RATIOS", ssd.ASPECT_RATIOS, num_levels),
        ("SCALES", ssd.SCALES, num_levels + 1),
        ("STEPS", ssd.STEPS, num_levels),
    ):
        if len(values) != length and (values or key == "ASPECT_RATIOS"):
            raise UserError(
                f"MODEL.SSD.{key} must have {length} entries for {num_levels} backbone levels, got {values}"
            )
    boxes = CachedBoxGenerator(
        ssd.ASPECT_RATIOS, ssd.MIN_RATIO, ssd.MAX_RATIO, ssd.SCALES or None, ssd.STEPS or None
    )
    num_anchors = boxes.num_anchors_per_location()
    num_classes = ssd.NUM_CLASSES + 1
    if ssd.HEAD_NAME == "SSDLiteHead":
        is_tiny = cfg.MODEL.BACKBONE.NAME == "build_tiny_backbone"
        norm = get_tiny_norm(cfg) if is_tiny else SSDLITE_NORM
        head = SSDLiteHead(channels, num_anchors, num_classes, norm)
    else:
        head = SSDHead(channels, num_anchors, num_classes)
    model = SSD(
        backbone,
        boxes,
        size,
        num_classes,
        head=head,
        score_thresh=ssd.SCORE_THRESH_TEST,
        nms_thresh=ssd.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        iou_thresh=ssd.IOU_THRESHOLD,
        topk_candidates=ssd.TOPK_CANDIDATES_TEST,
        positive_fraction=ssd.POSITIVE_FRACTION,
    )
    model.transform = build_preprocess(cfg, size_divisible=1)
    keep_float32(head)
    return model
