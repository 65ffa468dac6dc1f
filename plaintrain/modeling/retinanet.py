"""RetinaNet (https://arxiv.org/abs/1708.02002) on torchvision's implementation."""

import torch
from torchvision.models.detection import RetinaNet as _RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNetHead

from plaintrain.modeling.backbones import build_backbone, get_norm
from plaintrain.modeling.detector import (
    DenseOnSamples,
    build_anchor_generator,
    build_preprocess,
    compute_prior_bias,
    keep_float32,
)
from plaintrain.modeling.losses import BoxLoss, compute_box_losses, focal_loss
from plaintrain.modeling.matching import decode, gather_rows, match_boxes
from plaintrain.modeling.postprocess import select_topk_per_class


class RetinaNet(DenseOnSamples, _RetinaNet):
    """torchvision's RetinaNet, parameter for parameter, in fixed shapes."""

    focal_alpha, focal_gamma, box_loss = 0.25, 2.0, BoxLoss(beta=0.0)

    def _losses(self, outputs, anchors, levels, boxes, labels):
        index, matched, background = match_boxes(boxes, labels >= 0, anchors[None], self.proposal_matcher)
        numbers = matched.sum(dim=1).clamp(min=1)
        labels = gather_rows(labels, index).masked_fill(~matched, -1)
        loss = focal_loss(outputs["cls_logits"], labels, self.focal_alpha, self.focal_gamma)
        loss = loss.masked_fill(~(matched | background), 0).sum(dim=1)
        deltas, objects = outputs["bbox_regression"], gather_rows(boxes, index)
        loss_box = compute_box_losses(self.box_loss, self.box_coder, deltas, anchors, objects, matched)
        # The mean over the images, each divided by its anchors with an object.
        return {
            "loss_cls": (loss / numbers).mean(),
            "loss_box_reg": (loss_box.sum(dim=1) / numbers).mean(),
        }

    def _candidates(self, outputs, anchors, counts):
        rows, scores, labels = select_topk_per_class(self, outputs["cls_logits"].sigmoid(), counts)
        deltas = gather_rows(outputs["bbox_regression"], rows)
        return decode(deltas, anchors[rows], self.box_coder), scores, labels


def build_retinanet(cfg):
    """RetinaNet from MODEL.BACKBONE, ANCHOR_GENERATOR and RETINANET."""
    backbone = build_backbone(cfg)
    anchors = build_anchor_generator(cfg, backbone)
    retinanet = cfg.MODEL.RETINANET
    head = RetinaNetHead(
        backbone.out_channels,
        anchors.num_anchors_per_location()[0],
        retinanet.NUM_CLASSES,
        norm_layer=get_norm(retinanet.NORM),
    )
    torch.nn.init.constant_(
        head.classification_head.cls_logits.bias, compute_prior_bias(retinanet.PRIOR_PROB)
    )
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
    model.focal_alpha, model.focal_gamma = retinanet.FOCAL_LOSS_ALPHA, retinanet.FOCAL_LOSS_GAMMA
    model.box_loss = BoxLoss(retinanet.BBOX_REG_LOSS_TYPE, retinanet.SMOOTH_L1_LOSS_BETA)
    model.box_coder = head.regression_head.box_coder = BoxCoder(retinanet.BBOX_REG_WEIGHTS)
    model.clips_before_nms = cfg.MODEL.ANCHOR_GENERATOR.NAME != "DefaultAnchorGenerator"
    model.transform = build_preprocess(cfg)
    keep_float32(head)
    return model
