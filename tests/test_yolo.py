"""plaintrain.data.datasets.yolo and folder: YOLO's text files, and folders of images."""

import pytest
from hostile_helpers import rejected
from PIL import Image

from plaintrain.data.datasets.yolo import get_label_file, load_yolo
from plaintrain.data.image_files import load_images
from plaintrain.structures import BoxMode


@pytest.fixture
def yolo(tmp_path, write_image):
    """Folder with data.yaml: train a (2 objects), b (no label file); val c. Images are 40x20."""
    root = tmp_path / "yolo"
    for seed, name in enumerate(("train/a", "train/b", "val/c")):
        write_image(root / "images" / f"{name}.png", 40, 20, seed)
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.5 0.2 0.5 0.8\n")
    (root / "labels/val/c.txt").write_text("0 0.5 0.5 1 1\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [ant, bee]\n")
    return root


def _load(root, split="train", **options):
    return load_yolo(str(root / "data.yaml"), split, **options)


def _ids(root, **options):
    return [record["image_id"] for record in _load(root, **options)[0]]


def test_boxes_and_polygons_are_in_pixels_and_their_files_beside_the_images(yolo, log):
    records, metadata = _load(yolo)
    assert metadata == {"thing_classes": ["ant", "bee"]}
    assert [(r["image_id"], r["height"], r["width"]) for r in records] == [("a", 20, 40), ("b", 20, 40)]
    assert records[0]["file_name"] == str(yolo / "images/train/a.png")
    box, polygon = records[0]["annotations"]
    keys = {"bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    assert box == {"bbox": [15, 5, 25, 15], "category_id": 1, **keys}
    outline = [pytest.approx([4, 4, 20, 4, 20, 16])]
    box = {"bbox": pytest.approx([4, 4, 20, 16]), "category_id": 0, **keys}
    assert polygon == {**box, "segmentation": outline}
    assert records[1]["annotations"] == []
    assert log.text == ""
    # An image that EXIF turns has its turned size.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(yolo / "images/train/a.jpg", exif=exif)
    (yolo / "images/train/a.png").unlink()
    record = _load(yolo)[0][0]
    assert (record["height"], record["width"]) == (40, 20)
    assert record["annotations"][0]["bbox"] == [7.5, 10, 12.5, 30]
    (yolo / "labels/train/a.txt").rename(yolo / "labels/train/a.TXT")
    assert _load(yolo)[0][0] == record
    (yolo / "labels/train/a.TXT").unlink()
    _load(yolo)
    assert f"would be {yolo}/labels/train/a.txt" in log.text
    assert get_label_file("/images/d/images/x/a.b.jpg") == "/images/d/labels/x/a.b.txt"
    assert get_label_file("/d/x/a.jpg") == "/d/x/a.txt"


def test_images_that_would_share_labels_are_rejected_or_collected(yolo, write_image):
    write_image(yolo / "images/train/b.jpg", 40, 20)
    # Without labels each is an image of its own.
    assert len(_load(yolo)[0]) == 3
    write_image(yolo / "images/train/a.jpg", 40, 20)
    words = ("images/train/a.jpg and ", "images/train/a.png", "labels/train/a.txt")
    rejected(*words, by=lambda: _load(yolo))
    problems = []
    assert [r["annotations"] for r in _load(yolo, problems=problems)[0]] == [[], []]
    assert [problem.error_type for problem in problems] == ["ambiguous"]


def test_a_split_is_a_folder_a_list_of_folders_or_a_text_file(yolo):
    (yolo / "lists").mkdir()
    (yolo / "lists/train.txt").write_text(f"../images/train/a.png\n{yolo}/images/train/b.png\n\n")
    (yolo / "l.txt").write_text("images\\train\\a.png\r\nimages/tr%61in/b.png \r\n")
    splits = ["../images/train", "[images/train]", "lists/train.txt", "l.txt"]
    for split in (*splits, "images/train\npath: yolo"):
        (yolo / "data.yaml").write_text(f"train: {split}\nnames: {{0: ant, 1: bee}}\n")
        records, _ = _load(yolo, dataset_root=str(yolo.parent))
        assert [r["image_id"] for r in records] == ["a", "b"]
        assert len(records[0]["annotations"]) == 2


def test_image_ids_are_numbers_names_or_paths(yolo):
    (yolo / "data.yaml").write_text("train: [images/train, images/val]\nnames: [ant, bee]\n")
    assert _ids(yolo) == ["a", "b", "c"]
    for old, new in (("train/a", "train/007"), ("train/b", "train/12"), ("val/c", "val/3")):
        (yolo / f"images/{old}.png").rename(yolo / f"images/{new}.png")
    assert _ids(yolo) == [7, 12, 3]
    # More digits than 64 bits hold are a name.
    (yolo / "images/val/3.png").rename(yolo / f"images/val/{'9' * 200}.png")
    assert _ids(yolo) == ["007", "12", "9" * 200]
    (yolo / f"images/val/{'9' * 200}.png").rename(yolo / "images/val/7.png")
    assert _ids(yolo) == ["images/train/007.png", "images/train/12.png", "images/val/7.png"]


def test_class_names_are_chosen_ordered_and_made_up(yolo):
    records, metadata = _load(yolo, classes=["bee"])
    assert metadata["thing_classes"] == ["bee"]
    assert [a["category_id"] for a in records[0]["annotations"]] == [0]
    rejected("'be'", "'bee'", by=lambda: _load(yolo, classes=["be"]))
    # YAML would read them as other types. By number: as text, 10 would come before 2.
    names = ["yes", "no", "08", "010", "7_50", "null", "~", "1.0", "2024-01-01", "12:30", "True", "true"]
    ids = "".join(f"\n  {i}: {names[i]}" for i in reversed(range(12)))
    for written in (f"[{', '.join(names)}]", ids):
        (yolo / "data.yaml").write_text(f"train: images/train\nnc: 12\nnames: {written}\n")
        assert _load(yolo)[1]["thing_classes"] == names
    (yolo / "data.yaml").write_text("train: images/train\nnc: 2\n")
    assert _load(yolo)[1]["thing_classes"] == ["class_0", "class_1"]


def test_broken_lines_and_files_are_rejected_or_collected(yolo):
    for line, words in (
        ("0 0.5 0.5 0.1", ["3 numbers", "4"]),
        ("0 0.5 0.5 0.1 0.1 0.9", ["5 numbers"]),
        ("2 0.5 0.5 0.1 0.1", ["class 2", "0 to 1"]),
        ("0.5 0.5 0.5 0.1 0.1", ["class 0.5"]),
        ("0,0.5,0.5,0.1,0.1", ["numbers only", "spaces"]),
        ("0 120 40 10 10", ["120", "normalized"]),
        ("0 0.5 0.5 nan 0.1", ["nan", "normalized"]),
    ):
        (yolo / "labels/train/a.txt").write_text(f"0 0.5 0.5 1 1\n{line}\n1 0.5 0.5 1 1\n")
        rejected("labels/train/a.txt, line 2", *words, by=lambda: _load(yolo))
        problems = []
        records, _ = _load(yolo, problems=problems)
        assert len(problems) == 1
        assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1]
    (yolo / "labels/train/a.txt").write_bytes(b"\xff\xfe")
    rejected("labels/train/a.txt", by=lambda: _load(yolo))
    (yolo / "images/train/b.png").write_text("no image")
    problems = []
    records, _ = _load(yolo, problems=problems)
    assert [problem.error_type for problem in problems] == ["broken", "unreadable"]
    assert [record["image_id"] for record in records] == ["a"]
    (yolo / "labels/train/a.txt").unlink()
    rejected("images/train/b.png", by=lambda: _load(yolo))
    (yolo / "data.yaml").unlink()
    rejected("data.yaml", "No such file", by=lambda: _load(yolo))


