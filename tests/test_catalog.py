"""plaintrain.data.catalog, builtin and concat: datasets by name, by declaration, joined, and fractions."""

import json
from unittest import mock

import pytest
from hostile_helpers import rejected

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, MetadataCatalog, declare_datasets
from plaintrain.data.catalog import load_class_names
from plaintrain.data.datasets.builtin import declare_dataset, read_dataset
from plaintrain.data.datasets.coco import register_coco_instances
from plaintrain.data.datasets.shapes import load_shapes
from plaintrain.data.datasets.voc import VOC_CLASSES
from plaintrain.utils.errors import UserError


def _records(num):
    return [{"image_id": i, "file_name": str(i), "annotations": [{"bbox": [i, 2.5]}]} for i in range(num)]


def test_datasets_are_loaded_once_and_not_before_they_are_asked_for():
    load = mock.Mock(side_effect=[UserError("no disk"), _records(3)])
    DatasetCatalog.register("cells", load)
    assert not load.called
    rejected("cells", by=lambda: DatasetCatalog.register("cells", list))
    rejected("no disk", by=lambda: DatasetCatalog.get("cells"))
    # A failure is not kept, and each reader gets records of its own.
    DatasetCatalog.get("cells")[1]["annotations"].clear()
    for _ in range(2):
        assert list(DatasetCatalog.get("cells")) == _records(3)
    assert load.call_count == 2
    DatasetCatalog.remove("cells")
    DatasetCatalog.register("cells", lambda: _records(1))
    assert len(DatasetCatalog.get("cells")) == 1
    DatasetCatalog.register("my_cells_train", list)
    words = "'my_cell_train' is not registered; did you mean my_cells_train"
    rejected(words, by=lambda: DatasetCatalog.get("my_cell_train"))
    rejected("known: ", "coco_2017_train", "voc_2007_test", by=lambda: DatasetCatalog.get("#"))


@pytest.mark.parametrize(
    "name",
    ["/abs", "a/b", "..", ".a", "", "a\\b", "c:", "a\0", "a\n", "a\x1b", "\ud800", "\u202ea", "é" * 99, 3],
)
def test_names_that_are_no_names_of_files_or_classes_are_rejected(name):
    rejected("name of a dataset must be a file name", by=lambda: DatasetCatalog.register(name, list))
    DatasetCatalog.register("Größe 1.2-a_b", list)
    MetadataCatalog.get("Größe 1.2-a_b").set(thing_classes=["a/b", "é" * 999, "인", name])
    if not isinstance(name, str) or {*name} & {*"\0\n\x1b\ud800\u202e"}:
        rejected("classes of the dataset Größe", by=lambda: load_class_names("Größe 1.2-a_b"))


def test_metadata_and_class_names_come_from_what_was_set_or_from_loading():
    metadata = MetadataCatalog.get("mine").set(thing_classes=["a", "b"])
    assert metadata.set(evaluator_type="coco") is MetadataCatalog.get("mine")
    assert (metadata.thing_classes, metadata.name) == (["a", "b"], "mine")
    assert (metadata.get("evaluator_type"), metadata.get("colour", 3)) == ("coco", 3)
    with pytest.raises(AttributeError, match=r"mine.*colour"):
        _ = metadata.colour

    def load():
        MetadataCatalog.get("cells").set(thing_classes=("a", "b"))
        return []

    DatasetCatalog.register("cells", load)
    assert load_class_names("cells") == ["a", "b"]
    DatasetCatalog.register("unread", lambda: pytest.fail("loaded for nothing"))
    MetadataCatalog.get("unread").set(thing_classes=["c"])
    assert load_class_names("unread") == ["c"]
    DatasetCatalog.register("unnamed", list)
    rejected('get("unnamed").set(thing_classes=', by=lambda: load_class_names("unnamed"))


def _declare(name, spec=None, **keys):
    cfg = get_cfg()
    cfg.merge_from_other_cfg({"DATASETS": {"DECLARE": {name: spec or keys}}})
    declare_datasets(cfg)


