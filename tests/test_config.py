"""Config: bases, overrides, types, errors, Detectron2's files.

`python tests/test_config.py` writes golden/config_keys.txt anew, after a key was added on purpose.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from plaintrain.config import CfgNode, ConfigError, check_cfg, get_cfg, get_value
from plaintrain.defaults import SUPPORTED
from plaintrain.utils.errors import UserError

GOLDEN_KEYS = Path(__file__).parent / "golden" / "config_keys.txt"

BASE_RCNN_FPN = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  BACKBONE:
    NAME: "build_resnet_fpn_backbone"
  RESNETS:
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN:
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
  ANCHOR_GENERATOR:
    SIZES: [[32], [64], [128], [256], [512]]
    ASPECT_RATIOS: [[0.5, 1.0, 2.0]]
  RPN:
    IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"]
    PRE_NMS_TOPK_TRAIN: 2000
    PRE_NMS_TOPK_TEST: 1000
    POST_NMS_TOPK_TRAIN: 1000
    POST_NMS_TOPK_TEST: 1000
  ROI_HEADS:
    NAME: "StandardROIHeads"
    IN_FEATURES: ["p2", "p3", "p4", "p5"]
  ROI_BOX_HEAD:
    NAME: "FastRCNNConvFCHead"
    NUM_FC: 2
    POOLER_RESOLUTION: 7
  ROI_MASK_HEAD:
    NAME: "MaskRCNNConvUpsampleHead"
    NUM_CONV: 4
    POOLER_RESOLUTION: 14
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.02
  STEPS: (60000, 80000)
  MAX_ITER: 90000
INPUT:
  MIN_SIZE_TRAIN: (640, 672, 704, 736, 768, 800)
VERSION: 2
"""

BASE_RETINANET = """
MODEL:
  META_ARCHITECTURE: "RetinaNet"
  BACKBONE:
    NAME: "build_retinanet_resnet_fpn_backbone"
  RESNETS:
    OUT_FEATURES: ["res3", "res4", "res5"]
  ANCHOR_GENERATOR:
    SIZES: %s
  FPN:
    IN_FEATURES: ["res3", "res4", "res5"]
  RETINANET:
    IOU_THRESHOLDS: [0.4, 0.5]
    IOU_LABELS: [0, -1, 1]
    SMOOTH_L1_LOSS_BETA: 0.0
SOLVER:
  STEPS: (60000, 80000)
VERSION: 2
"""
EVAL_SIZES = (
    '!!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"]'
)


def all_keys(cfg, prefix=""):
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{key}.")
            if not value:
                yield f"{prefix}{key}"
        else:
            yield f"{prefix}{key}"


def write(folder, name, text):
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def merged(*overrides):
    cfg = get_cfg()
    cfg.merge_from_list(list(overrides))
    return cfg


@pytest.fixture
def merge_text(tmp_path):
    """Function from YAML to the defaults with that YAML merged over them."""

    def merge(text, name="config.yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(write(tmp_path, name, text))
        return cfg

    return merge


def message(function, *args):
    """The text of the `ConfigError` that a call must raise."""
    with pytest.raises(ConfigError) as error:
        function(*args)
    text = str(error.value)
    assert isinstance(error.value, UserError)
    assert "\n" not in text
    return text


# ---- _BASE_ ----------------------------------------------------------------------------------


def test_base_is_merged_before_the_file(tmp_path):
    write(tmp_path, "base.yaml", "SEED: 1\nLOG_PERIOD: 7\n")
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path, "sub/child.yaml", "SEED: 2\n_BASE_: ../base.yaml\n"))
    assert (cfg.SEED, cfg.LOG_PERIOD) == (2, 7)


