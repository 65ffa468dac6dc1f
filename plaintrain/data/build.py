"""The data loaders that a config describes."""

import copy
import functools

from plaintrain.data.catalog import DatasetCatalog
from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.images import ImageCache
from plaintrain.data.loader import Loader, MappedRecords, Threads, TrainLoader
from plaintrain.data.records import check_image_files, get_detection_dataset_dicts
from plaintrain.data.samplers import InferenceSampler, build_train_sampler
from plaintrain.data.serialized import SerializedRecords
from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.transforms.geometric import get_shortest_edge_size
from plaintrain.data.tta import build_tta_mapper
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

# Detectors pad the sides of a batch to multiples of this.
_PADDED_TO = 32


def check_batch_size(cfg):
    """SOLVER.IMS_PER_BATCH, or a `UserError` if processes or ACCUMULATE_STEPS cannot share it."""
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world_size:
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
            argument finds the global generators seeded for its sample, except in threads. One whose
            `thread_safe` is true is called by several threads at a time.
        dataset: sequence of records, default those of DATASETS.TRAIN.
        sampler: default `build_train_sampler`; any object with the `seed` and `batch` of a
            `TrainingSampler`.
        start_iter: iteration to begin with.

    Returns:
        An endless `TrainLoader`.
    """
    batch_size = check_batch_size(cfg)
    skip = cfg.DATALOADER.SKIP_UNREADABLE
    if dataset is None:
        dataset = get_training_records(cfg)
        if not skip:
            check_image_files(dataset, ", ".join(cfg.DATASETS.TRAIN))
    records = _serialized(dataset)
    sampler = sampler or build_train_sampler(cfg, records, batch_size)
    mapper = mapper or DatasetMapper(cfg, is_train=True, records=records)
    workers = _workers(cfg, mapper)
    mapper = _with_cache(cfg.DATALOADER.CACHE_BYTES, mapper, workers)
    return TrainLoader(
        records, mapper, sampler, start_iter=start_iter, num_workers=workers, skip_unreadable=skip
    )


def _workers(cfg, mapper):
    """DATALOADER.NUM_WORKERS, as `Threads` where WORKER_TYPE or the mapper says so."""
    num_workers, worker_type = cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.WORKER_TYPE
    in_threads = worker_type == "thread" or (worker_type == "auto" and getattr(mapper, "thread_safe", False))
    return Threads(num_workers) if in_threads else num_workers


def _with_cache(limit, mapper, workers):
    """The mapper, reading through an `ImageCache` of DATALOADER.CACHE_BYTES."""
    if limit == 0:
        return mapper
    what = f"DATALOADER.CACHE_BYTES is {limit}, but"
    if workers and not isinstance(workers, Threads):
        raise UserError(
            f"{what} processes do not share decoded images: set DATALOADER.WORKER_TYPE to thread, or "
            "DATALOADER.NUM_WORKERS to 0"
        )
    if not hasattr(mapper, "image_cache"):
        raise UserError(f"{what} the mapper has no image_cache, as DatasetMapper has, to read through")
    mapper = copy.copy(mapper)
    mapper.image_cache = ImageCache(limit)
    return mapper


def get_training_records(cfg):
    """The records of DATASETS.TRAIN that are trained on, a `SerializedRecords`."""
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
        need_masks=cfg.MODEL.MASK_ON,
    )


def count_iters_per_epoch(cfg):
    """The `iters_per_epoch` of the loader that `build_detection_train_loader(cfg)` builds."""
    records = _serialized(get_training_records(cfg))
    sampler = build_train_sampler(cfg, records, check_batch_size(cfg))
    return -(-sampler.size // sampler.batch_size)


def _serialized(records):
    return records if isinstance(records, SerializedRecords) else SerializedRecords(records)


def build_detection_test_loader(cfg, dataset_name, *, mapper=None, dataset=None, sampler=None):
    """This rank's share of a dataset, each image once over all ranks, in batches.

    Unless a sampler gives the order, all images of a batch have one shape once they are resized and
    padded: none is padded more than on its own, and what is found in it does not depend on the others.

    Args:
        cfg: the config: TEST.IMS_PER_BATCH, TEST.AUG, DATALOADER.NUM_WORKERS, WORKER_TYPE, INPUT.*.
        dataset_name: name of a registered dataset.
        mapper: default `DatasetMapper(cfg, is_train=False)`, or with TEST.AUG.ENABLED `TTAMapper`.
        dataset: sequence of records, default those of `dataset_name`.
        sampler: indices of this rank, default those of `InferenceSampler`.

    Returns:
        An iterable of `list[sample]`, with a length.
    """
    records = DatasetCatalog.get(dataset_name) if dataset is None else _serialized(dataset)
    if dataset is None:
        check_image_files(records, dataset_name)
    batch_size, tta = cfg.TEST.IMS_PER_BATCH, mapper is None and cfg.TEST.AUG.ENABLED
    if mapper is None:
        mapper = build_tta_mapper(cfg, dataset_name) if tta else DatasetMapper(cfg, is_train=False)
    if sampler is None:
        images = list(InferenceSampler(len(records), comm.get_rank(), comm.get_world_size()))
        groups = _groups_of_one_shape(cfg, records, images, tta) if batch_size > 1 else [images]
    else:
        groups = [list(sampler)]
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    keys = [[(index, index) for index in batch] for batch in batches]
    return Loader(MappedRecords(records, mapper, seed=0), keys, _workers(cfg, mapper))


def _groups_of_one_shape(cfg, records, images, tta):
    """Return lists of the images that a model pads to one shape, those with the most pixels first."""
    if tuple(cfg.INPUT.FIXED_SIZE) != (0, 0) or records.columns is None:
        # All are the same, or nobody knows.
        return [images]
    aug = cfg.TEST.AUG
    short_edges = aug.MIN_SIZES if tta else (cfg.INPUT.MIN_SIZE_TEST,)
    max_size = aug.MAX_SIZE if tta else cfg.INPUT.MAX_SIZE_TEST

    @functools.cache
    def padded(*size):
        resized = [get_shortest_edge_size(*size, edge, max_size) if edge else size for edge in short_edges]
        return tuple(tuple(-(-side // _PADDED_TO) * _PADDED_TO for side in shape) for shape in resized)

    groups = {}
    for image in images:
        # What is no size of an image is told of when it is read.
        height, width = (max(1, int(records.columns[key][image])) for key in ("height", "width"))
        groups.setdefault(padded(height, width), []).append(image)
    return [groups[shapes] for shapes in sorted(groups, key=lambda shapes: -sum(h * w for h, w in shapes))]


def build_detection_val_loader(cfg, dataset_name):
    """The batches of `build_detection_test_loader` with targets, for losses: resized as in evaluation."""
    augmentations = build_augmentation(cfg, is_train=False)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)
