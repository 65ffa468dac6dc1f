"""What a run has left in its folder, read independently of what wrote it, and compared with another run."""

import csv
import json
import struct
from collections import Counter
from pathlib import Path

import torch
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


def read_values(folder, exact=True):
    """{file: Counter of (iteration, name, value)}; None for those of the machine, or all if not exact."""
    rows = {
        "metrics.json": [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()],
        "metrics.csv": [{n: v for n, v in row.items() if v} for row in read_csv(folder / "metrics.csv")],
    }
    values = {
        name: [(int(row["iteration"]), key, str(row[key])) for row in found for key in {*row} - {"iteration"}]
        for name, found in rows.items()
    }
    values["events"] = [(step, tag, v.SerializeToString()) for step, tag, v in tensorboard_values(folder)]
    return {
        file: Counter((at, key, value if exact and key not in _UNEQUAL else None) for at, key, value in found)
        for file, found in values.items()
    }


def value_differences(whole, other, exact=True):
    """What is not written exactly once, with the value of an undisturbed run, in the files of another.

    The other may have rows more: of the steps after which it was stopped.
    """
    expected, written = read_values(whole, exact), read_values(other, exact)
    found = []
    for file, values in expected.items():
        iterations = {at for at, _, _ in values}
        found += [f"{file}: {value} is missing" for value in values - written[file]]
        for value, number in (written[file] - values).items():
            if value[0] in iterations or number > 1:
                found.append(f"{file}: {value} is written {number} times too often")
    return sorted(found)


def load(path):
    return torch.load(path, weights_only=True)


def lines(folder):
    """{iteration: what metrics.json says, without times}."""
    path = Path(folder) / "metrics.json"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # The last line of a run that was killed.
            continue
        found[entry["iteration"]] = {k: v for k, v in entry.items() if k not in _UNEQUAL}
    return found


def newest_checkpoint(folder):
    """(iteration, number of files that had to be passed over) of what `--resume` would take; -1 if none."""
    from plaintrain.checkpoint.files import DamagedCheckpointError, list_resume_candidates, read_checkpoint

    for passed, path in enumerate(list_resume_candidates(str(folder))):
        try:
            return read_checkpoint(path, mmap=True)["iteration"], passed
        except DamagedCheckpointError:
            continue
    return -1, 0


def differences(whole, killed, exact=True):
    """What differs, or if not `exact` which values, in the folders of an undisturbed and a killed run."""
    found = value_differences(Path(whole), Path(killed), exact)
    if not exact:
        return found
    for name in ("model_final.pth", "model_best.pth"):
        paths = [Path(folder) / name for folder in (whole, killed)]
        if [p.exists() for p in paths] != [True, True]:
            found += [f"{p} is missing" for p in paths if not p.exists()]
            continue
        first, second = (load(p) for p in paths)
        parts = ("model", "ema", "optimizer", "scheduler", "early_stopping", "data_loader", "nonfinite")
        found += [f"{name}: {part}" for part in parts if not same(first.get(part), second.get(part))]
    return found


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
