"""Decoded images in memory: the same stream, within a limit, for threads alone."""

import itertools

import numpy as np
import pytest
import torch

from plaintrain.data import DatasetMapper, build_detection_train_loader, images
from plaintrain.data import mapper as mappers
from plaintrain.data.images import ImageCache
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

BYTES = 40 * 30 * 3


@pytest.fixture
def dataset(tmp_path, write_image):
    records = []
    for i in range(5):
        write_image(tmp_path / f"{i}.png", 40, 30, seed=i)
        box = {"bbox": [1, 2, 13, 14], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        record = {"file_name": str(tmp_path / f"{i}.png"), "image_id": i, "height": 30, "width": 40}
        records.append({**record, "annotations": [box]})
    return records


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read, in order."""
    names, read_image = [], images.read_image
    for module in (images, mappers):
        monkeypatch.setattr(
            module, "read_image", lambda name, *args: names.append(name) or read_image(name, *args)
        )
    return names


class Darken:
    """An augmentation that breaks the rule: it changes what it is given."""

    def __call__(self, tensors, rng):
        tensors["image"].as_subclass(torch.Tensor).floor_divide_(int(rng.integers(2, 9)))
        return tensors


def stream(cfg, dataset, number=10, mapper=None):
    loader = build_detection_train_loader(cfg, dataset=dataset, mapper=mapper)
    batches = itertools.islice(iter(loader), number)
    return [(s["image_id"], s["image"].tolist(), s["target"]["boxes"].tolist()) for b in batches for s in b]


@pytest.mark.parametrize(
    ("workers", "limits"),
    [
        ((0, "process"), (2 * BYTES + 1, 2)),
        ((3, "thread"), (2 * BYTES + 1, 2)),
        ((3, "thread"), (5 * BYTES, 5)),
        ((2, "auto"), (1, 0)),
    ],
)
def test_the_stream_is_the_same_and_what_fits_is_read_once(dataset, cfg, read, log, workers, limits):
    limit, kept = limits
    mapper = DatasetMapper(cfg, augmentations=[Darken()])
    expected = [stream(cfg, dataset), stream(cfg, dataset, mapper=mapper)]
    cfg.DATALOADER.CACHE_BYTES = limit
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.WORKER_TYPE = workers
    for number, custom in enumerate((None, mapper)):
        read.clear()
        assert stream(cfg, dataset, mapper=custom) == expected[number]
        counts = [read.count(record["file_name"]) for record in dataset]
        # Threads may read an image of the first pass for two samples at a time.
        assert sum(count <= 2 for count in counts) == kept
        assert log.text.count(f"CACHE_BYTES {limit} holds {kept} images") == (kept < 5) * (number + 1)
    # The mapper that was passed in is another's too.
    assert mapper.image_cache is None


def test_image_cache_returns_what_read_image_returns(dataset, tmp_path, write_image):
    name, cache = dataset[0]["file_name"], ImageCache(5 * BYTES)
    plain = images.read_image(name)
    for _ in range(2):
        image = cache(name)
        assert torch.equal(image, plain) and image.stride() == plain.stride()
    # The same file in another range is another image.
    assert torch.equal(cache(name, (0, 255)), plain)
    with pytest.raises(UserError, match="8-bit pixels"):
        cache(name, (0, 4095))
    # Errors are not kept.
    path = tmp_path / "late.png"
    with pytest.raises(UserError, match="does not exist"):
        cache(str(path))
    write_image(path, 40, 30)
    assert cache(str(path)).shape == (3, 30, 40)


def test_processes_and_other_mappers_are_rejected(dataset, cfg):
    cfg.DATALOADER.CACHE_BYTES, cfg.DATALOADER.NUM_WORKERS = 100, 1
    cfg.DATALOADER.WORKER_TYPE = "process"
    with pytest.raises(UserError, match=r"CACHE_BYTES is 100, but processes .*WORKER_TYPE to thread, or"):
        build_detection_train_loader(cfg, dataset=dataset)
    cfg.DATALOADER.WORKER_TYPE = "thread"
    with pytest.raises(UserError, match=r"CACHE_BYTES is 100, but the mapper has no image_cache"):
        build_detection_train_loader(cfg, dataset=dataset, mapper=lambda record, rng: record)
    cfg.DATALOADER.CACHE_BYTES = -1
    with pytest.raises(UserError, match=r"CACHE_BYTES is -1, but must be at least 0"):
        build_detection_train_loader(cfg, dataset=dataset)


def test_pasted_images_come_from_the_cache(dataset, cfg, read):
    for record in dataset:
        record["annotations"][0]["segmentation"] = [[1, 2, 14, 2, 14, 16, 1, 16]]
    cfg.MODEL.MASK_ON, cfg.INPUT.AUGMENTATIONS = True, [{"SimpleCopyPaste": {}}]
    cfg.DATALOADER.CACHE_BYTES = 5 * BYTES
    stream(cfg, dataset)
    assert sorted(read) == sorted(np.unique(read)) and len(read) == 5
