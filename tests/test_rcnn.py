"""Faster, Mask and Keypoint R-CNN and their proposals, held against torchvision's: modeling.rcnn."""

import pytest
import torch
from model_helpers import (
    KEYPOINT,
    KEYPOINTS,
    MASK,
    PIXELS_TO_1,
    PROPOSALS,
    RESNET18,
    SMALL_HEAD,
    TINY,
    K,
    assert_finds_what_torchvision_finds,
    assert_same_detections,
    assert_same_losses,
    build,
    different_settings,
    make_cfg,
    make_sample,
    norm_types,
    randomize_predictions,
    torchvision_backbone,
    torchvision_inputs,
    torchvision_pair,
    transform_arguments,
    two_samples,
)
from torch import nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from plaintrain.export import describe
from plaintrain.masks import sample_masks
from plaintrain.modeling import roi_heads
from plaintrain.modeling.tta import DetectorWithTTA
from plaintrain.utils.errors import UserError

LOSSES = {
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
}

# ---- torchvision's architectures ---------------------------------------------------------------

# torchvision's name -> eps of its frozen norms, and arguments of its function.
TORCHVISION = {
    "fasterrcnn_resnet50_fpn": {"eps": 0.0},
    "fasterrcnn_resnet50_fpn_v2": {},
    "fasterrcnn_mobilenet_v3_large_fpn": {"eps": 1e-5},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"eps": 1e-5},
    "maskrcnn_resnet50_fpn": {"eps": 0.0},
    "maskrcnn_resnet50_fpn_v2": {},
    "keypointrcnn_resnet50_fpn": {"eps": 0.0, "num_keypoints": KEYPOINTS},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_architectures_load_and_find_the_same(name):
    size = (96, 128)
    model, plain = torchvision_pair(name, size, label_offset=1, **TORCHVISION[name])
    different = different_settings(model, plain)
    if "mobilenet" in name:
        # torchvision's names of levels that it does not have.
        assert different.pop("roi_heads.box_roi_pool.featmap_names")
    if "mask" in name:
        assert different.pop("masks_aligned") == different.pop("roi_heads.masks_aligned") == (False, None)
    assert not different
    for network in (model, plain):
        # Few, for speed, and whatever their scores.
        network.rpn._pre_nms_top_n["testing"] = network.rpn._post_nms_top_n["testing"] = 40
        network.rpn.score_thresh = network.roi_heads.score_thresh = 0.0
        network.roi_heads.detections_per_img = 8
    assert_finds_what_torchvision_finds(model, plain, size, label_offset=1)


# ---- losses, detections and proposals of small ones --------------------------------------------


def torchvision_rcnn(model=FasterRCNN, **kwargs):
    """torchvision's R-CNN that RESNET18 and SMALL_HEAD describe."""
    backbone = torchvision_backbone([1, 2, 3, 4], LastLevelMaxPool())
    return model(
        backbone,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 5, 2),
        box_head=TwoMLPHead(32 * 25, 32),
        box_predictor=FastRCNNPredictor(32, K + 1),
        rpn_post_nms_top_n_train=1000,
        **{**transform_arguments(), **kwargs},
    )


def torchvision_mask_rcnn():
    return torchvision_rcnn(
        MaskRCNN,
        mask_head=MaskRCNNHeads(32, (16, 16), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, K + 1),
    )


def torchvision_keypoint_rcnn():
    return torchvision_rcnn(
        KeypointRCNN,
        keypoint_head=KeypointRCNNHeads(32, (16, 16)),
        keypoint_predictor=KeypointRCNNPredictor(16, KEYPOINTS),
    )


