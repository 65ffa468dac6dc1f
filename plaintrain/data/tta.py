"""Test-time augmentation: one image as several views, at several sizes and mirrored."""

from dataclasses import dataclass

from torchvision import tv_tensors

from plaintrain.data.images import check_image_size, get_pixel_range, read_image
from plaintrain.data.keypoints import dataset_flip_indices
from plaintrain.data.transforms.arguments import CheckedArguments, argument
from plaintrain.data.transforms.geometric import shortest_edge_size
from plaintrain.data.transforms.tensors import horizontal_flip, image_size, plain_image, resize
from plaintrain.utils.errors import UserError

# Argument -> the key that it comes from.
_KEYS = {
    "min_sizes": "TEST.AUG.MIN_SIZES",
    "max_size": "TEST.AUG.MAX_SIZE",
    "fixed_size": "INPUT.FIXED_SIZE",
}


@dataclass(frozen=True)
class TTAMapper(CheckedArguments):
    """A callable from (record, generator) to the sample that `DetectorWithTTA` takes.

    A sample holds `image_id`, `file_name`, the original `height` and `width`, and `views`, one for
    each of `min_sizes`, with `flip` followed by its mirror image. A view is a dict of `image` (uint8
    `[3, h, w]`, RGB), `flipped`, and `keypoint_flip_indices` (None if it is not flipped). The sample
    itself has no `image`: a model that does not know views fails, instead of seeing one of them.

    Attributes:
        min_sizes: shorter sides in pixels; 0 takes the image, or `fixed_size`, as it is.
        max_size: largest length of the longer side, pixels; does not bound the size 0.
        flip: mirror each size, left and right, too.
        fixed_size: (height, width) of the shape that images are brought to, or None to keep theirs.
        keypoint_flip_indices: for each keypoint the one that takes its place in a mirror image;
            needed where the model finds keypoints and `flip` is on.
        pixel_range: see `read_image`.
    """

    min_sizes: tuple = argument(0, count=0, whole=True)
    max_size: int = argument(1, whole=True)
    flip: bool = True
    fixed_size: tuple | None = argument(1, count=2, whole=True, default=None, other=None)
    keypoint_flip_indices: tuple | None = None
    pixel_range: tuple = ()
    thread_safe = True

    def __call__(self, record, rng=None):
        """Make the sample; nothing is drawn from `rng`.

        Raises:
            UserError: an unreadable image, or one that is not of its record's size.
        """
        image = read_image(record["file_name"], self.pixel_range)
        check_image_size(record, image)
        sample = {key: record[key] for key in ("image_id", "file_name", "height", "width")}
        return {**sample, "views": self.views(image)}

    def views(self, image):
        """The views of an image, uint8 `[3, H, W]`."""
        tensors, views = {"image": tv_tensors.Image(image)}, []
        for min_size in self.min_sizes:
            resized = resize(tensors, self._view_size(image_size(tensors), min_size))
            views.append(_view(resized, False, None))
            if self.flip:
                views.append(_view(horizontal_flip(resized), True, self.keypoint_flip_indices))
        return views

    def _view_size(self, size, min_size):
        size = self.fixed_size or size
        return shortest_edge_size(*size, min_size, self.max_size) if min_size else size


def _view(tensors, flipped, keypoint_flip_indices):
    return {"image": plain_image(tensors), "flipped": flipped, "keypoint_flip_indices": keypoint_flip_indices}


def build_tta_mapper(cfg, dataset_name):
    """`TTAMapper` from TEST.AUG and INPUT.FIXED_SIZE, for images of a dataset.

    Raises:
        UserError: no sizes, or sizes that an image cannot have; keypoints, with TEST.AUG.FLIP, that
            the dataset does not name or that are not as many as the model's.
    """
    aug, order = cfg.TEST.AUG, None
    fixed_size = None if tuple(cfg.INPUT.FIXED_SIZE) == (0, 0) else cfg.INPUT.FIXED_SIZE
    if cfg.MODEL.KEYPOINT_ON and aug.FLIP:
        order = dataset_flip_indices([dataset_name], cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
    pixel_range = get_pixel_range(cfg)
    try:
        return TTAMapper(aug.MIN_SIZES, aug.MAX_SIZE, aug.FLIP, fixed_size, order, pixel_range)
    except UserError as e:
        argument, _, wrong = str(e).partition(" ")
        raise UserError(f"{_KEYS[argument]} {wrong}") from e
