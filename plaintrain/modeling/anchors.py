"""Anchors that are made once for a size of images."""

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

# Anchors of this many padded sizes are kept; those of a COCO image take 4 MB.
_MAX_ANCHORS = 8


class AnchorCache:
    """Anchors by the sizes they are made for."""

    def __init__(self):
        self._anchors = {}

    def __call__(self, generate, images, features):
        """The anchors `[N, 4]` that `generate` gives each image of an ImageList, for a list of features."""
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        key = (tuple(images.tensors.shape[-2:]), *sizes, features[0].dtype, features[0].device)
        if key not in self._anchors:
            while len(self._anchors) >= _MAX_ANCHORS:
                del self._anchors[next(iter(self._anchors))]
            one = ImageList(images.tensors, images.image_sizes[:1])
            # Training may follow an evaluation in inference mode, whose tensors it could not use.
            with torch.inference_mode(False), torch.no_grad():
                self._anchors[key] = generate(one, features)[0]
        return self._anchors[key]


class _Cached:
    """Makes an anchor generator keep its anchors: the first base of a class, torchvision's the second."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._cache = AnchorCache()

    def forward(self, image_list, feature_maps):
        """torchvision's, but all images share one tensor."""
        anchors = self._cache(super().forward, image_list, feature_maps)
        return [anchors] * len(image_list.image_sizes)


class CachedAnchorGenerator(_Cached, AnchorGenerator):
    """torchvision's anchors."""


class CachedBoxGenerator(_Cached, DefaultBoxGenerator):
    """torchvision's default boxes of SSD."""
