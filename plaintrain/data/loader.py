"""What makes samples of records, in worker processes, threads or neither, in an order that never varies."""

import contextlib
import inspect
import itertools
import logging
import multiprocessing
import os
import random
import signal
import threading
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.heartbeat import LONG, beat
from plaintrain.utils.logger import build_progress_bar, ignore_console_errors
from plaintrain.utils.memory import note_batch

logger = logging.getLogger(__name__)

# A sample in the place of another, and why that one cannot be used.
_Replacement = namedtuple("_Replacement", "sample reason")
_MAX_TRIES = 10
# Batches that threads make ahead, at least.
_AHEAD = 3
_THREAD_NAME = "load-samples"


class Threads(int):
    """A number of workers that are threads of this process, where an int means processes."""


class MappedRecords(Dataset):
    """Samples by (index, position); a mistake in the data comes back as a value.

    A `UserError` raised in a worker process would reach the user wrapped in the worker's
    traceback, so it is handed over and raised in the training process.
    """

    def __init__(self, records, mapper, seed, skip=False):
        self._records, self._mapper, self._seed, self._skip = records, mapper, seed, skip
        self.takes_rng = _takes_generator(mapper)

    def __getitem__(self, key):
        index, position = key
        try:
            return self._sample(index, position)
        except UserError as e:
            # A wrong INPUT.PIXEL_RANGE is no broken file.
            skips = self._skip and getattr(e, "error_type", None) != "pixel_range"
            return self._another(position, e) if skips else e

    def _sample(self, index, position):
        if self.takes_rng:
            return self._mapper(self._records[index], np.random.default_rng((self._seed, position)))
        with _seeded_globals(self._seed, position):
            return self._mapper(self._records[index])

    def _another(self, position, error):
        """A sample in place of one that cannot be read, the same whenever the position comes up."""
        rng = np.random.default_rng((self._seed, position, 0))
        for index in rng.integers(len(self._records), size=_MAX_TRIES):
            with contextlib.suppress(UserError):
                return _Replacement(self._sample(int(index), position), str(error))
        return UserError(f"{error}; nor can {_MAX_TRIES} others in its place be read")


def _takes_generator(mapper):
    """Whether a mapper takes (record, generator), and not only a record as Detectron2's do."""
    try:
        inspect.signature(mapper).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _seeded_globals(seed, position):
    """Global generators seeded by (seed, position) within the block, and as before after it."""
    words = np.random.SeedSequence((seed, position)).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _outlive_signals(worker_id):
    """Leave it to the training process what a signal to all processes of the job means.

    A worker that died of it would take the checkpoint with it that is about to be saved.
    """
    ignore_console_errors()
    for number in signal.SIGHUP, signal.SIGINT, signal.SIGUSR1:
        signal.signal(number, signal.SIG_IGN)
    # macOS cannot tell who sent a signal; there a worker dies of it.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent():
    # What multiprocessing sends a worker that is no longer needed comes from the training process.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


def load_in_threads(dataset, batches, num_threads):
    """Yield lists of samples that threads make, in order; the threads end with the iterator."""
    # A thread's first computation asks how many cores to use: this one's comes before the workers set it.
    torch.get_num_threads()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def begin():
        # As in a worker process: the cores are shared by the threads, not taken by each.
        torch.set_num_threads(1)
        if device is not None:
            torch.cuda.set_device(device)

    def make(key):
        return dataset[key] if device is None else pin_memory(dataset[key])

    pool = ThreadPoolExecutor(num_threads, _THREAD_NAME, initializer=begin)
    waiting = deque()
    try:
        for keys in batches:
            waiting.append([pool.submit(make, key) for key in keys])
            # Small batches: more of them, or threads would wait.
            if len(waiting) > _AHEAD and len(waiting) * max(len(keys), 1) > 2 * num_threads:
                yield [sample.result() for sample in waiting.popleft()]
        while waiting:
            yield [sample.result() for sample in waiting.popleft()]
    finally:
        # Garbage may be collected in one of these threads, which cannot wait for itself.
        in_pool = threading.current_thread().name.startswith(_THREAD_NAME)
        pool.shutdown(wait=not in_pool, cancel_futures=True)


