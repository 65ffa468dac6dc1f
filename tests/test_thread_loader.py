"""plaintrain.data.thread_loader: the samples that processes make, and no thread left behind."""

import gc
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from processes import Process

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


def test_threads_make_the_samples_of_processes(dataset, cfg):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [0.5, 0.5]
    cfg.INPUT.AUGMENTATIONS = ["RandomPhotometricDistort"]
    streams = []
    for kind, number in (("process", 0), ("process", 2), ("thread", 1), ("thread", 3)):
        cfg.DATALOADER.WORKER_TYPE, cfg.DATALOADER.NUM_WORKERS = kind, number
        loader = build_detection_train_loader(cfg, dataset=dataset)
        assert isinstance(loader._loader, ThreadLoader) == (kind == "thread")
        streams.append([[_plain(s) for s in batch] for batch in take(loader, 8)])
    assert all(stream == streams[0] for stream in streams)
    assert len({str(s["image"]) for batch in streams[0] for s in batch}) == 16


def test_test_loader_with_threads_gives_the_views_of_each_image_once_each_time(dataset, cfg):
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES = True, (20, 30)
    cfg.DATALOADER.WORKER_TYPE, cfg.TEST.IMS_PER_BATCH = "thread", 3
    found = []
    for number in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = number
        loader = build_detection_test_loader(cfg, "cells", dataset=dataset)
        assert len(loader) == 3
        for _ in range(2):
            batches = list(loader)
            assert [len(batch) for batch in batches] == [3, 3, 1]
            views = [v for b in batches for s in b for v in s["views"]]
            found.append([view["image"].tolist() for view in views])
            assert [s["image_id"] for b in batches for s in b] == [0, 3, 6, 1, 2, 4, 5]
    assert all(images == found[0] for images in found)


def test_state_does_not_count_what_was_loaded_ahead():
    whole, first = take(make(workers=0), 12), make()
    assert take(first, 5) == whole[:5] and first.state_dict()["iteration"] == 5
    second = make()
    second.load_state_dict(first.state_dict())
    assert take(second, 7) == whole[5:]


def test_every_batch_is_a_heartbeat(monkeypatch):
    beats = []
    monkeypatch.setattr(train_loaders, "beat", lambda extra: beats.append(extra > 0))
    take(make(), 3)
    assert beats == [True, False, False]


@pytest.mark.parametrize(("batch_size", "threads", "most"), [(1, 4, 9), (6, 2, 24)])
def test_threads_load_a_few_batches_ahead(batch_size, threads, most):
    made = []
    stream = iter(make(lambda record, rng: made.append(1), workers=Threads(threads), batch_size=batch_size))
    for number in range(1, 4):
        next(stream)
        time.sleep(0.05)
        assert len(made) == most + (number - 1) * batch_size
    stream.close()


def test_unreadable_image_is_raised_when_its_batch_is_due():
    whole = [s["image_id"] for batch in take(make(workers=0), 3) for s in batch]
    UNREADABLE.add(whole[4])
    stream = iter(make())
    next(stream), next(stream)
    with pytest.raises(UserError, match=rf"^cannot read the image file {whole[4]}\.png$"):
        next(stream)
    assert not loading()


def test_bug_in_a_mapper_is_raised_with_its_traceback():
    def broken(record, rng):
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as error:
        take(make(broken), 1)
    assert "in broken" in "".join(traceback.format_exception(error.value))
    assert not loading()


def test_mapper_that_draws_from_global_generators_is_rejected():
    one = {"mapper": lambda record: random.random()}
    with pytest.raises(UserError, match=r"WORKER_TYPE is thread, but the mapper takes a record alone"):
        make(**one)
    # Nothing is shared where this thread alone loads.
    assert len(take(make(**one, workers=Threads(0)), 2)) == 2


@pytest.mark.parametrize(
    ("kind", "mapper", "expected"),
    [
        ("auto", DatasetMapper(augmentations=[]), Threads(2)),
        ("auto", mapper, 2),
        ("thread", mapper, Threads(2)),
        ("process", DatasetMapper(augmentations=[]), 2),
    ],
)
def test_worker_type_auto_takes_threads_for_mappers_that_allow_it(cfg, kind, mapper, expected):
    cfg.DATALOADER.WORKER_TYPE, cfg.DATALOADER.NUM_WORKERS = kind, 2
    assert loaders._workers(cfg, mapper) == expected


@pytest.mark.parametrize("how", ["raise", "drop", "close", "finish"])
def test_no_thread_is_left(how):
    stream = make() if how != "finish" else [[1], [2]]
    if how == "raise":
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
def test_loader_collected_by_a_thread_of_its_own_ends():
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


def _print_sample(record, rng):
    print("sample", flush=True)
    time.sleep(0.2)
    return record


def load_one_batch():
    """Load a batch of 8 in two threads, and raise; the traceback holds the stream, to the very end."""
    torch.set_num_threads(2)
    sampler = TrainingSampler(9, 8, seed=0)
    stream = iter(TrainLoader(range(9), _print_sample, sampler, num_workers=Threads(2)))
    print("begun", flush=True)
    next(stream)
    print("loaded", torch.get_num_threads(), flush=True)
    raise KeyError(stream)


@pytest.mark.long
def test_interpreter_exits_with_threads_at_work():
    # A fresh interpreter: what is forked ends without finalizing it.
    command = [sys.executable, "-c", "from test_thread_loader import load_one_batch; load_one_batch()"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "loaded 2\n" in done.stdout
    assert "KeyError" in done.stderr and "Fatal" not in done.stderr


def test_ctrl_c_ends_a_process_that_waits_for_a_sample(tmp_path):
    process = Process(tmp_path / "out.txt", load_one_batch)
    assert process.wait_for("sample")
    process.kill(signal.SIGINT)
    process.wait(60)
    # It waits for the samples being loaded, and not for the 32 of four batches.
    assert process.code == 1 and "KeyboardInterrupt" in process.output
    assert 1 <= process.output.count("sample\n") < 8


def test_threads_use_one_core_each_and_leave_the_training_its_number():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = take(make(lambda record, rng: torch.get_num_threads()), 4)
        assert {number for batch in batches for number in batch} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tensors_are_pinned_by_the_threads_for_the_current_device(monkeypatch):
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
