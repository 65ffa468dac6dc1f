"""Datasets by declaration: the formats, the built-in names, and what a config declares."""

import os

import numpy as np

from plaintrain.data.cache import cached_records
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.data.datasets import coco, concat, folder, shapes, voc, yolo
from plaintrain.utils.errors import UserError, nearest


def dataset_root():
    """The folder that relative dataset paths start from: `$PLAINTRAIN_DATASETS`, or `datasets`."""
    return os.path.expanduser(os.environ.get("PLAINTRAIN_DATASETS", "datasets"))


def _path(path):
    return os.path.join(dataset_root(), os.path.expanduser(path))


def _loader(function, paths, *keys):
    """A loader of (declaration, problems): the function with its paths and then the values of other keys."""

    def load(spec, problems):
        values = (spec.get(key, _DEFAULTS.get(key)) for key in keys)
        return function(*(_path(spec[key]) for key in paths), *values, problems=problems)

    return load


def _load_cached_coco(spec, _):
    json_file, image_root = _path(spec["JSON"]), _path(spec["IMAGE_ROOT"])
    return cached_records(coco.load_coco_json, json_file, image_root, spec.get("CLASSES"))


def _load_yolo(spec, problems):
    return yolo.load_yolo(_path(spec["DATA"]), spec["SPLIT"], spec.get("CLASSES"), dataset_root(), problems)


def _load_shapes(spec, _):
    names = {"SPLIT": "split", "NUM": "num", "HEIGHT": "height", "WIDTH": "width", "SEED": "seed"}
    return shapes.load_shapes(**{names[key]: spec[key] for key in names if key in spec})


def _load_concat(spec, problems):
    _check_parts(spec["DATASETS"], ())

    def read(name):
        return read_dataset(name, problems)

    return concat.load_concat(spec["DATASETS"], read, spec.get("CLASSES"), spec.get("MERGE_CLASSES"))


def _check_parts(names, chain):
    """Refuse a concatenation that contains itself, or a dataset that is not there."""
    for name in names:
        trail = [*chain, name]
        if name in chain:
            raise UserError(f"concat datasets go round in a circle: {' -> '.join(map(str, trail))}")
        if name not in DatasetCatalog:
            raise UserError(
                f"DATASETS of a concat dataset names {name!r}, which is no dataset; the nearest is "
                + nearest(name, DatasetCatalog.list())
            )
        _check_parts((MetadataCatalog.get(name).get("declaration") or {}).get("DATASETS", ()), trail)


_DEFAULTS = {"SCORE_THRESH": 0.0}
# FORMAT -> (loader, needed keys, optional keys with their types, how it is scored by default).
_FORMATS = {
    "coco": (
        _loader(coco.load_coco_json, ("JSON", "IMAGE_ROOT"), "CLASSES"),
        {"JSON": str, "IMAGE_ROOT": str},
        {"CLASSES": list, "KEYPOINT_FLIP_MAP": list},
        "coco",
    ),
    "coco_results": (
        _loader(coco.load_coco_results, ("JSON", "IMAGE_ROOT", "RESULTS"), "CLASSES", "SCORE_THRESH"),
        {"JSON": str, "IMAGE_ROOT": str, "RESULTS": str},
        {"CLASSES": list, "SCORE_THRESH": float, "KEYPOINT_FLIP_MAP": list},
        "coco",
    ),
    "voc": (
        _loader(voc.load_voc, ("ROOT",), "SPLIT", "CLASSES"),
        {"ROOT": str, "SPLIT": str},
        {"CLASSES": list, "YEAR": int},
        "pascal_voc",
    ),
    "yolo": (_load_yolo, {"DATA": str, "SPLIT": str}, {"CLASSES": list}, "coco"),
    "shapes": (
        _load_shapes,
        {"SPLIT": str},
        {"NUM": int, "HEIGHT": int, "WIDTH": int, "SEED": int},
        "coco",
    ),
    "images": (_loader(folder.load_images, ("ROOT",), "CLASSES"), {"ROOT": str}, {"CLASSES": list}, "coco"),
    "concat": (_load_concat, {"DATASETS": list}, {"CLASSES": list, "MERGE_CLASSES": bool}, "coco"),
}
# What every format takes.
_COMMON = {"FORMAT": str, "EVALUATOR": str, "FRACTION": float, "FRACTION_SEED": int}
EVALUATORS = ("coco", "pascal_voc")
_WORDS = {str: "a string", list: "a list", float: "a number", int: "a whole number", bool: "True or False"}


def _check(name, spec):
    where = f"DATASETS.DECLARE.{name}"
    if not isinstance(spec, dict) or str(spec.get("FORMAT")) not in _FORMATS:
        found = spec.get("FORMAT") if isinstance(spec, dict) else spec
        raise UserError(f"{where} needs a FORMAT, one of {', '.join(_FORMATS)}, not {found!r}")
    _, needed, optional, _ = _FORMATS[spec["FORMAT"]]
    types = {**_COMMON, **needed, **optional}
    for key, value in spec.items():
        if key not in types:
            raise UserError(f"{where} has an unknown key {key}; known: {', '.join(types)}")
        # A whole number will do where a fraction may stand.
        if type(value) is not types[key] and (types[key], type(value)) != (float, int):
            raise UserError(f"{where}.{key} must be {_WORDS[types[key]]}, not {value!r}")
    for key in needed:
        if key not in spec:
            raise UserError(f"{where} with FORMAT {spec['FORMAT']} needs the key {key}")
    _check_values(where, spec)


