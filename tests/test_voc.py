"""plaintrain.data.datasets.voc: the reader of Pascal VOC's folders."""

import os
import re

import pytest
from hostile_helpers import rejected

from plaintrain.data.datasets.voc import load_voc
from plaintrain.structures import BoxMode


def _load(voc, split="train", classes=None, problems=None):
    return load_voc(str(voc.root), split, classes, problems)


def _rewrite(voc, old, new):
    path = voc.root / "Annotations/a.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _labels(records):
    return [[a["category_id"] for a in record["annotations"]] for record in records]


def test_records_hold_zero_based_boxes_that_include_their_last_pixels(tiny_voc):
    _rewrite(tiny_voc, "<difficult>0</difficult>", "")
    _rewrite(tiny_voc, "<xmax>20</xmax>", "<xmax> 20.5 </xmax>")
    records, metadata = _load(tiny_voc)
    assert metadata == {"thing_classes": ["ant", "cow", "zebra"]}
    keys = {"bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    # The whole image is 1..40 x 1..30 in VOC's numbers.
    zebra = {"bbox": [0, 0, 40, 30], "category_id": 2, "difficult": 0, **keys}
    ant = {"bbox": [4, 5, 20.5, 21], "category_id": 0, "difficult": 0, **keys}
    image = {"file_name": str(tiny_voc.root / "JPEGImages/a.jpg"), "image_id": "a", "height": 30, "width": 40}
    assert records[0] == {**image, "annotations": [zebra, ant]}
    assert records[1]["annotations"] == [{**ant, "bbox": [10, 11, 13, 14], "difficult": 1}]
    # One pixel has a width of 1, also the first one of files that count from 0; reversed boxes stay so.
    tiny_voc.write("a", *(tiny_voc.object("ant", *box) for box in ((5, 5, 5, 9), (0, 7, 0, 7), (2, 8, 9, 4))))
    boxes = [a["bbox"] for a in _load(tiny_voc)[0][0]["annotations"]]
    assert boxes == [[4, 4, 5, 9], [0, 6, 1, 7], [2, 8, 9, 4]]


def test_classes_of_all_splits_are_collected_and_may_be_chosen(tiny_voc, log):
    assert _load(tiny_voc, "val")[1] == {"thing_classes": ["ant", "cow", "zebra"]}
    records, metadata = _load(tiny_voc, "train", ["zebra", "cow"])
    assert metadata == {"thing_classes": ["zebra", "cow"]}
    assert _labels(records) == [[0], []]
    assert log.text == ""
    _load(tiny_voc, "train", ["ant", "zebr"])
    assert "no class 'zebr'; the nearest is 'zebra'" in log.text
    rejected("ant", "twice", by=lambda: _load(tiny_voc, "train", ["ant", "cow", "ant"]))


def test_image_names_may_hold_spaces_and_have_other_endings(tiny_voc):
    for path in (tiny_voc.root / "JPEGImages/a.jpg", tiny_voc.root / "Annotations/a.xml"):
        path.rename(path.with_stem("my picture 1"))
    (tiny_voc.root / "Annotations/b.xml").rename(tiny_voc.root / "Annotations/b.XML")
    (tiny_voc.root / "Annotations/._a.xml").write_bytes(b"\0\5\x16\7")
    (tiny_voc.root / "ImageSets/Main/train.txt").write_text("my picture 1.jpg\nb  1\n\n")
    (tiny_voc.root / "JPEGImages/b.jpg").rename(tiny_voc.root / "JPEGImages/b.Webp")
    records, _ = _load(tiny_voc)
    assert [os.path.basename(r["file_name"]) for r in records] == ["my picture 1.jpg", "b.Webp"]
    assert [r["image_id"] for r in records] == ["my picture 1", "b"]


def test_xml_is_decoded_as_marked_or_declared(tiny_voc):
    file = tiny_voc.root / "Annotations/a.xml"
    text = f"<!DOCTYPE annotation><annotation>{tiny_voc.object(chr(0x732B), 1, 1, 9, 9)}</annotation>"
    for declared, actual in (("GBK", "GBK"), ("utf-16", "utf-16"), ("utf-16", "utf-8"), ("x", "utf-8-sig")):
        file.write_bytes(f'<?xml version="1.0" encoding="{declared}"?>{text}'.encode(actual))
        assert _load(tiny_voc)[1]["thing_classes"] == ["ant", "cow", chr(0x732B)]
        file.write_bytes(_BOMB.encode(actual))
        rejected("a.xml", "DOCTYPE", by=lambda: _load(tiny_voc))


@pytest.mark.parametrize("name", ["a.jpg", "C:\\\\images\\\\a.jpg", "a.png", "a"])
def test_filename_chooses_between_two_images_of_one_name(tiny_voc, name):
    (tiny_voc.root / "JPEGImages/a.png").write_bytes((tiny_voc.root / "JPEGImages/a.jpg").read_bytes())
    _rewrite(tiny_voc, "<annotation>", f"<annotation><filename>{name}</filename>")
    if name == "a":
        rejected("JPEGImages/a.jpg and ", "JPEGImages/a.png", "a.xml", "'a'", by=lambda: _load(tiny_voc))
        problems = []
        assert [record["image_id"] for record in _load(tiny_voc, problems=problems)[0]] == ["b"]
        assert problems[0].error_type == "ambiguous"
    else:
        assert os.path.basename(_load(tiny_voc)[0][0]["file_name"]) == re.split(r"[/\\]", name)[-1]


def test_missing_files_and_folders_are_rejected(tiny_voc):
    root = tiny_voc.root
    rejected("test.txt", "train, val", by=lambda: _load(tiny_voc, "test"))
    for line in ("../../../etc/passwd", "/etc/passwd", "a\0b", "x" * 100_000, "."):
        (root / "ImageSets/Main/val.txt").write_text(line)
        rejected("val", by=lambda: _load(tiny_voc, "val"))
    (root / "ImageSets/Main/val.txt").write_text("\n")
    rejected("val.txt", "empty", by=lambda: _load(tiny_voc, "val"))
    for folder in ("Annotations", "JPEGImages", "ImageSets"):
        (root / folder).rename(root / "away")
        rejected(root / folder, by=lambda: _load(tiny_voc))
        (root / "away").rename(root / folder)
    (root / "JPEGImages/b.jpg").unlink()
    rejected("image b", "train", root / "JPEGImages", by=lambda: _load(tiny_voc))
    with (root / "Annotations/a.xml").open("wb") as f:
        f.truncate(10 << 30)
    rejected("a.xml", "bytes", by=lambda: _load(tiny_voc))
    (root / "Annotations/a.xml").unlink()
    rejected("a.xml", by=lambda: _load(tiny_voc, classes=["ant"]))


_LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(12))
_BOMB = f"<!DOCTYPE a [{_LAUGHS}]><annotation><object><name>&l11;</name></object></annotation>"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # The whole file.
        (None, "", ["not XML"]),
        (None, "<annotation>&x;</annotation>", ["not XML"]),
        (None, '<?xml version="1.0" encoding="GBX"?><annotation/>', ["not XML", "unknown encoding"]),
        (None, _BOMB, ["DOCTYPE"]),
        (None, f"<annotation>{'<object>' * 50_000}{'</object>' * 50_000}</annotation>", ["<name>"]),
        ("<name>ant</name>", "", ["<object>", "<name>"]),
        ("<ymin>6</ymin>", "", ["<bndbox>", "<ymin>"]),
        ("bndbox>", "box>", ["<object>", "<bndbox>"]),
        ("<xmax>20</xmax>", "<xmax>wide</xmax>", ["<xmax>", "'wide'", "number"]),
        ("<xmax>20</xmax>", "<xmax>1e999</xmax>", ["<xmax>", "'1e999'", "number"]),
        ("<height>30</height>", "<height>-4</height>", ["<size>", "40 x -4"]),
    ],
)
def test_broken_and_hostile_xml_is_rejected(tiny_voc, old, new, words):
    _rewrite(tiny_voc, old or (tiny_voc.root / "Annotations/a.xml").read_text(), new)
    for classes in (None, ["ant", "zebra"]):
        rejected("a.xml", *words, by=lambda classes=classes: _load(tiny_voc, "train", classes))


def test_broken_files_and_objects_are_collected_if_asked_for(tiny_voc):
    tiny_voc.write("a", tiny_voc.object("ant", 1, 1, "wide", 9), tiny_voc.object("cow", 1, 1, 9, 9))
    (tiny_voc.root / "Annotations/b.xml").write_text("<annotation>")
    (tiny_voc.root / "ImageSets/Main/train.txt").write_text("a\nb\nnone\n")
    problems = []
    records, metadata = _load(tiny_voc, problems=problems)
    assert [record["image_id"] for record in records] == ["a"]
    assert _labels(records) == [[metadata["thing_classes"].index("cow")]]
    for problem, word in zip(problems, ("'wide'", "b.xml", "image none"), strict=True):
        assert word in str(problem)


def test_bccd_is_read_with_its_two_boxes_of_one_pixel(data_root):
    records, metadata = load_voc(os.path.join(data_root, "BCCD"), "trainval")
    assert metadata == {"thing_classes": ["Platelets", "RBC", "WBC"]}
    boxes = [a["bbox"] for record in records for a in record["annotations"]]
    assert (len(records), len(boxes)) == (292, 3943)
    assert sum(x1 - x0 == y1 - y0 == 1 for x0, y0, x1, y1 in boxes) == 2
