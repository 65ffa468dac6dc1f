"""The report at the end of a training."""

import importlib.util
import logging
import os

from plaintrain.utils import comm

logger = logging.getLogger(__name__)


def make_report_if_wanted(cfg):
    """Make OUTPUT_DIR/report.html, on the main process, of a training that has come to its end.

    Not with OUTPUT.REPORT off, and not where the training was stopped and can go on. Whatever goes wrong is
    logged and raises nothing: the training is done.
    """
    if not cfg.OUTPUT.REPORT or not comm.is_main_process():
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.info('no report.html was made: that needs matplotlib, pip install "plaintrain[plot]"')
        return
    try:
        # Most starts never come here, or much later.
        from plaintrain.analysis.run_folder import run_state
        from plaintrain.report.build import build_report

        if run_state(cfg.OUTPUT_DIR).name != "finished":
            return
        path = os.path.join(cfg.OUTPUT_DIR, "report.html")
        build_report([cfg.OUTPUT_DIR], path)
        logger.info(f"the report of this run is in {path}")
    except Exception as e:
        logger.warning(f"no report.html was made: {type(e).__name__}: {e}; scripts/report.py tries again")
