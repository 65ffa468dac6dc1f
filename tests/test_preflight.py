"""What a config is settled to before a run, and what is refused: keypoints, norms, test sets."""

import pytest

from plaintrain.config import get_cfg
from plaintrain.data.builtin import declare_dataset
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
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
