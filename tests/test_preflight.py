"""What a config is settled to before a run, and what is refused: keypoints, norms, test sets."""

import pytest
import torch

from plaintrain.config import get_cfg
from plaintrain.data.builtin import declare_dataset
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, class_names
from plaintrain.preflight import check_before_training, settle_num_classes
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

SIGMAS = [0.05] * 4


@pytest.fixture
def cfg():
    cfg = get_cfg()
    declare_dataset("few_shapes", {"FORMAT": "shapes", "SPLIT": "train", "NUM": 2, "HEIGHT": 32, "WIDTH": 32})
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("few_shapes",)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.SSD.NUM_CLASSES = 3
    cfg.TEST.KEYPOINT_OKS_SIGMAS = SIGMAS
    return cfg


def settle(cfg):
    settle_num_classes(cfg, eval_only=False)
    return cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS


@pytest.mark.parametrize("given", [0, 4])
@pytest.mark.parametrize("freeze", [False, True])
def test_the_number_of_keypoints_comes_from_the_dataset(cfg, given, freeze):
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = given
    if freeze:
        cfg.freeze()
    assert settle(cfg) == 4


def test_a_number_of_keypoints_that_contradicts_the_dataset_names_both(cfg):
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    with pytest.raises(UserError, match=r"NUM_KEYPOINTS is 17, but the dataset few_shapes has 4 .* bottom"):
        settle(cfg)


def test_without_keypoint_names_the_number_must_be_given(cfg):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    MetadataCatalog.get("few_shapes").set(thing_classes=["circle"], keypoint_names=None)
    with pytest.raises(UserError, match="names no keypoints"):
        settle(cfg)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 4
    assert settle(cfg) == 4


@pytest.mark.parametrize("sigmas", [[], [0.05] * 3])
def test_sigmas_that_do_not_fit_the_keypoints_are_found_before_training(cfg, sigmas):
    cfg.TEST.KEYPOINT_OKS_SIGMAS = sigmas
    with pytest.raises(UserError, match="KEYPOINT_OKS_SIGMAS must be 4 positive numbers"):
        settle(cfg)


def test_sigmas_that_are_no_deviations_are_found_before_training(cfg):
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05, 0.05, 0.0, 0.05]
    with pytest.raises(UserError, match=r"KEYPOINT_OKS_SIGMAS must be 4 positive numbers.*0\.0"):
        settle(cfg)


def test_without_a_keypoint_head_nothing_is_asked(cfg):
    cfg.MODEL.KEYPOINT_ON, cfg.TEST.KEYPOINT_OKS_SIGMAS = False, []
    assert settle(cfg) == 0


def test_a_test_set_that_cannot_be_scored_is_found_before_training(cfg):
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    record = {"file_name": "shapes://0", "image_id": 3, "height": 9, "width": 9, "annotations": [box]}
    DatasetCatalog.register("odd_test", lambda: [record])
    MetadataCatalog.get("odd_test").set(thing_classes=["one"])
    cfg.DATASETS.TEST = ("odd_test",)
    with pytest.raises(UserError, match="image 3 of odd_test has category_id 1, but"):
        check_before_training(cfg, resume=False, eval_only=False)


def test_evaluating_nothing_is_refused(cfg):
    cfg.DATASETS.TEST = ()
    with pytest.raises(UserError, match="--eval-only needs DATASETS.TEST"):
        check_before_training(cfg, resume=False, eval_only=True)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["MODEL.ROI_BOX_HEAD.NORM", "SyncBN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 4], True),
        (["MODEL.ROI_BOX_HEAD.NORM", "SyncBN"], False),
        (["MODEL.ROI_MASK_HEAD.NORM", "SyncBN", "MODEL.MASK_ON", True], True),
        (["MODEL.ROI_MASK_HEAD.NORM", "SyncBN"], False),
    ],
)
def test_sync_bn_of_a_head_counts_only_if_the_head_has_it(cfg, overrides, refused):
    cfg.merge_from_list([*overrides, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4])
    if not refused:
        check_before_training(cfg, resume=False, eval_only=False)
        return
    with pytest.raises(UserError, match="SyncBN needs GPUs"):
        check_before_training(cfg, resume=False, eval_only=False)