def test_of_several_bases_the_later_wins_and_bases_have_bases(tmp_path):
    write(tmp_path, "root.yaml", "SEED: 1\nLOG_PERIOD: 1\nSOLVER: {MAX_ITER: 1, IMS_PER_BATCH: 1}\n")
    write(tmp_path, "a.yaml", "_BASE_: root.yaml\nLOG_PERIOD: 2\nSOLVER: {MAX_ITER: 2}\n")
    write(tmp_path, "b.yaml", "SOLVER: {MAX_ITER: 3}\n")
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path, "child.yaml", "_BASE_: [a.yaml, b.yaml]\n"))
    assert (cfg.SEED, cfg.LOG_PERIOD, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (1, 2, 3, 1)


def test_a_base_may_be_shared_by_two_bases(tmp_path):
    write(tmp_path, "root.yaml", "SEED: 5\n")
    write(tmp_path, "a.yaml", "_BASE_: root.yaml\nLOG_PERIOD: 2\n")
    write(tmp_path, "b.yaml", "_BASE_: root.yaml\nVERSION: 2\n")
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path, "child.yaml", "_BASE_: [a.yaml, b.yaml]\n"))
    assert (cfg.SEED, cfg.LOG_PERIOD) == (5, 2)


def test_base_is_found_relative_to_its_file_and_not_to_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path, "configs/base.yaml", "SEED: 1\n")
    write(tmp_path, "elsewhere/base.yaml", "SEED: 2\n")
    write(tmp_path, "configs/child.yaml", "_BASE_: base.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    cfg = get_cfg()
    cfg.merge_from_file("../configs/child.yaml")
    assert cfg.SEED == 1


def test_base_may_be_absolute(tmp_path):
    base = write(tmp_path, "one/base.yaml", "SEED: 3\n")
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path, "two/child.yaml", f"_BASE_: {base}\n"))
    assert cfg.SEED == 3


def test_base_and_file_may_start_with_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "base.yaml", "SEED: 4\n")
    write(tmp_path, "deep/er/child.yaml", "_BASE_: ~/base.yaml\n")
    cfg = get_cfg()
    cfg.merge_from_file("~/deep/er/child.yaml")
    assert cfg.SEED == 4


def test_a_path_object_is_a_file_name_too(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(Path(write(tmp_path, "a.yaml", "SEED: 6\n")))
    assert cfg.SEED == 6


def test_cycle_of_bases_shows_the_chain(tmp_path):
    a = write(tmp_path, "a.yaml", "_BASE_: b.yaml\n")
    b = write(tmp_path, "b.yaml", "_BASE_: [a.yaml]\n")
    text = message(get_cfg().merge_from_file, a)
    assert f"{a} -> {b} -> {a}" in text


def test_missing_base_shows_the_chain(tmp_path):
    b = write(tmp_path, "b.yaml", "_BASE_: gone.yaml\n")
    a = write(tmp_path, "a.yaml", "_BASE_: b.yaml\n")
    text = message(get_cfg().merge_from_file, a)
    assert f"{a} -> {b} -> {tmp_path / 'gone.yaml'}" in text and "base" in text and "not found" in text


def test_missing_file_is_named(tmp_path):
    path = str(tmp_path / "gone.yaml")
    text = message(get_cfg().merge_from_file, path)
    assert path in text and "not found" in text and "base" not in text


@pytest.mark.parametrize("base", ["3", "[3]", "{a: b}"])
def test_base_of_another_type_is_refused(merge_text, base):
    text = message(merge_text, f"_BASE_: {base}\n")
    assert "_BASE_" in text and "config.yaml" in text


def test_base_is_not_a_key_of_the_config(tmp_path):
    write(tmp_path, "base.yaml", "SEED: 1\n")
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path, "child.yaml", "_BASE_: base.yaml\n"))
    assert "_BASE_" not in cfg and "_BASE_" not in cfg.dump()


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("DATASETS.TRAIN", "('a',)", ("a",)),
        ("DATASETS.TRAIN", '("a","b")', ("a", "b")),
        ("DATASETS.TRAIN", "['a']", ("a",)),
        ("DATASETS.TRAIN", "()", ()),
        ("INPUT.MIN_SIZE_TRAIN", "(600, 800)", (600, 800)),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "((16,32),(64,))", [[16, 32], [64]]),
        ("MODEL.MASK_ON", "True", True),
        ("MODEL.MASK_ON", "true", True),
        ("MODEL.MASK_ON", "False", False),
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", 2, 2.0),
        ("SOLVER.MAX_ITER", "100", 100),
        ("SOLVER.MAX_ITER", 100, 100),
        ("SEED", "-1", -1),
        ("OUTPUT_DIR", "123", "123"),
        ("OUTPUT_DIR", "True", "True"),
        ("OUTPUT_DIR", "a b", "a b"),
        ("MODEL.WEIGHTS", "''", ""),
        ("MODEL.WEIGHTS", '""', ""),
        ("MODEL.WEIGHTS", "'x.pth'", "x.pth"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0.5", 0.5),
        ("SOLVER.WEIGHT_DECAY_BIAS", "None", None),
    ],
)
def test_override_takes_the_type_of_the_key(key, given, expected):
    value = get_value(merged(key, given), key)
    assert value == expected and type(value) is type(expected)


