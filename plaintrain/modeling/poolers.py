"""RoIAlign over the levels of a feature pyramid (https://arxiv.org/abs/1703.06870)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align
from torchvision.ops.poolers import _convert_to_roi_format

# Argument types of torchvision's heads.
Features = dict[str, Tensor]
Targets = list[dict[str, Tensor]]
# [n, 4] per image, or [B, P, 4].
Boxes = list[Tensor] | Tensor


def _uses_embedding_bag(features, sampling_ratio):
    # torchvision's CPU operator loops over channels: 5 times slower forward, 10 times backward. An
    # embedding bag needs a fixed number of samples.
    on_cpu = features[0].device.type == "cpu" and not torch.compiler.is_exporting()
    return on_cpu and sampling_ratio > 0


def _convert_to_rois(boxes):
    """Convert boxes to rows (batch index, x0, y0, x1, y1)."""
    if not isinstance(boxes, Tensor):
        return _convert_to_roi_format(boxes)
    batch_idxs = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([batch_idxs[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2).flatten(0, 1)


def _compute_samples(starts, sides, num_bins, ratio, extent):
    """Return the locations next to each bin's samples along one axis, and weights, `[K, bins, 2 * ratio]`.

    Boxes (starts, sides) and feature maps (extent) are in locations, `[K]`; `ratio` is samples per bin.
    """
    step = (sides / num_bins)[:, None, None]
    extent = extent[:, None, None]
    # The order of torchvision's operator gives the same rounding.
    samples = (
        starts[:, None, None]
        + torch.arange(num_bins)[:, None] * step
        + (torch.arange(ratio) + 0.5) * step / ratio
    )
    # Samples up to one location outside are clamped to the edge, others count as 0.
    inside = (samples >= -1) & (samples <= extent)
    samples = torch.minimum(samples.clamp(min=0), extent - 1).masked_fill(~inside, 0)
    low = samples.floor()
    weights = torch.stack([1 - (samples - low), samples - low], dim=-1) * inside[..., None] / ratio
    locations = torch.stack([low, torch.minimum(low + 1, extent - 1)], dim=-1).long()
    return locations.flatten(2), weights.flatten(2)


class RoIAlign(MultiScaleRoIAlign):
    """RoIAlign of each box on the level of its size, with one device sync for all levels."""

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | tuple[int, int],
        sampling_ratio: int,
        strides: list[int],
        *,
        aligned: bool = False,
    ):
        """Initialize; `aligned` samples and assigns levels as Detectron2's ROIAlignV2."""
        super().__init__(featmap_names, output_size, sampling_ratio)
        self.scales = [1 / stride for stride in strides]
        self.aligned = aligned

    def forward(self, x: Features, boxes: Boxes, image_shapes: object = None) -> Tensor:
        """Pool boxes to `[K, C, *output_size]`."""
        rois = _convert_to_rois(boxes)
        features = [x[name] for name in self.featmap_names]
        # NaN boxes have no level.
        levels = self.assign_levels(rois[:, 1:]).long().clamp(0, len(features) - 1)
        if _uses_embedding_bag(features, self.sampling_ratio):
            return self._pool_by_embedding_bag(features, rois, levels)
        settings = self.sampling_ratio, self.aligned
        if len(features) == 1:
            return roi_align(features[0], rois, self.output_size, self.scales[0], *settings)
        if torch.compiler.is_exporting():
            idxs_per_level = [(levels == i).nonzero()[:, 0] for i in range(len(features))]
        else:
            level_range = torch.arange(len(features), device=levels.device)
            counts = (levels[:, None] == level_range).sum(dim=0).tolist()  # device sync
            idxs_per_level = levels.argsort(stable=True).split(counts)
        pooled = [
            roi_align(feature, rois[idxs], self.output_size, scale, *settings)
            for feature, idxs, scale in zip(features, idxs_per_level, self.scales, strict=True)
        ]
        # torch.export would specialize `len`.
        result = features[0].new_zeros(rois.shape[0], *pooled[0].shape[1:])
        for idxs, values in zip(idxs_per_level, pooled, strict=True):
            result[idxs] = values.to(result.dtype)
        return result

    def _pool_by_embedding_bag(self, features, rois, levels):
        """Compute RoIAlign as a weighted sum of locations, in float32 also under autocast."""
        num_bins = self.output_size
        ratio = self.sampling_ratio
        locations = torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in features]).float()
        counts = [f[:, 0].numel() for f in features]
        start = torch.tensor([sum(counts[:i]) for i in range(len(counts))])[levels]
        height, width = torch.tensor([f.shape[2:] for f in features])[levels].unbind(1)
        corners = rois[:, 1:] * torch.tensor(self.scales)[levels, None] - (0.5 if self.aligned else 0.0)
        sides = corners[:, 2:] - corners[:, :2]
        sides = sides if self.aligned else sides.clamp(min=1)
        y, y_weights = _compute_samples(corners[:, 1], sides[:, 1], num_bins[0], ratio, height)
        x, x_weights = _compute_samples(corners[:, 0], sides[:, 0], num_bins[1], ratio, width)
        y = (start + rois[:, 0].long() * height * width)[:, None, None] + y * width[:, None, None]
        shape = (len(rois) * num_bins[0] * num_bins[1], 4 * ratio**2)
        idxs = (y[:, :, None, :, None] + x[:, None, :, None, :]).int().view(shape)
        weights = (y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]).view(shape)
        pooled = F.embedding_bag(idxs, locations, mode="sum", per_sample_weights=weights)
        return pooled.view(len(rois), *num_bins, locations.shape[1]).movedim(-1, 1).to(features[0].dtype)

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Return the level index of each box of `[K, 4]`, as floats."""
        first, last = (-math.log2(scale) for scale in (self.scales[0], self.scales[-1]))
        relative = box_area(boxes).sqrt() / self.canonical_scale
        if self.aligned:
            levels = self.canonical_level + torch.log2(relative + 1e-8)
            last = first + len(self.scales) - 1
        else:
            levels = self.canonical_level + torch.log2(relative) + 1e-6
        return torch.floor(levels).clamp(first, last) - first
