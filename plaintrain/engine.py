"""The start of every script: command line, output folder, log, seeds, and checks before training."""

import argparse
import logging
import logging.handlers
import os
import sys

import torch

from plaintrain.config import check_cfg, get_cfg, get_value
from plaintrain.data.builtin import EVALUATORS, declare_datasets
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, common_class_names
from plaintrain.data.loader import check_batch_size
from plaintrain.data.records import check_image_files
from plaintrain.evaluation.loop import flatten_results
from plaintrain.launch import launch
from plaintrain.modeling.build import get_device, num_classes_key
from plaintrain.utils import comm
from plaintrain.utils.env import collect_env_info, seed_all_rng
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from plaintrain.utils.files import atomic_write, move_old_run
from plaintrain.utils.logger import setup_logger
from plaintrain.weights import locate_weights

__all__ = ["default_argument_parser", "default_setup", "default_writers", "launch"]

logger = logging.getLogger(__name__)

_LEAST = {
    "DATALOADER.NUM_WORKERS": 0,
    "LOG_PERIOD": 1,
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": 0,
    "SOLVER.CHECKPOINT_PERIOD": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.IMS_PER_BATCH": 1,
}


class _Overrides(argparse.Action):
    """KEY VALUE pairs; argparse would swallow a flag among them without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if value.startswith("--"):
                parser.error(f"{value} stands after the overrides {values[0]} ...; put flags first")
        setattr(namespace, self.dest, values)


def default_argument_parser(epilog=None):
    """The parser of the training scripts; its result goes to `default_setup` and `launch`."""
    parser = argparse.ArgumentParser(epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate MODEL.WEIGHTS (or, with --resume, the last checkpoint)",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1, help="machines of the job")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument(
        "--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; needed on several machines"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        action=_Overrides,
        metavar="KEY VALUE",
        help="config overrides, after all flags, for example SOLVER.BASE_LR 0.01 OUTPUT_DIR out",
    )
    return parser


def default_setup(cfg, args):
    """Prepare a run, and check all that can be checked before it starts.

    Registers DATASETS.DECLARE, draws SEED if it is -1, takes the number of classes from the
    dataset and checks the rest; only then makes OUTPUT_DIR (moving an earlier run's files to
    `old-N` unless resuming or evaluating), starts the log, reports the environment, writes
    `config.yaml` and seeds all generators.

    Args:
        cfg: the config, frozen or not; SEED, the number of classes and MODEL.WEIGHTS are
            settled in place.
        args: what `default_argument_parser` parsed; `resume` and `eval_only` may be missing.

    Raises:
        UserError: anything that would make the run fail later.
    """
    resume, eval_only = getattr(args, "resume", False), getattr(args, "eval_only", False)
    log = setup_logger(None, comm.get_rank())
    # What is said before the output folder may be touched goes into its log file afterwards.
    said = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL)
    log.addHandler(said)
    check_cfg(cfg)
    _set(cfg, "OUTPUT_DIR", os.path.expanduser(cfg.OUTPUT_DIR))
    declare_datasets(cfg)
    _settle_seed(cfg, resume)
    _settle_num_classes(cfg, eval_only)
    _check_before_training(cfg, resume, eval_only)
    # Nothing is moved while another rank still looks at it.
    comm.synchronize()
    _prepare_output(cfg, fresh=not (resume or eval_only))
    log = setup_logger(cfg.OUTPUT_DIR, comm.get_rank())
    for record in said.buffer:
        log.handlers[-1].handle(record)
    logger.info(f"rank {comm.get_rank()} of {comm.get_world_size()}\n{collect_env_info()}")
    logger.info("command line: " + " ".join(sys.argv))
    if comm.is_main_process():
        _write_config(cfg, keep=eval_only)
    logger.info(f"config:\n{cfg.dump()}")
    seed_all_rng(cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    comm.synchronize()


def default_writers(output_dir, max_iter=None):
    """Console, `metrics.json` and TensorBoard; call it on the main process only."""
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(os.path.join(output_dir, "metrics.json")),
        TensorboardXWriter(output_dir),
    ]


def _set(cfg, key, value):
    """Set a dotted key, also in a frozen config."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    if frozen:
        cfg.freeze()


def _prepare_output(cfg, fresh):
    folder = cfg.OUTPUT_DIR
    moved = None
    if comm.is_main_process():
        try:
            os.makedirs(folder, exist_ok=True)
            moved = move_old_run(folder) if fresh else None
            with atomic_write(os.path.join(folder, ".write-test")) as f:
                f.write("")
            os.unlink(os.path.join(folder, ".write-test"))
        except (OSError, UserError) as e:
            raise UserError(f"OUTPUT_DIR {folder!r} cannot be written: {e}") from e
    moved = comm.broadcast(moved)
    os.makedirs(folder, exist_ok=True)
    if not moved:
        return
    logger.warning(f"{folder} held an earlier run; its files are now in {moved}")
    weights = os.path.abspath(os.path.expanduser(cfg.MODEL.WEIGHTS))
    in_folder = os.path.dirname(weights) == os.path.abspath(folder)
    if cfg.MODEL.WEIGHTS and in_folder and not os.path.exists(weights):
        _set(cfg, "MODEL.WEIGHTS", os.path.join(moved, os.path.basename(weights)))
        logger.warning(f"MODEL.WEIGHTS moved with them: {cfg.MODEL.WEIGHTS}")


