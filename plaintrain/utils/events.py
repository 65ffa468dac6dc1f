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

from plaintrain.utils.files import atomic_write
from plaintrain.utils.storage import EventStorage, get_event_storage
from plaintrain.utils.tensorboard import TensorboardXWriter
from plaintrain.utils.writer import EventWriter, FileWriter

__all__ = [
    "WRITERS",
    "CSVWriter",
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
]


def write_all(writers):
    """Call `write` of each writer."""
    for writer in writers:
        writer.write()


@contextlib.contextmanager
def closing_all(writers):
    """Begin writers and yield them; they are closed at the end of the block, whatever ends it.

    A block that ends without an exception leaves nothing unwritten.
    """
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
            writer.begin(get_event_storage().start_iter)
        yield writers
        if get_event_storage().has_unwritten():
            write_all(writers)


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


class _RowWriter(FileWriter):
    """Appends one row of scalars an iteration to a text file.

    What comes for a row that is already written, such as a repeated evaluation, joins that row.
    """

    @abc.abstractmethod
    def _read(self, f):
        """Yield the complete rows of an open file, {"iteration": int, name: value}."""

    @abc.abstractmethod
    def _put(self, f, rows):
        """Write {iteration: {name: value}} to an open file."""

    def _fits(self, rows):
        """Return whether rows can be appended to the file as it is."""
        last = max(self._written.values(), default=-1)
        return self._file is not None and os.path.exists(self._path) and min(rows) > last

    def _rows(self):
        if not os.path.exists(self._path):
            return {}
        with open(self._path, encoding="utf-8", errors="replace", newline="") as f:
            return {row.pop("iteration"): row for row in self._read(f)}

    def _rewrite(self, rows):
        """Replace the file, and open it to append."""
        if self._file is not None:
            self._file.close()
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        with atomic_write(self._path) as f:
            self._put(f, dict(sorted(rows.items())))
        # newline="": the csv module ends its lines itself.
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - see close()

    def _cut(self, start_iter):
        rows = {at: row for at, row in sorted(self._rows().items()) if at < start_iter}
        if os.path.exists(self._path):
            self._rewrite(rows)
        return {name: at for at, row in rows.items() for name in row if row[name] != ""}

    def _append(self, rows):
        if not rows:
            return
        if self._fits(rows):
            self._put(self._file, rows)
            return
        kept = self._rows()
        self._rewrite(kept | {at: {**kept.get(at, {}), **row} for at, row in rows.items()})


class JSONWriter(_RowWriter):
    """Appends one JSON object a line, `{"iteration": ..., name: value, ...}`; non-finite values are null.

    A resumed run cuts the file at its start iteration; each iteration has one line.
    """

    def _read(self, f):
        for line in f:
            # What is no object, such as a last line that was cut off, is left out.
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                    yield row

    def _put(self, f, rows):
        for at, row in rows.items():
            f.write(json.dumps(_finite({"iteration": at, **row}), allow_nan=False) + "\n")


class CSVWriter(_RowWriter):
    """Appends one row an iteration to a CSV file for spreadsheets; non-finite values are empty.

    The header names the scalars in the order in which they came. A scalar that comes later, such as the AP
    of the first evaluation, gets a column at the end: the file is rewritten then. A resumed run cuts it
    at its start iteration; each iteration has one row.
    """

    def __init__(self, csv_file, window_size=20):
        super().__init__(csv_file, window_size)
        self._columns = ["iteration"]

    def _read(self, f):
        # The last number of a line without its end may have lost digits.
        for row in csv.DictReader(line for line in f if line.endswith("\n")):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                # A row that is damaged, or too long, has None in it.
                if None not in row and None not in row.values():
                    yield {**row, "iteration": int(row["iteration"])}

    def _fits(self, rows):
        return super()._fits(rows) and all(name in self._columns for row in rows.values() for name in row)

    def _rewrite(self, rows):
        names = (name for row in rows.values() for name in row)
        self._columns = list(dict.fromkeys([*self._columns, *names]))
        super()._rewrite(rows)

    def _put(self, f, rows):
        table = csv.DictWriter(f, self._columns, restval="", lineterminator="\n")
        if f is not self._file:
            table.writeheader()
        for at, row in rows.items():
            table.writerow(_finite({"iteration": at, **row}))


def _finite(row):
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}


# Name in OUTPUT.WRITERS -> function (output_dir, max_iter) that makes the writer.
WRITERS = {
    "console": lambda output_dir, max_iter: CommonMetricPrinter(max_iter),
    "json": lambda output_dir, max_iter: JSONWriter(os.path.join(output_dir, "metrics.json")),
    "csv": lambda output_dir, max_iter: CSVWriter(os.path.join(output_dir, "metrics.csv")),
    "tensorboard": lambda output_dir, max_iter: TensorboardXWriter(output_dir),
}
