"""Configuration: a yacs `CfgNode` with `_BASE_` inheritance and errors that suggest a fix.

Values are merged in the order defaults < bases < file < command line, and keep the type of
their default: int is converted to float, list to tuple and back, nothing else.
"""

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from yacs.config import CfgNode as _YacsNode

from plaintrain.config.yaml import SPLIT_TUPLE, load_chain, parse_yaml
from plaintrain.utils.errors import ConfigError, suggest_similar

_COMMAND_LINE = "the command line"
_SCALARS = (bool, int, float, str, type(None))
# Keys that may be null, with an example of their type otherwise.
NULLABLE = {"SOLVER.WEIGHT_DECAY_BIAS": 0.0}


class CfgNode(_YacsNode):
    """Tree of settings with attribute access: `cfg.SOLVER.BASE_LR`."""

    def merge_from_file(self, cfg_filename: str | os.PathLike) -> None:
        """Merge a YAML file into this config, its `_BASE_` files first.

        `_BASE_` is one path or a list of paths, absolute, starting with `~`, or relative to the file; later
        files override earlier ones.
        """
        for path, content in load_chain(os.fspath(cfg_filename)):
            _merge(self, "", content, path)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge `[key, value, key, value, ...]`; strings are parsed as Python literals: `"(600, 800)"`."""
        if len(cfg_list) % 2:
            raise ConfigError(
                f"overrides must be pairs KEY VALUE, got {cfg_list[-1]!r} without a value in: "
                + " ".join(map(str, cfg_list))
            )
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            literal = _parse_literal(value)
            # A quoted string is unquoted: `"''"` is empty.
            content: Any = literal if isinstance(literal, str) else value
            for section in reversed(str(key).split(".")):
                content = {section: content}
            _merge(self, "", content, _COMMAND_LINE)

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge another config or a dict into this config, with the same checks."""
        _merge(self, "", cfg_other, "the merged config")

    def dump(self) -> str:
        """Return the config as YAML; merging it restores an equal config."""
        return yaml.safe_dump(_to_lists(self, "a key", "the config"), default_flow_style=None)

    @classmethod
    def load_cfg(cls, cfg_file_obj_or_str: Any) -> "CfgNode":
        """Parse a config from a YAML string."""
        if isinstance(cfg_file_obj_or_str, str):
            return cls(parse_yaml(cfg_file_obj_or_str, "the string"))
        name = cfg_file_obj_or_str.name
        raise ConfigError(f"{name}: use merge_from_file; Python configs are not executed; write YAML")


def get_value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key: `get_value(cfg, "SOLVER.BASE_LR")`."""
    for section in key.split("."):
        cfg = cfg[section]
    return cfg


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    """Set the value of a dotted key, also in a frozen config."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    if frozen:
        cfg.freeze()


def iterate_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all sections and values."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from iterate_keys(value, f"{prefix}{key}.")


def _merge(root: CfgNode, section: str, content: Mapping[str, Any], source: str) -> None:
    """Merge a mapping into a section of the config; "" is the root."""
    node = get_value(root, section) if section else root
    for key, value in content.items():
        # YAML parses an unquoted 2012_0 as a number.
        key = str(key)
        name = f"{section}.{key}" if section else key
        if key not in node:
            # yacs keeps its own state in vars(node).
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
            raise ConfigError(f"{name} in {source} must be a section with keys, got {value!r}")


def _describe_unknown_key(name: str, root: CfgNode, source: str) -> str:
    leaf = name.rpartition(".")[2]
    known = list(iterate_keys(root))
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    near = " or ".join(elsewhere[:3]) or suggest_similar(name, known, num=3, cutoff=0.75)
    hint = f"did you mean {near}?" if near else "plaintrain/config/defaults.py lists every key"
    if set(name) & set("()[]{}\"'"):
        hint = SPLIT_TUPLE
    return f"unknown key {name} in {source}; {hint}"


def _parse_literal(value: Any) -> Any:
    """Return the value of a string that is a Python literal; any other value unchanged."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        literal = ast.literal_eval(value)
        repr(literal)  # raises if an int is too long to print
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value
    return literal


def _convert(old: Any, value: Any, name: str, source: str) -> Any:
    """Convert a value to the type of the key's old value."""
    raw = value
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
        raise ConfigError(_describe_wrong_type(old, value, raw, f"{name} in {source}"))
    return type(old)(_to_lists(value, name, source))


def _describe_wrong_type(old: Any, value: Any, raw: Any, location: str) -> str:
    expected = f"of type {type(old).__name__}, such as {old!r}"
    message = f"{location} must be {expected}, got {raw!r} of type {type(value).__name__}"
    if not isinstance(old, tuple | list):
        return message
    if isinstance(raw, str) and raw.lstrip().startswith("(") and ")" not in raw:
        return f"{message}; {SPLIT_TUPLE}"
    return f"{message}; write [{value!r}] or, on a line of its own, ({value!r},)"


def _to_lists(value: Any, name: str, source: str) -> Any:
    """Convert all sequences in a value to lists, so that a dumped config is equal when loaded."""
    if isinstance(value, Mapping):
        return {key: _to_lists(item, name, source) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_to_lists(item, name, source) for item in value]
    if isinstance(value, _SCALARS):
        return value
    raise ConfigError(f"{name} in {source} must be a plain YAML value, got a {type(value).__name__}")
