"""The box, mask and keypoint heads of an R-CNN, in fixed shapes."""

import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import RoIHeads, keypointrcnn_loss, maskrcnn_inference

from plaintrain.modeling.losses import BoxLoss, compute_box_losses
from plaintrain.modeling.matching import decode, gather_rows, match_boxes, pad_targets, sample_matches
from plaintrain.modeling.postprocess import (
    are_large,
    clip_boxes,
    heatmaps_to_keypoints,
    mask_below_threshold,
    select_best,
)
from plaintrain.structures import sample_masks

# The label of padding, which cross entropy leaves out.
_IGNORED = -100
# Boxes with a shorter side are not detections.
_MIN_SIZE = 1e-2


class BatchedRoIHeads(RoIHeads):
    """torchvision's heads, parameter for parameter; for `masks_aligned` see `plaintrain.structures`."""

    box_loss, keypoint_loss_weight, masks_aligned = BoxLoss(), 1.0, True

    def forward(self, features, proposals, image_shapes, targets=None):
        """torchvision's, but proposals are those of `BatchedRPN`, and labels count from 0 in evaluation."""
        if not self.training:
            return self._detect(features, *proposals, image_shapes), {}
        self.check_targets(targets)
        boxes, index, labels, objects = self._sample(*proposals, targets)
        losses = self._box_losses(*self._predict_boxes(features, boxes), labels, boxes, objects)
        if self.has_mask() or self.has_keypoint():
            # Matches come first: a number an image cuts them off.
            counts = (labels > 0).sum(dim=1).tolist()  # sync point
            boxes, index = ([v[:n] for v, n in zip(part, counts, strict=True)] for part in (boxes, index))
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(self._mask_logits(features, boxes), boxes, index, targets)
        if self.has_keypoint():
            # torchvision's loss takes views of it.
            logits = self.predict_heatmaps(features, boxes).contiguous()
            keypoints = [target["keypoints"] for target in targets]
            loss = keypointrcnn_loss(logits, boxes, keypoints, index)
            losses["loss_keypoint"] = loss * self.keypoint_loss_weight
        return [], losses

    def _predict_boxes(self, features, boxes):
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))

    def _mask_logits(self, features, boxes):
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))

    def predict_masks(self, features, boxes, labels):
        """Return the probabilities of each box's mask, float32 `[N, 1, M, M]` an image; labels from 0."""
        return maskrcnn_inference(self._mask_logits(features, boxes), [part + 1 for part in labels])

    def predict_heatmaps(self, features, boxes):
        """Return the heatmaps of each box's keypoints, `[N, Kp, M, M]` for all images."""
        return self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes)))

    def find_candidates(self, features, proposals, scores, image_sizes):
        """Return the boxes, scores (-1 where not wanted) and labels of each class in each proposal.

        Args:
            features: {name: `[B, C, H, W]`}.
            proposals, scores: of `BatchedRPN`.
            image_sizes: (height, width) of each image, or of all.
        """
        logits, deltas = self._predict_boxes(features, proposals)
        number, classes = scores.shape, logits.shape[1] - 1
        deltas = deltas.view(*number, classes + 1, 4)[:, :, 1:]
        boxes = decode(deltas, proposals.to(deltas.dtype)[:, :, None], self.box_coder)
        boxes = clip_boxes(boxes, image_sizes)
        wanted = are_large(boxes, _MIN_SIZE) & (scores >= 0)[..., None]
        scores = mask_below_threshold(logits.softmax(-1)[:, 1:].view(*number, classes), self.score_thresh)
        labels = torch.arange(classes, device=scores.device).expand_as(scores)
        return boxes.flatten(1, 2), scores.masked_fill(~wanted, -1).flatten(1), labels.flatten(1)

    def _detect(self, features, proposals, scores, image_sizes):
        candidates = self.find_candidates(features, proposals, scores, image_sizes)
        detections = select_best(*candidates, self.nms_thresh, self.detections_per_img)
        boxes, labels = ([found[key] for found in detections] for key in ("boxes", "labels"))
        if self.has_mask():
            for found, masks in zip(detections, self.predict_masks(features, boxes, labels), strict=True):
                found["masks"] = masks
        if self.has_keypoint():
            maps = self.predict_heatmaps(features, boxes)
            keypoints = heatmaps_to_keypoints(maps, torch.cat(boxes)).split(list(map(len, boxes)))
            for found, points in zip(detections, keypoints, strict=True):
                found["keypoints"] = points
        return detections

    def _sample(self, proposals, scores, targets):
        """Proposals `[B, S, 4]`, their objects' indices, labels and boxes."""
        boxes, labels = pad_targets(targets)
        boxes = boxes.to(proposals.dtype)
        proposals, exists = torch.cat([proposals, boxes], dim=1), torch.cat([scores, labels], dim=1) >= 0
        index, matched, background = match_boxes(boxes, labels >= 0, proposals, self.proposal_matcher)
        sampled, exists = sample_matches(matched & exists, background & exists, self.fg_bg_sampler)
        proposals, index, matched = (gather_rows(part, sampled) for part in (proposals, index, matched))
        labels = gather_rows(labels, index).masked_fill(~matched, 0).masked_fill(~exists, _IGNORED)
        return proposals, index, labels, gather_rows(boxes, index)

    def _box_losses(self, logits, deltas, labels, boxes, objects):
        number = (labels >= 0).sum().clamp(min=1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=_IGNORED, reduction="sum")
        deltas = gather_rows(deltas.view(labels.numel(), -1, 4), labels.clamp(min=0).view(-1, 1))
        deltas = deltas.view_as(objects)
        loss_box = compute_box_losses(self.box_loss, self.box_coder, deltas, boxes, objects, labels > 0)
        return {"loss_cls": loss / number, "loss_box_reg": loss_box.sum() / number}

    def _mask_loss(self, logits, boxes, index, targets):
        matched = list(zip(targets, boxes, index, strict=True))
        labels = torch.cat([target["labels"][objects] for target, _, objects in matched])
        if not len(labels):
            return logits.sum() * 0
        side, aligned = logits.shape[-1], self.masks_aligned
        masks = [sample_masks(target["masks"], b, objects, side, aligned) for target, b, objects in matched]
        logits = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(masks))
