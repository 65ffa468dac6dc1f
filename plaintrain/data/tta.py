"""Test-time augmentation: one image as several views, at several sizes and mirrored."""

import numpy as np
from torchvision import tv_tensors

from plaintrain.data.dataset_mapper import SAMPLE_KEYS, DatasetMapper
from plaintrain.data.keypoints import create_keypoint_hflip_indices
from plaintrain.data.transforms.arguments import Numbers
from plaintrain.data.transforms.geometric import Resize, ResizeShortestEdge, get_shortest_edge_size
from plaintrain.data.transforms.tensors import horizontal_flip, unwrap_image


class TTAMapper(DatasetMapper):
    """A callable from (record, generator) to the sample that `DetectorWithTTA` takes.

    A sample holds `image_id`, `file_name`, the original `height` and `width`, and `views`, one for
    each of `resizes`, with `flip` followed by its mirror image. A view is a dict of `image` (uint8
    `[3, h, w]`, RGB), `flipped`, and `keypoint_flip_indices` (None if it is not flipped). The sample
    itself has no `image`: a model that does not know views fails, instead of seeing one of them.
    """

    def __init__(self, cfg, resizes, flip=True, keypoint_flip_indices=None):
        """
        Args:
            cfg: config whose INPUT.PIXEL_RANGE says how images are read.
            resizes: an augmentation for each size, or None for the image as it is.
            flip: mirror each size, left and right, too.
            keypoint_flip_indices: for each keypoint the one that takes its place in a mirror image;
                needed where the model finds keypoints and `flip` is on.
        """
        super().__init__(cfg, is_train=False, augmentations=[])
        self.resizes, self.flip, self.keypoint_flip_indices = resizes, flip, keypoint_flip_indices

    def __call__(self, record, rng=None):
        """Make the sample; nothing is drawn from `rng`."""
        image = self._read(record)["image"]
        return {**{key: record[key] for key in SAMPLE_KEYS}, "views": self.views(image)}

    def views(self, image):
        """Return the views of an image, uint8 `[3, H, W]`."""
        tensors, views = {"image": tv_tensors.Image(image)}, []
        # There is only one size to draw.
        rng = np.random.default_rng(0)
        for resize in self.resizes:
            resized = resize(tensors, rng) if resize else tensors
            views.append({"image": unwrap_image(resized), "flipped": False, "keypoint_flip_indices": None})
            if self.flip:
                image = unwrap_image(horizontal_flip(resized))
                order = self.keypoint_flip_indices
                views.append({"image": image, "flipped": True, "keypoint_flip_indices": order})
        return views


def build_tta_mapper(cfg, dataset_name):
    """Build the `TTAMapper` of TEST.AUG and INPUT.FIXED_SIZE, for images of a dataset."""
    aug, fixed_size, order = cfg.TEST.AUG, tuple(cfg.INPUT.FIXED_SIZE), None
    min_sizes = Numbers(0, whole=True, count=0).check("TEST.AUG.MIN_SIZES", aug.MIN_SIZES)
    max_size = Numbers(1, whole=True).check("TEST.AUG.MAX_SIZE", aug.MAX_SIZE)
    if fixed_size == (0, 0):
        resizes = [ResizeShortestEdge((size,), max_size) if size else None for size in min_sizes]
    else:
        Numbers(1, whole=True, count=2).check("INPUT.FIXED_SIZE", fixed_size)
        sizes = [get_shortest_edge_size(*fixed_size, s, max_size) if s else fixed_size for s in min_sizes]
        resizes = [Resize(size) for size in sizes]
    if cfg.MODEL.KEYPOINT_ON and aug.FLIP:
        order = create_keypoint_hflip_indices([dataset_name], cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
    return TTAMapper(cfg, resizes, aug.FLIP, order)
