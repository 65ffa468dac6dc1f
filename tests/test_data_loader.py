"""plaintrain.data.loader: the stream when resumed, errors, signals and threads."""

import gc
import itertools
import multiprocessing
import os
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
from hostile_helpers import rejected
from processes import Process

from plaintrain.data import DatasetMapper
from plaintrain.data import build as loaders
from plaintrain.data import loader as train_loaders
from plaintrain.data.loader import _THREAD_NAME, Threads, TrainLoader, _prepare_worker, load_in_threads
from plaintrain.data.samplers import TrainingSampler
from plaintrain.data.transforms import RandomFlip
from plaintrain.utils.errors import UserError

RECORDS = [{"file_name": f"{i}.png", "image_id": i} for i in range(7)]
UNREADABLE = set()


def mapper(record, rng):
    """Return a sample with the image's id and a random number."""
    if record["image_id"] in UNREADABLE:
        raise UserError(f"cannot read the image file {record['file_name']}")
    # So that threads overtake each other.
    time.sleep(0.002 * random.random())
    return {**record, "draw": int(rng.integers(1 << 30))}


@pytest.fixture(autouse=True)
def _all_can_be_read():
    UNREADABLE.clear()


def loader(batch_size=2, workers=0, mapper=mapper, **kwargs):
    sampler = TrainingSampler(len(RECORDS), batch_size, seed=4)
    return TrainLoader(RECORDS, mapper, sampler, num_workers=workers, **kwargs)


def broken(record, rng):
    return 1 / 0


def threaded(mapper=mapper, workers=3, **kwargs):
    return loader(workers=Threads(workers), mapper=mapper, **kwargs)


def take(stream, number):
    return list(itertools.islice(iter(stream), number))


@pytest.mark.parametrize("workers", [0, 2, Threads(3)])
def test_state_does_not_count_what_was_loaded_ahead(workers):
    whole, first = take(loader(), 12), loader(workers=workers)
    assert take(first, 5) == whole[:5] and first.state_dict()["iteration"] == 5
    second = loader(workers=workers)
    second.load_state_dict(first.state_dict())
    assert take(second, 7) == whole[5:]


def test_state_of_another_batch_size_continues_at_the_next_image_and_again_from_there(log):
    images = [sample["image_id"] for batch in take(loader(1), 35) for sample in batch]
    seen, state = [], loader(2).state_dict()
    for size, number in ((2, 3), (5, 2), (1, 4), (3, 5)):
        part = loader(size)
        part.load_state_dict(state)
        seen += [s["image_id"] for batch in take(part, number) for s in batch]
        state = part.state_dict()
    assert seen == images[: len(seen)] and len(seen) == 35
    assert "the batch size changes from 2 to 5 at iteration 3 (image 6 of 7 of the epoch)" in log.text
    # Names of batches before the change are those that were seen.
    assert part.get_image_names(0) == [f"{i} ({i}.png)" for i in images[:2]]
    assert part.get_image_names(9) == [f"{i} ({i}.png)" for i in images[20:23]]


def test_state_of_another_batch_size_or_number_of_images_and_samplers_without_a_state():
    first = loader(2)
    take(first, 3)
    early = first.state_dict()
    loader(4).load_state_dict(early)
    # The state does not have a change of the batch size after it.
    back = loader(2)
    back.load_state_dict(early)
    assert take(back, 2) == take(loader(start_iter=3), 2)
    state = loader().state_dict()
    state["sampler"]["size"] = 8
    rejected("DATASETS.TRAIN has 7 images, ", " had 8 before", by=lambda: loader().load_state_dict(state))

    # A sampler without a state is entered by the iteration.
    class Own:
        seed = 4

        def get_batch(self, iteration, rank=0, world_size=1):
            return [(iteration % 7, iteration)]

    first = TrainLoader(RECORDS, mapper, Own())
    take(first, 3)
    second = TrainLoader(RECORDS, mapper, Own())
    second.load_state_dict(first.state_dict())
    assert [s["image_id"] for s in take(second, 1)[0]] == [3]


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_unreadable_replaces_images_reproducibly(workers, log):
    UNREADABLE.update({2, 5})
    stream, other = (loader(workers=workers, skip_unreadable=True) for _ in range(2))
    batches = take(stream, 14)
    assert batches == take(other, 14)
    replaced = [s["image_id"] for batch in batches for s in batch]
    assert len(replaced) == 28 and not {2, 5} & set(replaced)
    # Four passes over seven images.
    assert stream.num_replaced == 8
    assert log.text.count("cannot read the image file 2.png; another image replaces it") == 2
    # The others are those of a stream without unreadable images.
    UNREADABLE.clear()
    whole = [s["image_id"] for batch in take(loader(), 14) for s in batch]
    assert all(a == b for a, b in zip(replaced, whole, strict=True) if b not in (2, 5))
    again = loader(skip_unreadable=True)
    again.load_state_dict(stream.state_dict())
    assert again.num_replaced == 8


