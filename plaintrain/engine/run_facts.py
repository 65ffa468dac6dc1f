"""What a run was started with, kept beside it as run.json, and the report at its end."""

import datetime
import importlib.util
import json
import logging
import os
import subprocess
import sys

import plaintrain
from plaintrain.checkpoint.files import list_resume_candidates
from plaintrain.config import get_cfg
from plaintrain.config.yaml import diff_configs, load_chain
from plaintrain.utils import comm
from plaintrain.utils.env import collect_env_info
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import FACTS_FILE, atomic_write, read_starts
from plaintrain.utils.lock import unlock_folder

logger = logging.getLogger(__name__)


def write_run_facts(cfg, config_file):
    """Add this start to OUTPUT_DIR/run.json; those of the run that is resumed stay in it.

    The file holds `{"starts": [start, ...]}`, oldest first, each of them a dict:

    - `started`: time, ISO 8601 with the time zone; `command`: list of words; `world_size`: processes.
    - `plaintrain`: its version; `environment`: {name: value}, as `collect_env_info`.
    - `config_file`: path or ""; `changes`: [[key, value before, value], ...] of the settled config, against
      the `_BASE_` files of the config file, or against the defaults where there are none.
    - `git`: `{"commit", "branch", "changed_files"}` of the folder of the script, or None outside git.

    Args:
        cfg: the settled config.
        config_file: the file that it was made from, or "".
    """
    start = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "world_size": comm.get_world_size(),
        "plaintrain": plaintrain.__version__,
        "environment": dict(line.split(": ", 1) for line in collect_env_info().splitlines()),
        "git": _git_state(os.path.dirname(os.path.abspath(sys.argv[0]))),
        "config_file": config_file,
        "changes": diff_configs(_load_base(config_file).dump(), cfg.dump()),
    }
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, FACTS_FILE)) as f:
        json.dump({"starts": [*read_starts(cfg.OUTPUT_DIR), start]}, f, indent=1)


def _load_base(config_file):
    """Return the config of the files that a file builds on."""
    base = get_cfg()
    try:
        for _, content in load_chain(config_file)[:-1] if config_file else ():
            base.merge_from_other_cfg(content)
    except UserError:
        # Keys that a fork has added are known to its config only: then the defaults are the base.
        return get_cfg()
    return base


def _git_state(folder):
    def git(*words):
        command = ["git", "-C", folder, *words]
        # A run can do without what git says of a large folder on a slow disk.
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout

    try:
        commit, branch = git("rev-parse", "HEAD", "--abbrev-ref", "HEAD").split()
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return {"commit": commit, "branch": branch, "changed_files": [line[3:] for line in changed]}


def write_report(cfg):
    """Write OUTPUT_DIR/report.html, on the main process, after a training that has come to its end.

    The report is made by a process of its own, as by `scripts/report.py OUTPUT_DIR`: a failure there is
    logged and raises nothing. Nothing is done with OUTPUT.REPORT off, or if the run can be resumed.
    """
    if not cfg.OUTPUT.REPORT or not comm.is_main_process():
        return
    last_checkpoint = [os.path.basename(path) for path in list_resume_candidates(cfg.OUTPUT_DIR)[:1]]
    if last_checkpoint != ["model_final.pth"]:
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.info('no report.html was made: that needs matplotlib, pip install "plaintrain[plot]"')
        return
    # With the lock held, the report would say that the run goes on.
    unlock_folder(cfg.OUTPUT_DIR)
    command = [sys.executable, "-P", "-m", "plaintrain.report", cfg.OUTPUT_DIR]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        logger.warning(f"no report.html was made: {reason}; scripts/report.py tries again")
    else:
        logger.info(f"the report of this run is in {os.path.join(cfg.OUTPUT_DIR, 'report.html')}")
