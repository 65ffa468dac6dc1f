"""plaintrain.data.catalog and builtin: datasets by name, and by declaration."""

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch.multiprocessing  # noqa: F401 - it teaches ForkingPickler tensors
from torch.utils.data import DataLoader

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, MetadataCatalog, declare_datasets
from plaintrain.data.builtin import declare_dataset, read_dataset
from plaintrain.data.catalog import SerializedRecords, class_names, select_classes
from plaintrain.data.shapes import load_shapes
from plaintrain.data.voc import VOC_CLASSES
from plaintrain.utils.errors import UserError


def _records(num):
    return [{"image_id": i, "file_name": "ü" * i, "annotations": [{"bbox": [i, 2.5]}]} for i in range(num)]


# ---- the catalogs


def test_a_name_can_be_registered_once():
    DatasetCatalog.register("cells", list)
    with pytest.raises(UserError, match="cells"):
        DatasetCatalog.register("cells", list)


def test_a_dataset_is_loaded_once_and_not_before_it_is_asked_for():
    calls = []
    DatasetCatalog.register("cells", lambda: calls.append(1) or _records(3))
    assert not calls
    for _ in range(3):
        assert list(DatasetCatalog.get("cells")) == _records(3)
    assert len(calls) == 1


def test_changing_a_record_changes_no_one_elses():
    DatasetCatalog.register("cells", lambda: _records(3))
    DatasetCatalog.get("cells")[1]["annotations"].clear()
    assert DatasetCatalog.get("cells")[1] == _records(3)[1]


def test_a_dataset_that_could_not_be_read_is_tried_again():
    answers = [UserError("no disk"), _records(1)]

    def load():
        answer = answers.pop(0)
        if isinstance(answer, UserError):
            raise answer
        return answer

    DatasetCatalog.register("cells", load)
    with pytest.raises(UserError, match="no disk"):
        DatasetCatalog.get("cells")
    assert len(DatasetCatalog.get("cells")) == 1


def test_an_unknown_name_is_answered_with_the_nearest():
    DatasetCatalog.register("my_cells_train", list)
    with pytest.raises(UserError, match="'my_cell_train' is not registered; did you mean my_cells_train"):
        DatasetCatalog.get("my_cell_train")


def test_a_name_like_no_other_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"known: .*coco_2017_train.*voc_2007_test"):
        DatasetCatalog.get("#")


def test_a_removed_dataset_is_gone_with_its_records():
    DatasetCatalog.register("cells", lambda: _records(3))
    DatasetCatalog.get("cells")
    DatasetCatalog.remove("cells")
    assert "cells" not in DatasetCatalog
    assert "cells" not in DatasetCatalog.list()
    DatasetCatalog.register("cells", lambda: _records(1))
    assert len(DatasetCatalog.get("cells")) == 1


def test_metadata_holds_what_was_set_and_names_what_is_missing():
    metadata = MetadataCatalog.get("cells").set(thing_classes=["a", "b"])
    assert metadata.set(evaluator_type="coco") is MetadataCatalog.get("cells")
    assert metadata.thing_classes == ["a", "b"]
    assert metadata.get("evaluator_type") == "coco"
    assert metadata.get("colour") is None
    assert metadata.get("colour", 3) == 3
    assert metadata.name == "cells"
    with pytest.raises(AttributeError, match=r"cells.*colour"):
        _ = metadata.colour


def test_class_names_come_from_the_metadata_or_from_loading_the_dataset():
    def load():
        MetadataCatalog.get("cells").set(thing_classes=("a", "b"))
        return []

    DatasetCatalog.register("cells", load)
    assert class_names("cells") == ["a", "b"]
    DatasetCatalog.register("unread", lambda: pytest.fail("loaded for nothing"))
    MetadataCatalog.get("unread").set(thing_classes=["c"])
    assert class_names("unread") == ["c"]


def test_a_dataset_without_class_names_is_told_how_to_give_them():
    DatasetCatalog.register("cells", list)
    with pytest.raises(UserError, match=r'MetadataCatalog.get\("cells"\).set\(thing_classes='):
        class_names("cells")


def test_select_classes_keeps_the_wanted_order_and_refuses_typos_and_doubles():
    found = ["cat", "dog", "person"]
    assert select_classes(found, None, "f") == select_classes(found, [], "f") == found
    assert select_classes(found, ["person", "cat"], "f") == ["person", "cat"]
    with pytest.raises(UserError, match="f has no class 'persn'; the nearest is 'person'"):
        select_classes(found, ["persn"], "f")
    with pytest.raises(UserError, match="twice"):
        select_classes(found, ["cat", "cat"], "f")


