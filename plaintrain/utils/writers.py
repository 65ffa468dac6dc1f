"""Writers of scalars to files: JSON lines, CSV, TensorBoard."""

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
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from plaintrain.utils.files import atomic_write, check_file, parse_csv_rows, parse_json_rows, writing
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
    Files are only open during a write, so the data survives a killed process.
    """

    def __init__(self, path: str, window_size: int = 20) -> None:
        self._path = path
        self._window_size = window_size
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
        self._written |= {name: iteration for iteration, row in scalars.items() for name in row}


class _RowWriter(FileWriter):
    """Writer of one row per iteration to a text file, which merges later scalars into existing rows."""

    _parse: Callable[[Iterable[str]], Iterator[dict[str, Any]]]

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
            return {row.pop("iteration"): row for row in self._parse(f)}

    def _rewrite(self, scalars: _Scalars) -> None:
        with atomic_write(self._path) as f:
            self._write_rows(f, dict(sorted(scalars.items())))

    def _truncate(self, start_iter: int) -> dict[str, int]:
        kept = {i: row for i, row in sorted(self._read_scalars().items()) if i < start_iter}
        if os.path.exists(self._path):
            self._rewrite(kept)
        return {name: i for i, row in kept.items() for name in row}

    def _append(self, scalars: _Scalars) -> None:
        if not scalars:
            return
        if self._can_append(scalars):
            # The csv module needs newline="".
            with open(self._path, "a", encoding="utf-8", newline="") as f:
                self._write_rows(f, scalars)
            return
        merged = self._read_scalars()
        merged |= {i: {**merged.get(i, {}), **row} for i, row in scalars.items()}
        self._rewrite(merged)


class JSONWriter(_RowWriter):
    """Writer of one JSON object per line, `{"iteration": 0, name: value, ...}`; null for NaN and infinity."""

    _parse = staticmethod(parse_json_rows)

    def _write_rows(self, f, scalars):
        for iteration, row in scalars.items():
            f.write(json.dumps(_replace_nonfinite({"iteration": iteration, **row}), allow_nan=False) + "\n")


class CSVWriter(_RowWriter):
    """Writer of one CSV row per iteration; non-finite values are empty. New scalars become new columns."""

    _parse = staticmethod(parse_csv_rows)
    _columns = ("iteration",)

    def _can_append(self, scalars):
        return super()._can_append(scalars) and set().union(*scalars.values()) <= set(self._columns)

    def _rewrite(self, scalars):
        names = (name for row in scalars.values() for name in row)
        self._columns = tuple(dict.fromkeys([*self._columns, *names]))
        super()._rewrite(scalars)

    def _write_rows(self, f, scalars):
        table = csv.DictWriter(f, self._columns, restval="", lineterminator="\n")
        if f.tell() == 0:
            table.writeheader()
        for iteration, row in scalars.items():
            table.writerow(_replace_nonfinite({"iteration": iteration, **row}))


def _replace_nonfinite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


class TensorboardXWriter(FileWriter):
    """Writer of scalars, images and histograms to TensorBoard event files; imports tensorboardX if used."""

    _file = ""

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

    def _append(self, scalars):
        """Write scalars, and move the images and histograms of the storage to the file."""
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        storage = get_event_storage()
        events = []
        if not os.path.exists(self._file):
            os.makedirs(self._path, exist_ok=True)
            # In nanoseconds, since a run may be resumed within a second.
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
            self._file = os.path.join(self._path, name)
            events.append(Event(file_version="brain.Event:2"))
            if storage.start_iter:
                # Makes an open TensorBoard drop the truncated events.
                events.append(Event(step=storage.start_iter, session_log=SessionLog(status=SessionLog.START)))
        for iteration, row in scalars.items():
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
            events.append(Event(step=iteration, summary=Summary(value=values)))
        for name, image, iteration in storage.images:
            events.append(Event(step=iteration, summary=summary.image(name, image.numpy())))
        for name, values, bins, iteration in storage.histograms:
            events.append(Event(step=iteration, summary=summary.histogram(name, values.numpy(), bins)))
        # Not tensorboardX's EventsWriter, whose flush() calls fsync and blocks the loop.
        with open(self._file, "ab") as f:
            f.writelines(map(_encode_event, events))
        storage.clear_images()
        storage.clear_histograms()


def _encode_event(event: Any) -> bytes:
    """Return the record of an event: length, checksum, event, checksum."""
    from tensorboardX.record_writer import masked_crc32c

    event.wall_time = time.time()
    data = event.SerializeToString()
    header = struct.pack("<Q", len(data))
    return b"".join(chunk + struct.pack("<I", masked_crc32c(chunk)) for chunk in (header, data))


def _read_events(path: str) -> Iterator[tuple[Any, bytes]]:
    """Yield (event, record) up to the first incomplete record."""
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
