"""What every detector shares: anchors from the config, samples in, detections out."""

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from plaintrain.utils.errors import UserError

_SIZE_DIVISIBLE = 32


class Preprocess(nn.Module):
    """Stands in for torchvision's `GeneralizedRCNNTransform`: normalises and pads, never resizes."""

    def __init__(self, pixel_mean, pixel_std, bgr):
        """
        Args:
            pixel_mean, pixel_std: 3 numbers each, for pixels of 0 to 255.
            bgr: the numbers, and the network's input, are in BGR order.
        """
        super().__init__()
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images, targets=None):
        """Normalise, and pad at the right and the bottom with zeros.

        Args:
            images: list of uint8 `[3, H, W]`, RGB, on any device.
            targets: passed through.

        Returns:
            (ImageList, targets); the batch's sides are multiples of 32.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = (
            -(-max(side) // _SIZE_DIVISIBLE) * _SIZE_DIVISIBLE for side in zip(*sizes, strict=True)
        )
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            image = image.to(self.mean.device, non_blocking=True)
            image = image.flip(0) if self.bgr else image
            batch[i, :, :h, :w] = (image - self.mean) / self.std
        return ImageList(batch, sizes), targets

    def postprocess(self, result, image_shapes, original_image_sizes):
        """Detections as they are; `to_original_size` knows the size before the mapper's resize."""
        return result


def build_preprocess(cfg):
    """`Preprocess` from MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT."""
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError("MODEL.PIXEL_MEAN and MODEL.PIXEL_STD need 3 numbers each, the latter above 0")
    return Preprocess(mean, std, bgr=cfg.INPUT.FORMAT == "BGR")


def build_anchor_generator(cfg, num_levels):
    """torchvision's `AnchorGenerator`, one entry of SIZES and ASPECT_RATIOS per level.

    Raises:
        UserError: neither one list for all levels nor one a level, or levels of differing counts.
    """
    per_level = {}
    for key in ("SIZES", "ASPECT_RATIOS"):
        lists = cfg.MODEL.ANCHOR_GENERATOR[key]
        if len(lists) not in (1, num_levels) or not all(isinstance(row, list) for row in lists):
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.{key} must be one list, or {num_levels} for the backbone's "
                f"{num_levels} levels, such as [[...], [...]], not {lists}"
            )
        rows = lists if len(lists) == num_levels else lists * num_levels
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise UserError(f"every list in MODEL.ANCHOR_GENERATOR.{key} must have the same length")
        per_level[key] = tuple(tuple(row) for row in rows)
    return AnchorGenerator(per_level["SIZES"], per_level["ASPECT_RATIOS"])


def get_targets(samples, device, label_offset=0):
    """The targets of samples on a device; `label_offset` makes room for a background class."""
    targets = []
    for sample in samples:
        target = {k: v.to(device, non_blocking=True) for k, v in sample["target"].items()}
        target["labels"] = target["labels"] + label_offset
        targets.append(target)
    return targets


def to_original_size(detections, samples, label_offset=0):
    """Scale boxes from each sample's image to its original `height` and `width`.

    Args:
        detections: list of {boxes `[N, 4]`, scores `[N]`, labels `[N]`}, as torchvision returns.
        samples: the samples they were made from.
        label_offset: what to take off the labels, so that they count from 0.

    Returns:
        The list, in the original images' pixels, with labels 0 to K-1.
    """
    results = []
    for detection, sample in zip(detections, samples, strict=True):
        height, width = sample["image"].shape[-2:]
        x, y = sample["width"] / width, sample["height"] / height
        boxes = detection["boxes"] * detection["boxes"].new_tensor([x, y, x, y])
        results.append({**detection, "boxes": boxes, "labels": detection["labels"] - label_offset})
    return results
