"""The region proposal network (https://arxiv.org/abs/1506.01497), trained in fixed shapes."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import batched_nms
from torchvision.ops.misc import Conv2dNormActivation

from plaintrain.modeling.detector import cast_outputs_to_float32
from plaintrain.modeling.losses import BoxLoss, compute_box_losses
from plaintrain.modeling.matching import decode, gather_rows, match_boxes, pad_targets, sample_matches
from plaintrain.modeling.postprocess import are_large, clip_boxes, select_topk_per_level

# The modules of torchvision's head of one convolution.
_PLAIN_HEAD = [RPNHead, nn.Sequential, Conv2dNormActivation, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Conv2d]


def _is_plain(head):
    """Whether a head is torchvision's of one 3x3 convolution, of which nothing but the parameters counts."""
    parts = list(head.modules())
    if [type(part) for part in parts] != _PLAIN_HEAD:
        return False
    conv = parts[3]
    if (conv.kernel_size, conv.dilation, conv.padding_mode) != ((3, 3), (1, 1), "zeros"):
        return False
    hooks = [h for part in parts for h in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())]
    return all(h is cast_outputs_to_float32 for h in hooks) and not any(
        part._backward_hooks for part in parts
    )


@functools.lru_cache(maxsize=8)
def _neighbours(sizes, device):
    """Of each location of levels of some sizes the 9 that a 3x3 convolution reads, `[N, 9]`.

    Locations are counted over all levels, row by row; N stands for all beyond the edges.
    """
    number, first, places = sum(h * w for h, w in sizes), 0, []
    for h, w in sizes:
        level = torch.arange(first, first + h * w, device=device).view(h, w)
        windows = F.pad(level, (1, 1, 1, 1), value=number).unfold(0, 3, 1).unfold(1, 3, 1)
        places.append(windows.reshape(-1, 9))
        first += h * w
    return torch.cat(places)


class BatchedRPN(RegionProposalNetwork):
    """torchvision's RPN, parameter for parameter, in fixed shapes.

    Losses are divided by the anchors "sampled" in a batch, or by "batch_size", as many as are meant to be.
    """

    box_loss, loss_weight, normalizer = BoxLoss(), 1.0, "sampled"

    def forward(self, images, features, targets=None, propose=True):
        """
        Returns:
            Proposals, the best first: boxes `[B, P, 4]` and scores `[B, P]`, -1 for padding; None unless
            `propose`. And the losses, {} in evaluation.
        """
        features, losses, predicted = list(features.values()), {}, None
        anchors = self.anchor_generator(images, features)[0]
        if self.training:
            # The losses see few locations: to convolve the others would cost a seventh of a step, most of it
            # in the backward pass, which would bring zeros through them.
            predicted = None if _is_plain(self.head) else self.predict(features)
            losses = self._losses(features, anchors, targets, predicted)
        if not propose:
            return None, losses
        # Proposals are not learned. After the losses: autocast keeps a weight as it first casts it.
        with torch.no_grad():
            predicted = predicted or self.predict(features)
            return self._propose(*self.find_candidates(*predicted, anchors, images.image_sizes)), losses

    def _losses(self, features, anchors, targets, predicted):
        boxes, labels = pad_targets(targets)
        index, matched, background = match_boxes(boxes, labels >= 0, anchors[None], self.proposal_matcher)
        sampled, exists = sample_matches(matched, background, self.fg_bg_sampler)
        positive = gather_rows(matched, sampled) & exists
        number = exists.sum().clamp(min=1)
        if self.normalizer == "batch_size":
            number = self.fg_bg_sampler.batch_size_per_image * len(exists)
        if predicted:
            logits, deltas = (gather_rows(part, sampled) for part in predicted[:2])
        else:
            logits, deltas = self._predict_sampled(features, sampled)
        objects, priors = gather_rows(boxes, gather_rows(index, sampled)), anchors[sampled]
        loss_box = compute_box_losses(self.box_loss, self.box_coder, deltas, priors, objects, positive).sum()
        truth = positive.to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, truth, exists.to(logits.dtype), reduction="sum")
        weight = self.loss_weight / number
        return {"loss_rpn_cls": loss * weight, "loss_rpn_loc": loss_box * weight}

    def predict(self, features):
        """Objectness `[B, N]` and deltas `[B, N, 4]` of all anchors, and how many of them each level has."""
        objectness, deltas = self.head(features)
        counts = [level.shape[1] * level.shape[2] * level.shape[3] for level in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        objectness = objectness.view(features[0].shape[0], -1)
        return objectness, deltas.view(*objectness.shape, 4), counts

    def _predict_sampled(self, features, sampled):
        """Objectness `[B, S]` and deltas `[B, S, 4]` of sampled anchors `[B, S]`, by a head that is plain."""
        number = self.head.cls_logits.out_channels
        neighbours = _neighbours(tuple(feature.shape[-2:] for feature in features), features[0].device)
        rows = [f.permute(0, 2, 3, 1).flatten(1, 2) for f in features]
        rows = torch.cat([*rows, rows[0].new_zeros(len(sampled), 1, rows[0].shape[2])], dim=1)
        places = neighbours[sampled // number]
        places = places + torch.arange(len(sampled), device=sampled.device)[:, None, None] * rows.shape[1]
        windows = rows.flatten(0, 1).index_select(0, places.flatten()).view(*sampled.shape, -1)
        convolution = self.head.conv[0][0]
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = F.linear(windows, weight, convolution.bias).relu()
        heads = (self.head.cls_logits, self.head.bbox_pred)
        logits, deltas = (F.linear(hidden, h.weight.flatten(1), h.bias).float() for h in heads)
        anchor = (sampled % number)[..., None]
        deltas = deltas.unflatten(2, (number, 4)).take_along_dim(anchor[..., None], dim=2)
        return logits.take_along_dim(anchor, dim=2)[..., 0], deltas[:, :, 0]

    def find_candidates(self, objectness, deltas, counts, anchors, image_sizes):
        """Return the boxes, scores (-1 for what is too small or too unlikely) and levels of the best anchors.

        Args:
            objectness, deltas, counts: what `predict` returns.
            anchors: `[N, 4]`.
            image_sizes: (height, width) of each image, or of all.
        """
        index, levels = select_topk_per_level(objectness, counts, self.pre_nms_top_n())
        boxes = clip_boxes(decode(gather_rows(deltas, index), anchors[index], self.box_coder), image_sizes)
        scores = gather_rows(objectness, index).sigmoid()
        wanted = are_large(boxes, self.min_size) & (scores >= self.score_thresh)
        return boxes, scores.masked_fill(~wanted, -1), levels

    def _propose(self, boxes, scores, levels):
        # What is not wanted comes last: it suppresses nothing.
        boxes = boxes.masked_fill(scores[..., None] < 0, 0)
        alive = torch.zeros_like(scores, dtype=torch.bool)
        for row, b, s in zip(alive, boxes, scores, strict=True):
            row.index_fill_(0, batched_nms(b, s, levels[0], self.nms_thresh), True)  # device sync
        number = min(self.post_nms_top_n(), scores.shape[1])
        scores, best = scores.masked_fill(~alive, -1).topk(number, dim=1)
        if not self.training:
            # Small images have few proposals: the heads need not compute the padding.
            number = int((scores >= 0).sum(dim=1).max())  # device sync
            scores, best = scores[:, :number], best[:, :number]
        return gather_rows(boxes, best), scores