def test_yaml_gives_the_same_types_as_the_command_line(merge_text):
    cfg = merge_text(
        "DATASETS:\n  TRAIN: ('a',)\n  TEST: [b, c]\n"
        "SOLVER:\n  BASE_LR: 1e-3\n  STEPS: [10]\n  WARMUP_FACTOR: 1\n"
        "MODEL:\n  ANCHOR_GENERATOR:\n    SIZES: ((16, 32),)\n  MASK_ON: yes\n"
    )
    assert cfg.DATASETS.TRAIN == ("a",) and cfg.DATASETS.TEST == ("b", "c")
    assert cfg.SOLVER.BASE_LR == 0.001 and cfg.SOLVER.STEPS == (10,)
    assert type(cfg.SOLVER.WARMUP_FACTOR) is float
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[16, 32]] and cfg.MODEL.MASK_ON is True


def test_order_is_defaults_bases_file_command_line(tmp_path):
    write(tmp_path, "base.yaml", "SEED: 1\nLOG_PERIOD: 1\nVERSION: 1\n")
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path, "a.yaml", "_BASE_: base.yaml\nSEED: 2\nLOG_PERIOD: 2\n"))
    cfg.merge_from_list(["SEED", "3"])
    found = cfg.VERSION, cfg.LOG_PERIOD, cfg.SEED, cfg.SOLVER.GAMMA
    assert found == (1, 2, 3, get_cfg().SOLVER.GAMMA)


def test_of_two_overrides_of_a_key_the_later_wins():
    assert merged("SEED", "1", "SEED", "2").SEED == 2


def test_get_cfg_hands_out_copies():
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER = 1
    cfg.MODEL.PIXEL_MEAN.append(0.0)
    assert get_cfg().SOLVER.MAX_ITER != 1 and len(get_cfg().MODEL.PIXEL_MEAN) == 3


def test_empty_file_and_empty_section_change_nothing(merge_text):
    assert merge_text("") == get_cfg()
    assert merge_text("MODEL:\n# nothing\n") == get_cfg()


def test_yaml_merge_keys_work(merge_text):
    cfg = merge_text(
        "DATASETS:\n  DECLARE:\n"
        "    a: &a {FORMAT: shapes, SPLIT: train, NUM: 4}\n    b: {<<: *a, SPLIT: val}\n"
    )
    assert dict(cfg.DATASETS.DECLARE.b) == {"FORMAT": "shapes", "SPLIT": "val", "NUM": 4}


def test_a_key_that_may_be_none_can_be_set_back_to_none(merge_text):
    cfg = merged("SOLVER.WEIGHT_DECAY_BIAS", "0.1")
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY_BIAS", "None"])
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None
    cfg = merged("SOLVER.WEIGHT_DECAY_BIAS", "0.1")
    cfg.merge_from_other_cfg(merge_text("SOLVER: {WEIGHT_DECAY_BIAS: null}"))
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None


@pytest.mark.parametrize("word", ["null", "~", "none"])
def test_yamls_words_for_none_are_not_kept_as_text(word):
    """Either None or an error: a text would fail deep inside the optimizer."""
    try:
        value = merged("SOLVER.WEIGHT_DECAY_BIAS", word).SOLVER.WEIGHT_DECAY_BIAS
    except ConfigError:
        return
    assert value is None