def test_every_format_is_declared_in_a_yaml_file(tiny_coco, tiny_voc, tmp_path, monkeypatch, write_image):
    monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path))
    detection = {"image_id": 2, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.5}
    (tmp_path / "results.json").write_text(json.dumps([detection]))
    write_image(tmp_path / "yolo/images/a.png", 9, 9)
    (tmp_path / "yolo/data.yaml").write_text("val: images\nnames: [ant]\n")
    (tmp_path / "c.yaml").write_text(
        "DATASETS:\n"
        "  DECLARE:\n"
        "    pets: {FORMAT: coco, JSON: instances.json, IMAGE_ROOT: images}\n"
        "    zoo: {FORMAT: voc, ROOT: voc, SPLIT: train, YEAR: 2007}\n"
        "    drawn: {FORMAT: shapes, SPLIT: val, NUM: 4, HEIGHT: 20, WIDTH: 30, SEED: 9}\n"
        "    detected: {FORMAT: coco_results, JSON: instances.json, IMAGE_ROOT: images,\n"
        "      RESULTS: results.json, SCORE_THRESH: 0, CLASSES: [person], EVALUATOR: pascal_voc}\n"
        "    ants: {FORMAT: yolo, DATA: yolo/data.yaml, SPLIT: val}\n"
        "    images: {FORMAT: images, ROOT: yolo, CLASSES: [ant]}\n"
        "    both: {FORMAT: concat, DATASETS: [ants, images]}\n"
    )
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    declare_datasets(cfg)
    lengths = {"pets": 3, "zoo": 2, "drawn": 4, "detected": 3, "ants": 1, "images": 1, "both": 2}
    assert {name: len(DatasetCatalog.get(name)) for name in lengths} == lengths
    assert load_class_names("drawn") == ["circle", "square", "triangle"]
    assert load_class_names("both") == ["ant"]
    by_voc = [name for name in lengths if MetadataCatalog.get(name).evaluator_type == "pascal_voc"]
    assert by_voc == ["zoo", "detected"]
    assert {MetadataCatalog.get(name).evaluator_type for name in lengths} == {"pascal_voc", "coco"}
    assert MetadataCatalog.get("zoo").year == 2007
    assert list(DatasetCatalog.get("drawn")) == load_shapes("val", 4, 20, 30, seed=9)[0]
    assert DatasetCatalog.get("pets")[0]["file_name"] == str(tmp_path / "images" / "more/upright.png")
    assert [len(record["annotations"]) for record in DatasetCatalog.get("detected")] == [1, 0, 0]


def test_relative_paths_start_at_the_folder_of_datasets(tiny_coco, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path / "elsewhere"))
    images = str(tiny_coco.images)
    _declare("absolute", tiny_coco.spec)
    assert len(DatasetCatalog.get("absolute")) == 3
    _declare("relative", FORMAT="coco", JSON="instances.json", IMAGE_ROOT=images)
    rejected("elsewhere", by=lambda: DatasetCatalog.get("relative"))
    monkeypatch.delenv("PLAINTRAIN_DATASETS")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(tmp_path)
    _declare("default", FORMAT="coco", JSON="instances.json", IMAGE_ROOT=images)
    assert len(DatasetCatalog.get("default")) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    _declare("home", FORMAT="coco", JSON="~/instances.json", IMAGE_ROOT="~/images")
    assert DatasetCatalog.get("home")[0]["file_name"].startswith(images)


