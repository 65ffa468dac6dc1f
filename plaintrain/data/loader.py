"""Data loaders: records, mapped to samples in worker processes, in an order that never varies."""

import contextlib
import inspect
import itertools
import random
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from plaintrain.data.augmentations import build_augmentation
from plaintrain.data.catalog import DatasetCatalog
from plaintrain.data.mapper import DatasetMapper
from plaintrain.data.records import check_image_files, get_detection_dataset_dicts
from plaintrain.data.samplers import InferenceSampler
from plaintrain.data.serialized import SerializedRecords
from plaintrain.data.train_sampler import build_train_sampler
from plaintrain.data.tta import build_tta_mapper
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


class _MappedRecords(Dataset):
    """Samples by (index, position); a mistake in the data comes back as a value.

    A `UserError` raised in a worker process would reach the user wrapped in the worker's
    traceback, so it is handed over and raised in the training process.
    """

    def __init__(self, records, mapper, seed):
        self._records, self._mapper, self._seed = records, mapper, seed
        self._takes_rng = _takes_generator(mapper)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, key):
        index, position = key
        try:
            if self._takes_rng:
                return self._mapper(self._records[index], np.random.default_rng((self._seed, position)))
            with _seeded_globals(self._seed, position):
                return self._mapper(self._records[index])
        except UserError as e:
            return e


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


def _ignore_interrupt(worker_id):
    # Ctrl-C reaches the whole process group; the training process decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make_loader(dataset, batches, num_workers):
    if num_workers < 0:
        raise UserError(f"DATALOADER.NUM_WORKERS is {num_workers}, but must be at least 0")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupt,
        # Its own generator: drawing the workers' base seed must not move the training's.
        generator=torch.Generator(),
    )


class _Loader:
    """Iterates over lists of samples, raising the mistakes that workers found."""

    def __init__(self, dataset, batches, num_workers):
        self._loader = _make_loader(dataset, batches, num_workers)

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        for samples in self._loader:
            for sample in samples:
                if isinstance(sample, UserError):
                    raise sample
            yield samples


class TrainLoader(_Loader):
    """The endless training loader of one rank; each item is its `list[sample]` of an iteration."""

    def __init__(self, records, mapper, sampler, *, start_iter=0, num_workers=0):
        """
        Args:
            records: sequence of records.
            mapper: `(record, generator) -> sample`, or `(record) -> sample`.
            sampler: a `TrainingSampler`, whose batches are split over the ranks; its `seed` also
                seeds every sample's generator.
            start_iter: iteration to begin with; nothing before it is loaded.
            num_workers: worker processes; 0 loads in this process.
        """
        self._records, self._sampler = records, sampler
        rank, world_size = comm.get_rank(), comm.get_world_size()
        batches = _Batches(sampler, start_iter, rank, world_size)
        super().__init__(_MappedRecords(records, mapper, sampler.seed), batches, num_workers)

    @property
    def iters_per_epoch(self):
        """Iterations of a pass over the images: the last one may take in the first images of the next."""
        return -(-self._sampler.size // self._sampler.batch_size)

    def file_names(self, iteration):
        """The images that all ranks together see in an iteration."""
        return [self._records[i]["file_name"] for i, _ in self._sampler.batch(iteration)]

    def __len__(self):
        raise TypeError("the training loader is endless; SOLVER.MAX_ITER ends the run")


class _Batches:
    """[(image, position)] per iteration, from an iteration on, without end."""

    def __init__(self, sampler, start_iter, rank, world_size):
        self._batch = lambda iteration: sampler.batch(iteration, rank, world_size)
        self._start_iter = start_iter

    def __iter__(self):
        return map(self._batch, itertools.count(self._start_iter))


def check_batch_size(cfg):
    """SOLVER.IMS_PER_BATCH, or a `UserError` if processes or ACCUMULATE_STEPS cannot share it."""
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which cannot be split evenly over "
            f"{world_size} processes"
        )
    parts = cfg.SOLVER.ACCUMULATE_STEPS
    if not 1 <= parts <= cfg.SOLVER.IMS_PER_BATCH // world_size:
        raise UserError(
            f"SOLVER.ACCUMULATE_STEPS is {parts}, but must be from 1 to the images of a process in a batch, "
            f"{cfg.SOLVER.IMS_PER_BATCH // world_size}"
        )
    return cfg.SOLVER.IMS_PER_BATCH


