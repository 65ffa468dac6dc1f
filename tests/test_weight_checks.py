"""Weights against classes and conventions of the config: plaintrain.checkpoint.weight_checks."""

import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from model_helpers import make_cfg

from plaintrain.checkpoint.detectron2 import convert_to_detectron2
from plaintrain.checkpoint.weight_checks import check_weights
from plaintrain.config import set_value
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.engine import default_setup
from plaintrain.modeling import build_model
from plaintrain.predict import Predictor
from plaintrain.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = ["circle", "square", "triangle"]
# Bottlenecks, so that STRIDE_IN_1X1 means something, with heads that take little memory.
SMALL = [
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8] * 8,
]  # fmt: skip
PIXELS = ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"]
BOXES = [
    "MODEL.ANCHOR_GENERATOR.NAME",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO",
]
MASKS = ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO"]
KEYPOINTS = [key.replace("MASK", "KEYPOINT") for key in MASKS]
MASKS.append("MODEL.ROI_MASK_HEAD.ALIGNED")
MODELS = {}
RETINANET = [
    "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
]  # fmt: skip


def config(*overrides, detectron2=False):
    cfg = make_cfg(*SMALL, "MODEL.ROI_MASK_HEAD.ALIGNED", detectron2)
    if detectron2:
        cfg.merge_from_file(CONFIGS / "Detectron2" / "Base-Detectron2.yaml")
    cfg.merge_from_list(list(overrides))
    return cfg


def model_of(cfg):
    """The model without memory; its names and shapes do not depend on the conventions."""
    model = cfg.MODEL
    names = model.META_ARCHITECTURE, model.BACKBONE.NAME, model.MASK_ON, model.KEYPOINT_ON
    key = *names, model.ROI_HEADS.NUM_CLASSES, model.RESNETS.NUM_GROUPS, model.FPN.P6_IN_FEATURE
    if key not in MODELS:
        cfg = cfg.clone()
        set_value(cfg, "MODEL.DEVICE", "meta")
        with torch.device("meta"):
            MODELS[key] = build_model(cfg)
    return MODELS[key]


def save(path, state, **entries):
    """Write zeros of the shapes of a state dict, as a pickle or of torch; a bare one without entries."""
    # One number each in a file of torch, and a byte a number in a pickle.
    state = {name: torch.zeros((), dtype=torch.uint8).expand(value.shape) for name, value in state.items()}
    if str(path).endswith(".pkl"):
        arrays = {name: value.numpy() for name, value in state.items()}
        Path(path).write_bytes(pickle.dumps({"model": arrays, **entries}))
    else:
        torch.save({"model": state, **entries} if entries else state, path)
    return str(path)


def check(cfg, path, strict=True):
    check_weights(cfg, model_of(cfg), path, NAMES, strict=strict)


def contradicted(cfg, path, **kwargs):
    """Return the keys that `check_weights` names."""
    with pytest.raises(UserError, match="whose conventions the config contradicts") as error:
        check(cfg, path, **kwargs)
    text = str(error.value).partition("contradicts; set ")[2]
    assert "scripts/convert_weights.py" in text
    return [item.split()[0] for item in text.split(", ") if " (got " in item]


@pytest.mark.parametrize(
    ("overrides", "keys", "ending"),
    [
        (["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True], BOXES + MASKS + KEYPOINTS, ".pth"),
        ([*RETINANET, "MODEL.FPN.P6_IN_FEATURE", "res5"], BOXES[:1], ".pkl"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], BOXES[:1], ".pth"),
    ],
    ids=["rcnn", "retinanet", "rpn"],
)
def test_detectors_of_either_project_need_its_conventions(tmp_path, overrides, keys, ending):
    ours, theirs = config(*overrides), config(*overrides, detectron2=True)
    state = model_of(ours).state_dict()
    path = save(tmp_path / f"d2{ending}", convert_to_detectron2(state), iteration=7)
    assert contradicted(ours, path) == contradicted(ours, path, strict=False) == PIXELS + keys
    check(theirs, path)
    # One key is enough.
    set_value(theirs, "INPUT.FORMAT", "RGB")
    assert contradicted(theirs, path) == ["INPUT.FORMAT"]
    path = save(tmp_path / "torchvision.pth", state)
    check(ours, path)
    assert contradicted(config(*overrides, detectron2=True), path) == PIXELS + keys


def test_backbones_need_their_pixel_normalization_in_training_too(tmp_path):
    ours, theirs = config(), config(detectron2=True)
    resnet = torchvision.models.resnet50(num_classes=2).state_dict()
    there = convert_to_detectron2(
        {f"backbone.body.{k}": v for k, v in resnet.items() if not k.startswith("fc.")}
    )
    there = {name.removeprefix("backbone.bottom_up."): value for name, value in there.items()}
    msra = save(tmp_path / "R-50.pkl", there, __author__=torch.ones(2).numpy())  # no name
    stem = {"conv1_w": resnet["conv1.weight"], "res_conv1_bn_s": resnet["bn1.weight"]}
    caffe2 = save(tmp_path / "caffe2.pkl", stem)
    converted = save(tmp_path / "r50.pkl", there, __author__="torchvision", matching_heuristics=True)
    classifier = save(tmp_path / "resnet50.pth", resnet)
    # The author of a backbone without a classifier under these names is unknown.
    bare = save(tmp_path / "bare.pth", {k: v for k, v in resnet.items() if not k.startswith("fc.")})
    for path, right, wrong in ((msra, theirs, ours), (converted, ours, theirs), (classifier, ours, theirs)):
        check(right, path, strict=False)
        assert contradicted(wrong, path, strict=False) == PIXELS
    assert contradicted(ours, caffe2, strict=False) == PIXELS[:3]
    save(caffe2, {name.replace("_bn_", "_gn_"): value for name, value in stem.items()})
    assert contradicted(ours, caffe2, strict=False) == PIXELS[:2]
    for cfg in (ours, theirs):
        check(cfg, bare, strict=False)
    # Means that differ by less than a number of gray.
    set_value(theirs, "MODEL.PIXEL_MEAN", [102.9801, 115.9465, 122.7717])
    check(theirs, msra, strict=False)


def test_pixel_normalization_in_the_file_takes_precedence(tmp_path):
    keys = ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]
    cfg = config(*keys, detectron2=True)
    state = convert_to_detectron2(model_of(cfg).state_dict())
    path = save(tmp_path / "x50.pth", state, iteration=1)
    assert contradicted(cfg, path) == ["MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"]
    buffers = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
    buffers = {name: torch.tensor(value).view(3, 1, 1) for name, value in buffers.items()}
    torch.save({"model": torch.load(path)["model"] | buffers}, path)
    assert contradicted(cfg, path) == PIXELS
    set_value(cfg, "MODEL.PIXEL_STD", [58.395, 57.12, 57.375])
    set_value(cfg, "MODEL.RESNETS.STRIDE_IN_1X1", False)
    assert contradicted(cfg, path) == PIXELS[:2]


