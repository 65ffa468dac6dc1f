"""The start of a run: command line, output folder, checks, seeds, log."""

import functools
import gc
import io
import logging
import os
import random
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

import rank_functions
from processes import Job

from plaintrain import engine
from plaintrain.config import get_cfg, get_value
from plaintrain.data import build_detection_test_loader
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.engine import (
    build_writers,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    require_default,
)
from plaintrain.modeling import build_model
from plaintrain.structures import BoxMode
from plaintrain.utils import comm
from plaintrain.utils.env import collect_env_info, seed_all_rng
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import CommonMetricPrinter, EventStorage, JSONWriter, TensorboardXWriter
from plaintrain.utils.files import atomic_write, move_old_run
from plaintrain.utils.logger import paint_changes, progress, progress_range, setup_logger


def make_weights():
    """A file of weights that fits `rank_functions.TINY_CONFIG`, each byte as a character."""
    cfg, file = get_cfg(), io.BytesIO()
    cfg.merge_from_other_cfg(rank_functions.TINY_CONFIG)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    torch.save({"model": build_model(cfg).state_dict()}, file)
    return file.getvalue().decode("latin-1")


WEIGHTS = make_weights()
RUN_FILES = {
    "model_0000099.pth": "weights at 99",
    "model_final.pth": WEIGHTS,
    "model_best.pth": "best weights",
    "last_checkpoint": "model_0000099.pth",
    "config.yaml": "SEED: 41\n",
    "metrics.json": '{"iteration": 99}\n',
    "log.txt": "an earlier line\n",
    "log.txt.rank1": "an earlier line of rank 1\n",
    "events.out.tfevents.17.host": "events",
    "inference/shapes_val/results.json": "[]",
    "metrics.csv": "iteration\n99\n",
    "report.html": "<html>",
    "run.json": '{"starts": []}',
}


