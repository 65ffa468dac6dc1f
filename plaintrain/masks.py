"""Masks as a mask head gives them, of boxes; as pixels of the image; and as run-length encodings.

Pixel (i, j) covers [j, j + 1) x [i, i + 1). Where masks are `aligned`, M x M cells fill the box exactly,
as in Detectron2: targets are sampled at the centres of cells, masks are pasted at the centres of pixels.
Otherwise both follow torchvision: targets lie half a pixel off, and masks reach about half a pixel too far.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.ops import roi_align

_THRESHOLD = 0.5


@dataclass(frozen=True)
class BoxMasks:
    """The masks of an image that are not pasted into it yet: N small ones instead of N of its size.

    Attributes:
        probabilities: `[N, 1, M, M]`, of each box's inside.
        boxes: `[N, 4]`, XYXY, in the image's pixels.
        height, width: size of the image.
        aligned: how the masks lie in their boxes; see the module.
    """

    probabilities: torch.Tensor
    boxes: torch.Tensor
    height: int
    width: int
    aligned: bool = True

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
        return BoxMasks(*parts, self.height, self.width, self.aligned)

    def paste(self):
        """The masks of the image, bool `[N, height, width]`: the pixels of a probability of at least 0.5.

        They are made box by box, so that no image of probabilities is made for each.
        """
        pasted = torch.zeros(self.shape, dtype=torch.bool, device=self.boxes.device)
        for target, (inside, top, left) in zip(pasted, self._windows(), strict=True):
            height, width = inside.shape
            target[top : top + height, left : left + width] = inside
        return pasted

    def encode(self):
        """The counts of each pasted mask's compressed RLE, a list of N bytes; nothing is pasted for it."""
        size = self.height, self.width
        found = [{"size": size, "counts": _runs(*window, *size)} for window in self._windows()]
        return [rle["counts"] for rle in coco_mask.frPyObjects(found, *size)] if found else []

    def _windows(self):
        """Yield each mask's pixels in a window of the image, bool `[h, w]`, and the window's top and left."""
        masks, boxes = self.probabilities, self.boxes
        if self.aligned:
            # No pixel whose centre lies outside of the box has a probability above 0.5.
            corners = torch.cat([(boxes[:, :2] - 0.5).ceil(), (boxes[:, 2:] - 0.5).floor()], dim=1)
        else:
            masks, scale = expand_masks(masks, padding=1)
            corners = expand_boxes(boxes, scale)
        corners = corners.long().tolist()  # sync point
        for mask, box, (x0, y0, x1, y1) in zip(masks, boxes, corners, strict=True):
            top, left = max(y0, 0), max(x0, 0)
            bottom, right = max(min(y1 + 1, self.height), top), max(min(x1 + 1, self.width), left)
            if self.aligned:
                yield _sample(mask, box, (left, top, right, bottom)) >= _THRESHOLD, top, left
                continue
            size = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
            inside = F.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)[0, 0]
            yield inside[top - y0 : bottom - y0, left - x0 : right - x0] > _THRESHOLD, top, left


def _sample(mask, box, window):
    """A mask `[1, M, M]` of a box at the centres of a window's pixels; between them linear, around it 0."""
    left, top, right, bottom = window
    x = torch.arange(left, right, device=box.device) + 0.5
    y = torch.arange(top, bottom, device=box.device) + 0.5
    # The box reaches from -1 to 1.
    x, y = (x - box[0]) / (box[2] - box[0]) * 2 - 1, (y - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return F.grid_sample(mask[None].to(grid), grid[None], align_corners=False)[0, 0]


def sample_masks(masks, boxes, index, side, aligned=True):
    """Return the training targets of a mask head; those of aligned masks are thresholded, as in Detectron2.

    Args:
        masks: `[G, H, W]`, 0 or 1.
        boxes: `[N, 4]`, XYXY, in the masks' pixels.
        index: int64 `[N]`, the mask of each box.
        side: M, cells along a side of a box.
        aligned: as in `BoxMasks`.

    Returns:
        `[N, M, M]`, 0 or 1, or in 0..1.
    """
    rois = torch.cat([index[:, None].to(boxes), boxes], dim=1)
    covered = roi_align(masks[:, None].to(rois), rois, (side, side), aligned=aligned)[:, 0]
    return (covered >= _THRESHOLD).to(covered) if aligned else covered


def _runs(inside, top, left, height, width):
    """The lengths of the runs, first of zeros, of an image's mask that lies in a window, column by column."""
    rows, columns = inside.shape
    # The window's columns one after the other, each followed by a pixel that is not in the mask.
    flat = np.zeros(columns * (rows + 1) + 1, dtype=bool)
    flat[1:].reshape(columns, rows + 1)[:, :-1] = inside.cpu().numpy().T
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
