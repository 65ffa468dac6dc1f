"""The TensorBoard writer; tensorboardX is imported by the first write, since most processes have none."""

import glob
import os
import socket
import struct
import time

from plaintrain.utils.files import atomic_write
from plaintrain.utils.storage import get_event_storage
from plaintrain.utils.writer import FileWriter


class TensorboardXWriter(FileWriter):
    """Writes scalars, images and histograms as TensorBoard event files, one for each process."""

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
