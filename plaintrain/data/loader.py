"""Load samples of records in worker processes, threads or neither, in a reproducible order."""

import contextlib
import functools
import inspect
import itertools
import logging
import multiprocessing
import os
import random
import signal
import threading
from collections import deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from plaintrain.data.samplers import TrainingSampler
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.heartbeat import LONG, beat, end_loop
from plaintrain.utils.logger import build_progress_bar, ignore_console_errors
from plaintrain.utils.memory import note_batch
from plaintrain.utils.user_code import IMPORTED, import_user_code

logger = logging.getLogger(__name__)

_MAX_TRIES = 10
# Minimum number of batches that threads prefetch.
_PREFETCH = 3
_THREAD_NAME = "load-samples"
# `reason` is the error of the sample that was replaced.
_Replacement = namedtuple("_Replacement", "sample reason")


class Threads(int):
    """A number of threads as workers; a plain int is a number of processes."""


@dataclass(eq=False)
class MappedRecords(Dataset):
    """Samples by (index, position in the stream).

    A `UserError` is returned, so that the training process raises it without the traceback of a worker.
    """

    records: Sequence[dict[str, Any]]
    mapper: Callable[..., dict[str, Any]]
    seed: int
    skip_unreadable: bool = False

    def __post_init__(self):
        # A mapper takes (record, generator), or only a record as in Detectron2.
        self.takes_rng = False
        with contextlib.suppress(TypeError, ValueError):
            inspect.signature(self.mapper).bind(None, None)
            self.takes_rng = True

    def __getitem__(self, key):
        index, position = key
        try:
            return self._map(index, position)
        except UserError as e:
            # A wrong INPUT.PIXEL_RANGE is a mistake in the config, not a broken file.
            skip = self.skip_unreadable and getattr(e, "error_type", None) != "pixel_range"
            return self._replace(position, e) if skip else e

    def _map(self, index, position):
        if self.takes_rng:
            return self.mapper(self.records[index], np.random.default_rng((self.seed, position)))
        with seeded_globals(self.seed, position):
            return self.mapper(self.records[index])

    def _replace(self, position, error):
        """Draw a replacement for an unreadable image, always the same for a position."""
        rng = np.random.default_rng((self.seed, position, 0))
        for index in rng.integers(len(self.records), size=_MAX_TRIES):
            with contextlib.suppress(UserError):
                return _Replacement(self._map(int(index), position), str(error))
        return UserError(f"{error}; {_MAX_TRIES} randomly drawn replacements cannot be read either")


@contextlib.contextmanager
def seeded_globals(seed: int, position: int) -> Iterator[None]:
    """Seed the global generators by (seed, position) within the block."""
    seeds = np.random.SeedSequence((seed, position)).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _prepare_worker(imports, worker_id):
    """Import the user's code; ignore signals to the whole job: the training process handles them."""
    import_user_code(imports)
    ignore_console_errors()
    for signal_number in signal.SIGHUP, signal.SIGINT, signal.SIGUSR1:
        signal.signal(signal_number, signal.SIG_IGN)
    # macOS does not tell who sent a signal; there SIGTERM ends a worker.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    # multiprocessing ends a worker by a SIGTERM from the training process.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


def load_in_threads(dataset: Any, batches: Iterable[Sequence], num_threads: int) -> Iterator[list]:
    """Yield lists of samples that threads load, in order; the threads end with the iterator."""
    # The first call reads the number of cores: it must precede `set_num_threads` in the workers.
    torch.get_num_threads()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def init_thread():
        # A worker process also uses one thread.
        torch.set_num_threads(1)
        if device is not None:
            torch.cuda.set_device(device)

    def load(key):
        return dataset[key] if device is None else pin_memory(dataset[key])

    pool = ThreadPoolExecutor(num_threads, _THREAD_NAME, initializer=init_thread)
    waiting: deque[list] = deque()
    try:
        for keys in batches:
            waiting.append([pool.submit(load, key) for key in keys])
            # Small batches need more prefetching to keep all threads busy.
            if len(waiting) > _PREFETCH and len(waiting) * max(len(keys), 1) > 2 * num_threads:
                yield [sample.result() for sample in waiting.popleft()]
        while waiting:
            yield [sample.result() for sample in waiting.popleft()]
    finally:
        # The garbage collector may run this in a thread of the pool, which cannot join itself.
        in_pool = threading.current_thread().name.startswith(_THREAD_NAME)
        pool.shutdown(wait=not in_pool, cancel_futures=True)


