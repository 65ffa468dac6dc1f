"""The box, mask and keypoint heads of an R-CNN, trained in fixed shapes."""

import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import RoIHeads, keypointrcnn_loss

from plaintrain.modeling.box_loss import BoxLoss, box_losses
from plaintrain.modeling.matching import match, pad_targets, sample, take
from plaintrain.modeling.postprocess import detect_in_rois
from plaintrain.structures import sample_masks

# The label of padding, which cross entropy leaves out.
_IGNORED = -100


class BatchedRoIHeads(RoIHeads):
    """torchvision's heads, parameter for parameter; their training without its sync points.

    Attributes:
        box_loss: the `BoxLoss`.
        masks_aligned: how masks lie in their boxes; see `plaintrain.structures`.
    """

    box_loss, masks_aligned = BoxLoss(), True

    def forward(self, features, proposals, image_shapes, targets=None):
        """torchvision's, but in training the proposals are those of `BatchedRPN`."""
        if not self.training:
            return detect_in_rois(self, features, proposals, image_shapes), {}
        self.check_targets(targets)
        boxes, index, labels, objects = self._sample(*proposals, targets)
        pooled = self.box_roi_pool(features, list(boxes), image_shapes)
        losses = self._box_losses(*self.box_predictor(self.box_head(pooled)), labels, boxes, objects)
        if self.has_mask() or self.has_keypoint():
            # Matches come first: a number an image cuts them off.
            counts = (labels > 0).sum(dim=1).tolist()  # sync point
            boxes, index = ([v[:n] for v, n in zip(part, counts, strict=True)] for part in (boxes, index))
        if self.has_mask():
            pooled = self.mask_roi_pool(features, boxes, image_shapes)
            logits = self.mask_predictor(self.mask_head(pooled))
            losses["loss_mask"] = self._mask_loss(logits, boxes, index, targets)
        if self.has_keypoint():
            pooled = self.keypoint_roi_pool(features, boxes, image_shapes)
            # torchvision's loss takes views of it.
            logits = self.keypoint_predictor(self.keypoint_head(pooled)).contiguous()
            keypoints = [target["keypoints"] for target in targets]
            losses["loss_keypoint"] = keypointrcnn_loss(logits, boxes, keypoints, index)
        return [], losses

    def _sample(self, proposals, exists, targets):
        """Proposals `[B, S, 4]`, their objects' indices, labels and boxes."""
        boxes, labels = pad_targets(targets)
        boxes = boxes.to(proposals.dtype)
        proposals, exists = torch.cat([proposals, boxes], dim=1), torch.cat([exists, labels >= 0], dim=1)
        index, matched, background = match(boxes, labels >= 0, proposals, self.proposal_matcher)
        sampled, exists = sample(matched & exists, background & exists, self.fg_bg_sampler)
        proposals, index, matched = (take(part, sampled) for part in (proposals, index, matched))
        labels = take(labels, index).masked_fill(~matched, 0).masked_fill(~exists, _IGNORED)
        return proposals, index, labels, take(boxes, index)

    def _box_losses(self, logits, deltas, labels, boxes, objects):
        number = (labels >= 0).sum().clamp(min=1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=_IGNORED, reduction="sum")
        deltas = take(deltas.view(labels.numel(), -1, 4), labels.clamp(min=0).view(-1, 1))
        deltas = deltas.view_as(objects)
        loss_box = box_losses(self.box_loss, self.box_coder, deltas, boxes, objects, labels > 0)
        return {"loss_classifier": loss / number, "loss_box_reg": loss_box.sum() / number}

    def _mask_loss(self, logits, boxes, index, targets):
        matched = list(zip(targets, boxes, index, strict=True))
        labels = torch.cat([target["labels"][objects] for target, _, objects in matched])
        if not len(labels):
            return logits.sum() * 0
        side, aligned = logits.shape[-1], self.masks_aligned
        masks = [sample_masks(target["masks"], b, objects, side, aligned) for target, b, objects in matched]
        logits = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(masks))
