"""Defects to patch into plaintrain.config."""

from plaintrain import config
from plaintrain.config import CfgNode


def coerce_from(change):
    """A defect in how a value takes a key's type: `change(original, old, value, name, source)`."""

    def defect(patch):
        original = config._coerce
        patch.setattr(config, "_coerce", lambda *arguments: change(original, *arguments))

    return defect


def extend_lists(original, old, value, name, source):
    new = original(old, value, name, source)
    return old + new if isinstance(old, list | tuple) else new


def subclasses_are_taken(original, old, value, name, source):
    return value if isinstance(value, type(old)) else original(old, value, name, source)


def name_is_short(original, old, value, name, source):
    return original(old, value, name.rsplit(".", 1)[-1], source)


def configs_are_one(patch):
    one = config.get_cfg()
    patch.setattr(config, "_copy_node", lambda node: one)


def dump_from(change):
    """A defect in what a dump writes: `change(value)`."""

    def defect(patch):
        original = config._to_plain
        patch.setattr(config, "_to_plain", lambda value: change(original(value)))

    return defect


def without_empty(value):
    return {key: item for key, item in value.items() if item != ""} if isinstance(value, dict) else value


def with_stripped_strings(value):
    return value.strip() if isinstance(value, str) else value


def pairs_reversed(patch):
    original = CfgNode.merge_from_list

    def merge(self, pairs):
        starts = range(len(pairs) - 2, -1, -2)
        original(self, [part for start in starts for part in pairs[start : start + 2]])

    patch.setattr(CfgNode, "merge_from_list", merge)


def chain_from(change):
    """A defect in the order of a file and its bases: `change(chain)`."""

    def defect(patch):
        original = config.load_chain
        patch.setattr(config, "load_chain", lambda path: change(original(path)))

    return defect


def unknown_keys_are_passed_over(patch):
    original = config._merge

    def merge(new, node, path, source):
        original({key: item for key, item in new.items() if key in node}, node, path, source)

    patch.setattr(config, "_merge", merge)
