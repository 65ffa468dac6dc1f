"""What `build_model` gives in every architecture: modeling.build."""

import copy

import pytest
import torch
from model_helpers import (
    ARCHITECTURES,
    FCOS18,
    KEYPOINT,
    KEYPOINTS,
    LOSSES,
    MASK,
    OBJECT_LOSSES,
    PROPOSALS,
    RESNET18,
    RETINA,
    RETINANET18,
    SMALL_HEAD,
    SSDLITE,
    TINY,
    K,
    build,
    initialise_at_most,
    make_cfg,
    make_sample,
    randomize_predictions,
    shapes,
    two_samples,
    two_squares,
)
from torchvision.models.detection import FasterRCNN

from plaintrain.config import get_value
from plaintrain.modeling.build import META_ARCHITECTURES, num_classes_key
from plaintrain.modeling.graph import DetectionGraph
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


def prefer(model, label):
    """Make a detector call everything `label`."""
    if isinstance(model, FasterRCNN):
        biases, classes, label = [model.roi_heads.box_predictor.cls_score.bias], K + 1, label + 1
    elif hasattr(model.head.classification_head, "module_list"):
        biases = [layer.bias for layer in model.head.classification_head.module_list]
        classes, label = K + 1, label + 1
    else:
        biases, classes = [model.head.classification_head.cls_logits.bias], K
    for bias in biases:
        bias.data.view(-1, classes)[:, label] = 20.0


# ---- samples in, detections out ----------------------------------------------------------------

WITH_CLASSES = [name for name in ARCHITECTURES if name != "proposals"]


@pytest.mark.parametrize("label", range(K))
@pytest.mark.parametrize("name", WITH_CLASSES, indirect=True)
def test_labels_of_detections_count_from_0(detector, label):
    prefer(detector, label)
    with torch.no_grad():
        (found,) = detector([make_sample(64, 64)])
    # FCOS's score is the root of the class's score times the centre-ness.
    likely = found["scores"] > 0.5
    assert likely[0] and found["labels"][likely].unique().tolist() == [label]


@pytest.mark.parametrize("label", range(K))
@pytest.mark.parametrize("name", WITH_CLASSES, indirect=True)
def test_labels_of_targets_count_from_0(detector, label, name):
    prefer(detector, label)
    detector.train()
    key = "loss_fcos_cls" if name == "fcos" else "loss_cls"
    losses = []
    for target in range(K):
        torch.manual_seed(0)
        losses.append(detector([make_sample(64, 64, [[8, 8, 40, 40]], [target])])[key].item())
    assert losses.index(min(losses)) == label


def test_boxes_are_in_the_original_images_pixels(detector):
    same, resized = make_sample(64, 64), make_sample(64, 64, original=(128, 320))
    with torch.no_grad():
        (found,), (scaled,) = detector([same]), detector([resized])
    assert len(found["boxes"]) > 0
    torch.testing.assert_close(scaled["boxes"], found["boxes"] * torch.tensor([5.0, 2.0, 5.0, 2.0]))
    assert scaled["scores"].equal(found["scores"])
    assert scaled["labels"].equal(found["labels"])


def test_detections_are_sorted_limited_and_inside_their_image(detector, name):
    samples = [make_sample(64, 96, seed=1), make_sample(40, 64, seed=2)]
    with torch.no_grad():
        found = detector(samples)
    assert len(found) == 2
    for output, sample in zip(found, samples, strict=True):
        number = len(output["scores"])
        assert 0 < number <= (1000 if name == "proposals" else 100)
        assert output["boxes"].shape == (number, 4)
        assert output["scores"].diff().le(0).all()
        assert output["scores"].ge(0).all() and output["scores"].le(1).all()
        assert output["labels"].dtype == torch.int64
        assert output["boxes"].min() >= 0
        assert output["boxes"][:, 2].max() <= sample["width"]
        assert output["boxes"][:, 3].max() <= sample["height"]
        assert set(output) - {"masks", "keypoints"} == {"boxes", "scores", "labels"}
        assert ("masks" in output, "keypoints" in output) == (name.startswith("mask"),) * 2


