"""FCOS (https://arxiv.org/abs/1904.01355) on torchvision's implementation."""

import torch
from torchvision.models.detection import FCOS as _FCOS
from torchvision.models.detection.fcos import FCOSHead

from plaintrain.modeling.backbone import build_backbone
from plaintrain.modeling.common import (
    OnSamples,
    build_anchor_generator,
    build_preprocess,
    prior_bias,
)
from plaintrain.modeling.float32 import keep_float32
from plaintrain.utils.errors import UserError

# torchvision's heads have GroupNorm with this many groups.
_GROUPS = 32


class FCOS(OnSamples, _FCOS):
    """torchvision's FCOS, parameter for parameter."""

    loss_names = {
        "classification": "loss_fcos_cls",
        "bbox_regression": "loss_fcos_loc",
        "bbox_ctrness": "loss_fcos_ctr",
    }


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
    bias = prior_bias(fcos.PRIOR_PROB, "MODEL.FCOS.PRIOR_PROB")
    torch.nn.init.constant_(head.classification_head.cls_logits.bias, bias)
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
    keep_float32(heads=[head], anchors=[anchors])
    return model
