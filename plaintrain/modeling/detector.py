"""Code that all detectors share: preprocessing, anchors, targets, postprocessing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from plaintrain.config import CfgNode
from plaintrain.modeling.anchors import LOW_PRECISION, CachedAnchorGenerator, DefaultAnchorGenerator
from plaintrain.modeling.backbones import Backbone
from plaintrain.modeling.matching import pad_targets
from plaintrain.modeling.poolers import Targets
from plaintrain.modeling.postprocess import clip_boxes, select_best
from plaintrain.structures import BoxMasks
from plaintrain.utils.errors import UserError


class Preprocess(nn.Module):
    """Normalization and padding, without resizing, in place of torchvision's `GeneralizedRCNNTransform`.

    With `bgr`, mean and std (of pixels 0..255) and the network's input are in BGR order.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: list[float], std: list[float], bgr: bool, size_divisible: int, channels_last: bool = False
    ):
        super().__init__()
        self.bgr = bgr
        self.size_divisible = size_divisible
        self.channels_last = channels_last
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        """Return the images, uint8 `[3, H, W]` in RGB, as a zero-padded batch, and `targets` unchanged."""
        sizes = [tuple(image.shape[-2:]) for image in images]
        divisor = self.size_divisible
        height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
        batch = self.mean.new_zeros(len(images), 3, height, width)
        if self.channels_last:
            batch = batch.to(memory_format=torch.channels_last)
        for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            image = image.to(self.mean.device, non_blocking=True)
            image = image.flip(0) if self.bgr else image
            batch[i, :, :h, :w] = (image - self.mean) / self.std
        return ImageList(batch, sizes), targets


def build_preprocess(cfg: CfgNode, size_divisible: int = 32) -> Preprocess:
    """Build `Preprocess` from MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT."""
    model = cfg.MODEL
    bgr = cfg.INPUT.FORMAT == "BGR"
    return Preprocess(model.PIXEL_MEAN, model.PIXEL_STD, bgr, size_divisible, model.CHANNELS_LAST)


