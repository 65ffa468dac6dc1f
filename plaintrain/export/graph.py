"""A detector's inference as a graph of tensors that torch.export follows, for a batch of images of one size.

Candidates are the detector's own. What depends on the content of the images is the list of them and what NMS
keeps of it, for all images at once; all else has shapes that follow from the batch. B is the number of
images, K that of classes without the background, D that of detections an image at most. Boxes are XYXY, in
pixels of the images given.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image, nms

from plaintrain.modeling.matching import gather_rows
from plaintrain.modeling.rcnn import GeneralizedRCNN, ProposalNetwork


class DetectionGraph(nn.Module):
    """A detector on tensors: uint8 `[B, 3, H, W]` RGB in, a dict of tensors out."""

    def __init__(self, model):
        """model: what `plaintrain.modeling.build_model` returns, in evaluation mode."""
        super().__init__()
        self.model = model

    def forward(self, images):
        """
        Returns:
            num_detections int64 `[B]`; boxes `[B, D, 4]`, scores `[B, D]` in 0..1, the best first, and labels
            int64 `[B, D]`, 0 to K-1: an image's first num_detections, then zeros, with the label -1. With
            their heads masks `[B, D, M, M]`, probabilities inside each box, and keypoint_maps
            `[B, D, Kp, M, M]`, the heads' heatmaps of each box.
        """
        model, size = self.model, images.shape[-2:]
        images = ImageList(self._normalised(images), [size])
        if not isinstance(model, ProposalNetwork | GeneralizedRCNN):
            found = select_batch_detections(
                *model.find_candidates(images), model.nms_thresh, model.detections_per_img
            )
            boxes, scores, labels = found
            if not model.clips_before_nms:
                boxes = clip_boxes_to_image(boxes, size)
                scores = scores.masked_fill(~(boxes[..., 2:] > boxes[..., :2]).all(dim=-1), -1)
                scores, order = scores.topk(scores.shape[1], dim=1)
                boxes, labels = gather_rows(boxes, order), gather_rows(labels, order)
            return _padded(boxes, scores, labels)
        rpn, features = model.rpn, model.backbone(images.tensors)
        predicted = rpn.predict(list(features.values()))
        anchors = rpn.anchor_generator(images, list(features.values()))[0]
        candidates = rpn.find_candidates(*predicted, anchors, [size])
        boxes, scores, levels = select_batch_detections(*candidates, rpn.nms_thresh, rpn.post_nms_top_n())
        if isinstance(model, ProposalNetwork):
            return _padded(boxes, scores, torch.zeros_like(levels))
        return self._detect_in_rois(features, boxes, scores, size)

    def _normalised(self, images):
        transform, (height, width) = self.model.transform, images.shape[-2:]
        images = images.flip(1) if transform.bgr else images
        multiple = transform.size_divisible
        return F.pad((images - transform.mean) / transform.std, (0, -width % multiple, 0, -height % multiple))

    def _detect_in_rois(self, features, proposals, scores, size):
        heads = self.model.roi_heads
        candidates = heads.find_candidates(features, proposals, scores, [size])
        found = _padded(*select_batch_detections(*candidates, heads.nms_thresh, heads.detections_per_img))
        boxes, labels = found["boxes"], found["labels"].clamp(min=0)
        if heads.has_mask():
            (masks,) = heads.predict_masks(features, boxes, [labels.flatten()])
            found["masks"] = masks[:, 0].unflatten(0, labels.shape)
        if heads.has_keypoint():
            found["keypoint_maps"] = heads.predict_heatmaps(features, boxes).unflatten(0, labels.shape)
        return found


def select_batch_detections(boxes, scores, groups, nms_thresh, limit):
    """Return the boxes, scores and groups that NMS within a group leaves of each image, the best first.

    Args:
        boxes, scores: `[B, N, 4]` and `[B, N]`, 0..1, and -1 where there is no candidate.
        groups: int64 `[B, N]`, from 0.
        nms_thresh: IoU in 0..1 with a better box above which one is dropped.
        limit: how many to keep; the result has `min(N, limit)` an image, scores of -1 for padding.
    """
    number, wanted = scores.shape[1], scores >= 0
    counted = boxes.masked_fill(~wanted[..., None], 0)
    span = counted.max() - counted.min() + 1
    index = wanted.flatten().nonzero()[:, 0]
    # Images side by side, groups one below the other: none overlaps with another.
    shifts = torch.stack([index // number, groups.flatten()[index]], dim=1) * span
    found = boxes.flatten(0, 1)[index] + shifts.repeat(1, 2)
    # Two more, far from all others: torchvision tells torch.export that NMS keeps at least so many.
    corners = torch.tensor([[-3.0, -3.0, -2.0, -2.0], [-5.0, -5.0, -4.0, -4.0]], device=boxes.device)
    found, rank = torch.cat([found, corners * span]), F.pad(scores.flatten()[index], (0, 2), value=-1.0)
    index = torch.cat([index, torch.arange(2, device=index.device) + scores.numel()])
    alive = F.pad(torch.zeros_like(wanted).flatten(), (0, 2))
    alive = alive.index_fill(0, index[nms(found, rank, nms_thresh)], True)[:-2].view_as(scores)
    scores, index = scores.masked_fill(~alive, -1).topk(torch.sym_min(limit, number), dim=1)
    return gather_rows(boxes, index), scores, gather_rows(groups, index)


def _padded(boxes, scores, labels):
    found = scores >= 0
    return {
        "num_detections": found.sum(dim=1),
        "boxes": boxes.masked_fill(~found[..., None], 0),
        "scores": scores.clamp(min=0),
        "labels": labels.masked_fill(~found, -1),
    }
