"""Test-time augmentation: run a detector on several views of each image and merge the detections."""

import contextlib
from typing import Any

import torch
from torch import nn
from torchvision.ops import batched_nms

from plaintrain.config import CfgNode
from plaintrain.modeling.rcnn import GeneralizedRCNN, ProposalNetwork
from plaintrain.structures import BoxMasks
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


def get_detection_settings(model: nn.Module) -> Any:
    """Return the module of a detector that has the `score_thresh` and `nms_thresh` of its detections."""
    return getattr(model, "roi_heads", getattr(model, "rpn", model))


class DetectorWithTTA(nn.Module):
    """Detector on several views of an image, for evaluation only.

    As in Detectron2's GeneralizedRCNNWithTTA, NMS by class merges the detections of all views, and the masks
    of a `GeneralizedRCNN` are the mean of its predictions for the merged boxes in all views. Keypoints, and
    masks of other detectors, are those of the detection's view.

    Even for one view, NMS by class drops more boxes than the NMS by level of `ProposalNetwork`, and than that
    of `RetinaNet` with `DefaultAnchorGenerator`, which precedes clipping.
    """

    # False returns the masks of a `GeneralizedRCNN` as `BoxMasks`.
    pastes_masks = True

    def __init__(self, model: nn.Module, nms_thresh: float, detections_per_image: int):
        super().__init__()
        self.model = comm.unwrap_model(model)
        self.nms_thresh = nms_thresh
        self.detections_per_image = detections_per_image
        self.training = self.model.training

    def forward(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the detections of each sample; all samples have the same number of `views`."""
        model = self.model
        if model.training:
            raise RuntimeError("DetectorWithTTA is for evaluation only; call eval() first")
        views = _split_views(samples)
        mask_rcnn = model if isinstance(model, GeneralizedRCNN) and model.roi_heads.has_mask() else None
        with mask_rcnn.without_masks() if mask_rcnn is not None else contextlib.nullcontext():
            detections = [list(map(_unflip, model(view), view)) for view in views]
        results = [self._merge(per_view) for per_view in zip(*detections, strict=True)]
        if mask_rcnn is not None:
            self._add_masks(mask_rcnn, results, views)
        return results

    def _merge(self, detections):
        merged = {key: torch.cat([d[key] for d in detections]) for key in detections[0]}
        keep = batched_nms(merged["boxes"], merged["scores"], merged["labels"], self.nms_thresh)
        return {key: value[keep[: self.detections_per_image]] for key, value in merged.items()}

    def _add_masks(self, model, results, views):
        """Add the mean of the masks that the mask head predicts for the merged boxes in each view."""
        labels = [result["labels"] for result in results]
        all_masks = []
        for view in views:
            boxes = [_to_view(result["boxes"], sample) for result, sample in zip(results, view, strict=True)]
            images, _ = model.transform([sample["image"] for sample in view])
            masks = model.roi_heads.predict_masks(model.backbone(images.tensors), boxes, labels)
            all_masks.append([m.flip(-1) if s["flipped"] else m for m, s in zip(masks, view, strict=True)])
        for result, sample, masks in zip(results, views[0], zip(*all_masks, strict=True), strict=True):
            mean = torch.stack(masks).mean(dim=0)
            size = (sample["height"], sample["width"])
            box_masks = BoxMasks(mean, result["boxes"], *size, model.roi_heads.masks_aligned)
            result["masks"] = box_masks.paste() if self.pastes_masks else box_masks


def _split_views(samples):
    """Return the samples of each view: the first views of all images, the second ones, ..."""
    for sample in samples:
        if not sample.get("views"):
            raise UserError(
                f"the sample of image {sample.get('image_id')} has no views; build the test loader with "
                "TEST.AUG.ENABLED, or give it a mapper such as TTAMapper"
            )
    per_image = [[{**sample, **view} for view in sample["views"]] for sample in samples]
    return list(zip(*per_image, strict=True))


def _flip_boxes(boxes, width):
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=-1)


def _unflip(detection, sample):
    """Flip the detections of a flipped view back, in pixels of the original image."""
    if not sample["flipped"]:
        return detection
    width = sample["width"]
    result = {**detection, "boxes": _flip_boxes(detection["boxes"], width)}
    if "masks" in detection:
        result["masks"] = detection["masks"].flip(-1)
    if "keypoints" in detection:
        order = sample["keypoint_flip_indices"]
        if order is None:
            raise UserError("keypoints in a flipped view need keypoint_flip_indices, got None")
        x, y, score = detection["keypoints"][:, list(order)].unbind(dim=-1)
        result["keypoints"] = torch.stack([width - x, y, score], dim=-1)
    return result


def _to_view(boxes, sample):
    """Map boxes from the original image to a view."""
    boxes = _flip_boxes(boxes, sample["width"]) if sample["flipped"] else boxes
    height, width = sample["image"].shape[-2:]
    scale = [width / sample["width"], height / sample["height"]]
    return boxes * boxes.new_tensor(scale * 2)


def build_tta(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Return `DetectorWithTTA` around the unwrapped model if TEST.AUG.ENABLED, else the model itself.

    NMS threshold and maximum number of detections are the model's.
    """
    if not cfg.TEST.AUG.ENABLED:
        return model
    detector = comm.unwrap_model(model)
    is_rpn = isinstance(detector, ProposalNetwork)
    max_detections = cfg.MODEL.RPN.POST_NMS_TOPK_TEST if is_rpn else cfg.TEST.DETECTIONS_PER_IMAGE
    return DetectorWithTTA(detector, get_detection_settings(detector).nms_thresh, max_detections)