@pytest.mark.parametrize("name", WITH_CLASSES, indirect=True)
def test_an_image_without_detections_is_evaluated(detector, name):
    (detector.roi_heads if isinstance(detector, FasterRCNN) else detector).score_thresh = 1.0
    with torch.no_grad():
        (found,) = detector([make_sample(64, 64, original=(30, 50))])
    assert found["boxes"].shape == (0, 4)
    assert found["scores"].shape == found["labels"].shape == (0,)
    assert found["labels"].dtype == torch.int64
    if name.startswith("mask"):
        assert found["masks"].shape == (0, 30, 50) and found["masks"].dtype == torch.bool
        assert found["keypoints"].shape == (0, KEYPOINTS, 3)


@pytest.mark.parametrize("pooler", ["ROIAlign", "ROIAlignV2"])
@pytest.mark.parametrize("name", ["faster_rcnn", "mask_keypoint_rcnn", "proposals"])
def test_an_image_without_proposals_is_evaluated(name, pooler):
    keys = [f"MODEL.ROI_{head}_HEAD.POOLER_TYPE" for head in ("BOX", "MASK", "KEYPOINT")]
    model = build(*ARCHITECTURES[name], *(part for key in keys for part in (key, pooler))).eval()
    # Every proposal is too small to be one.
    model.rpn.head.bbox_pred.bias.data.view(-1, 4)[:, 2:] = -20
    with torch.no_grad():
        found = model(two_samples())
    for output, size in zip(found, ((64, 96), (80, 64)), strict=True):
        assert output["boxes"].shape == (0, 4) and output["scores"].shape == (0,)
        if name.startswith("mask"):
            assert output["masks"].shape == (0, *size) and output["keypoints"].shape == (0, KEYPOINTS, 3)


# ---- samples in, losses out --------------------------------------------------------------------


def test_losses_are_numbers_above_0(detector, name):
    losses = detector.train()(two_squares())
    assert set(losses) == LOSSES[name]
    assert all(loss.shape == () and loss.item() > 0 for loss in losses.values())


def test_images_without_any_object_can_be_trained_on(detector):
    detector.train()
    for samples in (
        [make_sample(64, 64)],
        [make_sample(64, 64), make_sample(64, 64, [[5, 5, 40, 40]], [1], seed=1)],
    ):
        losses = detector(samples)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
        of_objects = [losses[key].item() for key in losses if key in OBJECT_LOSSES]
        assert all(value == 0 for value in of_objects) == (len(samples) == 1)


def test_training_does_not_change_the_samples(detector):
    detector.train()
    sample = make_sample(64, 64, [[5, 5, 40, 40]], [1])
    before = {key: value.clone() for key, value in {"image": sample["image"], **sample["target"]}.items()}
    detector([sample])
    after = {"image": sample["image"], **sample["target"]}
    assert all(after[key].equal(before[key]) for key in before)