def _get_per_level(cfg, key, num_levels):
    """Return one tuple per level of ANCHOR_GENERATOR.SIZES or ASPECT_RATIOS; one list is for all levels."""
    lists = cfg.MODEL.ANCHOR_GENERATOR[key]
    if len(lists) not in (1, num_levels) or len({len(values) for values in lists}) != 1:
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.{key} must be one list, or one of the same length for each of the "
            f"{num_levels} levels of {cfg.MODEL.BACKBONE.NAME}, got {lists}; see configs/Base-*.yaml"
        )
    return tuple(map(tuple, lists)) * (num_levels // len(lists))


def build_anchor_generator(cfg: CfgNode, backbone: Backbone) -> CachedAnchorGenerator:
    """Build the generator of MODEL.ANCHOR_GENERATOR for the levels of a backbone."""
    num_levels = len(backbone.level_names)
    sizes = _get_per_level(cfg, "SIZES", num_levels)
    aspect_ratios = _get_per_level(cfg, "ASPECT_RATIOS", num_levels)
    if cfg.MODEL.ANCHOR_GENERATOR.NAME == "DefaultAnchorGenerator":
        offset = cfg.MODEL.ANCHOR_GENERATOR.OFFSET
        return DefaultAnchorGenerator(sizes, aspect_ratios, backbone.strides, offset)
    return CachedAnchorGenerator(sizes, aspect_ratios)


def get_targets(samples: list[dict[str, Any]], device: torch.device, label_offset: int = 0) -> Targets:
    """Return the targets of samples on a device; `label_offset` makes room for a background class."""
    for sample in samples:
        if not {"boxes", "labels"} <= set(sample.get("target") or ()):
            expected = "boxes [N, 4] (XYXY), labels [N], and masks and keypoints if they are trained"
            keys = ", ".join(sample)
            raise UserError(f"a mapper must return a 'target' with {expected}; got the keys {keys}")
    # Boxes are checked on the host, without a device sync.
    boxes = torch.cat([sample["target"]["boxes"] for sample in samples])
    degenerate = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    if degenerate.any():
        raise AssertionError(
            f"boxes must have a positive height and width, got {boxes[degenerate][0].tolist()}"
        )
    targets = []
    for sample in samples:
        target = {k: v.to(device, non_blocking=True) for k, v in sample["target"].items()}
        target["labels"] = target["labels"] + label_offset
        targets.append(target)
    return targets


class DenseDetector(nn.Module):
    """Mixin that makes a one-stage detector of torchvision take samples, with few device syncs."""

    # 1 where the head's label 0 is the background.
    label_offset = 0
    # False clips boxes after NMS and drops those outside the image, as Detectron2.
    clips_before_nms = True
    # Both take the head's outputs, the anchors [N, 4] and their number per level; losses also padded targets.
    _compute_losses: Callable[..., dict[str, Tensor]]
    _decode_candidates: Callable[..., tuple[Tensor, Tensor, Tensor]]
    transform: Preprocess
    score_thresh: float
    nms_thresh: float
    detections_per_img: int

    def forward(self, samples: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Return losses or detections; see `plaintrain.modeling.build_model`."""
        images, _ = self.transform([sample["image"] for sample in samples])
        if not self.training:
            return scale_to_original_size(self._detect(images), samples)
        boxes, labels = pad_targets(get_targets(samples, images.tensors.device))
        return self._compute_losses(*self._predict(images), boxes, labels)

    def _predict(self, images):
        features = list(self.backbone(images.tensors).values())
        outputs = self.head(features)
        anchors = self.anchor_generator(images, features)[0]
        per_location = self.anchor_generator.num_anchors_per_location()
        num_anchors = [f.shape[-2] * f.shape[-1] * n for f, n in zip(features, per_location, strict=True)]
        return outputs, anchors, num_anchors

    def find_candidates(self, images: ImageList) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes `[B, N, 4]`, scores `[B, N]` (-1 for rejected) and labels from 0, before NMS."""
        boxes, scores, labels = self._decode_candidates(*self._predict(images))
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


def scale_to_original_size(
    detections: list[dict[str, Any]], samples: list[dict[str, Any]], paste: bool = True, aligned: bool = True
) -> list[dict[str, Any]]:
    """Scale detections from each sample's image to its original `height` and `width`.

    Masks `[N, 1, M, M]` become `BoxMasks`, or with `paste` bool `[N, height, width]`.
    """
    results = []
    for detection, sample in zip(detections, samples, strict=True):
        height, width = sample["image"].shape[-2:]
        # A tensor of these numbers would be a device sync.
        scale = sample["width"] / width, sample["height"] / height
        boxes = _scale_points(detection["boxes"].view(-1, 2, 2), *scale).flatten(1)
        result = {**detection, "boxes": boxes}
        if "masks" in detection:
            masks = BoxMasks(detection["masks"], boxes, sample["height"], sample["width"], aligned)
            result["masks"] = masks.paste() if paste else masks
        if "keypoints" in detection:
            points, scores = detection["keypoints"].split([2, 1], dim=-1)
            result["keypoints"] = torch.cat([_scale_points(points, *scale), scores], dim=-1)
        results.append(result)
    return results


def _scale_points(points, x, y):
    return torch.stack([points[..., 0] * x, points[..., 1] * y], dim=-1)


def cast_outputs_to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Cast low-precision outputs to float32; a forward hook."""
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype in LOW_PRECISION else x, outputs)


def keep_float32(head: nn.Module) -> None:
    """Make a module return float32 also under autocast.

    torchvision decodes boxes in the dtype of the head; in bfloat16 a coordinate of 700 is off by up to 2
    pixels.
    """
    head.register_forward_hook(cast_outputs_to_float32)
