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
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from typing import IO, Any

from plaintrain.utils.files import atomic_write, check_file, writing
from plaintrain.utils.storage import get_event_storage

# {iteration: {name: value}}
_Scalars = dict[int, dict[str, Any]]


class EventWriter:
    """Base class of writers, which write new scalars of the current `EventStorage`."""

    def begin(self, start_iter: int) -> None:
        """Remove what an interrupted run wrote from `start_iter` on."""

    def write(self) -> None:
        """Write the new scalars."""

    def close(self) -> None:
        """Close the files."""


class FileWriter(EventWriter, ABC):
    """Base class of writers to files, which a resumed run truncates at its start iteration.

    Each (iteration, name) is written once, also if a resumed run repeats the evaluation of its checkpoint.
    """

    def __init__(self, path: str, window_size: int = 20) -> None:
        self._path = path
        self._window_size = window_size
        self._file: IO[Any] | None = None
        self._has_begun = False
        # {name: last iteration in the file}
        self._written: dict[str, int] = {}

    @abstractmethod
    def _truncate(self, start_iter: int) -> dict[str, int]:
        """Remove the iterations from `start_iter` on; return {name: last iteration} of the rest."""

    @abstractmethod
    def _append(self, scalars: _Scalars) -> None:
        """Write scalars in the order of the iterations."""

    def begin(self, start_iter: int) -> None:
        with writing(self._path):
            self._written = self._truncate(start_iter)
        self._has_begun = True

    def write(self) -> None:
        """Write the scalars that the file does not have yet."""
        storage = get_event_storage()
        scalars: _Scalars = defaultdict(dict)
        if not self._has_begun:
            self.begin(storage.start_iter)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._written.get(name, -1):
                scalars[iteration][name] = value
        with writing(self._path):
            self._append(dict(sorted(scalars.items())))
            if self._file is not None:
                # flush() without fsync: the data survives a killed process.
                self._file.flush()
        self._written |= {name: iteration for iteration, row in scalars.items() for name in row}

    def close(self) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.close()
            self._file = None


class _RowWriter(FileWriter):
    """Writer of one row per iteration to a text file, which merges later scalars into existing rows."""

    @abstractmethod
    def _read(self, f: IO[str]) -> Iterator[dict[str, Any]]:
        """Yield the complete rows of a file, {"iteration": int, name: value}."""

    @abstractmethod
    def _write_rows(self, f: IO[str], scalars: _Scalars) -> None:
        """Write a row per iteration."""

    def _can_append(self, scalars: _Scalars) -> bool:
        return os.path.exists(self._path) and min(scalars) > max(self._written.values(), default=-1)

    def _read_scalars(self) -> _Scalars:
        if not os.path.exists(self._path):
            return {}
        check_file(self._path)
        with open(self._path, encoding="utf-8", errors="replace", newline="") as f:
            return {row.pop("iteration"): row for row in self._read(f)}

    def _rewrite(self, scalars: _Scalars) -> None:
        """Replace the file, and open it for appending."""
        if self._file is not None:
            self._file.close()
        with atomic_write(self._path) as f:
            self._write_rows(f, dict(sorted(scalars.items())))
        # The csv module needs newline="".
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - see close()

    def _truncate(self, start_iter: int) -> dict[str, int]:
        kept = {i: row for i, row in sorted(self._read_scalars().items()) if i < start_iter}
        if os.path.exists(self._path):
            self._rewrite(kept)
        return {name: i for i, row in kept.items() for name in row if row[name] != ""}

    def _append(self, scalars: _Scalars) -> None:
        if not scalars:
            return
        if self._file is not None and self._can_append(scalars):
            self._write_rows(self._file, scalars)
            return
        merged = self._read_scalars()
        merged |= {i: {**merged.get(i, {}), **row} for i, row in scalars.items()}
        self._rewrite(merged)


