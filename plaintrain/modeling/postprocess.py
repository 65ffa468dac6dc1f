"""Detections of torchvision's heads in evaluation, with few sync points: they are those of torchvision.

What is not wanted is masked, and what is left picked once for the whole batch: picking by a mask is a sync
point of a GPU. B is the number of images, K that of classes without the background. Boxes are XYXY, in
pixels.
"""

import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.ops import batched_nms, clip_boxes_to_image

from plaintrain.modeling.matching import decode, take

# Boxes with a shorter side are left out of an R-CNN's detections.
MIN_SIZE = 1e-2


def best_of_each(wanted, boxes, scores, labels, limits):
    """What NMS within a label leaves of the candidates of each image, the best first.

    Args:
        wanted: of each image bool `[n]`, which candidates there are; N in all.
        boxes, scores, labels: `[N, 4]`, `[N]` and `[N]`, of all images.
        limits: IoU in 0..1 with a better box above which one is left out, and how many to keep.

    Returns:
        Of each image {boxes, scores, labels}.
    """
    counts = torch.stack([part.sum() for part in wanted]).tolist()  # sync point
    index = torch.cat(wanted).nonzero()[:, 0]  # sync point
    parts = (values[index].split(counts) for values in (boxes, scores, labels))
    detections = []
    for b, s, k in zip(*parts, strict=True):
        keep = batched_nms(b, s, k, limits[0])[: limits[1]]  # sync point
        detections.append({"boxes": b[keep], "scores": s[keep], "labels": k[keep]})
    return detections


def clip_each(boxes, image_shapes):
    """Boxes of each image, a list of `[..., 4]`, cut at its edges."""
    return [clip_boxes_to_image(b, shape) for b, shape in zip(boxes, image_shapes, strict=True)]


def are_large(boxes, size):
    """Whether both sides of boxes `[..., 4]` have at least a size, bool `[...]`."""
    return (boxes[..., 2:] - boxes[..., :2] >= size).all(dim=-1)


def best_of_levels(scores, counts, limit):
    """The indices of the best `limit` scores of each level, of `[B, N]`, and the number of their level."""
    index, levels, start = [], [], 0
    for i, (part, count) in enumerate(zip(scores.split(counts, dim=1), counts, strict=True)):
        index.append(part.topk(torch.sym_min(limit, count), dim=1).indices + start)
        levels.append(torch.full_like(index[-1], i))
        start = start + count
    return torch.cat(index, dim=1), torch.cat(levels, dim=1)


def best_scores(model, scores, counts):
    """The rows, scores (-1 below the threshold) and labels of each level's best, of scores `[B, N, K]`."""
    classes = scores.shape[2]
    scores = scores.masked_fill(~(scores > model.score_thresh), -1).flatten(1)
    index, _ = best_of_levels(scores, [count * classes for count in counts], model.topk_candidates)
    return index // classes, take(scores, index), index % classes


def retinanet_candidates(model, outputs, anchors, counts):
    """The best boxes `[B, N, 4]` of a RetinaNet's levels, their scores and labels, `[B, N]`."""
    rows, scores, labels = best_scores(model, outputs["cls_logits"].sigmoid(), counts)
    return decode(take(outputs["bbox_regression"], rows), anchors[rows], model.box_coder), scores, labels


def score_proposals(rpn, objectness, boxes):
    """The scores of proposals, and whether they are likely and large enough, both `[B, N]`."""
    scores = objectness.sigmoid()
    return scores, are_large(boxes, rpn.min_size) & (scores >= rpn.score_thresh)


def detect_candidates(model, logits, deltas, anchors):
    """Of an SSD the best boxes `[B, C, 4]` of each class, their scores and labels, both `[B, K, C / K]`.

    Scores are -1 below the threshold; labels count from 0.
    """
    boxes, scores = decode(deltas, anchors, model.box_coder), logits.softmax(-1)[..., 1:].transpose(1, 2)
    number = min(model.topk_candidates, scores.shape[2])
    scores, index = scores.masked_fill(~(scores > model.score_thresh), -1).topk(number, dim=2)
    labels = torch.arange(scores.shape[1], device=scores.device)[:, None].expand_as(scores)
    return take(boxes, index.flatten(1)), scores, labels