def test_declarations_are_used_and_may_be_repeated_but_not_changed(tiny_coco, tiny_voc):
    _declare("pets", **tiny_coco.spec, CLASSES=["dog", "cat"], KEYPOINT_FLIP_MAP=[["head", "foot"]])
    _declare("zoo", FORMAT="voc", ROOT=str(tiny_voc.root), SPLIT="train", CLASSES=["zebra"])
    for name, labels, classes in (("pets", [1, 0, 1], ["dog", "cat"]), ("zoo", [0], ["zebra"])):
        assert [a["category_id"] for r in DatasetCatalog.get(name) for a in r["annotations"]] == labels
        assert load_class_names(name) == classes
    assert MetadataCatalog.get("pets").keypoint_flip_map == [("head", "foot")]
    _declare("cells", FORMAT="shapes", SPLIT="val", NUM=3)
    _declare("cells", FORMAT="shapes", SPLIT="val", NUM=3)
    rejected("cells already exists", by=lambda: _declare("cells", FORMAT="shapes", SPLIT="val", NUM=4))
    assert len(DatasetCatalog.get("cells")) == 3
    DatasetCatalog.register("mine", list)
    rejected("mine already exists", by=lambda: _declare("mine", FORMAT="shapes", SPLIT="val"))


VOC = {"FORMAT": "voc", "ROOT": "x", "SPLIT": "y"}
COCO = {"FORMAT": "coco", "JSON": "x", "IMAGE_ROOT": "y"}
SHAPES = {"FORMAT": "shapes", "SPLIT": "val"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("voc", ["FORMAT", "'voc'"]),
        ({**VOC, "FORMAT": "vco"}, ["FORMAT", "vco", "coco", "voc", "shapes"]),
        ({"FORMAT": "voc", "ROTO": "x", "SPLIT": "y"}, ["ROTO", "ROOT"]),
        ({"FORMAT": "voc", "ROOT": "x"}, ["voc", "SPLIT"]),
        ({"FORMAT": "yolo", "DATA": "x"}, ["yolo", "SPLIT"]),
        ({**SHAPES, "NUM": True}, ["NUM", "an integer", "True"]),
        ({**VOC, "ROOT": 3}, ["ROOT", "a string", "3"]),
        ({**VOC, "SPLIT": "../../train"}, ["SPLIT", "a name", "'../../train'"]),
        ({**VOC, "CLASSES": ["yes", False]}, ["CLASSES", "False"]),
        ({**VOC, "EVALUATOR": "voc"}, ["EVALUATOR", "pascal_voc", "'voc'"]),
        ({"FORMAT": "concat", "DATASETS": [["a"]]}, ["DATASETS", "['a']"]),
        ({**COCO, "KEYPOINT_FLIP_MAP": [["left"]]}, ["KEYPOINT_FLIP_MAP", "['left']"]),
        ({**SHAPES, "FRACTION": 0.0}, [".FRACTION must be"]),
        ({**SHAPES, "FRACTION": 1.5}, [".FRACTION must be"]),
        ({**SHAPES, "FRACTION_SEED": -1}, [".FRACTION_SEED must be"]),
        ({**SHAPES, "YEAR": 2007}, ["has an unknown key YEAR; known: "]),
    ],
)
def test_bad_declarations_are_rejected(spec, words):
    rejected("DATASETS.DECLARE.cells", *words, by=lambda: _declare("cells", spec))
    assert "cells" not in DatasetCatalog


def test_read_dataset_reads_anew_and_collects_problems(tiny_coco):
    _declare("pets", tiny_coco.spec)
    _declare("both", FORMAT="concat", DATASETS=["pets"])
    del tiny_coco.content["annotations"][0]["bbox"]
    tiny_coco.save()
    problems = []
    records, metadata = read_dataset("both", problems)
    assert sum(len(record["annotations"]) for record in records) == 3
    assert metadata["thing_classes"] == ["cat", "person", "dog"]
    assert [str(problem)[:14] for problem in problems] == ["annotation 100"]
    rejected("annotation 100", by=lambda: read_dataset("pets"))
    rejected("did you mean pets", by=lambda: read_dataset("pet"))


