"""Detectron2's arithmetic where torchvision's differs: anchors that are not rounded, aligned RoIAlign.

With these, weights trained by Detectron2 give the boxes that they give there.
"""

import torch
from torchvision.ops import MultiScaleRoIAlign

from plaintrain.modeling.anchors import CachedAnchorGenerator
from plaintrain.modeling.pooling import pool_levels

# A box of this side belongs to level 4, of stride 16 (FPN paper, equation 1).
_CANONICAL_SIDE, _CANONICAL_LEVEL = 224, 4


class DefaultAnchorGenerator(CachedAnchorGenerator):
    """Anchors centred on multiples of the stride, not rounded to whole pixels.

    The order within a location is torchvision's: for each ratio every size.
    """

    def __init__(self, sizes, aspect_ratios, strides, offset=0.0):
        """
        Args:
            sizes, aspect_ratios: a tuple of numbers per level, see `AnchorGenerator`.
            strides: pixels between two locations, one number a level.
            offset: of the first centre, in strides, in 0..1.
        """
        super().__init__(sizes, aspect_ratios)
        self.strides, self.offset = list(strides), offset

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu"):
        """Anchors around (0, 0), `[A, 4]`, XYXY."""
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half = torch.stack([scales / roots[:, None], scales * roots[:, None]], dim=-1).view(-1, 2) / 2
        return torch.cat([-half, half], dim=1)

    def grid_anchors(self, grid_sizes, strides):
        """The anchors of each level, `[H * W * A, 4]`; the strides that torchvision finds do not matter."""
        levels = []
        for cell, stride, sides in zip(self.cell_anchors, self.strides, grid_sizes, strict=True):
            y, x = (
                (torch.arange(side, dtype=cell.dtype, device=cell.device) + self.offset) * stride
                for side in sides
            )
            y, x = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
            levels.append((centres + cell).view(-1, 4))
        return levels


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign whose samples lie at pixel centres (`aligned=True`), on the level of the box's size."""

    def __init__(self, featmap_names, output_size, sampling_ratio, strides):
        """
        Args:
            featmap_names: the feature maps to pool from, finest first.
            output_size: bins per side.
            sampling_ratio: samples per bin and side; 0 takes as many as the bin has pixels.
            strides: pixels per location, one number a feature map.
        """
        super().__init__(featmap_names, output_size, sampling_ratio)
        self.strides = list(strides)

    def forward(self, x, boxes, image_shapes):
        """Pool `[N, 4]` boxes per image to `[sum of N, C, output_size, output_size]`."""
        features = [x[name] for name in self.featmap_names]
        arguments = {"output_size": self.output_size, "sampling_ratio": self.sampling_ratio, "aligned": True}
        return pool_levels(features, boxes, self.levels(boxes), [1 / s for s in self.strides], **arguments)

    def levels(self, boxes):
        """The number of each box's feature map, a float tensor, of a list of `[N, 4]`."""
        first = self.strides[0].bit_length() - 1
        sides = torch.cat([(b[:, 2:] - b[:, :2]).prod(dim=1) for b in boxes]).sqrt()
        levels = torch.floor(_CANONICAL_LEVEL + torch.log2(sides / _CANONICAL_SIDE + 1e-8)) - first
        return levels.clamp(0, len(self.featmap_names) - 1)
