"""Build data loaders from a config."""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from plaintrain.config import CfgNode
from plaintrain.data.catalog import DatasetCatalog
from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.images import ImageCache
from plaintrain.data.loader import Loader, MappedRecords, Threads, TrainLoader
from plaintrain.data.records import check_image_files, get_detection_dataset_dicts
from plaintrain.data.samplers import InferenceSampler, TrainingSampler, build_train_sampler
from plaintrain.data.serialized import SerializedRecords, serialize
from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.transforms.geometric import get_shortest_edge_size
from plaintrain.data.tta import build_tta_mapper
from plaintrain.utils import comm
from plaintrain.utils.env import seed_all_rng
from plaintrain.utils.errors import UserError

# Detectors pad the height and width of a batch to multiples of this.
_STRIDE = 32


def check_batch_size(cfg: CfgNode) -> int:
    """Return SOLVER.IMS_PER_BATCH after checking that processes and ACCUMULATE_STEPS can split it."""
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    steps = cfg.SOLVER.ACCUMULATE_STEPS
    world_size = comm.get_world_size()
    if batch_size % world_size:
        raise UserError(f"SOLVER.IMS_PER_BATCH must be divisible by {world_size} processes, got {batch_size}")
    per_rank = batch_size // world_size
    if not 1 <= steps <= per_rank:
        raise UserError(f"SOLVER.ACCUMULATE_STEPS must be 1 to {per_rank} (images per process), got {steps}")
    return batch_size


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed the global generators of a worker process of your own `DataLoader`."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)


def build_detection_train_loader(
    cfg: CfgNode,
    *,
    mapper: Callable[..., dict[str, Any]] | None = None,
    dataset: Sequence[dict[str, Any]] | None = None,
    sampler: TrainingSampler | None = None,
    start_iter: int = 0,
) -> TrainLoader:
    """Build the infinite training loader of DATASETS.TRAIN, DATALOADER.*, INPUT.* and SOLVER.*.

    Args:
        mapper: `(record, generator) -> sample`, default `DatasetMapper`. `(record) -> sample` works without
            threads: the global generators are seeded for each sample. `thread_safe = True` allows threads.
        sampler: default `build_train_sampler`; only `seed` and `get_batch` of a `TrainingSampler` are needed.
    """
    batch_size = check_batch_size(cfg)
    skip = cfg.DATALOADER.SKIP_UNREADABLE
    if dataset is None:
        dataset = get_training_records(cfg)
        if not skip:
            check_image_files(dataset, ", ".join(cfg.DATASETS.TRAIN))
    records = serialize(dataset)
    sampler = sampler or build_train_sampler(cfg, records, batch_size)
    mapper = mapper or DatasetMapper(cfg, is_train=True, records=records)
    workers = _get_num_workers(cfg, mapper)
    mapper = _add_image_cache(cfg.DATALOADER.CACHE_BYTES, mapper, workers)
    return TrainLoader(
        records, mapper, sampler, start_iter=start_iter, num_workers=workers, skip_unreadable=skip
    )


def _get_num_workers(cfg, mapper):
    """Return DATALOADER.NUM_WORKERS, as `Threads` if WORKER_TYPE or the mapper asks for threads."""
    num_workers = cfg.DATALOADER.NUM_WORKERS
    worker_type = cfg.DATALOADER.WORKER_TYPE
    in_threads = worker_type == "thread" or (worker_type == "auto" and getattr(mapper, "thread_safe", False))
    return Threads(num_workers) if in_threads else num_workers


def _add_image_cache(max_bytes, mapper, workers):
    """Return a copy of the mapper that reads through an `ImageCache` of DATALOADER.CACHE_BYTES."""
    if max_bytes == 0:
        return mapper
    if workers and not isinstance(workers, Threads):
        raise UserError("DATALOADER.CACHE_BYTES needs DATALOADER.WORKER_TYPE thread or NUM_WORKERS 0")
    if not hasattr(mapper, "image_cache"):
        raise UserError("DATALOADER.CACHE_BYTES needs a mapper with an image_cache, as DatasetMapper has")
    mapper = copy.copy(mapper)
    mapper.image_cache = ImageCache(max_bytes)
    return mapper


def get_training_records(cfg: CfgNode) -> SerializedRecords:
    """Return the records of DATASETS.TRAIN, filtered for training."""
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
        need_masks=cfg.MODEL.MASK_ON,
    )


def count_iters_per_epoch(cfg: CfgNode) -> int:
    """Return the `iters_per_epoch` of the loader that `build_detection_train_loader(cfg)` builds."""
    sampler = build_train_sampler(cfg, get_training_records(cfg), check_batch_size(cfg))
    return -(-sampler.size // sampler.batch_size)


def build_detection_test_loader(
    cfg: CfgNode,
    dataset_name: str,
    *,
    mapper: Callable[..., dict[str, Any]] | None = None,
    dataset: Sequence[dict[str, Any]] | None = None,
    sampler: Iterable[int] | None = None,
) -> Loader:
    """Build the loader of this rank's images of a dataset, in batches of TEST.IMS_PER_BATCH.

    The default mapper is `DatasetMapper(cfg, is_train=False)`, or `TTAMapper` with TEST.AUG.ENABLED; the
    default sampler is `InferenceSampler`, and then all images of a batch have the same padded shape, so that
    the detections in an image do not depend on the batch.
    """
    if dataset is None:
        records = DatasetCatalog.get(dataset_name)
        check_image_files(records, dataset_name)
    else:
        records = serialize(dataset)
    batch_size = cfg.TEST.IMS_PER_BATCH
    tta = mapper is None and cfg.TEST.AUG.ENABLED
    if mapper is None:
        mapper = build_tta_mapper(cfg, dataset_name) if tta else DatasetMapper(cfg, is_train=False)
    if sampler is None:
        indices = list(InferenceSampler(len(records)))
        groups = _group_by_padded_shape(cfg, records, indices, tta) if batch_size > 1 else [indices]
    else:
        groups = [list(sampler)]
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    keys = [[(index, index) for index in batch] for batch in batches]
    return Loader(MappedRecords(records, mapper, seed=0), keys, _get_num_workers(cfg, mapper))


def _group_by_padded_shape(cfg, records, indices, tta):
    """Return the indices in one list per padded shape, the largest shape first."""
    if tuple(cfg.INPUT.FIXED_SIZE) != (0, 0) or records.columns is None:
        # All shapes are equal or unknown.
        return [indices]
    aug = cfg.TEST.AUG
    short_edges = aug.MIN_SIZES if tta else (cfg.INPUT.MIN_SIZE_TEST,)
    max_size = aug.MAX_SIZE if tta else cfg.INPUT.MAX_SIZE_TEST

    @functools.cache
    def get_padded_shapes(*size):
        resized = [get_shortest_edge_size(*size, edge, max_size) if edge else size for edge in short_edges]
        return tuple(tuple(-(-side // _STRIDE) * _STRIDE for side in shape) for shape in resized)

    groups = {}
    for index in indices:
        # The mapper reports an invalid size when it reads the image.
        height, width = (max(1, int(records.columns[key][index])) for key in ("height", "width"))
        groups.setdefault(get_padded_shapes(height, width), []).append(index)
    return [groups[shapes] for shapes in sorted(groups, key=lambda shapes: -sum(h * w for h, w in shapes))]


def build_detection_val_loader(cfg: CfgNode, dataset_name: str) -> Loader:
    """Build the batches of `build_detection_test_loader` with targets, to compute losses."""
    mapper = DatasetMapper(cfg, is_train=True, augmentations=build_augmentation(cfg, is_train=False))
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)