def test_weights_of_a_run_need_the_conventions_of_its_config(tmp_path):
    ours, theirs = config(), config(detectron2=True)
    state = model_of(ours).state_dict()
    path = save(tmp_path / "model_final.pth", state, config=theirs.dump())
    check(theirs, path)
    assert contradicted(ours, path) == PIXELS + BOXES
    with pytest.raises(UserError, match=r"whose conventions the config contradicts; set INPUT.FORMAT"):
        Predictor(ours, path)
    # The conventions of older and converted files are unknown.
    for entries in ({"iteration": 3}, {"class_names": NAMES}, {"__author__": "plaintrain"}):
        check(theirs, save(tmp_path / "old.pth", state, **entries))
    check(ours, save(tmp_path / "converted.pkl", convert_to_detectron2(state), __author__="plaintrain"))


def test_ssds_need_their_own_pixel_normalization(tmp_path):
    for name in ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"):
        cfg = make_cfg()
        cfg.merge_from_file(CONFIGS / "torchvision" / f"{name}.yaml")
        path = save(tmp_path / "w.pth", model_of(cfg).state_dict())
        check(cfg, path)
        for key in PIXELS[1:3]:
            set_value(cfg, key, make_cfg().MODEL[key.split(".")[1]])
        assert set(contradicted(cfg, path)) <= set(PIXELS[1:3])


TINY = [
    "MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.TINY.CHANNELS", [8], "MODEL.TINY.OUT_CHANNELS", 8,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16]], "MODEL.ROI_HEADS.NUM_CLASSES", 0,
]  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Function (classes of the file, flags) that starts a run from its weights, or resumes it."""
    declare_dataset("checks", {"FORMAT": "shapes", "SPLIT": "val", "NUM": 2, "HEIGHT": 32, "WIDTH": 32})

    def call(trained_for, number=3, **flags):
        cfg = make_cfg(*SMALL, *TINY, "DATASETS.TRAIN", ("checks",), "DATASETS.TEST", ("checks",))
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.IMS_PER_BATCH", 1])
        model = model_of(config(*TINY[:-1], number))
        entries = {"class_names": trained_for} if trained_for else {}
        path = tmp_path / "run" / "model_final.pth"
        path.parent.mkdir(exist_ok=True)
        save(path, model.state_dict(), iteration=1, **entries)
        if not flags.get("resume"):
            set_value(cfg, "MODEL.WEIGHTS", str(path))
        default_setup(cfg, Namespace(**flags))

    return call


@pytest.mark.parametrize(
    "flags", [{}, {"eval_only": True}, {"resume": True}, {"resume": True, "eval_only": True}], ids=str
)
def test_classes_in_another_order_are_rejected_before_every_run(start, flags):
    for other in ["square", "circle", "triangle"], ["Square", "circle ", "triangle"]:
        with pytest.raises(UserError, match=rf"trained for the classes \['{other[0]}', .* has \['circle'"):
            start(other, **flags)
    start(NAMES, **flags)


def test_training_may_start_from_other_classes_but_neither_evaluation_nor_resume(start):
    start(["disc", "square", "triangle"])
    start(None, number=5)
    with pytest.raises(UserError, match=r"missing \['Circle'\], additional \['circle'\]"):
        start(["Circle", "square", "triangle"], resume=True)
    with pytest.raises(UserError, match=r"missing \['star'\].*FORMAT concat accepts"):
        start([*NAMES, "star"], number=4, eval_only=True)
    with pytest.raises(UserError, match=r"additional \['triangle'\].*CLASSES in DATASETS.DECLARE"):
        start(["square", "circle"], number=2, eval_only=True, resume=True)
    with pytest.raises(UserError, match="missing 4 of the model's parameters.* the 3 classes of the dataset"):
        start(None, number=5, eval_only=True)
