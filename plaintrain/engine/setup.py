"""Setup of a run: config, output folder, log, seeds, and checks before training."""

import gc
import logging
import logging.handlers
import os
import sys
from argparse import Namespace
from collections.abc import Collection, Sequence

import torch

from plaintrain.checkpoint.files import list_resume_candidates, read_last_checkpoint
from plaintrain.checkpoint.resume_check import check_changes
from plaintrain.checkpoint.weight_checks import check_weights
from plaintrain.config import CfgNode, check_cfg, get_cfg, get_value, set_value
from plaintrain.config.yaml import load_chain
from plaintrain.data.build import count_iters_per_epoch
from plaintrain.data.catalog import compute_hashes
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.engine.dry_run import overfit_on, shorten_to_dry_run
from plaintrain.engine.preflight import check_before_training, check_same_data, resolve_num_classes
from plaintrain.engine.run_facts import describe_run, write_run_facts
from plaintrain.solver.schedule import resolve_schedule
from plaintrain.utils import comm
from plaintrain.utils.env import collect_env_info, seed_all_rng
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import WRITERS
from plaintrain.utils.files import atomic_write, move_old_run, remove_unfinished, writing
from plaintrain.utils.heartbeat import set_limit
from plaintrain.utils.lock import lock_folder
from plaintrain.utils.logger import setup_logger
from plaintrain.utils.writers import EventWriter

logger = logging.getLogger(__name__)

# Keys that scripts/plain_train_net.py implements in its loop.
LOOP_OPTIONS = [
    "DEBUG.DUMP_BAD_BATCH",
    "MODEL.EMA.ENABLED",
    "SOLVER.ACCUMULATE_STEPS",
    "SOLVER.AMP.ENABLED",
    "SOLVER.ASYNC_CHECKPOINT",
    "SOLVER.CHECKPOINT_MAX_TO_KEEP",
    "SOLVER.MAX_TIME",
    "SOLVER.ON_NONFINITE",
    "SOLVER.PATIENCE",
    "TEST.AMP",
    "TEST.AUG.ENABLED",
    "TEST.BEST_METRIC",
    "TEST.EVAL_START",
    "TEST.EXPECTED_RESULTS",
    "TEST.VAL_LOSS_PERIOD",
    "WORKFLOW",
]


def load_cfg(args: Namespace) -> CfgNode:
    """Load the config of a command line: --config-file, then the overrides."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    return cfg


def default_setup(cfg: CfgNode, args: Namespace) -> None:
    """Set up a run and check everything that can be checked before it starts.

    Sets SEED, the number of classes, the schedule (`plaintrain.solver.schedule`) and MODEL.WEIGHTS in place,
    also in a frozen config. Only after all checks creates OUTPUT_DIR (moving the files of an earlier run to
    `old-N` unless resuming or evaluating), starts the log, writes `config.yaml` and `run.json`, and seeds
    all generators.

    Args:
        args: the parsed arguments of `default_argument_parser`; any may be missing. With `predictions`, a
            file to score, no model, weights or images are needed.
    """
    resume = getattr(args, "resume", False)
    eval_only = getattr(args, "eval_only", False)
    dry_run = getattr(args, "dry_run", False)
    quiet = getattr(args, "quiet", False)
    if dry_run and (resume or eval_only):
        raise UserError("--dry-run cannot be combined with --resume or --eval-only")
    log = setup_logger(None, comm.get_rank(), quiet=quiet)
    # Buffer log records until the output folder exists.
    buffer = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL)
    log.addHandler(buffer)
    check_cfg(cfg)
    set_value(cfg, "OUTPUT_DIR", os.path.expanduser(cfg.OUTPUT_DIR))
    declare_datasets(cfg)
    _resolve_seed(cfg, resume)
    if getattr(args, "overfit", None) is not None:
        overfit_on(cfg, args.overfit)
    with comm.first_on_machine():  # the first rank fills the cache of the datasets
        class_names = resolve_num_classes(cfg, eval_only)
    check_same_data(cfg, eval_only)
    if not eval_only:
        resolve_schedule(cfg, comm.get_world_size(), count_iters_per_epoch)
    needs_model = not getattr(args, "predictions", "")
    model = check_before_training(cfg, resume, eval_only, needs_model)
    if model is not None:
        _check_initial_weights(cfg, model, resume, eval_only, class_names)
    # All ranks finish reading before files are moved.
    comm.synchronize()
    if dry_run:
        shorten_to_dry_run(cfg)
    _prepare_output(cfg, not eval_only, resume, quiet)
    for record in buffer.buffer:
        log.handlers[-1].handle(record)
    logger.debug(f"rank {comm.get_rank()} of {comm.get_world_size()}\n{collect_env_info()}")
    logger.debug("command line: " + " ".join(sys.argv))
    logger.debug(f"config:\n{cfg.dump()}")
    logger.info(describe_run(cfg, model, class_names, training=not eval_only))
    if comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
        if not (eval_only and os.path.exists(path)):
            with atomic_write(path) as f:
                f.write(cfg.dump())
        if not eval_only:
            write_run_facts(cfg, getattr(args, "config_file", ""))
    _prepare_process(cfg)
    comm.synchronize()


def _check_initial_weights(cfg, model, resume, eval_only, class_names):
    """Check the last checkpoint, or MODEL.WEIGHTS, against config and model."""
    # Only rank 0 reads weights.
    if not comm.is_main_process():
        return
    weights = cfg.MODEL.WEIGHTS
    if resume and eval_only:
        weights = read_last_checkpoint(cfg.OUTPUT_DIR)[0]
    elif resume and list_resume_candidates(cfg.OUTPUT_DIR):
        weights = ""
        check_changes(cfg.OUTPUT_DIR, cfg.dump(), class_names, model, compute_hashes(cfg.DATASETS.TRAIN))
    if weights:
        check_weights(cfg, model, weights, class_names, strict=eval_only)


def _prepare_process(cfg: CfgNode) -> None:
    """Set the timeout, seeds and global options of the process."""
    set_limit(cfg.HANG_TIMEOUT)
    seed_all_rng(cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"
    if not gc.get_freeze_count():
        # Excludes imported modules from garbage collection, which would slow down steps.
        gc.freeze()


def require_default(cfg: CfgNode, key: str, hint: str) -> None:
    """Raise if a key that a script does not support is set."""
    value = get_value(cfg, key)
    default = get_value(get_cfg(), key)
    if value != default:
        raise UserError(f"{key} must be {default} in this script, got {value}; {hint}")


def reject_loop_options(cfg: CfgNode, used: Collection[str] = ()) -> None:
    """Raise if an option of `LOOP_OPTIONS` is set, other than those that the caller's loop has used."""
    for key in LOOP_OPTIONS:
        if key not in used:
            require_default(cfg, key, "scripts/plain_train_net.py supports it")