@pytest.mark.parametrize("value", ["foo", "(1, 2)", "True"])
def test_a_key_that_may_be_none_still_has_a_type(value):
    assert "SOLVER.WEIGHT_DECAY_BIAS" in message(merged, "SOLVER.WEIGHT_DECAY_BIAS", value)


def test_a_dataset_can_be_declared_on_the_command_line():
    cfg = merged(
        *("DATASETS.DECLARE.mine.FORMAT", "shapes"),
        *("DATASETS.DECLARE.mine.NUM", "4"),
        *("DATASETS.DECLARE.mine.CLASSES", "['circle', 'square']"),
    )
    assert dict(cfg.DATASETS.DECLARE.mine) == {"FORMAT": "shapes", "NUM": 4, "CLASSES": ["circle", "square"]}


def test_a_declaration_is_extended_by_a_later_file(tmp_path):
    write(tmp_path, "base.yaml", "DATASETS: {DECLARE: {a: {FORMAT: shapes, NUM: 4}}}\n")
    cfg = get_cfg()
    text = "_BASE_: base.yaml\nDATASETS: {DECLARE: {a: {NUM: 5}, b: {FORMAT: voc}}}\n"
    cfg.merge_from_file(write(tmp_path, "child.yaml", text))
    assert cfg.DATASETS.DECLARE == {"a": {"FORMAT": "shapes", "NUM": 5}, "b": {"FORMAT": "voc"}}


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "nearest"),
    [
        ("SOLVER: {BASE_LRR: 1}", "SOLVER.BASE_LRR", "SOLVER.BASE_LR"),
        ("BASE_LR: 1", "BASE_LR", "SOLVER.BASE_LR"),
        ("MODEL: {ROI_HEAD: {NUM_CLASSES: 3}}", "MODEL.ROI_HEAD", "MODEL.ROI_HEADS"),
        ("OUTPUTDIR: x", "OUTPUTDIR", "OUTPUT_DIR"),
        ("MODEL: {MAX_ITER: 3}", "MODEL.MAX_ITER", "SOLVER.MAX_ITER"),
    ],
)
def test_unknown_key_in_a_file_names_key_file_and_nearest(merge_text, tmp_path, text, name, nearest):
    found = message(merge_text, text)
    assert f"unknown key {name} " in found and str(tmp_path / "config.yaml") in found
    assert nearest in found.split("did you mean")[1]


def test_unknown_key_of_a_base_names_the_base(tmp_path):
    base = write(tmp_path, "base.yaml", "SEEED: 1\n")
    child = write(tmp_path, "child.yaml", "_BASE_: base.yaml\n")
    text = message(get_cfg().merge_from_file, child)
    assert base in text and child not in text


def test_unknown_key_on_the_command_line_names_the_nearest():
    text = message(merged, "SOLVER.IMS_PER_BATC", "2")
    assert "SOLVER.IMS_PER_BATC " in text and "command line" in text and "SOLVER.IMS_PER_BATCH" in text


def test_unknown_key_without_a_neighbour_says_where_the_keys_are():
    assert "defaults.py" in message(merged, "QQQQ", "2")


def test_override_without_a_value_is_named():
    text = message(merged, "SEED", "1", "OUTPUT_DIR")
    assert "'OUTPUT_DIR'" in text and "SEED 1 OUTPUT_DIR" in text


@pytest.mark.parametrize(
    ("key", "value", "expected", "found"),
    [
        ("SOLVER.MAX_ITER", "abc", "int", "'abc'"),
        ("SOLVER.MAX_ITER", "1.5", "int", "1.5"),
        ("SOLVER.MAX_ITER", "True", "int", "bool"),
        ("SOLVER.BASE_LR", "True", "float", "bool"),
        ("MODEL.MASK_ON", "1", "bool", "int"),
        ("MODEL.MASK_ON", "on", "bool", "'on'"),
        ("DATASETS.TRAIN", "abc", "tuple", "'abc'"),
        ("MODEL.PIXEL_MEAN", "1.0", "list", "float"),
        ("SOLVER.BASE_LR.X", "3", "float", "dict"),
        ("SOLVER", "3", "section", "3"),
    ],
)
def test_wrong_type_names_key_found_and_expected(key, value, expected, found):
    text = message(merged, key, value)
    assert text.startswith(key.removesuffix(".X")) and "command line" in text
    assert expected in text and found in text