@pytest.fixture(autouse=True)
def leave_no_trace():
    """Restore the generators and the log, which belong to the whole process."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    benchmark = torch.backends.cudnn.benchmark
    precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(precision[0])
    torch.backends.cudnn.allow_tf32 = precision[1]
    logger = logging.getLogger("plaintrain")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def make_cfg(output, *overrides):
    """A config that trains on four declared images and tests on two."""
    cfg = get_cfg()
    cfg.merge_from_other_cfg(rank_functions.TINY_CONFIG)
    cfg.merge_from_list(["OUTPUT_DIR", str(output), *overrides])
    return cfg


def setup(output, *overrides, freeze=False, **args):
    cfg = make_cfg(output, *overrides)
    if freeze:
        cfg.freeze()
    default_setup(cfg, Namespace(**args))
    return cfg


def refused(output, *overrides, **args):
    """The one sentence with which `default_setup` refuses a config."""
    with pytest.raises(UserError) as error:
        setup(output, *overrides, **args)
    assert "\n" not in str(error.value)
    return str(error.value)


def leave_run(folder):
    """Fill a folder with what an earlier run leaves."""
    for name, text in RUN_FILES.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))


def contents(folder):
    """path -> text of every file under a folder."""
    folder = Path(folder)
    return {
        str(p.relative_to(folder)): p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()
    }


def register(name, *, classes=("circle", "square", "triangle"), file_name="shapes://train/0", **metadata):
    """Register a dataset of one image in code, as a fork's script does."""
    annotation = {"bbox": [1.0, 2.0, 30.0, 40.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": file_name, "image_id": 1, "height": 64, "width": 64, "annotations": [annotation]}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=list(classes), **metadata)


# ---- command line ----------------------------------------------------------------------------


def test_parser_takes_flags_and_then_overrides():
    parser = default_argument_parser(epilog="see the guide")
    assert "see the guide" in parser.format_help()
    assert vars(parser.parse_args([])) == {
        "config_file": "",
        "resume": False,
        "eval_only": False,
        "overfit": 0,
        "dry_run": False,
        "quiet": False,
        "debug": False,
        "opts": [],
        "num_gpus": 1,
        "num_machines": 1,
        "machine_rank": 0,
        "dist_url": "auto",
    }
    line = "--config-file a.yaml --resume --eval-only --debug --num-gpus 2 --num-machines 3 --machine-rank 1"
    line += " --overfit 4 --dry-run --quiet --dist-url tcp://h:1 SEED -1 MODEL.WEIGHTS"
    assert vars(parser.parse_args([*line.split(), ""])) == {
        "config_file": "a.yaml",
        "resume": True,
        "eval_only": True,
        "overfit": 4,
        "dry_run": True,
        "quiet": True,
        "debug": True,
        "num_gpus": 2,
        "num_machines": 3,
        "machine_rank": 1,
        "dist_url": "tcp://h:1",
        "opts": ["SEED", "-1", "MODEL.WEIGHTS", ""],
    }


@pytest.mark.parametrize(
    "flag", [["--resume"], ["--num-gpus", "2"], ["--config-file=a.yaml"], ["--nonsense"]]
)
def test_flag_after_an_override_is_an_error_that_says_so(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        default_argument_parser().parse_args(["SOLVER.BASE_LR", "0.1", *flag])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert flag[0] in text and "SOLVER.BASE_LR" in text and "first" in text


def test_unknown_flag_before_the_overrides_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        default_argument_parser().parse_args(["--nonsense", "SEED", "1"])
    assert stop.value.code == 2 and "--nonsense" in capsys.readouterr().err


# ---- a fresh run -----------------------------------------------------------------------------


def test_setup_writes_the_settled_config_and_the_log(output, capsys):
    cfg = setup(output, "SEED", "7", "CUDNN_BENCHMARK", "True")
    assert torch.backends.cudnn.benchmark is True
    assert sorted(os.listdir(output)) == ["config.yaml", "log.txt", "run.json", "run.lock"]
    saved = get_cfg()
    saved.merge_from_file(output / "config.yaml")
    assert saved == cfg and saved.MODEL.ROI_HEADS.NUM_CLASSES == 3
    log, console = (output / "log.txt").read_text(), capsys.readouterr().out
    for text in (log, console):
        assert f"torch: {torch.__version__}" in text
        assert "command line:" in text and "NUM_CLASSES is 3: circle, square, triangle" in text


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    ("architecture", "key"),
    [("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"), ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES")],
)
def test_number_of_classes_comes_from_the_dataset_also_in_a_frozen_config(output, architecture, key, freeze):
    cfg = setup(output, "MODEL.META_ARCHITECTURE", architecture, freeze=freeze)
    assert get_value(cfg, key) == 3 and cfg.is_frozen() is freeze
    others = {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"} - {key}
    assert [get_value(cfg, other) for other in others] == [0]
    assert cfg.SEED >= 0


def test_number_of_classes_that_agrees_is_accepted(output):
    assert setup(output, "MODEL.ROI_HEADS.NUM_CLASSES", "3").MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_number_of_classes_that_contradicts_the_dataset_names_both(output):
    text = refused(output, "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    assert "MODEL.ROI_HEADS.NUM_CLASSES" in text and "80" in text
    assert "engine_tiny_train" in text and " 3 " in text and "circle, square, triangle" in text


def test_the_number_of_another_architecture_does_not_matter(output):
    assert setup(output, "MODEL.RETINANET.NUM_CLASSES", "80").MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_args_may_lack_everything(output):
    default_setup(make_cfg(output), Namespace())
    assert (output / "config.yaml").exists()


# ---- seeds -----------------------------------------------------------------------------------


def test_seed_minus_one_is_drawn_saved_and_logged(output, tmp_path):
    cfg, other = setup(output), setup(tmp_path / "other")
    assert cfg.SEED >= 0 and other.SEED >= 0 and cfg.SEED != other.SEED
    assert f"SEED: {cfg.SEED}\n" in (output / "config.yaml").read_text()
    log = (output / "log.txt").read_text()
    assert f"SEED was -1; it is {cfg.SEED}" in log and str(other.SEED) not in log


def test_drawn_seed_is_reused_on_resume_and_only_then(output):
    first = setup(output).SEED
    resumed = setup(output, resume=True).SEED, setup(output, resume=True, freeze=True).SEED
    assert resumed == (first, first)
    fresh = setup(output).SEED
    assert fresh != first


def test_given_seed_is_kept_on_resume(output):
    setup(output, "SEED", "5")
    assert setup(output, "SEED", "6", resume=True).SEED == 6
    assert setup(output, "SEED", "0", resume=True).SEED == 0


def test_resume_without_an_earlier_run_draws_a_seed(output):
    assert setup(output, resume=True).SEED >= 0


def test_setup_seeds_all_generators(tmp_path):
    def draws(folder, seed):
        setup(tmp_path / folder, "SEED", seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, again, other = draws("a", "5"), draws("b", "5"), draws("c", "6")
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_setup_keeps_what_is_imported_out_of_the_collections_of_the_steps(tmp_path):
    gc.unfreeze()
    setup(tmp_path / "run")
    frozen = gc.get_freeze_count()
    # A second one keeps nothing more, or what the first has left would stay for ever.
    kept = [[] for _ in range(1000)]
    setup(tmp_path / "again")
    assert frozen > 50_000 and len(kept) == 1000 and gc.get_freeze_count() <= frozen


def test_large_seeds_can_be_used():
    seed_all_rng(2**40)
    first = np.random.rand(), torch.rand(()).item()
    seed_all_rng(2**40)
    assert (np.random.rand(), torch.rand(()).item()) == first


# ---- the output folder -----------------------------------------------------------------------


def test_earlier_run_is_moved_to_old_1_and_then_old_2(output):
    leave_run(output)
    (output / "notes.txt").write_text("mine")
    setup(output, "SEED", "1")
    assert contents(output / "old-1") == RUN_FILES
    assert sorted(os.listdir(output)) == [
        "config.yaml",
        "log.txt",
        "notes.txt",
        "old-1",
        "run.json",
        "run.lock",
    ]
    assert str(output / "old-1") in (output / "log.txt").read_text()
    setup(output, "SEED", "2")
    assert contents(output / "old-1") == RUN_FILES
    assert "SEED: 1\n" in (output / "old-2" / "config.yaml").read_text()
    assert "SEED: 2\n" in (output / "config.yaml").read_text()
    assert (output / "notes.txt").read_text() == "mine"


def test_folder_without_a_run_is_left_alone(output):
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    setup(output)
    assert sorted(os.listdir(output)) == ["config.yaml", "log.txt", "notes.txt", "run.json", "run.lock"]


@pytest.mark.parametrize(
    "mistake",
    [
        ("DATASETS.TRAIN", "('engine_tiny_trian',)"),
        ("MODEL.WEIGHTS", "/nowhere/weights.pth"),
        ("SOLVER.IMS_PER_BATCH", "0"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "80"),
        ("MODEL.KEYPOINT_ON", "True"),
        ("MODEL.LOAD_PROPOSALS", "True"),
        ("MODEL.BACKBONE.NAME", "build_resnet50"),
        ("INPUT.AUGMENTATIONS", "['RandomIoUCorp']"),
    ],
)
def test_start_that_is_refused_leaves_the_earlier_run_in_place(output, mistake):
    leave_run(output)
    refused(output, *mistake)
    left = contents(output)
    assert left.pop("log.txt").startswith(RUN_FILES["log.txt"])
    assert left == {name: text for name, text in RUN_FILES.items() if name != "log.txt"}


@pytest.mark.parametrize("freeze", [False, True])
def test_weights_inside_the_folder_that_is_moved_are_still_found(output, freeze):
    leave_run(output)
    cfg = setup(output, "MODEL.WEIGHTS", str(output / "model_final.pth"), freeze=freeze)
    assert Path(cfg.MODEL.WEIGHTS).read_bytes().decode("latin-1") == WEIGHTS
    assert cfg.is_frozen() is freeze
    saved = get_cfg()
    saved.merge_from_file(output / "config.yaml")
    assert saved.MODEL.WEIGHTS == cfg.MODEL.WEIGHTS


def test_weights_inside_the_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leave_run("out")
    cfg = setup("out", "MODEL.WEIGHTS", "./out/model_final.pth")
    assert Path(cfg.MODEL.WEIGHTS).read_bytes().decode("latin-1") == WEIGHTS


def test_weights_inside_the_folder_that_are_no_file_of_the_run_stay_where_they_are(output):
    leave_run(output)
    weights = output / "pretrained.pth"
    weights.write_bytes(WEIGHTS.encode("latin-1"))
    cfg = setup(output, "MODEL.WEIGHTS", str(weights))
    assert str(weights) == cfg.MODEL.WEIGHTS and weights.exists()


def test_resume_moves_nothing(output):
    leave_run(output)
    setup(output, "SEED", "3", resume=True)
    kept = {
        name: text for name, text in RUN_FILES.items() if name not in ("config.yaml", "log.txt", "run.json")
    }
    assert kept.items() <= contents(output).items()
    assert not (output / "old-1").exists()
    assert (output / "log.txt").read_text().startswith(RUN_FILES["log.txt"])


def test_a_different_config_on_resume_keeps_the_earlier_ones(output):
    setup(output, "SEED", "1")
    setup(output, "SEED", "1", resume=True)
    assert not (output / "config-1.yaml").exists()
    first = (output / "config.yaml").read_text()
    setup(output, "SEED", "1", "SOLVER.BASE_LR", "0.5", resume=True)
    second = (output / "config.yaml").read_text()
    assert (output / "config-1.yaml").read_text() == first and "BASE_LR: 0.5" in second
    assert str(output / "config-1.yaml") in (output / "log.txt").read_text()
    setup(output, "SEED", "1", "SOLVER.BASE_LR", "0.25", resume=True)
    assert (output / "config-1.yaml").read_text() == first
    assert (output / "config-2.yaml").read_text() == second


def test_eval_only_touches_nothing_of_the_run_but_its_log(output):
    leave_run(output)
    setup(output, "MODEL.WEIGHTS", str(output / "model_final.pth"), "SEED", "9", eval_only=True)
    left = contents(output)
    assert left.pop("log.txt").startswith(RUN_FILES["log.txt"])
    assert left == {name: text for name, text in RUN_FILES.items() if name != "log.txt"}


def test_eval_only_needs_weights_or_resume(output):
    text = refused(output, eval_only=True)
    assert "MODEL.WEIGHTS" in text and "--resume" in text
    setup(output, eval_only=True, resume=True)


def test_eval_only_does_not_need_the_files_of_the_training_set(output):
    cfg = make_cfg(output)
    gone = {"FORMAT": "coco", "JSON": "/nowhere/train.json", "IMAGE_ROOT": "/nowhere"}
    cfg.merge_from_other_cfg({"DATASETS": {"DECLARE": {"engine_gone": gone}, "TRAIN": ("engine_gone",)}})
    default_setup(cfg, Namespace(eval_only=True, resume=True))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_output_folder_that_is_a_file_is_refused(output):
    output.write_text("in the way")
    text = refused(output)
    assert "OUTPUT_DIR" in text and str(output) in text
    text = refused(output / "below")
    assert "OUTPUT_DIR" in text and str(output / "below") in text
    assert output.read_text() == "in the way"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_without_permission_is_refused(output):
    output.mkdir(mode=0o500)
    assert str(output) in refused(output)


# ---- checks before training ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_unregistered_dataset_names_the_nearest(output, key):
    text = refused(output, key, "('engine_tiny_trian',)")
    assert "'engine_tiny_trian'" in text and "engine_tiny_train" in text


def test_no_dataset_at_all_is_refused(output):
    assert "DATASETS.TRAIN" in refused(output, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()")
    assert "DATASETS.TRAIN" in refused(output, "DATASETS.TRAIN", "()")


def test_evaluating_needs_no_training_set(output):
    cfg = setup(output, "DATASETS.TRAIN", "()", eval_only=True, resume=True)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_declaration_that_is_wrong_names_its_key(output):
    text = refused(output, "DATASETS.DECLARE.engine_tiny_val.FORMAT", "png")
    assert "DATASETS.DECLARE.engine_tiny_val" in text and "coco" in text


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ("/nowhere/weights.pth", "/nowhere/weights.pth"),
        ("torchvision://resnet50/IMAGENET1K_V9", "IMAGENET1K_V2"),
        ("torchvision://resnet51/IMAGENET1K_V1", "resnet51"),
    ],
)
def test_missing_weights_are_found_before_training(output, weights, named):
    text = refused(output, "MODEL.WEIGHTS", weights)
    assert "MODEL.WEIGHTS" in text and weights in text and named in text


def test_batch_of_no_images_is_refused(output):
    for size in ("0", "-4"):
        text = refused(output, "SOLVER.IMS_PER_BATCH", size)
        assert "SOLVER.IMS_PER_BATCH" in text and size in text


@pytest.mark.parametrize(("key", "value"), [("TEST.IMS_PER_BATCH", "0"), ("DATALOADER.NUM_WORKERS", "-1")])
def test_numbers_that_the_loaders_cannot_use_are_refused(output, key, value):
    with pytest.raises(UserError) as error:
        cfg = setup(output, key, value)
        build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])
    assert key in str(error.value) and value in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "key"),
    [
        ("build_resnet_fpn_backbone", "MODEL.RESNETS.NORM"),
        ("build_resnet_fpn_backbone", "MODEL.FPN.NORM"),
        ("build_mobilenet_v3_large_fpn_backbone", "MODEL.RESNETS.NORM"),
        ("build_tiny_backbone", "MODEL.TINY.NORM"),
    ],
)
def test_sync_bn_without_gpus_is_refused(output, backbone, key):
    text = refused(output, "MODEL.BACKBONE.NAME", backbone, key, "SyncBN")
    assert "SyncBN" in text and "cpu" in text and "BN" in text.replace("SyncBN", "")


@pytest.mark.parametrize(
    ("backbone", "key"),
    [("build_resnet_fpn_backbone", "MODEL.TINY.NORM"), ("build_tiny_backbone", "MODEL.RESNETS.NORM")],
)
def test_sync_bn_of_a_backbone_that_is_not_used_does_not_matter(output, backbone, key):
    anchors = ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    assert setup(output, "MODEL.BACKBONE.NAME", backbone, key, "SyncBN", *anchors).SEED >= 0


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "cpu:x"])
def test_device_that_cannot_be_used_is_refused(output, device):
    text = refused(output, "MODEL.DEVICE", device)
    assert "MODEL.DEVICE" in text and repr(device) in text