def default_writers(
    output_dir: str, max_iter: int | None = None, names: Sequence[str] = ("console", "json", "tensorboard")
) -> list[EventWriter]:
    """Build writers, named as in `utils.events.WRITERS`, on the main process; return [] on other ranks."""
    return [WRITERS[name](output_dir, max_iter) for name in names if comm.is_main_process()]


def build_writers(cfg: CfgNode) -> list[EventWriter]:
    """Build the writers of OUTPUT.WRITERS on the main process; return [] on other ranks."""
    return default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, cfg.OUTPUT.WRITERS)


def _prepare_output(cfg: CfgNode, training: bool, resume: bool, quiet: bool) -> None:
    """Create OUTPUT_DIR and start its log; for a training, lock it and move an earlier run."""
    folder = cfg.OUTPUT_DIR
    moved = None
    with writing(f"OUTPUT_DIR {folder!r}"):
        if comm.is_main_process():
            os.makedirs(folder, exist_ok=True)
            if training:
                lock_folder(folder)
                remove_unfinished(folder)
                moved = None if resume else move_old_run(folder)
        moved = comm.broadcast(moved)
        # Other machines may have another file system; each rank writes a log.
        os.makedirs(folder, exist_ok=True)
        setup_logger(folder, comm.get_rank(), quiet=quiet)
    if not moved:
        return
    logger.warning(f"{folder} contained an earlier run; moved its files to {moved}")
    weights = os.path.abspath(os.path.expanduser(cfg.MODEL.WEIGHTS))
    in_folder = os.path.dirname(weights) == os.path.abspath(folder)
    if cfg.MODEL.WEIGHTS and in_folder and not os.path.exists(weights):
        set_value(cfg, "MODEL.WEIGHTS", os.path.join(moved, os.path.basename(weights)))
        logger.warning(f"MODEL.WEIGHTS was moved too, to {cfg.MODEL.WEIGHTS}")


def _resolve_seed(cfg: CfgNode, resume: bool) -> None:
    if cfg.SEED >= 0:
        return
    saved = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    seed = -1
    if resume and comm.is_main_process() and os.path.isfile(saved):
        seed = load_chain(saved)[-1][1].get("SEED", -1)
        if type(seed) is not int or not -1 <= seed < 2**32:
            raise UserError(f"SEED in {saved} must be -1, or at least 0 and below 2**32, got {seed!r}")
    seed = comm.broadcast(seed)
    source = "the seed of the resumed run" if seed >= 0 else "drawn at random"
    set_value(cfg, "SEED", seed if seed >= 0 else comm.shared_random_seed())
    logger.info(f"SEED -1 is now {cfg.SEED}, {source}")
