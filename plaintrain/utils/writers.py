"""Writers of scalars to files: JSON lines, CSV, TensorBoard."""

import contextlib
import csv
import glob
import json
import math
import os
import socket
import struct
import time
from collections import defaultdict

from plaintrain.utils.files import atomic_write, writing
from plaintrain.utils.storage import get_event_storage


class EventWriter:
    """Base of the writers."""

    def begin(self, start_iter):
        """Remove what an interrupted run wrote from `start_iter` on; by default nothing."""

    def write(self):
        """Read the current storage and put out what is new."""

    def close(self):
        """Nothing to close by default."""


class FileWriter(EventWriter):
    """Base of the writers to files. Each (iteration, name) is written once.

    A resumed run cuts the files at its start iteration, and skips the values that they already hold: it
    repeats the evaluation and the log row of the iteration of its checkpoint.

    A writer has the methods `_cut(start_iter)`, which removes the iterations from `start_iter` on and returns
    {name: last iteration} of the rest, and `_append(rows)`, which writes {iteration: {name: value}}, in the
    order of the iterations.
    """

    def __init__(self, path, window_size=20):
        self._path = path
        self._window_size = window_size
        self._file = None
        # {name: the last iteration in the file}; None until the file has been cut.
        self._written = None

    def begin(self, start_iter):
        with writing(self._path):
            self._written = self._cut(start_iter)

    def write(self):
        """Append what is new since the last call, and flush."""
        storage = get_event_storage()
        rows = defaultdict(dict)
        if self._written is None:
            self.begin(storage.start_iter)
        for name, (value, at) in storage.latest_with_smoothing_hint(self._window_size).items():
            if at > self._written.get(name, -1):
                rows[at][name] = value
        with writing(self._path):
            self._append(dict(sorted(rows.items())))
            if self._file is not None:
                # Not synchronized with the disk: what the system has survives a killed process.
                self._file.flush()
        self._written |= {name: at for at, row in rows.items() for name in row}

    def close(self):
        if self._file is not None:
            with writing(self._path):
                self._file.close()
            self._file = None


class _RowWriter(FileWriter):
    """Appends one row of scalars an iteration to a text file.

    What comes for a row that is already written, such as a repeated evaluation, joins that row. A format has
    the methods `_read(f)`, which yields the complete rows of an open file, {"iteration": int, name: value},
    and `_put(f, rows)`, which writes {iteration: {name: value}}.
    """

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


class TensorboardXWriter(FileWriter):
    """Writes scalars, images and histograms as TensorBoard event files, one for each process.

    tensorboardX is imported by the first write, since most processes have none.
    """

    def _cut(self, start_iter):
        last_iters = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(self._path), "events.out.tfevents.*"))):
            kept = []
            for event, record in _read_events(path):
                # The version of the format stands at step 0.
                if event.file_version or event.step < start_iter:
                    kept.append(record)
                    for value in event.summary.value:
                        last_iters[value.tag] = max(event.step, last_iters.get(value.tag, -1))
            if sum(map(len, kept)) < os.path.getsize(path):
                with atomic_write(path, "wb") as f:
                    f.writelines(kept)
        return last_iters

    def _open(self, start_iter):
        from tensorboardX.proto.event_pb2 import SessionLog

        os.makedirs(self._path, exist_ok=True)
        # In nanoseconds: a run may be resumed within a second.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        # Not tensorboardX's EventsWriter, which calls fsync at each flush: that would hold up the loop.
        self._file = open(os.path.join(self._path, name), "wb")  # noqa: SIM115 - see close()
        self._write_event(0, file_version="brain.Event:2")
        if start_iter:
            # A TensorBoard that is open forgets what has been cut.
            self._write_event(start_iter, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, step, **contents):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        data = Event(step=step, wall_time=time.time(), **contents).SerializeToString()
        header = struct.pack("<Q", len(data))
        for part in (header, data):
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))

    def _append(self, rows):
        """Write the rows; takes the images and histograms out of the storage."""
        from tensorboardX import summary
        from tensorboardX.proto.summary_pb2 import Summary

        storage = get_event_storage()
        if self._file is None:
            self._open(storage.start_iter)
        for at, row in rows.items():
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
            self._write_event(at, summary=Summary(value=values))
        for name, image, at in storage.images:
            self._write_event(at, summary=summary.image(name, image.numpy()))
        for name, values, bins, at in storage.histograms:
            self._write_event(at, summary=summary.histogram(name, values.numpy(), bins))
        storage.clear_images()
        storage.clear_histograms()


def _read_events(path):
    """Yield (event, record) up to the end of the file or its first incomplete record.

    A record is the length of an event, its checksum, the event and its checksum.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    with open(path, "rb") as f:
        while len(header := f.read(12)) == 12:
            length, checksum = struct.unpack("<QI", header)
            # The length is checked before that much is read.
            if checksum != masked_crc32c(header[:8]) or len(data := f.read(length + 4)) < length + 4:
                return
            try:
                yield Event.FromString(data[:-4]), header + data
            except DecodeError:
                return