@pytest.mark.parametrize(("freeze_at", "warns"), [(0, False), (1, True)])
def test_ssd_is_warned_about_frozen_stages_not_about_the_norm_of_another_backbone(cfg, log, freeze_at, warns):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "SSD", "build_ssd_vgg16_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.INPUT.FIXED_SIZE = freeze_at, (300, 300)
    cfg.MODEL.KEYPOINT_ON = False
    check_before_training(cfg, resume=False, eval_only=False)
    assert ("does not learn" in log.text) == warns


# ---- the solver, and the tests in between ------------------------------------------------------


def refused(cfg, *overrides, **kwargs):
    """The sentence with which `check_before_training` refuses a config."""
    cfg.merge_from_list(["MODEL.KEYPOINT_ON", False, *overrides])
    with pytest.raises(UserError) as error:
        check_before_training(cfg, **{"resume": False, "eval_only": False, **kwargs})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("SOLVER.ACCUMULATE_STEPS", 1),
        ("SOLVER.MAX_EPOCHS", 0),
        ("SOLVER.MAX_TIME", 0),
        ("SOLVER.PATIENCE", 0),
        ("SOLVER.REFERENCE_IMS_PER_BATCH", 0),
        ("SOLVER.REFERENCE_WORLD_SIZE", 0),
        ("TEST.EVAL_START", 0),
        ("TEST.VAL_LOSS_PERIOD", 0),
        ("LOG_PERIOD", 1),
    ],
)
def test_a_number_below_the_least_is_refused_with_it(cfg, key, least):
    found = float(least - 1) if key == "SOLVER.MAX_TIME" else least - 1
    assert refused(cfg, key, least - 1) == f"{key} is {found}, but must be at least {least}"


@pytest.mark.parametrize("decay", [-0.5, 1.0])
def test_a_decay_that_is_none_is_found_before_training(cfg, decay):
    words = f"MODEL.EMA.DECAY is {decay}, but must be at least 0 and below 1"
    assert refused(cfg, "MODEL.EMA.DECAY", decay) == words


LOSS_PERIOD = ("TEST.VAL_LOSS_PERIOD", 5)
VAL_FLOW = ("WORKFLOW", [["train", 1], ["val", 1]])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "SOLVER.LR_SCHEDULER_NAME is 'Cosine', but must be one of"),
        (["SOLVER.MOMENTUM_SCHEDULE", [[0, 1.5]]], "SOLVER.MOMENTUM_SCHEDULE has the momentum 1.5"),
        (["WORKFLOW", [["val", 1]]], "WORKFLOW is [['val', 1]], which never trains"),
        (["WORKFLOW", [["train", 0]]], "WORKFLOW has the entry ['train', 0]"),
        (
            [*LOSS_PERIOD, "DATASETS.TEST", ()],
            "TEST.VAL_LOSS_PERIOD or a val flow in WORKFLOW is set, but DATASETS.TEST is empty",
        ),
        (
            [*VAL_FLOW, "DATASETS.TEST", ()],
            "TEST.VAL_LOSS_PERIOD or a val flow in WORKFLOW is set, but DATASETS.TEST is empty",
        ),
        (
            ["TEST.BEST_METRIC", "auto", "DATASETS.TEST", ()],
            "TEST.BEST_METRIC is set, but DATASETS.TEST is empty",
        ),
        (["TEST.EVAL_START", 3], "TEST.EVAL_START is 3, but TEST.EVAL_PERIOD is 0: set it too"),
        (
            ["TEST.BEST_METRIC", "val/total_loss"],
            "TEST.BEST_METRIC is val/total_loss, but no validation losses are computed: set",
        ),
        (["SOLVER.PATIENCE", 3], "SOLVER.PATIENCE is 3: it needs TEST.BEST_METRIC, and TEST.EVAL_PERIOD"),
        (["SOLVER.PATIENCE", 3, "TEST.EVAL_PERIOD", 5], "SOLVER.PATIENCE is 3: it needs TEST.BEST_METRIC"),
        (["SOLVER.PATIENCE", 3, "TEST.BEST_METRIC", "auto"], "SOLVER.PATIENCE is 3: it needs"),
        (["SOLVER.ACCUMULATE_STEPS", 17], "SOLVER.ACCUMULATE_STEPS is 17, but must be from 1 to"),
    ],
)
def test_settings_that_do_not_go_together_are_found_before_training_and_only_then(cfg, overrides, words):
    assert words in refused(cfg, *overrides)
    # Of these nothing is used when a model is evaluated.
    cfg.DATASETS.TEST = ("few_shapes",)
    check_before_training(cfg, resume=True, eval_only=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ["TEST.EVAL_START", 3, "TEST.EVAL_PERIOD", 5],
        ["TEST.BEST_METRIC", "bbox/AP"],
        ["TEST.BEST_METRIC", "val/total_loss", *LOSS_PERIOD, "SOLVER.PATIENCE", 3],
        ["TEST.BEST_METRIC", "val/total_loss", *VAL_FLOW, "SOLVER.PATIENCE", 3],
        ["TEST.BEST_METRIC", "auto", "TEST.EVAL_PERIOD", 5, "SOLVER.PATIENCE", 3],
        ["SOLVER.MOMENTUM_SCHEDULE", [[0, 0.9], [10, 0.8]], "SOLVER.ACCUMULATE_STEPS", 16],
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"],
        [*LOSS_PERIOD, "MODEL.MASK_ON", True],
    ],
)
def test_settings_that_go_together_are_accepted(cfg, overrides):
    cfg.merge_from_list(["MODEL.KEYPOINT_ON", False, *overrides])
    check_before_training(cfg, resume=False, eval_only=False)


