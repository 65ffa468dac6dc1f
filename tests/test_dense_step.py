"""The training step of RetinaNet, FCOS and SSD: its sync points, and that it is torchvision's."""

import copy
from unittest import mock

import pytest
import torch
from model_helpers import (
    FCOS,
    RETINA,
    SSD,
    TINY,
    K,
    build,
    make_sample,
    randomize_predictions,
    torchvision_inputs,
    two_samples,
    two_squares,
)
from sync_helpers import count_syncs, training_step
from test_fcos import LOSSES as FCOS_LOSSES
from test_retinanet import LOSSES
from test_ssd import torchvision_ssd
from test_step import BATCHES, make_batch, random_boxes
from torchvision.models import detection
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from plaintrain.modeling import matching
from plaintrain.modeling.fcos import assign_centres
from plaintrain.modeling.losses import focal_loss, giou_loss, smooth_l1_loss
from plaintrain.modeling.matching import match, pad_targets
from plaintrain.modeling.ssd import count_hard

GIOU = ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou")
DETECTRON2 = ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator")
LITE = ("MODEL.TINY.NORM", "BN", "MODEL.SSD.HEAD_NAME", "SSDLiteHead")
TINY_BN = (*TINY, "MODEL.TINY.NORM", "BN")
MODELS = {
    "retinanet": (*TINY, *RETINA),
    "retinanet, giou": (*TINY, *RETINA, *GIOU),
    "retinanet, detectron2": (*TINY, *RETINA, *DETECTRON2),
    "fcos": (*TINY, *FCOS),
    "fcos, detectron2": (*TINY, *FCOS, *DETECTRON2),
    "ssd": (*TINY_BN, *SSD),
    "ssdlite": (*TINY_BN, *SSD, "MODEL.SSD.HEAD_NAME", "SSDLiteHead"),
}


def samples_of(name, numbers):
    """Images with these numbers of objects; of different sizes, if the model takes them."""
    samples = make_batch(numbers)
    if not name.startswith("ssd"):
        return samples
    targets = [sample["target"] for sample in samples]
    boxes = [(target["boxes"] * 0.6 + torch.tensor([0, 0, 4, 4])).long().tolist() for target in targets]
    return [
        make_sample(64, 64, b, t["labels"].tolist(), seed=i)
        for i, (b, t) in enumerate(zip(boxes, targets, strict=True))
    ]


def torchvision_twin(name, model):
    """torchvision's model of the same modules and weights, that takes uint8 images."""
    if name.startswith("ssd"):
        plain = torchvision_ssd("SSDHead" if name == "ssd" else "SSDLiteHead")
    else:
        kind = detection.FCOS if name.startswith("fcos") else detection.RetinaNet
        anchors = model.anchor_generator
        if "detectron2" not in name:
            anchors = AnchorGenerator(anchors.sizes, anchors.aspect_ratios)
        backbone, head = copy.deepcopy((model.backbone, model.head))
        plain = kind(backbone, K, anchor_generator=anchors, head=head)
    plain.load_state_dict(model.state_dict())
    plain.transform = model.transform
    return plain


def inputs_of(samples, label_offset):
    """Images and targets as `torchvision_twin` takes them."""
    return [sample["image"] for sample in samples], torchvision_inputs(samples, label_offset)[1]


# ---- sync points -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("name", ["retinanet", "retinanet, giou", "fcos", "ssd"])
def test_a_training_step_waits_for_nothing_at_any_batch_size(name, batch):
    samples = ((two_squares() if name == "ssd" else two_samples()) * 4)[:batch]
    step = training_step(build(*MODELS[name]), samples)
    # The first makes the anchors.
    step()
    counts = count_syncs(step)
    # The one is the check of the boxes, which are on the host.
    assert counts["syncs"] == 1 and counts["uploads"] == 0, counts


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd"])
def test_torchvisions_own_step_has_more_with_every_image(name):
    model = build(*MODELS[name])
    plain, numbers = torchvision_twin(name, model), []
    for batch in (2, 8):
        samples = ((two_squares() if name == "ssd" else two_samples()) * 4)[:batch]
        step = training_step(plain, *inputs_of(samples, model.label_offset))
        numbers.append(count_syncs(step)["syncs"])
    assert numbers[0] >= 8 and numbers[1] > numbers[0] + 10


# ---- the same training as torchvision's --------------------------------------------------------


@pytest.mark.parametrize("numbers", BATCHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_torchvisions(name, numbers):
    model = build(*MODELS[name])
    randomize_predictions(model, spread=0.1)
    plain, samples = torchvision_twin(name, model), samples_of(name, numbers)
    found, expected = model(samples), plain(*inputs_of(samples, model.label_offset))
    names = FCOS_LOSSES if name.startswith("fcos") else LOSSES
    assert found.keys() == names.keys()
    for ours, theirs in names.items():
        torch.testing.assert_close(found[ours], expected[theirs], rtol=1e-5, atol=1e-6)
        # SSD learns nothing of an image without objects, and the others from their scores alone.
        assert found[ours] > 0 or (max(numbers) == 0 and (model.label_offset or "cls" not in ours))
    sum(found.values()).backward()
    sum(expected.values()).backward()
    parameters = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        scale = parameters[key].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, parameters[key].grad, rtol=1e-4, atol=1e-5 * scale + 1e-7)
