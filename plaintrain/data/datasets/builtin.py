"""Dataset formats, built-in datasets and the datasets of DATASETS.DECLARE."""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plaintrain.config import CfgNode
from plaintrain.config.rules import ANY_NUMBER, FRACTION, STRING, Rule, allow, list_of, tuple_of
from plaintrain.data.cache import load_cached_records
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, register_dataset
from plaintrain.data.datasets import coco, concat, shapes, voc, yolo
from plaintrain.data.image_files import load_images
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import describe_dataset_root, get_dataset_root
from plaintrain.utils.text import is_file_name


def _load_concat(datasets, classes=None, merge_classes=False, problems=None):
    _check_cycle(datasets, ())
    return concat.load_concat(datasets, lambda name: read_dataset(name, problems), classes, merge_classes)


def _check_cycle(names: Sequence[str], chain: Sequence[str]) -> None:
    for name in names:
        if name in chain:
            raise UserError(f"concat datasets must not form a cycle, got {' -> '.join([*chain, name])}")
        spec = MetadataCatalog.get(name).get("declaration") or {}
        _check_cycle(spec.get("DATASETS", ()), [*chain, name])


_READERS: dict[str, Callable[..., coco.LoadedDataset]] = {
    "coco": coco.read_coco_json,
    "coco_results": coco.load_coco_results,
    "voc": voc.load_voc,
    "yolo": yolo.load_yolo,
    "shapes": shapes.load_shapes,
    "images": load_images,
    "concat": _load_concat,
}
_PATHS = ("JSON", "IMAGE_ROOT", "RESULTS", "ROOT", "DATA")
# Every format accepts the common keys; the metadata keys are not passed to the reader.
_COMMON = ("FORMAT", "EVALUATOR", "FRACTION", "FRACTION_SEED")
_METADATA = {"coco": ("KEYPOINT_FLIP_MAP",), "coco_results": ("KEYPOINT_FLIP_MAP",), "voc": ("YEAR",)}
EVALUATORS = ("coco", "pascal_voc")


_INTEGER = Rule("an integer", lambda value: type(value) is int)
_NAMES = list_of(STRING, "a list of names; quote names that YAML does not read as strings")
_RULES = {
    **dict.fromkeys(("FORMAT", *_PATHS), STRING),
    "SPLIT": Rule("a name without / and control characters", is_file_name),
    **dict.fromkeys(("NUM", "HEIGHT", "WIDTH", "SEED", "YEAR"), _INTEGER),
    **dict.fromkeys(("CLASSES", "DATASETS"), _NAMES),
    "KEYPOINT_FLIP_MAP": list_of(tuple_of("", STRING, STRING), "a list of pairs [left, right] of names"),
    "MERGE_CLASSES": Rule("True or False", lambda value: isinstance(value, bool)),
    "SCORE_THRESH": ANY_NUMBER,
    "EVALUATOR": allow(*EVALUATORS),
    "FRACTION": FRACTION,
    "FRACTION_SEED": Rule("an integer >= 0", lambda value: type(value) is int and value >= 0),
}
# The parameters of the readers.
_PARAMETERS = {key: key.lower() for key in _RULES}
_PARAMETERS |= {"JSON": "json_file", "RESULTS": "results_file", "DATA": "data_file"}


def _check_declaration(name: str, spec: Any) -> None:
    key_prefix = f"DATASETS.DECLARE.{name}"
    if not isinstance(spec, dict) or str(spec.get("FORMAT")) not in _READERS:
        value = spec.get("FORMAT") if isinstance(spec, dict) else spec
        raise UserError(f"{key_prefix}.FORMAT must be one of {', '.join(_READERS)}, got {value!r}")
    parameters = inspect.signature(_READERS[spec["FORMAT"]]).parameters
    keys = [key for key in _RULES if _PARAMETERS[key] in parameters]
    known = [*keys, *_COMMON, *_METADATA.get(spec["FORMAT"], ())]
    for key, value in spec.items():
        if key not in known:
            raise UserError(f"{key_prefix} has an unknown key {key}; known: {', '.join(known)}")
        if not _RULES[key].accepts(value):
            raise UserError(f"{key_prefix}.{key} must be {_RULES[key].words}, got {value!r}")
    for key in keys:
        if key not in spec and parameters[_PARAMETERS[key]].default is inspect.Parameter.empty:
            raise UserError(f"{key_prefix} with FORMAT {spec['FORMAT']} requires the key {key}")