def _check_values(where, spec):
    if spec.get("EVALUATOR", "coco") not in EVALUATORS:
        raise UserError(f"{where}.EVALUATOR must be {' or '.join(EVALUATORS)}, not {spec['EVALUATOR']!r}")
    if not 0 < spec.get("FRACTION", 1) <= 1:
        raise UserError(f"{where}.FRACTION must be above 0 and at most 1, not {spec['FRACTION']}")
    if spec.get("FRACTION_SEED", 0) < 0:
        raise UserError(f"{where}.FRACTION_SEED must be 0 or more, not {spec['FRACTION_SEED']}")
    for key in ("CLASSES", "DATASETS"):
        for name in spec.get(key, ()):
            if not isinstance(name, str):
                raise UserError(
                    f"{where}.{key} must hold names, not {name!r}; quote what YAML does not read as text"
                )
    for pair in spec.get("KEYPOINT_FLIP_MAP", ()):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise UserError(f"{where}.KEYPOINT_FLIP_MAP must hold pairs [left, right] of names, not {pair!r}")


def declare_dataset(name, spec):
    """Register a dataset from its declaration; the same one may be declared again.

    Args:
        name: the dataset's name.
        spec: dict with FORMAT (coco, coco_results, voc, yolo, shapes, images or concat), that
            format's keys, and optionally EVALUATOR (coco or pascal_voc) and FRACTION (the share of
            the images to use, a random one drawn by FRACTION_SEED, in their order). Relative paths
            start from `dataset_root()`.

    Raises:
        UserError: an unknown format or key, a missing key, or a name that means another dataset.
    """
    _check(name, spec)
    spec = dict(spec)
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        if metadata.get("declaration") == spec:
            return
        raise UserError(f"the dataset {name} exists already; declare yours under another name")

    def load():
        records, found = _read(spec, load=_load_cached_coco if spec["FORMAT"] == "coco" else None)
        MetadataCatalog.get(name).set(**found)
        return records

    DatasetCatalog.register(name, load)
    metadata.set(declaration=spec, evaluator_type=spec.get("EVALUATOR", _FORMATS[spec["FORMAT"]][-1]))
    if "YEAR" in spec:
        metadata.set(year=spec["YEAR"])


def _read(spec, problems=None, load=None):
    load = load or _FORMATS[spec["FORMAT"]][0]
    try:
        records, metadata = load(spec, problems)
    except RecursionError as e:
        raise UserError(f"the files of {spec} hold what is nested too deeply to be read") from e
    if "KEYPOINT_FLIP_MAP" in spec:
        metadata["keypoint_flip_map"] = [tuple(pair) for pair in spec["KEYPOINT_FLIP_MAP"]]
    if "FRACTION" in spec:
        # The first images of one permutation: a smaller share is part of a larger one.
        order = np.random.default_rng(spec.get("FRACTION_SEED", 0)).permutation(len(records))
        chosen = sorted(order[: max(1, round(spec["FRACTION"] * len(records)))])
        records = [records[i] for i in chosen]
    return records, metadata


def read_dataset(name, problems=None):
    """Read a dataset anew, outside the catalog.

    Args:
        name: a registered dataset.
        problems: None, or a list that takes the mistakes in a declared dataset's files instead of
            the first one raising.

    Returns:
        (records, metadata): a list, and a dict with what the catalog would know.

    Raises:
        UserError: an unknown name, or a file that cannot be read at all.
    """
    spec = MetadataCatalog.get(name).get("declaration") if name in DatasetCatalog else None
    if spec is None:
        records = list(DatasetCatalog.get(name))
        return records, dict(vars(MetadataCatalog.get(name)))
    records, metadata = _read(spec, problems)
    return records, {**vars(MetadataCatalog.get(name)), **metadata}


def declare_datasets(cfg):
    """Register every dataset of DATASETS.DECLARE."""
    for name, spec in cfg.DATASETS.DECLARE.items():
        declare_dataset(name, spec)


def _builtin_declarations():
    declarations = {}
    for split in ("train", "val"):
        for kind, name in (("instances", "coco"), ("person_keypoints", "keypoints_coco")):
            declarations[f"{name}_2017_{split}"] = {
                "FORMAT": "coco",
                "JSON": f"coco/annotations/{kind}_{split}2017.json",
                "IMAGE_ROOT": f"coco/{split}2017",
            }
        declarations[f"shapes_{split}"] = {
            "FORMAT": "shapes",
            "SPLIT": split,
            "NUM": 1000 if split == "train" else 200,
        }
    for year, splits in ((2007, ("train", "val", "trainval", "test")), (2012, ("train", "val", "trainval"))):
        for split in splits:
            declarations[f"voc_{year}_{split}"] = {
                "FORMAT": "voc",
                "ROOT": f"VOC{year}",
                "SPLIT": split,
                "CLASSES": list(voc.VOC_CLASSES),
                "YEAR": year,
            }
    return declarations


for _name, _spec in _builtin_declarations().items():
    declare_dataset(_name, _spec)