def build_detection_train_loader(cfg, *, mapper=None, dataset=None, sampler=None, start_iter=0):
    """The training loader that DATASETS.TRAIN, DATALOADER.*, INPUT.* and SOLVER.* describe.

    Args:
        cfg: the config, after `default_setup`.
        mapper: `(record, generator) -> sample`, default `DatasetMapper`. A mapper of one
            argument finds the global generators seeded for its sample.
        dataset: sequence of records, default those of DATASETS.TRAIN.
        sampler: default `build_train_sampler`; any object with the `seed` and `batch` of a
            `TrainingSampler`.
        start_iter: iteration to begin with.

    Returns:
        An endless `TrainLoader`.

    Raises:
        UserError: an unusable dataset, or a batch that the ranks cannot share evenly.
    """
    batch_size = check_batch_size(cfg)
    if dataset is None:
        dataset = training_records(cfg)
        check_image_files(dataset, ", ".join(cfg.DATASETS.TRAIN))
    records = _serialized(dataset)
    sampler = sampler or build_train_sampler(cfg, records, batch_size)
    mapper = mapper or DatasetMapper(cfg, is_train=True, records=records)
    return TrainLoader(
        records, mapper, sampler, start_iter=start_iter, num_workers=cfg.DATALOADER.NUM_WORKERS
    )


def training_records(cfg):
    """The records of DATASETS.TRAIN that are trained on, a `SerializedRecords`."""
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
        need_masks=cfg.MODEL.MASK_ON,
    )


def count_iters_per_epoch(cfg):
    """The `iters_per_epoch` of the loader that `build_detection_train_loader(cfg)` builds.

    Raises:
        UserError: see there; images are not looked for.
    """
    records = _serialized(training_records(cfg))
    sampler = build_train_sampler(cfg, records, check_batch_size(cfg))
    return -(-sampler.size // sampler.batch_size)


def _serialized(records):
    return records if isinstance(records, SerializedRecords) else SerializedRecords(records)


def build_detection_test_loader(cfg, dataset_name, *, mapper=None, dataset=None, sampler=None):
    """This rank's share of a dataset, each image once over all ranks, in batches.

    Args:
        cfg: the config: TEST.IMS_PER_BATCH, TEST.AUG, DATALOADER.NUM_WORKERS, INPUT.*.
        dataset_name: name of a registered dataset.
        mapper: default `DatasetMapper(cfg, is_train=False)`, or with TEST.AUG.ENABLED `TTAMapper`.
        dataset: sequence of records, default those of `dataset_name`.
        sampler: indices of this rank, default `InferenceSampler`.

    Returns:
        An iterable of `list[sample]`, with a length.
    """
    records = DatasetCatalog.get(dataset_name) if dataset is None else _serialized(dataset)
    if dataset is None:
        check_image_files(records, dataset_name)
    if sampler is None:
        sampler = InferenceSampler(len(records), comm.get_rank(), comm.get_world_size())
    if mapper is None:
        tta = cfg.TEST.AUG.ENABLED
        mapper = build_tta_mapper(cfg, dataset_name) if tta else DatasetMapper(cfg, is_train=False)
    keys = [(index, index) for index in sampler]
    size = cfg.TEST.IMS_PER_BATCH
    if size < 1:
        raise UserError(f"TEST.IMS_PER_BATCH is {size}, but must be at least 1")
    batches = [keys[i : i + size] for i in range(0, len(keys), size)]
    return _Loader(_MappedRecords(records, mapper, seed=0), batches, cfg.DATALOADER.NUM_WORKERS)


def build_detection_val_loader(cfg, dataset_name):
    """The batches of `build_detection_test_loader` with targets, for losses: resized as in evaluation."""
    augmentations = build_augmentation(cfg, is_train=False)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)