def test_dataset_without_evaluator_type_is_scored_with_coco_metrics_and_says_so(output):
    register("engine_unscored")
    setup(output, "DATASETS.TRAIN", "('engine_unscored',)", "DATASETS.TEST", "('engine_unscored',)")
    assert MetadataCatalog.get("engine_unscored").evaluator_type == "coco"
    warnings = [line for line in (output / "log.txt").read_text().splitlines() if "WARNING" in line]
    assert any("engine_unscored" in line and "COCO" in line for line in warnings)


def test_unknown_evaluator_type_is_found_before_training(output):
    register("engine_odd", evaluator_type="cityscapes")
    text = refused(output, "DATASETS.TEST", "('engine_odd',)")
    assert "engine_odd" in text and "'cityscapes'" in text and "coco" in text and "pascal_voc" in text


def test_missing_test_images_are_found_before_training(output, tmp_path):
    missing = str(tmp_path / "gone.jpg")
    register("engine_imageless", file_name=missing, evaluator_type="coco")
    assert missing in refused(output, "DATASETS.TEST", "('engine_imageless',)")


def test_train_and_test_sets_of_different_classes_are_refused(output):
    register("engine_cats", classes=("cat", "dog"), evaluator_type="coco")
    text = refused(output, "DATASETS.TEST", "('engine_cats',)")
    assert "engine_tiny_train" in text and "engine_cats" in text and "circle" in text and "dog" in text