NAMES = "names: [ant, bee]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"val: images/val\n{NAMES}", ["no split 'train'", "it has val"]),
        (f"train: images/none\n{NAMES}", ["images/none"]),
        (f"train: labels\n{NAMES}", ["no image", "labels"]),
        (f"train: folder.txt\n{NAMES}", ["folder.txt"]),
        (f"path: /nowhere\ntrain: images/train\n{NAMES}", ["/nowhere", "no such folder"]),
        # Out of the folder, also by a list.
        (f"train: images/../../yolo2\n{NAMES}", ["yolo2", "outside"]),
        (f"train: list.txt\n{NAMES}", ["list.txt", "etc/passwd", "outside"]),
        (f'train: "a\\0b"\n{NAMES}', ["no folder"]),
        ("train: images/train", ["names"]),
        ("train: images/train\nnames: ['']", ["names", "list of class names"]),
        ("train: images/train\nnames: [ant, ant]", ["distinct"]),
        ("train: images/train\nnames: {1: ant, 2: bee}", ["0 to 1", "[1, 2]"]),
        ("train: images/train\nnames: [ant]\nnc: 2", ["nc: 2", "1 names"]),
        (f"train: images/train\n{NAMES}\nkpt_shape: [17, 3]", ["kpt_shape", "COCO JSON"]),
    ],
)
def test_broken_and_hostile_data_yaml_is_rejected(yolo, text, words):
    (yolo / "data.yaml").write_text(text)
    (yolo / "list.txt").write_text("images/train/a.png\n../../../../../../etc/passwd\n")
    (yolo / "folder.txt").mkdir()
    rejected(*words, by=lambda: _load(yolo))


def test_load_images_reads_a_folder_and_those_below_it_sorted(tmp_path, write_image):
    for name in ("b.png", "a.JPG", "deep/er/c.png", "._a.jpg", "__MACOSX/d.png", ".ipynb_checkpoints/e.png"):
        write_image(tmp_path / name, 30, 20)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    rejected("no image in", by=lambda: load_images(str(tmp_path / "empty")))
    rejected("no folder", "none", by=lambda: load_images(str(tmp_path / "none")))
    records, metadata = load_images(str(tmp_path))
    assert metadata == {}
    assert [record["image_id"] for record in records] == ["a.JPG", "b.png", "deep/er/c.png"]
    assert records[2].pop("file_name") == str(tmp_path / "deep/er/c.png")
    assert records[2] == {"image_id": "deep/er/c.png", "height": 20, "width": 30, "annotations": []}
    assert load_images(str(tmp_path), ["cat"])[1] == {"thing_classes": ["cat"]}