MODELS = {
    "faster": ((), torchvision_rcnn, {}),
    "mask": (
        (*MASK, "MODEL.ROI_MASK_HEAD.ALIGNED", False),
        torchvision_mask_rcnn,
        {"loss_mask": "loss_mask"},
    ),
    "keypoint": (KEYPOINT, torchvision_keypoint_rcnn, {"loss_keypoint": "loss_keypoint"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_torchvisions(name):
    keys, make, names = MODELS[name]
    model, plain = build(*RESNET18, *SMALL_HEAD, *keys), make()
    # All are sampled: the two do not draw alike.
    for part in (model.rpn, plain.rpn, model.roi_heads, plain.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 10**6
    randomize_predictions(model, spread=0.1)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    found, expected = model(samples), plain(*torchvision_inputs(samples, label_offset=1))
    assert_same_losses(found, expected, LOSSES | names)


def test_the_keypoint_loss_has_a_weight():
    losses = []
    for weight in (1.0, 0.25):
        model = build(*TINY, *SMALL_HEAD, *KEYPOINT, "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT", weight)
        torch.manual_seed(7)
        losses.append(model(two_samples()))
    assert losses[1]["loss_keypoint"].item() == pytest.approx(losses[0]["loss_keypoint"].item() / 4)
    assert losses[1]["loss_cls"] == losses[0]["loss_cls"]


def test_detections_of_a_batch_are_torchvisions():
    model = build(*RESNET18, *SMALL_HEAD, *PIXELS_TO_1).eval()
    plain = torchvision_rcnn(**transform_arguments((0, 0, 0), (255, 255, 255))).eval()
    randomize_predictions(model)
    plain.load_state_dict(model.state_dict())
    samples = two_samples()
    with torch.no_grad():
        found, expected = model(samples), plain(torchvision_inputs(samples, 1)[0])
    assert_same_detections(found, expected, label_offset=1, at_least=10)


def test_masks_and_keypoints_are_in_the_original_images_pixels():
    model = build(*TINY, *SMALL_HEAD, *MASK, *KEYPOINT, "TEST.DETECTIONS_PER_IMAGE", 5).eval()
    randomize_predictions(model)
    with torch.no_grad():
        (found,) = model([make_sample(64, 96)])
        (scaled,) = model([make_sample(64, 96, original=(128, 480))])
    assert found["masks"].shape == (5, 64, 96) and found["keypoints"].shape == (5, KEYPOINTS, 3)
    assert scaled["masks"].shape == (5, 128, 480) and scaled["masks"].dtype == torch.bool
    torch.testing.assert_close(scaled["keypoints"], found["keypoints"] * torch.tensor([5.0, 2.0, 1.0]))
    for mask, (x0, y0, x1, y1) in zip(scaled["masks"], scaled["boxes"].tolist(), strict=True):
        y, x = mask.nonzero(as_tuple=True)
        assert x0 <= x.min() + 0.5 and x.max() + 0.5 <= x1
        assert y0 <= y.min() + 0.5 and y.max() + 0.5 <= y1
    points = scaled["keypoints"][..., :2]
    assert (points >= scaled["boxes"][:, None, :2] - 1).all()
    assert (points <= scaled["boxes"][:, None, 2:] + 1).all()


def test_proposals_are_those_of_torchvisions_rpn():
    detector = torchvision_rcnn(**transform_arguments((0, 0, 0), (255, 255, 255))).eval()
    randomize_predictions(detector)
    model = build(*RESNET18, *PROPOSALS, *PIXELS_TO_1, "MODEL.RPN.POST_NMS_TOPK_TEST", 60).eval()
    detector.rpn._post_nms_top_n["testing"] = 60
    state = detector.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k.startswith(("backbone.", "rpn."))})
    samples = two_samples()
    with torch.no_grad():
        images, _ = detector.transform(torchvision_inputs(samples)[0])
        expected, _ = detector.rpn(images, detector.backbone(images.tensors))
        found = model(samples)
    for ours, boxes in zip(found, expected, strict=True):
        assert len(boxes) == 60
        torch.testing.assert_close(ours["boxes"], boxes, rtol=1e-5, atol=1e-4)
        assert ours["scores"].diff().le(0).all() and ours["scores"].unique().numel() > 50
        assert ours["scores"].min() > 0 and ours["scores"].max() < 1
        assert ours["labels"].equal(torch.zeros(60, dtype=torch.int64))


def test_proposals_are_scored_by_their_own_anchors():
    model = build(*TINY, *PROPOSALS, "MODEL.RPN.NMS_THRESH", 1.0).eval()
    randomize_predictions(model)
    # Boxes are their anchors, far enough inside the image not to be clipped.
    for parameter in model.rpn.head.bbox_pred.parameters():
        parameter.data.zero_()
    sample = make_sample(64, 64)
    with torch.no_grad():
        (found,) = model([sample])
        images, _ = model.transform([sample["image"]])
        features = list(model.backbone(images.tensors).values())
        (objectness,), _ = model.rpn.head(features)
        (anchors,) = model.rpn.anchor_generator(images, features)
    objectness = objectness[0].permute(1, 2, 0).flatten().sigmoid()
    inside = (anchors.min(dim=1).values >= 0) & (anchors.max(dim=1).values <= 64)
    assert inside.sum() > 20
    for anchor, score in zip(anchors[inside], objectness[inside], strict=True):
        same = (found["boxes"] - anchor).abs().amax(dim=1) < 1e-3
        assert (found["scores"][same] - score).abs().min() < 1e-5


def test_losses_of_proposals_are_those_of_the_rpn_in_faster_rcnn():
    detector, model = build(*TINY, *SMALL_HEAD), build(*TINY, *PROPOSALS)
    state = {k: v for k, v in detector.state_dict().items() if k.startswith(("backbone.", "rpn."))}
    model.load_state_dict(state)
    torch.manual_seed(7)
    expected = detector(two_samples())
    torch.manual_seed(7)
    found = model(two_samples())
    assert found == {name: expected[name] for name in ("loss_rpn_cls", "loss_rpn_loc")}


# ---- heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
def test_masks_lie_in_their_boxes_as_the_config_says_in_training_and_evaluation(aligned, monkeypatch):
    key, calls = "MODEL.ROI_MASK_HEAD.ALIGNED", []
    model = build(*TINY, *SMALL_HEAD, *MASK, *(() if aligned else (key, False)))
    monkeypatch.setattr(roi_heads, "sample_masks", lambda *args: calls.append(args) or sample_masks(*args))
    assert model(two_samples())["loss_mask"] > 0
    assert len(calls) == 2 and all(call[-1] is aligned for call in calls)
    randomize_predictions(model.eval())
    sample, masks = make_sample(64, 96), []
    sample["views"] = [{"image": sample["image"], "flipped": False}]
    for detector in (model, DetectorWithTTA(model, 0.5, 5)):
        detector.pastes_masks = False
        with torch.no_grad():
            masks.append(detector([sample])[0]["masks"])
    assert all(len(found.boxes) and found.aligned is aligned for found in masks)
    assert describe(make_cfg(*MASK, key, aligned), ["ant"], "x.pth")["masks_aligned"] is aligned


@pytest.mark.parametrize(("convolutions", "layers", "norm"), [(4, 1, "GN"), (1, 2, "BN"), (0, 3, "")])
def test_box_head_has_any_depth_and_norm(convolutions, layers, norm):
    model = build(
        *TINY, *SMALL_HEAD,
        "MODEL.ROI_BOX_HEAD.NUM_CONV", convolutions,
        "MODEL.ROI_BOX_HEAD.NUM_FC", layers,
        "MODEL.ROI_BOX_HEAD.CONV_DIM", 16,
        "MODEL.ROI_BOX_HEAD.NORM", norm,
    )  # fmt: skip
    head = model.roi_heads.box_head
    kinds = [type(m) for m in head.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.Linear)) == (convolutions, layers)
    assert norm_types(head) == {"": set(), "BN": {nn.BatchNorm2d}, "GN": {nn.GroupNorm}}[norm]
    assert all(loss.isfinite() for loss in model(two_samples()).values())


def test_the_box_head_starts_as_detectron2s():
    heads = build(*TINY, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.NUM_FC", 2).roi_heads
    for layer in (m for m in heads.box_head.modules() if isinstance(m, nn.Linear)):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.05)
        assert not layer.bias.any()
    for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not layer.bias.any()
