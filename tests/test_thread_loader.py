"""Threads as workers: the very samples that processes make, and nothing left behind."""

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch

from plaintrain.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from plaintrain.data import loader as loaders
from plaintrain.data import train_loader as train_loaders
from plaintrain.data.samplers import TrainingSampler
from plaintrain.data.thread_loader import _NAME, ThreadLoader, Threads
from plaintrain.data.train_loader import TrainLoader
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

RECORDS = [{"file_name": f"{i}.png", "image_id": i} for i in range(7)]


def mapper(record, rng):
    if record["image_id"] in UNREADABLE:
        raise UserError(f"cannot read the image file {record['file_name']}")
    # So that threads overtake each other.
    time.sleep(0.002 * random.random())
    return {**record, "draw": int(rng.integers(1 << 30))}


UNREADABLE = set()


@pytest.fixture(autouse=True)
def _all_can_be_read():
    UNREADABLE.clear()


@pytest.fixture
def dataset(tmp_path, write_image):
    """Seven images of two shapes, with a box each."""
    records = []
    for i in range(7):
        width, height = (30, 40) if i % 3 == 0 else (40, 30)
        path = tmp_path / f"{i}.png"
        write_image(path, width, height, seed=i)
        box = {"bbox": [1, 2, 3 + i, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        record = {"file_name": str(path), "image_id": i, "height": height, "width": width}
        records.append({**record, "annotations": [box]})
    return records


def make(mapper=mapper, workers=Threads(3), batch_size=2, **kwargs):  # noqa: B008 - it cannot be changed
    sampler = TrainingSampler(len(RECORDS), batch_size, seed=4)
    return TrainLoader(RECORDS, mapper, sampler, num_workers=workers, **kwargs)


def take(stream, number):
    return list(itertools.islice(iter(stream), number))


def loading():
    """The threads that load."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(_NAME)]


def _plain(sample):
    """A sample in a form that `==` compares."""
    parts = {**sample, **sample.get("target", {})}
    parts.pop("target", None)
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in parts.items()}


# ---- the same stream ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_threads_make_the_very_samples_that_processes_make(dataset, cfg):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [0.5, 0.5]
    cfg.INPUT.AUGMENTATIONS = ["RandomPhotometricDistort"]
    streams = []
    for kind, number in (("process", 0), ("process", 1), ("process", 3), ("thread", 1), ("thread", 3)):
        cfg.DATALOADER.WORKER_TYPE, cfg.DATALOADER.NUM_WORKERS = kind, number
        loader = build_detection_train_loader(cfg, dataset=dataset)
        assert isinstance(loader._loader, ThreadLoader) == (kind == "thread")
        streams.append([[_plain(s) for s in batch] for batch in take(loader, 8)])
    assert all(stream == streams[0] for stream in streams)
    assert len({str(s["image"]) for batch in streams[0] for s in batch}) == 16


@pytest.mark.parametrize("aug", [False, True])
def test_the_test_loader_gives_each_image_once_in_the_same_order_each_time(dataset, cfg, aug):
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES = aug, (20, 30)
    cfg.DATALOADER.WORKER_TYPE, cfg.TEST.IMS_PER_BATCH = "thread", 3
    found = []
    for number in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = number
        loader = build_detection_test_loader(cfg, "cells", dataset=dataset)
        assert len(loader) == 3
        for _ in range(2):
            batches = list(loader)
            assert [len(batch) for batch in batches] == [3, 3, 1]
            views = [v for b in batches for s in b for v in s.get("views", [s])]
            found.append([view["image"].tolist() for view in views])
            assert [s["image_id"] for b in batches for s in b] == [0, 3, 6, 1, 2, 4, 5]
    assert all(images == found[0] for images in found)


def test_a_state_counts_what_was_handed_out_and_not_what_was_loaded_ahead():
    whole, first = take(make(workers=0), 12), make()
    assert take(first, 5) == whole[:5] and first.state_dict()["iteration"] == 5
    second = make()
    second.load_state_dict(first.state_dict())
    assert take(second, 7) == whole[5:]


def test_an_image_that_cannot_be_read_is_replaced_by_the_same_as_in_processes(log):
    UNREADABLE.update({2, 5})
    streams = [make(workers=workers, skip_unreadable=True) for workers in (0, Threads(3))]
    assert take(streams[0], 14) == take(streams[1], 14)
    assert streams[0].num_replaced == streams[1].num_replaced == 8


def test_every_batch_is_a_sign_of_life(monkeypatch):
    beats = []
    monkeypatch.setattr(train_loaders, "beat", lambda extra: beats.append(extra > 0))
    take(make(), 3)
    assert beats == [True, False, False]


@pytest.mark.parametrize(("batch_size", "threads", "most"), [(1, 4, 9), (2, 2, 8), (6, 2, 24)])
def test_no_more_than_a_few_batches_are_made_ahead(batch_size, threads, most):
    made = []
    stream = iter(make(lambda record, rng: made.append(1), workers=Threads(threads), batch_size=batch_size))
    for number in range(1, 5):
        next(stream)
        time.sleep(0.05)
        assert len(made) == most + (number - 1) * batch_size
    stream.close()


# ---- mistakes -------------------------------------------------------------------------------------


def test_a_mistake_in_the_data_is_one_clean_sentence_when_its_batch_is_due():
    whole = [s["image_id"] for batch in take(make(workers=0), 3) for s in batch]
    UNREADABLE.add(whole[4])
    stream = iter(make())
    next(stream), next(stream)
    with pytest.raises(UserError, match=rf"^cannot read the image file {whole[4]}\.png$"):
        next(stream)
    assert not loading()


def test_a_bug_in_a_mapper_is_raised_with_its_traceback():
    def broken(record, rng):
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as error:
        take(make(broken), 1)
    assert "in broken" in "".join(traceback.format_exception(error.value))
    assert not loading()


def test_a_mapper_that_draws_from_global_generators_is_refused():
    one = {"mapper": lambda record: random.random()}
    with pytest.raises(UserError, match=r"WORKER_TYPE is thread, but the mapper takes a record alone"):
        make(**one)
    # Nothing is shared where this thread alone loads.
    assert len(take(make(**one, workers=Threads(0)), 2)) == 2


def test_a_negative_number_is_refused():
    with pytest.raises(UserError, match="NUM_WORKERS is -1"):
        make(workers=Threads(-1))


@pytest.mark.parametrize(
    ("kind", "mapper", "expected"),
    [
        ("auto", DatasetMapper(augmentations=[]), Threads(2)),
        ("auto", mapper, 2),
        ("thread", mapper, Threads(2)),
        ("process", DatasetMapper(augmentations=[]), 2),
    ],
)
def test_auto_takes_threads_for_mappers_that_allow_it(cfg, kind, mapper, expected):
    cfg.DATALOADER.WORKER_TYPE, cfg.DATALOADER.NUM_WORKERS = kind, 2
    assert loaders._workers(cfg, mapper) == expected


# ---- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["break", "raise", "drop", "close", "finish"])
def test_no_thread_is_left(dataset, cfg, how):
    stream = make() if how != "finish" else [[1], [2]]
    if how == "break":
        for _ in stream:
            assert loading()
            break
    elif how == "raise":
        with pytest.raises(KeyError):
            _raise_in_a_loop(stream)
        gc.collect()
    elif how == "finish":
        assert list(ThreadLoader({1: "a", 2: "b"}, stream, 2)) == [["a"], ["b"]]
    else:
        iterator = iter(stream)
        next(iterator)
        assert loading()
        if how == "close":
            iterator.close()
        del iterator
    assert not loading()


def _raise_in_a_loop(stream):
    for _ in stream:
        raise KeyError


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_loader_that_is_collected_by_a_thread_of_its_own_ends():
    """The garbage collector runs in whatever thread makes the object that is one too many."""
    collected = []

    def collecting(record, rng):
        if started.is_set():
            gc.collect()
            collected.append(threading.current_thread().name.startswith(_NAME))
        time.sleep(0.02)

    started, cycle = threading.Event(), {}
    cycle["self"], cycle["stream"] = cycle, iter(make(collecting))
    gc.disable()
    try:
        next(cycle["stream"])
        del cycle
        started.set()
        deadline = time.monotonic() + 30
        while loading() and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        gc.enable()
    assert collected and all(collected) and not loading()
    # What was raised on the way, unseen, is raised here.
    gc.collect()


_CHILD = """
import sys, time
import torch
from plaintrain.data.samplers import TrainingSampler
from plaintrain.data.thread_loader import Threads
from plaintrain.data.train_loader import TrainLoader

def mapper(record, rng):
    sys.stderr.write("sample\\n")
    time.sleep({seconds})
    return record

stream = iter(TrainLoader(range(9), mapper, TrainingSampler(9, 8, seed=0), num_workers=Threads(2)))
print("begun", flush=True)
next(stream)
print("loaded", torch.get_num_threads(), flush=True)
{then}
"""


def _child(seconds, then=""):
    code = _CHILD.format(seconds=seconds, then=then)
    pipe, env = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "2"}
    # A shell's background job, as CI may be, hands down that Ctrl-C is ignored.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=pipe, stderr=pipe, env=env, **heeds
    )


def test_the_process_ends_with_threads_at_work():
    # What is raised holds the stream, to the very end.
    process = _child(0.05, "raise KeyError(stream)")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.split()) == (1, ["begun", "loaded", "2"])
    assert "KeyError" in err and "Fatal" not in err


def test_ctrl_c_ends_a_process_that_waits_for_a_sample():
    process = _child(1)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # What is being loaded is awaited, and not the 32 samples of four batches.
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err
    assert 2 <= err.count("sample\n") < 24


# ---- cores and pinned memory ----------------------------------------------------------------------


def test_threads_take_one_core_each_and_leave_the_training_its_number():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = take(make(lambda record, rng: torch.get_num_threads()), 4)
        assert {number for batch in batches for number in batch} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tensors_are_pinned_by_the_threads_for_the_device_of_the_training(monkeypatch):
    devices, pins = set(), []

    def pin(tensor):
        pins.append(threading.current_thread().name.startswith(_NAME))
        return tensor + 1

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", devices.add)
    UNREADABLE.add(2)

    def nested(record, rng):
        one = torch.ones(1)
        return {**mapper(record, rng), "target": {"boxes": one, "more": [one, (one, "x")]}}

    batches = take(make(nested, skip_unreadable=True), 7)
    assert devices == {5} and all(pins) and len(pins) >= 42
    two = torch.full((1,), 2.0)
    for sample in itertools.chain(*batches):
        assert sample["target"] == {"boxes": two, "more": [two, (two, "x")]}
        assert sample["image_id"] != 2
