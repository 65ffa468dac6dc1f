"""Which objects the anchors and proposals of a batch are to learn, in fixed shapes.

What does not count is masked, not left out: a mask as an index is a sync point of a GPU. B is the number
of images, M the largest number of objects in one, N that of candidates. Boxes are XYXY, in pixels.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import SSDMatcher

# Pairs of an object and a candidate compared at once: 64 MB for each number of a pair.
_MAX_PAIRS = 2**24


def pad_targets(targets):
    """boxes `[B, M, 4]` and labels `[B, M]` of a list of targets, M at least 1; padding has label -1."""
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True, padding_value=-1)
    missing = int(boxes.shape[1] == 0)
    return F.pad(boxes, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=-1)


def _pairwise_iou(boxes, others):
    x0, y0, x1, y1 = boxes[:, :, None].unbind(-1)
    # One row of each coordinate is faster to read than every fourth number.
    u0, v0, u1, v1 = others.movedim(-1, 0).contiguous()[:, :, None]
    overlap = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp_(min=0)
    overlap *= (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp_(min=0)
    return overlap / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - overlap)


def assign_in_chunks(assign, boxes, exists, candidates):
    """Call `assign` with the other arguments, see `match`, of so many images at once that memory is bounded;
    join what it returns.
    """
    size = max(1, _MAX_PAIRS // (boxes.shape[1] * candidates.shape[1]))
    given = (boxes, exists, candidates.expand(len(boxes), -1, -1))
    found = [assign(*part) for part in zip(*(part.split(size) for part in given), strict=True)]
    return [torch.cat(part) for part in zip(*found, strict=True)]


@torch.no_grad()
def match_boxes(boxes, exists, candidates, matcher):
    """Give each candidate the object that it overlaps most, as torchvision's `Matcher` does.

    Args:
        boxes, exists: the objects `[B, M, 4]`, and bool `[B, M]`, False for padding.
        candidates: `[B, N, 4]`, or `[1, N, 4]`, the same for all images.
        matcher: the `Matcher` whose thresholds of IoU, 0..1, and `allow_low_quality_matches` count; an
            `SSDMatcher` also gives each object the candidate that overlaps it most.

    Returns:
        The index `[B, N]` of each candidate's object, and bool `[B, N]` twice: whether it matches, and
        whether it is background. An image without objects is all background.
    """

    def assign(boxes, exists, candidates):
        """The same for some of the images."""
        iou = _pairwise_iou(boxes, candidates).masked_fill_(~exists, -1)
        quality, index = iou.max(dim=1)
        matched, background = quality >= matcher.high_threshold, quality < matcher.low_threshold
        if matcher.allow_low_quality_matches:
            matched |= ((iou == iou.amax(dim=2, keepdim=True)) & exists).any(dim=1)
        if isinstance(matcher, SSDMatcher):
            objects = torch.arange(iou.shape[1], device=iou.device)[:, None].where(exists, -1)
            # Of objects with the same best candidate, the last has it.
            given = torch.full_like(index, -1)
            given.scatter_reduce_(1, iou.argmax(dim=2), objects.squeeze(2), "amax")
            matched |= given >= 0
            index = given.where(given >= 0, index)
        return index, matched, background & ~matched

    return assign_in_chunks(assign, boxes, exists[:, :, None], candidates)


@torch.no_grad()
def sample_matches(matched, background, sampler):
    """Draw candidates at random, as many as torchvision's sampler, of which the settings are read.

    How many random numbers are drawn depends on shapes alone.

    Returns:
        The indices `[B, S]`, matches first; and bool `[B, S]`, False where there were too few.
    """
    number, size = sampler.batch_size_per_image, matched.shape[1]
    keys = torch.rand(matched.shape, device=matched.device)
    most = min(int(number * sampler.positive_fraction), size)
    first = keys.masked_fill(~matched, -1).topk(most, dim=1).indices
    matched = torch.zeros_like(matched).scatter_(1, first, True) & matched
    keys = (keys + 2 * matched).masked_fill_(~(matched | background), -1)
    keys, index = keys.topk(min(number, size), dim=1)
    return index, keys >= 0


def gather_rows(values, index):
    """The rows `[B, S, ...]` of `[B, N, ...]` that indices `[B, S]` name."""
    # Not `take_along_dim`, which fixes the sizes that it sees while torch.export traces it.
    index = index.view(*index.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def decode(deltas, anchors, coder):
    """torchvision's `BoxCoder.decode` for `[..., 4]`, without its uploads."""
    units = anchors[..., 2:] - anchors[..., :2]
    x, y, width, height = (part / w for part, w in zip(deltas.unbind(-1), coder.weights, strict=True))
    centres = torch.stack([x, y], dim=-1) * units + (anchors[..., :2] + 0.5 * units)
    halves = 0.5 * (torch.stack([width, height], dim=-1).clamp(max=coder.bbox_xform_clip).exp() * units)
    return torch.cat([centres - halves, centres + halves], dim=-1)
