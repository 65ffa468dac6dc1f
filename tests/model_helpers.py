"""Small configs and samples for the tests of plaintrain.modeling, and what compares with torchvision."""

import copy
import math
from unittest import mock

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model
from plaintrain.modeling.detector import DenseDetector
from plaintrain.modeling.rcnn import GeneralizedRCNN
from plaintrain.modeling.roi_heads import BatchedRoIHeads
from plaintrain.modeling.rpn import BatchedRPN

torch.set_num_threads(1)

K = 3
KEYPOINTS = 4


def make_overrides(*overrides):
    """K classes on the CPU with nothing frozen; then KEY, value, KEY, value."""
    return [
        "MODEL.DEVICE", "cpu",
        "MODEL.BACKBONE.FREEZE_AT", 0,
        "MODEL.ROI_HEADS.NUM_CLASSES", K,
        "MODEL.RETINANET.NUM_CLASSES", K,
        "MODEL.FCOS.NUM_CLASSES", K,
        "MODEL.SSD.NUM_CLASSES", K,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", KEYPOINTS,
        *overrides,
    ]  # fmt: skip


def make_cfg(*overrides):
    """The defaults with `make_overrides`."""
    cfg = get_cfg()
    cfg.merge_from_list(make_overrides(*overrides))
    return cfg


RESNET18 = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 32)
SMALL_HEAD = ("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 5)
TINY = (
    "MODEL.BACKBONE.NAME", "build_tiny_backbone",
    "MODEL.TINY.CHANNELS", [8, 16, 32],
    "MODEL.TINY.OUT_CHANNELS", 32,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]],
)  # fmt: skip
MASK = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 2, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16)
KEYPOINT = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16, 16])
RCNN_V2 = (
    *RESNET18, *MASK, "MODEL.FPN.NORM", "BN", "MODEL.RPN.CONV_DIMS", [-1, -1], "MODEL.RESNETS.NORM", "GN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV", 2, "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.NORM", "BN",
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.NORM", "GN",
)  # fmt: skip
PROPOSALS = ("MODEL.META_ARCHITECTURE", "ProposalNetwork")
RETINA = ("MODEL.META_ARCHITECTURE", "RetinaNet")
NINE_ANCHORS = [[x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))] for x in (32, 64, 128, 256, 512)]
RETINANET18 = (
    *RETINA,
    *RESNET18,
    "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.SIZES", NINE_ANCHORS,
)  # fmt: skip
FCOS = (
    "MODEL.META_ARCHITECTURE", "FCOS",
    "MODEL.ANCHOR_GENERATOR.SIZES", [[8]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]],
)  # fmt: skip
SSD = (
    "MODEL.META_ARCHITECTURE", "SSD",
    "INPUT.FIXED_SIZE", (64, 64),
    "MODEL.TINY.NUM_LEVELS", 2,
    "MODEL.SSD.ASPECT_RATIOS", [[2], [2, 3]],
    "MODEL.SSD.SCALES", [],
    "MODEL.SSD.STEPS", [],
)  # fmt: skip
SSDLITE = (
    "MODEL.META_ARCHITECTURE", "SSD",
    "MODEL.BACKBONE.NAME", "build_ssdlite_mobilenet_v3_large_backbone",
    "INPUT.FIXED_SIZE", (320, 320),
    "MODEL.SSD.HEAD_NAME", "SSDLiteHead",
    "MODEL.SSD.ASPECT_RATIOS", [[2, 3]] * 6,
    "MODEL.SSD.SCALES", [],
    "MODEL.SSD.STEPS", [],
    "MODEL.SSD.MIN_RATIO", 0.2,
    "MODEL.SSD.MAX_RATIO", 0.95,
)  # fmt: skip