class Loader:
    """Iterates over lists of samples, raising the mistakes that workers found."""

    training = False

    def __init__(self, dataset, batches, num_workers):
        """num_workers: worker processes, or `Threads`; 0 loads as batches are asked for."""
        self._dataset, self.batches, self._num_workers = dataset, batches, num_workers
        self._in_threads = isinstance(num_workers, Threads) and num_workers > 0
        if self._in_threads and not dataset.takes_rng:
            raise UserError(
                "DATALOADER.WORKER_TYPE is thread, but the mapper takes a record alone, so it draws from the "
                "global generators, which threads share: let it take (record, generator), or use processes"
            )

    def __len__(self):
        return len(self.batches)

    def _load(self):
        if self._in_threads:
            return load_in_threads(self._dataset, self.batches, self._num_workers)
        return DataLoader(
            self._dataset,
            batch_sampler=self.batches,
            num_workers=self._num_workers,
            collate_fn=list,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_outlive_signals,
            # Its own generator: drawing the workers' base seed must not move the training's.
            generator=torch.Generator(),
        )

    def __iter__(self):
        extra = LONG
        # No name holds the stream: its threads end with the loop, whatever is raised.
        for samples in self._load():
            for sample in samples:
                if isinstance(sample, UserError):
                    raise sample
            # The first step may compile the model.
            beat(extra)
            extra = 0.0
            note_batch(samples, self.training)
            yield samples


class TrainLoader(Loader):
    """The endless training loader of one rank; each item is its `list[sample]` of an iteration.

    Attributes:
        num_replaced: samples so far whose image could not be read, with `skip_unreadable`.
    """

    training = True

    def __init__(self, records, mapper, sampler, *, start_iter=0, num_workers=0, skip_unreadable=False):
        """
        Args:
            records: sequence of records.
            mapper: `(record, generator) -> sample`, or `(record) -> sample`.
            sampler: a `TrainingSampler`, whose batches are split over the ranks; its `seed` also
                seeds every sample's generator.
            start_iter: iteration to begin with; nothing before it is loaded.
            num_workers: see `Loader`.
            skip_unreadable: put another image, drawn from the seed and the position, where one cannot
                be read, and log it, instead of raising a `UserError`.
        """
        self._records, self._sampler, self._iteration = records, sampler, start_iter
        self.num_replaced, self._replaced = 0, set()
        super().__init__(MappedRecords(records, mapper, sampler.seed, skip_unreadable), (), num_workers)

    def _batch(self, iteration):
        """[(image, position)] of this rank in an iteration."""
        return self._sampler.batch(iteration, comm.get_rank(), comm.get_world_size())

    def __iter__(self):
        self.batches = map(self._batch, itertools.count(self._iteration))
        for samples in super().__iter__():
            self._iteration += 1
            yield [self._unwrap(sample) for sample in samples]

    def _unwrap(self, sample):
        """The sample itself; one that replaces another is counted, and the first time logged."""
        if not isinstance(sample, _Replacement):
            return sample
        self.num_replaced += 1
        if sample.reason not in self._replaced:
            self._replaced.add(sample.reason)
            logger.warning(f"{sample.reason}; another image takes its place, {self.num_replaced} so far")
        return sample.sample

    def iterations(self, start_iter, end_iter):
        """Yield (iteration, samples), with a progress bar on a terminal; nothing before is loaded."""
        self._iteration = start_iter
        stream = iter(self)
        iterations = range(start_iter, end_iter)
        for iteration in build_progress_bar(iterations, desc="training", initial=start_iter, total=end_iter):
            yield iteration, next(stream)

    def epochs(self, start_iter, end_iter):
        """Yield (epoch, iterator over its `iterations`), beginning with what is left of the first epoch.

        The workers are those of one stream, so an iterator is used up before the next one is asked for.
        """
        stream = self.iterations(start_iter, end_iter)
        length = self.iters_per_epoch
        for epoch in range(start_iter // length, -(-end_iter // length)):
            first = max(epoch * length, start_iter)
            yield epoch, itertools.islice(stream, min((epoch + 1) * length, end_iter) - first)

    @property
    def iters_per_epoch(self):
        """Iterations of a pass over the images: the last one may take in the first images of the next."""
        return -(-self._sampler.size // self._sampler.batch_size)

    def image_names(self, iteration):
        """`ID (FILE)` of the images that all ranks together see in an iteration."""
        records = [self._records[i] for i, _ in self._sampler.batch(iteration)]
        return [f"{record.get('image_id')} ({record['file_name']})" for record in records]

    def samples(self, iteration):
        """This rank's samples of an iteration, made once more."""
        samples = [self._dataset[key] for key in self._batch(iteration)]
        return [s.sample if isinstance(s, _Replacement) else s for s in samples]

    def state_dict(self):
        """The iteration that comes next, and the state of the sampler, if it has one."""
        sampler = self._sampler.state_dict() if hasattr(self._sampler, "state_dict") else {}
        return {"iteration": self._iteration, "num_replaced": self.num_replaced, "sampler": sampler}

    def load_state_dict(self, state_dict):
        """Go on where another run stopped; nothing before is loaded."""
        self._iteration, self.num_replaced = state_dict["iteration"], state_dict["num_replaced"]
        if state_dict["sampler"] and hasattr(self._sampler, "load_state_dict"):
            self._sampler.load_state_dict(state_dict["sampler"], self._iteration)

    def __len__(self):
        raise TypeError("the training loader is endless; SOLVER.MAX_ITER ends the run")