def test_order_of_the_classes_counts(output):
    register("engine_turned", classes=("square", "circle", "triangle"), evaluator_type="coco")
    assert "engine_turned" in refused(output, "DATASETS.TEST", "('engine_turned',)")


def test_frozen_backbone_without_weights_is_warned_about(output, tmp_path):
    setup(output, "MODEL.BACKBONE.FREEZE_AT", "1")
    setup(tmp_path / "tiny")
    assert "FREEZE_AT" in (output / "log.txt").read_text().split("config:")[0]
    assert "FREEZE_AT" not in (tmp_path / "tiny" / "log.txt").read_text().split("config:")[0]


# ---- on several ranks ------------------------------------------------------------------------


def test_two_ranks_agree_on_seed_classes_and_folder(tmp_path):
    leave_run(tmp_path / "job" / "output")
    job = Job(rank_functions.setup_frozen, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    first, second = job.results()
    assert first == second
    assert first["seed"] >= 0 and first["classes"] == 3 and first["frozen"]
    assert Path(first["weights"]).read_bytes().decode("latin-1") == WEIGHTS
    output = job.folder / "output"
    assert sorted(os.listdir(output)) == [
        "config.yaml",
        "log.txt",
        "log.txt.rank1",
        "old-1",
        "run.json",
        "run.lock",
    ]
    assert f"SEED: {first['seed']}\n" in (output / "config.yaml").read_text()
    assert "rank 0 of 2" in (output / "log.txt").read_text()
    assert "rank 1 of 2" in (output / "log.txt.rank1").read_text()
    # The global generators of the ranks differ.
    draws = [float((job.folder / f"draw-{rank}.txt").read_text()) for rank in (0, 1)]
    assert draws[0] != draws[1]


def test_batch_that_two_ranks_cannot_share_is_said_once(tmp_path):
    job = Job(rank_functions.setup_odd_batch, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 1 and "Traceback" not in job.output
    said = [line for line in job.output.splitlines() if "error: " in line]
    assert len(said) == 1 and "SOLVER.IMS_PER_BATCH is 3" in said[0] and "2 processes" in said[0]


# ---- the schedule ------------------------------------------------------------------------------


def test_the_settled_schedule_is_in_the_saved_config_and_in_the_log(output):
    keys = ["SOLVER.MAX_EPOCHS", "3", "SOLVER.BY_EPOCH", "True", "SOLVER.STEPS", "(2,)"]
    cfg = setup(output, *keys, "SOLVER.IMS_PER_BATCH", "3", "TEST.EVAL_PERIOD", "1", freeze=True)
    # 4 images in batches of 3.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.TEST.EVAL_PERIOD) == (6, (4,), 2)
    log = (output / "log.txt").read_text().split("config:")[0]
    assert "the schedule for this run:" in log and "SOLVER.STEPS: (2,) -> (4,)" in log
    saved = get_cfg()
    saved.merge_from_file(output / "config.yaml")
    assert saved.SOLVER == cfg.SOLVER and not saved.SOLVER.BY_EPOCH


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["SOLVER.REFERENCE_IMS_PER_BATCH", "8", "SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0"),
        (["SOLVER.REFERENCE_WORLD_SIZE", "-8"], "SOLVER.REFERENCE_WORLD_SIZE is -8"),
        (["SOLVER.MAX_EPOCHS", "-1"], "SOLVER.MAX_EPOCHS is -1"),
        (["SOLVER.BY_EPOCH", "True"], "SOLVER.BY_EPOCH counts in epochs"),
    ],
)
def test_numbers_that_no_schedule_can_be_made_of_are_refused_by_their_key(output, overrides, said):
    assert refused(output, *overrides).startswith(said)


