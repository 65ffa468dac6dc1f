"""Files made to run code, to fill the memory, to hang or to lead elsewhere: one clear error each, soon."""

import io
import os
import pickle
import zipfile

import pytest
import torch
from hostile_helpers import merge, refused
from PIL import Image

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.data.builtin import declare_dataset
from plaintrain.data.coco import load_coco_json, load_coco_results
from plaintrain.data.folder import image_header
from plaintrain.data.images import read_image
from plaintrain.data.voc import load_voc
from plaintrain.data.yolo import load_yolo
from plaintrain.evaluation.predictions import read_predictions
from plaintrain.utils.yaml_files import parse_yaml
from plaintrain.weights import read_state_dict

# ---- files that would run code


class Evil:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.pt"])
@pytest.mark.parametrize("where", ["whole", "model", "class_names"])
@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_weights_that_would_run_code_are_refused(tmp_path, name, where, write):
    evil = Evil(tmp_path / "touched")
    content = evil if where == "whole" else {"model": {"a": torch.zeros(1)}, where: evil}
    path = tmp_path / name
    if write == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    refused(path, by=lambda: read_state_dict(str(path)))
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_that_would_run_code_is_not_resumed_from(tmp_path):
    model = torch.nn.Linear(1, 1)
    content = {"model": model.state_dict(), "iteration": 3, "extra": Evil(tmp_path / "touched")}
    torch.save(content, tmp_path / "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    refused("model_0000003.pth", "could run code", by=lambda: checkpointer.resume_or_load("", resume=True))
    assert not (tmp_path / "touched").exists()


def test_last_checkpoint_cannot_lead_out_of_its_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": {}}, tmp_path / "model_0000001.pth")
    (folder / "last_checkpoint").write_text("../model_0000001.pth")
    assert DetectionCheckpointer(torch.nn.Linear(1, 1), str(folder)).get_checkpoint_file() == ""


_TAGS = [
    "!!python/object/apply:os.mkdir ['{0}']",
    "!!python/object/new:os.mkdir ['{0}']",
    "!!python/name:os.mkdir ''",
    "!!python/module:antigravity ''",
]


@pytest.mark.parametrize("tag", _TAGS)
@pytest.mark.parametrize("kind", ["config", "base", "yolo", "key"])
def test_yaml_that_would_run_code_is_refused(tmp_path, tag, kind):
    tag = tag.format(tmp_path / "touched")
    path = tmp_path / "c.yaml"
    path.write_text(f"? {tag}\n: 1\n" if kind == "key" else f"names: {tag}\n")
    config = path
    if kind == "base":
        config = tmp_path / "top.yaml"
        config.write_text("_BASE_: c.yaml\n")
    read = (lambda: load_yolo(str(path), "train")) if kind == "yolo" else (lambda: merge(config))
    refused(path, "python tag would run code", by=read)
    assert not (tmp_path / "touched").exists()


def test_a_python_config_is_not_run(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(f"import os\nos.mkdir('{tmp_path}/touched')\ncfg = {{}}\n")
    refused(path, by=lambda: merge(path))
    assert not (tmp_path / "touched").exists()


def test_postscript_named_as_a_photo_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    path = tmp_path / "a.jpg"
    Image.new("RGB", (20, 20)).save(path, "EPS")
    refused(path, "PostScript", by=lambda: read_image(str(path)))
    refused(path, "PostScript", by=lambda: image_header(str(path)))


def test_annotations_and_predictions_are_data_only(tmp_path, tiny_coco):
    # A pickle where JSON is expected.
    path = tmp_path / "found.json"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "touched")))
    declare_dataset(
        "pets", {"FORMAT": "coco", "JSON": str(tiny_coco.json), "IMAGE_ROOT": str(tiny_coco.images)}
    )
    refused(path, by=lambda: read_predictions(str(path), "pets"))
    refused(path, by=lambda: load_coco_json(str(path), ""))
    assert not (tmp_path / "touched").exists()


