"""Datasets and images made to fill the memory or to lead elsewhere, and broken ones: one clear error each."""

import json
import struct
import zlib

import numpy as np
from hostile_helpers import rejected
from PIL import Image

from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.data.datasets.coco import load_coco_json
from plaintrain.data.datasets.folder import load_images
from plaintrain.data.datasets.yolo import load_yolo
from plaintrain.data.image_files import image_header
from plaintrain.data.images import read_image
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.evaluation.predictions import read_detections


def _spec(files):
    return {"FORMAT": "coco", "JSON": str(files.json), "IMAGE_ROOT": str(files.images)}


def test_json_and_masks_of_predictions_that_fill_the_memory_are_rejected(tiny_coco):
    declare_dataset("pets", _spec(tiny_coco))
    path = tiny_coco.json.with_name("odd.json")
    numbers = '{"images": [' + "9" * 100_000 + "]}"
    for text in ("[" * 1_000_000, '{"images":' * 100_000, numbers, '"\\ud800"', "\0"):
        path.write_text(text)
        rejected(path, by=lambda: load_coco_json(str(path), ""))
        rejected(path, by=lambda: read_detections(str(path), "pets"))
    for change in (
        {"bbox": [1, 1, 5, 5], "segmentation": [[0, 0, 2e9, 0, 2e9, 2e9]]},
        # Boxes are made of these.
        {"segmentation": {"size": [30, 40], "counts": "o" * 50}},
        {"segmentation": {"size": [10**6, 10**6], "counts": [10**12]}},
    ):
        path.write_text(json.dumps([{"image_id": 11, "category_id": 7, "score": 0.5, **change}]))
        rejected(path, "detection 0", by=lambda: read_detections(str(path), "pets"))


def test_deep_nesting_and_shapes_sets_of_absurd_size_are_rejected(tiny_coco):
    text = tiny_coco.json.read_text()
    for depth in (100, 960, 990):
        deep, name = "[" * depth + "20" + "]" * depth, f"deep {depth}"
        tiny_coco.json.write_text(text.replace("[[20, 10,", f"{deep}, [[20, 10,"))
        declare_dataset(name, _spec(tiny_coco))
        words = "deep" if depth > 600 else ""
        rejected(words, by=lambda name=name: get_detection_dataset_dicts(name, need_masks=True))
    for key, value in (("HEIGHT", 10**6), ("NUM", 10**12), ("WIDTH", 10**30)):
        spec = {"FORMAT": "shapes", "SPLIT": "train", "NUM": 4, "WIDTH": 10**4, key: value}
        declare_dataset(f"big {key}", spec)
        rejected("shapes needs", by=lambda key=key: get_detection_dataset_dicts(f"big {key}"))


def _png(width, height, data=b"", extra=()):
    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def _saved(tmp_path, image_format):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "source", image_format)
    return (tmp_path / "source").read_bytes()


def test_bombs_and_broken_images_are_rejected_and_those_of_another_format_read(tmp_path):
    path = tmp_path / "a.jpg"
    text = b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20))
    for content in (
        *(_png(*size, bytes(1000)) for size in ((60_000, 60_000), (2**31 - 1, 1), (4000, 4000))),
        _png(4, 4, bytes(52), [text]),
        _saved(tmp_path, "TIFF")[:900],
    ):
        path.write_bytes(content)
        rejected(path, by=lambda: read_image(str(path)))
    for image_format in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO"):
        path.write_bytes(_saved(tmp_path, image_format))
        assert image_header(str(path))[:2] == (30, 40)
        assert read_image(str(path)).shape == (3, 30, 40)


def test_links_that_go_round_are_rejected_and_those_to_elsewhere_read(tmp_path, write_image):
    write_image(tmp_path / "images/a.png", 20, 20)
    for name in "xyz":
        (tmp_path / "images" / name).symlink_to(tmp_path / "images")
    rejected(tmp_path / "images", "link", by=lambda: load_images(str(tmp_path / "images")))
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\n")
    rejected(tmp_path / "images", "link", by=lambda: load_yolo(str(tmp_path / "data.yaml"), "train"))
    write_image(tmp_path / "elsewhere/sub/a.png", 20, 20)
    (tmp_path / "others").mkdir()
    (tmp_path / "others/link").symlink_to(tmp_path / "elsewhere")
    records, _ = load_images(str(tmp_path / "others"))
    assert [record["image_id"] for record in records] == ["link/sub/a.png"]
