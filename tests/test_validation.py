"""plaintrain.data.validation, scripts/check_dataset.py: mistakes in a dataset and their repair."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from detection_helpers import make_annotation, make_record
from PIL import Image
from processes import run_script
from pycocotools import mask as coco_mask

from plaintrain.data.datasets.coco import read_coco_json
from plaintrain.data.validation import PROBLEM_TYPES, Finding, check_records
from plaintrain.structures import BoxMode, encode_segmentation


def _record(*changes, image_id=1):
    # Different boxes, none of which is a duplicate.
    annotations = [make_annotation([1, 1, 9 + 2 * i, 9]) | change for i, change in enumerate(changes)]
    return make_record(image_id, *annotations) | {"height": 20, "width": 30}


def _check(*records, classes=("cat",), **metadata):
    return {f.type: f for f in check_records(records, {"thing_classes": list(classes), **metadata})}


def test_good_records_have_no_findings():
    polygon = [[1, 1, 9, 1, 9, 9]]
    rle = coco_mask.encode(np.asfortranarray(np.eye(20, 30, dtype=np.uint8)))
    good = _record(
        {"segmentation": polygon, "keypoints": [3, 4, 2, 30, 20, 1, 99, 99, 0]},
        {"segmentation": rle},
        {"segmentation": {**rle, "counts": rle["counts"].decode()}},
        {"segmentation": {"size": [20, 30], "counts": [100, 200, 300]}},
        {"bbox": [20.0, 10, 10.4, 10], "bbox_mode": BoxMode.XYWH_ABS},
        {"bbox": np.array([1.0, 2, 3, 4])},
    )
    assert _check(good, keypoint_names=["a", "b", "c"]) == {}


@pytest.mark.parametrize(
    ("kind", "annotation"),
    [
        ("bad_box", {"bbox": [1, 2, 3]}),
        ("bad_box", {"bbox": [1, 2, float("nan"), 3]}),
        ("bad_box", {"bbox": None}),
        ("empty_box", {"bbox": [5, 5, 5, 9]}),
        ("empty_box", {"bbox": [5, 5, 3, 0], "bbox_mode": BoxMode.XYWH_ABS}),
        ("outside_box", {"bbox": [30, 5, 35, 9]}),
        ("outside_box", {"bbox": [-9, 5, -1, 9]}),
        ("clipped_box", {"bbox": [20, 5, 31, 9]}),
        ("tiny_box", {"bbox": [5, 5, 6.9, 15]}),
        ("unknown_class", {"category_id": 2}),
        ("bad_polygon", {"segmentation": [[1, 1, 9, 9]]}),
        ("bad_rle", {"segmentation": {"size": [30, 20], "counts": [600]}}),
        ("bad_rle", {"segmentation": {"size": [20, 30], "counts": "h"}}),
        ("wrong_keypoints", {"keypoints": [1, 2, 2]}),
        ("wrong_keypoints", {"keypoints": [1, 2, 2, 1, 2, 5]}),
        ("outside_keypoint", {"keypoints": [1, 2, 2, 31, 2, 1]}),
    ],
)
def test_check_records_finds_mistakes_of_annotations(kind, annotation):
    good = {"category_id": 1}
    found = _check(_record({}, good, annotation), classes=["a", "b"], keypoint_names=["head", "foot"])
    assert set(found) == {kind} and found[kind].count == 1
    assert "1.jpg" in found[kind].examples[0]
    assert found[kind].fatal == PROBLEM_TYPES[kind][1]


BOX = {"bbox": [10, 2, 20, 12]}
WIDTHS = {"bbox": [0.6, 0.2, 0.9, 0.8], "bbox_mode": BoxMode.XYWH_ABS}
THIN = {**BOX, "segmentation": [[10, 2, 20, 2, 20, 2.3, 10, 2.3]]}


@pytest.mark.parametrize(
    ("count", "kind", "annotations"),
    [
        (1, "normalized_box", [BOX, WIDTHS]),
        (1, "normalized_box", [BOX, {"bbox": [-0.7, -0.8, 0.5, 0.4]}]),
        # What is left of an object at the border, and a pixel.
        *((0, "normalized_box", [{"bbox": box}]) for box in ([0, 0, 0.4, 0.7], [1, 1, 2, 2], [0, 0, 1, 1])),
        (2, "duplicate_object", [BOX, BOX, {"bbox": [10.7, 1.5, 20.2, 12]}]),
        (0, "duplicate_object", [BOX, {**BOX, "category_id": 1}, {**BOX, "iscrowd": 1}]),
        *((1, "wrong_area", [{**BOX, "area": area}]) for area in (0, 1, 400, -1)),
        *((0, "wrong_area", [{**box, "area": area}]) for box, area in ((BOX, 30), (BOX, 121), (THIN, 0))),
        *((1, "broken", [{**BOX, "area": area}]) for area in ("100", float("nan"), True)),
    ],
)
def test_contradictions_are_found(count, kind, annotations):
    findings = _check(_record(*annotations), classes=["a", "b"])
    assert (findings[kind].count if kind in findings else 0) == count
    assert set(findings) - {kind} <= {"tiny_box", "clipped_box", "unused_class", "no_boxes"}


def test_check_records_finds_mistakes_of_datasets_and_keeps_ten_examples():
    found = _check(_record({}), _record(image_id=2), _record({}), classes=["cat", "dog"])
    assert set(found) == {"no_annotations", "unused_class", "same_image_id"}
    assert found["no_annotations"].examples == ("2.jpg",)
    assert found["unused_class"].examples == ("dog",)
    assert found["same_image_id"].fatal
    assert _check()["no_images"].fatal
    assert _check(_record())["no_boxes"].fatal
    finding = _check(_record({}, *[{"bbox": [1, 1, 1, 1]}] * 12))["empty_box"]
    assert (finding.count, len(finding.examples)) == (12, 10)
    assert "boxes without area, which training drops: 12" in str(finding) and "... and 2 more" in str(finding)
    assert str(Finding("no_images", 1, (), True)).startswith("FATAL: datasets without an image")


@pytest.fixture
def declare(tmp_path):
    """Function (content, name, **spec) that writes and declares a COCO JSON of `images/`, or any dataset."""
    specs = {}

    def declare(content, name="pets", **spec):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        coco = {"FORMAT": "coco", "JSON": f"{tmp_path}/{name}.json", "IMAGE_ROOT": f"{tmp_path}/images"}
        specs[name] = {**(coco if content else {}), **spec}
        (tmp_path / "c.yaml").write_text(json.dumps({"DATASETS": {"DECLARE": specs}}))

    return declare


@pytest.fixture
def check(tmp_path):
    """Function (*arguments, code) -> (output, {kind: finding} of all datasets) that runs the script."""

    def check(*args, code=0):
        path = tmp_path / "findings.json"
        options = ["--workers", 1, "--config-file", tmp_path / "c.yaml", "--output", path]
        done = run_script("check_dataset.py", *options, *args, folder=tmp_path, code=code)
        assert "Traceback" not in done.output
        datasets = json.loads(path.read_text()) if path.exists() else {}
        return done.output, {f["kind"]: f for findings in datasets.values() for f in findings}

    return check


def _good(content):
    """The tiny dataset without its image that has no annotation."""
    content = copy.deepcopy(content)
    del content["images"][2]
    content["annotations"][2] |= {"bbox": [0, 0, 20, 30]}
    return content


TURNED = Image.Exif()
TURNED[0x0112] = 6
RAMP = (np.arange(1200) * 13).reshape(30, 40)
SPOIL = {
    "cut.png": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "gone.png": Path.unlink,
    "text.png": lambda path: path.write_text("no image"),
    "small.png": lambda path: Image.new("RGB", (20, 20)).save(path),
    # 14 bits in a 16-bit file, and a type that has no range of its own.
    "bits.png": lambda path: Image.fromarray(RAMP.astype(np.uint16)).save(path),
    "int32.png": lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path, "TIFF"),
    "turned.png": lambda path: Image.open(path).save(path, exif=TURNED),
    "good.png": lambda path: None,
}


def test_mistakes_of_images_are_found(check, declare, tiny_coco, write_image, tmp_path):
    content = _good(tiny_coco.content)
    content["images"] = []
    for i, (name, spoil) in enumerate(SPOIL.items(), start=1):
        write_image(tiny_coco.images / name, 40, 30, seed=i)
        spoil(tiny_coco.images / name)
        content["images"].append({"id": i, "file_name": name, "width": 40, "height": 30})
    box = {"category_id": 7, "bbox": [4, 5, 10.5, 8]}
    content["annotations"] = [{"id": i, "image_id": i, **box} for i in range(1, 9)]
    declare(content)
    said, found = check("pets", "--fix", tmp_path / "fixed", code=1)
    # Annotated on the stored pixels, of which the EXIF orientation makes 30x40.
    turned = _fixed(tmp_path / "fixed", tiny_coco.images)["turned.png"]
    assert (turned["width"], [a["bbox"] for a in turned["annotations"]]) == (30, [[17, 4, 8, 10.5]])
    assert "turned.png: (4.0, 5.0, 14.5, 13.0) -> (17" in (tmp_path / "fixed/changes.txt").read_text()
    declaration = yaml.safe_load(said.split("DATASETS.DECLARE:")[1].splitlines()[1])
    paths = {"JSON": f"{tmp_path}/fixed/annotations.json", "IMAGE_ROOT": str(tiny_coco.images)}
    assert declaration["pets_fixed"].items() >= {"FORMAT": "coco", **paths}.items()
    kinds = {
        "unreadable": ["cut.png", "gone.png", "text.png"],
        "wrong_size": ["small.png", "turned.png"],
        "near_constant": ["small.png", "bits.png"],
        "pixel_range": ["int32.png"],
        "turned": ["turned.png"],
    }
    for kind, names in kinds.items():
        assert found[kind]["fatal"] == (kind not in ("near_constant", "turned"))
        for example, name in zip(found[kind]["examples"], names, strict=True):
            assert name in example
    assert found.keys() - {"unused_class"} == kinds.keys()
    assert "good.png" not in said.split("cleaned copy")[0]
    assert "training would stop at the FATAL findings of pets" in said
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({**json.loads(path.read_text()), "INPUT": {"PIXEL_RANGE": [0, 16383]}}))
    assert "near_constant" not in check("pets", code=1)[1]


def _add_copy(files, content, image_id=12, bbox=(4, 5, 10.5, 8)):
    """Add copy.bmp, of the pixels of wide.png, with one object."""
    content["images"].append({"id": image_id, "file_name": "copy.bmp", "width": 40, "height": 30})
    content["annotations"].append({"id": 902, "image_id": image_id, "category_id": 7, "bbox": list(bbox)})
    Image.open(files.images / "wide.png").save(files.images / "copy.bmp")


def test_images_of_equal_pixels_are_found_in_and_between_datasets(check, declare, tiny_coco, tmp_path):
    content = _good(tiny_coco.content)
    _add_copy(tiny_coco, content)
    declare(content, "one")
    content["images"], content["annotations"] = content["images"][2:], content["annotations"][4:]
    declare(content, "two")
    _, found = check("one", "two", "--fix", tmp_path / "fixed")
    duplicate, leak = found["duplicate"], found["leak"]
    assert (duplicate["count"], leak["count"]) == (1, 1)
    for example, end in ((duplicate["examples"][0], ""), (leak["examples"][0], " of one")):
        assert "copy.bmp" in example and example.endswith(f"wide.png{end}")
    for name in ("one", "two"):
        assert (tmp_path / "fixed" / name / "annotations.json").is_file()


def test_clean_datasets_pass_and_mistakes_of_the_command_line_do_not(check, declare, tiny_coco, tmp_path):
    declare(_good(tiny_coco.content))
    declare(None, "few", FORMAT="shapes", SPLIT="val", NUM=12, HEIGHT=64, WIDTH=64)
    said, found = check("pets", "few", "--fix", tmp_path / "fixed")
    assert found == {}
    for words in ("pets: 2 images, 4 boxes", "no problems", "training would work"):
        assert words in said
    assert "no cleaned copy: the images are generated" in said
    for args, words in (
        (["petts"], ["'petts'", "pets"]),
        (["pets", "--config-file", "none.yaml"], ["none.yaml"]),
        (["pets", "pets"], ["once"]),
        (["pets", "--workers", "0"], ["--workers"]),
        (["pets", "--fix", tmp_path], ["not empty"]),
    ):
        said, _ = check(*args, code=2)
        assert [word for word in words if word not in said] == []
    (tmp_path / "pets.json").write_text("{")
    declare(None, "bad", FORMAT="cocoo")
    said, found = check("pets", "bad", "few", code=1)
    for words in ("error: the annotation file", "bad.FORMAT must be one of", "few: 12 images"):
        assert words in said


def test_fix_writes_a_cleaned_copy_that_is_clean(check, declare, tiny_coco, tmp_path):
    content = _good(tiny_coco.content)
    _add_copy(tiny_coco, content)
    content["images"].append({"id": 13, "file_name": "gone.png", "width": 9, "height": 9})
    content["images"][1]["width"] = 31
    box = {"image_id": 11, "category_id": 7, "bbox": [1, 1, 5, 5]}
    content["annotations"] += [
        {**box, "id": 200, "category_id": 99},
        {**box, "id": 201, "bbox": [1, 1, 0, 5]},
        {**box, "id": 202, "bbox": [50, 1, 5, 5]},
        {**box, "id": 202, "bbox": [30, -5, 20, 10]},
        {**box, "id": 203, "segmentation": [[1, 1, 2, 2], [1, 1, 5, 1, 5, 5]]},
        {**box, "id": 204, "bbox": [1, 1, 5, 7], "segmentation": {"size": [30, 40], "counts": [3]}},
    ]
    content["annotations"][2].pop("segmentation")
    declare(content)
    before = (tmp_path / "pets.json").read_bytes()
    said, found = check("pets", "--fix", tmp_path / "fixed", code=1)
    assert (tmp_path / "pets.json").read_bytes() == before
    assert "annotation 200" in found["unknown_class"]["examples"][0]
    assert (found["duplicate_id"]["count"], found["duplicate_id"]["fatal"]) == (1, False)
    wanted = [
        "excluded: images that are missing or cannot be read: 1",
        "copies of images dropped, whose objects are equal or a subset: 1",
        "image sizes corrected by a pixel: 1",
        "annotations dropped: boxes without area: 1",
        "annotations dropped: boxes outside their image: 1",
        "boxes clipped to their image: 1",
        "invalid polygons dropped, their boxes kept: 1",
        "malformed run-length encodings dropped, their boxes kept: 1",
        "dropped while reading: annotations with an unknown class id: 1",
        "renumbered while reading: annotations with a duplicate id: 1",
    ]
    assert [text for text in wanted if text not in said] == []
    records, metadata = read_coco_json(str(tmp_path / "fixed/annotations.json"), str(tiny_coco.images))
    assert [record["image_id"] for record in records] == [2, 11]
    assert records[0]["width"] == 30
    assert [a["bbox"] for a in records[1]["annotations"]][2:] == [[30, 0, 10, 5], [1, 1, 5, 5], [1, 1, 5, 7]]
    assert [a.get("segmentation") for a in records[1]["annotations"]][3:] == [[[1, 1, 5, 1, 5, 5]], None]
    assert check_records(records, metadata) == []
    assert all(Path(record["file_name"]).is_file() for record in records)
    ids = [a["id"] for a in json.loads((tmp_path / "fixed/annotations.json").read_text())["annotations"]]
    assert ids == list(range(1, 8))


def _fixed(folder, root):
    """Return the images and annotations of a cleaned copy, by file name."""
    records, metadata = read_coco_json(str(folder / "annotations.json"), str(root))
    assert not [f for f in check_records(records, metadata) if f.fatal]
    return {Path(r["file_name"]).name: r for r in records}


def test_fix_scales_annotations_of_resized_images(check, declare, tiny_voc, tmp_path, write_image):
    # Images that were resized after annotation, or turned or cropped; of VOC, too.
    write_image(tiny_voc.root / "JPEGImages/a.jpg", 20, 15)
    write_image(tiny_voc.root / "JPEGImages/b.jpg", 30, 40)
    declare(None, "few", FORMAT="voc", ROOT=str(tiny_voc.root), SPLIT="train")
    polygon = [2, 2, 22, 2, 22, 18, 2, 18]
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[10:30, 20:60] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"].decode()
    sizes = {"half": (40, 30), "odd": (53, 40), "twice": (160, 120), "cut": (40, 27), "turned": (60, 80)}
    images, annotations = [], []
    for i, (name, size) in enumerate({**sizes, "whole": (80, 60), "new_rle": (40, 30)}.items(), start=1):
        write_image(tmp_path / f"images/{name}.png", *size, seed=i)
        images.append({"id": i, "file_name": f"{name}.png", "width": 80, "height": 60})
        box = {"image_id": i, "category_id": 1, "bbox": [2, 2, 20, 16], "area": 320}
        annotations.append({**box, "segmentation": [polygon], "keypoints": [10, 8, 2, 0, 0, 0]})
        annotations.append({**box, "bbox": [20, 10, 40, 20], "area": 800, "segmentation": rle})
    new = coco_mask.encode(np.asfortranarray(mask[::2, ::2]))
    annotations[-1]["segmentation"] = {"size": [30, 40], "counts": new["counts"].decode()}
    annotations = [{"id": i, "iscrowd": 0, **a} for i, a in enumerate(annotations)]
    categories = [{"id": 1, "name": "cat", "keypoints": ["head", "tail"]}]
    declare({"images": images, "annotations": annotations, "categories": categories})
    said, _ = check("pets", "few", "--fix", tmp_path / "fixed", code=1)
    (voc,) = _fixed(tmp_path / "fixed/few", tiny_voc.root / "JPEGImages").values()
    assert [a["bbox"] for a in voc["annotations"]] == [[0, 0, 20, 15], [2, 2.5, 8, 8]]
    records = _fixed(tmp_path / "fixed/pets", tmp_path / "images")
    assert set(records) == {"half.png", "odd.png", "twice.png", "whole.png"}
    assert "images resized after annotation, their annotations scaled: 3" in said
    assert "excluded: rotated or cropped images, whose annotations have another shape: 3" in said
    for name in ("cut", "turned", "new_rle"):
        assert f"{name}.png: " in said.split("cleaned copy")[1]
    for name, x, y in (("half", 0.5, 0.5), ("odd", 53 / 80, 40 / 60), ("twice", 2, 2), ("whole", 1, 1)):
        record = records[f"{name}.png"]
        assert (record["width"], record["height"]) == (round(80 * x), round(60 * y))
        first, second = record["annotations"]
        assert first["bbox"] == pytest.approx([2 * x, 2 * y, 20 * x, 16 * y])
        expected = [v * (x, y)[i % 2] for i, v in enumerate(polygon)]
        assert first["segmentation"][0] == pytest.approx(expected)
        assert first["keypoints"] == pytest.approx([10.5 * x, 8.5 * y, 2, 0, 0, 0])
        assert [a["area"] for a in record["annotations"]] == pytest.approx([320 * x * y, 800 * x * y])
        rle = encode_segmentation(second["segmentation"], record["height"], record["width"])
        assert coco_mask.toBbox(rle) == pytest.approx([20 * x, 10 * y, 40 * x, 20 * y], abs=1)


def test_fix_merges_the_objects_of_a_file_that_is_listed_twice(check, declare, tiny_coco, tmp_path):
    content = _good(tiny_coco.content)
    wide = next(image for image in content["images"] if image["file_name"] == "wide.png")
    own = [a for a in content["annotations"] if a["image_id"] == wide["id"]]
    # The same file, with a size that was right before it was resized, and one of its objects again.
    content["images"].append({"id": 50, "file_name": "./wide.png", "width": 80, "height": 60})
    again = {**own[0], "id": 900, "image_id": 50, "bbox": [2 * v for v in own[0]["bbox"]]}
    again.pop("segmentation", None)
    new = {"id": 901, "image_id": 50, "category_id": own[0]["category_id"], "bbox": [20, 20, 10, 10]}
    content["annotations"] += [again, new]
    # A copy under another name: nobody knows whose objects are right.
    _add_copy(tiny_coco, content, bbox=(1, 1, 9, 9))
    declare(content)
    said, _ = check("pets", "--fix", tmp_path / "fixed", code=1)
    records = _fixed(tmp_path / "fixed", tiny_coco.images)
    boxes = [a["bbox"] for a in records["wide.png"]["annotations"]]
    assert boxes == [*(a["bbox"] for a in own), [10, 10, 5, 5]]
    assert [a["bbox"] for a in records["copy.bmp"]["annotations"]] == [[1, 1, 9, 9]]
    assert "images that are listed more than once: 1" in said
    assert "repeated entries of a file dropped, their objects merged: 1" in said
    assert "images with equal pixels but different objects, both kept: choose one by hand: 1" in said


def test_fix_assigns_no_annotation_of_an_id_that_two_images_have(check, declare, tiny_coco, tmp_path):
    content = _good(tiny_coco.content)
    first, second = (image["id"] for image in content["images"])
    content["images"][1]["id"] = first
    for annotation in content["annotations"]:
        annotation["image_id"] = first
    _add_copy(tiny_coco, content, image_id=second)
    declare(content)
    said, _ = check("pets", "--fix", tmp_path / "fixed", code=1)
    assert "FATAL: images whose annotations may belong to another image: 2" in said
    assert "(more/upright.png) is one of two images" in said
    records = _fixed(tmp_path / "fixed", tiny_coco.images)
    assert {name: len(r["annotations"]) for name, r in records.items()} == {"copy.bmp": 1}