def test_evaluating_does_not_settle_the_schedule(output):
    (output / "model_final.pth").parent.mkdir()
    (output / "model_final.pth").write_bytes(WEIGHTS.encode("latin-1"))
    keys = ["SOLVER.BY_EPOCH", "True", "MODEL.WEIGHTS", str(output / "model_final.pth")]
    assert setup(output, *keys, eval_only=True).SOLVER.MAX_ITER == get_cfg().SOLVER.MAX_ITER


@pytest.mark.parametrize(
    ("value", "precision", "tf32"),
    [("highest", "highest", False), ("high", "high", True), ("", "medium", True)],
)
def test_the_precision_of_float32_is_set_or_left_alone(output, value, precision, tf32):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    setup(output, "FLOAT32_PRECISION", value)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 == tf32


# ---- the model of several processes, and keys that a script does not read ----------------------


def test_a_single_process_does_not_wrap_its_model():
    model = torch.nn.Linear(1, 1)
    assert create_ddp_model(model) is model


def test_a_key_that_a_script_does_not_read_is_refused_if_it_is_set():
    cfg = get_cfg()
    require_default(cfg, "TEST.VAL_LOSS_PERIOD", "it is")
    require_default(cfg, "WORKFLOW", "it is")
    cfg.merge_from_list(["TEST.VAL_LOSS_PERIOD", 5, "WORKFLOW", [["train", 2]]])
    with pytest.raises(UserError) as error:
        require_default(cfg, "TEST.VAL_LOSS_PERIOD", "this one does not validate")
    assert str(error.value) == "TEST.VAL_LOSS_PERIOD is 5, but here it must be 0: this one does not validate"
    with pytest.raises(UserError, match=r"WORKFLOW is \[\['train', 2\]\], .* must be \[\['train', 1\]\]: no"):
        require_default(cfg, "WORKFLOW", "no")


