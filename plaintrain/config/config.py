"""Configuration: a yacs `CfgNode` with `_BASE_` inheritance and errors that can be acted on.

Values are merged in the order defaults < bases < file < command line, and keep the type of
their default: an int may stand for a float and a list for a tuple, nothing else is converted.
"""

import ast
import os
from collections.abc import Mapping, Sequence

import yaml
from yacs.config import CfgNode as _YacsNode

from plaintrain.config.yaml import SPLIT_TUPLE, load_chain, parse_yaml
from plaintrain.utils.errors import ConfigError, suggest_similar

_COMMAND_LINE = "the command line"
_SCALARS = (bool, int, float, str, type(None))
# Keys that may be null, with a value of the type they otherwise have.
NULLABLE = {"SOLVER.WEIGHT_DECAY_BIAS": 0.0}


class CfgNode(_YacsNode):
    """A tree of settings, read as attributes: `cfg.SOLVER.BASE_LR`.

    `freeze`, `defrost`, `clone` and `set_new_allowed` are those of yacs.
    """

    def merge_from_file(self, cfg_filename):
        """Merge a YAML file over this config, its `_BASE_` files first.

        `_BASE_` is one path or a list of paths, each absolute, starting with `~`, or relative to the file;
        later ones win.
        """
        for path, content in load_chain(os.fspath(cfg_filename)):
            _merge(self, "", content, path)

    def merge_from_list(self, cfg_list):
        """Merge `[key, value, key, value, ...]`, as the command line gives it.

        Values may be strings that hold Python literals: `"(600, 800)"`, `"True"`, `"1e-3"`.
        """
        if len(cfg_list) % 2:
            raise ConfigError(
                f"overrides come in pairs KEY VALUE, but {cfg_list[-1]!r} has no partner in: "
                + " ".join(map(str, cfg_list))
            )
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            literal = _parse_literal(value)
            # A text in quotes: `"''"` is the empty one.
            content = literal if isinstance(literal, str) else value
            for section in reversed(str(key).split(".")):
                content = {section: content}
            _merge(self, "", content, _COMMAND_LINE)

    def merge_from_other_cfg(self, cfg_other):
        """Merge another config (or plain dict) over this one, with the same checks."""
        _merge(self, "", cfg_other, "the merged config")

    def dump(self):
        """Return the whole config as YAML that merges back to an equal config."""
        return yaml.safe_dump(_to_lists(self, "a key", "the config"), default_flow_style=None)

    @classmethod
    def load_cfg(cls, cfg_file_obj_or_str):
        """Return the config that a YAML text holds."""
        if isinstance(cfg_file_obj_or_str, str):
            return cls(parse_yaml(cfg_file_obj_or_str, "the given string"))
        name = cfg_file_obj_or_str.name
        raise ConfigError(f"{name}: use merge_from_file; Python configs are not executed; write YAML")


def get_value(cfg, key):
    """Return the value at a dotted key, for example `get_value(cfg, "SOLVER.BASE_LR")`."""
    for section in key.split("."):
        cfg = cfg[section]
    return cfg


def set_value(cfg, key, value):
    """Set a dotted key, also in a frozen config."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    if frozen:
        cfg.freeze()


def all_keys(node, prefix=""):
    """Yield the dotted key of every section and value."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{key}.")


def _merge(root, section, content, source):
    """Merge a mapping into the section of a config, "" for all of it."""
    node = get_value(root, section) if section else root
    for key, value in content.items():
        # YAML reads an unquoted 2012_0 as a number; keys are names.
        key = str(key)
        name = f"{section}.{key}" if section else key
        if key not in node:
            # yacs keeps its own state beside the keys.
            if not node.is_new_allowed() or key in vars(node):
                raise ConfigError(_describe_unknown_key(name, root, source))
            value = _parse_literal(value) if source == _COMMAND_LINE else value
            is_section = isinstance(value, Mapping)
            setattr(node, key, CfgNode(new_allowed=True) if is_section else _to_lists(value, name, source))
        elif not isinstance(node[key], CfgNode):
            setattr(node, key, _convert(node[key], value, name, source))
        if isinstance(value, Mapping) and isinstance(node[key], CfgNode):
            _merge(root, name, value, source)
        elif isinstance(node[key], CfgNode) and value is not None:
            raise ConfigError(
                f"{name} in {source} is a section with keys of its own, not the value {value!r}"
            )


def _describe_unknown_key(name, root, source):
    leaf = name.rpartition(".")[2]
    known = list(all_keys(root))
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    near = " or ".join(elsewhere[:3]) or suggest_similar(name, known, num=3, cutoff=0.75)
    hint = f"did you mean {near}?" if near else "plaintrain/config/defaults.py lists every key"
    if set(name) & set("()[]{}\"'"):
        hint = SPLIT_TUPLE
    return f"unknown key {name} in {source}: {hint}"


def _parse_literal(value):
    """Return the Python literal that a text holds, or the text itself; other values as they are."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        literal = ast.literal_eval(value)
        # Raises for numbers that are too long to be printed.
        repr(literal)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value
    return literal


def _convert(old, value, name, source):
    """Return a value with the type of the key's old one."""
    given = value
    if not isinstance(old, str):
        value = _parse_literal(value)
    if name in NULLABLE:
        if value is None or str(value).lower() in ("null", "none", "~"):
            return None
        old = NULLABLE[name]
    if isinstance(old, float) and type(value) is int and value.bit_length() <= 64:
        value = float(value)
    elif isinstance(old, tuple | list) and isinstance(value, tuple | list):
        value = type(old)(value)
    if type(old) is not type(value):
        raise ConfigError(_describe_wrong_type(old, value, given, name, source))
    return type(old)(_to_lists(value, name, source))


def _describe_wrong_type(old, value, given, name, source):
    expected, actual = type(old).__name__, type(value).__name__
    message = f"{name} in {source} must be a {expected}, as {old!r}, got the {actual} {given!r}"
    if not isinstance(old, tuple | list):
        return message
    if isinstance(given, str) and given.lstrip().startswith("(") and ")" not in given:
        return f"{message}; {SPLIT_TUPLE}"
    return f"{message}; write [{value!r}] or, on a line of its own, ({value!r},)"


def _to_lists(value, name, source):
    """Return a value whose sequences are lists at any depth, so that a dumped config loads back equal."""
    if isinstance(value, Mapping):
        return {key: _to_lists(item, name, source) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_to_lists(item, name, source) for item in value]
    if isinstance(value, _SCALARS):
        return value
    raise ConfigError(f"{name} in {source} holds a {type(value).__name__}, which a config cannot hold")