def declare_dataset(name: str, spec: dict[str, Any]) -> None:
    """Register a dataset from its declaration (docs/DATA.md); repeating the same one is allowed."""
    _check_declaration(name, spec)
    spec = dict(spec)
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        if metadata.get("declaration") == spec:
            return
        raise UserError(f"the dataset {name} already exists; declare yours under another name")

    evaluator = "pascal_voc" if spec["FORMAT"] == "voc" else "coco"
    year = {"year": spec["YEAR"]} if "YEAR" in spec else {}
    known = {"declaration": spec, "evaluator_type": spec.get("EVALUATOR", evaluator), **year}
    register_dataset(name, functools.partial(_read, spec), **known)


def _read(spec, problems=None):
    reader = _READERS[spec["FORMAT"]]
    if reader is coco.read_coco_json and problems is None:
        reader = functools.partial(load_cached_records, reader)
    values = {"problems": problems, "dataset_root": get_dataset_root()}
    for key, value in spec.items():
        if key in _PATHS:
            value = os.path.join(get_dataset_root(), os.path.expanduser(value))
        values[_PARAMETERS[key]] = value
    parameters = inspect.signature(reader).parameters
    try:
        records, metadata = reader(**{key: value for key, value in values.items() if key in parameters})
    except RecursionError as e:
        raise UserError(f"a file of {spec} is nested too deeply") from e
    except UserError as e:
        paths = [values[_PARAMETERS[key]] for key in _PATHS if key in spec]
        if hint := "".join([describe_dataset_root(path) for path in paths if not os.path.exists(path)][:1]):
            raise UserError(f"{e}{hint}") from e
        raise
    if "KEYPOINT_FLIP_MAP" in spec:
        metadata["keypoint_flip_map"] = [tuple(pair) for pair in spec["KEYPOINT_FLIP_MAP"]]
    if "FRACTION" in spec:
        # Prefixes of one permutation: a larger fraction contains every smaller one.
        order = np.random.default_rng(spec.get("FRACTION_SEED", 0)).permutation(len(records))
        indices = sorted(order[: max(1, round(spec["FRACTION"] * len(records)))])
        records = [records[i] for i in indices]
    return records, metadata


def read_dataset(name: str, problems: list[UserError] | None = None) -> coco.LoadedDataset:
    """Read a registered dataset and its metadata again, bypassing the catalog's copy.

    With a list `problems`, errors in a declared dataset's files are appended to it instead of raised.
    """
    spec = MetadataCatalog.get(name).get("declaration") if name in DatasetCatalog else None
    records, metadata = _read(spec, problems) if spec else (DatasetCatalog.get(name), {})
    return list(records), {**vars(MetadataCatalog.get(name)), **metadata}


def declare_datasets(cfg: CfgNode, problems: dict[str, UserError] | None = None) -> None:
    """Register every dataset of DATASETS.DECLARE; with `problems`, collect the errors by name."""
    for name, spec in cfg.DATASETS.DECLARE.items():
        try:
            declare_dataset(name, spec)
        except UserError as e:
            if problems is None:
                raise
            problems[name] = e


def _declare_builtin_datasets():
    for split, num in (("train", 1000), ("val", 200)):
        for prefix, name in (("instances", "coco"), ("person_keypoints", "keypoints_coco")):
            files = {"JSON": f"coco/annotations/{prefix}_{split}2017.json", "IMAGE_ROOT": f"coco/{split}2017"}
            declare_dataset(f"{name}_2017_{split}", {"FORMAT": "coco", **files})
        declare_dataset(f"shapes_{split}", {"FORMAT": "shapes", "SPLIT": split, "NUM": num})
    for year, splits in ((2007, ("train", "val", "trainval", "test")), (2012, ("train", "val", "trainval"))):
        for split in splits:
            spec = {"FORMAT": "voc", "ROOT": f"VOC{year}", "SPLIT": split, "YEAR": year}
            declare_dataset(f"voc_{year}_{split}", {**spec, "CLASSES": list(voc.VOC_CLASSES)})


_declare_builtin_datasets()
