"""Detectron2's anchors, which are not rounded.

With these, and the aligned RoIAlign, weights trained by Detectron2 give the boxes that they give there.
"""

import torch

from plaintrain.modeling.anchors import CachedAnchorGenerator


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
