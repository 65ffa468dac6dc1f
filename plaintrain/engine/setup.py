"""The start of every script: output folder, log, seeds, and checks before training."""

import gc
import logging
import logging.handlers
import os
import shutil
import sys

import torch

from plaintrain.checkpoint.files import read_last, resume_candidates
from plaintrain.checkpoint.resume_check import check_changes
from plaintrain.checkpoint.weight_checks import check_weights
from plaintrain.config import check_cfg, get_cfg, get_value, set_value
from plaintrain.data.build import count_iters_per_epoch
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.engine.dry_run import overfit_on, shorten_to_dry_run
from plaintrain.engine.launch import create_ddp_model, launch
from plaintrain.engine.preflight import check_before_training, settle_num_classes
from plaintrain.engine.run_facts import write_run_facts
from plaintrain.solver.schedule import settle_schedule
from plaintrain.utils import comm
from plaintrain.utils.arguments import default_argument_parser
from plaintrain.utils.env import collect_env_info, seed_all_rng
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import WRITERS
from plaintrain.utils.files import atomic_write, move_old_run, remove_unfinished, writing
from plaintrain.utils.heartbeat import set_limit
from plaintrain.utils.lock import lock_folder
from plaintrain.utils.logger import setup_logger

__all__ = [
    "build_writers",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
    "launch",
    "load_cfg",
    "reject_loop_options",
    "require_default",
]

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

    Raises:
        UserError: anything that would make the run fail later.
    """
    resume, eval_only = getattr(args, "resume", False), getattr(args, "eval_only", False)
    dry_run = getattr(args, "dry_run", False)
    if dry_run and (resume or eval_only):
        raise UserError("--dry-run tries the start of a training: leave out --resume and --eval-only")
    log = setup_logger(None, comm.get_rank(), quiet=getattr(args, "quiet", False))
    # What is said before the output folder may be touched goes into its log file afterwards.
    said = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL)
    log.addHandler(said)
    check_cfg(cfg)
    set_value(cfg, "OUTPUT_DIR", os.path.expanduser(cfg.OUTPUT_DIR))
    declare_datasets(cfg)
    _settle_seed(cfg, resume)
    if getattr(args, "overfit", 0):
        overfit_on(cfg, args.overfit)
    with comm.first_on_machine():  # reads the datasets
        class_names = settle_num_classes(cfg, eval_only)
    if not eval_only:
        settle_schedule(cfg, comm.get_world_size(), count_iters_per_epoch)
    needs_model = not getattr(args, "predictions", "")
    model = check_before_training(cfg, resume, eval_only, needs_model)
    # The files of rank 0 decide for every machine.
    if needs_model and comm.is_main_process():
        _check_start(cfg, model, resume, eval_only, class_names)
    # Nothing is moved while another rank still looks at it.
    comm.synchronize()
    if dry_run:
        shorten_to_dry_run(cfg)
    _prepare_output(cfg, training=not eval_only, resume=resume)
    log = setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), quiet=getattr(args, "quiet", False))
    for record in said.buffer:
        log.handlers[-1].handle(record)
    logger.info(f"rank {comm.get_rank()} of {comm.get_world_size()}\n{collect_env_info()}")
    logger.info("command line: " + " ".join(sys.argv))
    if comm.is_main_process():
        _write_config(cfg, keep=eval_only)
    if comm.is_main_process() and not eval_only:
        write_run_facts(cfg, getattr(args, "config_file", ""))
    logger.info(f"config:\n{cfg.dump()}")
    _prepare_process(cfg)
    comm.synchronize()


def _check_start(cfg, model, resume, eval_only, class_names):
    """Check what the model starts from: the last checkpoint, or MODEL.WEIGHTS."""
    weights = cfg.MODEL.WEIGHTS
    if resume and eval_only:
        weights = read_last(cfg.OUTPUT_DIR, mmap=True)[0]
    elif resume and resume_candidates(cfg.OUTPUT_DIR):
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
    """Refuse a key that a script does not read, if it is set.

    Raises:
        UserError: names the key, its value and the reason.
    """
    value, default = get_value(cfg, key), get_value(get_cfg(), key)
    if value != default:
        raise UserError(f"{key} is {value}, but here it must be {default}: {reason}")


def reject_loop_options(cfg, used=()):
    """Raise if the config asks for what a loop leaves out that scripts/plain_train_net.py does.

    Args:
        cfg: the config.
        used: those of `LOOP_OPTIONS` that the loop does itself.

    Raises:
        UserError: see `require_default`.
    """
    for key in LOOP_OPTIONS:
        if key not in used:
            require_default(cfg, key, "this loop does not read it, scripts/plain_train_net.py does")


def default_writers(output_dir, max_iter=None, names=("console", "json", "tensorboard")):
    """The writers of these names, of `utils.events.WRITERS`, on the main process; [] on the others."""
    return [WRITERS[name](output_dir, max_iter) for name in names if comm.is_main_process()]


def build_writers(cfg):
    """The writers that OUTPUT.WRITERS names, on the main process; [] on the others."""
    return default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, cfg.OUTPUT.WRITERS)


def _prepare_output(cfg, training, resume):
    folder = cfg.OUTPUT_DIR
    moved = None
    if comm.is_main_process():
        try:
            os.makedirs(folder, exist_ok=True)
            if training:
                lock_folder(folder)
                remove_unfinished(folder)
            moved = move_old_run(folder) if training and not resume else None
            with atomic_write(os.path.join(folder, ".write-test")) as f:
                f.write("")
            os.unlink(os.path.join(folder, ".write-test"))
        except (OSError, UserError) as e:
            raise UserError(f"OUTPUT_DIR {folder!r} cannot be written: {e}") from e
    moved = comm.broadcast(moved)
    # Of other machines, where the folder may be another; for the log of each rank.
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    if not moved:
        return
    logger.warning(f"{folder} held an earlier run; its files are now in {moved}")
    weights = os.path.abspath(os.path.expanduser(cfg.MODEL.WEIGHTS))
    in_folder = os.path.dirname(weights) == os.path.abspath(folder)
    if cfg.MODEL.WEIGHTS and in_folder and not os.path.exists(weights):
        set_value(cfg, "MODEL.WEIGHTS", os.path.join(moved, os.path.basename(weights)))
        logger.warning(f"MODEL.WEIGHTS moved with them: {cfg.MODEL.WEIGHTS}")


def _settle_seed(cfg, resume):
    if cfg.SEED >= 2**32:
        raise UserError(f"SEED is {cfg.SEED}, but must be below 2**32")
    if cfg.SEED >= 0:
        return
    saved = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    seed = None
    if resume and comm.is_main_process() and os.path.isfile(saved):
        # Not the defaults: a fork's keys are known to its own config only.
        before = cfg.clone()
        before.defrost()
        before.merge_from_file(saved)
        seed = before.SEED if before.SEED >= 0 else None
    seed = comm.broadcast(seed)
    source = "of the run that is resumed" if seed is not None else "drawn now"
    set_value(cfg, "SEED", comm.shared_random_seed() if seed is None else seed)
    logger.info(f"SEED was -1; it is {cfg.SEED}, {source}")


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
        # A second name first: there is a whole config.yaml at every moment.
        shutil.copy2(path, kept)
        logger.warning(f"the config differs from that of the run; the earlier one is now {kept}")
    with atomic_write(path) as f:
        f.write(text)
