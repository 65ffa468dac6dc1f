"""Masks as a mask head gives them, of boxes; as pixels of the image; and as run-length encodings."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

_THRESHOLD = 0.5


@dataclass(frozen=True)
class BoxMasks:
    """The masks of an image that are not pasted into it yet: N small ones instead of N of its size.

    Attributes:
        probabilities: `[N, 1, M, M]`, of each box's inside.
        boxes: `[N, 4]`, XYXY, in the image's pixels.
        height, width: size of the image.
    """

    probabilities: torch.Tensor
    boxes: torch.Tensor
    height: int
    width: int

    @property
    def shape(self):
        """That of the pasted masks, (N, height, width)."""
        return len(self.boxes), self.height, self.width

    @property
    def device(self):
        """Where they are."""
        return self.boxes.device

    @property
    def is_cuda(self):
        """Whether that is a GPU of CUDA."""
        return self.boxes.is_cuda

    def to(self, device, non_blocking=False):
        """The same on another device, as `torch.Tensor.to`."""
        parts = (part.to(device, non_blocking=non_blocking) for part in (self.probabilities, self.boxes))
        return BoxMasks(*parts, self.height, self.width)

    def paste(self):
        """The masks of the image, bool `[N, height, width]`.

        Places them as torchvision's `paste_masks_in_image`, thresholded at 0.5 box by box, so that no
        image of probabilities is made for each.
        """
        pasted = torch.zeros(self.shape, dtype=torch.bool, device=self.boxes.device)
        for target, (inside, top, left) in zip(pasted, self._windows(), strict=True):
            height, width = inside.shape
            target[top : top + height, left : left + width] = inside > _THRESHOLD
        return pasted

    def encode(self):
        """The counts of each pasted mask's compressed RLE, a list of N bytes; nothing is pasted for it."""
        size = self.height, self.width
        found = [{"size": size, "counts": _runs(*window, *size)} for window in self._windows()]
        return [rle["counts"] for rle in coco_mask.frPyObjects(found, *size)] if found else []

    def _windows(self):
        """Of each mask the probabilities of the pixels that its box covers, and their top and left."""
        masks, scale = expand_masks(self.probabilities, padding=1)
        corners = expand_boxes(self.boxes, scale).long().tolist()  # sync point
        for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
            size = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
            inside = F.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)[0, 0]
            top, left = max(y0, 0), max(x0, 0)
            yield inside[top - y0 : max(self.height - y0, 0), left - x0 : max(self.width - x0, 0)], top, left


def _runs(inside, top, left, height, width):
    """The lengths of the runs, first of zeros, of an image's mask that lies in a window, column by column."""
    rows, columns = inside.shape
    # The window's columns one after the other, each followed by a pixel that is not in the mask.
    flat = np.zeros(columns * (rows + 1) + 1, dtype=bool)
    np.greater(inside.float().cpu().numpy().T, _THRESHOLD, out=flat[1:].reshape(columns, rows + 1)[:, :-1])
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), rows + 1)
    changes = (left + column) * height + top + row
    if rows == height:
        # A run goes on in the next column.
        same = 2 * np.flatnonzero(changes[1:-1:2] == changes[2::2])
        changes = np.delete(changes, np.concatenate([same + 1, same + 2]))
    runs = np.diff(changes, prepend=0, append=height * width)
    return runs if runs[-1] else runs[:-1]


def encode_masks(masks):
    """The counts of the compressed RLE of each mask.

    Args:
        masks: bool or uint8 tensor `[N, H, W]`, on any device.

    Returns:
        list of N bytes.
    """
    # pycocotools wants [H, W, N] in Fortran's order, which is [N, W, H] in C's.
    columns = masks.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return [rle["counts"] for rle in coco_mask.encode(columns.transpose(2, 1, 0))]
