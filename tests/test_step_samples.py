"""A training step on candidates that were drawn at random, held against torchvision's on the same ones."""

from unittest import mock

import pytest
import torch
from model_helpers import make_batch, torchvision_inputs
from test_rcnn import assert_same_losses_and_gradients, build_pair

from plaintrain.modeling import matching, roi_heads, rpn


class Drawn:
    """A sampler of torchvision's that takes, in each call, the candidates of the next draw of ours."""

    def __init__(self, draws):
        self._draws = draws

    def __call__(self, labels):
        candidates, index, exists = self._draws.pop(0)
        taken = torch.zeros_like(candidates).scatter_(1, index, exists) & candidates
        # What is padding to us is not there for torchvision, and all else in the same order.
        rows = [
            t[c] if len(label) < len(t) else t for t, c, label in zip(taken, candidates, labels, strict=True)
        ]
        assert [len(row) for row in rows] == [len(label) for label in labels]
        wanted = [(row & (label >= 1), row & (label == 0)) for row, label in zip(rows, labels, strict=True)]
        return [w[0] for w in wanted], [w[1] for w in wanted]


@pytest.mark.parametrize("numbers", [(3, 1), (0, 5), (2, 1, 0, 17)], ids=str)
def test_losses_and_gradients_are_torchvisions_for_the_same_samples(numbers, monkeypatch):
    # Which were candidates, the indices, which exist.
    draws = []

    def sample(matched, background, sampler):
        drawn = matching.sample_matches(matched, background, sampler)
        draws.append((matched | background, *drawn))
        return drawn

    monkeypatch.setattr(rpn, "sample_matches", sample)
    monkeypatch.setattr(roi_heads, "sample_matches", sample)
    model, plain = build_pair(spread=0.3)
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 24
    samples = make_batch(numbers)
    torch.manual_seed(len(numbers))
    proposals = []
    model.roi_heads.register_forward_pre_hook(lambda _, inputs: proposals.append(inputs[1]))
    found = model(samples)
    assert all(exists.sum() > 0 and index.shape[1] == 24 for _, index, exists in draws)
    given = Drawn(draws)
    ((boxes, scores),) = proposals
    same = [b[s >= 0] for b, s in zip(boxes, scores, strict=True)], None
    with (
        mock.patch.object(plain.rpn, "filter_proposals", lambda *_: same),
        mock.patch.object(plain.rpn, "fg_bg_sampler", given),
        mock.patch.object(plain.roi_heads, "fg_bg_sampler", given),
    ):
        expected = plain(*torchvision_inputs(samples, 1))
    assert not draws
    assert_same_losses_and_gradients(model, found, plain, expected)
