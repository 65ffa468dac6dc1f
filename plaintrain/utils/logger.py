"""Console and file logging."""

import contextlib
import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import IO

from tqdm import tqdm

from plaintrain.utils import comm
from plaintrain.utils.files import check_file, writing
from plaintrain.utils.text import escape_controls

# {(file, line): time of its last message}
_logged_at: dict[tuple[str, int], float] = {}
_FORMAT = "[%(asctime)s %(name)s] %(levelname)s: %(message)s"


class _Console:
    """Wrapper of stdout or stderr that ignores write errors."""

    def __init__(self, stream: IO[str]) -> None:
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


def ignore_console_errors() -> None:
    """Ignore write errors of stdout and stderr: a broken pipe, a closed terminal, a full disk."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Keep the streams of notebooks and tests. A stream that was closed before the start is None.
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _Console(stream or open(os.devnull, "w", encoding="utf-8")))  # noqa: SIM115


class _Formatter(logging.Formatter):
    """Formatter that escapes control characters in names; records may have several lines."""

    def format(self, record):
        return escape_controls(super().format(record))


class _FileHandler(logging.handlers.WatchedFileHandler):
    """Handler that creates its file again if it was deleted, and loses lines that cannot be written."""

    def emit(self, record):
        with contextlib.suppress(OSError):
            super().emit(record)


class _ConsoleHandler(logging.Handler):
    """Handler that prints through tqdm, to keep progress bars below the log lines."""

    def emit(self, record):
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def setup_logger(
    output: str | None = None, distributed_rank: int = 0, name: str = "plaintrain", quiet: bool = False
) -> logging.Logger:
    """Log to the console (rank 0) and, with debug records, to log.txt (log.txt.rank1, ...) in `output`.

    Replaces the handlers of earlier calls. `quiet` hides progress bars, and all but warnings and errors.
    """
    ignore_console_errors()
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if distributed_rank == 0:
        handlers.append(_ConsoleHandler(logging.WARNING if quiet else logging.INFO))
    if output:
        suffix = f".rank{distributed_rank}" if distributed_rank else ""
        path = os.path.join(output, "log.txt" + suffix)
        with writing(path):
            if os.path.exists(path):
                check_file(path)
            handlers.append(_FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_Formatter(_FORMAT, "%m/%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Log a message of a line of code at most once in n seconds."""
    frame = sys._getframe(1)
    module = frame.f_globals["__name__"]
    line = frame.f_code.co_filename, frame.f_lineno
    now = time.monotonic()
    if line not in _logged_at or now - _logged_at[line] >= n:
        _logged_at[line] = now
        logging.getLogger(name or ("plaintrain" if module == "__main__" else module)).log(lvl, msg)


@contextlib.contextmanager
def silenced(level: int) -> Iterator[None]:
    """Disable all logging up to `level` within the block."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def build_progress_bar(iterable: Iterable, *, desc: str, initial: int = 0, total: int | None = None) -> tqdm:
    """Wrap an iterable in a tqdm bar, which is shown on a terminal, on rank 0, unless the log is quiet."""
    handlers = logging.getLogger("plaintrain").handlers
    is_quiet = any(isinstance(h, _ConsoleHandler) and h.level > logging.INFO for h in handlers)
    # With None, tqdm shows the bar if its stream is a terminal.
    disable = None if comm.is_main_process() and not is_quiet else True
    return tqdm(
        iterable, desc=desc, initial=initial, total=total, disable=disable, leave=False, dynamic_ncols=True
    )