def test_wrong_type_in_a_file_names_the_file(merge_text, tmp_path):
    text = message(merge_text, "OUTPUT_DIR: 3\n")
    assert "OUTPUT_DIR" in text and str(tmp_path / "config.yaml") in text and "str" in text and "3" in text


def test_a_refused_override_leaves_the_value_as_it_was():
    cfg = get_cfg()
    before = cfg.clone()
    message(cfg.merge_from_list, ["SOLVER.MAX_ITER", "many"])
    assert cfg == before


@pytest.mark.parametrize(
    "text",
    [
        'DATASETS: {TRAIN: ("a",)}',
        'DATASETS: {TRAIN: ("a", "b")}',
        "SOLVER: {STEPS: (100, 200), MAX_ITER: 300}",
        "SOLVER: {MAX_ITER: 300, STEPS: (100,)}",
    ],
)
def test_tuple_that_yaml_splits_in_flow_style_is_explained(merge_text, text):
    found = message(merge_text, text)
    assert "config.yaml" in found and '["a", "b"]' in found


def test_duplicate_key_is_refused_with_its_line(merge_text, tmp_path):
    text = message(merge_text, "SOLVER:\n  MAX_ITER: 1\n  GAMMA: 0.5\n  MAX_ITER: 2\n")
    assert "MAX_ITER" in text and "twice" in text and "line 4" in text and str(tmp_path) in text


def test_the_same_name_in_two_sections_is_no_duplicate(merge_text):
    cfg = merge_text("SOLVER: {IMS_PER_BATCH: 2}\nTEST: {IMS_PER_BATCH: 3}\n")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.TEST.IMS_PER_BATCH) == (2, 3)


@pytest.mark.parametrize(
    "text",
    [
        "SEED: [",
        "SEED: 1\n\tLOG_PERIOD: 2\n",
        "- SEED\n",
        "just a text",
        "SEED: \x01",
        "OUTPUT_DIR: 2024-13-45",
        "SEED: !!int abc",
        "MODEL: {MASK_ON: !!bool maybe}",
        "? [a, b]\n: c\n",
        "SEED: &a [*a]",
        "[" * 500,
    ],
)
def test_text_that_is_not_yaml_names_the_file(merge_text, text):
    with pytest.raises(ConfigError, match="config.yaml"):
        merge_text(text)


def test_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert str(path) in message(get_cfg().merge_from_file, str(path))


def test_a_folder_is_not_a_config_file(tmp_path):
    assert str(tmp_path) in message(get_cfg().merge_from_file, str(tmp_path))


@pytest.mark.parametrize("name", [2012, "2012", "yes", "a-b", "ä"])
def test_declared_dataset_may_have_any_name(merge_text, tmp_path, name):
    declared = {"DATASETS": {"DECLARE": {name: {"FORMAT": "shapes", "NUM": 1}}}}
    cfg = merge_text(yaml.safe_dump(declared))
    assert list(cfg.DATASETS.DECLARE) == [str(name)]
    assert merge_text(cfg.dump(), "again.yaml") == cfg


# ---- nothing runs code -----------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "tuple"])
def test_python_tag_is_refused_with_what_to_write(merge_text, tmp_path, tag):
    target = tmp_path / "made"
    text = message(merge_text, f"SEED: 1\nOUTPUT_DIR: !!python/{tag} ['{target}']\n")
    assert "line 2" in text and "config.yaml" in text and "write the plain list" in text
    assert not target.exists()


def test_python_tag_is_refused_in_a_string(tmp_path):
    target = tmp_path / "made"
    text = f"!!python/object/apply:os.mkdir ['{target}']"
    assert "write the plain list" in message(CfgNode.load_cfg, text)
    assert not target.exists()


