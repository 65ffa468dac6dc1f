"""What `build_model` returns in every architecture: keys, errors, samples in, losses and detections out."""

import copy
import re
from operator import attrgetter

import pytest
import torch
from model_helpers import (
    ARCHITECTURES,
    FCOS,
    KEYPOINT,
    LOSSES,
    MASK,
    PROPOSALS,
    RCNN_V2,
    RESNET18,
    RETINA,
    RETINANET18,
    SMALL_HEAD,
    SSD,
    SSDLITE,
    TINY,
    K,
    build,
    make_sample,
    norm_types,
    randomize_predictions,
    two_samples,
    two_squares,
)
from torch import nn

from plaintrain.export.graph import DetectionGraph
from plaintrain.modeling.rcnn import GeneralizedRCNN
from plaintrain.utils.errors import UserError


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture
def detector(name):
    """A small detector of each architecture, in evaluation mode, that finds something anywhere."""
    model = build(*ARCHITECTURES[name]).eval()
    randomize_predictions(model)
    return model


def thresholds(matcher):
    return [matcher.low_threshold, matcher.high_threshold]


def widths(head):
    return [layer.out_channels for layer in head.modules() if isinstance(layer, nn.Conv2d)]


def pooler_type(pooler):
    return "ROIAlignV2" if pooler.aligned else "ROIAlign"


def dense_keys(node):
    return [
        (f"MODEL.{node}.SCORE_THRESH_TEST", 0.07, "score_thresh"),
        (f"MODEL.{node}.NMS_THRESH_TEST", 0.43, "nms_thresh"),
        (f"MODEL.{node}.TOPK_CANDIDATES_TEST", 108, "topk_candidates"),
        ("TEST.DETECTIONS_PER_IMAGE", 17, "detections_per_img"),
    ]


