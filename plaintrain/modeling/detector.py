"""What every detector shares: anchors from the config, samples in, detections out."""

import math

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from plaintrain.modeling.anchors import LOW_PRECISION, CachedAnchorGenerator, DefaultAnchorGenerator
from plaintrain.modeling.matching import pad_targets
from plaintrain.modeling.postprocess import clip_boxes, select_best
from plaintrain.structures import BoxMasks
from plaintrain.utils.errors import UserError


class Preprocess(nn.Module):
    """Stands in for torchvision's `GeneralizedRCNNTransform`: normalises and pads, never resizes.

    With `bgr` the mean and std, for pixels of 0 to 255, and the network's input are in BGR order.
    """

    def __init__(self, pixel_mean, pixel_std, bgr, size_divisible=32, channels_last=False):
        super().__init__()
        self.bgr, self.size_divisible, self.channels_last = bgr, size_divisible, channels_last
        self.register_buffer("mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images, targets=None):
        """Return the images, uint8 `[3, H, W]` in RGB, as an ImageList, padded with zeros; and `targets`."""
        sizes = [tuple(image.shape[-2:]) for image in images]
        multiple = self.size_divisible
        height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
        batch = self.mean.new_zeros(len(images), 3, height, width)
        if self.channels_last:
            batch = batch.to(memory_format=torch.channels_last)
        for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            image = image.to(self.mean.device, non_blocking=True)
            image = image.flip(0) if self.bgr else image
            batch[i, :, :h, :w] = (image - self.mean) / self.std
        return ImageList(batch, sizes), targets


def build_preprocess(cfg, size_divisible=32):
    """`Preprocess` from MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT."""
    mean, std, bgr = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT == "BGR"
    return Preprocess(mean, std, bgr, size_divisible, cfg.MODEL.CHANNELS_LAST)


def build_anchor_generator(cfg, backbone):
    """Build the generator of ANCHOR_GENERATOR.NAME, one entry of SIZES and ASPECT_RATIOS per level."""
    per_level, num_levels = {}, len(backbone.level_names)
    for key in ("SIZES", "ASPECT_RATIOS"):
        lists = cfg.MODEL.ANCHOR_GENERATOR[key]
        fits = len(lists) in (1, num_levels) and all(isinstance(row, list) and row for row in lists)
        if not fits or len({len(row) for row in lists}) != 1:
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.{key} must be one list, or {num_levels} of one length for the "
                f"backbone's {num_levels} levels, such as [[...], [...]], got {lists}"
            )
        rows = lists if len(lists) == num_levels else lists * num_levels
        per_level[key] = tuple(tuple(row) for row in rows)
    if cfg.MODEL.ANCHOR_GENERATOR.NAME == "DefaultAnchorGenerator":
        offset = cfg.MODEL.ANCHOR_GENERATOR.OFFSET
        return DefaultAnchorGenerator(*per_level.values(), backbone.strides, offset)
    return CachedAnchorGenerator(*per_level.values())


def compute_prior_bias(probability):
    """Return the bias at which a sigmoid gives `probability` (focal loss paper, 4.1)."""
    return -math.log((1 - probability) / probability)


def get_targets(samples, device, label_offset=0):
    """The targets of samples on a device; `label_offset` makes room for a background class.

    Boxes without a size are an error, as in torchvision.
    """
    # While they are on the host: no sync point.
    boxes = torch.cat([sample["target"]["boxes"] for sample in samples])
    wrong = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    if wrong.any():
        raise AssertionError(f"Boxes need a positive height and width, not {boxes[wrong][0].tolist()}")
    targets = []
    for sample in samples:
        target = {k: v.to(device, non_blocking=True) for k, v in sample["target"].items()}
        target["labels"] = target["labels"] + label_offset
        targets.append(target)
    return targets


