"""The training stream when it is gone on with, when an image cannot be read, and when a signal comes."""

import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from plaintrain.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from plaintrain.data.train_loader import TrainLoader, _outlive_signals
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

RECORDS = [{"file_name": f"{i}.png", "image_id": i} for i in range(7)]


def mapper(record, rng):
    """A sample that says which image it is and what was drawn for it."""
    if record["image_id"] in UNREADABLE:
        raise UserError(f"cannot read the image file {record['file_name']}")
    return {**record, "draw": int(rng.integers(1 << 30))}


UNREADABLE = set()


@pytest.fixture(autouse=True)
def _all_can_be_read():
    UNREADABLE.clear()


def loader(batch_size=2, start_iter=0, **kwargs):
    sampler = TrainingSampler(len(RECORDS), batch_size, seed=4)
    return TrainLoader(RECORDS, mapper, sampler, start_iter=start_iter, **kwargs)


def take(stream, number):
    return list(itertools.islice(iter(stream), number))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_a_state_goes_on_with_the_stream_whatever_was_loaded_ahead(workers):
    whole, first = take(loader(), 12), loader(num_workers=workers)
    assert take(first, 5) == whole[:5]
    second = loader(num_workers=workers)
    second.load_state_dict(first.state_dict())
    assert take(second, 7) == whole[5:]


def test_another_batch_goes_on_at_the_next_image_and_again_from_there():
    images = [sample["image_id"] for batch in take(loader(1), 35) for sample in batch]
    seen, state = [], None
    for size, number in ((2, 3), (5, 2), (1, 4), (3, 5)):
        part = loader(size)
        if state:
            part.load_state_dict(state)
        seen += [s["image_id"] for batch in take(part, number) for s in batch]
        state = part.state_dict()
    assert seen == images[: len(seen)] and len(seen) == 35
    # Names of batches before the change are those that were seen.
    assert part.image_names(0) == [f"{i} ({i}.png)" for i in images[:2]]
    assert part.image_names(9) == [f"{i} ({i}.png)" for i in images[20:23]]


def test_a_run_that_is_killed_before_the_change_does_not_have_it(log):
    first = loader(2)
    take(first, 3)
    early = first.state_dict()
    second = loader(4)
    second.load_state_dict(early)
    assert (
        "from iteration 3 on a batch has 4 images and not 2; the pass goes on at its image 6 of 7" in log.text
    )
    back = loader(2)
    back.load_state_dict(early)
    assert back._sampler.phases == [(0, 0, 2)] and take(back, 2) == take(loader(start_iter=3), 2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_number_of_ranks_shares_the_same_stream(world_size, monkeypatch):
    first = loader(4)
    take(first, 3)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
        part = loader(4)
        part.load_state_dict(first.state_dict())
        shares.append(take(part, 3))
    together = [list(itertools.chain(*batch)) for batch in zip(*shares, strict=True)]
    monkeypatch.undo()
    assert together == take(loader(4, start_iter=3), 3)


def test_another_number_of_images_is_refused():
    state = loader().state_dict()
    state["sampler"]["size"] = 8
    with pytest.raises(UserError, match=r"DATASETS.TRAIN has 7 images, .* it had 8"):
        loader().load_state_dict(state)


def test_a_sampler_without_a_state_is_entered_by_iteration():
    class Own:
        seed = 4

        def batch(self, iteration, rank=0, world_size=1):
            return [(iteration % 7, iteration)]

    first = TrainLoader(RECORDS, mapper, Own())
    take(first, 3)
    second = TrainLoader(RECORDS, mapper, Own())
    second.load_state_dict(first.state_dict())
    assert [s["image_id"] for s in take(second, 1)[0]] == [3]


@pytest.mark.parametrize("batch_sizes", [(2, 4), (6, 4), (4, 3)])
@pytest.mark.parametrize("repeated", [False, True])
def test_grouped_passes_are_whole_also_where_the_batch_changes(batch_sizes, repeated):
    size, rng = 23, np.random.default_rng(0)
    groups, first, second = rng.random(size), *batch_sizes

    def make(batch_size):
        if repeated:
            return RepeatFactorTrainingSampler(np.ones(size), batch_size, seed=1, groups=groups, window=2)
        return TrainingSampler(size, batch_size, seed=1, groups=groups, window=2)

    for changed_at in range(1, 9):
        before, after = make(first), make(second)
        after.load_state_dict(before.state_dict(), changed_at)
        stream = [i for it in range(changed_at) for i, _ in before.batch(it)]
        stream += [i for it in range(changed_at, 40) for i, _ in after.batch(it)]
        passes = [stream[i : i + size] for i in range(0, len(stream) - size, size)]
        assert all(sorted(p) == list(range(size)) for p in passes)
        # Batches that lie within a later pass are of like images again.
        spread = [np.ptp(groups[[i for i, _ in after.batch(it)]]) for it in range(20, 40)]
        assert np.mean(spread) < 0.6


def test_the_stream_is_entered_at_iteration_1_000_000_without_loading(monkeypatch):
    sampler = TrainingSampler(5000, 16, seed=4, groups=np.arange(5000) % 7, window=100)
    drawn, draw = [], TrainingSampler._draw
    monkeypatch.setattr(TrainingSampler, "_draw", lambda self, rng: drawn.append(1) or draw(self, rng))
    stream = TrainLoader(range(5000), lambda record, rng: record, sampler, start_iter=1_000_000)
    assert len(take(stream, 2)) == 2 and len(drawn) <= 2


# ---- images that cannot be read -------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_replaced_the_same_each_time_logged_once_and_counted(workers, log):
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


def test_what_is_logged_is_why_the_first_was_replaced_and_its_samples_can_be_made_again(log):
    # So many that a replacement often has to be replaced.
    UNREADABLE.update({0, 1, 2, 3, 4})
    stream = loader(skip_unreadable=True)
    batches = take(stream, 7)
    told = [line.split("image file ")[1][0] for line in log.text.splitlines() if "takes its place" in line]
    assert sorted(told) == list("01234") and "nor can" not in log.text
    assert [stream.samples(iteration) for iteration in range(7)] == batches


def test_without_that_it_ends_the_run():
    UNREADABLE.add(3)
    with pytest.raises(UserError, match="cannot read the image file 3.png"):
        take(loader(), 7)


def test_where_nothing_can_be_read_the_run_ends_too():
    UNREADABLE.update(range(7))
    stream = loader(skip_unreadable=True)
    name = stream.image_names(0)[0].split("(")[1].rstrip(")")
    with pytest.raises(UserError, match=rf"cannot read .* {name}; nor can 10 others in its place be read"):
        take(stream, 1)


def test_a_mistake_in_the_code_is_never_skipped():
    def broken(record, rng):
        raise KeyError("x")

    stream = TrainLoader(RECORDS, broken, TrainingSampler(7, 2), skip_unreadable=True)
    with pytest.raises(KeyError):
        take(stream, 1)


# ---- signals --------------------------------------------------------------------------------------


def _sleep_as_a_worker():
    _outlive_signals(0)
    time.sleep(30)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_outlives_a_signal_to_all_and_obeys_its_parent(number):
    worker = multiprocessing.get_context("fork").Process(target=_sleep_as_a_worker, daemon=True)
    worker.start()
    time.sleep(0.3)
    # As the system sends it to every process of a job: not from the training process.
    sender = multiprocessing.get_context("fork").Process(target=os.kill, args=(worker.pid, number))
    sender.start()
    sender.join()
    time.sleep(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
