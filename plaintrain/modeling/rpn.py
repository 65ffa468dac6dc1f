"""Region proposal network (https://arxiv.org/abs/1506.01497), trained in fixed shapes."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import batched_nms
from torchvision.ops.misc import Conv2dNormActivation

from plaintrain.modeling.detector import cast_outputs_to_float32
from plaintrain.modeling.losses import BoxLoss, compute_box_losses
from plaintrain.modeling.matching import decode, gather_rows, match_boxes, pad_targets, sample_matches
from plaintrain.modeling.poolers import Features, Targets
from plaintrain.modeling.postprocess import Sizes, are_large, clip_boxes, select_topk_per_level

# Modules of torchvision's head with one convolution.
_PLAIN_HEAD = [RPNHead, nn.Sequential, Conv2dNormActivation, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Conv2d]


def _is_plain(head):
    """Return whether a head is torchvision's with one 3x3 convolution, and has no hooks but ours."""
    modules = list(head.modules())
    if [type(m) for m in modules] != _PLAIN_HEAD:
        return False
    conv = modules[3]
    if (conv.kernel_size, conv.dilation, conv.padding_mode) != ((3, 3), (1, 1), "zeros"):
        return False
    hooks = [h for m in modules for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return all(h is cast_outputs_to_float32 for h in hooks) and not any(m._backward_hooks for m in modules)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # training cannot use the inference tensors of an evaluation
def _get_neighbors(sizes, device):
    """Return the inputs of a 3x3 convolution at each of N locations of all levels, `[N, 9]`; N is padding."""
    num_locations = sum(h * w for h, w in sizes)
    start = 0
    neighbors = []
    for h, w in sizes:
        level = torch.arange(start, start + h * w, device=device).view(h, w)
        windows = F.pad(level, (1, 1, 1, 1), value=num_locations).unfold(0, 3, 1).unfold(1, 3, 1)
        neighbors.append(windows.reshape(-1, 9))
        start += h * w
    return torch.cat(neighbors)


class BatchedRPN(RegionProposalNetwork):
    """torchvision's RPN with the same parameters, in fixed shapes."""

    box_loss = BoxLoss()
    loss_weight = 1.0
    # Divide the losses by the "sampled" anchors, or by "batch_size", the anchors to sample.
    normalizer = "sampled"

    def forward(
        self, images: ImageList, features: Features, targets: Targets | None = None, propose: bool = True
    ) -> tuple[tuple[Tensor, Tensor] | None, dict[str, Tensor]]:
        """Return proposals, boxes `[B, P, 4]` and descending scores `[B, P]` (-1 for padding), and losses."""
        maps = list(features.values())
        anchors = self.anchor_generator(images, maps)[0]
        losses = {}
        predictions = None
        if self.training:
            # A plain head is applied to sampled locations only; all would cost a seventh of a step.
            predictions = None if _is_plain(self.head) else self.predict(maps)
            losses = self._compute_losses(maps, anchors, targets, predictions)
        if not propose:
            return None, losses
        # Losses come first: autocast caches weights as first cast, and no_grad would detach them.
        with torch.no_grad():
            predictions = predictions or self.predict(maps)
            return self._propose(*self.find_candidates(*predictions, anchors, images.image_sizes)), losses

    def _compute_losses(self, features, anchors, targets, predictions):
        boxes, labels = pad_targets(targets)
        matches = match_boxes(boxes, labels >= 0, anchors[None], self.proposal_matcher)
        matched_idxs, foreground, background = matches
        sampled_idxs, valid = sample_matches(foreground, background, self.fg_bg_sampler)
        foreground = gather_rows(foreground, sampled_idxs) & valid
        normalizer = valid.sum().clamp(min=1)
        if self.normalizer == "batch_size":
            normalizer = self.fg_bg_sampler.batch_size_per_image * len(valid)
        if predictions:
            objectness, deltas = (gather_rows(values, sampled_idxs) for values in predictions[:2])
        else:
            objectness, deltas = self._predict_sampled(features, sampled_idxs)
        gt_boxes = gather_rows(boxes, gather_rows(matched_idxs, sampled_idxs))
        anchors = anchors[sampled_idxs]
        loss_box = compute_box_losses(self.box_loss, self.box_coder, deltas, anchors, gt_boxes, foreground)
        labels = foreground.to(objectness.dtype)
        loss = F.binary_cross_entropy_with_logits(objectness, labels, valid.to(labels.dtype), reduction="sum")
        weight = self.loss_weight / normalizer
        return {"loss_rpn_cls": loss * weight, "loss_rpn_loc": loss_box.sum() * weight}

    def predict(self, features: list[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
        """Return objectness `[B, N]` and deltas `[B, N, 4]` of all anchors, and their number per level."""
        objectness, deltas = self.head(features)
        num_anchors = [level.shape[1] * level.shape[2] * level.shape[3] for level in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        objectness = objectness.view(features[0].shape[0], -1)
        return objectness, deltas.view(*objectness.shape, 4), num_anchors

    def _predict_sampled(self, features, sampled_idxs):
        """Return objectness `[B, S]` and deltas `[B, S, 4]` of sampled anchors `[B, S]`, by a plain head."""
        num_anchors = self.head.cls_logits.out_channels
        neighbors = _get_neighbors(tuple(feature.shape[-2:] for feature in features), features[0].device)
        inputs = [f.permute(0, 2, 3, 1).flatten(1, 2) for f in features]
        padding = inputs[0].new_zeros(len(sampled_idxs), 1, inputs[0].shape[2])
        inputs = torch.cat([*inputs, padding], dim=1)
        image_idxs = torch.arange(len(sampled_idxs), device=sampled_idxs.device)[:, None, None]
        idxs = neighbors[sampled_idxs // num_anchors] + image_idxs * inputs.shape[1]
        windows = inputs.flatten(0, 1).index_select(0, idxs.flatten()).view(*sampled_idxs.shape, -1)
        conv = self.head.conv[0][0]
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = F.linear(windows, weight, conv.bias).relu()
        heads = (self.head.cls_logits, self.head.bbox_pred)
        objectness, deltas = (F.linear(hidden, h.weight.flatten(1), h.bias).float() for h in heads)
        anchor_idxs = (sampled_idxs % num_anchors)[..., None]
        deltas = deltas.unflatten(2, (num_anchors, 4)).take_along_dim(anchor_idxs[..., None], dim=2)
        return objectness.take_along_dim(anchor_idxs, dim=2)[..., 0], deltas[:, :, 0]

    def find_candidates(
        self, objectness: Tensor, deltas: Tensor, num_anchors: list[int], anchors: Tensor, image_sizes: Sizes
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores (-1 for rejected) and levels of each level's top-k anchors, before NMS."""
        idxs, levels = select_topk_per_level(objectness, num_anchors, self.pre_nms_top_n())
        boxes = clip_boxes(decode(gather_rows(deltas, idxs), anchors[idxs], self.box_coder), image_sizes)
        scores = gather_rows(objectness, idxs).sigmoid()
        valid = are_large(boxes, self.min_size) & (scores >= self.score_thresh)
        return boxes, scores.masked_fill(~valid, -1), levels

    def _propose(self, boxes, scores, levels):
        # Rejected candidates have the lowest scores, so they suppress nothing.
        boxes = boxes.masked_fill(scores[..., None] < 0, 0)
        keep = torch.zeros_like(scores, dtype=torch.bool)
        for keep_mask, b, s in zip(keep, boxes, scores, strict=True):
            keep_mask.index_fill_(0, batched_nms(b, s, levels[0], self.nms_thresh), True)  # device sync
        num_proposals = min(self.post_nms_top_n(), scores.shape[1])
        scores, idxs = scores.masked_fill(~keep, -1).topk(num_proposals, dim=1)
        if not self.training:
            # The heads need not compute the padding of images with few proposals.
            num_proposals = int((scores >= 0).sum(dim=1).max())  # device sync
            scores = scores[:, :num_proposals]
            idxs = idxs[:, :num_proposals]
        return gather_rows(boxes, idxs), scores
