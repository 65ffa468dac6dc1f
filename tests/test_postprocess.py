"""Detections in evaluation, held against torchvision's: modeling.postprocess, and its sync points."""

from unittest import mock

import pytest
import torch
from model_helpers import ARCHITECTURES, KEYPOINT, MASK, build, make_sample, randomize_predictions
from shared.syncs import count_syncs
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads

from plaintrain.modeling.matching import decode
from plaintrain.modeling.postprocess import heatmaps_to_keypoints

SIZES = [(64, 96), (50, 120), (96, 96)]


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def random_boxes(*shape, side=110.0):
    """XYXY boxes, some without area, some beyond the image."""
    corners = torch.rand(*shape, 2, 2) * side - 5
    low, high = corners.min(dim=-2).values, corners.max(dim=-2).values
    thin = torch.rand(*shape, 1) < 0.1
    return torch.cat([low, torch.where(thin, low + 1e-3, high)], dim=-1)


@pytest.mark.parametrize(("threshold", "number"), [(0.0, 1000), (0.4, 20), (1.1, 1000)])
def test_proposals_are_torchvisions(threshold, number):
    rpn = build(*ARCHITECTURES["proposals"]).rpn.eval()
    rpn.score_thresh, rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"] = threshold, 80, number
    counts = [150, 60, 12]
    anchors, logits = random_boxes(sum(counts)), torch.randn(3, sum(counts))
    deltas = torch.randn(3, sum(counts), 4)
    images = ImageList(torch.zeros(3, 3, 96, 120), SIZES)
    with (
        mock.patch.object(rpn, "predict", lambda features: (logits, deltas, counts)),
        mock.patch.object(rpn.anchor_generator, "forward", lambda *_: [anchors] * 3),
    ):
        (boxes, scores), losses = rpn(images, {})
    decoded = decode(deltas, anchors, rpn.box_coder)
    expected = rpn.filter_proposals(decoded, logits.flatten()[:, None], SIZES, counts)
    lengths = (scores >= 0).sum(dim=1).tolist()
    found = [[part[:n] for part, n in zip(values, lengths, strict=True)] for values in (boxes, scores)]
    torch.testing.assert_close(found, list(expected), rtol=0, atol=0)
    assert losses == {}
    assert max(lengths) == (0 if threshold > 1 else min(number, max(lengths))) and max(lengths) <= number
    assert lengths == [0] * 3 or min(lengths) >= min(number, 20)


@pytest.mark.parametrize(
    ("numbers", "parts", "threshold"),
    [
        ((40, 25, 60), (*MASK, *KEYPOINT), 0.0),
        ((40, 25, 60), MASK, 0.4),
        ((30, 0, 7), KEYPOINT, 0.0),
        ((40, 25, 60), KEYPOINT, 1.0),
        ((0, 0, 0), (*MASK, *KEYPOINT), 0.0),
    ],
)
def test_detections_in_regions_are_torchvisions(numbers, parts, threshold):
    model = build(*ARCHITECTURES["faster_rcnn"], *parts).eval()
    randomize_predictions(model)
    heads = model.roi_heads
    heads.score_thresh, heads.detections_per_img = threshold, 30
    features = {"0": torch.randn(3, 32, 16, 16)}
    proposals = [random_boxes(number) for number in numbers]
    padded = pad_sequence(proposals, batch_first=True)
    scores = pad_sequence([torch.rand(number) for number in numbers], batch_first=True, padding_value=-1)
    found, _ = heads(features, (padded, scores), SIZES)
    expected, _ = RoIHeads.forward(heads, features, proposals, SIZES)
    for detection in expected:
        detection["labels"] = detection["labels"] - 1
        if "keypoints" in detection:
            detection["keypoints"][..., 2] = detection.pop("keypoints_scores")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    lengths = [len(detection["scores"]) for detection in found]
    assert (max(lengths) > 15) == (threshold == 0 and max(numbers) > 15) or threshold == 0.4


def test_keypoint_scores_are_the_logit_or_detectron2s_probability():
    maps = torch.randn(2, 3, 14, 14)
    boxes = torch.tensor([[4.0, 4, 18, 18], [2, 2, 16, 16]])  # as large as the maps
    logits = heatmaps_to_keypoints(maps, boxes)
    probabilities = heatmaps_to_keypoints(maps, boxes, "probability")
    torch.testing.assert_close(logits[..., 2], maps.amax((2, 3)))
    torch.testing.assert_close(probabilities[..., 2], maps.flatten(2).softmax(dim=2).amax(dim=2))
    torch.testing.assert_close(logits[..., :2], probabilities[..., :2])


# The most sync points that a model may have beside NMS, at any batch size.
SYNCS = {"mask_keypoint_rcnn": 7, "proposals": 2, "ssd": 2, "retinanet": 2, "fcos": 2}


@pytest.mark.parametrize("name", SYNCS)
def test_an_evaluation_has_few_sync_points_at_any_batch_size(name):
    model = build(
        *ARCHITECTURES[name], "MODEL.TINY.NUM_LEVELS", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0
    ).eval()
    model.pastes_masks = False
    randomize_predictions(model)
    samples = [make_sample(64, 64 if name == "ssd" else 96, seed=i) for i in range(4)]
    # The first finds out the strides, once.
    assert all(len(found["scores"]) > 10 for found in model(samples[:1]))
    counts = [count_syncs(lambda n=n: model(samples[:n])) for n in (2, 4)]
    assert [c["syncs"] for c in counts] == [SYNCS[name]] * 2, counts
    assert counts[0]["uploads"] == counts[1]["uploads"] <= 5, counts
    # One NMS an image, two where there are proposals and regions.
    assert counts[1]["nms"] == 2 * counts[0]["nms"] > 0
