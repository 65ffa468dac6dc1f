"""Checks before a run starts: plaintrain.engine.preflight."""

import sys

import pytest
import torch

from plaintrain.config import get_cfg
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, load_class_names
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.engine.preflight import check_before_training, check_same_data, resolve_num_classes
from plaintrain.structures import BoxMode
from plaintrain.utils import comm, user_code
from plaintrain.utils.errors import UserError


@pytest.fixture
def cfg():
    cfg = get_cfg()
    declare_dataset("few_shapes", {"FORMAT": "shapes", "SPLIT": "train", "NUM": 2, "HEIGHT": 32, "WIDTH": 32})
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("few_shapes",)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.SSD.NUM_CLASSES = 3
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05] * 4
    return cfg


def register_boxes(name, category_id, segmentation=(), **metadata):
    """Register a dataset of one image with one box."""
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id}
    box["segmentation"] = segmentation
    record = {"file_name": "shapes://train/0", "image_id": 3, "height": 64, "width": 64, "annotations": [box]}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(**metadata)


def check(cfg, *overrides, resume=False, eval_only=False):
    cfg.merge_from_list(list(overrides))
    check_before_training(cfg, resume=resume, eval_only=eval_only)


def error_message(cfg, *overrides, **kwargs):
    """Return the message of the `UserError` that `check` must raise."""
    with pytest.raises(UserError) as error:
        check(cfg, *overrides, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


NUM_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"


def resolve_keypoints(cfg, *overrides):
    cfg.merge_from_list(["MODEL.KEYPOINT_ON", True, *overrides])
    cfg.freeze()
    resolve_num_classes(cfg, eval_only=False)
    return cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS


def test_num_keypoints_comes_from_the_dataset_and_must_be_set_where_it_has_no_names(cfg):
    assert resolve_keypoints(cfg) == 4
    cfg.defrost()
    # It agrees now.
    assert resolve_keypoints(cfg) == 4
    MetadataCatalog.get("few_shapes").set(keypoint_names=None)
    cfg.defrost()
    assert resolve_keypoints(cfg) == 4
    cfg.defrost()
    with pytest.raises(UserError, match="names no keypoints"):
        resolve_keypoints(cfg, NUM_KEYPOINTS, 0)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (NUM_KEYPOINTS, 17, r"NUM_KEYPOINTS must be 4 for the dataset few_shapes .* bottom.*, got 17"),
        ("TEST.KEYPOINT_OKS_SIGMAS", [], "KEYPOINT_OKS_SIGMAS must be 4 positive numbers"),
        ("TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 3, "KEYPOINT_OKS_SIGMAS must be 4 positive numbers"),
        ("TEST.KEYPOINT_OKS_SIGMAS", [0.05, 0.0, 0.05, 0.05], r"must be 4 positive numbers.*0\.0"),
    ],
)
def test_keypoint_errors_name_the_key(cfg, key, value, words):
    with pytest.raises(UserError, match=words):
        resolve_keypoints(cfg, key, value)
    # Without a keypoint head they do not matter.
    cfg.defrost()
    cfg.MODEL.KEYPOINT_ON = False
    resolve_num_classes(cfg, eval_only=False)


def test_test_set_must_be_there_and_fit_the_evaluation_and_the_validation_losses(cfg):
    register_boxes("odd_test", 1, thing_classes=["one"])
    message = error_message(cfg.clone(), "DATASETS.TEST", ("odd_test",))
    assert "image 3 of odd_test has category_id 1, but" in message
    assert "--eval-only needs DATASETS.TEST" in error_message(cfg.clone(), *NO_TESTS, eval_only=True)
    register_boxes("boxes", 0, thing_classes=load_class_names("few_shapes"), evaluator_type="coco")
    register_boxes("bad", 0, [[1, 2]], thing_classes=load_class_names("few_shapes"), evaluator_type="coco")
    message = error_message(cfg.clone(), "DATASETS.TEST", ("bad",), "MODEL.MASK_ON", True)
    assert "has a polygon that must be" in message
    check(cfg, "DATASETS.TEST", ("boxes",), "MODEL.MASK_ON", True)
    for setting in (LOSS_PERIOD, VAL_FLOW):
        message = error_message(cfg.clone(), *setting)
        assert "MODEL.MASK_ON needs a segmentation of every object" in message


SSD = ["MODEL.META_ARCHITECTURE", "SSD", "MODEL.BACKBONE.NAME", "build_ssd_vgg16_backbone"]
SSD += ["INPUT.FIXED_SIZE", (300, 300)]
UNFROZEN = ["MODEL.BACKBONE.FREEZE_AT", 0]


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        ([], True),
        ([*UNFROZEN, "MODEL.RESNETS.NORM", "BN"], False),
        ([*UNFROZEN, "MODEL.RESNETS.NORM", "FrozenBN"], True),
        (SSD, True),
        # The norm of another backbone does not matter.
        ([*SSD, *UNFROZEN, "MODEL.RESNETS.NORM", "FrozenBN"], False),
    ],
)
def test_frozen_backbone_without_weights_is_warned_about(cfg, log, overrides, warns):
    check(cfg, *overrides)
    assert ("does not learn" in log.text) == warns


