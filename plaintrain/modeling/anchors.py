"""Anchor generators: torchvision's with a cache, and Detectron2's, which does not round."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.types import Device
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

_Floats = Sequence[float]
_FloatsPerLevel = Sequence[_Floats]
# The dtypes of autocast.
LOW_PRECISION = (torch.float16, torch.bfloat16)
# Number of padded image sizes in the cache; the anchors of a COCO image take 4 MB.
_CACHE_SIZE = 8


class _AnchorCache:
    """Mixin that caches the anchors of a torchvision generator by padded image size."""

    def __init__(self, *args):
        super().__init__(*args)
        self._anchors = {}

    def forward(self, image_list, feature_maps):
        """Return the anchors of each image, one tensor for all; float32 also under autocast."""
        first_image = ImageList(image_list.tensors, image_list.image_sizes[:1])
        # torchvision reads shape, dtype and device only; an expanded scalar takes no memory.
        maps = [
            torch.empty((), device=f.device).expand(f.shape) if f.dtype in LOW_PRECISION else f
            for f in feature_maps
        ]
        num_images = len(image_list.image_sizes)
        if torch.compiler.is_exporting():
            return super().forward(first_image, maps) * num_images
        sizes = [feature.shape[-2:] for feature in maps]
        key = (image_list.tensors.shape[-2:], *sizes, maps[0].dtype, maps[0].device)
        if key not in self._anchors:
            while len(self._anchors) >= _CACHE_SIZE:
                del self._anchors[next(iter(self._anchors))]
            # Training cannot use the inference tensors of an evaluation that precedes it.
            with torch.inference_mode(False), torch.no_grad():
                self._anchors[key] = super().forward(first_image, maps)
        return self._anchors[key] * num_images

    def __getstate__(self):
        # Copies and pickles start with an empty cache.
        return {**super().__getstate__(), "_anchors": {}}


class CachedAnchorGenerator(_AnchorCache, AnchorGenerator):
    """torchvision's `AnchorGenerator` with a cache."""


class CachedBoxGenerator(_AnchorCache, DefaultBoxGenerator):
    """torchvision's `DefaultBoxGenerator`, of SSD, with a cache."""


class DefaultAnchorGenerator(CachedAnchorGenerator):
    """Detectron2's anchors: centered on multiples of the stride, not rounded to whole pixels.

    The order within a location is torchvision's: for each aspect ratio every size.
    """

    def __init__(
        self, sizes: _FloatsPerLevel, aspect_ratios: _FloatsPerLevel, strides: list[int], offset: float = 0.0
    ):
        """Initialize; `offset` shifts the centers by 0..1 strides."""
        super().__init__(sizes, aspect_ratios)
        self.strides = strides
        self.offset = offset

    def generate_anchors(
        self,
        scales: _Floats,
        aspect_ratios: _Floats,
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Tensor:
        """Return the anchors around (0, 0), `[A, 4]`, XYXY."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half = torch.stack([sizes / roots[:, None], sizes * roots[:, None]], dim=-1).view(-1, 2) / 2
        return torch.cat([-half, half], dim=1)

    def grid_anchors(self, grid_sizes: list[torch.Size], strides: list[list[Tensor]]) -> list[Tensor]:
        """Return the anchors of each level, `[H * W * A, 4]`; ignores torchvision's rounded `strides`."""
        levels = super().grid_anchors(grid_sizes, [(stride, stride) for stride in self.strides])
        return [level + self.offset * stride for level, stride in zip(levels, self.strides, strict=True)]
