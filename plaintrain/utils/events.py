"""Writers that read the current `EventStorage`: console, JSON lines, CSV, TensorBoard.

The storage's names can be imported from here too, as from Detectron2's `utils.events`.
"""

import abc
import contextlib
import csv
import datetime
import json
import logging
import math
import os
import time
from collections import defaultdict

from plaintrain.utils.files import atomic_write, writing
from plaintrain.utils.storage import EventStorage, every, get_event_storage

__all__ = [
    "WRITERS",
    "CSVWriter",
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "every",
    "get_event_storage",
]

_FLUSH_SECONDS = 30


class EventWriter:
    """Base of the writers."""

    def write(self):
        """Read the current storage and put out what is new."""

    def close(self):
        """Nothing to close by default."""


@contextlib.contextmanager
def closing_all(writers):
    """Close writers at the end of the block, whatever ends it; a good end leaves nothing unwritten."""
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
        yield
        for writer in writers if get_event_storage().has_unwritten() else ():
            writer.write()


class CommonMetricPrinter(EventWriter):
    """One console line: eta, iteration, losses, time and data_time (s), lr, memory (MiB)."""

    def __init__(self, max_iter=None, window_size=20):
        self.logger = logging.getLogger(__name__)
        self._max_iter, self._window_size = max_iter, window_size
        self._last_write = None

    def _seconds_per_iter(self, storage):
        latest = storage.latest_with_smoothing_hint(self._window_size)
        if "time" in latest:
            return latest["time"][0]
        before, now = self._last_write, (storage.iter, time.perf_counter())
        self._last_write = now
        if before is None or now[0] <= before[0]:
            return None
        return (now[1] - before[1]) / (now[0] - before[0])

    def write(self):
        """Log the line."""
        storage = get_event_storage()
        seconds = self._seconds_per_iter(storage)
        fields = [f"iter: {storage.iter}"]
        if seconds is not None and self._max_iter is not None:
            left = max(0, self._max_iter - storage.iter - 1)
            fields.insert(0, f"eta: {datetime.timedelta(seconds=int(seconds * left))}")
        latest = storage.latest_with_smoothing_hint(self._window_size)
        # Results, and validation losses, have lines of their own when they are new.
        losses = [k for k in latest if "loss" in k and "/" not in k]
        fields += [f"{k}: {latest[k][0]:.4g}" for k in losses]
        fields += [f"{k}: {latest[k][0]:.4f}" for k in ("time", "data_time") if k in latest]
        if "lr" in latest:
            fields.append(f"lr: {latest['lr'][0]:.5g}")
        if "max_mem" in latest:
            fields.append(f"max_mem: {latest['max_mem'][0]:.0f}M")
        self.logger.info("  ".join(fields))


class _RowWriter(EventWriter, abc.ABC):
    """Appends one row of scalars an iteration to a file.

    A file that is there already is cut at the storage's start iteration on the first write, and what comes
    for an earlier one (an evaluation that is done again) joins its row, so no iteration stands in it twice.
    """

    def __init__(self, path, window_size):
        self._path, self._window_size = path, window_size
        self._file, self._last_write = None, -1

    @abc.abstractmethod
    def _read(self):
        """The rows of the file, {"iteration": int, name: value}; what is none is left out."""

    @abc.abstractmethod
    def _put(self, f, rows):
        """Write rows to an open file."""

    def _rewrite(self, rows):
        """Put rows, {iteration: row}, in the place of the file, and open it to append."""
        if self._file is not None:
            self._file.close()
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        with atomic_write(self._path) as f:
            self._put(f, [rows[at] for at in sorted(rows)])
        # newline="": the csv module ends its lines itself.
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - see close()

    def _begin(self, storage, rows):
        start_iter = storage.start_iter
        if storage.unwritten:
            # The run that is resumed was interrupted between its last save and its last line.
            rows[start_iter - 1] = {**storage.unwritten, **rows[start_iter - 1]}
        kept = {row["iteration"]: row for row in self._read() if row["iteration"] < start_iter}
        for at in [at for at in rows if at < start_iter]:
            kept[at] = {**kept.get(at, {}), "iteration": at, **rows.pop(at)}
        self._rewrite(kept)
        self._last_write = start_iter - 1

    def write(self):
        """Append what is new since the last call, and flush."""
        storage = get_event_storage()
        rows = defaultdict(dict)
        for name, (value, at) in storage.latest_with_smoothing_hint(self._window_size).items():
            if at > self._last_write:
                rows[at][name] = value
        with writing(self._path):
            if self._file is None:
                self._begin(storage, rows)
            elif not os.path.exists(self._path):
                logging.getLogger(__name__).warning(f"{self._path} has vanished: a new one is begun")
                self._rewrite({})
            self._put(self._file, [{"iteration": at, **rows[at]} for at in sorted(rows)])
            self._file.flush()
        self._last_write = max(rows, default=self._last_write)

    def close(self):
        if self._file is not None:
            with writing(self._path):
                self._file.close()