def test_built_in_datasets_have_their_evaluators_and_classes(tiny_voc, tmp_path, monkeypatch):
    coco = [f"{name}_2017_{split}" for name in ("coco", "keypoints_coco") for split in ("train", "val")]
    voc = [f"voc_2007_{split}" for split in ("train", "val", "trainval", "test")]
    voc += [f"voc_2012_{split}" for split in ("train", "val", "trainval")]
    for names, evaluator in ((coco, "coco"), (voc, "pascal_voc"), (["shapes_train", "shapes_val"], "coco")):
        assert {MetadataCatalog.get(name).evaluator_type for name in names} == {evaluator}
        assert set(names) <= set(DatasetCatalog.list())
    assert [MetadataCatalog.get(name).year for name in voc] == [2007] * 4 + [2012] * 3
    # VOC's twenty classes in their order.
    (tmp_path / "VOC2007").symlink_to(tiny_voc.root)
    monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path))
    tiny_voc.write("a", tiny_voc.object("tvmonitor", 1, 1, 9, 9), tiny_voc.object("aeroplane", 1, 1, 9, 9))
    declare_dataset("voc_again", MetadataCatalog.get("voc_2007_train").declaration)
    assert [a["category_id"] for a in DatasetCatalog.get("voc_again")[0]["annotations"]] == [19, 0]
    assert load_class_names("voc_again") == VOC_CLASSES


@pytest.fixture
def part(tmp_path):
    """Function (name, class names, image ids) that declares a COCO dataset, an object of each class."""

    def make(name, classes, image_ids=(1, 2), first_id=1, **keys):
        images = [{"id": i, "file_name": f"{name}-{i}.png", "height": 9, "width": 9} for i in image_ids]
        categories = [{"id": first_id + i, "name": c, **keys} for i, c in enumerate(classes)]
        box = {"image_id": image_ids[0], "bbox": [1, 1, 4, 4]}
        annotations = [{"id": i, "category_id": c["id"], **box} for i, c in enumerate(categories)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        declare_dataset(name, {"FORMAT": "coco", "JSON": str(path), "IMAGE_ROOT": ""})

    return make


def _join(*names, name="both", **keys):
    declare_dataset(name, {"FORMAT": "concat", "DATASETS": list(names), **keys})
    return list(DatasetCatalog.get(name))


def _labels(records):
    return [[a["category_id"] for a in record["annotations"]] for record in records]


def test_datasets_of_equal_classes_are_joined_in_order(part):
    names = {"keypoints": ["head", "tail"], "skeleton": [[1, 2]]}
    part("one", ["cat", "dog"], (1, 2), **names)
    part("two", ["cat", "dog"], (3, 4))
    records = _join("two", "one")
    assert [record["image_id"] for record in records] == [3, 4, 1, 2]
    assert _labels(records) == [[0, 1], [], [0, 1], []]
    assert load_class_names("both") == ["cat", "dog"]
    metadata = MetadataCatalog.get("both")
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1}
    # Keypoint names are kept where they are equal, and image ids that collide get their dataset's name.
    assert (metadata.keypoint_names, metadata.skeleton) == (["head", "tail"], [[1, 2]])
    part("three", ["cat", "dog"], (2, 3), keypoints=["nose"])
    ids = [record["image_id"] for record in _join("one", "three", name="other")]
    assert ids == ["one/1", "one/2", "three/2", "three/3"]
    assert MetadataCatalog.get("other").get("keypoint_names") is None
    part("four", ["cat", "dog"], ("1", "x"))
    assert [r["image_id"] for r in _join("one", "four", name="mixed")][::2] == ["one/1", "four/1"]


