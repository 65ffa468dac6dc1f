"""Detectron2's names and orders: plaintrain.weight_detectron2."""

import pytest
import torch

from plaintrain.config import get_cfg
from plaintrain.modeling import build_model
from plaintrain.utils.errors import UserError
from plaintrain.weight_detectron2 import anchor_counts, from_detectron2, is_detectron2, to_detectron2

torch.set_num_threads(1)

K = 3
_SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.ROI_HEADS.NUM_CLASSES", K,
    "MODEL.RETINANET.NUM_CLASSES", K,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8] * 8,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5,
]  # fmt: skip
OCTAVES = [1, 2 ** (1 / 3), 2 ** (2 / 3)]
RETINANET = [
    "MODEL.META_ARCHITECTURE", "RetinaNet",
    "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.SIZES", [[32 * 2**i * s for s in OCTAVES] for i in range(5)],
]  # fmt: skip
BOTH_HEADS = ["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True]
# As torchvision's second versions.
RCNN_V2 = [
    "MODEL.RPN.CONV_DIMS", [-1, -1], "MODEL.FPN.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8,
    "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NORM", "BN",
]  # fmt: skip
RETINANET_V2 = [*RETINANET, "MODEL.RETINANET.NORM", "GN", "MODEL.FPN.P6_IN_FEATURE", "res5"]
# Detectron2's name -> torchvision's, of a model with masks and keypoints.
RCNN_NAMES = {
    "backbone.bottom_up.stem.conv1.weight": "backbone.body.conv1.weight",
    "backbone.bottom_up.stem.conv1.norm.running_var": "backbone.body.bn1.running_var",
    "backbone.bottom_up.res3.0.shortcut.weight": "backbone.body.layer2.0.downsample.0.weight",
    "backbone.bottom_up.res3.0.shortcut.norm.bias": "backbone.body.layer2.0.downsample.1.bias",
    "backbone.bottom_up.res5.1.conv2.norm.running_mean": "backbone.body.layer4.1.bn2.running_mean",
    "backbone.fpn_lateral2.weight": "backbone.fpn.inner_blocks.0.0.weight",
    "backbone.fpn_output4.weight": "backbone.fpn.layer_blocks.2.0.weight",
    "proposal_generator.rpn_head.conv.weight": "rpn.head.conv.0.0.weight",
    "proposal_generator.rpn_head.objectness_logits.bias": "rpn.head.cls_logits.bias",
    "proposal_generator.rpn_head.anchor_deltas.weight": "rpn.head.bbox_pred.weight",
    "roi_heads.box_head.fc1.weight": "roi_heads.box_head.fc6.weight",
    "roi_heads.box_head.fc2.bias": "roi_heads.box_head.fc7.bias",
    "roi_heads.mask_head.mask_fcn1.weight": "roi_heads.mask_head.0.0.weight",
    "roi_heads.mask_head.mask_fcn4.bias": "roi_heads.mask_head.3.0.bias",
    "roi_heads.mask_head.deconv.weight": "roi_heads.mask_predictor.conv5_mask.weight",
    "roi_heads.mask_head.predictor.weight": "roi_heads.mask_predictor.mask_fcn_logits.weight",
    "roi_heads.keypoint_head.conv_fcn1.weight": "roi_heads.keypoint_head.0.weight",
    "roi_heads.keypoint_head.conv_fcn8.bias": "roi_heads.keypoint_head.14.bias",
    "roi_heads.keypoint_head.score_lowres.weight": "roi_heads.keypoint_predictor.kps_score_lowres.weight",
}
RETINANET_NAMES = {
    "backbone.fpn_lateral3.weight": "backbone.fpn.inner_blocks.0.0.weight",
    "backbone.fpn_output5.bias": "backbone.fpn.layer_blocks.2.0.bias",
    "backbone.top_block.p6.weight": "backbone.fpn.extra_blocks.p6.weight",
    "backbone.top_block.p7.bias": "backbone.fpn.extra_blocks.p7.bias",
    "head.cls_subnet.0.weight": "head.classification_head.conv.0.0.weight",
    "head.cls_subnet.6.bias": "head.classification_head.conv.3.0.bias",
    "head.bbox_subnet.4.weight": "head.regression_head.conv.2.0.weight",
    "head.cls_score.weight": "head.classification_head.cls_logits.weight",
    "head.bbox_pred.bias": "head.regression_head.bbox_reg.bias",
}
RCNN_V2_NAMES = {
    "proposal_generator.rpn_head.conv.conv1.weight": "rpn.head.conv.1.0.weight",
    "roi_heads.box_head.conv4.weight": "roi_heads.box_head.3.0.weight",
    "roi_heads.box_head.conv4.norm.weight": "roi_heads.box_head.3.1.weight",
    "roi_heads.box_head.fc1.weight": "roi_heads.box_head.5.weight",
    "roi_heads.mask_head.mask_fcn2.norm.bias": "roi_heads.mask_head.1.1.bias",
    "backbone.fpn_lateral3.norm.weight": "backbone.fpn.inner_blocks.1.1.weight",
}
RETINANET_V2_NAMES = {
    "head.cls_subnet.9.weight": "head.classification_head.conv.3.0.weight",
    "head.cls_subnet.10.bias": "head.classification_head.conv.3.1.bias",
    "head.bbox_subnet.1.weight": "head.regression_head.conv.0.1.weight",
}


def make(*more):
    cfg = get_cfg()
    cfg.merge_from_list([*_SMALL, *more])
    return build_model(cfg)


def clones(state):
    return {name: value.clone() for name, value in state.items()}


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert value.equal(expected[name]), name


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (BOTH_HEADS, RCNN_NAMES),
        (RETINANET, RETINANET_NAMES),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], {}),
        (RCNN_V2, RCNN_V2_NAMES),
        (RETINANET_V2, RETINANET_V2_NAMES),
    ],
    ids=["rcnn", "retinanet", "rpn", "rcnn v2", "retinanet v2"],
)
def test_names_are_those_of_detectron2_and_round_trips_exact(keys, names):
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in make(*keys).state_dict().items()
    }
    before = clones(state)
    there = to_detectron2(state)
    position = {name: i for i, name in enumerate(state)}
    for name, here in names.items():
        assert list(there)[position[here]] == name
    assert is_detectron2(there) and not is_detectron2(state)
    copies = clones(there)
    back = from_detectron2(there)
    # Box and mask of the background, which torchvision never uses, are lost.
    expected = clones(state)
    for layer, rows in (("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
        for name in expected:
            if layer in name:
                expected[name][:rows] = 0
    assert_equal(back, expected)
    assert_equal(to_detectron2(back), there)
    # The arguments are not changed.
    assert_equal(state, before)
    assert_equal(there, copies)


def test_the_background_is_last_in_detectron2_and_first_in_torchvision():
    there = {
        "roi_heads.box_head.fc1.bias": torch.zeros(2),
        # Classes 0, 1, 2 and the background.
        "roi_heads.box_predictor.cls_score.bias": torch.tensor([10.0, 11, 12, 99]),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(12.0) + 1,
        "roi_heads.mask_head.predictor.weight": torch.tensor([20.0, 21, 22]).view(3, 1, 1, 1),
    }
    here = from_detectron2(there)
    assert here["roi_heads.box_predictor.cls_score.bias"].tolist() == [99, 10, 11, 12]
    assert here["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0] * 4 + list(range(1, 13))
    assert here["roi_heads.mask_predictor.mask_fcn_logits.weight"].flatten().tolist() == [0, 20, 21, 22]
    # Boxes and masks for all classes at once keep their rows.
    there = {
        "roi_heads.box_predictor.cls_score.bias": torch.zeros(4),
        "roi_heads.box_predictor.bbox_pred.bias": torch.zeros(4),
        "roi_heads.mask_head.predictor.bias": torch.zeros(1),
    }
    assert [len(value) for value in from_detectron2(there).values()] == [4, 4, 1]


@pytest.mark.parametrize(
    ("name", "ratios"), [("AnchorGenerator", [0.5, 1.0, 2.0]), ("DefaultAnchorGenerator", [0.5, 2.0])]
)
def test_each_anchor_gets_the_rows_that_were_trained_for_it(name, ratios):
    sizes = [32.0, 64.0, 128.0]
    model = make(
        *RETINANET, "MODEL.ANCHOR_GENERATOR.NAME", name, "MODEL.ANCHOR_GENERATOR.SIZES", [sizes],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [ratios],
    )  # fmt: skip
    # Detectron2 counts its anchors size by size.
    scores = [[[i, j, k] for k in range(K)] for i in range(len(sizes)) for j in range(len(ratios))]
    deltas = [[[i, j, c] for c in range(4)] for i in range(len(sizes)) for j in range(len(ratios))]
    there = {
        "head.cls_subnet.0.weight": torch.zeros(1),
        "head.cls_score.bias": torch.tensor(scores, dtype=torch.float32).view(-1, 3),
        "head.bbox_pred.bias": torch.tensor(deltas, dtype=torch.float32).view(-1, 3),
    }
    there["head.cls_score.weight"] = there["head.cls_score.bias"].view(-1, 1, 1, 3)
    here = from_detectron2(there, num_ratios=len(ratios))
    model.anchor_generator.set_cell_anchors(torch.float32, "cpu")
    for a, (x1, y1, x2, y2) in enumerate(model.anchor_generator.cell_anchors[0].tolist()):
        width, height = x2 - x1, y2 - y1
        size = min(range(len(sizes)), key=lambda i: abs((width * height) ** 0.5 - sizes[i]))
        ratio = min(range(len(ratios)), key=lambda j: abs(height / width - ratios[j]))
        for k in range(K):
            row = [size, ratio, k]
            assert here["head.classification_head.cls_logits.bias"][a * K + k].tolist() == row
            assert here["head.classification_head.cls_logits.weight"][a * K + k].flatten().tolist() == row
        for c in range(4):
            assert here["head.regression_head.bbox_reg.bias"][a * 4 + c].tolist() == [size, ratio, c]
    back = to_detectron2({n: v for n, v in here.items() if "logits" in n or "reg" in n}, len(ratios))
    assert_equal(back, {n: v for n, v in there.items() if "subnet" not in n})


def test_anchors_keep_their_order_if_the_ratios_do_not_divide_them():
    there = {
        "proposal_generator.rpn_head.objectness_logits.bias": torch.arange(5.0),
        "proposal_generator.rpn_head.anchor_deltas.bias": torch.arange(20.0),
    }
    here = from_detectron2(there, num_ratios=3)
    assert anchor_counts(here) == {"rpn.head.cls_logits": 5, "rpn.head.bbox_pred": 5}
    assert here["rpn.head.cls_logits.bias"].tolist() == list(range(5))


def test_buffers_are_dropped_and_unknown_names_kept():
    there = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.zeros(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
        "anchor_generator.cell_anchors.4": torch.zeros(3, 4),
        "sem_seg_head.predictor.weight": torch.zeros(1),
        "backbone.fpn_lateral5.weight": torch.zeros(1),
    }
    here = from_detectron2(there)
    assert list(here) == ["sem_seg_head.predictor.weight", "backbone.fpn.inner_blocks.0.0.weight"]


def test_a_resnet_alone_is_recognized_and_other_projects_are_not():
    for name in ("stem.conv1.weight", "backbone.stem.conv1.weight", "conv1_w"):
        assert is_detectron2({name: torch.zeros(1)})
        assert list(from_detectron2({name: torch.zeros(1)})) == ["backbone.body.conv1.weight"]
    for name in ("conv1.weight", "features.0.weight", "roi_heads.mask_head.mask_fcn1.weight"):
        assert not is_detectron2({name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["rpn.head.bbox_pred.bias", "backbone.body.0.0.weight", "backbone.body.0.1.weight"],
            r"no counterpart of backbone\.body\.0\.0\.weight \(2 such names\)",
        ),
        # FCOS.
        (["head.regression_head.bbox_ctrness.bias"], "no counterpart"),
    ],
)
def test_models_that_detectron2_does_not_have_are_rejected(names, words):
    with pytest.raises(UserError, match=words):
        to_detectron2({name: torch.zeros(4) for name in names})
