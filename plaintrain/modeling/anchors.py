"""torchvision's generators of anchors, that make those of a size once."""

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

# What is made for this many padded sizes is kept; the anchors of a COCO image take 4 MB.
_MAX_SIZES = 8


class SizeCache:
    """Keeps what a function makes of nothing but the sizes of the images and of their features."""

    def __init__(self):
        self._made = {}

    def __call__(self, make, images, features):
        """`make(images, features)`, of an ImageList and a list of features `[B, C, H, W]`."""
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        key = (tuple(images.tensors.shape[-2:]), *sizes, features[0].dtype, features[0].device)
        if key not in self._made:
            while len(self._made) >= _MAX_SIZES:
                del self._made[next(iter(self._made))]
            # Training may follow an evaluation in inference mode, whose tensors it could not use.
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = make(images, features)
        return self._made[key]

    def __getstate__(self):
        # Copies and files begin with nothing.
        return {"_made": {}}


class _Cached:
    """Makes an anchor generator keep its anchors: the first base of a class, torchvision's the second."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._cache = SizeCache()

    def forward(self, image_list, feature_maps):
        """torchvision's, but all images share one tensor."""
        one = ImageList(image_list.tensors, image_list.image_sizes[:1])
        return self._cache(super().forward, one, feature_maps) * len(image_list.image_sizes)


class CachedAnchorGenerator(_Cached, AnchorGenerator):
    """torchvision's `AnchorGenerator`."""


class CachedBoxGenerator(_Cached, DefaultBoxGenerator):
    """torchvision's `DefaultBoxGenerator`, of SSD."""
