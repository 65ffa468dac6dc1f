"""RoIAlign over the levels of a feature pyramid (https://arxiv.org/abs/1703.06870)."""

import torch
import torch.nn.functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import _convert_to_roi_format, _setup_scales


def _sums_rows(features, sampling_ratio):
    """Whether to pool by `_sum_rows`: on a CPU torchvision's operator runs one channel after the other,
    forward 5 and backward 10 times slower; a GPU's is fast, and one sum needs a fixed number of samples.
    """
    return features[0].device.type == "cpu" and sampling_ratio > 0


def pool_levels(features, boxes, levels, scales, **arguments):
    """Pool each box from its level, `[K, C, *output_size]`, with one sync point for all of them.

    Args:
        features, scales: of each level `[B, C, H, W]`, and its locations per pixel.
        boxes: list of `[n, 4]`, one an image, K in all; `levels` holds the index of each one's level.
        arguments: `output_size` (two numbers), `sampling_ratio` and `aligned` of `roi_align`.
    """
    rois = _convert_to_roi_format(boxes)
    if _sums_rows(features, arguments["sampling_ratio"]):
        return _sum_rows(features, rois, levels, scales, arguments)
    if len(features) == 1:
        return roi_align(features[0], rois, spatial_scale=scales[0], **arguments)
    every = torch.arange(len(features), device=levels.device)
    counts = (levels[:, None] == every).sum(dim=0).tolist()  # sync point
    rows = levels.argsort(stable=True).split(counts)
    parts = zip(features, rows, scales, strict=True)
    pooled = [roi_align(f, rois[r], spatial_scale=scale, **arguments) for f, r, scale in parts]
    result = features[0].new_zeros(len(rois), *pooled[0].shape[1:])
    for r, p in zip(rows, pooled, strict=True):
        result[r] = p.to(result.dtype)
    return result


def _samples(starts, sides, bins, ratio, extent):
    """What RoIAlign reads along one axis: of each bin the locations next to its samples, and their weights.

    Args:
        starts, sides: of the boxes, in locations, `[K]`.
        bins, ratio: bins a box, and samples a bin.
        extent: number of locations there are, `[K]`.

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


def _sum_rows(features, rois, levels, scales, arguments):
    """RoIAlign as a weighted sum of locations, each a row of C numbers; float32 also under autocast."""
    bins, ratio, aligned = arguments["output_size"], arguments["sampling_ratio"], arguments.get("aligned")
    rows = torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in features]).float()
    # A box that is not a number has no level.
    levels = levels.long().clamp(0, len(features) - 1)
    counts = [f[:, 0].numel() for f in features]
    start = torch.tensor([sum(counts[:i]) for i in range(len(counts))])[levels]
    height, width = torch.tensor([f.shape[2:] for f in features])[levels].unbind(1)
    corners = rois[:, 1:] * torch.tensor(scales)[levels, None] - (0.5 if aligned else 0.0)
    sides = corners[:, 2:] - corners[:, :2]
    sides = sides if aligned else sides.clamp(min=1)
    y, y_weights = _samples(corners[:, 1], sides[:, 1], bins[0], ratio, height)
    x, x_weights = _samples(corners[:, 0], sides[:, 0], bins[1], ratio, width)
    y = (start + rois[:, 0].long() * height * width)[:, None, None] + y * width[:, None, None]
    shape = (len(rois) * bins[0] * bins[1], 4 * ratio**2)
    index = (y[:, :, None, :, None] + x[:, None, :, None, :]).int().view(shape)
    weights = (y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]).view(shape)
    pooled = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)
    return pooled.view(len(rois), *bins, rows.shape[1]).movedim(-1, 1).to(features[0].dtype)


class RoIAlign(MultiScaleRoIAlign):
    """torchvision's RoIAlign, with one sync point for all levels."""

    def forward(self, x, boxes, image_shapes):
        """Pool `[n, 4]` boxes per image to `[sum of n, C, *output_size]`."""
        features = [x[name] for name in self.featmap_names if name in x]
        if self.scales is None or self.map_levels is None:
            canonical = (self.canonical_scale, self.canonical_level)
            self.scales, self.map_levels = _setup_scales(features, image_shapes, *canonical)
        arguments = {"output_size": self.output_size, "sampling_ratio": self.sampling_ratio}
        return pool_levels(features, boxes, self.map_levels(boxes), self.scales, **arguments)
