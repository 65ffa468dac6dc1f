"""plaintrain.data.voc: the reader of Pascal VOC's folders."""

import os
import re

import pytest

from plaintrain.data import DatasetCatalog, get_detection_dataset_dicts
from plaintrain.data.builtin import declare_dataset
from plaintrain.data.catalog import class_names
from plaintrain.data.voc import load_voc
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError


def _refused(voc, *words, split="train", classes=None):
    with pytest.raises(UserError) as error:
        load_voc(str(voc.root), split, classes)
    # The folder's name is the test's, and may hold any of the words.
    message = str(error.value).replace(str(voc.root), "")
    assert [word for word in words if word not in message] == []


def _rewrite(voc, old, new, stem="a"):
    path = voc.root / "Annotations" / f"{stem}.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_record_holds_the_image_and_its_boxes(tiny_voc):
    records, _ = load_voc(str(tiny_voc.root), "train")
    assert [record["image_id"] for record in records] == ["a", "b"]
    record = records[0]
    assert set(record) == {"file_name", "image_id", "height", "width", "annotations"}
    assert record["file_name"] == str(tiny_voc.root / "JPEGImages" / "a.jpg")
    assert (record["height"], record["width"]) == (30, 40)
    annotation = record["annotations"][1]
    assert annotation["bbox_mode"] == BoxMode.XYXY_ABS
    assert (annotation["category_id"], annotation["iscrowd"], annotation["difficult"]) == (0, 0, 0)


def test_boxes_count_from_one_and_include_their_last_pixels(tiny_voc):
    zebra, ant = load_voc(str(tiny_voc.root), "train")[0][0]["annotations"]
    # The whole image is 1..40 x 1..30 in VOC's numbers.
    assert zebra["bbox"] == [0, 0, 40, 30]
    assert ant["bbox"] == [4, 5, 20, 21]


def test_collected_classes_are_sorted_and_the_same_for_every_split(tiny_voc):
    for split in ("train", "val"):
        assert load_voc(str(tiny_voc.root), split)[1] == {"thing_classes": ["ant", "cow", "zebra"]}
    labels = [[a["category_id"] for a in r["annotations"]] for r in load_voc(str(tiny_voc.root), "train")[0]]
    assert labels == [[2, 0], [0]]


def test_given_classes_choose_and_order_and_leave_other_objects_out(tiny_voc):
    records, metadata = load_voc(str(tiny_voc.root), "train", ["zebra", "cow"])
    assert metadata == {"thing_classes": ["zebra", "cow"]}
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[0], []]


def test_a_class_given_twice_is_refused(tiny_voc):
    _refused(tiny_voc, "twice", "ant", classes=["ant", "cow", "ant"])


def test_a_given_class_that_no_object_has_is_refused_or_warned_of_with_the_nearest(tiny_voc, log):
    try:
        load_voc(str(tiny_voc.root), "train", ["ant", "zebr"])
        said = log.text
    except UserError as e:
        said = str(e)
    assert "'zebr'" in said
    assert "'zebra'" in said


def test_difficult_objects_are_kept_and_flagged(tiny_voc):
    records, _ = load_voc(str(tiny_voc.root), "train")
    assert [a["difficult"] for r in records for a in r["annotations"]] == [0, 0, 1]
    _rewrite(tiny_voc, "<difficult>0</difficult>", "")
    records, _ = load_voc(str(tiny_voc.root), "train")
    assert [a["difficult"] for r in records for a in r["annotations"]] == [0, 0, 1]


def test_boxes_without_area_are_kept_as_empty_then_dropped_and_counted(tiny_voc, log):
    tiny_voc.write("a", tiny_voc.object("ant", 5, 5, 5, 9), tiny_voc.object("ant", 2, 8, 9, 4))
    records, _ = load_voc(str(tiny_voc.root), "train")
    boxes = [a["bbox"] for a in records[0]["annotations"]]
    assert len(boxes) == 2
    assert all(x1 <= x0 or y1 <= y0 for x0, y0, x1, y1 in boxes)
    declare_dataset("zoo", {"FORMAT": "voc", "ROOT": str(tiny_voc.root), "SPLIT": "train"})
    assert [record["image_id"] for record in get_detection_dataset_dicts("zoo")] == ["b"]
    assert "zoo: boxes without area, which training drops: 2" in log.text
    assert "1 images without annotations" in log.text


