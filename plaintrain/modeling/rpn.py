"""The region proposal network (https://arxiv.org/abs/1506.01497), trained in fixed shapes."""

import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import encode_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import batched_nms, clip_boxes_to_image

from plaintrain.modeling.matching import (
    AnchorCache,
    decode,
    match,
    pad_targets,
    regression_loss,
    sample,
    take,
)
from plaintrain.modeling.postprocess import best_proposals


class BatchedRPN(RegionProposalNetwork):
    """torchvision's RPN, parameter for parameter; its training without its sync points."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._anchors = AnchorCache()

    def forward(self, images, features, targets=None):
        """torchvision's, but in training the proposals are boxes `[B, P, 4]` and bool `[B, P]`, False for
        those that are padding.
        """
        if not self.training:
            return super().forward(images, features, targets)
        features = list(features.values())
        objectness, deltas = self.head(features)
        counts = [level[0].numel() for level in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        objectness = objectness.view(len(images.image_sizes), -1)
        deltas = deltas.view(*objectness.shape, 4)
        anchors = self._anchors(self.anchor_generator, images, features)
        losses = self._losses(objectness, deltas, anchors, targets)
        with torch.no_grad():
            return self._propose(objectness, deltas, anchors, counts, images.image_sizes), losses

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        """torchvision's, for all images at once; only for evaluation."""
        return best_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level)

    def _propose(self, objectness, deltas, anchors, counts, sizes):
        index = self._get_top_n_idx(objectness, counts)
        counts = [min(count, self.pre_nms_top_n()) for count in counts]
        boxes = decode(take(deltas, index), anchors[index], self.box_coder)
        boxes = torch.stack([clip_boxes_to_image(b, size) for b, size in zip(boxes, sizes, strict=True)])
        scores = take(objectness, index).sigmoid()
        # What is too small or too unlikely comes last: it suppresses nothing.
        wanted = (boxes[..., 2:] - boxes[..., :2] >= self.min_size).all(-1) & (scores >= self.score_thresh)
        boxes, scores = boxes.masked_fill(~wanted[..., None], 0), scores.masked_fill(~wanted, -1)
        levels = torch.cat([torch.full_like(s, i) for i, s in enumerate(scores[0].split(counts))])
        alive = torch.zeros_like(scores, dtype=torch.bool)
        for row, b, s in zip(alive, boxes, scores, strict=True):
            row.index_fill_(0, batched_nms(b, s, levels, self.nms_thresh), True)  # sync point
        number = min(self.post_nms_top_n(), scores.shape[1])
        scores, best = scores.masked_fill(~alive, -1).topk(number, dim=1)
        return take(boxes, best), scores >= 0

    def _losses(self, objectness, deltas, anchors, targets):
        boxes, labels = pad_targets(targets)
        index, matched, background = match(boxes, labels >= 0, anchors[None], self.proposal_matcher)
        sampled, exists = sample(matched, background, self.fg_bg_sampler)
        positive = take(matched, sampled) & exists
        number = exists.sum().clamp(min=1)
        objects, priors = take(boxes, take(index, sampled)), anchors[sampled]
        wanted = encode_boxes(objects.flatten(0, 1), priors.flatten(0, 1), self.box_coder.weights)
        wanted = wanted.view_as(objects)
        loss_box = regression_loss(take(deltas, sampled), wanted, positive)
        logits, truth = take(objectness, sampled), positive.to(objectness.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, truth, exists.to(logits.dtype), reduction="sum")
        return {"loss_objectness": loss / number, "loss_rpn_box_reg": loss_box / number}
