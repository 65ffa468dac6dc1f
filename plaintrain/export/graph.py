"""A detector's inference as a graph of tensors that torch.export follows, for a batch of images of one size.

The arithmetic is that of `plaintrain.modeling.postprocess` and of torchvision's heads. What depends on the
content of the images is one list of candidates and what NMS keeps of it, for all images at once; all else
has shapes that follow from the batch. B is the number of images, K that of classes without the background,
D that of detections an image at most. Boxes are XYXY, in pixels of the images given.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image, nms, roi_align

from plaintrain.modeling.matching import decode, take
from plaintrain.modeling.postprocess import (
    MIN_SIZE,
    are_large,
    best_of_levels,
    best_scores,
    detect_candidates,
    retinanet_candidates,
    score_proposals,
)
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
        batch = self._normalised(images)
        maps = model.backbone(batch)
        features = list(maps.values())
        if isinstance(model, ProposalNetwork | GeneralizedRCNN):
            anchors = _anchors(model.rpn.anchor_generator, batch, features)
            boxes, scores = _propose(model.rpn, features, anchors, size)
            if isinstance(model, GeneralizedRCNN):
                return _detect_in_rois(model.roi_heads, maps, boxes, scores >= 0, size)
            return _padded(boxes, scores, torch.zeros_like(scores, dtype=torch.int64))
        anchors = _anchors(model.anchor_generator, batch, features)
        kinds = {SSD: _ssd_candidates, RetinaNet: _retinanet_candidates, FCOS: _fcos_candidates}
        find = next(found for kind, found in kinds.items() if isinstance(model, kind))
        boxes, scores, labels = find(model, model.head(features), anchors, features)
        return _best(model, boxes, scores, labels, size)

    def _normalised(self, images):
        transform, (height, width) = self.model.transform, images.shape[-2:]
        images = images.flip(1) if transform.bgr else images
        multiple = transform.size_divisible
        return F.pad((images - transform.mean) / transform.std, (0, -width % multiple, 0, -height % multiple))


def _anchors(generator, batch, features):
    """The anchors `[N, 4]` of an image; the generator's own memory is left alone."""
    kind = DefaultBoxGenerator if isinstance(generator, DefaultBoxGenerator) else AnchorGenerator
    return kind.forward(generator, ImageList(batch, [tuple(batch.shape[-2:])]), features)[0]


def best_of_batch(boxes, scores, groups, limits):
    """What NMS within a group leaves of each image, the best first.

    Args:
        boxes, groups: `[B, N, 4]` and int64 `[B, N]`, from 0.
        scores: `[B, N]`, 0..1, and -1 where there is no candidate.
        limits: IoU in 0..1 with a better box above which one is left out, and how many to keep.

    Returns:
        Scores, -1 for padding, and indices of the candidates, both `[B, min(N, limits[1])]`.
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
    alive = alive.index_fill(0, index[nms(found, rank, limits[0])], True)[:-2].view_as(scores)
    return scores.masked_fill(~alive, -1).topk(torch.sym_min(limits[1], number), dim=1)


def _padded(boxes, scores, labels):
    found = scores >= 0
    return {
        "num_detections": found.sum(dim=1),
        "boxes": boxes.masked_fill(~found[..., None], 0),
        "scores": scores.clamp(min=0),
        "labels": labels.masked_fill(~found, -1),
    }


def _best(settings, boxes, scores, labels, size):
    """The detections among candidates; `settings` has torchvision's thresholds."""
    clips_first = getattr(settings, "clips_before_nms", True)
    if clips_first:
        boxes = clip_boxes_to_image(boxes, size)
    limits = settings.nms_thresh, settings.detections_per_img
    scores, index = best_of_batch(boxes, scores, labels, limits)
    boxes = take(boxes, index)
    if not clips_first:
        boxes = clip_boxes_to_image(boxes, size)
        scores = scores.masked_fill(~(boxes[..., 2:] > boxes[..., :2]).all(dim=-1), -1)
        scores, order = scores.topk(scores.shape[1], dim=1)
        boxes, index = take(boxes, order), take(index, order)
    return _padded(boxes, scores, take(labels, index))


