"""Datasets for your own `DataLoader`, under the names of Detectron2."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from plaintrain.data.serialized import SerializedRecords as DatasetFromList  # noqa: F401


@dataclass(eq=False)
class ToIterableDataset(IterableDataset):
    """The samples at a sampler's indices, of which each worker process loads an equal share."""

    dataset: Sequence[Any]
    sampler: Iterable[int]

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        shard = (worker.id, None, worker.num_workers) if worker else (0, None)
        return map(self.dataset.__getitem__, itertools.islice(self.sampler, *shard))
