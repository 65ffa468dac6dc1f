"""The report at the end of a training."""

import importlib.util
import logging
import os
import subprocess
import sys

from plaintrain.checkpoint.files import resume_candidates
from plaintrain.utils import comm
from plaintrain.utils.lock import unlock_folder

logger = logging.getLogger(__name__)


def write_report(cfg):
    """Write OUTPUT_DIR/report.html, on the main process, after a training that has come to its end.

    The report is made by a process of its own, as by `scripts/report.py OUTPUT_DIR`: a failure there is
    logged and raises nothing. Nothing is done with OUTPUT.REPORT off, or if the run can be resumed.
    """
    if not cfg.OUTPUT.REPORT or not comm.is_main_process():
        return
    last_checkpoint = [os.path.basename(path) for path in resume_candidates(cfg.OUTPUT_DIR)[:1]]
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
