"""Postprocessing of a detector's heads, as in torchvision, with few device syncs.

Candidates are boxes `[B, N, 4]`, XYXY in pixels, scores `[B, N]` and labels `[B, N]`, 0 to K-1. Rejected ones
stay, with a score of -1: indexing by a mask is a device sync. B is the number of images, K that of classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from plaintrain.modeling.matching import gather_rows

# (height, width) of each image, or one for all.
Sizes = list[tuple[int, int]]


def select_best(
    boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float, topk: int
) -> list[dict[str, Tensor]]:
    """Return the {boxes, scores, labels} of each image: its `topk` best candidates after NMS by label."""
    valid = scores >= 0
    counts = valid.sum(dim=1).tolist()  # device sync
    idxs = valid.flatten().nonzero()[:, 0]  # device sync
    per_image = (values.flatten(0, 1)[idxs].split(counts) for values in (boxes, scores, labels))
    detections = []
    for b, s, k in zip(*per_image, strict=True):
        keep = batched_nms(b, s, k, nms_thresh)[:topk]  # device sync
        detections.append({"boxes": b[keep], "scores": s[keep], "labels": k[keep]})
    return detections


def clip_boxes(boxes: Tensor, image_sizes: Sizes) -> Tensor:
    """Clip boxes `[B, ..., 4]` to the images."""
    if len(image_sizes) == 1:
        return clip_boxes_to_image(boxes, image_sizes[0])
    return torch.stack([clip_boxes_to_image(b, size) for b, size in zip(boxes, image_sizes, strict=True)])


def are_large(boxes: Tensor, min_size: float) -> Tensor:
    """Return whether both sides of boxes `[..., 4]` are at least `min_size`, bool `[...]`."""
    return (boxes[..., 2:] - boxes[..., :2] >= min_size).all(dim=-1)


def select_topk_per_level(scores: Tensor, num_anchors: list[int], topk: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the `topk` best of scores `[B, N]` on each level, and their levels."""
    idxs = []
    levels = []
    start = 0
    for i, (level_scores, n) in enumerate(zip(scores.split(num_anchors, dim=1), num_anchors, strict=True)):
        idxs.append(level_scores.topk(torch.sym_min(topk, n), dim=1).indices + start)
        levels.append(torch.full_like(idxs[-1], i))
        start = start + n
    return torch.cat(idxs, dim=1), torch.cat(levels, dim=1)


def select_topk_per_class(
    scores: Tensor, num_anchors: list[int], topk: int, score_thresh: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return anchor indices, scores and labels of the `topk` best of scores `[B, N, K]` on each level."""
    num_classes = scores.shape[2]
    scores = scores.flatten(1)
    idxs, _ = select_topk_per_level(scores, [n * num_classes for n in num_anchors], topk)
    scores = gather_rows(scores, idxs)
    return idxs // num_classes, scores.masked_fill(~(scores > score_thresh), -1), idxs % num_classes


def heatmaps_to_keypoints(maps: Tensor, boxes: Tensor, score_type: str = "logit") -> Tensor:
    """Return keypoints (x, y, score), `[N, Kp, 3]`, from maps `[N, Kp, M, M]`, by one device sync.

    See MODEL.ROI_KEYPOINT_HEAD.SCORE_TYPE.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    num_keypoints = maps.shape[1]
    if not len(maps):
        return boxes.new_zeros(0, num_keypoints, 3)
    idxs = []
    scores = []
    for roi, (width, height) in zip(maps, sides.ceil().int().tolist(), strict=True):  # device sync
        resized = F.interpolate(roi[:, None], size=(height, width), mode="bicubic", align_corners=False)
        flat = resized.view(num_keypoints, -1)
        idxs.append(flat.argmax(dim=1))
        scores.append(flat.gather(1, idxs[-1][:, None])[:, 0])
    max_idxs = torch.stack(idxs)
    widths = sides[:, :1].ceil().long()
    cells = torch.stack([max_idxs % widths, max_idxs.div(widths, rounding_mode="floor")], dim=-1)
    points = (cells + 0.5) * (sides / sides.ceil())[:, None] + boxes[:, None, :2]
    max_scores = torch.stack(scores)
    if score_type == "probability":
        max_scores = (max_scores - maps.flatten(2).logsumexp(dim=2)).exp()
    return torch.cat([points, max_scores[..., None]], dim=-1).float()
