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
    solver = cfg.SOLVER
    names = [*(cfg.DATASETS.TRAIN if training else ()), *cfg.DATASETS.TEST]
    sizes = {name: len(DatasetCatalog.get(name)) for name in names}
    lines = [("test data", name, f"{sizes[name]} images") for name in cfg.DATASETS.TEST]
    lines.append(("classes", f"{len(class_names)}", truncate_text(", ".join(class_names), 90)))
    if model is not None:
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        name = f"{cfg.MODEL.META_ARCHITECTURE} on {cfg.MODEL.BACKBONE.NAME}"
        lines.append(("model", name, f"{millions:.3g} million parameters"))
        lines.append(("device", f"{get_device(cfg.MODEL.DEVICE)}", f"processes: {comm.get_world_size()}"))
    if training:
        lines = [("training data", name, f"{sizes[name]} images") for name in cfg.DATASETS.TRAIN] + lines
        num_images = max(1, sum(sizes[name] for name in cfg.DATASETS.TRAIN))
        epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / num_images
        batch = f"batches of {solver.IMS_PER_BATCH} images, about {epochs:.3g} epochs"
        lines.append(("schedule", f"{solver.MAX_ITER} iterations", batch))
        lines.append(("optimizer", solver.OPTIMIZER, f"{solver.LR_SCHEDULER_NAME} from {solver.BASE_LR:g}"))
        periods = {"evaluation": cfg.TEST.EVAL_PERIOD, "checkpoints": solver.CHECKPOINT_PERIOD}
        lines += [(k, f"every {v} iterations" if v else "once", "at the end") for k, v in periods.items()]
        lines.append(("to stop", "Ctrl-C", "the same command with --resume continues"))
    lines.append(("output", cfg.OUTPUT_DIR, "its log.txt has the config, the model and the versions"))
    return "\n  ".join(["summary", *(f"{title:<15}{value}, {more}" for title, value, more in lines)])


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
