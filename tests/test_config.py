"""Config: bases, overrides, types, errors, Detectron2's files.

`python tests/test_config.py` writes golden/config_keys.txt anew, after a key was added on purpose.
"""

import itertools
import math
import re
from pathlib import Path

import pytest

from plaintrain.config import CfgNode, check_cfg, get_cfg, get_value, set_value
from plaintrain.config.config import iterate_keys
from plaintrain.config.schema import RULES
from plaintrain.utils.errors import ConfigError
from plaintrain.utils.events import WRITERS

GOLDEN_KEYS = Path(__file__).parent / "golden" / "config_keys.txt"
KEYS = [key for key in iterate_keys(get_cfg()) if not isinstance(get_value(get_cfg(), key), CfgNode)]

BASE_RCNN_FPN = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  BACKBONE: {NAME: "build_resnet_fpn_backbone"}
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]]}
  RPN: {IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"], PRE_NMS_TOPK_TRAIN: 2000}
  ROI_HEADS: {NAME: "StandardROIHeads", IN_FEATURES: ["p2", "p3", "p4", "p5"]}
DATASETS:
  TRAIN: ("coco_2017_train",)
SOLVER:
  BASE_LR: 0.02
  STEPS: (60000, 80000)
INPUT:
  MIN_SIZE_TRAIN: (640, 672, 704, 736, 768, 800)
VERSION: 2
"""


def write(folder, name, text):
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def merge(file=None, *overrides):
    """Return the defaults with a file merged over them, and then the overrides."""
    cfg = get_cfg()
    if file:
        cfg.merge_from_file(file)
    cfg.merge_from_list(list(overrides))
    return cfg


def error_message(function, *args):
    """Return the text of the `ConfigError` that a call must raise."""
    with pytest.raises(ConfigError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_base_paths_are_relative_to_the_file_absolute_or_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # A base that two bases share is no cycle.
    write(tmp_path, "root.yaml", "HANG_TIMEOUT: 4.0\n")
    write(tmp_path, "base.yaml", "_BASE_: root.yaml\nSEED: 1\nLOG_PERIOD: 7\n")
    absolute = write(tmp_path, "absolute/base.yaml", "_BASE_: ../root.yaml\nVERSION: 1\n")
    write(tmp_path, "home/base.yaml", "OUTPUT_DIR: home\n")
    text = f"SEED: 2\n_BASE_: ['../../base.yaml', '{absolute}', '~/base.yaml']\n"
    write(tmp_path, "home/configs/child.yaml", text)
    # The working folder has a file of the same name, which is not read.
    monkeypatch.chdir(tmp_path / "absolute")
    for path in ("~/configs/child.yaml", Path("../home/configs/child.yaml")):
        cfg = merge(path)
        assert (cfg.SEED, cfg.LOG_PERIOD, cfg.VERSION, cfg.OUTPUT_DIR) == (2, 7, 1, "home")
        assert "_BASE_" not in cfg and cfg.HANG_TIMEOUT == 4


def test_base_errors_show_the_chain_of_files(tmp_path):
    gone = tmp_path / "gone.yaml"
    assert f"config file not found: {gone}" in error_message(merge, str(gone))
    a = write(tmp_path, "a.yaml", "_BASE_: b.yaml\n")
    b = write(tmp_path, "b.yaml", "_BASE_: [a.yaml]\n")
    assert f"{a} -> {b} -> {a}" in error_message(merge, a)
    write(tmp_path, "b.yaml", "_BASE_: gone.yaml\n")
    assert f"base config file not found: {a} -> {b} -> {gone}" in error_message(merge, a)
    write(tmp_path, "b.yaml", "SEEED: 1\n")
    text = error_message(merge, a)
    assert b in text and a not in text


@pytest.mark.parametrize(
    ("key", "word", "expected"),
    [
        ("MODEL.MASK_ON", "true", True),
        ("OUTPUT_DIR", "True", "True"),
        ("MODEL.WEIGHTS", "''", ""),
        ("SOLVER.WEIGHT_DECAY_BIAS", "null", None),
    ],
)
def test_override_takes_the_type_of_the_key(key, word, expected):
    value = get_value(merge(None, key, word), key)
    assert value == expected and type(value) is type(expected)


def test_declarations_come_from_files_and_the_command_line(tmp_path):
    base = "DATASETS: {DECLARE: {a: &a {FORMAT: shapes, NUM: 4}, b: {<<: *a, NUM: 5}}}\n"
    write(tmp_path, "base.yaml", base)
    text = "_BASE_: base.yaml\nDATASETS: {DECLARE: {a: {NUM: 6}, 2012: {FORMAT: voc}}}\n"
    cfg = merge(write(tmp_path, "child.yaml", text))
    cfg.merge_from_list(["DATASETS.DECLARE.c.FORMAT", "shapes", "DATASETS.DECLARE.c.NUM", "4"])
    cfg.merge_from_list(["DATASETS.DECLARE.c.CLASSES", "['circle', 'square']"])
    assert cfg.DATASETS.DECLARE == {
        "a": {"FORMAT": "shapes", "NUM": 6},
        "b": {"FORMAT": "shapes", "NUM": 5},
        "2012": {"FORMAT": "voc"},
        "c": {"FORMAT": "shapes", "NUM": 4, "CLASSES": ["circle", "square"]},
    }


SPLIT_TUPLE = '["a", "b"]'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # Unknown keys, with the nearest that there is.
        ("MODEL: {ROI_HEAD: {NUM_CLASSES: 3}}", ["MODEL.ROI_HEAD ", "did you mean MODEL.ROI_HEADS"]),
        ("MODEL: {MAX_ITER: 3}", ["MODEL.MAX_ITER ", "did you mean SOLVER.MAX_ITER"]),
        # Values.
        ("SOLVER:\n  MAX_ITER: 1\n  GAMMA: 0.5\n  MAX_ITER: 2\n", ["line 4", "duplicate key MAX_ITER"]),
        ('DATASETS: {TRAIN: ("a", "b")}', [SPLIT_TUPLE]),
        ("SOLVER: {STEPS: (100, 200), MAX_ITER: 300}", [SPLIT_TUPLE]),
        # Bases.
        ("_BASE_: 3", ["_BASE_"]),
        # No YAML, or none of a config; test_hostile.py has more.
        ("SEED: 1\n\tLOG_PERIOD: 2\n", ["line 2"]),
        ("- SEED\n", ["list"]),
        ("SEED: !!int abc", []),
        ("OUTPUT_DIR: !!python/tuple [a]\n", ["line 1", "write the plain list"]),
    ],
)
def test_file_errors_name_the_file_and_the_key(tmp_path, text, words):
    for empty in ("", "MODEL:\n# nothing\n"):
        assert merge(write(tmp_path, "config.yaml", empty)) == get_cfg()
    message = error_message(merge, write(tmp_path, "config.yaml", text))
    assert "config.yaml" in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SEED", "1", "OUTPUT_DIR"], ["'OUTPUT_DIR'", "SEED 1 OUTPUT_DIR"]),
        (["QQQQ", "2"], ["QQQQ", "defaults.py"]),
        (["SOLVER", "3"], ["SOLVER", "section", "3"]),
        (["INPUT.AUGMENTATIONS", "[1, {2, 3}]"], ["INPUT.AUGMENTATIONS", "got a set"]),
        (["INPUT.AUGMENTATIONS", "[{'a': [1+2j]}]"], ["INPUT.AUGMENTATIONS", "got a complex"]),
    ],
)
def test_override_errors_name_the_key_and_change_nothing(overrides, words):
    cfg = get_cfg()
    message = error_message(cfg.merge_from_list, overrides)
    assert all(word in message for word in words), message
    assert cfg == get_cfg()


def test_python_configs_are_not_executed(tmp_path):
    target = tmp_path / "made"
    path = write(tmp_path, "config.py", f"import os\nos.mkdir({str(target)!r})\ncfg = dict(SEED=1)\n")
    assert path in error_message(merge, path)
    assert path in error_message(merge, write(tmp_path, "child.yaml", "_BASE_: config.py\n"))
    with open(path) as f:
        assert path in error_message(CfgNode.load_cfg, f)
    assert not target.exists()


def test_frozen_config_cannot_be_changed_and_its_clone_is_a_copy():
    cfg = get_cfg()
    clone = cfg.clone()
    cfg.freeze()
    with pytest.raises(AttributeError, match="immutable"):
        cfg.SOLVER.MAX_ITER = 3
    for overrides in (["SEED", "3"], ["SOLVER.MAX_ITER", "3"], ["DATASETS.DECLARE.a.FORMAT", "shapes"]):
        with pytest.raises((AttributeError, ConfigError)):
            cfg.merge_from_list(overrides)
    assert cfg == get_cfg() and cfg.is_frozen()
    cfg.defrost()
    cfg.merge_from_list(["SOLVER.MAX_ITER", "3"])
    cfg.MODEL.PIXEL_MEAN.append(0.0)
    assert cfg.SOLVER.MAX_ITER == 3
    assert clone == get_cfg() != cfg and isinstance(clone, CfgNode)


def test_detectron2_base_and_child_merge_and_are_supported(tmp_path):
    write(tmp_path, "Base-RCNN-FPN.yaml", BASE_RCNN_FPN)
    child = (
        '_BASE_: "../Base-RCNN-FPN.yaml"\nMODEL:\n  WEIGHTS: "detectron2://ImageNetPretrained/MSRA/R-101.pkl"\n'
        "  MASK_ON: True\n  KEYPOINT_ON: True\n  RESNETS:\n    DEPTH: 101\n"
        "SOLVER:\n  STEPS: (210000, 250000)\n  MAX_ITER: 270000\n"
    )
    cfg = merge(write(tmp_path, "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", child))
    check_cfg(cfg)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (101, 270000, 0.02)
    assert cfg.SOLVER.STEPS == (210000, 250000) and cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("VERSION", "1", "2"),
        ("MODEL.ROI_HEADS.NAME", "'CascadeROIHeads'", "'StandardROIHeads' with MODEL.META_ARCHITECTURE"),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]", "[False, False, False, False]"),
        ("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "['res2', 'res3', 'res4', 'res5']"),
        ("SOLVER.OPTIMIZER", "'Adagrad'", "'SGD' or 'AdamW'"),
        ("SOLVER.LR_SCHEDULER_NAME", "'Cosine'", "'WarmupMultiStepLR' or 'WarmupCosineLR'"),
        ("SOLVER.MAX_TIME", "-1.0", "at least 0"),
        ("SOLVER.IMS_PER_BATCH", "0", "at least 1"),
        ("SOLVER.BASE_LR", "inf", "at most 1000000"),
        ("SOLVER.BASE_LR", "nan", "at least 0"),
        ("SOLVER.STEPS", "(1, True)", "increasing iterations"),
        ("SOLVER.STEPS", "(200, 100)", "increasing iterations"),
        ("SEED", "4294967296", "below 2**32"),
        ("MODEL.EMA.DECAY", "-0.5", "at least 0 and below 1"),
        ("MODEL.EMA.DECAY", "1.0", "at least 0 and below 1"),
        ("MODEL.PIXEL_STD", "[1, 2, 0]", "3 numbers above 0"),
        ("MODEL.PIXEL_STD", "[1, 'a', 3]", "3 numbers above 0"),
        ("MODEL.RESNETS.NORM", "'LN'", "'GN' with MODEL.BACKBONE.NAME"),
        ("OUTPUT.WRITERS", "('wandb',)", "'tensorboard'"),
        ("DATALOADER.RANDOM_SUBSET_RATIO", "0.0", "above 0 and at most 1"),
        ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 38.5]]", "[task, metric, value, tolerance]"),
    ],
)
def test_values_that_a_key_may_not_have_are_rejected_naming_what_it_may(tmp_path, key, value, supported):
    cfg = merge(write(tmp_path, "config.yaml", BASE_RCNN_FPN))
    set_value(cfg, key, float(value) if value in ("inf", "nan") else value)
    text = error_message(check_cfg, cfg)
    assert re.fullmatch(rf"{key} must be .*{re.escape(supported)}.*, got {re.escape(value)}", text)


@pytest.mark.parametrize(
    ("switch", "on", "off", "key", "value"),
    [
        ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "False", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "odd"),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "RetinaNet", "MODEL.ROI_HEADS.NAME", "odd"),
        ("MODEL.META_ARCHITECTURE", "ProposalNetwork", "FCOS", "MODEL.RPN.HEAD_NAME", "odd"),
        ("MODEL.META_ARCHITECTURE", "SSD", "FCOS", "MODEL.SSD.HEAD_NAME", "odd"),
        ("MODEL.META_ARCHITECTURE", "FCOS", "GeneralizedRCNN", "MODEL.MASK_ON", "True"),
        ("MODEL.MASK_ON", "True", "False", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"),
        ("MODEL.KEYPOINT_ON", "True", "False", "MODEL.ROI_KEYPOINT_HEAD.NAME", "odd"),
        (
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "build_mobilenet_v3_large_fpn_backbone"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32"),
        ),
    ],
)
def test_keys_of_a_feature_are_checked_only_if_it_is_on(switch, on, off, key, value):
    assert error_message(check_cfg, merge(None, switch, on, key, value)).startswith(key)
    check_cfg(merge(None, switch, off, key, value))


# Keys of any text; True and False need no rule.
FREE = {"OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS", "TEST.BEST_METRIC"}
NONSENSE = (-7, 10**11, 10**400, math.nan, ["a", [1]], [-7.5], [math.nan], "a\0b", "x" * 5000, {"a": 1}, None)
SENSIBLE = (["DATALOADER.CACHE_BYTES", 10**11], ["SOLVER.WEIGHT_DECAY_BIAS", None])


def test_each_key_has_a_rule_that_allows_its_default_and_no_nonsense():
    kinds = {key: type(get_value(get_cfg(), key)) for key in KEYS}
    booleans = {key for key in KEYS if kinds[key] is bool}
    ruled = {key for rules in RULES.values() for key in rules}
    assert ruled | booleans | FREE == set(KEYS) and not ruled & FREE
    check_cfg(merge(None, "OUTPUT.WRITERS", list(WRITERS)))
    for i, (key, value) in enumerate(itertools.product(KEYS, NONSENSE)):
        # Every second value is given as on the command line.
        content = repr(value) if i % 2 and kinds[key] is not str else value
        if [key, value] not in SENSIBLE:
            message = error_message(lambda *words: check_cfg(merge(None, *words)), key, content)
            assert message.startswith(key) and ", got " in message, message


def test_keys_are_those_of_the_golden_file():
    golden = set(GOLDEN_KEYS.read_text().split())
    assert set(KEYS) ^ golden == set(), "if meant, run: python tests/test_config.py"


if __name__ == "__main__":
    GOLDEN_KEYS.write_text("\n".join(sorted(KEYS)) + "\n")