def _propose(rpn, features, anchors, size):
    """Proposals `[B, P, 4]` and their scores `[B, P]`, -1 for padding."""
    objectness, deltas, counts = rpn.predict(features)
    index, levels = best_of_levels(objectness, counts, rpn.pre_nms_top_n())
    boxes = clip_boxes_to_image(decode(take(deltas, index), anchors[index], rpn.box_coder), size)
    scores, wanted = score_proposals(rpn, take(objectness, index), boxes)
    limits = rpn.nms_thresh, rpn.post_nms_top_n()
    scores, index = best_of_batch(boxes, scores.masked_fill(~wanted, -1), levels, limits)
    return take(boxes, index), scores


def _detect_in_rois(heads, maps, proposals, exists, size):
    pooled = _pool(heads.box_roi_pool, maps, proposals)
    logits, deltas = heads.box_predictor(heads.box_head(pooled))
    scores, classes = logits.softmax(-1)[:, 1:], logits.shape[1] - 1
    deltas = deltas.view(-1, classes + 1, 4)[:, 1:]
    boxes = decode(deltas, proposals.flatten(0, 1)[:, None], heads.box_coder)
    boxes = clip_boxes_to_image(boxes, size)
    wanted = (scores > heads.score_thresh) & are_large(boxes, MIN_SIZE) & exists.view(-1, 1)
    labels = torch.arange(classes, device=scores.device).expand_as(scores)
    shape = proposals.shape[0], proposals.shape[1] * classes
    candidates = boxes.view(*shape, 4), scores.masked_fill(~wanted, -1).view(shape), labels.reshape(shape)
    found = _best(heads, *candidates, size)
    number = found["labels"].shape
    if heads.has_mask():
        pooled = _pool(heads.mask_roi_pool, maps, found["boxes"])
        masks = heads.mask_predictor(heads.mask_head(pooled)).sigmoid().unflatten(0, number)
        labels = (found["labels"].clamp(min=0) + 1)[..., None]
        found["masks"] = take_channel(masks, labels)
    if heads.has_keypoint():
        pooled = _pool(heads.keypoint_roi_pool, maps, found["boxes"])
        found["keypoint_maps"] = heads.keypoint_predictor(heads.keypoint_head(pooled)).unflatten(0, number)
    return found


def take_channel(maps, labels):
    """The maps `[B, D, M, M]` of `[B, D, C, M, M]` that labels `[B, D, 1]` name."""
    index = labels[..., None, None].expand(-1, -1, -1, *maps.shape[-2:])
    return maps.gather(2, index)[:, :, 0]


def _pool(pooler, maps, boxes):
    """A `RoIAlign` of boxes `[B, P, 4]`, each on its level, as `[B * P, C, size, size]`."""
    features = [maps[name] for name in pooler.featmap_names]
    image = torch.arange(boxes.shape[0], device=boxes.device).view(-1, 1, 1).expand(-1, boxes.shape[1], 1)
    rois = torch.cat([image.to(boxes.dtype), boxes], dim=2).flatten(0, 1)
    if len(features) == 1:
        return roi_align(features[0], rois, spatial_scale=pooler.scales[0], **pooler.arguments)
    levels = pooler.levels([rois[:, 1:]])
    pooled = rois.new_zeros(rois.shape[0], features[0].shape[1], *pooler.output_size)
    for i, (feature, scale) in enumerate(zip(features, pooler.scales, strict=True)):
        rows = (levels == i).nonzero()[:, 0]
        part = roi_align(feature, rois[rows], spatial_scale=scale, **pooler.arguments)
        pooled = pooled.index_put((rows,), part)
    return pooled


def _retinanet_candidates(model, outputs, anchors, features):
    return retinanet_candidates(model, outputs, anchors, _counts(model, features))


def _fcos_candidates(model, outputs, anchors, features):
    scores = torch.sqrt(outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid())
    rows, scores, labels = best_scores(model, scores, _counts(model, features))
    return model.box_coder.decode(take(outputs["bbox_regression"], rows), anchors[rows]), scores, labels


def _counts(model, features):
    """How many anchors each level has."""
    numbers = model.anchor_generator.num_anchors_per_location()
    return [f.shape[-2] * f.shape[-1] * n for f, n in zip(features, numbers, strict=True)]


def _ssd_candidates(model, outputs, anchors, features):
    boxes, scores, labels = detect_candidates(
        model, outputs["cls_logits"], outputs["bbox_regression"], anchors
    )
    return boxes, scores.flatten(1), labels.flatten(1)
