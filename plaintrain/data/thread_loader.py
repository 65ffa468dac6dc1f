"""Batches made by threads of this process, which need not be sent from one process to another."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import current_thread

import torch
from torch.utils.data._utils.pin_memory import pin_memory

# Batches that are made ahead, at least.
_AHEAD = 3
_NAME = "load-samples"


@dataclass(frozen=True)
class Threads:
    """So many threads as workers, where a number alone means processes."""

    number: int


class ThreadLoader:
    """Iterates over lists of samples, made by threads, in order.

    Each iteration has threads of its own, which end with it, however it ends. What a sample raises is
    raised when its batch is due.
    """

    def __init__(self, dataset, batches, num_threads, pin_memory=False):
        """
        Args:
            dataset: key -> sample, called by several threads at a time.
            batches: iterable of lists of keys.
            num_threads: at least 1.
            pin_memory: put tensors where a GPU fetches them while the CPU goes on.
        """
        self._dataset, self._batches = dataset, batches
        self._num_threads, self._pin_memory = num_threads, pin_memory

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        # A thread's first computation asks how many cores to use: this one's comes before the workers set it.
        torch.get_num_threads()
        device = torch.cuda.current_device() if self._pin_memory else None
        pool = ThreadPoolExecutor(self._num_threads, _NAME, initializer=_begin, initargs=(device,))
        waiting = deque()
        try:
            for keys in self._batches:
                waiting.append([pool.submit(self._make, key) for key in keys])
                # Small batches: more of them, or threads would wait.
                if len(waiting) > _AHEAD and len(waiting) * max(len(keys), 1) > 2 * self._num_threads:
                    yield [sample.result() for sample in waiting.popleft()]
            while waiting:
                yield [sample.result() for sample in waiting.popleft()]
        finally:
            # Garbage may be collected in one of these threads, which cannot wait for itself.
            pool.shutdown(wait=not current_thread().name.startswith(_NAME), cancel_futures=True)

    def _make(self, key):
        sample = self._dataset[key]
        return pin_memory(sample) if self._pin_memory else sample


def _begin(device):
    # As in a worker process: the cores are shared by the threads, not taken by each.
    torch.set_num_threads(1)
    if device is not None:
        torch.cuda.set_device(device)