class JSONWriter(_RowWriter):
    """Writer of one JSON object per line, `{"iteration": 0, name: value, ...}`; null for NaN and infinity."""

    def _read(self, f):
        for line in f:
            # Skip incomplete lines.
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                    yield row

    def _write_rows(self, f, scalars):
        for iteration, row in scalars.items():
            f.write(json.dumps(_replace_nonfinite({"iteration": iteration, **row}), allow_nan=False) + "\n")


class CSVWriter(_RowWriter):
    """Writer of one CSV row per iteration; non-finite values are empty. New scalars become new columns."""

    def __init__(self, csv_file: str, window_size: int = 20) -> None:
        super().__init__(csv_file, window_size)
        self._columns = ["iteration"]

    def _read(self, f):
        # Without a newline, the last value of a line may have lost digits.
        # An unclosed quote makes a value that is longer than the csv module takes.
        with contextlib.suppress(csv.Error):
            for row in csv.DictReader(line for line in f if line.endswith("\n")):
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    # DictReader stores None in rows that are too short or too long.
                    if None not in row and None not in row.values():
                        yield {**row, "iteration": int(row["iteration"])}

    def _can_append(self, scalars):
        return super()._can_append(scalars) and set().union(*scalars.values()) <= set(self._columns)

    def _rewrite(self, scalars):
        names = (name for row in scalars.values() for name in row)
        self._columns = list(dict.fromkeys([*self._columns, *names]))
        super()._rewrite(scalars)

    def _write_rows(self, f, scalars):
        table = csv.DictWriter(f, self._columns, restval="", lineterminator="\n")
        if f is not self._file:
            table.writeheader()
        for iteration, row in scalars.items():
            table.writerow(_replace_nonfinite({"iteration": iteration, **row}))


def _replace_nonfinite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


class TensorboardXWriter(FileWriter):
    """Writer of scalars, images and histograms to TensorBoard event files; imports tensorboardX if used."""

    def _truncate(self, start_iter):
        last_iters = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(self._path), "events.out.tfevents.*"))):
            kept = []
            for event, record in _read_events(path):
                # The event with the file version has step 0.
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
        # In nanoseconds, since a run may be resumed within a second.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        # Not tensorboardX's EventsWriter, whose flush() calls fsync and blocks the loop.
        self._file = open(os.path.join(self._path, name), "wb")  # noqa: SIM115 - see close()
        self._write_event(0, file_version="brain.Event:2")
        if start_iter:
            # Makes an open TensorBoard drop the truncated events.
            self._write_event(start_iter, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, step, **contents):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        data = Event(step=step, wall_time=time.time(), **contents).SerializeToString()
        header = struct.pack("<Q", len(data))
        for chunk in (header, data):
            self._file.write(chunk + struct.pack("<I", masked_crc32c(chunk)))

    def _append(self, scalars):
        """Write scalars, and move the images and histograms of the storage to the file."""
        from tensorboardX import summary
        from tensorboardX.proto.summary_pb2 import Summary

        storage = get_event_storage()
        if self._file is None:
            self._open(storage.start_iter)
        for iteration, row in scalars.items():
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
            self._write_event(iteration, summary=Summary(value=values))
        for name, image, iteration in storage.images:
            self._write_event(iteration, summary=summary.image(name, image.numpy()))
        for name, values, bins, iteration in storage.histograms:
            self._write_event(iteration, summary=summary.histogram(name, values.numpy(), bins))
        storage.clear_images()
        storage.clear_histograms()


def _read_events(path: str) -> Iterator[tuple[Any, bytes]]:
    """Yield (event, record) up to the first incomplete record: length, checksum, event, checksum."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    with open(path, "rb") as f:
        while len(header := f.read(12)) == 12:
            length, checksum = struct.unpack("<QI", header)
            # Check the length before reading as many bytes.
            if checksum != masked_crc32c(header[:8]) or len(data := f.read(length + 4)) < length + 4:
                return
            try:
                yield Event.FromString(data[:-4]), header + data
            except DecodeError:
                return
