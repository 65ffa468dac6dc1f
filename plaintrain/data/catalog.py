"""Datasets by name: a function that returns records, and what is known about them."""

import logging
from types import SimpleNamespace

from plaintrain.data.serialized import SerializedRecords, disable_gc
from plaintrain.utils.class_lists import REMEDY, describe_class_difference
from plaintrain.utils.errors import UserError, suggest_similar

logger = logging.getLogger(__name__)


class _DatasetCatalog(dict):
    """name -> function of no arguments that returns a `list[dict]` of records."""

    def __init__(self):
        super().__init__()
        self._loaded = {}

    def register(self, name, func):
        """Make a dataset known; the records that `func` returns are asked for once and kept."""
        if name in self:
            raise UserError(f"the dataset {name} is registered already")
        self[name] = func

    def get(self, name):
        """The records of a dataset, a `SerializedRecords`."""
        if name not in self:
            near = suggest_similar(name, self, num=3, cutoff=0.5)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(self.list())}"
            raise UserError(f"the dataset {name!r} is not registered; {hint}")
        if name not in self._loaded:
            try:
                with disable_gc():
                    records = self[name]()
                    is_serialized = isinstance(records, SerializedRecords)
                    self._loaded[name] = records if is_serialized else SerializedRecords(records)
            except RecursionError as e:
                raise UserError(f"the dataset {name} holds what is nested too deeply to be read") from e
        return self._loaded[name]

    def remove(self, name):
        """Forget a dataset."""
        self.pop(name)
        self._loaded.pop(name, None)

    def list(self):
        """All names."""
        return list(self)


class Metadata(SimpleNamespace):
    """What is known about a dataset: `thing_classes`, `evaluator_type`, ... as attributes."""

    def set(self, **kwargs):
        """Set attributes, given as `name=value`; returns the object."""
        self.__dict__.update(kwargs)
        return self

    def get(self, key, default=None):
        return self.__dict__.get(key, default)

    def __getattr__(self, key):
        raise AttributeError(f"the metadata of dataset {self.__dict__.get('name')} has no {key}")


class _MetadataCatalog(dict):
    """name -> `Metadata`, created empty when first asked for."""

    def get(self, name):
        return self.setdefault(name, Metadata(name=name))

    def remove(self, name):
        self.pop(name)

    def list(self):
        return list(self)


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()


def load_class_names(name):
    """The class names of a dataset, loading it if they come from its files."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    if not metadata.get("thing_classes"):
        raise UserError(
            f"the dataset {name} names no classes: give its declaration CLASSES, or call "
            f'MetadataCatalog.get("{name}").set(thing_classes=[...])'
        )
    return list(metadata.thing_classes)


def get_class_names(dataset_names):
    """Return the class names that the first dataset's metadata has, None without any."""
    return MetadataCatalog.get(dataset_names[0]).get("thing_classes") if dataset_names else None


def get_common_class_names(names):
    """The class names that all of these datasets have."""
    classes = load_class_names(names[0])
    for name in names[1:]:
        found = load_class_names(name)
        if found != classes:
            difference = f"{classes} and {found} ({describe_class_difference(classes, found)})"
            raise UserError(
                f"the datasets {names[0]} and {name} have different classes: {difference}; {REMEDY}"
            )
    return classes


def select_classes(found, wanted, where, may_miss=False):
    """The classes to use, in order.

    Args:
        found: class names of the files.
        wanted: names to keep, in the order of their labels; empty or None for all of `found`.
        where: what to call the dataset in an error.
        may_miss: warn of a wanted name that the dataset does not have, which may be a typo, and keep it.
    """
    if not wanted:
        return list(found)
    for name in wanted:
        if name not in found:
            hint = f"; the nearest is {suggest_similar(name, found)!r}" if found else ""
            if may_miss:
                logger.warning(f"{where} has no class {name!r}{hint}")
                continue
            hint += " (only CLASSES of FORMAT concat may name classes that are missing)"
            raise UserError(f"{where} has no class {name!r}{hint}")
    if len(set(wanted)) != len(wanted):
        raise UserError(f"CLASSES of {where} names a class twice: {list(wanted)}")
    return list(wanted)