def test_python_configs_are_not_executed(tmp_path):
    target = tmp_path / "made"
    path = write(tmp_path, "config.py", f"import os\nos.mkdir({str(target)!r})\ncfg = dict(SEED=1)\n")
    assert path in message(get_cfg().merge_from_file, path)
    with open(path) as f:
        assert path in message(CfgNode.load_cfg, f)
    with open(path) as f:
        assert path in message(get_cfg().load_cfg, f)
    assert path in message(CfgNode._load_cfg_py_source, path)
    assert not target.exists()


def test_python_config_is_not_executed_as_a_base(tmp_path):
    target = tmp_path / "made"
    write(tmp_path, "base.py", f"import os\nos.mkdir({str(target)!r})\ncfg = dict(SEED=1)\n")
    child = write(tmp_path, "child.yaml", "_BASE_: base.py\n")
    assert "base.py" in message(get_cfg().merge_from_file, child)
    assert not target.exists()


# ---- dump ------------------------------------------------------------------------------------


def test_dumped_defaults_merge_back_equal(merge_text):
    cfg = merge_text(get_cfg().dump())
    assert cfg == get_cfg() and repr(cfg) == repr(get_cfg())


def test_dumped_odd_values_merge_back_equal(merge_text):
    cfg = get_cfg()
    for key, value in {
        "OUTPUT_DIR": "1e-3",
        "MODEL.WEIGHTS": "0x1F",
        "MODEL.DEVICE": "null",
        "MODEL.META_ARCHITECTURE": "yes",
        "MODEL.BACKBONE.NAME": "(1, 2)",
        "MODEL.RESNETS.NORM": "  spaces: and # signs ",
        "MODEL.FPN.NORM": "two\nlines \u00e4 '\"",
        "MODEL.FPN.FUSE_TYPE": "2024-01-01",
        "MODEL.TINY.NORM": "=",
        "SOLVER.OPTIMIZER": "12_000",
        "DATASETS.TRAIN": ("1", "True", "a: b", ""),
        "DATASETS.TEST": (),
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": math.inf,
        "SOLVER.BASE_LR": 1e-20,
        "SOLVER.GAMMA": 1 / 3,
        "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
        "SEED": 2**40,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 32 * 2 ** (1 / 3)], [64]],
        "TEST.EXPECTED_RESULTS": [["bbox", "AP", 38.5, 0.2], ["bbox", "AP50", -math.inf, 1]],
    }.items():
        *path, leaf = key.split(".")
        setattr(get_value(cfg, ".".join(path)) if path else cfg, leaf, value)
    cfg.merge_from_other_cfg(
        {
            "DATASETS": {
                "DECLARE": {
                    "cells": {"FORMAT": "voc", "ROOT": "007", "SPLIT": "on", "CLASSES": ["1", "no", "b"]},
                    "12": {"FORMAT": "shapes", "NUM": 4, "FLAG": True, "NONE": None, "DEEP": {"X": [[1.5]]}},
                }
            }
        }
    )
    again = merge_text(cfg.dump())
    assert again == cfg
    for key in all_keys(cfg):
        assert type(get_value(again, key)) is type(get_value(cfg, key)), key


def test_nested_tuples_become_lists_so_that_dumping_keeps_them_equal(merge_text):
    cfg = merged("TEST.EXPECTED_RESULTS", "(('bbox', 'AP', 1.0, 0.5),)")
    assert cfg.TEST.EXPECTED_RESULTS == [["bbox", "AP", 1.0, 0.5]]
    assert merge_text(cfg.dump()) == cfg


def test_dump_is_plain_yaml():
    assert yaml.safe_load(get_cfg().dump())["SOLVER"]["STEPS"] == [30000]
    assert "!!" not in get_cfg().dump() and "&id" not in get_cfg().dump()


# ---- frozen ----------------------------------------------------------------------------------