# Base keys; then each key, its value, and the attribute of the model that must have this value.
KEYS = {
    "faster_rcnn": [
        (*TINY, *MASK, *KEYPOINT),
        ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 101, lambda m: m.rpn._pre_nms_top_n["training"]),
        ("MODEL.RPN.PRE_NMS_TOPK_TEST", 102, lambda m: m.rpn._pre_nms_top_n["testing"]),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 103, lambda m: m.rpn._post_nms_top_n["training"]),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", 104, lambda m: m.rpn._post_nms_top_n["testing"]),
        ("MODEL.RPN.NMS_THRESH", 0.61, "rpn.nms_thresh"),
        ("MODEL.RPN.SCORE_THRESH", 0.02, "rpn.score_thresh"),
        ("MODEL.RPN.IOU_THRESHOLDS", [0.21, 0.62], lambda m: thresholds(m.rpn.proposal_matcher)),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 105, "rpn.fg_bg_sampler.batch_size_per_image"),
        ("MODEL.RPN.POSITIVE_FRACTION", 0.31, "rpn.fg_bg_sampler.positive_fraction"),
        ("MODEL.RPN.CONV_DIMS", [-1, -1], lambda m: [-1] * len(m.rpn.head.conv)),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.41], lambda m: thresholds(m.roi_heads.proposal_matcher)[:1]),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 106, "roi_heads.fg_bg_sampler.batch_size_per_image"),
        ("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.32, "roi_heads.fg_bg_sampler.positive_fraction"),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.07, "roi_heads.score_thresh"),
        ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.43, "roi_heads.nms_thresh"),
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 6, lambda m: m.roi_heads.box_roi_pool.output_size[0]),
        ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 3, "roi_heads.box_roi_pool.sampling_ratio"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2", lambda m: pooler_type(m.roi_heads.box_roi_pool)),
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign", lambda m: pooler_type(m.roi_heads.mask_roi_pool)),
        ("MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIAlignV2",
         lambda m: pooler_type(m.roi_heads.keypoint_roi_pool)),
        ("MODEL.ROI_BOX_HEAD.FC_DIM", 24, lambda m: len(m.roi_heads.box_head.fc6.weight)),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 2.0, 3.0, 4), "roi_heads.box_coder.weights"),
        ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7, lambda m: m.roi_heads.mask_roi_pool.output_size[1]),
        ("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 3, "roi_heads.mask_roi_pool.sampling_ratio"),
        ("MODEL.ROI_MASK_HEAD.NUM_CONV", 3, lambda m: len(widths(m.roi_heads.mask_head))),
        ("MODEL.ROI_MASK_HEAD.CONV_DIM", 24, lambda m: widths(m.roi_heads.mask_head)[-1]),
        ("MODEL.ROI_MASK_HEAD.NORM", "GN", lambda m: "GN" if norm_types(m.roi_heads.mask_head) else ""),
        ("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", 8,
         lambda m: m.roi_heads.keypoint_roi_pool.output_size[0]),
        ("MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", 1, "roi_heads.keypoint_roi_pool.sampling_ratio"),
        ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [12, 20], lambda m: widths(m.roi_heads.keypoint_head)),
        ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 7,
         "roi_heads.keypoint_predictor.kps_score_lowres.out_channels"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 9,
         lambda m: m.roi_heads.mask_predictor.mask_fcn_logits.out_channels - 1),
        ("TEST.DETECTIONS_PER_IMAGE", 17, "roi_heads.detections_per_img"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16, 24]],
         lambda m: [list(sizes) for sizes in m.rpn.anchor_generator.sizes]),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.4, 1.5]],
         lambda m: [list(ratios) for ratios in m.rpn.anchor_generator.aspect_ratios]),
    ],
    "retinanet": [
        (*TINY, *RETINA),
        ("MODEL.RETINANET.NUM_CLASSES", 9, "head.classification_head.num_classes"),
        ("MODEL.RETINANET.IOU_THRESHOLDS", [0.31, 0.52], lambda m: thresholds(m.proposal_matcher)),
        *dense_keys("RETINANET"),
        ("MODEL.RETINANET.BBOX_REG_WEIGHTS", (1.0, 2.0, 3.0, 4.0), "box_coder.weights"),
    ],
    "fcos": [
        (*TINY, *FCOS),
        ("MODEL.FCOS.NUM_CLASSES", 9, "head.classification_head.num_classes"),
        ("MODEL.FCOS.NUM_CONVS", 2, lambda m: len(widths(m.head.regression_head.conv))),
        ("MODEL.FCOS.CENTER_SAMPLING_RADIUS", 2.5, "center_sampling_radius"),
        *dense_keys("FCOS"),
    ],
    "ssd": [
        (*TINY, *SSD),
        ("MODEL.SSD.NUM_CLASSES", 9, lambda m: m.head.classification_head.num_columns - 1),
        ("MODEL.SSD.MIN_RATIO", 0.25, lambda m: m.anchor_generator.scales[0]),
        ("MODEL.SSD.MAX_RATIO", 0.75, lambda m: m.anchor_generator.scales[1]),
        ("MODEL.SSD.STEPS", [5, 9], "anchor_generator.steps"),
        ("MODEL.SSD.ASPECT_RATIOS", [[3], [2]], "anchor_generator.aspect_ratios"),
        ("MODEL.SSD.IOU_THRESHOLD", 0.6, "proposal_matcher.high_threshold"),
        ("MODEL.SSD.POSITIVE_FRACTION", 0.25, lambda m: 1 / (m.neg_to_pos_ratio + 1)),
        *dense_keys("SSD"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("architecture", KEYS)
def test_each_key_reaches_the_model(architecture):
    base, *rows = KEYS[architecture]
    model = build(*base, *(part for key, value, _ in rows for part in (key, value)))
    for key, value, found in rows:
        assert (attrgetter(found)(model) if isinstance(found, str) else found(model)) == value, key


RCNN = (*TINY, *SMALL_HEAD)
GIOU = ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou")
BAD_SETTINGS = [
    (RCNN, "MODEL.META_ARCHITECTURE", "FasterRCNN", "must be one of GeneralizedRCNN, .* 'FasterRCNN'"),
    (RCNN, "MODEL.DEVICE", "gpu", r"MODEL\.DEVICE must be .* got 'gpu'"),
    (RCNN, "MODEL.DEVICE", f"cuda:{torch.cuda.device_count()}", r"MODEL\.DEVICE must be .* got 'cuda"),
    (RCNN, "MODEL.ROI_HEADS.NUM_CLASSES", 0, "NUM_CLASSES must .* got 0; default_setup"),
    ((*TINY, *RETINA), "MODEL.RETINANET.NUM_CLASSES", -1, "NUM_CLASSES must .* got -1; default_setup"),
    ((), "MODEL.BACKBONE.NAME", "build_resnet_fpn", "NAME must .*did you mean build_resnet_fpn_b"),
    (RESNET18, "MODEL.BACKBONE.FREEZE_AT", 6, "FREEZE_AT must be 0 to 5, got 6"),
    (TINY, "MODEL.TINY.NUM_LEVELS", 0, "TINY.NUM_LEVELS must be 1 to 3, .* got 0"),
    (TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]], r"SIZES must .* 1 levels.*\[\[32\], \[64\]\]"),
    (RESNET18, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0], [0.5]], "ASPECT_RATIOS must .* 5 levels"),
    (TINY, "MODEL.ANCHOR_GENERATOR.SIZES", [[]], "SIZES must be one list"),
    ((*TINY, *PROPOSALS), "MODEL.RPN.CONV_DIMS", [64], "CONV_DIMS must hold -1 or 32 .*64"),
    ((*RCNN, *KEYPOINT), "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 0, "NUM_KEYPOINTS must .*; default_setup"),
    ((*TINY, *FCOS), "MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16]], r"one anchor.*SIZES \[\[8\]\].*FCOS\.yaml"),
    ((*TINY, *FCOS), "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]], r"ASPECT_RATIOS \[\[1.0\]\]"),
    ((*TINY, *FCOS), "MODEL.TINY.OUT_CHANNELS", 40, "multiple of 32.* 40"),
    ((*TINY, *SSD), "MODEL.SSD.ASPECT_RATIOS", [], r"SSD.ASPECT_RATIOS must have 2 .* got \[\]"),
    ((*TINY, *SSD), "MODEL.SSD.SCALES", [0.1, 0.2], "SSD.SCALES must have 3 .* got .0.1, 0.2"),
    ((*TINY, *SSD), "MODEL.SSD.STEPS", [8, 16, 32], "SSD.STEPS must have 2 .* got .8, 16, 32"),
    (TINY, "MODEL.TINY.CHANNELS", [], "TINY.CHANNELS must be 1 or more numbers"),
    (RESNET18, "MODEL.RESNETS.NUM_GROUPS", 32, "NUM_GROUPS must be 1 with MODEL.RESNETS.DEPTH 18"),
    (RESNET18, "MODEL.RESNETS.STRIDE_IN_1X1", True, "STRIDE_IN_1X1 must be False with .*DEPTH 18"),
    (RESNET18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "RES2_OUT_CHANNELS must be 0 or 64"),
    (RETINANET18, "MODEL.FPN.P6_IN_FEATURE", "p4", "P6_IN_FEATURE must be 'p5' or 'res5'"),
    (TINY, "MODEL.PIXEL_MEAN", [1.0], "PIXEL_MEAN must be 3 numbers"),
    (RCNN, "MODEL.RPN.IOU_THRESHOLDS", [0.5], "RPN.IOU_THRESHOLDS must be 2"),
    (RCNN, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.4, 0.6], "ROI_HEADS.IOU_THRESHOLDS must be a list of one"),
    (RCNN, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", float("nan"), "SMOOTH_L1_BETA must be at least 0 .* got nan"),
    ((*TINY, *RETINA), "MODEL.RETINANET.FOCAL_LOSS_ALPHA", 1.5, "ALPHA must be 0 to 1, or -1 for none"),
    ((*TINY, *RETINA, *GIOU), "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.1, "BETA must be 0.0 with .* giou"),
    ((*TINY, *RETINA), "MODEL.KEYPOINT_ON", True, "KEYPOINT_ON must be False with .* RetinaNet"),
    ((*TINY, *SSD), "INPUT.FIXED_SIZE", (300,), "FIXED_SIZE must be a height and a width"),
    (RETINA, "MODEL.BACKBONE.NAME", "build_ssd_vgg16_backbone", "'SSD' with MODEL.BACKBONE.NAME build_ssd_v"),
    (SSD, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "NAME must be a backbone without FPN .*SSD"),
    ((), "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone", "'RetinaNet' or 'FCOS' with MODEL.BA"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "key", "value", "message"), BAD_SETTINGS)
def test_bad_settings_are_rejected(base, key, value, message):
    # Keys of the table in `plaintrain.config.schema` have one form of message.
    with pytest.raises(UserError, match=f"{message}|^{key} must be .*, got {re.escape(repr(value))}$"):
        build(*base, key, value)


def prefer(model, label):
    """Make a detector call everything `label`."""
    if isinstance(model, GeneralizedRCNN):
        biases, classes, label = [model.roi_heads.box_predictor.cls_score.bias], K + 1, label + 1
    elif hasattr(model.head.classification_head, "module_list"):
        biases = [layer.bias for layer in model.head.classification_head.module_list]
        classes, label = K + 1, label + 1
    else:
        biases, classes = [model.head.classification_head.cls_logits.bias], K
    for bias in biases:
        bias.data.view(-1, classes)[:, label] = 20.0


@pytest.mark.parametrize("label", [0, K - 1])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "proposals"], indirect=True)
def test_labels_of_detections_and_targets_count_from_0(detector, label, name):
    prefer(detector, label)
    with torch.no_grad():
        (found,) = detector([make_sample(64, 64)])
    # FCOS's score is the root of the class's score times the centre-ness.
    likely = found["scores"] > 0.5
    assert likely[0] and found["labels"][likely].unique().tolist() == [label]
    detector.train()
    key = "loss_fcos_cls" if name == "fcos" else "loss_cls"
    losses = []
    for target in range(K):
        torch.manual_seed(0)
        losses.append(detector([make_sample(64, 64, [[8, 8, 40, 40]], [target])])[key].item())
    assert losses.index(min(losses)) == label


def test_detections_are_sorted_limited_and_in_the_original_images_pixels(detector, name):
    samples = [make_sample(64, 96, seed=1), make_sample(40, 64, seed=2)]
    resized = [make_sample(64, 96, seed=1, original=(128, 480)), samples[1]]
    with torch.no_grad():
        found, (scaled, _) = detector(samples), detector(resized)
    for output, sample in zip(found, samples, strict=True):
        number = len(output["scores"])
        assert 0 < number <= (1000 if name == "proposals" else 100)
        assert output["boxes"].shape == (number, 4) and output["labels"].dtype == torch.int64
        assert output["scores"].diff().le(0).all()
        assert output["scores"].ge(0).all() and output["scores"].le(1).all()
        assert output["boxes"].min() >= 0
        assert output["boxes"][:, 2].max() <= sample["width"]
        assert output["boxes"][:, 3].max() <= sample["height"]
        assert set(output) - {"masks", "keypoints"} == {"boxes", "scores", "labels"}
        assert ("masks" in output, "keypoints" in output) == (name.startswith("mask"),) * 2
    torch.testing.assert_close(scaled["boxes"], found[0]["boxes"] * torch.tensor([5.0, 2.0, 5.0, 2.0]))
    assert scaled["scores"].equal(found[0]["scores"]) and scaled["labels"].equal(found[0]["labels"])


def test_losses_are_positive_and_leave_the_samples_as_they_are(detector, name):
    samples = two_squares()
    before = copy.deepcopy(samples)
    losses = detector.train()(samples)
    assert set(losses) == LOSSES[name]
    assert all(loss.shape == () and loss.item() > 0 for loss in losses.values())
    for sample, same in zip(samples, before, strict=True):
        assert sample["image"].equal(same["image"])
        assert all(sample["target"][key].equal(value) for key, value in same["target"].items())


@pytest.mark.parametrize("name", ["faster_rcnn", "proposals"], indirect=True)
def test_boxes_without_an_area_are_rejected(detector):
    samples = two_samples()
    samples[1]["target"]["boxes"][0, 2] = 10.0
    with pytest.raises(AssertionError, match=r"positive height and width, got \[10.0, 10.0, 10.0, 70.0\]"):
        detector.train()(samples)
    # Detectron2's mappers return instances.
    samples[1]["instances"] = samples[1].pop("target")
    with pytest.raises(UserError, match=r"must return a 'target' with boxes .* labels .* keys .*instances"):
        detector(samples)


WHOLE = {
    "mask_keypoint_rcnn": (*RESNET18, *SMALL_HEAD, *MASK, *KEYPOINT),
    "mask_rcnn_v2": RCNN_V2,
    "mobilenet": (
        "MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone", "MODEL.RESNETS.NORM", "BN",
        "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]], *SMALL_HEAD,
    ),
    "retinanet_res5": (*RETINANET18, "MODEL.FPN.P6_IN_FEATURE", "res5", "MODEL.RETINANET.NORM", "GN"),
    "fcos": (*RETINANET18, *FCOS, "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
    "ssdlite": SSDLITE,
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_reach_every_parameter_that_is_trained(name):
    model = build(*WHOLE[name], "MODEL.BACKBONE.FREEZE_AT", 1)
    side = {"ssdlite": 320, "fcos": 256, "retinanet_res5": 256}.get(name, 128)
    # One for each level of SSD.
    ends = [4 + side * percent // 100 for percent in (10, 20, 35, 50, 65, 80, 95)]
    boxes = [[4, 4, end, end] for end in ends]
    losses = model([make_sample(side, side, boxes, [0, 1, 2, 0, 1, 2, 0], seed) for seed in (1, 2)])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 20
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in trained.items() if not p.grad.any()] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def outputs_of(model, samples):
    """(losses, gradients, detections, what the exported graph gives for the first image)."""
    # Training cannot use the tensors of inference mode.
    with torch.inference_mode():
        detections = model.eval()(samples)
        graph_outputs = DetectionGraph(model)(samples[0]["image"][None])
    torch.manual_seed(0)
    model.zero_grad()
    losses = model.train()(samples)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return losses, gradients, detections, graph_outputs


@pytest.mark.parametrize("name", ["mask_keypoint_rcnn", "retinanet", "fcos"], indirect=True)
def test_results_do_not_depend_on_earlier_batches(detector):
    # An image of 66 or 22 pixels and the map of a padded batch have the wrong ratio.
    batches = [
        [make_sample(h, 72, [[2, 3, 50, h - 4]], [i], seed=h + i) for i, h in enumerate(heights)]
        for heights in ((66, 40), (22, 20), (96, 64))
    ]
    # Each by a model that has seen nothing, as one that a resumed run or --eval-only has built.
    expected = [outputs_of(copy.deepcopy(detector), batch) for batch in batches]
    assert all(len(found["boxes"]) for _, _, detections, _ in expected for found in detections)
    for i in (2, 1, 0, 2):
        torch.testing.assert_close(outputs_of(detector, batches[i]), expected[i], rtol=0, atol=0)
