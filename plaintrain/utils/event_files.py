"""TensorBoard event files: records of a length, its checksum, an `Event` message and its checksum."""

import glob
import os
import struct

from plaintrain.utils.files import atomic_write


def list_event_files(folder):
    """Return the paths of the event files in a folder, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(str(folder)), "events.out.tfevents.*")))


def encode_event(event):
    """Return an `Event` as a record."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    header = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (header, data)]
    return header + checksums[0] + data + checksums[1]


def read_event_file(path):
    """Yield (event, record) up to the end of the file or its first incomplete record."""
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


def cut_event_files(folder, start_iter):
    """Remove the events from step `start_iter` on, and incomplete records.

    Returns:
        {tag: its last step in the files}.
    """
    last_steps = {}
    for path in list_event_files(folder):
        size = 0
        for event, record in _events_before(path, start_iter):
            size += len(record)
            for value in event.summary.value:
                last_steps[value.tag] = max(event.step, last_steps.get(value.tag, -1))
        if size < os.path.getsize(path):
            with atomic_write(path, "wb") as f:
                f.writelines(record for _, record in _events_before(path, start_iter))
    return last_steps


def _events_before(path, start_iter):
    # The version of the format stands at step 0.
    return ((e, record) for e, record in read_event_file(path) if e.file_version or e.step < start_iter)
