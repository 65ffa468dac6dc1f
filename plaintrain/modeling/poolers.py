"""RoIAlign over the levels of a feature pyramid (https://arxiv.org/abs/1703.06870)."""

import math

import torch
import torch.nn.functional as F
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align
from torchvision.ops.poolers import _convert_to_roi_format


def _sums_rows(features, sampling_ratio):
    # On a CPU torchvision's operator runs one channel after the other, forward 5 and backward 10 times
    # slower. One sum needs a fixed number of samples.
    on_cpu = features[0].device.type == "cpu" and not torch.compiler.is_exporting()
    return on_cpu and sampling_ratio > 0


def _to_rois(boxes):
    """Return the rows (image, x0, y0, x1, y1) of a list of `[n, 4]`, one an image, or of `[B, P, 4]`."""
    if not isinstance(boxes, torch.Tensor):
        return _convert_to_roi_format(boxes)
    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([image[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2).flatten(0, 1)


def _samples(starts, sides, bins, ratio, extent):
    """What RoIAlign reads along one axis: of each bin the locations next to its samples, and their weights.

    Args:
        starts, sides, extent: of the boxes, in locations, and how many locations there are, `[K]`.
        bins, ratio: bins a box, and samples a bin.

    Returns:
        int64 in 0..extent - 1 and float32 in 0..1, both `[K, bins, 2 * ratio]`.
    """
    step, extent = (sides / bins)[:, None, None], extent[:, None, None]
    # In the order of torchvision's operator: the same rounding.
    at = (
        starts[:, None, None]
        + torch.arange(bins)[:, None] * step
        + (torch.arange(ratio) + 0.5) * step / ratio
    )
    # Up to one location outside counts as the edge, what is further off as 0.
    inside = (at >= -1) & (at <= extent)
    at = torch.minimum(at.clamp(min=0), extent - 1).masked_fill(~inside, 0)
    low = at.floor()
    weights = torch.stack([1 - (at - low), at - low], dim=-1) * inside[..., None] / ratio
    places = torch.stack([low, torch.minimum(low + 1, extent - 1)], dim=-1).long()
    return places.flatten(2), weights.flatten(2)


class RoIAlign(MultiScaleRoIAlign):
    """RoIAlign of each box on the level of its size, with one device sync for all levels.

    Nothing is inferred from a batch: `scales`, locations per pixel, are those of the backbone's strides.
    """

    def __init__(self, featmap_names, output_size, sampling_ratio, strides, *, aligned=False):
        """
        Args:
            featmap_names, output_size, sampling_ratio: see torchvision's.
            strides: pixels per location, a power of 2 for each feature map.
            aligned: sample and choose levels as Detectron2's ROIAlignV2; otherwise as torchvision.
        """
        super().__init__(featmap_names, output_size, sampling_ratio)
        self.scales, self.aligned = [1 / stride for stride in strides], aligned

    def forward(self, x, boxes, image_shapes=None):
        """Pool a list of boxes `[n, 4]`, one an image, or `[B, P, 4]`, to `[K, C, *output_size]`."""
        rois, features = _to_rois(boxes), [x[name] for name in self.featmap_names]
        # A box that is not a number has no level.
        levels = self.levels(rois[:, 1:]).long().clamp(0, len(features) - 1)
        if _sums_rows(features, self.sampling_ratio):
            return self._sum_rows(features, rois, levels)
        arguments = self.sampling_ratio, self.aligned
        if len(features) == 1:
            return roi_align(features[0], rois, self.output_size, self.scales[0], *arguments)
        if torch.compiler.is_exporting():
            rows = [(levels == i).nonzero()[:, 0] for i in range(len(features))]
        else:
            every = torch.arange(len(features), device=levels.device)
            counts = (levels[:, None] == every).sum(dim=0).tolist()  # device sync
            rows = levels.argsort(stable=True).split(counts)
        parts = zip(features, rows, self.scales, strict=True)
        pooled = [roi_align(f, rois[r], self.output_size, scale, *arguments) for f, r, scale in parts]
        # Not `len`, which fixes the size that torch.export sees.
        result = features[0].new_zeros(rois.shape[0], *pooled[0].shape[1:])
        for r, p in zip(rows, pooled, strict=True):
            result[r] = p.to(result.dtype)
        return result

    def _sum_rows(self, features, rois, levels):
        """RoIAlign as a weighted sum of locations, each a row of C numbers; float32 also under autocast."""
        bins, ratio = self.output_size, self.sampling_ratio
        rows = torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in features]).float()
        counts = [f[:, 0].numel() for f in features]
        start = torch.tensor([sum(counts[:i]) for i in range(len(counts))])[levels]
        height, width = torch.tensor([f.shape[2:] for f in features])[levels].unbind(1)
        corners = rois[:, 1:] * torch.tensor(self.scales)[levels, None] - (0.5 if self.aligned else 0.0)
        sides = corners[:, 2:] - corners[:, :2]
        sides = sides if self.aligned else sides.clamp(min=1)
        y, y_weights = _samples(corners[:, 1], sides[:, 1], bins[0], ratio, height)
        x, x_weights = _samples(corners[:, 0], sides[:, 0], bins[1], ratio, width)
        y = (start + rois[:, 0].long() * height * width)[:, None, None] + y * width[:, None, None]
        shape = (len(rois) * bins[0] * bins[1], 4 * ratio**2)
        index = (y[:, :, None, :, None] + x[:, None, :, None, :]).int().view(shape)
        weights = (y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]).view(shape)
        pooled = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)
        return pooled.view(len(rois), *bins, rows.shape[1]).movedim(-1, 1).to(features[0].dtype)

    def levels(self, boxes):
        """Return the index of each box's feature map, a float tensor, of boxes `[K, 4]`."""
        first, last = (-math.log2(scale) for scale in (self.scales[0], self.scales[-1]))
        relative = box_area(boxes).sqrt() / self.canonical_scale
        if self.aligned:
            levels = self.canonical_level + torch.log2(relative + 1e-8)
            last = first + len(self.scales) - 1
        else:
            levels = self.canonical_level + torch.log2(relative) + 1e-6
        return torch.floor(levels).clamp(first, last) - first