class Loader:
    """An iterable of lists of samples; it raises the errors of workers."""

    training = False

    def __init__(self, dataset: MappedRecords, batches: Any, num_workers: int) -> None:
        self._dataset = dataset
        self.batches = batches
        self._num_workers = num_workers
        self._in_threads = isinstance(num_workers, Threads) and num_workers > 0
        if self._in_threads and not (dataset.takes_rng and getattr(dataset.mapper, "thread_safe", True)):
            expected = "a mapper of (record, generator) without augmentations of Detectron2's type"
            raise UserError(f"DATALOADER.WORKER_TYPE thread needs {expected}; they use global generators")

    def __len__(self):
        return len(self.batches)

    def _load(self):
        if self._in_threads:
            return load_in_threads(self._dataset, self.batches, self._num_workers)
        if self._num_workers:
            # Workers share this folder; those that are killed would leave their own.
            multiprocessing.util.get_temp_dir()
        return DataLoader(
            self._dataset,
            batch_sampler=self.batches,
            num_workers=self._num_workers,
            collate_fn=list,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=functools.partial(_prepare_worker, IMPORTED),
            # Drawing the base seed of the workers must not advance the global generator.
            generator=torch.Generator(),
        )

    def __iter__(self):
        # The first step may compile the model.
        extra = LONG
        beat()
        try:
            # The iterator has no name, so that its threads end with the loop, also after an exception.
            for samples in self._load():
                for sample in samples:
                    if isinstance(sample, UserError):
                        raise sample
                beat(extra)
                extra = 0.0
                note_batch(samples, self.training)
                yield samples
                beat()
        finally:
            end_loop()


class TrainLoader(Loader):
    """The infinite training loader of one rank; yields the `list[sample]` of each iteration."""

    training = True

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[..., dict[str, Any]],
        sampler: TrainingSampler,
        *,
        start_iter: int = 0,
        num_workers: int = 0,
        skip_unreadable: bool = False,
    ) -> None:
        """See `build_detection_train_loader`; `skip_unreadable` replaces images that cannot be read."""
        self._records = records
        self._sampler = sampler
        self._iteration = start_iter
        self.num_replaced = 0
        self._reasons: set[str] = set()
        super().__init__(MappedRecords(records, mapper, sampler.seed, skip_unreadable), (), num_workers)

    def _get_batch(self, iteration):
        return self._sampler.get_batch(iteration, comm.get_rank(), comm.get_world_size())

    def __iter__(self):
        self.batches = map(self._get_batch, itertools.count(self._iteration))
        for samples in super().__iter__():
            self._iteration += 1
            yield [self._unwrap(sample) for sample in samples]

    def _unwrap(self, sample):
        """Return the sample; count a replacement, and log it the first time."""
        if not isinstance(sample, _Replacement):
            return sample
        self.num_replaced += 1
        if sample.reason not in self._reasons:
            self._reasons.add(sample.reason)
            logger.warning(f"{sample.reason}; another image replaces it, {self.num_replaced} so far")
        return sample.sample

    def iterations(self, start_iter: int, end_iter: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield (iteration, samples), with a progress bar on a terminal."""
        self._iteration = start_iter
        stream = iter(self)
        iterations = range(start_iter, end_iter)
        for iteration in build_progress_bar(iterations, desc="training", initial=start_iter, total=end_iter):
            yield iteration, next(stream)

    def epochs(self, start_iter: int, end_iter: int) -> Iterator[tuple[int, Iterator]]:
        """Yield (epoch, iterator over the rest of its `iterations`, to exhaust before the next epoch)."""
        stream = self.iterations(start_iter, end_iter)
        length = self.iters_per_epoch
        for epoch in range(start_iter // length, -(-end_iter // length)):
            first = max(epoch * length, start_iter)
            yield epoch, itertools.islice(stream, min((epoch + 1) * length, end_iter) - first)

    @property
    def iters_per_epoch(self) -> int:
        """Return the iterations of an epoch; the last batch may contain images of the next epoch."""
        return -(-self._sampler.size // self._sampler.batch_size)

    def get_image_names(self, iteration: int) -> list[str]:
        """Return `ID (FILE)` of the images of all ranks in an iteration."""
        records = [self._records[i] for i, _ in self._sampler.get_batch(iteration)]
        return [f"{record.get('image_id')} ({record['file_name']})" for record in records]

    def load_samples(self, iteration: int) -> list[dict[str, Any]]:
        """Return this rank's samples of an iteration, loaded again."""
        samples = [self._dataset[key] for key in self._get_batch(iteration)]
        return [s.sample if isinstance(s, _Replacement) else s for s in samples]

    def state_dict(self) -> dict[str, Any]:
        sampler = self._sampler.state_dict() if hasattr(self._sampler, "state_dict") else {}
        return {"iteration": self._iteration, "num_replaced": self.num_replaced, "sampler": sampler}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._iteration = state_dict["iteration"]
        self.num_replaced = state_dict["num_replaced"]
        if state_dict["sampler"] and hasattr(self._sampler, "load_state_dict"):
            self._sampler.load_state_dict(state_dict["sampler"], self._iteration)

    def __len__(self):
        raise TypeError("the training loader is infinite; SOLVER.MAX_ITER ends the run")
