"""Match and sample anchors and proposals in fixed shapes.

Padding is masked: indexing by a mask is a device sync. B is the number of images, M the largest number of
ground-truth boxes in one, N that of candidates, anchors or proposals. Boxes are XYXY, in pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher, SSDMatcher

# Pairs of a ground-truth box and a candidate compared at once: 64 MB per value of a pair.
_MAX_PAIRS = 2**24


def pad_targets(targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return padded boxes `[B, M, 4]` and labels `[B, M]`, M at least 1; the label of padding is -1."""
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True, padding_value=-1)
    padding = int(boxes.shape[1] == 0)
    return F.pad(boxes, (0, 0, 0, padding)), F.pad(labels, (0, padding), value=-1)


def _pairwise_iou(boxes, candidates):
    x0, y0, x1, y1 = boxes[:, :, None].unbind(-1)
    # Contiguous coordinates are faster to read.
    u0, v0, u1, v1 = candidates.movedim(-1, 0).contiguous()[:, :, None]
    intersection = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp_(min=0)
    intersection *= (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp_(min=0)
    return intersection / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection)


def match_in_chunks(
    match: Callable[..., tuple[Tensor, ...]], gt_boxes: Tensor, valid: Tensor, candidates: Tensor
) -> list[Tensor]:
    """Call `match` on chunks of images that bound its memory; `valid` is `[B, M, 1]`."""
    chunk_size = max(1, _MAX_PAIRS // (gt_boxes.shape[1] * candidates.shape[1]))
    inputs = (gt_boxes, valid, candidates.expand(len(gt_boxes), -1, -1))
    matches = [match(*chunk) for chunk in zip(*(x.split(chunk_size) for x in inputs), strict=True)]
    return [torch.cat(chunks) for chunks in zip(*matches, strict=True)]


@torch.no_grad()
def match_boxes(gt_boxes: Tensor, valid: Tensor, candidates: Tensor, matcher: Matcher) -> list[Tensor]:
    """Match candidates with ground-truth boxes by IoU as torchvision's matchers.

    `gt_boxes` are `[B, M, 4]`, `valid` bool `[B, M]`, False for padding; candidates `[B, N, 4]`, or
    `[1, N, 4]` for all images. Returns matched_idxs, and the bool masks foreground and background, `[B, N]`.
    """

    def _match(gt_boxes, valid, candidates):
        iou = _pairwise_iou(gt_boxes, candidates).masked_fill_(~valid, -1)
        max_iou, matched_idxs = iou.max(dim=1)
        foreground = max_iou >= matcher.high_threshold
        background = max_iou < matcher.low_threshold
        if matcher.allow_low_quality_matches:
            foreground |= ((iou == iou.amax(dim=2, keepdim=True)) & valid).any(dim=1)
        if isinstance(matcher, SSDMatcher):
            gt_idxs = torch.arange(iou.shape[1], device=iou.device)[:, None].where(valid, -1)
            # Of ground-truth boxes with the same best candidate, the last wins.
            forced_idxs = torch.full_like(matched_idxs, -1)
            forced_idxs.scatter_reduce_(1, iou.argmax(dim=2), gt_idxs.squeeze(2), "amax")
            foreground |= forced_idxs >= 0
            matched_idxs = forced_idxs.where(forced_idxs >= 0, matched_idxs)
        return matched_idxs, foreground, background & ~foreground

    return match_in_chunks(_match, gt_boxes, valid[:, :, None], candidates)


@torch.no_grad()
def sample_matches(
    foreground: Tensor, background: Tensor, sampler: BalancedPositiveNegativeSampler
) -> tuple[Tensor, Tensor]:
    """Sample candidates as torchvision's sampler, with random draws that depend on shapes alone.

    Returns indices `[B, S]`, foreground first, and bool `[B, S]`, False for padding.
    """
    num_samples = sampler.batch_size_per_image
    num_candidates = foreground.shape[1]
    keys = torch.rand(foreground.shape, device=foreground.device)
    num_foreground = min(int(num_samples * sampler.positive_fraction), num_candidates)
    fg_idxs = keys.masked_fill(~foreground, -1).topk(num_foreground, dim=1).indices
    foreground = torch.zeros_like(foreground).scatter_(1, fg_idxs, True) & foreground
    keys = (keys + 2 * foreground).masked_fill_(~(foreground | background), -1)
    keys, sampled_idxs = keys.topk(min(num_samples, num_candidates), dim=1)
    return sampled_idxs, keys >= 0


def gather_rows(values: Tensor, idxs: Tensor) -> Tensor:
    """Return the rows `[B, S, ...]` of `values` `[B, N, ...]` at `idxs` `[B, S]`."""
    # torch.export would specialize the sizes of `take_along_dim`.
    idxs = idxs.view(*idxs.shape, *[1] * (values.ndim - 2))
    return values.gather(1, idxs.expand(-1, -1, *values.shape[2:]))


def decode(deltas: Tensor, anchors: Tensor, box_coder: BoxCoder) -> Tensor:
    """Decode deltas `[..., 4]` as torchvision's `BoxCoder.decode`, without its host-to-device copies."""
    sizes = anchors[..., 2:] - anchors[..., :2]
    x, y, width, height = (d / w for d, w in zip(deltas.unbind(-1), box_coder.weights, strict=True))
    centers = torch.stack([x, y], dim=-1) * sizes + (anchors[..., :2] + 0.5 * sizes)
    halves = 0.5 * (torch.stack([width, height], dim=-1).clamp(max=box_coder.bbox_xform_clip).exp() * sizes)
    return torch.cat([centers - halves, centers + halves], dim=-1)
