"""FCOS (https://arxiv.org/abs/1904.01355) on torchvision's implementation."""

import torch
from torchvision.models.detection import FCOS as _FCOS
from torchvision.models.detection.fcos import FCOSHead

from plaintrain.modeling.backbone import build_backbone
from plaintrain.modeling.common import (
    build_anchor_generator,
    build_preprocess,
    get_targets,
    prior_bias,
    to_original_size,
)
from plaintrain.utils.errors import UserError

_LOSSES = {
    "classification": "loss_fcos_cls",
    "bbox_regression": "loss_fcos_loc",
    "bbox_ctrness": "loss_fcos_ctr",
}
# torchvision's heads have GroupNorm with this many groups.
_GROUPS = 32


class FCOS(_FCOS):
    """torchvision's FCOS, parameter for parameter, on samples instead of images."""

    def forward(self, samples):
        """
        Args:
            samples: list of samples; `image` uint8 `[3, H, W]`, in training with `target`.

        Returns:
            In training: `loss_fcos_cls`, `loss_fcos_loc` and `loss_fcos_ctr`, 0-d tensors.
            In evaluation: a list of {boxes `[N, 4]`, scores `[N]`, labels `[N]`}, boxes XYXY in the
            original image's pixels, scores descending in 0..1, labels 0 to K-1.
        """
        images = [sample["image"] for sample in samples]
        if not self.training:
            return to_original_size(super().forward(images), samples)
        device = next(self.parameters()).device
        losses = super().forward(images, get_targets(samples, device))
        return {_LOSSES[name]: value for name, value in losses.items()}


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
    return model
