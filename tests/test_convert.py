"""scripts/convert_dataset.py and plaintrain.data.datasets.write: any format to COCO JSON and to YOLO."""

import json
from pathlib import Path

import numpy as np
import pytest
from processes import run_script
from pycocotools import mask as coco_mask

from plaintrain.data.datasets.builtin import declare_dataset, read_dataset
from plaintrain.data.datasets.coco import read_coco_json
from plaintrain.data.datasets.write import write_coco
from plaintrain.data.datasets.yolo import get_label_file, load_yolo
from plaintrain.data.images import read_image
from plaintrain.structures import BoxMode, encode_segmentation
from plaintrain.utils.errors import UserError


@pytest.fixture
def declare(tmp_path):
    """Function (name, **spec) that declares a dataset here and in the config of `convert`."""
    specs = {}

    def declare(name, **spec):
        declare_dataset(name, spec)
        specs[name] = spec
        (tmp_path / "c.yaml").write_text(json.dumps({"DATASETS": {"DECLARE": specs}}))

    return declare


@pytest.fixture
def convert(tmp_path):
    """Function (name, format, *flags) -> (folder, output) that runs the script."""

    def convert(name, to, *flags, output=None, code=0):
        output = output or tmp_path / f"{name}-{to}"
        words = [name, "--to", to, "--output", output, "--config-file", tmp_path / "c.yaml", *flags]
        done = run_script("convert_dataset.py", *words, folder=tmp_path, code=code)
        assert "Traceback" not in done.output
        return output, done.output

    return convert


@pytest.fixture
def pets(tiny_coco, declare):
    """The tiny COCO dataset, declared as pets."""
    tiny_coco.content["categories"][2]["skeleton"] = [[1, 2]]
    tiny_coco.save()
    declare("pets", **tiny_coco.spec)
    return tiny_coco.spec


@pytest.fixture
def zoo(tiny_voc, declare):
    """The tiny VOC dataset, declared as zoo_train and zoo_val."""
    for split in ("train", "val"):
        declare(f"zoo_{split}", FORMAT="voc", ROOT=str(tiny_voc.root), SPLIT=split)


def _corners(annotation):
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


def _coco(folder, images=None):
    return read_coco_json(str(folder / "annotations.json"), str(images or folder))


def test_coco_to_coco_keeps_everything(convert, pets, tiny_coco):
    folder, said = convert("pets", "coco")
    assert f"IMAGE_ROOT {tiny_coco.images}\n" in said
    records, metadata = _coco(folder, tiny_coco.images)
    before, known = read_dataset("pets")
    for old, new in zip(before, records, strict=True):
        assert Path(new.pop("file_name")).resolve() == Path(old.pop("file_name"))
        for annotation in [*old["annotations"], *new["annotations"]]:
            # Where there was none, it is the box' or the mask's.
            annotation.pop("area", None)
        assert new == old
    assert metadata == {key: known[key] for key in metadata}
    assert metadata["skeleton"] == [[1, 2]]
    written = json.loads((folder / "annotations.json").read_text())
    assert [c["id"] for c in written["categories"]] == [3, 5, 7]
    assert [c.get("keypoints") for c in written["categories"]] == [None, ["head", "foot"], None]
    person = next(a for a in written["annotations"] if "keypoints" in a)
    assert (person["keypoints"], person["num_keypoints"]) == ([5, 6, 2, 20, 30, 1], 2)
    areas = {a["bbox"][0]: a["area"] for a in written["annotations"]}
    assert areas == {4: 84, 20: 225, 0: 600, 3: 600}
    assert not (folder / "images").exists()
    # Copied images are files of the same bytes.
    folder, _ = convert("pets", "coco", "--copy-images", output=folder.with_name("copied"))
    copy = folder / "images/wide.png"
    assert _coco(folder)[0][2]["file_name"] == str(copy)
    assert copy.read_bytes() == (tiny_coco.images / "wide.png").read_bytes()
    assert not copy.is_symlink()
    (tiny_coco.images / "wide.png").unlink()
    said = convert("pets", "coco", "--copy-images", output=folder.with_name("again"), code=1)[1]
    assert "error: cannot write" in said and "wide.png" in said and "No such file" in said


