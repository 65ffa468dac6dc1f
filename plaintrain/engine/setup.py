"""The start of every script: output folder, log, seeds, and checks before training."""

import gc
import logging
import logging.handlers
import os
import sys

import torch

from plaintrain.checkpoint.files import list_resume_candidates, read_last_checkpoint
from plaintrain.checkpoint.resume_check import check_changes
from plaintrain.checkpoint.weight_checks import check_weights
from plaintrain.config import check_cfg, get_cfg, get_value, set_value
from plaintrain.config.yaml import load_chain
from plaintrain.data.build import count_iters_per_epoch
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.engine.dry_run import overfit_on, shorten_to_dry_run
from plaintrain.engine.preflight import check_before_training, resolve_num_classes
from plaintrain.engine.run_facts import write_run_facts
from plaintrain.solver.schedule import resolve_schedule
from plaintrain.utils import comm
from plaintrain.utils.env import collect_env_info, seed_all_rng
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import WRITERS
from plaintrain.utils.files import atomic_write, move_old_run, remove_unfinished, writing
from plaintrain.utils.heartbeat import set_limit
from plaintrain.utils.lock import lock_folder
from plaintrain.utils.logger import setup_logger

logger = logging.getLogger(__name__)

# What a loop does or leaves out; whatever else the config says is done by the functions that it calls.
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


def load_cfg(args):
    """Return the config of a command line: --config-file, then the overrides."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    return cfg


def default_setup(cfg, args):
    """Prepare a run, and check all that can be checked before it starts.

    Registers DATASETS.DECLARE, draws SEED if it is -1, takes the number of classes from the
    dataset, brings the schedule to this run (`plaintrain.solver.schedule`) and checks the rest; only then
    makes OUTPUT_DIR (moving an earlier run's files to `old-N` unless resuming or evaluating), starts the
    log, reports the environment, writes `config.yaml` and `run.json` and seeds all generators.

    Args:
        cfg: the config, frozen or not; SEED, the number of classes, the schedule and MODEL.WEIGHTS
            are settled in place.
        args: what `default_argument_parser` parsed; any of it may be missing. With `predictions`, a file
            to score, no model, weights or images are needed.
    """
    resume = getattr(args, "resume", False)
    eval_only = getattr(args, "eval_only", False)
    dry_run = getattr(args, "dry_run", False)
    quiet = getattr(args, "quiet", False)
    if dry_run and (resume or eval_only):
        raise UserError("--dry-run tries the start of a training: leave out --resume and --eval-only")
    log = setup_logger(None, comm.get_rank(), quiet=quiet)
    # Buffer log records until the output folder exists.
    buffer = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL)
    log.addHandler(buffer)
    check_cfg(cfg)
    set_value(cfg, "OUTPUT_DIR", os.path.expanduser(cfg.OUTPUT_DIR))
    declare_datasets(cfg)
    _settle_seed(cfg, resume)
    if getattr(args, "overfit", 0):
        overfit_on(cfg, args.overfit)
    with comm.first_on_machine():  # reads the datasets
        class_names = resolve_num_classes(cfg, eval_only)
    if not eval_only:
        resolve_schedule(cfg, comm.get_world_size(), count_iters_per_epoch)
    needs_model = not getattr(args, "predictions", "")
    model = check_before_training(cfg, resume, eval_only, needs_model)
    if needs_model:
        _check_start(cfg, model, resume, eval_only, class_names)
    # Nothing is moved while another rank still looks at it.
    comm.synchronize()
    if dry_run:
        shorten_to_dry_run(cfg)
    _prepare_output(cfg, not eval_only, resume, quiet)
    for record in buffer.buffer:
        log.handlers[-1].handle(record)
    logger.info(f"rank {comm.get_rank()} of {comm.get_world_size()}\n{collect_env_info()}")
    logger.info("command line: " + " ".join(sys.argv))
    logger.info(f"config:\n{cfg.dump()}")
    if comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
        if not (eval_only and os.path.exists(path)):
            with atomic_write(path) as f:
                f.write(cfg.dump())
        if not eval_only:
            write_run_facts(cfg, getattr(args, "config_file", ""))
    _prepare_process(cfg)
    comm.synchronize()


def _check_start(cfg, model, resume, eval_only, class_names):
    """Check what the model starts from: the last checkpoint, or MODEL.WEIGHTS."""
    # The files of rank 0 decide for every machine.
    if not comm.is_main_process():
        return
    weights = cfg.MODEL.WEIGHTS
    if resume and eval_only:
        weights = read_last_checkpoint(cfg.OUTPUT_DIR, mmap=True)[0]
    elif resume and list_resume_candidates(cfg.OUTPUT_DIR):
        weights = ""
        check_changes(cfg.OUTPUT_DIR, cfg.dump(), class_names, model)
    if weights:
        check_weights(cfg, model, weights, class_names, strict=eval_only)


def _prepare_process(cfg):
    """What holds for the whole process: limits, seeds, and how the libraries compute."""
    set_limit(cfg.HANG_TIMEOUT)
    seed_all_rng(cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"
    if not gc.get_freeze_count():
        # What is imported lives to the end: collections, which fall within steps, need not look through it.
        gc.freeze()


def require_default(cfg, key, reason):
    """Reject a key that a script does not read, if it is set."""
    value, default = get_value(cfg, key), get_value(get_cfg(), key)
    if value != default:
        raise UserError(f"{key} is {value}, but here it must be {default}: {reason}")


def reject_loop_options(cfg, used=()):
    """Reject options that only scripts/plain_train_net.py reads; a loop reads those of `used` itself."""
    for key in LOOP_OPTIONS:
        if key not in used:
            require_default(cfg, key, "this loop does not read it, scripts/plain_train_net.py does")


def default_writers(output_dir, max_iter=None, names=("console", "json", "tensorboard")):
    """The writers of these names, of `utils.events.WRITERS`, on the main process; [] on the others."""
    return [WRITERS[name](output_dir, max_iter) for name in names if comm.is_main_process()]


def build_writers(cfg):
    """The writers that OUTPUT.WRITERS names, on the main process; [] on the others."""
    return default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, cfg.OUTPUT.WRITERS)


def _prepare_output(cfg, training, resume, quiet):
    """Make OUTPUT_DIR, claim it for a training, move an earlier run in it, and start its log."""
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
        # Of other machines, where the folder may be another; for the log of each rank.
        os.makedirs(folder, exist_ok=True)
        setup_logger(folder, comm.get_rank(), quiet=quiet)
    if not moved:
        return
    logger.warning(f"{folder} held an earlier run; its files are now in {moved}")
    weights = os.path.abspath(os.path.expanduser(cfg.MODEL.WEIGHTS))
    in_folder = os.path.dirname(weights) == os.path.abspath(folder)
    if cfg.MODEL.WEIGHTS and in_folder and not os.path.exists(weights):
        set_value(cfg, "MODEL.WEIGHTS", os.path.join(moved, os.path.basename(weights)))
        logger.warning(f"MODEL.WEIGHTS moved with them: {cfg.MODEL.WEIGHTS}")


def _settle_seed(cfg, resume):
    if cfg.SEED >= 0:
        return
    saved = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    seed = -1
    if resume and comm.is_main_process() and os.path.isfile(saved):
        seed = load_chain(saved)[-1][1].get("SEED", -1)
    seed = comm.broadcast(seed)
    source = "of the run that is resumed" if seed >= 0 else "drawn now"
    set_value(cfg, "SEED", seed if seed >= 0 else comm.shared_random_seed())
    logger.info(f"SEED was -1; it is {cfg.SEED}, {source}")