# ---- records in one block of bytes


def test_serialized_records_read_like_the_list_they_hold():
    plain, packed = _records(5), SerializedRecords(_records(5))
    assert len(packed) == 5
    assert list(packed) == plain
    assert [packed[i] for i in range(-5, 5)] == [plain[i] for i in range(-5, 5)]
    for part in (slice(1, 3), slice(None, None, -1), slice(-2, None), slice(3, 99), slice(4, 1)):
        assert packed[part] == plain[part]
    for index in (5, -6):
        with pytest.raises(IndexError):
            packed[index]


def test_no_records_are_records_too():
    packed = SerializedRecords([])
    assert len(packed) == 0
    assert list(packed) == []
    with pytest.raises(IndexError):
        packed[0]


def test_serialized_records_reach_spawned_and_forked_workers_whole():
    packed = SerializedRecords(_records(7))
    assert list(pickle.loads(pickle.dumps(packed))) == _records(7)  # noqa: S301 - own bytes
    # How a spawned worker gets it: the bytes stay in shared memory and are not sent.
    sent = bytes(ForkingPickler.dumps(SerializedRecords([{"text": "x" * 10**6}])))
    assert len(sent) < 10_000
    received = pickle.loads(sent)  # noqa: S301 - own bytes
    assert received[0] == {"text": "x" * 10**6}
    loader = DataLoader(packed, batch_size=None, collate_fn=lambda record: record, num_workers=1)
    assert list(loader) == _records(7)


# ---- declarations


def _declare(name, **spec):
    cfg = get_cfg()
    cfg.merge_from_other_cfg({"DATASETS": {"DECLARE": {name: spec}}})
    declare_datasets(cfg)
    return cfg


def test_datasets_are_declared_in_a_yaml_file(tiny_coco, tiny_voc, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        "DATASETS:\n"
        "  DECLARE:\n"
        "    one: {FORMAT: coco, JSON: instances.json, IMAGE_ROOT: images}\n"
        "    two: {FORMAT: voc, ROOT: voc, SPLIT: train}\n"
        "    three: {FORMAT: shapes, SPLIT: val, NUM: 4, HEIGHT: 20, WIDTH: 30, SEED: 9}\n"
    )
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    declare_datasets(cfg)
    assert [len(DatasetCatalog.get(name)) for name in ("one", "two", "three")] == [3, 2, 4]
    assert class_names("one") == ["cat", "person", "dog"]
    assert class_names("two") == ["ant", "cow", "zebra"]
    assert class_names("three") == ["circle", "square", "triangle"]
    scored = [MetadataCatalog.get(name).evaluator_type for name in ("one", "two", "three")]
    assert scored == ["coco", "pascal_voc", "coco"]
    assert list(DatasetCatalog.get("three")) == load_shapes("val", 4, 20, 30, seed=9)[0]
    assert DatasetCatalog.get("one")[0]["file_name"] == str(tmp_path / "images" / "more/upright.png")