def _settle_seed(cfg, resume):
    if cfg.SEED >= 2**32:
        raise UserError(f"SEED is {cfg.SEED}, but must be below 2**32")
    if cfg.SEED >= 0:
        return
    saved = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    seed = None
    if resume and comm.is_main_process() and os.path.isfile(saved):
        before = get_cfg()
        before.merge_from_file(saved)
        seed = before.SEED if before.SEED >= 0 else None
    seed = comm.broadcast(seed)
    source = "of the run that is resumed" if seed is not None else "drawn now"
    _set(cfg, "SEED", comm.shared_random_seed() if seed is None else seed)
    logger.info(f"SEED was -1; it is {cfg.SEED}, {source}")


def _settle_num_classes(cfg, eval_only):
    """Take the number of classes from the datasets, and refuse a number that contradicts them."""
    key = num_classes_key(cfg)
    # Who only evaluates need not have the training images.
    train = () if eval_only and cfg.DATASETS.TEST else cfg.DATASETS.TRAIN
    names = [*train, *cfg.DATASETS.TEST]
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty: give --config-file, or name a dataset")
    classes = common_class_names(names)
    given = get_value(cfg, key)
    if given not in (0, len(classes)):
        raise UserError(
            f"{key} is {given}, but the dataset {names[0]} has {len(classes)} classes: "
            f"{', '.join(classes)}; set it to 0 to take the dataset's number"
        )
    _set(cfg, key, len(classes))
    logger.info(f"{key} is {len(classes)}: {', '.join(classes)}")


def _check_values(cfg):
    for key, least in _LEAST.items():
        if get_value(cfg, key) < least:
            raise UserError(f"{key} is {get_value(cfg, key)}, but must be at least {least}")
    for row in cfg.TEST.EXPECTED_RESULTS:
        if not isinstance(row, list) or len(row) != 4:
            raise UserError(f"TEST.EXPECTED_RESULTS holds {row!r}, not [task, metric, value, tolerance]")


def _check_before_training(cfg, resume, eval_only):
    _check_values(cfg)
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise UserError("DATASETS.TRAIN is empty: name at least one dataset")
        check_batch_size(cfg)
    for name in cfg.DATASETS.TEST:
        _check_test_dataset(name)
    if cfg.MODEL.WEIGHTS and not resume:
        locate_weights(cfg.MODEL.WEIGHTS)
    if eval_only and not cfg.MODEL.WEIGHTS and not resume:
        raise UserError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume for the last checkpoint")
    if not eval_only:
        _check_norms(cfg, resume)


def _check_test_dataset(name):
    """Refuse a test set whose images are missing or that no evaluator can score."""
    check_image_files(DatasetCatalog.get(name), name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") is None:
        logger.warning(f"the dataset {name} has no evaluator_type; it is scored with COCO metrics")
        metadata.set(evaluator_type="coco")
    elif metadata.evaluator_type not in EVALUATORS:
        raise UserError(
            f"the dataset {name} has the evaluator_type {metadata.evaluator_type!r}; known: "
            + ", ".join(EVALUATORS)
        )


def _check_norms(cfg, resume):
    device = get_device(cfg.MODEL.DEVICE)
    tiny = cfg.MODEL.BACKBONE.NAME == "build_tiny_backbone"
    norms = (cfg.MODEL.TINY.NORM,) if tiny else (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM)
    if "SyncBN" in norms and device.type != "cuda":
        raise UserError(f"SyncBN needs GPUs, but MODEL.DEVICE is {device}; use BN or GN")
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT > 0 or (cfg.MODEL.RESNETS.NORM == "FrozenBN" and not tiny)
    if frozen and not cfg.MODEL.WEIGHTS and not resume:
        logger.warning(
            "MODEL.WEIGHTS is empty, but parts of the backbone are frozen (MODEL.BACKBONE.FREEZE_AT "
            f"{cfg.MODEL.BACKBONE.FREEZE_AT}, MODEL.RESNETS.NORM {cfg.MODEL.RESNETS.NORM}): from "
            "random weights this does not learn; use FREEZE_AT 0 with BN or GN"
        )


def _write_config(cfg, keep):
    """Write config.yaml; a different one that is there becomes config-N.yaml, or stays if `keep`."""
    path, text = os.path.join(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump()
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            if f.read() == text or keep:
                return
        number = 1
        while os.path.exists(os.path.join(cfg.OUTPUT_DIR, f"config-{number}.yaml")):
            number += 1
        kept = os.path.join(cfg.OUTPUT_DIR, f"config-{number}.yaml")
        os.replace(path, kept)
        changes = ", ".join(_changes(kept, cfg))
        logger.warning(f"the config differs from that of the run ({changes}); the earlier one is now {kept}")
    with atomic_write(path) as f:
        f.write(text)


def _changes(path, cfg):
    """`KEY before -> now` for every line in which a saved config differs."""
    before = get_cfg()
    before.merge_from_file(path)
    before, now = flatten_results(before), flatten_results(cfg)
    keys = sorted(before.keys() | now.keys())
    return [
        f"{key.replace('/', '.')} {before.get(key)} -> {now.get(key)}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
