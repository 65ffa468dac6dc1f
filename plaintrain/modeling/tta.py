"""Test-time augmentation: a detector on several views of each image, its detections merged."""

import contextlib

import torch
from torch import nn
from torchvision.ops import batched_nms

from plaintrain.config import get_value
from plaintrain.modeling.rcnn import GeneralizedRCNN
from plaintrain.structures import BoxMasks
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

# MODEL.META_ARCHITECTURE -> what the keys of its detections in evaluation begin and end with.
_DETECTION_KEYS = {
    "GeneralizedRCNN": ("MODEL.ROI_HEADS", "_TEST"),
    "ProposalNetwork": ("MODEL.RPN", ""),
    "RetinaNet": ("MODEL.RETINANET", "_TEST"),
    "FCOS": ("MODEL.FCOS", "_TEST"),
    "SSD": ("MODEL.SSD", "_TEST"),
}


def detection_threshold(cfg, name):
    """The threshold of a config's detections in evaluation: SCORE_THRESH, or NMS_THRESH, an IoU."""
    section, ending = _DETECTION_KEYS[cfg.MODEL.META_ARCHITECTURE]
    return get_value(cfg, f"{section}.{name}{ending}")


class DetectorWithTTA(nn.Module):
    """A detector that looks at several views of an image; only for evaluation.

    As in Detectron2's GeneralizedRCNNWithTTA, each view is detected on its own, and NMS by class
    over the detections of all views leaves the best. A `GeneralizedRCNN` then predicts the masks of
    those in every view, and the mean of the probabilities decides. Keypoints, and the masks of a
    detector of another class, are those of the view whose detection is left.

    One view of the plain test's size gives the plain test's detections, up to rounding, with two
    exceptions, where the detector's own NMS is another: `RetinaNet` with `DefaultAnchorGenerator`
    cuts boxes at the image's edge after NMS, and `ProposalNetwork` compares the proposals of one
    level only. Of their boxes, those that a better one of the class still overlaps are left out.

    Attributes:
        pastes_masks: False leaves the masks of a `GeneralizedRCNN` as `BoxMasks`.
    """

    pastes_masks = True

    def __init__(self, model, nms_thresh, detections_per_image):
        """
        Args:
            model: takes a `list[sample]`, and returns in evaluation for each {boxes, scores, labels,
                and where it finds them masks, keypoints} in the original image's pixels.
            nms_thresh: IoU in 0..1 with a better detection of its class above which one is left out.
            detections_per_image: how many to keep, the best.
        """
        super().__init__()
        self.model, self.nms_thresh = comm.unwrap_model(model), nms_thresh
        self.detections_per_image = detections_per_image
        self.training = self.model.training

    def forward(self, samples):
        """
        Args:
            samples: list of samples with `views`, equally many each; see `TTAMapper`.

        Returns:
            A list of what the detector returns for each image, scores descending.

        Raises:
            UserError: a sample without views, or a mirrored view of keypoints of unknown order.
            RuntimeError: the detector is in training mode.
        """
        if self.model.training:
            raise RuntimeError("DetectorWithTTA only evaluates: call its eval() first")
        views, model = _split_views(samples), self.model
        averages_masks = isinstance(model, GeneralizedRCNN) and model.roi_heads.has_mask()
        with model.without_masks() if averages_masks else contextlib.nullcontext():
            found = [self._detect(view) for view in views]
        results = [self._merge(detections) for detections in zip(*found, strict=True)]
        if averages_masks:
            self._add_masks(results, views)
        return results

    def _detect(self, view):
        return [
            _unmirror(detection, sample) for detection, sample in zip(self.model(view), view, strict=True)
        ]

    def _merge(self, detections):
        """The best of the detections that the views of one image have."""
        merged = {key: torch.cat([part[key] for part in detections]) for key in detections[0]}
        keep = batched_nms(merged["boxes"], merged["scores"], merged["labels"], self.nms_thresh)
        return {key: value[keep[: self.detections_per_image]] for key, value in merged.items()}

    def _add_masks(self, results, views):
        probabilities = [self._predict_masks(results, view) for view in views]
        for result, sample, masks in zip(results, views[0], zip(*probabilities, strict=True), strict=True):
            mean = torch.stack(masks).mean(dim=0)
            size = sample["height"], sample["width"]
            boxed = BoxMasks(mean, result["boxes"], *size, self.model.masks_aligned)
            result["masks"] = boxed.paste() if self.pastes_masks else boxed

    def _predict_masks(self, results, view):
        """For each image `[N, 1, M, M]`, of its results' boxes as they lie in the original."""
        boxes = [_to_view(result["boxes"], sample) for result, sample in zip(results, view, strict=True)]
        masks = self.model.predict_masks(view, boxes, [result["labels"] for result in results])
        return [m.flip(-1) if sample["flipped"] else m for m, sample in zip(masks, view, strict=True)]


def _split_views(samples):
    """The samples of each view: of the first of all images, of the second, ..."""
    for sample in samples:
        if not sample.get("views"):
            raise UserError(
                f"the sample of image {sample.get('image_id')} has no views: build the test loader with "
                "TEST.AUG.ENABLED, or give it a mapper such as TTAMapper"
            )
    rows = [[{**sample, **view} for view in sample["views"]] for sample in samples]
    return list(zip(*rows, strict=True))


def _mirror(boxes, width):
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=-1)


def _unmirror(detection, sample):
    """What was found in a view, in the original's pixels, as it lies in the original."""
    if not sample["flipped"]:
        return detection
    width = sample["width"]
    result = {**detection, "boxes": _mirror(detection["boxes"], width)}
    if "masks" in detection:
        result["masks"] = detection["masks"].flip(-1)
    if "keypoints" in detection:
        order = sample["keypoint_flip_indices"]
        if order is None:
            raise UserError("a mirrored view of keypoints needs to know keypoint_flip_indices")
        x, y, score = detection["keypoints"][:, list(order)].unbind(dim=-1)
        result["keypoints"] = torch.stack([width - x, y, score], dim=-1)
    return result


def _to_view(boxes, sample):
    """Boxes in the original's pixels as they lie in a view, in its pixels."""
    boxes = _mirror(boxes, sample["width"]) if sample["flipped"] else boxes
    height, width = sample["image"].shape[-2:]
    x, y = width / sample["width"], height / sample["height"]
    return boxes * boxes.new_tensor([x, y, x, y])


def build_tta(cfg, model):
    """The model itself, or with TEST.AUG.ENABLED `DetectorWithTTA` around it.

    NMS and the number of detections are those that MODEL.META_ARCHITECTURE has without.

    Args:
        cfg: the config.
        model: what `build_model(cfg)` returned, possibly wrapped for several GPUs.

    Raises:
        UserError: an architecture whose NMS threshold is not known here.
    """
    if not cfg.TEST.AUG.ENABLED:
        return model
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in _DETECTION_KEYS:
        raise UserError(
            f"TEST.AUG.ENABLED is True, which MODEL.META_ARCHITECTURE {name!r} does not have; those that "
            f"do are {', '.join(_DETECTION_KEYS)}"
        )
    proposals = name == "ProposalNetwork"
    number = cfg.MODEL.RPN.POST_NMS_TOPK_TEST if proposals else cfg.TEST.DETECTIONS_PER_IMAGE
    return DetectorWithTTA(model, detection_threshold(cfg, "NMS_THRESH"), number)