def test_frozen_config_cannot_be_changed():
    cfg = get_cfg()
    cfg.freeze()
    before = cfg.clone()
    with pytest.raises(AttributeError, match="immutable"):
        cfg.SOLVER.MAX_ITER = 3
    for overrides in (["SEED", "3"], ["SOLVER.MAX_ITER", "3"], ["DATASETS.DECLARE.a.FORMAT", "shapes"]):
        with pytest.raises((AttributeError, ConfigError)):
            cfg.merge_from_list(overrides)
    assert cfg == before and cfg.is_frozen()
    cfg.defrost()
    cfg.merge_from_list(["SOLVER.MAX_ITER", "3"])
    assert cfg.SOLVER.MAX_ITER == 3


def test_clone_of_a_config_is_independent():
    cfg = get_cfg()
    clone = cfg.clone()
    clone.SOLVER.MAX_ITER = 3
    assert isinstance(clone, CfgNode) and clone != cfg


# ---- Detectron2's files ----------------------------------------------------------------------


def test_detectron2_base_rcnn_fpn_merges_and_is_supported(merge_text):
    cfg = merge_text(BASE_RCNN_FPN)
    check_cfg(cfg)
    assert cfg.SOLVER.STEPS == (60000, 80000) and cfg.SOLVER.MAX_ITER == 90000
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    for key in ("PIXEL_MEAN", "PIXEL_STD", "MASK_ON"):
        assert cfg.MODEL[key] == get_cfg().MODEL[key]


def test_detectron2_child_of_the_base_merges(tmp_path):
    write(tmp_path, "Base-RCNN-FPN.yaml", BASE_RCNN_FPN)
    child = (
        '_BASE_: "../Base-RCNN-FPN.yaml"\nMODEL:\n  WEIGHTS: "detectron2://ImageNetPretrained/MSRA/R-101.pkl"\n'
        "  MASK_ON: %s\n  RESNETS:\n    DEPTH: 101\nSOLVER:\n  STEPS: (210000, 250000)\n  MAX_ITER: 270000\n"
    )
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path, "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", child % False))
    check_cfg(cfg)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (101, 270000, 0.02)


def test_detectron2_retinanet_merges_once_its_eval_is_written_out(merge_text):
    assert "line 9" in message(merge_text, BASE_RETINANET % EVAL_SIZES)
    sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    cfg = merge_text(BASE_RETINANET % sizes)
    check_cfg(cfg)
    found = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert found == sizes


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("VERSION", "1", "2"),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "StandardROIHeads"),
        ("MODEL.LOAD_PROPOSALS", "True", "False"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "RPN"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator", "DefaultAnchorGenerator"),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]", "[False, False, False, False]"),
        ("MODEL.RESNETS.RES5_DILATION", "2", "1"),
        ("MODEL.FPN.FUSE_TYPE", "avg", "sum"),
        ("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "['res2', 'res3', 'res4', 'res5']"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "diou", "smooth_l1"),
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", "False"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "ROIAlignV2"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorSampler", "RepeatFactorTrainingSampler"),
        ("INPUT.FORMAT", "L", "RGB"),
        ("INPUT.RANDOM_FLIP", "both", "horizontal"),
        ("SOLVER.OPTIMIZER", "Adagrad", "AdamW"),
        ("SOLVER.WARMUP_METHOD", "exponential", "linear"),
        ("SOLVER.AMP.PRECISION", "float32", "bfloat16"),
        ("SOLVER.MOMENTUM_INTERPOLATION", "linea", "linear"),
        ("FLOAT32_PRECISION", "tf32", "high"),
        ("MODEL.EMA.EVALUATE", "both", "averaged"),
        ("MODEL.EMA.FINAL", "best", "raw"),
        ("TEST.PRECISE_BN.ENABLED", "True", "False"),
    ],
)
def test_unsupported_variant_is_refused_naming_what_is_supported(merge_text, key, value, supported):
    cfg = merge_text(BASE_RCNN_FPN)
    cfg.merge_from_list([key, value])
    text = message(check_cfg, cfg)
    assert text.startswith(key) and repr(get_value(cfg, key)) in text
    assert supported in text.split(", but only ")[1]


def test_mask_and_keypoint_rcnn_children_of_detectron2_are_supported(merge_text):
    cfg = merge_text(BASE_RCNN_FPN)
    cfg.merge_from_other_cfg({"MODEL": {"MASK_ON": True, "KEYPOINT_ON": True}})
    check_cfg(cfg)