class JSONWriter(_RowWriter):
    """Appends one JSON object a line, `{"iteration": ..., name: value, ...}`; non-finite values are null.

    A resumed run cuts the file at its start iteration, so no iteration stands in it twice.
    """

    def __init__(self, json_file, window_size=20):
        super().__init__(json_file, window_size)

    def _read(self):
        return _json_lines(self._path)

    def _put(self, f, rows):
        f.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)


class CSVWriter(_RowWriter):
    """Appends one row an iteration to a CSV file for spreadsheets; non-finite values are empty.

    The header names the scalars in the order in which they came. A scalar that comes later, such as the AP
    of the first evaluation, gets a column at the end: the file is written anew then. A resumed run cuts it
    at its start iteration, so no iteration stands in it twice.
    """

    def __init__(self, csv_file, window_size=20):
        super().__init__(csv_file, window_size)
        self._columns = ["iteration"]

    def _read(self):
        if not os.path.exists(self._path):
            return
        with open(self._path, encoding="utf-8", errors="replace", newline="") as f:
            for row in csv.DictReader(f):
                with contextlib.suppress(TypeError, ValueError):
                    # A row that was cut off, or is too long, has None in it.
                    if None not in row and None not in row.values():
                        yield {**row, "iteration": int(row["iteration"])}

    def _put(self, f, rows):
        known = len(self._columns)
        self._columns += [n for n in dict.fromkeys(n for row in rows for n in row) if n not in self._columns]
        if f is self._file and len(self._columns) > known:
            # `_rewrite` comes back to here for the rows that are there, with a file of its own.
            self._rewrite({row["iteration"]: row for row in self._read()})
            f = self._file
        table = csv.DictWriter(f, self._columns, restval="", lineterminator="\n")
        if f is not self._file:
            table.writeheader()
        table.writerows({n: "" if v is None else v for n, v in _finite(row).items()} for row in rows)


def _finite(row):
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}


def _json_lines(path):
    """The objects of a JSON-lines file; what is none, such as a last line that was cut off, is left out."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(line)
                if isinstance(content, dict) and isinstance(content.get("iteration"), int):
                    yield content


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms as TensorBoard event files.

    tensorboardX is imported by the first write: most ranks, and evaluations, have none.
    """

    def __init__(self, log_dir, window_size=20):
        self._log_dir, self._window_size = log_dir, window_size
        self._file, self._last_write, self._last_flush = None, -1, 0.0

    def _open(self, storage):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        start_iter = storage.start_iter
        os.makedirs(self._log_dir, exist_ok=True)
        # SummaryWriter would send each event through a queue to a thread: three times the work.
        self._file = EventsWriter(os.path.join(self._log_dir, "events"))
        if start_iter:
            # Hides what an interrupted run wrote beyond the point it is resumed from.
            log = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(session_log=log, step=start_iter, wall_time=time.time()))
        if storage.unwritten:
            values = [Summary.Value(tag=name, simple_value=v) for name, v in storage.unwritten.items()]
            self._add(Summary(value=values), start_iter - 1)

    def _add(self, contents, at):
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(summary=contents, step=at, wall_time=time.time()))

    def write(self):
        """Write what is new since the last call; takes the images and histograms out of the storage."""
        with writing(self._log_dir):
            self._write(get_event_storage())

    def _write(self, storage):
        from tensorboardX import summary
        from tensorboardX.proto.summary_pb2 import Summary

        if self._file is None:
            self._open(storage)
        values = defaultdict(list)
        for name, (value, at) in storage.latest_with_smoothing_hint(self._window_size).items():
            if at > self._last_write:
                values[at].append(Summary.Value(tag=name, simple_value=value))
        for at in sorted(values):
            self._add(Summary(value=values[at]), at)
            self._last_write = at
        for name, image, at in storage.images:
            self._add(summary.image(name, image.numpy()), at)
        for name, numbers, bins, at in storage.histograms:
            self._add(summary.histogram(name, numbers.numpy(), bins), at)
        storage.clear_images()
        storage.clear_histograms()
        # A flush waits for the disk.
        if time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self._file.flush()
            self._last_flush = time.monotonic()

    def close(self):
        if self._file is not None:
            with writing(self._log_dir):
                self._file.close()


# Name in OUTPUT.WRITERS -> function (output_dir, max_iter) that makes the writer.
WRITERS = {
    "console": lambda output_dir, max_iter: CommonMetricPrinter(max_iter),
    "json": lambda output_dir, max_iter: JSONWriter(os.path.join(output_dir, "metrics.json")),
    "csv": lambda output_dir, max_iter: CSVWriter(os.path.join(output_dir, "metrics.csv")),
    "tensorboard": lambda output_dir, max_iter: TensorboardXWriter(output_dir),
}