def best_proposals(rpn, boxes, objectness, image_shapes, counts):
    """As torchvision's `RegionProposalNetwork.filter_proposals`, of which the arguments are."""
    objectness = objectness.detach().view(len(image_shapes), -1)
    index, levels = best_of_levels(objectness, counts, rpn.pre_nms_top_n())
    boxes = torch.stack(clip_each(take(boxes, index), image_shapes))
    scores, wanted = score_proposals(rpn, take(objectness, index), boxes)
    limits = rpn.nms_thresh, rpn.post_nms_top_n()
    found = best_of_each(list(wanted), *(part.flatten(0, 1) for part in (boxes, scores, levels)), limits)
    return [f["boxes"] for f in found], [f["scores"] for f in found]


def detect_in_rois(heads, features, proposals, image_shapes):
    """The detections of torchvision's `RoIHeads`.

    Args:
        heads: the `RoIHeads`.
        features: {name: `[B, C, H, W]`}.
        proposals: of each image boxes `[n, 4]`.
        image_shapes: (height, width) of each image.
    """
    pooled = heads.box_roi_pool(features, proposals, image_shapes)
    detections = _detect_boxes(heads, *heads.box_predictor(heads.box_head(pooled)), proposals, image_shapes)
    boxes, labels = ([found[key] for found in detections] for key in ("boxes", "labels"))
    if heads.has_mask():
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, image_shapes)))
        for found, masks in zip(detections, maskrcnn_inference(logits, labels), strict=True):
            found["masks"] = masks
    if heads.has_keypoint():
        pooled = heads.keypoint_roi_pool(features, boxes, image_shapes)
        maps = heads.keypoint_predictor(heads.keypoint_head(pooled))
        parts = (part.split(list(map(len, boxes))) for part in heatmaps_to_keypoints(maps, torch.cat(boxes)))
        for found, keypoints, scores in zip(detections, *parts, strict=True):
            found |= {"keypoints": keypoints, "keypoints_scores": scores}
    return detections


def _detect_boxes(heads, logits, deltas, proposals, image_shapes):
    sizes, classes = [len(part) for part in proposals], logits.shape[1] - 1
    scores = logits.softmax(-1)[:, 1:]
    deltas = deltas.view(len(deltas), classes + 1, 4)[:, 1:]
    boxes = decode(deltas, torch.cat(proposals).to(deltas.dtype)[:, None], heads.box_coder)
    boxes = torch.cat(clip_each(boxes.split(sizes), image_shapes))
    wanted = (scores > heads.score_thresh) & are_large(boxes, MIN_SIZE)
    labels = torch.arange(1, classes + 1, device=scores.device).expand_as(scores)
    wanted = [part.flatten() for part in wanted.split(sizes)]
    limits = heads.nms_thresh, heads.detections_per_img
    return best_of_each(wanted, boxes.flatten(0, 1), scores.flatten(), labels.flatten(), limits)


def detect_from_anchors(model, logits, deltas, anchors, image_shapes):
    """As torchvision's `SSD.postprocess_detections`.

    Args:
        model: the `SSD`.
        logits: `[B, A, K + 1]`, of the background first.
        deltas: `[B, A, 4]`.
        anchors: of each image `[A, 4]`.
        image_shapes: (height, width) of each image.
    """
    boxes, scores, labels = detect_candidates(model, logits, deltas, torch.stack(anchors))
    boxes = torch.cat(clip_each(boxes, image_shapes))
    limits = model.nms_thresh, model.detections_per_img
    wanted = list((scores > model.score_thresh).flatten(1))
    return best_of_each(wanted, boxes, scores.flatten(), labels.flatten() + 1, limits)


def heatmaps_to_keypoints(maps, boxes):
    """As torchvision's: the highest point of each map once it has the size of its box.

    Args:
        maps: `[N, Kp, M, M]`.
        boxes: `[N, 4]`.

    Returns:
        keypoints `[N, Kp, 3]` as x, y, 1, and their scores `[N, Kp]`.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    number, places, scores = maps.shape[1], [], []
    if not len(maps):
        return boxes.new_zeros(0, number, 3), boxes.new_zeros(0, number)
    for roi, (width, height) in zip(maps, sides.ceil().int().tolist(), strict=True):  # sync point
        resized = F.interpolate(roi[:, None], size=(height, width), mode="bicubic", align_corners=False)
        flat = resized.view(number, -1)
        place = flat.argmax(dim=1, keepdim=True)
        scores.append(flat.gather(1, place)[:, 0])
        places.append(place[:, 0])
    places, widths = torch.stack(places), sides[:, :1].ceil().long()
    cells = torch.stack([places % widths, places.div(widths, rounding_mode="floor")], dim=-1)
    points = (cells + 0.5) * (sides / sides.ceil())[:, None] + boxes[:, None, :2]
    return F.pad(points.float(), (0, 1), value=1.0), torch.stack(scores).float()