@pytest.mark.parametrize(
    ("overrides", "eval_only", "rejects"),
    [
        (["SOLVER.AMP.ENABLED", True], False, True),
        (["SOLVER.AMP.ENABLED", True], True, False),
        (["TEST.AMP", True], True, True),
        ([], False, False),
    ],
)
def test_bfloat16_is_rejected_on_a_gpu_without_it(cfg, overrides, eval_only, rejects, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr("plaintrain.engine.preflight.get_device", lambda name: torch.device("cuda"))
    overrides = ["SOLVER.AMP.PRECISION", "bfloat16", *overrides]
    if rejects:
        message = error_message(cfg, *overrides, eval_only=eval_only, resume=True)
        assert message.startswith("SOLVER.AMP.PRECISION is bfloat16")
    else:
        check(cfg, *overrides, eval_only=eval_only, resume=True)


LOSS_PERIOD = ("TEST.VAL_LOSS_PERIOD", 5)
VAL_FLOW = ("WORKFLOW", [["train", 1], ["val", 1]])
NO_TESTS = ("DATASETS.TEST", ())
NO_GPUS = "SyncBN needs GPUs"
TINY = ("MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.ANCHOR_GENERATOR.SIZES", [[16]])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [*LOSS_PERIOD, *NO_TESTS],
            "TEST.VAL_LOSS_PERIOD or a val flow in WORKFLOW is set, but DATASETS.TEST is empty",
        ),
        (["TEST.BEST_METRIC", "auto", *NO_TESTS], "TEST.BEST_METRIC is set, but DATASETS.TEST is empty"),
        (["TEST.EVAL_START", 3], "TEST.EVAL_PERIOD must be above 0 with TEST.EVAL_START 3, got 0"),
        (
            ["TEST.BEST_METRIC", "val/total_loss"],
            "TEST.BEST_METRIC is val/total_loss, but no validation losses are computed; set",
        ),
        (["SOLVER.PATIENCE", 3, "TEST.EVAL_PERIOD", 5], "SOLVER.PATIENCE 3 needs TEST.BEST_METRIC"),
        (["SOLVER.PATIENCE", 3, "TEST.BEST_METRIC", "auto"], "SOLVER.PATIENCE 3 needs"),
        (["SOLVER.ACCUMULATE_STEPS", 17], "SOLVER.ACCUMULATE_STEPS must be 1 to"),
        (["MODEL.RESNETS.NORM", "SyncBN"], NO_GPUS),
        (["MODEL.FPN.NORM", "SyncBN"], NO_GPUS),
        (["MODEL.ROI_BOX_HEAD.NORM", "SyncBN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 4], NO_GPUS),
        (["MODEL.ROI_MASK_HEAD.NORM", "SyncBN", "MODEL.MASK_ON", True], NO_GPUS),
    ],
)
def test_settings_that_contradict_each_other_are_rejected_before_training_only(cfg, overrides, words):
    assert words in error_message(cfg, *overrides)
    check(cfg, "DATASETS.TEST", ("few_shapes",), resume=True, eval_only=True)


@pytest.mark.parametrize(
    "overrides",
    [
        # The last evaluation counts then.
        ["TEST.BEST_METRIC", "auto", "TEST.EVAL_PERIOD", 0],
        ["TEST.BEST_METRIC", "val/total_loss", *LOSS_PERIOD, "SOLVER.PATIENCE", 3],
        ["TEST.BEST_METRIC", "val/total_loss", *VAL_FLOW, "SOLVER.PATIENCE", 3],
        ["TEST.BEST_METRIC", "auto", "TEST.EVAL_PERIOD", 5, "SOLVER.PATIENCE", 3],
        ["SOLVER.MOMENTUM_SCHEDULE", [[0, 0.9], [10, 0.8]], "SOLVER.ACCUMULATE_STEPS", 16],
        # The model has no such norm.
        ["MODEL.TINY.NORM", "SyncBN"],
        [*TINY, "MODEL.RESNETS.NORM", "SyncBN"],
        ["MODEL.ROI_BOX_HEAD.NORM", "SyncBN"],
        ["MODEL.ROI_MASK_HEAD.NORM", "SyncBN"],
    ],
)
def test_settings_that_agree_are_accepted(cfg, overrides):
    check(cfg, *overrides)


@pytest.mark.parametrize(
    ("other", "words"), [([3, "a", "b"], "images of .*2 on rank 0, 3 on rank 1"), (None, "annotations of")]
)
def test_data_that_differs_between_ranks_is_rejected(cfg, monkeypatch, other, words):
    check_same_data(cfg, eval_only=False)

    def all_gather(hashes):
        return [hashes, [other or [*h[:2], "other"] for h in hashes]]

    monkeypatch.setattr(comm, "all_gather", all_gather)
    with pytest.raises(UserError, match=words):
        check_same_data(cfg, eval_only=False)


def test_more_detections_than_coco_counts_are_warned_about(cfg, caplog, monkeypatch):
    monkeypatch.setattr("plaintrain.engine.preflight.logger.propagate", True)
    check(cfg, "TEST.DETECTIONS_PER_IMAGE", 100)
    assert "COCO metrics" not in caplog.text
    check(cfg, "TEST.DETECTIONS_PER_IMAGE", 300)
    assert "COCO metrics of few_shapes count only 100 detections" in caplog.text


def test_user_code_is_imported_once(tmp_path, monkeypatch):
    path = tmp_path / "only_once_imported.py"
    path.write_text("")
    monkeypatch.setattr(user_code, "IMPORTED", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    user_code.import_user_code([str(path), str(path)])
    # A forked loader worker repeats this list, which is its own.
    assert [str(path)] == user_code.IMPORTED
