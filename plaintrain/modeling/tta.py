"""Test-time augmentation: a detector on several views of each image, its detections merged."""

import contextlib

import torch
from torch import nn
from torchvision.ops import batched_nms

from plaintrain.modeling.rcnn import GeneralizedRCNN, ProposalNetwork
from plaintrain.structures import BoxMasks
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


def get_detection_settings(model):
    """Return the part of a detector that has the `score_thresh` and `nms_thresh` of its detections."""
    return getattr(model, "roi_heads", None) or getattr(model, "rpn", model)


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
        """`nms_thresh` is the IoU with a better detection of its class above which one is left out."""
        super().__init__()
        self.model, self.nms_thresh = comm.unwrap_model(model), nms_thresh
        self.detections_per_image = detections_per_image
        self.training = self.model.training

    def forward(self, samples):
        """Return what the detector returns for each sample; all have `views`, equally many each."""
        if self.model.training:
            raise RuntimeError("DetectorWithTTA only evaluates: call its eval() first")
        views, model = _split_views(samples), self.model
        averages_masks = isinstance(model, GeneralizedRCNN) and model.roi_heads.has_mask()
        with model.without_masks() if averages_masks else contextlib.nullcontext():
            found = [list(map(_unmirror, model(view), view)) for view in views]
        results = [self._merge(detections) for detections in zip(*found, strict=True)]
        if averages_masks:
            self._add_masks(results, views)
        return results

    def _merge(self, detections):
        """The best of the detections that the views of one image have."""
        merged = {key: torch.cat([part[key] for part in detections]) for key in detections[0]}
        keep = batched_nms(merged["boxes"], merged["scores"], merged["labels"], self.nms_thresh)
        return {key: value[keep[: self.detections_per_image]] for key, value in merged.items()}

    def _add_masks(self, results, views):
        """Add the mean of the masks that the mask head predicts for the merged boxes in each view."""
        probabilities, model = [], self.model
        for view in views:
            boxes = [_to_view(result["boxes"], sample) for result, sample in zip(results, view, strict=True)]
            images, _ = model.transform([sample["image"] for sample in view])
            features, labels = model.backbone(images.tensors), [result["labels"] for result in results]
            masks = model.roi_heads.predict_masks(features, boxes, labels)
            probabilities.append(
                [m.flip(-1) if s["flipped"] else m for m, s in zip(masks, view, strict=True)]
            )
        for result, sample, masks in zip(results, views[0], zip(*probabilities, strict=True), strict=True):
            mean, size = torch.stack(masks).mean(dim=0), (sample["height"], sample["width"])
            boxed = BoxMasks(mean, result["boxes"], *size, model.masks_aligned)
            result["masks"] = boxed.paste() if self.pastes_masks else boxed


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
    """Return the model itself, or with TEST.AUG.ENABLED `DetectorWithTTA` around it, unwrapped.

    NMS and the number of detections are those that the model has without.
    """
    if not cfg.TEST.AUG.ENABLED:
        return model
    detector, number = comm.unwrap_model(model), cfg.TEST.DETECTIONS_PER_IMAGE
    if isinstance(detector, ProposalNetwork):
        number = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    return DetectorWithTTA(detector, get_detection_settings(detector).nms_thresh, number)
