"""Out-of-place geometric operations on an image and its targets.

`Tensors` are a dict of `image` (`tv_tensors.Image`, uint8 `[3, H, W]`) and in training `boxes`
(`BoundingBoxes`, XYXY, float32 `[N, 4]`), `labels` (int64 `[N]`), optional `masks` (`Mask`, uint8
`[N, H, W]`) and `keypoints` (`KeyPoints`, float32 `[N, Kp, 2]`) with `visibility` (int64 `[N, Kp]`: 0
unlabelled, 1 hidden, 2 visible). Coordinates are continuous: pixel centres are at +0.5.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode

from plaintrain.utils.errors import UserError

Tensors = dict[str, Tensor]
# Boxes with a smaller width or height, in pixels, are empty.
MIN_SIDE = 1e-5
INSTANCE_KEYS = ("boxes", "labels", "masks", "keypoints", "visibility")


def get_image_size(tensors: Tensors) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    height, width = tensors["image"].shape[-2:]
    return height, width


def unwrap_image(tensors: Tensors) -> Tensor:
    """Return the image as a plain, contiguous tensor."""
    # NumPy is twice as fast as `Tensor.contiguous`.
    return torch.from_numpy(np.ascontiguousarray(tensors["image"].as_subclass(Tensor).numpy()))


def _map_tv_tensors(tensors: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
    return {k: function(v) if isinstance(v, tv_tensors.TVTensor) else v for k, v in tensors.items()}


def _index(value, index):
    selected = value.as_subclass(Tensor)[index]
    return tv_tensors.wrap(selected, like=value) if isinstance(value, tv_tensors.TVTensor) else selected


def select_instances(tensors: Tensors, keep: Tensor) -> Tensors:
    """Keep the instances where `keep`, bool `[N]`, is true."""
    if keep.all():
        return tensors
    return {name: _index(value, keep) if name in INSTANCE_KEYS else value for name, value in tensors.items()}


def resize(tensors: Tensors, size: Sequence[int]) -> Tensors:
    """Resize to `size`, (height, width): the image bilinearly, masks with nearest-exact."""
    size = list(size)
    if size == list(get_image_size(tensors)):
        return tensors

    def resize_tensor(value):
        if isinstance(value, tv_tensors.Mask):
            # Plain nearest is off by up to a pixel from the image's sampling points.
            mode = InterpolationMode.NEAREST_EXACT
            return tv_tensors.Mask(F.resize_image(value.as_subclass(Tensor), size, interpolation=mode))
        return F.resize(value, size)

    return _map_tv_tensors(tensors, resize_tensor)


def _flip(tensors, axis):
    def flip_tensor(value):
        if isinstance(value, tv_tensors.KeyPoints):
            # torchvision flips pixel indices, to W - 1 - x; these coordinates are continuous.
            points = value.as_subclass(Tensor).clone()
            points[..., axis] = value.canvas_size[1 - axis] - points[..., axis]
            return tv_tensors.wrap(points, like=value)
        return F.vertical_flip(value) if axis else F.horizontal_flip(value)

    return _map_tv_tensors(tensors, flip_tensor)


def horizontal_flip(tensors: Tensors, keypoint_flip_indices: Sequence[int] | None = None) -> Tensors:
    """Flip horizontally; keypoint i of the result is keypoint `keypoint_flip_indices[i]` of the input."""
    flipped = _flip(tensors, 0)
    return reorder_keypoints(flipped, keypoint_flip_indices) if "keypoints" in tensors else flipped


def reorder_keypoints(tensors: Tensors, keypoint_flip_indices: Sequence[int] | None = None) -> Tensors:
    """Reorder the keypoints of flipped tensors; by default in the order that `DatasetMapper` has set."""
    order = tensors.get("flip_indices") if keypoint_flip_indices is None else keypoint_flip_indices
    if order is None:
        raise UserError("a horizontal flip of keypoints requires keypoint_flip_indices")
    index = (slice(None), list(order))
    return tensors | {name: _index(tensors[name], index) for name in ("keypoints", "visibility")}


def vertical_flip(tensors: Tensors) -> Tensors:
    """Flip vertically."""
    return _flip(tensors, 1)


def pad(tensors: Tensors, padding: Sequence[int], fill: float | Sequence[float] = 0) -> Tensors:
    """Pad the image with the colour `fill` and masks with 0; `padding` is (left, top, right, bottom)."""

    def pad_tensor(value):
        return F.pad(value, list(padding), fill=fill if isinstance(value, tv_tensors.Image) else 0)

    return _map_tv_tensors(tensors, pad_tensor)


def crop(tensors: Tensors, top: int, left: int, height: int, width: int) -> Tensors:
    """Crop; remove instances with an empty box or mask and make keypoints outside unlabelled.

    Boxes across the border are recomputed from the masks, as in Detectron2, or clipped if there are none.
    """
    cropped = _map_tv_tensors(tensors, lambda value: F.crop(value, top, left, height, width))
    if "boxes" not in tensors:
        return cropped
    shift = torch.tensor([left, top, left, top])
    moved = tensors["boxes"].as_subclass(Tensor) - shift
    cut = (moved != cropped["boxes"].as_subclass(Tensor)).any(dim=1)
    keep = has_extent(cropped)
    return tighten_boxes(select_instances(clear_outside_keypoints(cropped), keep), cut[keep])


def has_extent(tensors: Tensors) -> Tensor:
    """Return whether each instance has a non-empty box and, if there are masks, mask; bool `[N]`."""
    boxes = tensors["boxes"].as_subclass(Tensor)
    keep = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE).all(dim=1)
    if "masks" in tensors:
        keep &= tensors["masks"].as_subclass(Tensor).flatten(1).any(dim=1).bool()
    return keep


def clear_outside_keypoints(tensors: Tensors) -> Tensors:
    """Make keypoints outside the image unlabelled."""
    if "keypoints" not in tensors:
        return tensors
    points = tensors["keypoints"].as_subclass(Tensor)
    height, width = get_image_size(tensors)
    inside = ((points >= 0) & (points <= torch.tensor([width, height]))).all(dim=2)
    return {**tensors, "visibility": tensors["visibility"] * inside}


def tighten_boxes(tensors: Tensors, selected: Tensor) -> Tensors:
    """Recompute the boxes of the `selected` instances, bool `[N]`, from their non-empty masks."""
    if "masks" not in tensors or not selected.any():
        return tensors
    boxes = tensors["boxes"].as_subclass(Tensor).clone()
    # masks_to_boxes returns pixel indices: the last pixel ends at + 1.
    boxes[selected] = masks_to_boxes(tensors["masks"].as_subclass(Tensor)[selected])
    boxes[selected] += boxes.new_tensor([0, 0, 1, 1])
    return {**tensors, "boxes": tv_tensors.wrap(boxes, like=tensors["boxes"])}