WHOLE = {
    "mask_keypoint_rcnn": (*RESNET18, *SMALL_HEAD, *MASK, *KEYPOINT),
    "mask_rcnn_v2": (
        *RESNET18, *MASK, "MODEL.FPN.NORM", "BN", "MODEL.RPN.CONV_DIMS", [-1, -1],
        "MODEL.ROI_BOX_HEAD.NUM_CONV", 2, "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.NORM", "BN",
        "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.NORM", "GN",
    ),
    "resnet_gn": (*RESNET18, *SMALL_HEAD, "MODEL.RESNETS.NORM", "GN"),
    "mobilenet": (
        "MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone", "MODEL.RESNETS.NORM", "BN",
        "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]], *SMALL_HEAD,
    ),
    "retinanet": RETINANET18,
    "retinanet_res5": (*RETINANET18, "MODEL.FPN.P6_IN_FEATURE", "res5", "MODEL.RETINANET.NORM", "GN"),
    "retinanet_tiny_bn": (*TINY, *RETINA, "MODEL.TINY.NORM", "BN", "MODEL.TINY.NUM_LEVELS", 3),
    "fcos": FCOS18,
    "proposals": (*RESNET18, *PROPOSALS),
    "ssdlite": SSDLITE,
    "ssd300": (
        "MODEL.META_ARCHITECTURE", "SSD", "MODEL.BACKBONE.NAME", "build_ssd_vgg16_backbone",
        "INPUT.FIXED_SIZE", (300, 300),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_reach_every_parameter_that_is_trained(name):
    with initialise_at_most(10**7):
        model = build(*WHOLE[name], "MODEL.BACKBONE.FREEZE_AT", 1)
    side = {"ssdlite": 320, "ssd300": 300, "fcos": 256, "retinanet_res5": 256}.get(name, 128)
    # One for each level of SSD.
    boxes = [
        [4, 4, 4 + side * share // 100, 4 + side * share // 100] for share in (10, 20, 35, 50, 65, 80, 95)
    ]
    samples = [make_sample(side, side, boxes, [0, 1, 2, 0, 1, 2, 0], seed) for seed in (1, 2)]
    losses = model(samples[: 1 if name == "ssd300" else 2])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 20
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in trained.items() if not p.grad.any()] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


# ---- nothing is kept from batch to batch -------------------------------------------------------

# Of two images each: an image of 66, 40 or 22 pixels and the map of a padded batch have the wrong ratio.
HEIGHTS = [(66, 40), (40, 23), (22, 20), (96, 64)]


def outputs_of(model, samples):
    """(losses, gradients, detections, what the exported graph gives for the first image)."""
    torch.manual_seed(0)
    model.zero_grad()
    losses = model.train()(samples)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        detections = model.eval()(samples)
        return losses, gradients, detections, DetectionGraph(model)(samples[0]["image"][None])


@pytest.mark.parametrize("name", ["mask_keypoint_rcnn", "proposals", "retinanet", "fcos"], indirect=True)
def test_results_do_not_depend_on_earlier_batches(detector):
    batches = [
        [make_sample(h, 72, [[2, 3, 50, h - 4]], [i], seed=h + i) for i, h in enumerate(heights)]
        for heights in HEIGHTS
    ]
    # Each by a model that has seen nothing, as one that a resumed run or --eval-only has built.
    expected = [outputs_of(copy.deepcopy(detector), batch) for batch in batches]
    assert all(len(found["boxes"]) for _, _, detections, _ in expected for found in detections)
    for order in ([0, 1, 2, 3, 0], [3, 2, 1, 0, 3]):
        used = copy.deepcopy(detector)
        for i in order:
            torch.testing.assert_close(outputs_of(used, batches[i]), expected[i], rtol=0, atol=0)


# ---- what is built -----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (build(*TINY, *SMALL_HEAD, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(first[name].equal(second[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


def test_names_with_frozen_norms_are_those_without_the_counters():
    frozen = shapes(build(*RESNET18, *SMALL_HEAD, "MODEL.RESNETS.NORM", "FrozenBN"))
    trained = shapes(build(*RESNET18, *SMALL_HEAD))
    assert frozen == {k: v for k, v in trained.items() if not k.endswith("num_batches_tracked")}
    assert frozen != trained


@pytest.mark.parametrize("architecture", META_ARCHITECTURES)
def test_the_number_of_classes_has_its_own_key(architecture):
    cfg = make_cfg("MODEL.META_ARCHITECTURE", architecture)
    assert get_value(cfg, num_classes_key(cfg)) == K


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("MODEL.META_ARCHITECTURE", "FasterRCNN"), ["META_ARCHITECTURE", "'FasterRCNN'", "GeneralizedRCNN"]),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 0), ["ROI_HEADS.NUM_CLASSES", "0", "default_setup"]),
        ((*PROPOSALS, "MODEL.ROI_HEADS.NUM_CLASSES", 0), ["ROI_HEADS.NUM_CLASSES", "0", "default_setup"]),
        ((*RETINA, "MODEL.RETINANET.NUM_CLASSES", -1), ["RETINANET.NUM_CLASSES", "-1", "default_setup"]),
        (("MODEL.DEVICE", "gpu"), ["MODEL.DEVICE", "'gpu'"]),
    ],
)
def test_settings_that_cannot_be_built_are_clear_errors(keys, words):
    with pytest.raises(UserError) as error:
        build(*TINY, *keys)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)


def test_a_cuda_device_that_is_not_there_is_a_clear_error():
    name = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match=rf"MODEL\.DEVICE is '{name}'"):
        build(*TINY, "MODEL.DEVICE", name)