# ---- writers ---------------------------------------------------------------------------------


def test_default_writers_are_console_json_and_tensorboard(tmp_path):
    writers = default_writers(str(tmp_path), 10)
    assert [type(writer) for writer in writers] == [CommonMetricPrinter, JSONWriter, TensorboardXWriter]
    setup_logger(str(tmp_path))
    with EventStorage(0) as storage:
        storage.put_scalars(total_loss=1.5, time=2.0)
        for writer in writers:
            writer.write()
            writer.close()
    assert '"total_loss": 1.5' in (tmp_path / "metrics.json").read_text()
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(tmp_path))
    # 9 iterations of 2 seconds are left.
    assert "eta: 0:00:18" in (tmp_path / "log.txt").read_text()


def test_writers_are_those_that_the_config_names(tmp_path):
    cfg = get_cfg()
    assert [type(w) for w in build_writers(cfg)] == [CommonMetricPrinter, JSONWriter, TensorboardXWriter]
    cfg.merge_from_list(["OUTPUT.WRITERS", ("csv",), "OUTPUT_DIR", str(tmp_path)])
    (writer,) = build_writers(cfg)
    with EventStorage(0) as storage:
        storage.put_scalars(total_loss=1.5)
        writer.write()
        writer.close()
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_writer_that_nobody_knows_is_refused(output):
    with pytest.raises(UserError) as error:
        setup(output, "OUTPUT.WRITERS", ("json", "jsn"))
    assert str(error.value) == "OUTPUT.WRITERS holds 'jsn'; known: console, json, csv, tensorboard"


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("plaintrain.utils.comm.get_rank", lambda: 1)
    assert default_writers(str(tmp_path), 10) == [] == build_writers(get_cfg())


