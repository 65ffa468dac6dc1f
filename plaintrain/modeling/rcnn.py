"""Faster R-CNN (https://arxiv.org/abs/1506.01497) on torchvision's implementation."""

import torch
from torchvision.models.detection import FasterRCNN as _FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from plaintrain.modeling.backbone import build_backbone
from plaintrain.modeling.common import (
    build_anchor_generator,
    build_preprocess,
    get_targets,
    to_original_size,
)
from plaintrain.utils.errors import UserError

# torchvision's names of the losses -> Detectron2's.
_LOSSES = {
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box_reg",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
}


class FasterRCNN(_FasterRCNN):
    """torchvision's Faster R-CNN, parameter for parameter, on samples instead of images."""

    def forward(self, samples):
        """
        Args:
            samples: list of samples; `image` uint8 `[3, H, W]`, in training with `target`.

        Returns:
            In training: `loss_cls`, `loss_box_reg`, `loss_rpn_cls` and `loss_rpn_loc`, 0-d tensors.
            In evaluation: a list of {boxes `[N, 4]`, scores `[N]`, labels `[N]`}, boxes XYXY in the
            original image's pixels, scores descending in 0..1, labels 0 to K-1.
        """
        images = [sample["image"] for sample in samples]
        if not self.training:
            return to_original_size(super().forward(images), samples, label_offset=1)
        # Label 0 is the background here.
        device = next(self.parameters()).device
        losses = super().forward(images, get_targets(samples, device, label_offset=1))
        return {_LOSSES[name]: value for name, value in losses.items()}


def build_rcnn(cfg):
    """Faster R-CNN from MODEL.BACKBONE, ANCHOR_GENERATOR, RPN, ROI_HEADS and ROI_BOX_HEAD."""
    backbone = build_backbone(cfg)
    anchors = build_anchor_generator(cfg, len(backbone.level_names))
    rpn, heads, box = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    if any(width not in (-1, backbone.out_channels) for width in rpn.CONV_DIMS) or not rpn.CONV_DIMS:
        raise UserError(f"MODEL.RPN.CONV_DIMS must hold -1 per convolution, not {rpn.CONV_DIMS}")
    features = [name for name in backbone.level_names if name != "pool"]
    resolution = box.POOLER_RESOLUTION
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0], len(rpn.CONV_DIMS)),
        rpn_pre_nms_top_n_train=rpn.PRE_NMS_TOPK_TRAIN,
        rpn_pre_nms_top_n_test=rpn.PRE_NMS_TOPK_TEST,
        rpn_post_nms_top_n_train=rpn.POST_NMS_TOPK_TRAIN,
        rpn_post_nms_top_n_test=rpn.POST_NMS_TOPK_TEST,
        rpn_nms_thresh=rpn.NMS_THRESH,
        rpn_bg_iou_thresh=rpn.IOU_THRESHOLDS[0],
        rpn_fg_iou_thresh=rpn.IOU_THRESHOLDS[1],
        rpn_batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        rpn_positive_fraction=rpn.POSITIVE_FRACTION,
        box_roi_pool=MultiScaleRoIAlign(features, resolution, box.POOLER_SAMPLING_RATIO),
        box_head=TwoMLPHead(backbone.out_channels * resolution**2, box.FC_DIM),
        box_predictor=FastRCNNPredictor(box.FC_DIM, heads.NUM_CLASSES + 1),
        box_score_thresh=heads.SCORE_THRESH_TEST,
        box_nms_thresh=heads.NMS_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        box_fg_iou_thresh=heads.IOU_THRESHOLDS[0],
        box_bg_iou_thresh=heads.IOU_THRESHOLDS[0],
        box_batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        box_positive_fraction=heads.POSITIVE_FRACTION,
        bbox_reg_weights=box.BBOX_REG_WEIGHTS,
    )
    model.transform = build_preprocess(cfg)
    _initialize_box_head(model.roi_heads)
    return model


def _initialize_box_head(roi_heads):
    """Detectron2's initialisation: Xavier for the hidden layers, small normals for the predictors."""
    for layer in (roi_heads.box_head.fc6, roi_heads.box_head.fc7):
        torch.nn.init.kaiming_uniform_(layer.weight, a=1)
        torch.nn.init.zeros_(layer.bias)
    predictor = roi_heads.box_predictor
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        torch.nn.init.normal_(layer.weight, std=std)
        torch.nn.init.zeros_(layer.bias)
