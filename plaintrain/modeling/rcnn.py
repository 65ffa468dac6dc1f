"""Faster R-CNN (https://arxiv.org/abs/1506.01497), Mask and Keypoint R-CNN (https://arxiv.org/abs/1703.06870)
and their RPN alone, on torchvision's implementation.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN as _GeneralizedRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from plaintrain.config import CfgNode
from plaintrain.modeling.backbones import Backbone, build_backbone, get_norm
from plaintrain.modeling.detector import (
    Preprocess,
    build_anchor_generator,
    build_preprocess,
    get_targets,
    keep_float32,
    scale_to_original_size,
)
from plaintrain.modeling.losses import BoxLoss
from plaintrain.modeling.poolers import RoIAlign
from plaintrain.modeling.roi_heads import BatchedRoIHeads
from plaintrain.modeling.rpn import BatchedRPN
from plaintrain.utils.errors import UserError


class GeneralizedRCNN(_GeneralizedRCNN):
    """torchvision's Faster, Mask or Keypoint R-CNN with the same parameters, in fixed shapes."""

    # False returns masks as `BoxMasks`, to be pasted or encoded elsewhere.
    pastes_masks = True

    def forward(self, samples: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Return losses or detections; see `plaintrain.modeling.build_model`."""
        images, _ = self.transform([sample["image"] for sample in samples])
        targets = get_targets(samples, images.tensors.device, label_offset=1) if self.training else None
        features = self.backbone(images.tensors)
        proposals, rpn_losses = self.rpn(images, features, targets)
        detections, losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        if self.training:
            return losses | rpn_losses
        return scale_to_original_size(detections, samples, self.pastes_masks, self.roi_heads.masks_aligned)

    @contextlib.contextmanager
    def without_masks(self) -> Iterator[None]:
        """Disable the mask head."""
        pooler = self.roi_heads.mask_roi_pool
        self.roi_heads.mask_roi_pool = None
        try:
            yield
        finally:
            self.roi_heads.mask_roi_pool = pooler


class ProposalNetwork(nn.Module):
    """Backbone and RPN, with the parameter names of torchvision's Faster R-CNN.

    Its detections are the proposals, with objectness as scores and labels of 0.
    """

    def __init__(self, backbone: Backbone, rpn: BatchedRPN, transform: Preprocess):
        super().__init__()
        self.transform = transform
        self.backbone = backbone
        self.rpn = rpn

    def forward(self, samples: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Return losses or detections; see `plaintrain.modeling.build_model`."""
        images, _ = self.transform([sample["image"] for sample in samples])
        targets = get_targets(samples, images.tensors.device) if self.training else None
        features = self.backbone(images.tensors)
        proposals, losses = self.rpn(images, features, targets, propose=not self.training)
        if self.training:
            return losses
        boxes, scores = proposals
        detections = [
            {"boxes": b[:n], "scores": s[:n], "labels": torch.zeros_like(s[:n], dtype=torch.int64)}
            for b, s, n in zip(boxes, scores, (scores >= 0).sum(dim=1).tolist(), strict=True)  # device sync
        ]
        return scale_to_original_size(detections, samples)


def _build_rpn(cfg, backbone):
    rpn = cfg.MODEL.RPN
    anchors = build_anchor_generator(cfg, backbone)
    background, foreground = rpn.IOU_THRESHOLDS
    width = backbone.out_channels
    if not set(rpn.CONV_DIMS) <= {-1, width}:
        raise UserError(f"MODEL.RPN.CONV_DIMS must hold -1 or {width} per convolution, got {rpn.CONV_DIMS}")
    head = RPNHead(width, anchors.num_anchors_per_location()[0], len(rpn.CONV_DIMS))
    keep_float32(head)
    network = BatchedRPN(
        anchors,
        head,
        fg_iou_thresh=foreground,
        bg_iou_thresh=background,
        batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        positive_fraction=rpn.POSITIVE_FRACTION,
        pre_nms_top_n={"training": rpn.PRE_NMS_TOPK_TRAIN, "testing": rpn.PRE_NMS_TOPK_TEST},
        post_nms_top_n={"training": rpn.POST_NMS_TOPK_TRAIN, "testing": rpn.POST_NMS_TOPK_TEST},
        nms_thresh=rpn.NMS_THRESH,
        score_thresh=rpn.SCORE_THRESH,
    )
    network.box_loss = BoxLoss(rpn.BBOX_REG_LOSS_TYPE, rpn.SMOOTH_L1_BETA, rpn.BBOX_REG_LOSS_WEIGHT)
    network.loss_weight = rpn.LOSS_WEIGHT
    network.normalizer = rpn.LOSS_NORMALIZER
    return network


def build_proposal_network(cfg: CfgNode) -> ProposalNetwork:
    """Build `ProposalNetwork` from MODEL.BACKBONE, ANCHOR_GENERATOR and RPN."""
    backbone = build_backbone(cfg)
    return ProposalNetwork(backbone, _build_rpn(cfg, backbone), build_preprocess(cfg))


def build_rcnn(cfg: CfgNode) -> GeneralizedRCNN:
    """Build `GeneralizedRCNN` from MODEL.BACKBONE, ANCHOR_GENERATOR, RPN, ROI_HEADS and ROI_*_HEAD."""
    backbone = build_backbone(cfg)
    rpn = _build_rpn(cfg, backbone)
    heads = cfg.MODEL.ROI_HEADS
    box = cfg.MODEL.ROI_BOX_HEAD
    (iou_threshold,) = heads.IOU_THRESHOLDS
    roi_heads = BatchedRoIHeads(
        box_roi_pool=_build_pooler(box, backbone),
        box_head=_build_box_head(box, backbone.out_channels),
        box_predictor=FastRCNNPredictor(box.FC_DIM, heads.NUM_CLASSES + 1),
        fg_iou_thresh=iou_threshold,
        bg_iou_thresh=iou_threshold,
        batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        positive_fraction=heads.POSITIVE_FRACTION,
        bbox_reg_weights=box.BBOX_REG_WEIGHTS,
        score_thresh=heads.SCORE_THRESH_TEST,
        nms_thresh=heads.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    roi_heads.box_loss = BoxLoss(box.BBOX_REG_LOSS_TYPE, box.SMOOTH_L1_BETA, box.BBOX_REG_LOSS_WEIGHT)
    _initialize_box_head(roi_heads)
    keep_float32(roi_heads.box_predictor)
    model = GeneralizedRCNN(backbone, rpn, roi_heads, build_preprocess(cfg))
    if cfg.MODEL.MASK_ON:
        _add_mask_head(cfg, roi_heads, backbone)
    if cfg.MODEL.KEYPOINT_ON:
        _add_keypoint_head(cfg, roi_heads, backbone)
    return model


def _build_pooler(head, backbone):
    """Build the RoIAlign of a head's POOLER_* keys on all levels but "pool", which is for the RPN."""
    names = [name for name in backbone.level_names if name != "pool"]
    strides = backbone.strides[: len(names)]
    aligned = head.POOLER_TYPE == "ROIAlignV2"
    return RoIAlign(names, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO, strides, aligned=aligned)


def _build_box_head(box, channels):
    resolution = box.POOLER_RESOLUTION
    if (box.NUM_CONV, box.NUM_FC) == (0, 2):
        return TwoMLPHead(channels * resolution**2, box.FC_DIM)
    conv_dims = [box.CONV_DIM] * box.NUM_CONV
    fc_dims = [box.FC_DIM] * box.NUM_FC
    return FastRCNNConvFCHead((channels, resolution, resolution), conv_dims, fc_dims, get_norm(box.NORM))


def _initialize_box_head(roi_heads):
    """Initialize as Detectron2: Xavier for the hidden layers, small normals for the predictors."""
    for layer in roi_heads.box_head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    predictor = roi_heads.box_predictor
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def _add_mask_head(cfg, roi_heads, backbone):
    mask = cfg.MODEL.ROI_MASK_HEAD
    conv_dims = [mask.CONV_DIM] * mask.NUM_CONV
    roi_heads.masks_aligned = mask.ALIGNED
    roi_heads.mask_roi_pool = _build_pooler(mask, backbone)
    roi_heads.mask_head = MaskRCNNHeads(backbone.out_channels, conv_dims, 1, get_norm(mask.NORM))
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1
    roi_heads.mask_predictor = MaskRCNNPredictor(mask.CONV_DIM, mask.CONV_DIM, num_classes)
    keep_float32(roi_heads.mask_predictor)


def _add_keypoint_head(cfg, roi_heads, backbone):
    keypoint = cfg.MODEL.ROI_KEYPOINT_HEAD
    if keypoint.NUM_KEYPOINTS < 1:
        raise UserError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS must be at least 1, got {keypoint.NUM_KEYPOINTS}; "
            "default_setup(cfg, args) takes it from the training dataset"
        )
    roi_heads.keypoint_loss_weight = keypoint.LOSS_WEIGHT
    roi_heads.keypoint_score_type = keypoint.SCORE_TYPE
    roi_heads.keypoint_roi_pool = _build_pooler(keypoint, backbone)
    roi_heads.keypoint_head = KeypointRCNNHeads(backbone.out_channels, keypoint.CONV_DIMS)
    roi_heads.keypoint_predictor = KeypointRCNNPredictor(keypoint.CONV_DIMS[-1], keypoint.NUM_KEYPOINTS)
    keep_float32(roi_heads.keypoint_predictor)
