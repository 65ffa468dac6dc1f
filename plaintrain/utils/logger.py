"""The console and file log of a run."""

import logging
import os
import sys

from tqdm import tqdm

from plaintrain.utils import comm

_FORMAT = "[%(asctime)s %(name)s] %(levelname)s: %(message)s"
_DATE = "%m/%d %H:%M:%S"


class _ConsoleHandler(logging.Handler):
    """Prints through tqdm, so that a progress bar stays below the lines."""

    def emit(self, record):
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            self.handleError(record)


class _FileHandler(logging.FileHandler):
    """Writes lines to a file; a disk that is full costs the lines, and is told once."""

    _told = False

    def handleError(self, record):  # noqa: N802 - logging's name
        """Tell on the console that the file is not complete."""
        if not self._told:
            self._told = True
            print(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)


def setup_logger(output=None, distributed_rank=0, name="plaintrain"):
    """Send a logger's lines to the console (rank 0 only) and to a file per rank.

    Args:
        output: folder for `log.txt` (`log.txt.rank1`, ... on other ranks), appended to; or None.
        distributed_rank: this process' rank.
        name: root of the logger names. A second call replaces the handlers of the first.

    Returns:
        The logger.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    handlers = []
    if distributed_rank == 0:
        handlers.append(_ConsoleHandler())
    if output:
        suffix = f".rank{distributed_rank}" if distributed_rank else ""
        path = os.path.join(output, "log.txt" + suffix)
        handlers.append(_FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
        logger.addHandler(handler)
    return logger


def progress_range(start, end):
    """`range(start, end)` with a bar that counts from 0 to `end`; see `progress`."""
    return progress(range(start, end), desc="training", initial=start, total=end)


def progress(iterable=None, *, desc, initial=0, total=None):
    """A tqdm bar on a terminal and on rank 0; elsewhere it only passes the items through.

    Args:
        iterable: what to go through.
        desc: the bar's label.
        initial, total: where it starts counting and ends.
    """
    # None: tqdm shows nothing when its stream is not a terminal.
    disable = None if comm.is_main_process() else True
    return tqdm(
        iterable,
        desc=desc,
        initial=initial,
        total=total,
        disable=disable,
        leave=False,
        dynamic_ncols=True,
    )
