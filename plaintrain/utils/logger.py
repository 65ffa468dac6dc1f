"""The console and file log of a run."""

import contextlib
import logging
import os
import sys

from tqdm import tqdm

from plaintrain.utils import comm

_FORMAT = "[%(asctime)s %(name)s] %(levelname)s: %(message)s"
_DATE = "%m/%d %H:%M:%S"


class _Console:
    """Standard output or error; what cannot be written is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self._stream.flush()


def ignore_console_errors():
    """Let this process continue without its console: a pipe without a reader, a closed terminal, a full disk.

    Prints, progress bars and warnings then write nothing and raise nothing, at the exit of Python either.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Another stream is one of a notebook or a test; None was closed before the start.
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _Console(stream or open(os.devnull, "w", encoding="utf-8")))  # noqa: SIM115


class _ConsoleHandler(logging.Handler):
    """Prints through tqdm, so that a progress bar stays below the lines."""

    def emit(self, record):
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def setup_logger(output=None, distributed_rank=0, name="plaintrain", quiet=False):
    """Send a logger's lines to the console (rank 0 only) and to a file per rank.

    Args:
        output: folder for `log.txt` (`log.txt.rank1`, ... on other ranks), appended to; or None.
        distributed_rank: this process' rank.
        name: root of the logger names. A second call replaces the handlers of the first.
        quiet: show only warnings and errors on the console, and no progress bars.

    Returns:
        The logger.
    """
    ignore_console_errors()
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    handlers = []
    if distributed_rank == 0:
        handlers.append(_ConsoleHandler(logging.WARNING if quiet else logging.INFO))
    if output:
        suffix = f".rank{distributed_rank}" if distributed_rank else ""
        handlers.append(logging.FileHandler(os.path.join(output, "log.txt" + suffix), encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
        logger.addHandler(handler)
    return logger


@contextlib.contextmanager
def silenced(level):
    """Hold back what anybody logs up to a level."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def build_progress_bar(iterable, *, desc, initial=0, total=None):
    """Return `iterable` with a tqdm bar on a terminal, on rank 0, unless the log is quiet."""
    handlers = logging.getLogger("plaintrain").handlers
    is_quiet = any(isinstance(h, _ConsoleHandler) and h.level > logging.INFO for h in handlers)
    # None: tqdm shows nothing when its stream is not a terminal.
    disable = None if comm.is_main_process() and not is_quiet else True
    return tqdm(
        iterable, desc=desc, initial=initial, total=total, disable=disable, leave=False, dynamic_ncols=True
    )
