"""Datasets by declaration: the formats, the built-in names, and what a config declares."""

import os

from plaintrain.data import coco, shapes, voc
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.utils.errors import UserError


def dataset_root():
    """The folder that relative dataset paths start from: `$PLAINTRAIN_DATASETS`, or `datasets`."""
    return os.path.expanduser(os.environ.get("PLAINTRAIN_DATASETS", "datasets"))


def _path(path):
    return os.path.join(dataset_root(), os.path.expanduser(path))


def _load_coco(spec):
    return coco.load_coco_json(_path(spec["JSON"]), _path(spec["IMAGE_ROOT"]), spec.get("CLASSES"))


def _load_voc(spec):
    return voc.load_voc(_path(spec["ROOT"]), spec["SPLIT"], spec.get("CLASSES"))


def _load_shapes(spec):
    names = {"SPLIT": "split", "NUM": "num", "HEIGHT": "height", "WIDTH": "width", "SEED": "seed"}
    return shapes.load_shapes(**{names[key]: spec[key] for key in names if key in spec})


# FORMAT -> (loader, needed keys, optional keys with their types, how it is scored by default).
_FORMATS = {
    "coco": (_load_coco, {"JSON": str, "IMAGE_ROOT": str}, {"CLASSES": list}, "coco"),
    "voc": (_load_voc, {"ROOT": str, "SPLIT": str}, {"CLASSES": list, "YEAR": int}, "pascal_voc"),
    "shapes": (
        _load_shapes,
        {"SPLIT": str},
        {"NUM": int, "HEIGHT": int, "WIDTH": int, "SEED": int},
        "coco",
    ),
}
EVALUATORS = ("coco", "pascal_voc")


def _check(name, spec):
    where = f"DATASETS.DECLARE.{name}"
    if not isinstance(spec, dict) or str(spec.get("FORMAT")) not in _FORMATS:
        raise UserError(f"{where} needs a FORMAT, one of {', '.join(_FORMATS)}, not {spec!r}")
    _, needed, optional, _ = _FORMATS[spec["FORMAT"]]
    types = {"FORMAT": str, "EVALUATOR": str, **needed, **optional}
    for key, value in spec.items():
        if key not in types:
            raise UserError(f"{where} has an unknown key {key}; known: {', '.join(types)}")
        if type(value) is not types[key]:
            kind = types[key].__name__
            raise UserError(f"{where}.{key} must be a {kind}, not {value!r}")
    for key in needed:
        if key not in spec:
            raise UserError(f"{where} with FORMAT {spec['FORMAT']} needs the key {key}")
    if spec.get("EVALUATOR", "coco") not in EVALUATORS:
        raise UserError(f"{where}.EVALUATOR must be {' or '.join(EVALUATORS)}, not {spec['EVALUATOR']!r}")


def declare_dataset(name, spec):
    """Register a dataset from its declaration; the same one may be declared again.

    Args:
        name: the dataset's name.
        spec: dict with FORMAT (coco, voc or shapes), that format's keys, and optionally EVALUATOR
            (coco or pascal_voc). Relative paths start from `dataset_root()`.

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
    loader, _, _, evaluator_type = _FORMATS[spec["FORMAT"]]

    def load():
        records, found = loader(spec)
        MetadataCatalog.get(name).set(**found)
        return records

    DatasetCatalog.register(name, load)
    metadata.set(declaration=spec, evaluator_type=spec.get("EVALUATOR", evaluator_type))
    if "YEAR" in spec:
        metadata.set(year=spec["YEAR"])


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
