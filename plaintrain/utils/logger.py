"""The console and file log of a run."""

import contextlib
import datetime
import logging
import os
import sys

from tqdm import tqdm

from plaintrain.utils import comm
from plaintrain.utils.storage import get_event_storage, is_logging

_FORMAT = "[%(asctime)s %(name)s] %(levelname)s: %(message)s"
_DATE = "%m/%d %H:%M:%S"
_RESET = "\033[0m"
_COLORS = {logging.ERROR: "\033[31m", logging.WARNING: "\033[33m"}
# Without tqdm's own remaining time, which counts evaluations.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


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


def outlive_console():
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


class _ColorFormatter(logging.Formatter):
    """Warnings yellow, errors red."""

    def format(self, record):
        color = next((c for level, c in _COLORS.items() if record.levelno >= level), None)
        text = super().format(record)
        return f"{color}{text}{_RESET}" if color else text


def _has_color(stream):
    # https://no-color.org
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _FileHandler(logging.FileHandler):
    """Writes lines to a file; a disk that is full costs the lines, and is told once."""

    _told = False

    def handleError(self, record):  # noqa: N802 - logging's name
        """Tell on the console that the file is not complete."""
        if not self._told:
            self._told = True
            print(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)


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
    outlive_console()
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
        path = os.path.join(output, "log.txt" + suffix)
        handlers.append(_FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        colors = isinstance(handler, _ConsoleHandler) and _has_color(sys.stdout)
        handler.setFormatter((_ColorFormatter if colors else logging.Formatter)(_FORMAT, _DATE))
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


def progress_range(start, end, first=0, desc="training"):
    """`range(start, end)` with a bar that counts from `first` to `end`; see `progress`.

    Beside the bar stand the losses that the current `EventStorage` holds on the host already, and the time
    that the iterations up to `end` will take, without evaluations: nothing waits for the device.
    """
    counts = {"initial": start - first, "total": end - first}
    with progress(range(start, end), desc=desc, bar_format=_BAR, **counts) as bar:
        for iteration in bar:
            yield iteration
            if is_logging() and not bar.disable:
                known = get_event_storage().known()
                bar.set_postfix_str(_beside_bar(known, end - iteration - 1), refresh=False)


def _beside_bar(scalars, left):
    losses = {name: value for name, (value, _) in scalars.items() if "loss" in name and "/" not in name}
    losses = {"loss": losses.pop("total_loss"), **losses} if "total_loss" in losses else losses
    fields = [f"{name.removeprefix('loss_')} {value:.3g}" for name, value in losses.items()]
    if "time" in scalars:
        fields.append(f"eta {datetime.timedelta(seconds=int(scalars['time'][0] * left))}")
    return ", ".join(fields)


def progress(iterable=None, *, desc, initial=0, total=None, bar_format=None):
    """A tqdm bar on a terminal, on rank 0, unless that is quiet; elsewhere it only passes the items through.

    Args:
        iterable: what to go through.
        desc: the bar's label.
        initial, total: where it starts counting and ends.
        bar_format: see tqdm.
    """
    handlers = logging.getLogger("plaintrain").handlers
    quiet = any(isinstance(h, _ConsoleHandler) and h.level > logging.INFO for h in handlers)
    # None: tqdm shows nothing when its stream is not a terminal.
    disable = None if comm.is_main_process() and not quiet else True
    return tqdm(
        iterable,
        desc=desc,
        initial=initial,
        total=total,
        disable=disable,
        leave=False,
        dynamic_ncols=True,
        bar_format=bar_format,
    )