# ---- files -----------------------------------------------------------------------------------


def test_atomic_write_replaces_the_file_only_at_the_end(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("before")
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with atomic_write(str(path)) as f:
        f.write("after \u00e4")
        f.flush()
        assert path.read_text() == "before"
    assert path.read_text(encoding="utf-8") == "after \u00e4" and os.listdir(tmp_path) == ["a.txt"]
    assert order[:2] == ["fsync", "replace"]


def test_atomic_write_of_bytes(tmp_path):
    with atomic_write(tmp_path / "a.bin", "wb") as f:
        f.write(b"\x00\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_atomic_write_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised, atomic_write(str(path)) as f:
        f.write("half of")
        raise error
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]
    if expected is UserError:
        assert str(path) in str(raised.value) and "No space left" in str(raised.value)


def test_atomic_write_into_a_missing_folder_names_the_file(tmp_path):
    path = str(tmp_path / "gone" / "a.txt")
    with pytest.raises(UserError, match="gone/a.txt"), atomic_write(path) as f:
        f.write("x")


def test_move_old_run_skips_the_numbers_that_are_taken(tmp_path):
    (tmp_path / "old-1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert move_old_run(str(tmp_path)) is None
    leave_run(tmp_path)
    assert move_old_run(str(tmp_path)) == str(tmp_path / "old-2")
    assert contents(tmp_path / "old-2") == RUN_FILES
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "old-1", "old-2"]


# ---- environment and log ---------------------------------------------------------------------


def test_environment_report_names_versions_and_the_dataset_folder(monkeypatch):
    monkeypatch.setenv("PLAINTRAIN_DATASETS", "/data/sets")
    rows = dict(line.split(": ", 1) for line in collect_env_info().splitlines())
    assert rows["python"] == sys.version.split()[0] and rows["torch"] == torch.__version__
    assert rows["numpy"] == np.__version__ and rows["PLAINTRAIN_DATASETS"] == "/data/sets"
    assert rows["torch threads"] == str(torch.get_num_threads()) and "GPUs" in rows


def test_log_goes_to_the_console_on_rank_0_only_and_to_a_file_of_each_rank(tmp_path, capsys):
    setup_logger(str(tmp_path), 0)
    logging.getLogger("plaintrain.some.module").info("from rank 0")
    setup_logger(str(tmp_path), 1)
    logging.getLogger("plaintrain.some.module").warning("from rank 1")
    console = capsys.readouterr()
    assert "from rank 0" in console.out and "from rank 1" not in console.out + console.err
    log, other = (tmp_path / "log.txt").read_text(), (tmp_path / "log.txt.rank1").read_text()
    assert "plaintrain.some.module" in log and "from rank 0" in log and "from rank 1" not in log
    assert "WARNING" in other and "from rank 1" in other and "from rank 0" not in other


def test_second_setup_of_the_log_doubles_no_line_and_appends(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("earlier\n")
    for _ in range(3):
        logger = setup_logger(str(tmp_path))
    logger.info("once")
    assert capsys.readouterr().out.count("once") == 1
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("earlier\n") and log.count("once") == 1


def test_log_goes_on_where_the_console_is_closed_or_lost(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (None, os.fdopen(writer, "w", buffering=1)):
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            monkeypatch.setattr(sys, name, stream)
        logger = setup_logger(str(tmp_path))
        logger.info("to the file")
        print("to nobody", flush=True)
        assert list(tqdm(range(2))) == [0, 1]
    assert (tmp_path / "log.txt").read_text().count("to the file") == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_progress_bar_shows_on_rank_0_only(monkeypatch, rank):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(range(3), desc="training", total=3)) == [0, 1, 2]
    assert ("training" in sys.stderr.getvalue()) is (rank == 0)


def test_progress_bar_stays_away_from_files(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress(range(3), desc="training", total=3)) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


def test_quiet_console_shows_warnings_only_and_no_bar_and_the_file_has_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    logger = setup_logger(str(tmp_path), quiet=True)
    logger.info("all is well")
    logger.warning("look here")
    assert list(progress(range(2), desc="training")) == [0, 1]
    assert sys.stderr.getvalue() == ""
    out = capsys.readouterr().out
    assert "look here" in out and "all is well" not in out
    assert "all is well" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colors_are_for_a_terminal_only(tmp_path, monkeypatch, no_color):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    logger = setup_logger(str(tmp_path))
    logger.warning("look %s", "here")
    logger.info("+1.00 -2.00 - nan+1", extra={"colored": paint_changes("+1.00 -2.00 - nan+1")})
    text = sys.stdout.getvalue()
    if no_color:
        assert "\033" not in text and "+1.00 -2.00" in text
    else:
        assert "look here\033[0m" in text
        assert "\033[32m+1.00\033[0m \033[31m-2.00\033[0m - nan+1" in text
    assert "\033" not in (tmp_path / "log.txt").read_text()


def test_bar_shows_the_losses_that_writers_have_read_and_never_reads_itself(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (150, 40))
    monkeypatch.setattr("tqdm.std.tqdm.__init__", functools.partialmethod(tqdm.__init__, mininterval=0))
    with EventStorage(2) as storage:
        for iteration in progress_range(2, 6, first=1):
            storage.iter = iteration
            storage.put_scalars(total_loss=1.5, loss_cls=0.25, time=60.0)
            storage.put_scalars(**{"val/loss_cls": 9.0}, smoothing_hint=False)
            if iteration == 4:
                storage.latest_with_smoothing_hint(20)
            # Were they read by the bar, none would wait.
            assert storage._num_pending == {2: 4, 3: 8, 4: 0, 5: 4}[iteration]
    shown = sys.stderr.getvalue()
    assert "loss 1.5, cls 0.25, eta 0:01:00" in shown and "9" not in shown.split("eta")[1][:8]
    assert "1/5" in shown and "5/5" in shown


def test_bar_needs_no_storage(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress_range(0, 3)) == [0, 1, 2]


@pytest.mark.parametrize("name", ["broadcast_buffers", "forward_sync_buffers"])
def test_several_processes_share_gradients_without_copies_and_send_no_buffers(monkeypatch, name):
    def before(model, device_ids, gradient_as_bucket_view, broadcast_buffers=True):
        return device_ids, gradient_as_bucket_view, broadcast_buffers

    def since_2_14(
        model, device_ids, gradient_as_bucket_view, broadcast_buffers=None, forward_sync_buffers=None
    ):
        assert broadcast_buffers is None
        return device_ids, gradient_as_bucket_view, forward_sync_buffers

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    wrapper = before if name == "broadcast_buffers" else since_2_14
    monkeypatch.setattr(engine, "DistributedDataParallel", wrapper)
    assert create_ddp_model(torch.nn.Linear(1, 1)) == (None, True, False)