def test_voc_to_coco_and_to_yolo_keep_boxes(convert, zoo):
    folder, _ = convert("zoo_train", "coco")
    records, metadata = _coco(folder)
    before, known = read_dataset("zoo_train")
    assert metadata["thing_classes"] == known["thing_classes"]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {1: 0, 2: 1, 3: 2}
    assert [record["image_id"] for record in records] == ["a", "b"]
    for old, new in zip(before, records, strict=True):
        assert [_corners(a) for a in new["annotations"]] == [_corners(a) for a in old["annotations"]]
        difficult = [a["difficult"] for a in old["annotations"]]
        assert [a.get("difficult", 0) for a in new["annotations"]] == difficult
    # What is there is not overwritten.
    said = convert("zoo_train", "coco", code=1)[1]
    assert "error: the folder" in said and "is not empty" in said
    elsewhere = folder.with_name("elsewhere")
    convert("zoo_train", "coco", "DATASETS.DECLARE.zoo_train.SPLIT", "val", output=elsewhere)
    assert [record["image_id"] for record in _coco(elsewhere)[0]] == ["c"]
    # To YOLO with all splits.
    folder, said = convert("zoo_train", "yolo", "--val", "zoo_val")
    assert "--val NAME" not in said
    for split in ("train", "val"):
        records, metadata = load_yolo(str(folder / "data.yaml"), split)
        assert metadata["thing_classes"] == ["ant", "cow", "zebra"]
        boxes = [[_corners(a) for a in r["annotations"]] for r in read_dataset(f"zoo_{split}")[0]]
        for record, expected in zip(records, boxes, strict=True):
            assert [_corners(a) for a in record["annotations"]] == [pytest.approx(box) for box in expected]


def test_shapes_are_drawn_and_labels_found_in_folders_of_any_name(convert, declare, tmp_path, write_image):
    declare("few", FORMAT="shapes", SPLIT="val", NUM=3, HEIGHT=40, WIDTH=50)
    records, metadata = _coco(convert("few", "coco")[0])
    before, known = read_dataset("few")
    assert metadata["keypoint_names"] == known["keypoint_names"]
    for old, new in zip(before, records, strict=True):
        assert np.array_equal(read_image(new["file_name"]), read_image(old["file_name"]))
        for a, b in zip(old["annotations"], new["annotations"], strict=True):
            assert b["keypoints"] == pytest.approx(a["keypoints"])
            assert b["segmentation"] == a["segmentation"]
    folder, _ = convert("few", "yolo")
    assert [r["image_id"] for r in load_yolo(str(folder / "data.yaml"), "train")[0]] == [1, 2, 3]
    for name in ("a/images/1.png", "b/images/2.png"):
        write_image(tmp_path / "places" / name, 40, 20)
    declare("places", FORMAT="images", ROOT=str(tmp_path / "places"), CLASSES=["cat"])
    folder, _ = convert("places", "yolo")
    records, _ = load_yolo(str(folder / "data.yaml"), "train")
    assert [Path(get_label_file(record["file_name"])).is_file() for record in records] == [True, True]
    write_image(tmp_path / "places/b/images/2.bmp", 40, 20)
    said = convert("places", "yolo", output=tmp_path / "again", code=1)[1]
    assert "2.png and another image have the same label file" in said


