"""Detections from the outputs of a detector's heads, as torchvision makes them, with few device syncs.

A detector makes candidates: boxes `[B, N, 4]`, scores `[B, N]` and labels `[B, N]`, 0 to K-1. Those that are
not wanted keep their place, with a score of -1: picking by a mask is a device sync. NMS then picks the best
of each image. B is the number of images, K that of classes. Boxes are XYXY, in pixels.
"""

import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

from plaintrain.modeling.matching import gather_rows


def select_best(boxes, scores, labels, nms_thresh, limit):
    """Return {boxes, scores, labels} of each image: the `limit` best candidates after NMS within a label."""
    wanted = scores >= 0
    counts = wanted.sum(dim=1).tolist()  # device sync
    index = wanted.flatten().nonzero()[:, 0]  # device sync
    parts = (values.flatten(0, 1)[index].split(counts) for values in (boxes, scores, labels))
    detections = []
    for b, s, k in zip(*parts, strict=True):
        keep = batched_nms(b, s, k, nms_thresh)[:limit]  # device sync
        detections.append({"boxes": b[keep], "scores": s[keep], "labels": k[keep]})
    return detections


def clip_boxes(boxes, image_sizes):
    """Clip boxes `[B, ..., 4]` to the (height, width) of each image, or to the only size, that of all."""
    if len(image_sizes) == 1:
        return clip_boxes_to_image(boxes, image_sizes[0])
    return torch.stack([clip_boxes_to_image(b, size) for b, size in zip(boxes, image_sizes, strict=True)])


def are_large(boxes, size):
    """Return whether both sides of boxes `[..., 4]` have at least a size, bool `[...]`."""
    return (boxes[..., 2:] - boxes[..., :2] >= size).all(dim=-1)


def select_topk_per_level(scores, counts, limit):
    """Return the indices of the best `limit` scores of each level, of `[B, N]`, and their levels' numbers."""
    index, levels, start = [], [], 0
    for i, (part, count) in enumerate(zip(scores.split(counts, dim=1), counts, strict=True)):
        index.append(part.topk(torch.sym_min(limit, count), dim=1).indices + start)
        levels.append(torch.full_like(index[-1], i))
        start = start + count
    return torch.cat(index, dim=1), torch.cat(levels, dim=1)


def select_topk_per_class(model, scores, counts):
    """Return rows, scores and labels of each level's `topk_candidates` best, of scores `[B, N, K]`."""
    classes = scores.shape[2]
    index, _ = select_topk_per_level(scores.flatten(1), [n * classes for n in counts], model.topk_candidates)
    return (
        index // classes,
        mask_below_threshold(gather_rows(scores.flatten(1), index), model.score_thresh),
        index % classes,
    )


def mask_below_threshold(scores, threshold):
    """Return the scores, -1 in place of those that are not above a threshold."""
    return scores.masked_fill(~(scores > threshold), -1)


def heatmaps_to_keypoints(maps, boxes):
    """Return torchvision's keypoints: the highest point of each map once it has the size of its box.

    Of maps `[N, Kp, M, M]` and boxes `[N, 4]`, x, y and score, `[N, Kp, 3]`.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    number, places, scores = maps.shape[1], [], []
    if not len(maps):
        return boxes.new_zeros(0, number, 3)
    for roi, (width, height) in zip(maps, sides.ceil().int().tolist(), strict=True):  # device sync
        resized = F.interpolate(roi[:, None], size=(height, width), mode="bicubic", align_corners=False)
        flat = resized.view(number, -1)
        place = flat.argmax(dim=1, keepdim=True)
        scores.append(flat.gather(1, place)[:, 0])
        places.append(place[:, 0])
    places, widths = torch.stack(places), sides[:, :1].ceil().long()
    cells = torch.stack([places % widths, places.div(widths, rounding_mode="floor")], dim=-1)
    points = (cells + 0.5) * (sides / sides.ceil())[:, None] + boxes[:, None, :2]
    return torch.cat([points, torch.stack(scores)[..., None]], dim=-1).float()
