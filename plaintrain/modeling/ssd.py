"""SSD (https://arxiv.org/abs/1512.02325) and SSDlite (https://arxiv.org/abs/1801.04381) on
torchvision's implementation.
"""

import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.ssd import SSD as _SSD
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead

from plaintrain.modeling.anchors import CachedBoxGenerator
from plaintrain.modeling.backbones import SSDLITE_NORM, build_backbone, get_tiny_norm
from plaintrain.modeling.detector import DenseOnSamples, build_preprocess, keep_float32
from plaintrain.modeling.losses import BoxLoss, compute_box_losses
from plaintrain.modeling.matching import decode, gather_rows, match_boxes
from plaintrain.modeling.postprocess import mask_below_threshold
from plaintrain.utils.errors import UserError

# The paper's smooth L1.
_BOX_LOSS = BoxLoss(beta=1.0)


class SSD(DenseOnSamples, _SSD):
    """torchvision's SSD, parameter for parameter, on images of one fixed size, in fixed shapes."""

    label_offset = 1

    def _candidates(self, outputs, anchors, counts):
        """The best boxes of each class."""
        boxes = decode(outputs["bbox_regression"], anchors, self.box_coder)
        scores = outputs["cls_logits"].softmax(-1)[..., 1:].transpose(1, 2)
        scores, index = scores.topk(min(self.topk_candidates, scores.shape[2]), dim=2)
        labels = torch.arange(scores.shape[1], device=scores.device)[:, None].expand_as(scores)
        scores = mask_below_threshold(scores, self.score_thresh)
        return gather_rows(boxes, index.flatten(1)), scores.flatten(1), labels.flatten(1)

    def _losses(self, outputs, anchors, levels, boxes, labels):
        index, matched, _ = match_boxes(boxes, labels >= 0, anchors[None], self.proposal_matcher)
        number = matched.sum().clamp(min=1)
        objects = gather_rows(boxes, index)
        deltas = outputs["bbox_regression"]
        loss_box = compute_box_losses(_BOX_LOSS, self.box_coder, deltas, anchors, objects, matched)
        labels = (gather_rows(labels, index) + self.label_offset).masked_fill(~matched, 0)
        loss = F.cross_entropy(outputs["cls_logits"].flatten(0, 1), labels.flatten(), reduction="none")
        loss = count_hard(loss.view_as(labels), matched, self.neg_to_pos_ratio)
        return {"loss_cls": loss.sum() / number, "loss_box_reg": loss_box.sum() / number}


def count_hard(loss, matched, ratio):
    """The losses `[B, N]` of matches, and of `ratio` times as many others, those with the highest.

    As in torchvision, matches count once more in an image that has too few others.
    """
    order = loss.detach().masked_fill(matched, -float("inf")).argsort(dim=1, descending=True)
    number = ratio * matched.sum(dim=1, keepdim=True)
    hard = torch.arange(loss.shape[1], device=loss.device) < number
    return loss * matched + loss.gather(1, order) * hard


def _build_boxes(ssd, num_levels):
    for key, values, wanted in (
        ("ASPECT_RATIOS", ssd.ASPECT_RATIOS, num_levels),
        ("SCALES", ssd.SCALES, num_levels + 1),
        ("STEPS", ssd.STEPS, num_levels),
    ):
        if len(values) != wanted and (values or key == "ASPECT_RATIOS"):
            raise UserError(
                f"MODEL.SSD.{key} has {len(values)} entries, but the backbone's {num_levels} levels "
                f"need {wanted}"
            )
    return CachedBoxGenerator(
        ssd.ASPECT_RATIOS, ssd.MIN_RATIO, ssd.MAX_RATIO, ssd.SCALES or None, ssd.STEPS or None
    )


def build_ssd(cfg):
    """Build SSD from MODEL.BACKBONE, SSD and INPUT.FIXED_SIZE."""
    size, ssd, backbone = tuple(cfg.INPUT.FIXED_SIZE), cfg.MODEL.SSD, build_backbone(cfg)
    channels = retrieve_out_channels(backbone, size)
    boxes = _build_boxes(ssd, len(channels))
    numbers, classes = boxes.num_anchors_per_location(), ssd.NUM_CLASSES + 1
    if ssd.HEAD_NAME == "SSDLiteHead":
        is_tiny = cfg.MODEL.BACKBONE.NAME == "build_tiny_backbone"
        norm = get_tiny_norm(cfg) if is_tiny else SSDLITE_NORM
        head = SSDLiteHead(channels, numbers, classes, norm)
    else:
        head = SSDHead(channels, numbers, classes)
    model = SSD(
        backbone,
        boxes,
        size,
        classes,
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
