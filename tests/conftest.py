"""Fixtures: small datasets written to a temporary folder, and the real ones where there are any."""

import json
import logging
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, MetadataCatalog

torch.set_num_threads(1)
# No test, nor a process that it starts, writes into the cache of who runs it, or reads from it.
os.environ["PLAINTRAIN_CACHE"] = ""


@pytest.fixture(autouse=True)
def _forget_datasets():
    """Restore both catalogs after each test: names, loaded records and metadata."""
    states = (DatasetCatalog, DatasetCatalog._loaded, MetadataCatalog)
    before = [dict(state) for state in states]
    metadata = {name: dict(vars(m)) for name, m in MetadataCatalog.items()}
    yield
    for state, values in zip(states, before, strict=True):
        state.clear()
        state.update(values)
    for name, values in metadata.items():
        vars(MetadataCatalog.get(name)).clear()
        vars(MetadataCatalog.get(name)).update(values)


@pytest.fixture
def cfg():
    """A config for images of some 40 pixels, loaded in this process."""
    cfg = get_cfg()
    cfg.SEED = 5
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN = (24, 32, 40)
    cfg.INPUT.MAX_SIZE_TRAIN = 60
    cfg.INPUT.MIN_SIZE_TEST = 0
    return cfg


@pytest.fixture
def log(caplog, monkeypatch):
    """`caplog` with what plaintrain logs, whether or not a test has set its logger up."""
    logger = logging.getLogger("plaintrain")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="plaintrain")
    return caplog


@pytest.fixture
def clock(monkeypatch):
    """A clock: `clock.now` is what time.monotonic() and time.perf_counter() say."""
    clock = SimpleNamespace(now=1000.0)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: clock.now)
    return clock


@pytest.fixture
def data_root():
    """Folder of the real BCCD and COCO images."""
    root = os.environ.get("PLAINTRAIN_DATASETS")
    if not root or not all(os.path.isdir(os.path.join(root, name)) for name in ("BCCD", "coco")):
        pytest.skip("needs the real images: $PLAINTRAIN_DATASETS must be a folder with BCCD and coco")
    return root


@pytest.fixture
def write_image():
    """Function that writes an image of random pixels."""

    def write(path, width, height, seed=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)

    return write


def _coco_content():
    """Categories and images out of order, an upright image, a crowd, keypoints, an empty image."""
    boxes = [
        {"image_id": 11, "category_id": 7, "bbox": [4, 5, 10.5, 8]},
        {"image_id": 11, "category_id": 3, "bbox": [20, 10, 15, 15], "area": 225.0},
        {"image_id": 2, "category_id": 3, "bbox": [0, 0, 30, 20], "iscrowd": 1},
        {"image_id": 2, "category_id": 5, "bbox": [3, 4, 20, 30]},
    ]
    boxes[1]["segmentation"] = [[20, 10, 35, 10, 35, 25, 20, 25]]
    boxes[2]["segmentation"] = {"size": [40, 30], "counts": [0, 600, 600]}
    boxes[3]["keypoints"] = [5, 6, 2, 20, 30, 1]
    return {
        "images": [
            {"id": 11, "file_name": "wide.png", "width": 40, "height": 30},
            {"id": 2, "file_name": "more/upright.png", "width": 30, "height": 40},
            {"id": 5, "file_name": "empty.png", "width": 20, "height": 24},
        ],
        "annotations": [{"id": 100 + i, "iscrowd": 0, **box} for i, box in enumerate(boxes)],
        "categories": [
            {"id": 7, "name": "dog"},
            {"id": 3, "name": "cat"},
            {"id": 5, "name": "person", "keypoints": ["head", "foot"]},
        ],
    }


@pytest.fixture
def tiny_coco(tmp_path, write_image):
    """A COCO file of 3 images: `json`, `images`, `spec`, its `content`, and `save()` after changing that."""
    files = SimpleNamespace(json=tmp_path / "instances.json", images=tmp_path / "images")
    files.spec = {"FORMAT": "coco", "JSON": str(files.json), "IMAGE_ROOT": str(files.images)}
    files.content = _coco_content()
    files.save = lambda: files.json.write_text(json.dumps(files.content))
    files.save()
    for image in files.content["images"]:
        write_image(files.images / image["file_name"], image["width"], image["height"], image["id"])
    return files


def _voc_object(name, xmin, ymin, xmax, ymax, difficult=0):
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


@pytest.fixture
def tiny_voc(tmp_path, write_image):
    """A VOC folder: `root`, `write(stem, *objects, size=...)`, `object(name, 4 numbers, difficult)`.

    Split train: a (zebra, ant), b (ant, difficult); split val: c (cow). Images are 40x30.
    """
    root = tmp_path / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)

    def write(stem, *objects, size="<size><width>40</width><height>30</height><depth>3</depth></size>"):
        text = f"<annotation>{size}{''.join(objects)}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(text)

    write("a", _voc_object("zebra", 1, 1, 40, 30), _voc_object("ant", 5, 6, 20, 21))
    write("b", _voc_object("ant", 11, 12, 13, 14, difficult=1))
    write("c", _voc_object("cow", 2, 3, 4, 5))
    for seed, stem in enumerate("abc"):
        write_image(root / "JPEGImages" / f"{stem}.jpg", 40, 30, seed)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Main/val.txt").write_text("c  1\n\n")
    return SimpleNamespace(root=root, write=write, object=_voc_object)