# One small model of each kind, and the losses it has.
ARCHITECTURES = {
    "faster_rcnn": (*TINY, *SMALL_HEAD),
    "mask_keypoint_rcnn": (*TINY, *SMALL_HEAD, *MASK, *KEYPOINT),
    "proposals": (*TINY, *PROPOSALS),
    "retinanet": (*TINY, *RETINA, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    "fcos": (*TINY, *FCOS, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0),
    "ssd": (*TINY, *SSD, "MODEL.SSD.SCORE_THRESH_TEST", 0.0),
}
LOSSES = {
    "faster_rcnn": {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"},
    "proposals": {"loss_rpn_cls", "loss_rpn_loc"},
    "retinanet": {"loss_cls", "loss_box_reg"},
    "fcos": {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
    "ssd": {"loss_cls", "loss_box_reg"},
}
LOSSES["mask_keypoint_rcnn"] = LOSSES["faster_rcnn"] | {"loss_mask", "loss_keypoint"}


def make_sample(height, width, boxes=(), labels=(), seed=0, original=None):
    """A sample of random pixels; `original` is the height and width before the mapper resized it.

    An object's mask is its box without the upper left quarter; its keypoints lie inside the box, the
    first is not labelled.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    keypoints = torch.zeros(len(boxes), KEYPOINTS, 3)
    for mask, points, (x0, y0, x1, y1) in zip(masks, keypoints, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
        mask[y0 : (y0 + y1) // 2, x0 : (x0 + x1) // 2] = 0
        points[1:, :2] = torch.rand(KEYPOINTS - 1, 2, generator=generator)
        points[1:, :2] = points[1:, :2] * torch.tensor([x1 - x0, y1 - y0]) + torch.tensor([x0, y0])
        points[1:, 2] = 2
    return {
        "image": torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8),
        "target": {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": masks,
            "keypoints": keypoints,
        },
        "image_id": seed,
        "file_name": f"{seed}.jpg",
        "height": (original or (height, width))[0],
        "width": (original or (height, width))[1],
    }


def two_samples():
    """Two images of different sizes, with shorter sides of 64."""
    return [
        make_sample(64, 96, [[3, 4, 40, 50], [50, 10, 90, 60]], [0, 2], seed=1),
        make_sample(80, 64, [[10, 10, 50, 70]], [1], seed=2),
    ]


def two_squares():
    """Two images of 64 x 64."""
    return [
        make_sample(64, 64, [[3, 4, 40, 50], [30, 10, 60, 60]], [0, 2], seed=1),
        make_sample(64, 64, [[10, 10, 50, 60]], [1], seed=2),
    ]


def make_batch(numbers, sizes=((80, 64), (64, 96))):
    """Images of the sizes in turn, with these numbers of objects."""
    generator, samples = torch.Generator().manual_seed(5), []
    for i, number in enumerate(numbers):
        height, width = sizes[i % len(sizes)]
        corners = torch.rand(number, 2, 2, generator=generator) * torch.tensor([width - 8, height - 8])
        boxes = torch.cat([corners.amin(1), corners.amax(1) + 6], dim=1).long().tolist()
        samples.append(make_sample(height, width, boxes, [j % 3 for j in range(number)], seed=i))
    return samples


def random_boxes(*shape, seed=0):
    """Boxes of whole pixels, so that some are equally good."""
    corners = torch.rand(*shape, 2, 2, generator=torch.Generator().manual_seed(seed)) * 60
    return torch.cat([corners.amin(-2).floor(), corners.amax(-2).ceil() + 2], dim=-1)


def build(*overrides, seed=0):
    torch.manual_seed(seed)
    return build_model(make_cfg(*overrides))


def initialise_at_most(elements):
    """Leave bigger tensors as the memory is: they will be overwritten, or dropped (VGG's classifier)."""

    def limit(function):
        return lambda tensor, *args, **kwargs: (
            tensor if tensor.numel() > elements else function(tensor, *args, **kwargs)
        )

    names = ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "normal_", "uniform_")
    return mock.patch.multiple(nn.init, **{name: limit(getattr(nn.init, name)) for name in names})


def randomize_predictions(model, spread=0.5):
    """Make a fresh model's scores and boxes differ widely from anchor to anchor."""
    predictors = ("cls_score", "bbox_pred", "cls_logits", "bbox_reg", "bbox_ctrness", "module_list")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "head" in name:
            # Kaiming's scale keeps a tower's features from fading away.
            scale = spread if set(name.split(".")[-3:]) & set(predictors) else math.sqrt(2)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * scale / math.sqrt(parameter[0].numel()))


def torchvision_twin(model):
    """A copy of a detector of the same modules and weights, with the forward passes of torchvision."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, DenseDetector | GeneralizedRCNN | BatchedRPN | BatchedRoIHeads):
            bases = type(module).__mro__
            module.__class__ = next(base for base in bases if base.__module__.startswith("torchvision."))
    plain.transform.postprocess = lambda detections, *sizes: detections
    return plain


def torchvision_inputs(samples, label_offset=0):
    """Images and targets, as torchvision's models take them."""
    targets = [sample["target"] for sample in samples]
    targets = [{**target, "labels": target["labels"] + label_offset} for target in targets]
    return [sample["image"] for sample in samples], targets


def assert_same_detections(found, expected, label_offset, at_least):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["scores"]) >= at_least
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-5, atol=1e-6)
        assert ours["labels"].equal(theirs["labels"] - label_offset)
        assert ours["labels"].min() >= 0 and ours["labels"].max() < K
        if "masks" in theirs:
            assert ours["masks"].equal(theirs["masks"][:, 0] > 0.5)
            assert 0 < ours["masks"].sum() < ours["masks"].numel()
        if "keypoints" in theirs:
            # Sums of many products, in another order.
            tolerance = {"rtol": 1e-4, "atol": 2e-3}
            torch.testing.assert_close(ours["keypoints"][..., :2], theirs["keypoints"][..., :2], **tolerance)
            torch.testing.assert_close(ours["keypoints"][..., 2], theirs["keypoints_scores"], **tolerance)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def norm_types(module):
    """The classes of a module's norm layers; a folded one is a frozen batch norm."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
    found = {type(m) for m in module.modules() if isinstance(m, kinds)}
    return {FrozenBatchNorm2d if issubclass(kind, FrozenBatchNorm2d) else kind for kind in found}
