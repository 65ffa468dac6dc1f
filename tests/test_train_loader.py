"""plaintrain.data.train_loader: the stream when resumed, with unreadable images and under signals."""

import itertools
import multiprocessing
import os
import signal
import time

import pytest

from plaintrain.data.samplers import TrainingSampler
from plaintrain.data.train_loader import TrainLoader, _outlive_signals
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

RECORDS = [{"file_name": f"{i}.png", "image_id": i} for i in range(7)]
UNREADABLE = set()


def mapper(record, rng):
    """Return a sample with the image's id and a random number."""
    if record["image_id"] in UNREADABLE:
        raise UserError(f"cannot read the image file {record['file_name']}")
    return {**record, "draw": int(rng.integers(1 << 30))}


@pytest.fixture(autouse=True)
def _all_can_be_read():
    UNREADABLE.clear()


def loader(batch_size=2, start_iter=0, **kwargs):
    sampler = TrainingSampler(len(RECORDS), batch_size, seed=4)
    return TrainLoader(RECORDS, mapper, sampler, start_iter=start_iter, **kwargs)


def take(stream, number):
    return list(itertools.islice(iter(stream), number))


@pytest.mark.parametrize("workers", [0, 2])
def test_state_does_not_count_what_was_loaded_ahead(workers):
    whole, first = take(loader(), 12), loader(num_workers=workers)
    assert take(first, 5) == whole[:5]
    second = loader(num_workers=workers)
    second.load_state_dict(first.state_dict())
    assert take(second, 7) == whole[5:]


def test_state_of_another_batch_size_continues_at_the_next_image_and_again_from_there(log):
    images = [sample["image_id"] for batch in take(loader(1), 35) for sample in batch]
    seen, state = [], None
    for size, number in ((2, 3), (5, 2), (1, 4), (3, 5)):
        part = loader(size)
        if state:
            part.load_state_dict(state)
        seen += [s["image_id"] for batch in take(part, number) for s in batch]
        state = part.state_dict()
    assert seen == images[: len(seen)] and len(seen) == 35
    assert (
        "from iteration 3 on a batch has 5 images and not 2; the pass goes on at its image 6 of 7" in log.text
    )
    # Names of batches before the change are those that were seen.
    assert part.image_names(0) == [f"{i} ({i}.png)" for i in images[:2]]
    assert part.image_names(9) == [f"{i} ({i}.png)" for i in images[20:23]]


def test_state_from_before_a_change_of_the_batch_size_does_not_have_it():
    first = loader(2)
    take(first, 3)
    early = first.state_dict()
    loader(4).load_state_dict(early)
    back = loader(2)
    back.load_state_dict(early)
    assert take(back, 2) == take(loader(start_iter=3), 2)


def test_state_is_shared_by_another_number_of_ranks(monkeypatch):
    first = loader(4)
    take(first, 3)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        part = loader(4)
        part.load_state_dict(first.state_dict())
        shares.append(take(part, 3))
    together = [list(itertools.chain(*batch)) for batch in zip(*shares, strict=True)]
    monkeypatch.undo()
    assert together == take(loader(4, start_iter=3), 3)


def test_state_of_another_number_of_images_is_rejected():
    state = loader().state_dict()
    state["sampler"]["size"] = 8
    with pytest.raises(UserError, match=r"DATASETS.TRAIN has 7 images, .* it had 8"):
        loader().load_state_dict(state)


def test_sampler_without_a_state_is_entered_by_iteration():
    class Own:
        seed = 4

        def batch(self, iteration, rank=0, world_size=1):
            return [(iteration % 7, iteration)]

    first = TrainLoader(RECORDS, mapper, Own())
    take(first, 3)
    second = TrainLoader(RECORDS, mapper, Own())
    second.load_state_dict(first.state_dict())
    assert [s["image_id"] for s in take(second, 1)[0]] == [3]


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_unreadable_replaces_images_reproducibly(workers, log):
    UNREADABLE.update({2, 5})
    streams = []
    for _ in range(2):
        stream = loader(num_workers=workers, skip_unreadable=True)
        streams.append(take(stream, 14))
    assert streams[0] == streams[1]
    replaced = [s["image_id"] for batch in streams[0] for s in batch]
    assert len(replaced) == 28 and not {2, 5} & set(replaced)
    # Four passes over seven images.
    assert stream.num_replaced == 8
    assert log.text.count("cannot read the image file 2.png; another image takes its place") == 2
    # The others are those of a stream without unreadable images.
    UNREADABLE.clear()
    whole = [s["image_id"] for batch in take(loader(), 14) for s in batch]
    assert [a for a, b in zip(replaced, whole, strict=True) if b not in (2, 5)] == [
        b for b in whole if b not in (2, 5)
    ]
    again = loader(skip_unreadable=True)
    again.load_state_dict(stream.state_dict())
    assert again.num_replaced == 8


def test_skip_unreadable_logs_the_first_reason_and_makes_samples_again(log):
    # So many that a replacement often has to be replaced.
    UNREADABLE.update({0, 1, 2, 3, 4})
    stream = loader(skip_unreadable=True)
    batches = take(stream, 7)
    logged = [line.split("image file ")[1][0] for line in log.text.splitlines() if "takes its place" in line]
    assert sorted(logged) == list("01234") and "nor can" not in log.text
    assert [stream.samples(iteration) for iteration in range(7)] == batches


def test_unreadable_images_and_bugs_end_the_run():
    def broken(record, rng):
        raise KeyError("x")

    with pytest.raises(KeyError):
        take(TrainLoader(RECORDS, broken, TrainingSampler(7, 2), skip_unreadable=True), 1)
    UNREADABLE.add(3)
    with pytest.raises(UserError, match=r"cannot read the image file 3\.png$"):
        take(loader(), 7)
    UNREADABLE.update(range(7))
    stream = loader(skip_unreadable=True)
    name = stream.image_names(0)[0].split("(")[1].rstrip(")")
    with pytest.raises(UserError, match=rf"cannot read .* {name}; nor can 10 others in its place be read"):
        take(stream, 1)


def _sleep_as_a_worker(ready):
    _outlive_signals(0)
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
