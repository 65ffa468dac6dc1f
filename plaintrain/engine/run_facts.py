"""run.json, a record of each start of a run, and the report at its end."""

import datetime
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

import plaintrain
from plaintrain.checkpoint.files import list_resume_candidates
from plaintrain.config import CfgNode, get_cfg
from plaintrain.config.yaml import diff_configs, load_chain
from plaintrain.data.catalog import DatasetCatalog
from plaintrain.modeling.build import get_device
from plaintrain.utils import comm
from plaintrain.utils.env import collect_env_info
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import FACTS_FILE, atomic_write, read_starts
from plaintrain.utils.lock import unlock_folder
from plaintrain.utils.text import truncate_text
from plaintrain.utils.user_code import IMPORTED

logger = logging.getLogger(__name__)


def describe_run(cfg: CfgNode, model: nn.Module | None, class_names: Sequence[str], training: bool) -> str:
    """Return a summary for the console; `model` is None if a file of predictions is scored."""

    def count_images(names):
        return ", ".join(f"{name} ({len(DatasetCatalog.get(name))} images)" for name in names) or "none"

    solver = cfg.SOLVER
    lines = {"test data": count_images(cfg.DATASETS.TEST)}
    lines["classes"] = truncate_text(f"{len(class_names)}: {', '.join(class_names)}", 100)
    if model is not None:
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        name = f"{cfg.MODEL.META_ARCHITECTURE}, {cfg.MODEL.BACKBONE.NAME}"
        lines["model"] = f"{name}, {millions:.3g} million parameters"
        precision = ", mixed precision" if training and solver.AMP.ENABLED else ""
        lines["device"] = f"{get_device(cfg.MODEL.DEVICE)}{precision}, processes: {comm.get_world_size()}"
    if training:
        lines = {"training data": count_images(cfg.DATASETS.TRAIN), **lines}
        num_images = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)
        epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / max(1, num_images)
        lines["schedule"] = (
            f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images (about {epochs:.3g} epochs), "
            f"{solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}, {solver.LR_SCHEDULER_NAME}"
        )
        for name, period in (("evaluation", cfg.TEST.EVAL_PERIOD), ("checkpoints", solver.CHECKPOINT_PERIOD)):
            lines[name] = f"every {period} iterations and at the end" if period else "at the end"
        lines["to stop"] = "Ctrl-C; the same command with --resume continues from the last checkpoint"
    lines["output"] = f"{cfg.OUTPUT_DIR}; its log.txt has the config, the model and the versions"
    return "\n".join(["summary", *(f"  {name:<15}{text}" for name, text in lines.items())])


def write_run_facts(cfg: CfgNode, config_file: str) -> None:
    """Append this start to OUTPUT_DIR/run.json, `{"starts": [start, ...]}`; a start is a dict:

    - `started`: ISO 8601 time with time zone; `command`: list of words; `world_size`: number of processes.
    - `plaintrain`: version; `environment`: {name: value} of `collect_env_info`.
    - `imports`: files and modules of --import.
    - `config_file`: path or ""; `changes`: [[key, value before, value], ...] of the final config against the
      `_BASE_` files of the config file, or the defaults.
    - `git`: `{"commit", "branch", "changed_files"}` of the script's folder; None outside git.
    """
    start = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "world_size": comm.get_world_size(),
        "plaintrain": plaintrain.__version__,
        "environment": dict(line.split(": ", 1) for line in collect_env_info().splitlines()),
        "git": _get_git_state(os.path.dirname(os.path.abspath(sys.argv[0]))),
        "imports": IMPORTED,
        "config_file": config_file,
        "changes": diff_configs(_load_base(config_file).dump(), cfg.dump()),
    }
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, FACTS_FILE)) as f:
        json.dump({"starts": [*read_starts(cfg.OUTPUT_DIR), start]}, f, indent=1)


def _load_base(config_file: str) -> CfgNode:
    """Load the `_BASE_` files of a config file; without any, return the defaults."""
    base = get_cfg()
    try:
        chain = load_chain(config_file) if config_file else []
        for _, content in chain[:-1]:
            base.merge_from_other_cfg(content)
    except UserError:
        # The defaults do not contain the keys that a fork has added.
        return get_cfg()
    return base


def _get_git_state(folder: str) -> dict[str, Any] | None:
    def git(*words):
        command = ["git", "-C", folder, *words]
        # git status may be slow in a large folder, and a run does not need it.
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout

    try:
        commit, branch = git("rev-parse", "HEAD", "--abbrev-ref", "HEAD").split()
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return {"commit": commit, "branch": branch, "changed_files": [line[3:] for line in changed]}


def write_report(cfg: CfgNode) -> None:
    """Write OUTPUT_DIR/report.html after a finished training, on the main process.

    Runs `scripts/report.py` in a subprocess and logs its errors. Does nothing if OUTPUT.REPORT is False or
    the run is unfinished.
    """
    if not cfg.OUTPUT.REPORT or not comm.is_main_process():
        return
    last_checkpoint = [os.path.basename(path) for path in list_resume_candidates(cfg.OUTPUT_DIR)[:1]]
    if last_checkpoint != ["model_final.pth"]:
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.info('report.html needs matplotlib; pip install "plaintrain[plot]"')
        return
    # A locked folder would be reported as a running training.
    unlock_folder(cfg.OUTPUT_DIR)
    command = [sys.executable, "-P", "-m", "plaintrain.report", cfg.OUTPUT_DIR]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        logger.warning(f"cannot write report.html: {reason}; run scripts/report.py to retry")
    else:
        logger.info(f"the report of this run is in {os.path.join(cfg.OUTPUT_DIR, 'report.html')}")