def test_datasets_that_cannot_be_joined_are_rejected(part, write_image, tmp_path):
    part("one", ["cat", "dog"])
    part("two", ["cat", "cow"])
    words = "one and two", "missing ['dog']", "additional ['cow']", "MERGE_CLASSES"
    rejected(*words, by=lambda: _join("one", "two"))
    part("three", ["dog", "cat"])
    rejected("another order", by=lambda: _join("one", "three", name="reordered"))
    box = {"bbox": [1, 1, 4, 4], "bbox_mode": 0, "category_id": -1}
    record = {"file_name": "own.png", "image_id": 7, "height": 9, "width": 9, "annotations": [box]}
    DatasetCatalog.register("own", lambda: [record])
    MetadataCatalog.get("own").set(thing_classes=["cat", "dog"])
    own = {"name": "own and two", "MERGE_CLASSES": True}
    rejected("own.png has category_id -1", by=lambda: _join("own", "two", **own))
    declare_dataset("a", {"FORMAT": "concat", "DATASETS": ["one", "b"]})
    declare_dataset("b", {"FORMAT": "concat", "DATASETS": ["a"]})
    write_image(tmp_path / "images/a.png", 9, 9)
    declare_dataset("pictures", {"FORMAT": "images", "ROOT": str(tmp_path / "images")})
    for names, words in (
        (["onne"], "'onne' is not registered; did you mean one"),
        (["a"], "cycle, got a -> b -> a"),
        (["one", "one"], "distinct"),
        ([], "one or more"),
        (["pictures"], "pictures has no class names"),
    ):
        rejected(words, by=lambda names=names: _join(*names, name=f"joined {names}"))


def test_merged_classes_are_in_order_of_first_appearance_and_may_be_chosen(part, log, tiny_coco, tiny_voc):
    part("one", ["dog", "cat"], (1, 2))
    part("two", ["cow", "dog"], (3, 4), first_id=7)
    records = _join("one", "two", MERGE_CLASSES=True)
    assert load_class_names("both") == ["dog", "cat", "cow"]
    assert _labels(records) == [[0, 1], [], [2, 0], []]
    # dog is 1 there and 8 here.
    assert MetadataCatalog.get("both").thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
    part("three", ["cat", "cow"], (5, 6), first_id=2)
    _join("one", "three", name="agreeing", MERGE_CLASSES=True)
    assert MetadataCatalog.get("agreeing").thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
    # CLASSES choose and order them, and may be in no part.
    records = _join("one", "two", name="chosen", CLASSES=["dog", "catt", "cow"])
    assert load_class_names("chosen") == ["dog", "catt", "cow"]
    assert _labels(records) == [[0], [], [2, 0], []]
    assert "'catt'; the nearest is 'cat'" in log.text
    rejected("twice", by=lambda: _join("one", name="again", CLASSES=["dog", "dog"]))
    # Other formats, concatenations and registered datasets can be joined.
    register_coco_instances("pets", {}, str(tiny_coco.json), str(tiny_coco.images))
    declare_dataset("zoo", {"FORMAT": "voc", "ROOT": str(tiny_voc.root), "SPLIT": "train"})
    _join("pets", "zoo", name="inner", MERGE_CLASSES=True)
    declare_dataset("shapes", {"FORMAT": "shapes", "SPLIT": "val", "NUM": 3})
    records = _join("inner", "shapes", name="all", MERGE_CLASSES=True)
    assert len(records) == 3 + 2 + 3
    assert load_class_names("all")[:4] == ["cat", "person", "dog", "ant"]
    assert records[0]["image_id"] == "inner/pets/2"


def test_a_fraction_is_a_fixed_random_subset_in_order():
    def load(name, **keys):
        declare_dataset(name, {**SHAPES, "HEIGHT": 16, "WIDTH": 16, "NUM": 40, **keys})
        return [record["image_id"] for record in DatasetCatalog.get(name)]

    tenth, half = load("tenth", FRACTION=0.1), load("half", FRACTION=0.5)
    assert (len(tenth), len(half)) == (4, 20)
    assert half == sorted(half) != list(range(1, 21))
    assert half == load("again", FRACTION=0.5)
    assert half != load("other", FRACTION=0.5, FRACTION_SEED=1)
    assert set(tenth) < set(half)
    assert load("all", FRACTION=1) == list(range(1, 41))
    assert len(load("little", FRACTION=0.001)) == 1
    # 0.07 * 100 is 7.000000000000001.
    assert len(load("some", FRACTION=0.07, NUM=100)) == 7
