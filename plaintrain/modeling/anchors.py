"""torchvision's generators of anchors, that make those of a size once."""

from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from plaintrain.modeling.matching import AnchorCache


class _Cached:
    """Makes an anchor generator keep its anchors: the first base of a class, torchvision's the second."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._cache = AnchorCache()

    def forward(self, image_list, feature_maps):
        """torchvision's, but all images share one tensor."""
        one = ImageList(image_list.tensors, image_list.image_sizes[:1])
        return [self._cache(super().forward, one, feature_maps)] * len(image_list.image_sizes)


class CachedAnchorGenerator(_Cached, AnchorGenerator):
    """torchvision's `AnchorGenerator`."""


class CachedBoxGenerator(_Cached, DefaultBoxGenerator):
    """torchvision's `DefaultBoxGenerator`, of SSD."""
