"""plaintrain.data.build and records: the samples that reach the training, and their order."""

import contextlib
import itertools
import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_helpers import rejected

from plaintrain.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    dataset_mapper,
    get_detection_dataset_dicts,
    images,
)
from plaintrain.data.build import count_iters_per_epoch
from plaintrain.data.images import ImageCache
from plaintrain.data.samplers import TrainingSampler
from plaintrain.structures import BoxMode
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


@pytest.fixture
def make_dataset(tmp_path, write_image):
    """Function that registers `num` images, every third upright, with a box whose width tells them apart."""

    def make(name="cells", num=7, classes=("a", "b")):
        records = []
        for i in range(num):
            width, height = (30, 40) if i % 3 == 0 else (40, 30)
            path = tmp_path / name / f"{i}.png"
            write_image(path, width, height, seed=i)
            box = {"bbox": [1, 2, 3 + i, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": i % 2}
            record = {"file_name": str(path), "image_id": i, "height": height, "width": width}
            records.append({**record, "annotations": [{**box, "iscrowd": 0}]})
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=list(classes))
        return records

    return make


@pytest.fixture
def records(make_dataset):
    """The records of a dataset of 7 images, registered as cells."""
    return make_dataset()


@pytest.fixture
def train(cfg):
    """A config whose training draws crops, sizes and flips; what workers it has are processes."""
    cfg.DATASETS.TRAIN, cfg.DATALOADER.WORKER_TYPE = ("cells",), "process"
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.SIZE = [0.5, 0.5]
    return cfg


@pytest.fixture
def as_rank(monkeypatch):
    """Function (rank, world_size): act as one process of several."""

    def act(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return act


def _batches(loader, num):
    return list(itertools.islice(iter(loader), num))


def _names(batches):
    return [[sample["file_name"] for sample in batch] for batch in batches]


def _plain(batches):
    """Everything in the batches, in a form that `==` compares."""

    def plain(sample):
        target = {key: value.tolist() for key, value in sample["target"].items()}
        return {**sample, "image": sample["image"].tolist(), "target": target}

    return [[plain(sample) for sample in batch] for batch in batches]


@pytest.mark.parametrize(("worker_type", "workers"), [("process", 0), ("process", 2), ("thread", 3)])
def test_train_loader_depends_on_seed_and_iteration_alone(records, train, worker_type, workers):
    train.INPUT.AUGMENTATIONS = ["RandomPhotometricDistort"]
    whole = _plain(_batches(build_detection_train_loader(train), 9))
    train.DATALOADER.WORKER_TYPE, train.DATALOADER.NUM_WORKERS = worker_type, workers
    for start in (0, 5):
        loader = build_detection_train_loader(train, start_iter=start)
        assert loader._in_threads == (worker_type == "thread")
        assert _plain(_batches(loader, 4)) == whole[start : start + 4]
    # An image does not look the same in every epoch.
    images = {}
    for sample in itertools.chain(*whole):
        images.setdefault(sample["file_name"], set()).add(str(sample["image"]))
    assert len(images) == 7 and sum(map(len, images.values())) == 18
    train.SEED = 6
    assert _plain(_batches(build_detection_train_loader(train), 4)) != whole[:4]


@pytest.mark.long
def test_spawned_workers_load_the_same_stream(records, train):
    expected = _plain(_batches(build_detection_train_loader(train), 2))
    train.DATALOADER.NUM_WORKERS = 1
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert _plain(_batches(build_detection_train_loader(train), 2)) == expected
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_loaders_take_a_mapper_a_dataset_and_a_sampler(records, train):
    loaded = []
    loader = build_detection_train_loader(train, mapper=lambda record, rng: loaded.append(1), start_iter=1000)
    # Nothing is loaded of the iterations before.
    assert next(iter(loader)) == [None, None] and len(loaded) == 2
    parts = {"dataset": records[:3], "sampler": TrainingSampler(3, 3, seed=1, shuffle=False)}
    loader = build_detection_train_loader(train, **parts, mapper=lambda record: record["image_id"])
    assert _batches(loader, 2) == [[0, 1, 2], [0, 1, 2]]
    parts = {"dataset": records[2:], "sampler": [4, 0, 1]}
    train.TEST.IMS_PER_BATCH = 2
    loader = build_detection_test_loader(train, "cells", **parts, mapper=lambda record: record["image_id"])
    assert list(loader) == [[6, 2], [3]]
    # The default mapper gets the training records.
    default = build_detection_train_loader(train)._dataset.mapper
    assert list(default.records) == list(get_detection_dataset_dicts("cells"))


def test_train_loader_gives_each_rank_its_samples_and_all_names(records, train, as_rank):
    train.SOLVER.IMS_PER_BATCH = 4
    loaded = _names(_batches(build_detection_train_loader(train), 6))
    as_rank(1, 2)
    loader = build_detection_train_loader(train, start_iter=3)
    named = [loader.get_image_names(iteration) for iteration in range(6)]
    assert [[name.split("(")[1].rstrip(")") for name in batch] for batch in named] == loaded
    assert [s["file_name"] for s in loader.load_samples(4)] == loaded[4][2:]
    assert _names(_batches(loader, 2)) == [names[2:] for names in loaded[3:5]]


@pytest.mark.parametrize(("batch", "factor", "expected"), [(2, 1, 3), (4, 1, 2), (9, 1, 1), (2, 3, 9)])
def test_count_iters_per_epoch_agrees_with_the_loader(records, train, batch, factor, expected):
    # One image has nothing to train on.
    records[2]["annotations"] = []
    train.SOLVER.IMS_PER_BATCH = batch
    train.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    train.DATASETS.TRAIN_REPEAT_FACTOR = [["cells", factor]]
    loader = build_detection_train_loader(train)
    # The images are not needed to count.
    for record in records:
        Path(record["file_name"]).unlink()
    assert count_iters_per_epoch(train) == loader.iters_per_epoch == expected
    with pytest.raises(TypeError, match="infinite"):
        len(loader)


BATCH, STEPS = "SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE_STEPS"
CACHE, WORKERS = "DATALOADER.CACHE_BYTES", "DATALOADER.NUM_WORKERS"


@pytest.mark.parametrize(
    ("options", "world_size", "words"),
    [
        ([BATCH, 3], 2, f"{BATCH} must be divisible by 2 processes, got 3"),
        ([BATCH, 6, STEPS, 0], 1, f"{STEPS} must be 1 to 6 .*, got 0$"),
        ([BATCH, 6, STEPS, 4], 2, f"{STEPS} must be 1 to 3 .*, got 4$"),
        # As many as an image of a rank a step.
        ([BATCH, 6, STEPS, 6], 1, None),
        ([BATCH, 6, STEPS, 3], 2, None),
        ([CACHE, 100, WORKERS, 1], 1, f"{CACHE} needs DATALOADER.WORKER_TYPE thread or"),
    ],
)
def test_train_loader_checks_options(records, train, as_rank, options, world_size, words):
    train.merge_from_list(options)
    as_rank(0, world_size)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        build_detection_train_loader(train)


def _draws(record):
    """A mapper in Detectron2's style: it draws from the global generators."""
    return random.random(), np.random.rand(), torch.rand(1).item()


def _global_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def _fails(record):
    raise UserError(f"bad luck {random.random()}")


def test_mapper_of_one_argument_finds_the_global_generators_seeded_and_leaves_them_alone(records, train):
    before, streams = _global_state(), []
    for workers in (0, 2):
        train.DATALOADER.NUM_WORKERS = workers
        streams.append(_batches(build_detection_train_loader(train, mapper=_draws), 6))
    assert streams[0] == streams[1]
    drawn = list(itertools.chain(*streams[0]))
    assert [len(set(values)) for values in zip(*drawn, strict=True)] == [12, 12, 12]
    assert _batches(build_detection_train_loader(train, mapper=_draws, start_iter=4), 2) == streams[0][4:]
    train.SEED, train.DATALOADER.NUM_WORKERS = 6, 0
    assert _batches(build_detection_train_loader(train, mapper=_draws), 6) != streams[0]
    rejected("bad luck", by=lambda: next(iter(build_detection_train_loader(train, mapper=_fails))))
    assert _global_state() == before


def test_unreadable_image_is_one_sentence(records, train):
    train.DATALOADER.NUM_WORKERS = 2
    Path(records[3]["file_name"]).write_text("not an image")
    rejected("cannot read the image file ", by=lambda: list(build_detection_test_loader(train, "cells")))


def test_missing_unknown_and_empty_datasets_are_rejected(make_dataset, train):
    rejected("DATASETS.TRAIN is empty", by=lambda: get_detection_dataset_dicts([]))
    make_dataset(num=0)
    rejected("no image with annotations is left in cells", by=lambda: build_detection_train_loader(train))
    train.DATASETS.TRAIN = ("cell",)
    rejected("did you mean cells", by=lambda: build_detection_train_loader(train))
    # Missing images are counted before training.
    DatasetCatalog.remove("cells")
    for record in make_dataset()[4:]:
        record["file_name"] = record["file_name"].replace(".png", ".jpg")
    train.DATASETS.TRAIN = ("cells",)
    words = "an image of cells does not exist: ", "cells/4.jpg (and 2 more)"
    rejected(*words, by=lambda: build_detection_train_loader(train))
    rejected(*words, by=lambda: build_detection_test_loader(train, "cells"))
    make_dataset("others", num=1)[0]["file_name"] = "no/such/folder/0.png"
    rejected("does not exist: no/such/folder/0.png", by=lambda: build_detection_test_loader(train, "others"))


def test_images_without_annotations_are_skipped_unless_asked_for(records, train, log):
    records[1]["annotations"] = []
    records[2]["annotations"][0]["iscrowd"] = 1
    records[3]["annotations"][0]["bbox"] = [5, 5, 0, 3]
    for value, expected in ((True, [0, 4, 5, 6]), (False, list(range(7)))):
        train.DATALOADER.FILTER_EMPTY_ANNOTATIONS = value
        samples = itertools.chain(*_batches(build_detection_train_loader(train), 12))
        assert sorted({sample["image_id"] for sample in samples}) == expected
    assert "cells: skipped 3 images without annotations" in log.text


def test_test_loader_gives_each_image_once_each_time_and_the_views_with_threads(records, cfg):
    records[1]["annotations"] = []
    for size, workers, batches in ((1, 0, [[i] for i in range(7)]), (3, 2, [[0, 3, 6], [1, 2, 4], [5]])):
        cfg.TEST.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = size, workers
        loader = build_detection_test_loader(cfg, "cells")
        assert len(loader) == len(batches)
        for _ in range(2):
            loaded = list(loader)
            assert [[sample["image_id"] for sample in batch] for batch in loaded] == batches
            assert not any("target" in sample for sample in itertools.chain(*loaded))
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES = True, (20, 30)
    cfg.DATALOADER.WORKER_TYPE, cfg.TEST.IMS_PER_BATCH = "thread", 3
    seen = []
    for number in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = number
        loaded = list(build_detection_test_loader(cfg, "cells"))
        assert [[sample["image_id"] for sample in batch] for batch in loaded] == batches
        samples = itertools.chain(*loaded)
        seen.append([view["image"].tolist() for sample in samples for view in sample["views"]])
    assert seen[0] == seen[1]


def test_test_loader_covers_the_images_of_all_ranks(records, train, as_rank):
    train.TEST.IMS_PER_BATCH = 3
    for world_size in (2, 9):
        ids = []
        for rank in range(world_size):
            as_rank(rank, world_size)
            loader = build_detection_test_loader(train, "cells")
            ids += [sample["image_id"] for batch in loader for sample in batch]
        assert sorted(ids) == list(range(7))


@pytest.mark.parametrize(
    ("keys", "batches"),
    [
        (["INPUT.MIN_SIZE_TEST", 64], [[0, 2, 4], [1, 3]]),
        # As they are: padded to 64 x 96, 64 x 96, 64 x 128, 128 x 128, 32 x 64.
        (["INPUT.MIN_SIZE_TEST", 0], [[3], [2], [0, 1], [4]]),
        (["INPUT.FIXED_SIZE", (32, 32)], [[0, 1, 2], [3, 4]]),
        (["TEST.IMS_PER_BATCH", 1], [[0], [1], [2], [3], [4]]),
        # At two sizes: what is alike at one may not be at the other.
        (["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64, 0)], [[3], [2], [0], [1], [4]]),
    ],
)
def test_test_batches_are_of_one_shape_as_the_config_resizes(cfg, keys, batches):
    cfg.TEST.IMS_PER_BATCH, cfg.INPUT.MAX_SIZE_TEST, cfg.DATALOADER.NUM_WORKERS = 3, 1000, 0
    cfg.merge_from_list(keys)
    sizes = [(40, 80), (64, 96), (60, 120), (100, 128), (30, 60)]
    records = [{"image_id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)]
    records = [{**record, "file_name": "", "annotations": []} for record in records]
    loader = build_detection_test_loader(cfg, "five", dataset=records)
    assert [[key[0] for key in batch] for batch in loader.batches] == batches


def test_test_batches_of_records_without_a_size_are_in_file_order(cfg):
    cfg.TEST.IMS_PER_BATCH = 2
    records = [{"image_id": i, "height": h, "width": 9} for i, h in enumerate([9, 99, "?", 9])]
    loader = build_detection_test_loader(cfg, "odd", dataset=records, mapper=lambda r: r["image_id"])
    assert list(loader) == [[0, 1], [2, 3]]
    # A size that cannot be is left to who reads the image.
    records = [{"image_id": i, "file_name": "", "height": h, "width": 9} for i, h in enumerate([0, -5])]
    loader = build_detection_test_loader(cfg, "odd", dataset=records, mapper=lambda r: r["image_id"])
    assert list(loader) == [[0, 1]]


BYTES = 40 * 30 * 3


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read, in order."""
    names, read_image = [], images.read_image
    for module in (images, dataset_mapper):
        monkeypatch.setattr(
            module, "read_image", lambda name, *args: names.append(name) or read_image(name, *args)
        )
    return names


def _darken(tensors, rng):
    """An augmentation that breaks the rule: it changes what it is given."""
    tensors["image"].as_subclass(torch.Tensor).floor_divide_(int(rng.integers(2, 9)))
    return tensors


def _stream(cfg, dataset, mapper=None):
    return _plain(_batches(build_detection_train_loader(cfg, dataset=dataset, mapper=mapper), 10))


@pytest.mark.parametrize(
    ("workers", "limits"),
    [
        ((0, "process"), (2 * BYTES + 1, 2)),
        ((3, "thread"), (2 * BYTES + 1, 2)),
        ((3, "thread"), (5 * BYTES, 5)),
        ((2, "auto"), (1, 0)),
    ],
)
def test_image_cache_keeps_the_stream_and_reads_what_fits_once(make_dataset, cfg, read, log, workers, limits):
    limit, kept = limits
    dataset = make_dataset(num=5)
    mapper = DatasetMapper(cfg, augmentations=[_darken])
    expected = [_stream(cfg, dataset), _stream(cfg, dataset, mapper)]
    cfg.DATALOADER.CACHE_BYTES = limit
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.WORKER_TYPE = workers
    for number, custom in enumerate((None, mapper)):
        read.clear()
        assert _stream(cfg, dataset, custom) == expected[number]
        counts = [read.count(record["file_name"]) for record in dataset]
        # Threads may read an image of the first pass for two samples at a time.
        assert sum(count <= 2 for count in counts) == kept
        assert log.text.count(f"CACHE_BYTES {limit} holds {kept} images") == (kept < 5) * (number + 1)
    # The mapper that was passed in is another's too.
    assert mapper.image_cache is None


def test_image_cache_returns_what_read_image_returns(make_dataset, tmp_path, write_image, cfg):
    records, cache = make_dataset(), ImageCache(5 * BYTES)
    name = records[0]["file_name"]
    plain = images.read_image(name)
    for _ in range(2):
        image = cache(name)
        assert torch.equal(image, plain) and image.stride() == plain.stride()
    # The same file in another range is another image.
    assert torch.equal(cache(name, (0, 255)), plain)
    rejected("8-bit pixels", by=lambda: cache(name, (0, 4095)))
    # Errors are not kept.
    path = str(tmp_path / "late.png")
    rejected("does not exist", by=lambda: cache(path))
    write_image(Path(path), 40, 30)
    assert cache(path).shape == (3, 30, 40)
    # Other mappers have none.
    cfg.merge_from_list([CACHE, 100, WORKERS, 1, "DATALOADER.WORKER_TYPE", "thread"])
    with pytest.raises(UserError, match="CACHE_BYTES needs a mapper with an image_cache"):
        build_detection_train_loader(cfg, dataset=records, mapper=lambda record, rng: record)
