"""RetinaNet (https://arxiv.org/abs/1708.02002) on torchvision's implementation."""

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet as _RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNetHead

from plaintrain.config import CfgNode
from plaintrain.modeling.backbones import build_backbone, get_norm
from plaintrain.modeling.detector import DenseDetector, build_anchor_generator, build_preprocess, keep_float32
from plaintrain.modeling.losses import BoxLoss, compute_box_losses, compute_prior_bias, focal_loss
from plaintrain.modeling.matching import decode, gather_rows, match_boxes
from plaintrain.modeling.postprocess import select_topk_per_class


class RetinaNet(DenseDetector, _RetinaNet):
    """torchvision's RetinaNet with the same parameters, in fixed shapes."""

    focal_alpha = 0.25
    focal_gamma = 2.0
    box_loss = BoxLoss(beta=0.0)
    # Moving average of the foreground anchors per batch, which divides the losses (Detectron2). If None, the
    # foreground of each image divides its own losses (torchvision).
    loss_normalizer: Tensor | None

    def _compute_losses(self, outputs, anchors, num_anchors, boxes, labels):
        matches = match_boxes(boxes, labels >= 0, anchors[None], self.proposal_matcher)
        matched_idxs, foreground, background = matches
        num_foreground = foreground.sum(dim=1)
        labels = gather_rows(labels, matched_idxs).masked_fill(~foreground, -1)
        loss = focal_loss(outputs["cls_logits"], labels, self.focal_alpha, self.focal_gamma)
        loss = loss.masked_fill(~(foreground | background), 0).sum(dim=1)
        deltas = outputs["bbox_regression"]
        gt_boxes = gather_rows(boxes, matched_idxs)
        loss_box = compute_box_losses(self.box_loss, self.box_coder, deltas, anchors, gt_boxes, foreground)
        if self.loss_normalizer is not None:
            normalizer = self.loss_normalizer.lerp(num_foreground.sum().clamp(min=1).float(), 0.1)
            # Validation losses do not change it.
            if torch.is_grad_enabled():
                self.loss_normalizer.copy_(normalizer)
            return {"loss_cls": loss.sum() / normalizer, "loss_box_reg": loss_box.sum() / normalizer}
        num_foreground = num_foreground.clamp(min=1)
        return {
            "loss_cls": (loss / num_foreground).mean(),
            "loss_box_reg": (loss_box.sum(dim=1) / num_foreground).mean(),
        }

    def _decode_candidates(self, outputs, anchors, num_anchors):
        scores = outputs["cls_logits"].sigmoid()
        anchor_idxs, scores, labels = select_topk_per_class(
            scores, num_anchors, self.topk_candidates, self.score_thresh
        )
        deltas = gather_rows(outputs["bbox_regression"], anchor_idxs)
        return decode(deltas, anchors[anchor_idxs], self.box_coder), scores, labels


def build_retinanet(cfg: CfgNode) -> RetinaNet:
    """Build RetinaNet from MODEL.BACKBONE, ANCHOR_GENERATOR and RETINANET."""
    backbone = build_backbone(cfg)
    anchors = build_anchor_generator(cfg, backbone)
    retinanet = cfg.MODEL.RETINANET
    head = RetinaNetHead(
        backbone.out_channels,
        anchors.num_anchors_per_location()[0],
        retinanet.NUM_CLASSES,
        norm_layer=get_norm(retinanet.NORM),
    )
    bias = compute_prior_bias(retinanet.PRIOR_PROB)
    torch.nn.init.constant_(head.classification_head.cls_logits.bias, bias)
    background, foreground = retinanet.IOU_THRESHOLDS
    model = RetinaNet(
        backbone,
        retinanet.NUM_CLASSES,
        anchor_generator=anchors,
        head=head,
        score_thresh=retinanet.SCORE_THRESH_TEST,
        nms_thresh=retinanet.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        bg_iou_thresh=background,
        fg_iou_thresh=foreground,
        topk_candidates=retinanet.TOPK_CANDIDATES_TEST,
    )
    is_averaged = retinanet.LOSS_NORMALIZER == "ema"
    model.register_buffer("loss_normalizer", torch.tensor(100.0) if is_averaged else None)
    model.focal_alpha = retinanet.FOCAL_LOSS_ALPHA
    model.focal_gamma = retinanet.FOCAL_LOSS_GAMMA
    model.box_loss = BoxLoss(retinanet.BBOX_REG_LOSS_TYPE, retinanet.SMOOTH_L1_LOSS_BETA)
    model.box_coder = head.regression_head.box_coder = BoxCoder(retinanet.BBOX_REG_WEIGHTS)
    model.clips_before_nms = cfg.MODEL.ANCHOR_GENERATOR.NAME != "DefaultAnchorGenerator"
    model.transform = build_preprocess(cfg)
    keep_float32(head)
    return model
