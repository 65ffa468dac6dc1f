"""The tensors of one image, moved together.

A dict of `image` (`tv_tensors.Image`, uint8 `[3, H, W]`) and in training `boxes`
(`BoundingBoxes`, XYXY, float32 `[N, 4]`), `labels` (int64 `[N]`), where they are used `masks`
(`Mask`, uint8 `[N, H, W]`), and `keypoints` (`KeyPoints`, float32 `[N, Kp, 2]`) with their
`visibility` (int64 `[N, Kp]`: 0 unlabelled, 1 hidden, 2 seen). Coordinates are continuous: a
pixel's centre is at +0.5. No function changes what it is given.
"""

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode

from plaintrain.utils.errors import UserError

# Boxes whose width or height falls below this many pixels have vanished.
MIN_SIDE = 1e-5
ROWS = ("boxes", "labels", "masks", "keypoints", "visibility")


def get_image_size(tensors):
    """(height, width) in pixels."""
    return tuple(tensors["image"].shape[-2:])


def unwrap_image(tensors):
    """The image as a plain tensor, `[3, H, W]` in memory too."""
    # NumPy takes colours apart in half of PyTorch's time.
    return torch.from_numpy(np.ascontiguousarray(tensors["image"].as_subclass(torch.Tensor).numpy()))


def _move(tensors, function):
    """Apply a function to all that has a place in the image."""
    return {k: function(v) if isinstance(v, tv_tensors.TVTensor) else v for k, v in tensors.items()}


def _index(value, index):
    picked = value.as_subclass(torch.Tensor)[index]
    return tv_tensors.wrap(picked, like=value) if isinstance(value, tv_tensors.TVTensor) else picked


def select_instances(tensors, keep):
    """The instances that `keep`, bool `[N]`, says."""
    if keep.all():
        return tensors
    return {name: _index(value, keep) if name in ROWS else value for name, value in tensors.items()}


def resize(tensors, size):
    """Scale to `size`, (height, width): the image bilinear, masks to the nearest pixel."""
    size = list(size)
    if size == list(get_image_size(tensors)):
        return tensors

    def resized(value):
        if isinstance(value, tv_tensors.Mask):
            # Plain nearest looks up to a pixel beside where the image is sampled.
            mode = InterpolationMode.NEAREST_EXACT
            return tv_tensors.Mask(F.resize_image(value.as_subclass(torch.Tensor), size, interpolation=mode))
        return F.resize(value, size)

    return _move(tensors, resized)


def _flip(tensors, axis):
    def flipped(value):
        if isinstance(value, tv_tensors.KeyPoints):
            # torchvision mirrors indices of pixels, to W - 1 - x; these are continuous.
            points = value.as_subclass(torch.Tensor).clone()
            points[..., axis] = value.canvas_size[1 - axis] - points[..., axis]
            return tv_tensors.wrap(points, like=value)
        return F.vertical_flip(value) if axis else F.horizontal_flip(value)

    return _move(tensors, flipped)


def horizontal_flip(tensors, keypoint_flip_indices=None):
    """Mirror left and right.

    Args:
        keypoint_flip_indices: for each keypoint the one that takes its place, a permutation of
            0 to Kp-1; needed where there are keypoints.
    """
    flipped = _flip(tensors, 0)
    if "keypoints" in tensors:
        if keypoint_flip_indices is None:
            raise UserError("a horizontal flip of keypoints needs to know keypoint_flip_indices")
        for name in ("keypoints", "visibility"):
            flipped[name] = _index(flipped[name], (slice(None), list(keypoint_flip_indices)))
    return flipped


def vertical_flip(tensors):
    """Mirror top and bottom; keypoints keep their order, as left stays left."""
    return _flip(tensors, 1)


def pad(tensors, padding, fill=0):
    """Add pixels of the colour `fill` around; `padding` is (left, top, right, bottom)."""

    def padded(value):
        return F.pad(value, list(padding), fill=fill if isinstance(value, tv_tensors.Image) else 0)

    return _move(tensors, padded)


def crop(tensors, top, left, height, width):
    """Cut out a window.

    Instances of which no box or no mask is left are removed, keypoints outside become unlabelled.
    Where there are masks, a box that the window cuts becomes the box around what is left of its
    mask, as in Detectron2; without them it is clipped.
    """
    cropped = _move(tensors, lambda value: F.crop(value, top, left, height, width))
    if "boxes" not in tensors:
        return cropped
    shift = torch.tensor([left, top, left, top])
    moved = tensors["boxes"].as_subclass(torch.Tensor) - shift
    cut = (moved != cropped["boxes"].as_subclass(torch.Tensor)).any(dim=1)
    keep = has_extent(cropped)
    return tighten_boxes(select_instances(clear_outside_keypoints(cropped), keep), cut[keep])


def has_extent(tensors):
    """bool `[N]`: instances whose box has an area and whose mask, if any, has a pixel."""
    boxes = tensors["boxes"].as_subclass(torch.Tensor)
    keep = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE).all(dim=1)
    if "masks" in tensors:
        keep &= tensors["masks"].as_subclass(torch.Tensor).flatten(1).any(dim=1).bool()
    return keep


def clear_outside_keypoints(tensors):
    """Make keypoints outside the image unlabelled."""
    if "keypoints" not in tensors:
        return tensors
    points = tensors["keypoints"].as_subclass(torch.Tensor)
    height, width = get_image_size(tensors)
    inside = ((points >= 0) & (points <= torch.tensor([width, height]))).all(dim=2)
    return {**tensors, "visibility": tensors["visibility"] * inside}


def tighten_boxes(tensors, which):
    """Give the instances that `which`, bool `[N]`, says the boxes around their (non-empty) masks."""
    if "masks" not in tensors or not which.any():
        return tensors
    boxes = tensors["boxes"].as_subclass(torch.Tensor).clone()
    # masks_to_boxes names the last pixel, which reaches one further.
    boxes[which] = masks_to_boxes(tensors["masks"].as_subclass(torch.Tensor)[which]) + boxes.new_tensor(
        [0, 0, 1, 1]
    )
    return {**tensors, "boxes": tv_tensors.wrap(boxes, like=tensors["boxes"])}