# ---- weights that fill the memory


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    bomb, plain = tmp_path / "w.pth", io.BytesIO()
    torch.save({"a": torch.zeros(100)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            is_data = entry.filename.endswith("data/0")
            target.writestr(entry.filename, bytes(64 << 20) if is_data else source.read(entry))
    assert bomb.stat().st_size < 1 << 20
    refused(bomb, "unpacks to 67,", by=lambda: read_state_dict(str(bomb)))


# ---- YAML


def _aliases(levels, flow="[{}]"):
    lines = ["a0: &a0 " + flow.format("x: 1" if flow != "[{}]" else "x")]
    refer = "<<: [{}]" if flow != "[{}]" else "{}"
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} " + flow.format(refer.format(", ".join([f"*a{i - 1}"] * 9))))
    return "\n".join(lines)


YAML_BOMBS = {
    "aliases": (_aliases(30), "values"),
    "merges": (_aliases(30, "{{{}}}"), "values"),
    "itself": ("a: &a [*a]", "levels"),
    "chain": ("a0: &a0 x\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 3000)), "levels"),
    "brackets": ("a: " + "[" * 300_000, "deep"),
    "closed": ("a: " + "[" * 60 + "]" * 60, "deep"),
    "braces": ("{a: " * 50_000, "deep"),
    "dashes": ("- " * 200_000, "deep"),
    "sixties": ("a: " + "1:" * 200_000 + "1", "64 bits"),
    "float": ("a: " + "1:" * 200_000 + "1.5", "64 bits"),
    "digits": ("SEED: " + "9" * 100_000, "64 bits"),
    "hex": ("SEED: 0x" + "f" * 100_000, "64 bits"),
    "twice": ("SEED: 1\nSEED: 2", "twice"),
    "date": ("a: 2001-99-99", "YAML"),
    "tag": ("a: !!timestamp x", "YAML"),
    "map": ("a: !!map [b]", "mapping"),
    "int": ("a: !!int ''", "YAML"),
    "unhashable": ("? [a]\n: b", "unhashable"),
    "list": ("[1, 2]", "KEY: value"),
    "word": ("yes", "KEY: value"),
    "two": ("a: 1\n---\nb: 2", "YAML"),
    "nul": ("a: b\0c", "YAML"),
    "number": ("1: 2", "unknown key 1"),
    "null": ("null: 2", "unknown key None"),
    "pair": ("? !!python/tuple [a, b]\n: 2", "python tag"),
}


@pytest.mark.parametrize("kind", YAML_BOMBS)
def test_yaml_bombs_and_broken_yaml_are_refused(tmp_path, kind):
    text, word = YAML_BOMBS[kind]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    refused(path, word, by=lambda: merge(path))


def test_yaml_of_many_bytes_is_not_read(tmp_path):
    path = tmp_path / "c.yaml"
    with path.open("wb") as f:
        f.truncate(10 << 30)
    refused(path, "bytes", by=lambda: merge(path))
    refused(path, "bytes", by=lambda: load_yolo(str(path), "train"))


def test_ordinary_aliases_a_byte_order_mark_and_crlf_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfINPUT:\r\n  MIN_SIZE_TRAIN: &s [600, 700]\r\n  MIN_SIZE_TEST: 5\r\n")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (600, 700)
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a}\nd: [*a, *a]", "x")["d"] == [{"b": 1}] * 2


@pytest.mark.parametrize("data", [b"\xff\xfeS\x00E\x00", b"SEED: \xe9", b"\x80\x04\x95", bytes(range(256))])
def test_a_config_that_is_no_text_is_refused(tmp_path, data):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xfe" + data)
    refused(path, by=lambda: merge(path))


def test_bases_in_a_circle_in_a_long_chain_and_by_the_billion_are_refused(tmp_path):
    for name, base in {"a": "b", "b": "sub/../a", "self": "self"}.items():
        (tmp_path / name).write_text(f"_BASE_: {base}\n")
    (tmp_path / "sub").mkdir()
    refused("goes round in a circle", "a -> ", by=lambda: merge(tmp_path / "a"))
    refused("goes round in a circle", by=lambda: merge(tmp_path / "self"))
    for i in range(3000):
        (tmp_path / f"c{i}").write_text(f"_BASE_: c{i + 1}\n")
    refused("100 files", by=lambda: merge(tmp_path / "c0"))
    for i in range(40):
        (tmp_path / f"d{i}").write_text(f"_BASE_: [d{i + 1}, d{i + 1}]\n")
    (tmp_path / "d40").write_text("SEED: 1\n")
    refused("100 files", by=lambda: merge(tmp_path / "d0"))
    (tmp_path / "z").write_text('_BASE_: "a\\0b"\n')
    refused("not found", by=lambda: merge(tmp_path / "z"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.BASE_LR", "1" + "0" * 400),
        ("SEED", "0x" + "f" * 9000),
        ("SEED", "-" * 100_000 + "1"),
        ("INPUT.MIN_SIZE_TRAIN", "(" * 90 + "{[]: 1}" + ")" * 90),
        ("SOLVER.STEPS", "[" * 5000),
        ("SOLVER.STEPS", "__import__('os').mkdir('/tmp/touched')"),
        ("DATASETS.DECLARE.__immutable__", "1"),
        ("__class__", "1"),
        ("a" * 100_000, "1"),
        ("SEED\n", "1"),
        ("", "1"),
    ],
)
def test_hostile_overrides_are_refused(key, value):
    refused("command line", by=lambda: get_cfg().merge_from_list([key, value]))


# ---- what is no file


NO_FILES = ["fifo", "loop", "folder", "device", "dangling"]


def _no_file(path, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        targets = {"loop": path, "device": "/dev/zero", "dangling": path.parent / "gone"}
        path.symlink_to(targets[kind])


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path, tiny_coco, tiny_voc, write_image, kind):
    path = tmp_path / "odd.yaml"
    _no_file(path, kind)
    for read in (
        merge,
        read_state_dict,
        read_image,
        image_header,
        lambda p: load_coco_json(p, ""),
        lambda p: load_coco_results(str(tiny_coco.json), "", p),
        lambda p: load_yolo(p, "train"),
    ):
        refused(path, by=lambda read=read: read(str(path)))
    xml = tiny_voc.root / "Annotations/a.xml"
    xml.unlink()
    _no_file(xml, kind)
    refused(xml, by=lambda: load_voc(str(tiny_voc.root), "train"))
    split = tiny_voc.root / "ImageSets/Main/odd.txt"
    _no_file(split, kind)
    refused(split, by=lambda: load_voc(str(tiny_voc.root), "odd"))
    write_image(tmp_path / "y/images/a.png", 20, 20)
    (tmp_path / "y/data.yaml").write_text("train: images\nnames: [a]\n")
    (tmp_path / "y/labels").mkdir()
    _no_file(tmp_path / "y/labels/a.txt", kind)
    refused(tmp_path / "y/labels/a.txt", by=lambda: load_yolo(str(tmp_path / "y/data.yaml"), "train"))