def test_names_of_images_may_hold_spaces(tiny_voc):
    for path in (tiny_voc.root / "JPEGImages/a.jpg", tiny_voc.root / "Annotations/a.xml"):
        path.rename(path.with_stem("my picture 1"))
    (tiny_voc.root / "ImageSets/Main/train.txt").write_text("my picture 1\nb 1\n")
    assert [r["image_id"] for r in load_voc(str(tiny_voc.root), "train")[0]] == ["my picture 1", "b"]


def test_images_may_have_other_extensions_and_split_lists_a_second_column(tiny_voc):
    (tiny_voc.root / "JPEGImages/c.jpg").rename(tiny_voc.root / "JPEGImages/c.PNG")
    records, _ = load_voc(str(tiny_voc.root), "val")
    assert [record["file_name"] for record in records] == [str(tiny_voc.root / "JPEGImages/c.PNG")]


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_missing_size_is_taken_from_the_image(tiny_voc, size):
    tiny_voc.write("a", tiny_voc.object("ant", 1, 1, 9, 9), size=size)
    record = load_voc(str(tiny_voc.root), "train")[0][0]
    assert (record["height"], record["width"]) == (30, 40)


def test_a_missing_size_of_an_unreadable_image_is_refused(tiny_voc):
    tiny_voc.write("a", tiny_voc.object("ant", 1, 1, 9, 9), size="")
    (tiny_voc.root / "JPEGImages/a.jpg").write_text("no image")
    _refused(tiny_voc, "a.jpg")


@pytest.mark.parametrize("name", ["a.jpg", "images/a.jpg", "C:\\\\images\\\\a.jpg", "a.png"])
def test_of_two_files_with_the_name_of_an_annotation_its_filename_is_read(tiny_voc, monkeypatch, name):
    (tiny_voc.root / "JPEGImages/a.png").write_bytes((tiny_voc.root / "JPEGImages/a.jpg").read_bytes())
    _rewrite(tiny_voc, "<annotation>", f"<annotation><filename>{name}</filename>")
    names, listdir = [], os.listdir
    for order in (1, -1):
        monkeypatch.setattr(os, "listdir", lambda folder, order=order: sorted(listdir(folder))[::order])
        names.append(os.path.basename(load_voc(str(tiny_voc.root), "train")[0][0]["file_name"]))
    assert names == [re.split(r"[/\\]", name)[-1]] * 2


@pytest.mark.parametrize("name", ["", "a", "other.jpg"])
def test_two_files_of_which_an_annotation_names_neither_are_refused_or_collected(tiny_voc, name):
    (tiny_voc.root / "JPEGImages/a.png").write_bytes((tiny_voc.root / "JPEGImages/a.jpg").read_bytes())
    _rewrite(tiny_voc, "<annotation>", f"<annotation><filename>{name}</filename>")
    _refused(tiny_voc, "JPEGImages/a.jpg and ", "JPEGImages/a.png", "a.xml", repr(name))
    problems = []
    records, _ = load_voc(str(tiny_voc.root), "train", problems=problems)
    assert [record["image_id"] for record in records] == ["b"] and problems[0].kind == "ambiguous"


def test_a_missing_split_list_names_those_that_are_there(tiny_voc):
    _refused(tiny_voc, "test.txt", "train, val", split="test")


def test_an_empty_split_list_is_refused(tiny_voc):
    (tiny_voc.root / "ImageSets/Main/val.txt").write_text("\n")
    _refused(tiny_voc, "val.txt", "empty", split="val")


@pytest.mark.parametrize("folder", ["Annotations", "JPEGImages", "ImageSets"])
def test_a_missing_folder_is_named(tiny_voc, folder):
    (tiny_voc.root / folder).rename(tiny_voc.root / "away")
    _refused(tiny_voc, folder)