def test_relative_paths_start_at_the_root_of_the_datasets_and_absolute_ones_do_not(
    tiny_coco, tmp_path, monkeypatch
):
    monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path / "elsewhere"))
    images = str(tiny_coco.images)
    _declare("absolute", FORMAT="coco", JSON=str(tiny_coco.json), IMAGE_ROOT=images)
    assert len(DatasetCatalog.get("absolute")) == 3
    _declare("relative", FORMAT="coco", JSON="instances.json", IMAGE_ROOT=images)
    with pytest.raises(UserError, match="elsewhere"):
        DatasetCatalog.get("relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    _declare("home", FORMAT="coco", JSON="~/instances.json", IMAGE_ROOT="~/images")
    assert DatasetCatalog.get("home")[0]["file_name"].startswith(images)


def test_without_the_variable_datasets_are_looked_for_in_a_folder_datasets(tiny_voc, tmp_path, monkeypatch):
    monkeypatch.delenv("PLAINTRAIN_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(tmp_path)
    _declare("cells", FORMAT="voc", ROOT="voc", SPLIT="val")
    assert len(DatasetCatalog.get("cells")) == 1


def test_declared_classes_choose_and_order(tiny_coco, tiny_voc):
    coco = {"FORMAT": "coco", "JSON": str(tiny_coco.json), "IMAGE_ROOT": str(tiny_coco.images)}
    _declare("one", **coco, CLASSES=["dog", "cat"])
    _declare("two", FORMAT="voc", ROOT=str(tiny_voc.root), SPLIT="train", CLASSES=["zebra"])
    for name, labels in (("one", [1, 0, 1]), ("two", [0])):
        assert [a["category_id"] for r in DatasetCatalog.get(name) for a in r["annotations"]] == labels
    assert class_names("one") == ["dog", "cat"]
    assert class_names("two") == ["zebra"]
    assert MetadataCatalog.get("one").thing_dataset_id_to_contiguous_id == {7: 0, 3: 1}


def test_a_declaration_can_name_its_evaluator_and_the_year():
    _declare("one", FORMAT="shapes", SPLIT="val", EVALUATOR="pascal_voc")
    _declare("two", FORMAT="voc", ROOT="x", SPLIT="val", EVALUATOR="coco", YEAR=2007)
    assert MetadataCatalog.get("one").evaluator_type == "pascal_voc"
    assert MetadataCatalog.get("two").evaluator_type == "coco"
    assert MetadataCatalog.get("two").year == 2007


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"FORMAT": "vco", "ROOT": "x", "SPLIT": "y"}, ["FORMAT", "vco", "coco", "voc", "shapes"]),
        ({"ROOT": "x", "SPLIT": "y"}, ["FORMAT", "coco", "voc", "shapes"]),
        ({"FORMAT": ["voc"], "ROOT": "x", "SPLIT": "y"}, ["FORMAT", "voc"]),
        ({"FORMAT": "voc", "ROTO": "x", "SPLIT": "y"}, ["ROTO", "ROOT"]),
        ({"FORMAT": "voc", "ROOT": "x", "SPLIT": "y", "JSON": "z"}, ["JSON", "ROOT"]),
        ({"FORMAT": "voc", "ROOT": "x"}, ["voc", "SPLIT"]),
        ({"FORMAT": "coco", "IMAGE_ROOT": "x"}, ["coco", "JSON"]),
        ({"FORMAT": "coco", "JSON": "x"}, ["coco", "IMAGE_ROOT"]),
        ({"FORMAT": "shapes"}, ["shapes", "SPLIT"]),
        ({"FORMAT": "shapes", "SPLIT": "val", "NUM": "many"}, ["NUM", "a whole number", "many"]),
        ({"FORMAT": "shapes", "SPLIT": "val", "NUM": True}, ["NUM", "a whole number", "True"]),
        ({"FORMAT": "voc", "ROOT": 3, "SPLIT": "y"}, ["ROOT", "a string", "3"]),
        ({"FORMAT": "voc", "ROOT": "x", "SPLIT": "y", "CLASSES": "RBC"}, ["CLASSES", "list", "RBC"]),
        (
            {"FORMAT": "voc", "ROOT": "x", "SPLIT": "y", "EVALUATOR": "voc"},
            ["EVALUATOR", "pascal_voc", "'voc'"],
        ),
        ({"FORMAT": "coco_results", "JSON": "x", "IMAGE_ROOT": "y"}, ["coco_results", "RESULTS"]),
        (
            {"FORMAT": "coco_results", "JSON": "x", "IMAGE_ROOT": "y", "RESULTS": "z", "SCORE_THRESH": "a"},
            ["SCORE_THRESH", "a number"],
        ),
        ({"FORMAT": "yolo", "DATA": "x"}, ["yolo", "SPLIT"]),
        ({"FORMAT": "images"}, ["images", "ROOT"]),
        ({"FORMAT": "concat"}, ["concat", "DATASETS"]),
        ({"FORMAT": "concat", "DATASETS": "a"}, ["DATASETS", "list"]),
        ({"FORMAT": "concat", "DATASETS": [["a"]]}, ["DATASETS", "['a']"]),
        ({"FORMAT": "images", "ROOT": "x", "CLASSES": ["yes", False]}, ["CLASSES", "False"]),
        (
            {"FORMAT": "coco", "JSON": "x", "IMAGE_ROOT": "y", "KEYPOINT_FLIP_MAP": [["left"]]},
            ["KEYPOINT_FLIP_MAP", "['left']"],
        ),
    ],
)
def test_a_bad_declaration_is_refused_in_one_sentence(spec, words):
    with pytest.raises(UserError) as error:
        _declare("cells", **spec)
    assert [word for word in ["DATASETS.DECLARE.cells", *words] if word not in str(error.value)] == []
    assert "cells" not in DatasetCatalog


def test_a_declaration_that_is_no_mapping_is_refused():
    cfg = get_cfg()
    cfg.merge_from_other_cfg({"DATASETS": {"DECLARE": {"cells": "voc"}}})
    with pytest.raises(UserError, match=r"DECLARE\.cells.*'voc'"):
        declare_datasets(cfg)