class DenseOnSamples:
    """Lets a one-stage detector of torchvision take samples: the first base of a class, torchvision's the
    second. Training and evaluation have few device syncs.

    A subclass computes `_losses` and `_candidates` from the head's outputs, the anchors `[N, 4]`, and how
    many of them each level has; losses also from boxes and labels as of `pad_targets`.

    Attributes:
        label_offset: 1 where the head's label 0 is the background.
        clips_before_nms: False clips boxes to the image after NMS, and drops those outside of it, as in
            Detectron2.
    """

    label_offset, clips_before_nms = 0, True

    def forward(self, samples):
        """Return losses or detections; see `plaintrain.modeling.build_model`."""
        images, _ = self.transform([sample["image"] for sample in samples])
        if not self.training:
            return scale_to_original_size(self._detect(images), samples)
        boxes, labels = pad_targets(get_targets(samples, images.tensors.device))
        return self._losses(*self._predict(images), boxes, labels)

    def _predict(self, images):
        features = list(self.backbone(images.tensors).values())
        outputs, anchors = self.head(features), self.anchor_generator(images, features)[0]
        numbers = self.anchor_generator.num_anchors_per_location()
        counts = [f.shape[-2] * f.shape[-1] * n for f, n in zip(features, numbers, strict=True)]
        return outputs, anchors, counts

    def find_candidates(self, images):
        """Return boxes `[B, N, 4]`, scores `[B, N]` (-1 where not wanted) and labels from 0."""
        boxes, scores, labels = self._candidates(*self._predict(images))
        return clip_boxes(boxes, images.image_sizes) if self.clips_before_nms else boxes, scores, labels

    def _detect(self, images):
        candidates = self.find_candidates(images)
        detections = select_best(*candidates, self.nms_thresh, self.detections_per_img)
        if self.clips_before_nms:
            return detections
        for i, size in enumerate(images.image_sizes):
            boxes = detections[i]["boxes"] = clip_boxes_to_image(detections[i]["boxes"], size)
            keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            detections[i] = {name: value[keep] for name, value in detections[i].items()}
        return detections


def scale_to_original_size(detections, samples, paste=True, aligned=True):
    """Bring detections from each sample's image to its original `height` and `width`.

    Args:
        detections: list of {boxes `[N, 4]`, scores `[N]`, labels `[N]`}, and where the model has such
            heads, masks `[N, 1, M, M]` and keypoints `[N, Kp, 3]` as x, y, score.
        samples: the samples they were made from.
        paste: make masks bool `[N, height, width]`; otherwise they are `BoxMasks`.
        aligned: how masks lie in their boxes; see `plaintrain.structures`.
    """
    results = []
    for detection, sample in zip(detections, samples, strict=True):
        height, width = sample["image"].shape[-2:]
        # By numbers of the host: a tensor of them is a sync point of a GPU.
        scale = sample["width"] / width, sample["height"] / height
        boxes = _scaled(detection["boxes"].view(-1, 2, 2), *scale).flatten(1)
        result = {**detection, "boxes": boxes}
        if "masks" in detection:
            masks = BoxMasks(detection["masks"], boxes, sample["height"], sample["width"], aligned)
            result["masks"] = masks.paste() if paste else masks
        if "keypoints" in detection:
            points, scores = detection["keypoints"].split([2, 1], dim=-1)
            result["keypoints"] = torch.cat([_scaled(points, *scale), scores], dim=-1)
        results.append(result)
    return results


def _scaled(points, x, y):
    return torch.stack([points[..., 0] * x, points[..., 1] * y], dim=-1)


def cast_outputs_to_float32(module, inputs, outputs):
    """A forward hook: the outputs (see `keep_float32`) in float32, if they are not."""
    return tree_map_only(torch.Tensor, lambda x: x.float() if x.dtype in LOW_PRECISION else x, outputs)


def keep_float32(*heads):
    """Give modules float32 results whatever autocast computes them in; nothing changes without it.

    torchvision decodes boxes in the precision of the head. In bfloat16, with 8 bits, a coordinate of 700 is
    off by up to 2 pixels. Outputs are tensors, or dicts, lists and tuples of them.
    """
    for module in heads:
        module.register_forward_hook(cast_outputs_to_float32)