def test_skip_unreadable_makes_samples_again_and_ends_at_bugs(log):
    # So many that a replacement often has to be replaced.
    UNREADABLE.update({0, 1, 2, 3, 4})
    stream = loader(skip_unreadable=True)
    batches = take(stream, 7)
    logged = [line.split("image file ")[1][0] for line in log.text.splitlines() if "replaces it" in line]
    assert sorted(logged) == list("01234") and "cannot be read either" not in log.text
    assert [stream.load_samples(iteration) for iteration in range(7)] == batches
    with pytest.raises(ZeroDivisionError):
        take(loader(mapper=broken, skip_unreadable=True), 1)
    UNREADABLE.clear()
    UNREADABLE.add(3)
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"^cannot read the image file 3\.png$"):
            take(loader(workers=workers), 7)
    UNREADABLE.update(range(7))
    stream = loader(skip_unreadable=True)
    name = stream.get_image_names(0)[0].split("(")[1].rstrip(")")
    rejected(f"{name}; 10 randomly drawn replacements cannot be", by=lambda: take(stream, 1))


def _sleep_as_a_worker(ready):
    _prepare_worker([], 0)
    ready.set()
    time.sleep(30)


def test_worker_ignores_signals_to_all_processes_and_obeys_its_parent():
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=_sleep_as_a_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(30)
    # As the system sends it to every process of a job: not from the training process.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        sender = fork.Process(target=os.kill, args=(worker.pid, number))
        sender.start()
        sender.join()
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def loading():
    """The threads that load."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(_THREAD_NAME)]


@pytest.mark.parametrize(("batch_size", "threads", "most"), [(1, 4, 9), (6, 2, 24)])
def test_threads_load_a_few_batches_ahead(batch_size, threads, most):
    made = []
    stream = iter(threaded(lambda record, rng: made.append(1), threads, batch_size=batch_size))
    for number in range(1, 4):
        next(stream)
        time.sleep(0.05)
        assert len(made) == most + (number - 1) * batch_size
    stream.close()


def test_error_in_a_thread_is_raised_when_its_batch_is_due():
    whole = [s["image_id"] for batch in take(loader(), 3) for s in batch]
    UNREADABLE.add(whole[4])
    stream = iter(threaded())
    next(stream), next(stream)
    with pytest.raises(UserError, match=rf"^cannot read the image file {whole[4]}\.png$"):
        next(stream)
    assert not loading()
    with pytest.raises(ZeroDivisionError) as error:
        take(threaded(broken), 1)
    assert "in broken" in "".join(traceback.format_exception(error.value))
    assert not loading()


def test_threads_need_a_mapper_that_does_not_draw_from_global_generators(cfg):
    one = {"mapper": lambda record: random.random()}
    rejected("WORKER_TYPE thread needs a mapper of (record, generator)", by=lambda: threaded(**one))
    flips = DatasetMapper(augmentations=[RandomFlip()])
    rejected("without augmentations of Detectron2's type", by=lambda: threaded(mapper=flips))
    # Nothing is shared where this thread alone loads.
    assert len(take(threaded(**one, workers=0), 2)) == 2
    standard = DatasetMapper(augmentations=[])
    for worker_type, chosen, expected in (
        ("auto", standard, Threads(2)),
        ("auto", flips, 2),
        ("auto", mapper, 2),
        ("thread", mapper, Threads(2)),
        ("process", standard, 2),
    ):
        cfg.DATALOADER.WORKER_TYPE, cfg.DATALOADER.NUM_WORKERS = worker_type, 2
        workers = loaders._get_num_workers(cfg, chosen)
        assert (type(workers), workers) == (type(expected), expected)


@pytest.mark.parametrize("how", ["raise", "drop", "close", "finish"])
def test_no_thread_is_left(how):
    if how == "raise":
        with pytest.raises(KeyError):
            for _ in threaded():
                raise KeyError
        gc.collect()
    elif how == "finish":
        assert list(load_in_threads({1: "a", 2: "b"}, [[1], [2]], 2)) == [["a"], ["b"]]
    else:
        iterator = iter(threaded())
        next(iterator)
        assert loading()
        if how == "close":
            iterator.close()
        del iterator
    assert not loading()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_loader_collected_by_a_thread_of_its_own_ends():
    """The garbage collector runs in whatever thread makes the object that is one too many."""
    collected = []

    def collecting(record, rng):
        if started.is_set():
            gc.collect()
            collected.append(threading.current_thread().name.startswith(_THREAD_NAME))
        time.sleep(0.02)

    started, cycle = threading.Event(), {}
    cycle["self"], cycle["stream"] = cycle, iter(threaded(collecting))
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
    command = [sys.executable, "-c", "from test_data_loader import load_one_batch; load_one_batch()"]
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


def test_threads_use_one_core_each_and_every_batch_is_a_heartbeat(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    batches = take(threaded(lambda record, rng: torch.get_num_threads()), 4)
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert {number for batch in batches for number in batch} == {1} and after == 2
    beats = []
    monkeypatch.setattr(train_loaders, "beat", lambda extra=0.0: beats.append(extra > 0))
    take(threaded(), 3)
    # One before and one after each batch; the first step may compile.
    assert beats == [False, True, False, False, False, False]


def test_tensors_are_pinned_by_the_threads_for_the_current_device(monkeypatch):
    devices, pins = set(), []

    def pin(tensor):
        pins.append(threading.current_thread().name.startswith(_THREAD_NAME))
        return tensor + 1

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", devices.add)
    UNREADABLE.add(2)

    def nested(record, rng):
        one = torch.ones(1)
        return {**mapper(record, rng), "target": {"boxes": one, "more": [one, (one, "x")]}}

    batches = take(threaded(nested, skip_unreadable=True), 7)
    assert devices == {5} and all(pins) and len(pins) >= 42
    for sample in itertools.chain(*batches):
        assert sample["target"] == {"boxes": 2, "more": [2, (2, "x")]}
        assert sample["image_id"] != 2
