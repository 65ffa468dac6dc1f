"""Files made to run code, to fill the memory, to hang or to lead elsewhere: one clear error each, soon."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hostile_helpers import merge, rejected
from PIL import Image

from plaintrain.checkpoint.pretrained import read_state_dict
from plaintrain.config import get_cfg
from plaintrain.config.yaml import parse_yaml
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.data.datasets.coco import load_coco_results, read_coco_json
from plaintrain.data.datasets.voc import load_voc
from plaintrain.data.datasets.yolo import load_yolo
from plaintrain.data.image_files import load_images, read_image_header
from plaintrain.data.images import read_image
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.evaluation.predictions import read_detections


@pytest.mark.parametrize(
    ("where", "tag"),
    [
        ("config", "!!python/object/apply:os.mkdir ['{0}']"),
        ("base", "!!python/object/new:os.mkdir ['{0}']"),
        ("yolo", "!!python/object/apply:os.mkdir ['{0}']"),
        ("key", "!!python/name:os.mkdir ''"),
    ],
)
def test_yaml_that_would_run_code_is_rejected(tmp_path, where, tag):
    tag = tag.format(tmp_path / "touched")
    path, config = tmp_path / "c.yaml", tmp_path / "top.yaml"
    path.write_text(f"? {tag}\n: 1\n" if where == "key" else f"names: {tag}\n")
    config.write_text("_BASE_: c.yaml\n" if where == "base" else path.read_text())
    read = (lambda: load_yolo(str(path), "train")) if where == "yolo" else (lambda: merge(config))
    rejected("python tag would run code", by=read)
    assert not (tmp_path / "touched").exists()


def test_postscript_named_as_a_photo_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    path = tmp_path / "a.jpg"
    Image.new("RGB", (20, 20)).save(path, "EPS")
    rejected(path, "PostScript", by=lambda: read_image(str(path)))
    rejected(path, "PostScript", by=lambda: read_image_header(str(path)))


def test_a_compressed_checkpoint_is_rejected_before_it_is_unpacked(tmp_path):
    bomb, plain = tmp_path / "w.pth", io.BytesIO()
    torch.save({"a": torch.zeros(100)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            is_data = entry.filename.endswith("data/0")
            target.writestr(entry.filename, bytes(64 << 20) if is_data else source.read(entry))
    assert bomb.stat().st_size < 1 << 20
    rejected(bomb, "unpacks to 67,", by=lambda: read_state_dict(str(bomb)))


def _anchors(first, aliases, levels):
    lines = [f"a{i}: &a{i} [{f'*a{i - 1}, ' * aliases}]" for i in range(1, levels)]
    return "\n".join([f"a0: &a0 {first}", *lines])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (_anchors("[x]", 9, 30), "values"),
        ("a: &a [*a]", "levels"),
        (_anchors("x", 1, 3000), "levels"),
        ("a: " + "[" * 300_000, "deep"),
        ("a: " + "1:" * 200_000 + "1", "digits"),
        ("SEED: 1\nSEED: 2", "duplicate key SEED"),
        ("a: 2001-99-99", "YAML"),
        ("? [a]\n: b", "unhashable"),
        ("a: b\0c", "YAML"),
        ("1: 2", "unknown key 1"),
    ],
    ids=range(10),
)
def test_yaml_bombs_and_broken_yaml_are_rejected(tmp_path, text, word):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    rejected(path, word, by=lambda: merge(path))


def test_yaml_of_many_bytes_or_another_encoding_is_not_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"SEED: \xe9")
    rejected(path, by=lambda: merge(path))
    os.truncate(path, 10 << 30)
    rejected(path, "bytes", by=lambda: merge(path))
    rejected(path, "bytes", by=lambda: load_yolo(str(path), "train"))
    # Ordinary aliases, a byte order mark and CRLF are read.
    path.write_bytes(b"\xef\xbb\xbfINPUT:\r\n  MIN_SIZE_TRAIN: &s [600, 700]\r\n  MIN_SIZE_TEST: 5\r\n")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (600, 700)
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a}\nd: [*a, *a]", "x")["d"] == [{"b": 1}] * 2


def test_hostile_bases_are_rejected(tmp_path):
    for name in ("c300", "d40"):
        (tmp_path / name).write_text("SEED: 1\n")
    for bases, words in (
        ({"a": "c0"} | {f"c{i}": f"c{i + 1}" for i in range(300)}, "100 files"),
        ({"a": "d0"} | {f"d{i}": f"[d{i + 1}, d{i + 1}]" for i in range(40)}, "100 files"),
        ({"a": '"a\\0b"'}, "not found"),
    ):
        for name, base in bases.items():
            (tmp_path / name).write_text(f"_BASE_: {base}\n")
        rejected(words, by=lambda: merge(tmp_path / "a"))


def test_hostile_overrides_are_rejected():
    for key, value in (
        ("SOLVER.BASE_LR", "1" + "0" * 400),
        ("SEED", "-" * 100_000 + "1"),
        ("INPUT.MIN_SIZE_TRAIN", "(" * 90 + "{[]: 1}" + ")" * 90),
        ("SOLVER.STEPS", "__import__('os').mkdir('/tmp/touched')"),
        ("DATASETS.DECLARE.__immutable__", "1"),
        ("a" * 100_000, "1"),
        ("", "1"),
    ):
        rejected("command line", by=lambda words=[key, value]: get_cfg().merge_from_list(words))


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.parent / "gone"),
    ],
    ids=["fifo", "folder", "loop", "device", "dangling"],
)
def test_special_files_are_rejected_and_do_not_hang(tmp_path, tiny_coco, tiny_voc, write_image, make):
    path = tmp_path / "odd.yaml"
    make(path)
    for read in (
        merge,
        read_state_dict,
        read_image,
        read_image_header,
        lambda p: read_coco_json(p, ""),
        lambda p: load_coco_results(str(tiny_coco.json), "", p),
        lambda p: load_yolo(p, "train"),
    ):
        rejected(path, by=lambda read=read: read(str(path)))
    xml = tiny_voc.root / "Annotations/a.xml"
    xml.unlink()
    make(xml)
    rejected(xml, by=lambda: load_voc(str(tiny_voc.root), "train"))
    split = tiny_voc.root / "ImageSets/Main/odd.txt"
    make(split)
    rejected(split, by=lambda: load_voc(str(tiny_voc.root), "odd"))
    write_image(tmp_path / "y/images/a.png", 20, 20)
    (tmp_path / "y/data.yaml").write_text("train: images\nnames: [a]\n")
    (tmp_path / "y/labels").mkdir()
    make(tmp_path / "y/labels/a.txt")
    rejected(tmp_path / "y/labels/a.txt", by=lambda: load_yolo(str(tmp_path / "y/data.yaml"), "train"))


def test_json_and_masks_of_predictions_that_fill_the_memory_are_rejected(tiny_coco):
    declare_dataset("pets", tiny_coco.spec)
    path = tiny_coco.json.with_name("odd.json")
    numbers = '{"images": [' + "9" * 100_000 + "]}"
    for text in ("[" * 1_000_000, '{"images":' * 100_000, numbers, '"\\ud800"', "\0"):
        path.write_text(text)
        rejected(path, by=lambda: read_coco_json(str(path), ""))
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
        declare_dataset(name, tiny_coco.spec)
        words = "deep" if depth > 600 else ""
        rejected(words, by=lambda name=name: get_detection_dataset_dicts(name, need_masks=True))
    for key, value in (("HEIGHT", 10**6), ("NUM", 10**12), ("WIDTH", 10**30)):
        spec = {"FORMAT": "shapes", "SPLIT": "train", "NUM": 4, "WIDTH": 10**4, key: value}
        declare_dataset(f"big {key}", spec)
        rejected("shapes requires", by=lambda key=key: get_detection_dataset_dicts(f"big {key}"))


def _png(width, height, data=b"", extra=()):
    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def test_bombs_and_broken_images_are_rejected_and_those_of_another_format_read(tmp_path):
    path = tmp_path / "a.jpg"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    for image_format in ("PNG", "WEBP", "BMP", "GIF", "MPO", "TIFF"):
        image.save(path, image_format)
        assert read_image_header(str(path))[:2] == (30, 40)
        assert read_image(str(path)).shape == (3, 30, 40)
    text = b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20))
    for content in (
        *(_png(*size, bytes(1000)) for size in ((60_000, 60_000), (2**31 - 1, 1), (4000, 4000))),
        _png(4, 4, bytes(52), [text]),
        path.read_bytes()[:900],
    ):
        path.write_bytes(content)
        rejected(path, by=lambda: read_image(str(path)))


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