def test_a_listed_image_or_annotation_that_is_missing_is_named(tiny_voc):
    (tiny_voc.root / "JPEGImages/b.jpg").unlink()
    _refused(tiny_voc, "image b", "train", "JPEGImages")
    (tiny_voc.root / "Annotations/a.xml").unlink()
    _refused(tiny_voc, "a.xml", classes=["ant"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation><object>",
        "no XML at all",
        '<?xml version="1.0" encoding="nonsense"?><annotation/>',
        '<?xml version="1.0" encoding="GBK"?><annotation/>',
    ],
)
def test_a_broken_xml_is_named(tiny_voc, text):
    (tiny_voc.root / "Annotations/a.xml").write_text(text)
    _refused(tiny_voc, "a.xml", "XML")
    _refused(tiny_voc, "a.xml", "XML", classes=["ant"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<name>ant</name>", "", ["<object>", "<name>"]),
        ("<name>ant</name>", "<name> </name>", ["<object>", "<name>"]),
        ("<ymin>6</ymin>", "", ["<bndbox>", "<ymin>"]),
        ("<xmax>20</xmax>", "<xmax>wide</xmax>", ["<xmax>", "'wide'", "number"]),
        ("<xmax>20</xmax>", "<xmax>nan</xmax>", ["<xmax>", "'nan'", "number"]),
        ("<height>30</height>", "", ["<size>", "<height>"]),
        ("<height>30</height>", "<height>tall</height>", ["<height>", "'tall'", "number"]),
        ("<height>30</height>", "<height>nan</height>", ["<height>", "'nan'", "number"]),
        ("bndbox>", "box>", ["<object>", "<bndbox>"]),
    ],
)
def test_a_missing_tag_or_a_number_that_is_none_is_named_with_its_file(tiny_voc, old, new, words):
    _rewrite(tiny_voc, old, new)
    _refused(tiny_voc, "a.xml", *words)


def test_numbers_may_have_a_fraction(tiny_voc):
    _rewrite(tiny_voc, "<xmax>20</xmax>", "<xmax> 20.5 </xmax>")
    assert load_voc(str(tiny_voc.root), "train")[0][0]["annotations"][1]["bbox"] == [4, 5, 20.5, 21]


def test_broken_files_and_objects_are_collected_instead_if_asked_for(tiny_voc):
    tiny_voc.write("a", tiny_voc.object("ant", 1, 1, "wide", 9), tiny_voc.object("cow", 1, 1, 9, 9))
    (tiny_voc.root / "Annotations/b.xml").write_text("<annotation>")
    (tiny_voc.root / "ImageSets/Main/train.txt").write_text("a\nb\nnone\n")
    problems = []
    records, metadata = load_voc(str(tiny_voc.root), "train", problems=problems)
    assert [record["image_id"] for record in records] == ["a"]
    assert [a["category_id"] for a in records[0]["annotations"]] == [metadata["thing_classes"].index("cow")]
    said = [str(problem).replace(str(tiny_voc.root), "") for problem in problems]
    assert len(said) == 3
    assert [
        word for word, text in zip(("'wide'", "b.xml", "image none"), said, strict=True) if word not in text
    ] == []


# ---- the real blood cells


def _declare_bccd(split):
    declare_dataset(f"bccd_{split}", {"FORMAT": "voc", "ROOT": "BCCD", "SPLIT": split})
    return f"bccd_{split}"


@pytest.mark.parametrize(("split", "images"), [("train", 205), ("val", 87), ("test", 72), ("trainval", 292)])
def test_bccd_has_its_images_and_three_classes_in_every_split(data_root, split, images):
    name = _declare_bccd(split)
    assert len(DatasetCatalog.get(name)) == images
    assert class_names(name) == ["Platelets", "RBC", "WBC"]


def test_the_two_boxes_without_area_of_bccd_are_dropped_and_counted(data_root, log):
    name = _declare_bccd("trainval")
    empty = {
        record["image_id"]
        for record in DatasetCatalog.get(name)
        for x0, y0, x1, y1 in (a["bbox"] for a in record["annotations"])
        if x1 <= x0 or y1 <= y0
    }
    assert empty == {"BloodImage_00338", "BloodImage_00343"}
    records = get_detection_dataset_dicts(name)
    assert len(records) == 292
    boxes = [a["bbox"] for record in records for a in record["annotations"]]
    assert len(boxes) == 3941
    assert all(x1 > x0 and y1 > y0 for x0, y0, x1, y1 in boxes)
    assert f"{name}: boxes without area, which training drops: 2" in log.text
