"""Files made to run code, to fill the memory, to hang or to lead elsewhere: one clear error each, soon."""

import io
import os
import pickle
import zipfile

import pytest
import torch
from hostile_helpers import merge, rejected
from PIL import Image

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.pretrained import read_state_dict
from plaintrain.config import get_cfg
from plaintrain.config.yaml import parse_yaml
from plaintrain.data.datasets.coco import load_coco_json, load_coco_results
from plaintrain.data.datasets.voc import load_voc
from plaintrain.data.datasets.yolo import load_yolo
from plaintrain.data.image_files import image_header
from plaintrain.data.images import read_image


class Evil(str):
    """The path of a folder; pickled, it makes the folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_checkpoints_that_run_code_or_lead_elsewhere_are_rejected(tmp_path):
    evil, model = Evil(tmp_path / "touched"), {"a": torch.zeros(1)}
    for name, content, save in (
        ("w.pth", evil, torch.save),
        ("w.pth", {"model": evil}, pickle.dump),
        ("w.pkl", {"model": model, "class_names": evil}, pickle.dump),
        ("w.pt", {"model": model, "class_names": evil}, torch.save),
    ):
        path = tmp_path / name
        with path.open("wb") as f:
            save(content, f)
        rejected(path, by=lambda path=path: read_state_dict(str(path)))
        assert not (tmp_path / "touched").exists()
    model = torch.nn.Linear(1, 1)
    content = {"model": model.state_dict(), "iteration": 3, "extra": Evil(tmp_path / "touched")}
    torch.save(content, tmp_path / "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    rejected("model_0000003.pth", "could run code", by=lambda: checkpointer.resume_or_load("", resume=True))
    assert not (tmp_path / "touched").exists()
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": {}}, tmp_path / "model_0000001.pth")
    (folder / "last_checkpoint").write_text("../model_0000001.pth")
    assert DetectionCheckpointer(torch.nn.Linear(1, 1), str(folder)).get_checkpoint_file() == ""


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
    rejected(path, "PostScript", by=lambda: image_header(str(path)))


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
    with path.open("wb") as f:
        f.truncate(10 << 30)
    rejected(path, "bytes", by=lambda: merge(path))
    rejected(path, "bytes", by=lambda: load_yolo(str(path), "train"))
    # Ordinary aliases, a byte order mark and CRLF are read.
    path.unlink()
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
        image_header,
        lambda p: load_coco_json(p, ""),
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
