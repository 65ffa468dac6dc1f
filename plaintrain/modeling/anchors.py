"""Anchor generators: torchvision's, with anchors kept by size, and Detectron2's, which are not rounded."""

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

# Types that autocast computes in.
LOW_PRECISION = (torch.float16, torch.bfloat16)
# The anchors of this many padded sizes are kept; the anchors of a COCO image take 4 MB.
_MAX_SIZES = 8


class _Cached:
    """Makes an anchor generator keep its anchors: the first base of a class, torchvision's the second."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._anchors = {}

    def forward(self, image_list, feature_maps):
        """torchvision's, but all images share one tensor; in float32 also under autocast."""
        one = ImageList(image_list.tensors, image_list.image_sizes[:1])
        # torchvision reads shape, type and device only; an expanded scalar has them and no memory.
        maps = [
            torch.empty((), device=f.device).expand(f.shape) if f.dtype in LOW_PRECISION else f
            for f in feature_maps
        ]
        number = len(image_list.image_sizes)
        if torch.compiler.is_exporting():
            return super().forward(one, maps) * number
        sizes = [feature.shape[-2:] for feature in maps]
        key = (image_list.tensors.shape[-2:], *sizes, maps[0].dtype, maps[0].device)
        if key not in self._anchors:
            while len(self._anchors) >= _MAX_SIZES:
                del self._anchors[next(iter(self._anchors))]
            # Training may follow an evaluation in inference mode, whose tensors it could not use.
            with torch.inference_mode(False), torch.no_grad():
                self._anchors[key] = super().forward(one, maps)
        return self._anchors[key] * number

    def __getstate__(self):
        # Copies and files begin with nothing.
        return {**super().__getstate__(), "_anchors": {}}


class CachedAnchorGenerator(_Cached, AnchorGenerator):
    """torchvision's `AnchorGenerator`."""


class CachedBoxGenerator(_Cached, DefaultBoxGenerator):
    """torchvision's `DefaultBoxGenerator`, of SSD."""


class DefaultAnchorGenerator(CachedAnchorGenerator):
    """Anchors centred on multiples of the stride, not rounded to whole pixels.

    The order within a location is torchvision's: for each ratio every size.
    """

    def __init__(self, sizes, aspect_ratios, strides, offset=0.0):
        """`strides` are pixels between two locations, one number a level; `offset` is of the first centre, in
        strides, in 0..1.
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
        levels = super().grid_anchors(grid_sizes, [(stride, stride) for stride in self.strides])
        return [level + self.offset * stride for level, stride in zip(levels, self.strides, strict=True)]
