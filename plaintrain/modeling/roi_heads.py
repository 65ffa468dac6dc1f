"""Box, mask and keypoint heads of an R-CNN, in fixed shapes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.roi_heads import RoIHeads, keypointrcnn_loss, maskrcnn_inference

from plaintrain.modeling.losses import BoxLoss, compute_box_losses
from plaintrain.modeling.matching import decode, gather_rows, match_boxes, pad_targets, sample_matches
from plaintrain.modeling.poolers import Boxes, Features, Targets
from plaintrain.modeling.postprocess import Sizes, are_large, clip_boxes, heatmaps_to_keypoints, select_best
from plaintrain.structures import sample_masks

# Label of padding, cross_entropy's ignore_index.
_IGNORED = -100
# Detections with a shorter side are dropped, as in torchvision.
_MIN_SIZE = 1e-2


class BatchedRoIHeads(RoIHeads):
    """torchvision's heads with the same parameters, on the padded proposals of `BatchedRPN`."""

    box_loss = BoxLoss()
    keypoint_loss_weight = 1.0
    keypoint_score_type = "logit"
    # See `BoxMasks`.
    masks_aligned = True

    def forward(
        self,
        features: Features,
        proposals: tuple[Tensor, Tensor],
        image_shapes: Sizes,
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections, with labels from 0, and losses, as torchvision."""
        if not self.training:
            return self._detect(features, *proposals, image_shapes), {}
        self.check_targets(targets)
        return [], self._compute_losses(features, *proposals, targets)

    def _compute_losses(self, features, proposals, scores, targets):
        boxes, matched_idxs, labels, gt_boxes = self._sample_proposals(proposals, scores, targets)
        outputs = self._predict_boxes(features, boxes, labels != _IGNORED)
        losses = self._compute_box_losses(*outputs, labels, boxes, gt_boxes)
        if self.has_mask() or self.has_keypoint():
            # Foreground samples come first.
            counts = (labels > 0).sum(dim=1).tolist()  # device sync
            boxes = [b[:n] for b, n in zip(boxes, counts, strict=True)]
            matched_idxs = [idxs[:n] for idxs, n in zip(matched_idxs, counts, strict=True)]
        if self.has_mask():
            logits = self._predict_mask_logits(features, boxes)
            losses["loss_mask"] = self._compute_mask_loss(logits, boxes, matched_idxs, targets)
        if self.has_keypoint():
            # keypointrcnn_loss calls `view`.
            logits = self.predict_heatmaps(features, boxes).contiguous()
            keypoints = [target["keypoints"] for target in targets]
            loss = keypointrcnn_loss(logits, boxes, keypoints, matched_idxs)
            losses["loss_keypoint"] = loss * self.keypoint_loss_weight
        return losses

    def _predict_boxes(self, features, boxes, valid=None):
        regions = self.box_roi_pool(features, boxes)
        if valid is None or not any(isinstance(module, _BatchNorm) for module in self.box_head.modules()):
            return self.box_predictor(self.box_head(regions))
        # Padding must not enter the statistics of batch norm.
        idxs = valid.flatten().nonzero()[:, 0]  # device sync
        outputs = self.box_predictor(self.box_head(regions[idxs]))
        return [x.new_zeros(len(regions), x.shape[1]).index_copy(0, idxs, x) for x in outputs]

    def _predict_mask_logits(self, features, boxes):
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))

    def predict_masks(self, features: Features, boxes: Boxes, labels: list[Tensor]) -> list[Tensor]:
        """Return mask probabilities, float32 `[N, 1, M, M]` per image; labels are from 0."""
        return maskrcnn_inference(self._predict_mask_logits(features, boxes), [label + 1 for label in labels])

    def predict_heatmaps(self, features: Features, boxes: Boxes) -> Tensor:
        """Return the keypoint heatmaps of all boxes, `[N, Kp, M, M]`."""
        return self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes)))

    def find_candidates(
        self, features: Features, proposals: Tensor, scores: Tensor, image_sizes: Sizes
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores (-1 for rejected) and labels of each class in the proposals, before NMS."""
        logits, deltas = self._predict_boxes(features, proposals)
        num_classes = logits.shape[1] - 1
        deltas = deltas.view(*scores.shape, num_classes + 1, 4)[:, :, 1:]
        boxes = decode(deltas, proposals.to(deltas.dtype)[:, :, None], self.box_coder)
        boxes = clip_boxes(boxes, image_sizes)
        valid = are_large(boxes, _MIN_SIZE) & (scores >= 0)[..., None]
        scores = logits.softmax(-1)[:, 1:].view(*scores.shape, num_classes)
        scores = scores.masked_fill(~(valid & (scores > self.score_thresh)), -1)
        labels = torch.arange(num_classes, device=scores.device).expand_as(scores)
        return boxes.flatten(1, 2), scores.flatten(1), labels.flatten(1)

    def _detect(self, features, proposals, scores, image_sizes):
        candidates = self.find_candidates(features, proposals, scores, image_sizes)
        detections = select_best(*candidates, self.nms_thresh, self.detections_per_img)
        boxes = [detection["boxes"] for detection in detections]
        if self.has_mask():
            labels = [detection["labels"] for detection in detections]
            for detection, masks in zip(detections, self.predict_masks(features, boxes, labels), strict=True):
                detection["masks"] = masks
        if self.has_keypoint():
            maps = self.predict_heatmaps(features, boxes)
            keypoints = heatmaps_to_keypoints(maps, torch.cat(boxes), self.keypoint_score_type)
            keypoints = keypoints.split(list(map(len, boxes)))
            for detection, points in zip(detections, keypoints, strict=True):
                detection["keypoints"] = points
        return detections

    def _sample_proposals(self, proposals, scores, targets):
        """Sample proposals `[B, S, 4]`; return them, their matched_idxs, labels and ground-truth boxes."""
        boxes, labels = pad_targets(targets)
        boxes = boxes.to(proposals.dtype)
        proposals = torch.cat([proposals, boxes], dim=1)
        valid = torch.cat([scores, labels], dim=1) >= 0
        matches = match_boxes(boxes, labels >= 0, proposals, self.proposal_matcher)
        matched_idxs, foreground, background = matches
        sampled_idxs, valid = sample_matches(foreground & valid, background & valid, self.fg_bg_sampler)
        proposals = gather_rows(proposals, sampled_idxs)
        matched_idxs = gather_rows(matched_idxs, sampled_idxs)
        foreground = gather_rows(foreground, sampled_idxs)
        labels = gather_rows(labels, matched_idxs).masked_fill(~foreground, 0).masked_fill(~valid, _IGNORED)
        return proposals, matched_idxs, labels, gather_rows(boxes, matched_idxs)

    def _compute_box_losses(self, logits, deltas, labels, boxes, gt_boxes):
        num_samples = (labels >= 0).sum().clamp(min=1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=_IGNORED, reduction="sum")
        deltas = gather_rows(deltas.view(labels.numel(), -1, 4), labels.clamp(min=0).view(-1, 1))
        deltas = deltas.view_as(gt_boxes)
        loss_box = compute_box_losses(self.box_loss, self.box_coder, deltas, boxes, gt_boxes, labels > 0)
        return {"loss_cls": loss / num_samples, "loss_box_reg": loss_box.sum() / num_samples}

    def _compute_mask_loss(self, logits, boxes, matched_idxs, targets):
        labels = torch.cat([t["labels"][idxs] for t, idxs in zip(targets, matched_idxs, strict=True)])
        if not len(labels):
            return logits.sum() * 0
        gt_masks = [
            sample_masks(target["masks"], b, idxs, logits.shape[-1], self.masks_aligned)
            for target, b, idxs in zip(targets, boxes, matched_idxs, strict=True)
        ]
        logits = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(gt_masks))