@pytest.mark.parametrize("architecture", ["RetinaNet", "FCOS", "SSD", "ProposalNetwork"])
@pytest.mark.parametrize("key", ["MODEL.MASK_ON", "MODEL.KEYPOINT_ON"])
def test_other_architectures_have_no_masks_and_keypoints(architecture, key):
    text = message(check_cfg, merged("MODEL.META_ARCHITECTURE", architecture, key, "True"))
    assert text.startswith(key) and "only False" in text


@pytest.mark.parametrize(
    ("switch", "on", "off", "key", "value"),
    [
        ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "False", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "odd"),
        ("INPUT.CROP.ENABLED", "True", "False", "INPUT.CROP.TYPE", "odd"),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "RetinaNet", "MODEL.ROI_HEADS.NAME", "odd"),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "RetinaNet", "MODEL.RPN.HEAD_NAME", "odd"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet", "GeneralizedRCNN", "MODEL.RETINANET.NUM_CONVS", "1"),
        ("MODEL.META_ARCHITECTURE", "ProposalNetwork", "FCOS", "MODEL.RPN.HEAD_NAME", "odd"),
        ("MODEL.META_ARCHITECTURE", "SSD", "FCOS", "MODEL.SSD.HEAD_NAME", "odd"),
        ("MODEL.MASK_ON", "True", "False", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"),
        ("MODEL.KEYPOINT_ON", "True", "False", "MODEL.ROI_KEYPOINT_HEAD.NAME", "odd"),
        (
            *("MODEL.ANCHOR_GENERATOR.NAME", "AnchorGenerator", "DefaultAnchorGenerator"),
            *("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"),
        ),
        (
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "build_tiny_backbone"),
            *("MODEL.RPN.IN_FEATURES", "['res4']"),
        ),
        (
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "build_mobilenet_v3_large_fpn_backbone"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32"),
        ),
    ],
)
def test_keys_of_a_feature_that_is_off_are_not_looked_at(switch, on, off, key, value):
    assert key in message(check_cfg, merged(switch, on, key, value))
    check_cfg(merged(switch, off, key, value))


def test_every_key_that_is_checked_exists_and_its_default_is_supported():
    cfg = get_cfg()
    check_cfg(cfg)
    for feature, keys in SUPPORTED.items():
        if feature:
            assert get_value(cfg, feature.split("=")[0]) is not None
        for key, allowed in keys.items():
            assert all(type(value) is type(get_value(cfg, key)) for value in allowed), key


# ---- the module itself -----------------------------------------------------------------------


def test_importing_the_config_does_not_import_torch():
    code = (
        "import sys; import plaintrain.config as c; cfg = c.get_cfg(); c.check_cfg(cfg); cfg.dump();"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'torchvision', 'numpy')])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (found.stdout.strip(), found.returncode) == ("[]", 0), found.stderr


def test_the_keys_are_those_of_the_golden_file():
    golden = GOLDEN_KEYS.read_text().split()
    keys = sorted(all_keys(get_cfg()))
    assert len(keys) > 100
    assert {"added": sorted(set(keys) - set(golden)), "gone": sorted(set(golden) - set(keys))} == {
        "added": [],
        "gone": [],
    }, "if this is meant, run: python tests/test_config.py"


if __name__ == "__main__":
    GOLDEN_KEYS.parent.mkdir(exist_ok=True)
    GOLDEN_KEYS.write_text("\n".join(sorted(all_keys(get_cfg()))) + "\n")


@pytest.mark.parametrize(
    "value, what",
    [
        ("[1, {2, 3}]", "holds a set"),
        ("[b'x']", "holds a bytes"),
        ("[{'a': [1+2j]}]", "holds a complex"),
        ("[...]", "holds a ellipsis"),
        (f"[{2**65}]", "holds a whole number of more than 64 bits"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_in_a_list_too(value, what):
    with pytest.raises(ConfigError, match=f"INPUT.AUGMENTATIONS in .* {what}"):
        get_cfg().merge_from_list(["INPUT.AUGMENTATIONS", value])