def test_every_format_can_be_declared(tiny_coco, tiny_voc, tmp_path, monkeypatch, write_image):
    monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path))
    (tmp_path / "results.json").write_text(
        '[{"image_id": 2, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.5}]'
    )
    write_image(tmp_path / "yolo/images/a.png", 9, 9)
    (tmp_path / "yolo/data.yaml").write_text("val: images\nnames: [ant]\n")
    coco = {"JSON": "instances.json", "IMAGE_ROOT": "images"}
    _declare("one", FORMAT="coco_results", **coco, RESULTS="results.json", SCORE_THRESH=0, CLASSES=["person"])
    _declare("two", FORMAT="yolo", DATA="yolo/data.yaml", SPLIT="val")
    _declare("three", FORMAT="images", ROOT="yolo", CLASSES=["ant"])
    _declare("four", FORMAT="concat", DATASETS=["two", "three"])
    assert [len(DatasetCatalog.get(name)) for name in ("one", "two", "three", "four")] == [3, 1, 1, 2]
    assert [len(record["annotations"]) for record in DatasetCatalog.get("one")] == [1, 0, 0]
    assert {MetadataCatalog.get(name).evaluator_type for name in ("one", "two", "three", "four")} == {"coco"}


def test_a_declared_flip_map_is_metadata(tiny_coco):
    coco = {"FORMAT": "coco", "JSON": str(tiny_coco.json), "IMAGE_ROOT": str(tiny_coco.images)}
    _declare("pets", **coco, KEYPOINT_FLIP_MAP=[["head", "foot"]])
    assert len(DatasetCatalog.get("pets")) == 3
    assert MetadataCatalog.get("pets").keypoint_flip_map == [("head", "foot")]


def test_read_dataset_reads_anew_and_collects_problems(tiny_coco):
    coco = {"FORMAT": "coco", "JSON": str(tiny_coco.json), "IMAGE_ROOT": str(tiny_coco.images)}
    _declare("pets", **coco)
    _declare("both", FORMAT="concat", DATASETS=["pets"])
    del tiny_coco.content["annotations"][0]["bbox"]
    tiny_coco.save()
    problems = []
    records, metadata = read_dataset("both", problems)
    assert sum(len(record["annotations"]) for record in records) == 3
    assert metadata["thing_classes"] == ["cat", "person", "dog"]
    assert [str(problem)[:14] for problem in problems] == ["annotation 100"]
    with pytest.raises(UserError, match="annotation 100"):
        read_dataset("pets")
    with pytest.raises(UserError, match="did you mean pets"):
        read_dataset("pet")


def test_the_same_declaration_may_come_twice_and_another_under_its_name_may_not():
    _declare("cells", FORMAT="shapes", SPLIT="val", NUM=3)
    _declare("cells", FORMAT="shapes", SPLIT="val", NUM=3)
    with pytest.raises(UserError, match="cells exists already"):
        _declare("cells", FORMAT="shapes", SPLIT="val", NUM=4)
    assert len(DatasetCatalog.get("cells")) == 3
    DatasetCatalog.register("mine", list)
    with pytest.raises(UserError, match="mine exists already"):
        _declare("mine", FORMAT="shapes", SPLIT="val")


def test_the_built_in_names_exist_with_their_evaluators():
    coco = [f"{kind}_2017_{split}" for kind in ("coco", "keypoints_coco") for split in ("train", "val")]
    voc = [f"voc_2007_{split}" for split in ("train", "val", "trainval", "test")]
    voc += [f"voc_2012_{split}" for split in ("train", "val", "trainval")]
    for names, kind in ((coco, "coco"), (voc, "pascal_voc"), (["shapes_train", "shapes_val"], "coco")):
        for name in names:
            assert name in DatasetCatalog
            assert MetadataCatalog.get(name).evaluator_type == kind
    assert MetadataCatalog.get("voc_2007_test").year == 2007
    assert MetadataCatalog.get("voc_2012_val").year == 2012


def test_a_built_in_voc_set_has_vocs_twenty_classes_in_their_order(tiny_voc, tmp_path, monkeypatch):
    declaration = MetadataCatalog.get("voc_2007_train").declaration
    assert declaration["ROOT"] == "VOC2007"
    (tmp_path / "VOC2007").symlink_to(tiny_voc.root)
    monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path))
    tiny_voc.write("a", tiny_voc.object("tvmonitor", 1, 1, 9, 9), tiny_voc.object("aeroplane", 1, 1, 9, 9))
    declare_dataset("voc_again", declaration)
    record = DatasetCatalog.get("voc_again")[0]
    assert [a["category_id"] for a in record["annotations"]] == [19, 0]
    assert class_names("voc_again") == VOC_CLASSES
    assert len(set(VOC_CLASSES)) == 20
