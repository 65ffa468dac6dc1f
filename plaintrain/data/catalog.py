"""Catalogs of datasets and their metadata, by name."""

import logging
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from plaintrain.data.serialized import SerializedRecords, disable_gc, serialize
from plaintrain.utils.class_lists import REMEDY, describe_class_difference
from plaintrain.utils.errors import UserError, suggest_similar
from plaintrain.utils.text import escape_controls, is_file_name
from plaintrain.utils.user_code import describe_import

logger = logging.getLogger(__name__)


class _Catalog(dict):
    def remove(self, name: str) -> None:
        self.pop(name)

    def list(self) -> list[str]:
        return list(self)


class _DatasetCatalog(_Catalog):
    """name -> function without arguments that returns a `list[dict]` of records."""

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[str, SerializedRecords] = {}

    def register(self, name: str, func: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Register a dataset; `func` is called once, when the records are first needed."""
        if not is_file_name(name):
            rule = 'without / \\ : * ? " < > |, control characters and a leading dot'
            raise UserError(f"the name of a dataset must be a file name {rule}, got {name!r}")
        if name in self:
            raise UserError(f"the dataset {name} is already registered")
        self[name] = func
        # `pop` keeps the records of an earlier dataset of that name.
        self._loaded.pop(name, None)

    def get(self, name: str) -> SerializedRecords:  # type: ignore[override]
        """Return the records of a dataset, loaded once."""
        if name not in self:
            near = suggest_similar(name, self, num=3, cutoff=0.5)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(self.list())}"
            raise UserError(f"the dataset {name!r} is not registered; {hint} ({describe_import()})")
        if name not in self._loaded:
            try:
                with disable_gc():
                    self._loaded[name] = serialize(self[name]())
            except RecursionError as e:
                raise UserError(f"the records of the dataset {name} are nested too deeply") from e
        return self._loaded[name]


class Metadata(SimpleNamespace):
    """Metadata of a dataset as attributes: `thing_classes`, `evaluator_type`, ..."""

    def set(self, **kwargs: Any) -> "Metadata":
        self.__dict__.update(kwargs)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        return self.__dict__.get(key, default)

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __getattr__(self, key):
        raise AttributeError(f"the metadata of dataset {self.__dict__.get('name')} has no {key}")


class _MetadataCatalog(_Catalog):
    """name -> `Metadata`, created when it is first needed."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        return self.setdefault(name, Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()


def register_dataset(name: str, read: Callable[[], tuple], **metadata: Any) -> None:
    """Register a dataset with its metadata; `read` returns the records and further metadata."""

    def load():
        records, loaded_metadata = read()
        MetadataCatalog.get(name).set(**loaded_metadata)
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def load_class_names(name: str) -> list[str]:
    """Return the class names of a dataset, loading the dataset if its metadata does not have them yet."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    if not metadata.get("thing_classes"):
        hint = f'MetadataCatalog.get("{name}").set(thing_classes=[...])'
        raise UserError(f"the dataset {name} names no classes; set CLASSES where it is declared, or {hint}")
    for wrong in [c for c in metadata.thing_classes if escape_controls(" ".join(f"{c}".splitlines())) != c]:
        raise UserError(f"classes of the dataset {name} must be texts of one line, got {wrong!r}")
    return list(metadata.thing_classes)


def compute_hashes(names: Iterable[str]) -> list[list[Any]]:
    """Return `SerializedRecords.compute_hashes` of each registered dataset."""
    return [DatasetCatalog.get(name).compute_hashes() for name in names if name in DatasetCatalog]


def get_class_names(dataset_names: Sequence[str]) -> list[str] | None:
    """Return the class names in the first dataset's metadata, without loading the dataset."""
    return MetadataCatalog.get(dataset_names[0]).get("thing_classes") if dataset_names else None


def get_common_class_names(names: Sequence[str]) -> list[str]:
    """Return the class names of several datasets, which must be equal."""
    classes = load_class_names(names[0])
    for name in names[1:]:
        other = load_class_names(name)
        if other != classes:
            difference = f"{classes} and {other} ({describe_class_difference(classes, other)}); {REMEDY}"
            raise UserError(f"the datasets {names[0]} and {name} have different classes: {difference}")
    return classes


def select_classes(
    available: Sequence[str], selected: Sequence[str] | None, source: str, allow_missing: bool = False
) -> list[str]:
    """Return the selected class names, or all, in the order of their labels; `source` is for errors.

    `allow_missing` warns of a selected name that is not available and keeps it, as if no other is left.
    """
    if not selected:
        return list(available)
    for name in selected:
        if name not in available:
            hint = f"; the nearest is {suggest_similar(name, available)!r}" if available else ""
            if allow_missing or set(available) <= set(selected):
                logger.warning(f"{source} has no class {name!r}{hint}")
                continue
            raise UserError(f"{source} has no class {name!r}{hint} (FORMAT concat allows missing classes)")
    if len(set(selected)) != len(selected):
        raise UserError(f"CLASSES of {source} names a class twice: {list(selected)}")
    return list(selected)
