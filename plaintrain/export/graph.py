"""Inference of a detector as a graph of tensors for torch.export, for a batch of images of one size.

Only the input of NMS has a shape that depends on the content of the images. B is the number of images, K that
of classes, D the maximum number of detections per image. Boxes are XYXY, in pixels of the input images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image, nms

from plaintrain.modeling.detector import DenseDetector
from plaintrain.modeling.matching import gather_rows
from plaintrain.modeling.rcnn import GeneralizedRCNN, ProposalNetwork

Detector = DenseDetector | GeneralizedRCNN | ProposalNetwork


class DetectionGraph(nn.Module):
    """Detector, in evaluation mode, on tensors: uint8 `[B, 3, H, W]` RGB in, a dict of tensors out."""

    def __init__(self, model: Detector):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the detections of each image, padded with zeros and labels of -1.

        They are num_detections int64 `[B]`; boxes `[B, D, 4]`, scores `[B, D]` in 0..1, descending, labels
        int64 `[B, D]`, 0 to K-1; with their heads masks `[B, D, M, M]`, probabilities inside each box, and
        keypoint_maps `[B, D, Kp, M, M]`, heatmaps of each box.
        """
        model = self.model
        size = images.shape[-2:]
        batch = ImageList(self._preprocess(images), [size])
        if isinstance(model, DenseDetector):
            boxes, scores, labels = model.find_candidates(batch)
            boxes, scores, labels = select_batch_detections(
                boxes, scores, labels, model.nms_thresh, model.detections_per_img
            )
            if not model.clips_before_nms:
                boxes = clip_boxes_to_image(boxes, size)
                scores = scores.masked_fill(~(boxes[..., 2:] > boxes[..., :2]).all(dim=-1), -1)
                scores, order = scores.topk(scores.shape[1], dim=1)
                boxes = gather_rows(boxes, order)
                labels = gather_rows(labels, order)
            return _pad_detections(boxes, scores, labels)
        features = model.backbone(batch.tensors)
        boxes, scores, levels = self._propose(batch, list(features.values()))
        if isinstance(model, ProposalNetwork):
            return _pad_detections(boxes, scores, torch.zeros_like(levels))
        return self._detect_in_rois(features, boxes, scores, size)

    def _preprocess(self, images):
        transform = self.model.transform
        height, width = images.shape[-2:]
        images = images.flip(1) if transform.bgr else images
        divisor = transform.size_divisible
        return F.pad((images - transform.mean) / transform.std, (0, -width % divisor, 0, -height % divisor))

    def _propose(self, batch, features):
        rpn = self.model.rpn
        anchors = rpn.anchor_generator(batch, features)[0]
        candidates = rpn.find_candidates(*rpn.predict(features), anchors, batch.image_sizes)
        return select_batch_detections(*candidates, rpn.nms_thresh, rpn.post_nms_top_n())

    def _detect_in_rois(self, features, proposals, scores, size):
        heads = self.model.roi_heads
        candidates = heads.find_candidates(features, proposals, scores, [size])
        selected = select_batch_detections(*candidates, heads.nms_thresh, heads.detections_per_img)
        detections = _pad_detections(*selected)
        boxes = detections["boxes"]
        labels = detections["labels"].clamp(min=0)
        if heads.has_mask():
            (masks,) = heads.predict_masks(features, boxes, [labels.flatten()])
            detections["masks"] = masks[:, 0].unflatten(0, labels.shape)
        if heads.has_keypoint():
            detections["keypoint_maps"] = heads.predict_heatmaps(features, boxes).unflatten(0, labels.shape)
        return detections


def select_batch_detections(
    boxes: Tensor, scores: Tensor, groups: Tensor, nms_thresh: float, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `min(N, topk)` best boxes, scores (-1 for padding) and groups of each image after NMS.

    NMS is within groups, labels or levels.
    """
    num_candidates = scores.shape[1]
    valid = scores >= 0
    valid_boxes = boxes.masked_fill(~valid[..., None], 0)
    span = valid_boxes.max() - valid_boxes.min() + 1
    idxs = valid.flatten().nonzero()[:, 0]
    # Shifted by image along x and by group along y, boxes of different groups never overlap.
    shifts = torch.stack([idxs // num_candidates, groups.flatten()[idxs]], dim=1) * span
    shifted = boxes.flatten(0, 1)[idxs] + shifts.repeat(1, 2)
    # torchvision tells torch.export that NMS keeps at least two boxes; add two far from all others.
    corners = torch.tensor([[-3.0, -3.0, -2.0, -2.0], [-5.0, -5.0, -4.0, -4.0]], device=boxes.device)
    shifted = torch.cat([shifted, corners * span])
    nms_scores = F.pad(scores.flatten()[idxs], (0, 2), value=-1.0)
    idxs = torch.cat([idxs, torch.arange(2, device=idxs.device) + scores.numel()])
    keep = F.pad(torch.zeros_like(valid).flatten(), (0, 2))
    keep = keep.index_fill(0, idxs[nms(shifted, nms_scores, nms_thresh)], True)[:-2].view_as(scores)
    scores, idxs = scores.masked_fill(~keep, -1).topk(torch.sym_min(topk, num_candidates), dim=1)
    return gather_rows(boxes, idxs), scores, gather_rows(groups, idxs)


def _pad_detections(boxes, scores, labels):
    valid = scores >= 0
    return {
        "num_detections": valid.sum(dim=1),
        "boxes": boxes.masked_fill(~valid[..., None], 0),
        "scores": scores.clamp(min=0),
        "labels": labels.masked_fill(~valid, -1),
    }