def test_compressed_masks_scores_and_custom_areas_are_written(tmp_path):
    rle = coco_mask.encode(np.asfortranarray(np.eye(20, 30, dtype=np.uint8)))
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": "x", "image_id": 1, "height": 20, "width": 30}
    record["annotations"] = [{**box, "segmentation": rle, "score": 0.5}, {**box, "area": 3.5}]
    write_coco(tmp_path / "a.json", [record], {"thing_classes": ["cat"]}, ["x.png"])
    first, second = read_coco_json(str(tmp_path / "a.json"), "")[0][0]["annotations"]
    assert first["segmentation"] == {"size": [20, 30], "counts": rle["counts"].decode()}
    assert (first["area"], first["score"], second["area"]) == (20, 0.5, 3.5)
    record["annotations"][0]["segmentation"] = [[1, 2]]
    with pytest.raises(UserError, match="an annotation of x: it has a polygon"):
        write_coco(tmp_path / "b.json", [record], {"thing_classes": ["cat"]}, ["x.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]


def test_coco_to_yolo_writes_labels_links_and_data_yaml(convert, pets, tiny_coco):
    folder, said = convert("pets", "yolo")
    names = "names:\n  0: cat\n  1: person\n  2: dog\n"
    assert (folder / "data.yaml").read_text() == f"train: images/train\n{names}"
    assert (folder / "labels/train/wide.txt").read_text().splitlines() == [
        "2 0.23125 0.3 0.2625 0.2666666667",
        "0 0.5 0.3333333333 0.875 0.3333333333 0.875 0.8333333333 0.5 0.8333333333",
    ]
    assert (folder / "labels/train/empty.txt").read_text() == ""
    assert (folder / "labels/train/more/upright.txt").read_text().count("\n") == 1
    assert (folder / "images/train/wide.png").readlink() == tiny_coco.images / "wide.png"
    for text in (
        "crowd regions, skipped as in Ultralytics: 1",
        "objects with keypoints, written without them: 1",
        "label files with boxes and polygons",
        "category ids [3, 5, 7] become 0 to 2",
        "--val NAME",
    ):
        assert text in said
    folder, said = convert("pets", "yolo", "--boxes", output=folder.with_name("boxes"))
    lines = (folder / "labels/train/wide.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [5, 5]
    assert "misreads" not in said


def test_annotations_that_yolo_cannot_hold_are_counted(convert, pets, tiny_coco):
    extra = {"image_id": 11, "category_id": 7}
    rle = {"size": [30, 40], "counts": [100, 10, 1090]}
    parts = [[2, 2, 10, 2, 10, 10, 2, 10], [20, 12, 30, 12, 30, 20, 20, 20], [5, 20, 9, 20, 9, 28]]
    tiny_coco.content["annotations"] += [
        {**extra, "id": 1, "bbox": [1, 1, 0, 5]},
        {**extra, "id": 2, "bbox": [30, 20, 20, 20], "difficult": 1},
        {**extra, "id": 3, "bbox": [1, 1, 5, 5], "segmentation": rle, "score": 0.5},
        {**extra, "id": 4, "bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 5, 1, 50, 5]]},
        {**extra, "id": 5, "bbox": [2, 2, 28, 26], "segmentation": parts},
    ]
    tiny_coco.save()
    folder, said = convert("pets", "yolo")
    for text in (
        "boxes without area inside their image, skipped: 1",
        "objects beyond the image border, clipped to it: 2",
        "RLE masks, written as boxes: 1",
        "objects marked difficult, written without the mark: 1",
        "objects with a score, written without it: 1",
        "masks of several polygons, written as one polygon joined by zero-width lines: 1",
    ):
        assert text in said
    annotations = load_yolo(str(folder / "data.yaml"), "train")[0][2]["annotations"]
    assert _corners(annotations[2]) == pytest.approx([30, 20, 40, 30])
    assert _corners(annotations[3]) == pytest.approx([1, 1, 6, 6])
    assert "segmentation" not in annotations[3]
    # The lines that join the parts of a mask may touch single pixels.
    (outline,) = annotations[5]["segmentation"]
    masks = [coco_mask.decode(encode_segmentation(s, 30, 40)) for s in (parts, [outline])]
    assert np.logical_and(*masks).sum() / np.logical_or(*masks).sum() > 0.95


def test_mistakes_write_nothing(convert, declare, pets, zoo, tiny_coco):
    declare("pictures", FORMAT="images", ROOT=str(tiny_coco.images))
    declare("again", **pets, FRACTION=0.99)
    declare("both", FORMAT="concat", DATASETS=["pets", "again"])
    for name, flags, code, words in (
        ("pet", (), 1, "did you mean pets"),
        ("pets", ("--val", "zoo_val"), 1, "pets and zoo_val have different classes"),
        ("pictures", (), 1, "pictures names no classes"),
        ("both", (), 1, "same image file"),
    ):
        folder, said = convert(name, "yolo", *flags, code=code)
        assert "error: " in said and words in said
        assert not (folder / "data.yaml").exists()
    said = convert("pets", "coco", output=tiny_coco.json, code=1)[1]
    assert "cannot create the folder" in said
    assert "--boxes need --to yolo" in convert("pets", "coco", "--boxes", code=2)[1]