def test_a_metric_may_be_named_without_an_evaluation_in_between(cfg):
    """The last one counts then."""
    cfg.merge_from_list(["MODEL.KEYPOINT_ON", False, "TEST.BEST_METRIC", "auto", "TEST.EVAL_PERIOD", 0])
    check_before_training(cfg, resume=False, eval_only=False)


@pytest.mark.parametrize(("overrides", "refuses"), [(LOSS_PERIOD, True), (VAL_FLOW, True), ((), False)])
def test_validation_losses_of_masks_need_segmentations(cfg, overrides, refuses):
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": "shapes://train/0", "image_id": 3, "height": 64, "width": 64, "annotations": [box]}
    DatasetCatalog.register("boxes_only", lambda: [record])
    MetadataCatalog.get("boxes_only").set(thing_classes=class_names("few_shapes"), evaluator_type="coco")
    cfg.DATASETS.TEST = ("boxes_only",)
    overrides = ["MODEL.MASK_ON", True, *overrides]
    if refuses:
        assert "MODEL.MASK_ON needs a segmentation of every object" in refused(cfg, *overrides)
    else:
        cfg.merge_from_list(["MODEL.KEYPOINT_ON", False, *overrides])
        check_before_training(cfg, resume=False, eval_only=False)


@pytest.mark.parametrize(
    ("overrides", "eval_only", "refuses"),
    [
        (["SOLVER.AMP.ENABLED", True], False, True),
        (["SOLVER.AMP.ENABLED", True], True, False),
        (["TEST.AMP", True], True, True),
        (["TEST.AMP", True], False, True),
        ([], False, False),
    ],
)
def test_bfloat16_that_the_gpu_lacks_is_found_where_it_is_used(
    cfg, overrides, eval_only, refuses, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr("plaintrain.preflight.get_device", lambda name: torch.device("cuda"))
    overrides = ["SOLVER.AMP.PRECISION", "bfloat16", *overrides]
    if refuses:
        said = refused(cfg, *overrides, eval_only=eval_only, resume=True)
        assert said.startswith("SOLVER.AMP.PRECISION is bfloat16")
    else:
        cfg.merge_from_list(["MODEL.KEYPOINT_ON", False, *overrides])
        check_before_training(cfg, resume=True, eval_only=eval_only)
