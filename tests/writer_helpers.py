"""What the writers have left in a folder, read independently of them."""

import csv
import json
import struct
from collections import Counter

from tensorboardX.proto.event_pb2 import Event

# Of the machine, not of the run.
_UNEQUAL = ("time", "data_time", "max_mem")


def read_events(folder):
    """All TensorBoard events of a folder's files, in the order they were written."""
    events = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert len(data) >= 16 + length, f"{path} ends within a record"
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def tensorboard_values(folder):
    """[(step, tag, value message)] of a folder's TensorBoard files."""
    return [(event.step, value.tag, value) for event in read_events(folder) for value in event.summary.value]


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def read_values(folder):
    """{file: Counter of (iteration, name, value)}; values of the machine are None."""
    rows = {
        "metrics.json": [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()],
        "metrics.csv": [{n: v for n, v in row.items() if v} for row in read_csv(folder / "metrics.csv")],
    }
    values = {
        name: [
            (int(row["iteration"]), key, str(row[key])) for row in found for key in row if key != "iteration"
        ]
        for name, found in rows.items()
    }
    values["events"] = [(step, tag, v.SerializeToString()) for step, tag, v in tensorboard_values(folder)]
    return {
        file: Counter((at, name, None if name in _UNEQUAL else value) for at, name, value in found)
        for file, found in values.items()
    }


def value_differences(whole, other):
    """What is not written exactly once, with the value of an undisturbed run, in the files of another.

    The other may have rows more: of the steps after which it was stopped.
    """
    expected, written = read_values(whole), read_values(other)
    found = []
    for file, values in expected.items():
        found += [f"{file}: iteration {at}, {name} is missing" for at, name, _ in values - written[file]]
        there = {at for at, _, _ in values}
        unknown = [(at, name) for at, name, _ in written[file] - values if at in there]
        found += [f"{file}: iteration {at}, {name} is unknown" for at, name in unknown]
        twice = Counter((at, name) for at, name, _ in written[file].elements())
        found += [f"{file}: iteration {at}, {name} {n} times" for (at, name), n in twice.items() if n > 1]
    return sorted(found)
