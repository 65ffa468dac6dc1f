"""Configuration: a yacs `CfgNode` with `_BASE_` inheritance and errors that can be acted on.

Values are merged in the order defaults < bases < file < command line, and keep the type of
their default: an int may stand for a float and a list for a tuple, nothing else is converted.
"""

import ast
import copy
import difflib
import os
from collections.abc import Mapping, Sequence

import yaml
from yacs.config import CfgNode as _YacsNode

from plaintrain.config.defaults import _C, NULLABLE, SUPPORTED
from plaintrain.config.yaml import load_chain, parse_yaml
from plaintrain.utils.errors import ConfigError

_COMMAND_LINE = "the command line"
_SCALARS = (bool, int, float, str, type(None))


class CfgNode(_YacsNode):
    """A tree of settings, read as attributes: `cfg.SOLVER.BASE_LR`.

    `freeze`, `defrost`, `clone` and `set_new_allowed` are those of yacs.
    """

    def merge_from_file(self, cfg_filename):
        """Merge a YAML file over this config, its `_BASE_` files first.

        Args:
            cfg_filename: path of the file. `_BASE_` in it is one path or a list of paths, each
                absolute, starting with `~`, or relative to the file; later ones win.

        Raises:
            ConfigError: a missing or unreadable file, a cycle of bases, an unknown key, a value
                of another type than the key's.
        """
        for path, content in load_chain(os.fspath(cfg_filename)):
            _merge(content, self, (), path)

    def merge_from_list(self, cfg_list):
        """Merge `[key, value, key, value, ...]`, as the command line gives it.

        Values may be strings that hold Python literals: `"(600, 800)"`, `"True"`, `"1e-3"`.

        Raises:
            ConfigError: a key without a value, an unknown key, a value of another type.
        """
        if len(cfg_list) % 2:
            raise ConfigError(
                f"overrides come in pairs KEY VALUE, but {cfg_list[-1]!r} has no partner in: "
                + " ".join(map(str, cfg_list))
            )
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            content = _unquote(value)
            for part in reversed(str(key).split(".")):
                content = {part: content}
            _merge(content, self, (), _COMMAND_LINE)

    def merge_from_other_cfg(self, cfg_other):
        """Merge another config (or plain dict) over this one, with the same checks."""
        _merge(cfg_other, self, (), "the merged config")

    def dump(self):
        """The whole config as YAML that merges back to an equal config."""
        return yaml.safe_dump(_to_plain(self), sort_keys=True, default_flow_style=None)

    @classmethod
    def _load_cfg_from_file(cls, file_obj):
        raise ConfigError(f"{file_obj.name}: use merge_from_file; only YAML configs are read")

    @classmethod
    def _load_cfg_py_source(cls, filename):
        raise ConfigError(f"{filename}: Python configs are not executed; write YAML")

    @classmethod
    def _load_cfg_from_yaml_str(cls, str_obj):
        return cls(parse_yaml(str_obj, "the given string"))


def get_cfg():
    """A fresh config holding every key's default."""
    return _copy_node(_C)


def split_overrides(words):
    """(names, overrides) of a command line of names and then KEY VALUE pairs.

    The pairs begin at the first word that is a key, or would be one in a section that there is.
    """
    for i, word in enumerate(words):
        section, dot, _ = word.partition(".")
        if section in _C and isinstance(_C[section], _YacsNode) == bool(dot):
            return words[:i], words[i:]
    return words, []


def _copy_node(node):
    """A yacs node as a `CfgNode`, in depth."""
    copied = CfgNode(new_allowed=node.is_new_allowed())
    for key, value in node.items():
        copied[key] = _copy_node(value) if isinstance(value, _YacsNode) else copy.deepcopy(value)
    return copied


def get_value(cfg, key):
    """The value at a dotted key, for example `get_value(cfg, "SOLVER.BASE_LR")`."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def set_value(cfg, key, value):
    """Set a dotted key, also in a frozen config."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    if frozen:
        cfg.freeze()


def check_cfg(cfg):
    """Refuse values of Detectron2's keys that name a variant plaintrain does not have.

    Keys that belong to a feature are looked at only when the feature is on.

    Raises:
        ConfigError: names the key, its value and what is supported.
    """
    for feature, keys in SUPPORTED.items():
        switch, _, wanted = feature.partition("=")
        if switch and str(get_value(cfg, switch)) not in wanted.split("|"):
            continue
        for key, allowed in keys.items():
            value = get_value(cfg, key)
            if value not in allowed:
                options = " or ".join(repr(option) for option in allowed)
                where = f" with {feature.replace('=', ' ').replace('|', ' or ')}" if feature else ""
                raise ConfigError(f"{key} is {value!r}, but only {options} is supported{where}")


def _merge(new, node, path, source):
    for key, value in new.items():
        # YAML reads an unquoted 2012_0 as a number; keys are names.
        key = str(key)
        name = ".".join([*path, key])
        if key not in node:
            # yacs keeps its own state beside the keys.
            if not node.is_new_allowed() or key in vars(node):
                raise ConfigError(_unknown_key(name, node, path, source))
            setattr(node, key, _to_node(value, name, source))
        elif not isinstance(node[key], _YacsNode):
            setattr(node, key, _coerce(node[key], value, name, source))
        elif isinstance(value, Mapping):
            _merge(value, node[key], (*path, key), source)
        elif value is not None:
            raise ConfigError(
                f"{name} in {source} is a section with keys of its own, not the value {value!r}"
            )


def _unknown_key(name, node, path, source):
    known = _all_keys(_C, ())
    known += [".".join([*path, str(key)]) for key in node]
    leaf = name.rsplit(".", 1)[-1]
    near = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    near += difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    near = list(dict.fromkeys(near))[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "plaintrain/config/defaults.py lists every key"
    if set(name) & set("()[]{}\"'"):
        hint = 'YAML split a tuple at its comma: inside {...} write a list, ["a", "b"]'
    return f"unknown key {name} in {source}: {hint}"


def _all_keys(node, path):
    keys = []
    for key, value in node.items():
        keys.append(".".join([*path, key]))
        if isinstance(value, _YacsNode):
            keys += _all_keys(value, (*path, key))
    return keys


def _to_node(value, name, source):
    """A value under a section that takes new keys: mappings become nodes of the same kind."""
    if isinstance(value, Mapping):
        node = CfgNode(new_allowed=True)
        for key, item in value.items():
            node[str(key)] = _to_node(item, f"{name}.{key}", source)
        return node
    if source == _COMMAND_LINE:
        value = _literal(value)
    return _plain_item(value, name, source)


def _unquote(value):
    """Drop the quotes of a command-line value such as `"''"`; anything else stays as it is."""
    literal = _literal(value)
    return literal if isinstance(literal, str) else value


def _literal(value):
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        literal = ast.literal_eval(value)
        # What is too long to be printed, or nested too deeply, is none either.
        repr(literal)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value
    return literal


def _coerce(old, value, name, source):
    """`value` with the type of `old`, or a `ConfigError`."""
    given = value
    if not isinstance(old, str):
        value = _literal(value)
    if name in NULLABLE:
        if value is None or str(value).lower() in ("null", "none", "~"):
            return None
        old = NULLABLE[name]
    if type(old) is type(value):
        pass
    elif isinstance(old, float) and type(value) is int and value.bit_length() <= 64:
        value = float(value)
    elif isinstance(old, tuple | list) and isinstance(value, tuple | list):
        value = type(old)(value)
    else:
        raise ConfigError(_wrong_type(old, value, given, name, source))
    return type(old)(_plain_item(value, name, source))


def _plain_item(value, name, source):
    """A value whose sequences are lists at any depth, so that a dumped config loads back equal."""
    if isinstance(value, Mapping):
        return {key: _plain_item(item, name, source) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain_item(item, name, source) for item in value]
    if isinstance(value, int) and value.bit_length() > 64:
        raise ConfigError(f"{name} in {source} holds a whole number of more than 64 bits")
    if isinstance(value, _SCALARS):
        return value
    raise ConfigError(f"{name} in {source} holds a {type(value).__name__}, which a config cannot hold")


def _wrong_type(old, value, given, name, source):
    expected, found = type(old).__name__, type(value).__name__
    message = f"{name} in {source} must be a {expected}, as {old!r}, but is the {found} {given!r}"
    if isinstance(old, tuple | list):
        if isinstance(given, str) and given.lstrip().startswith("(") and ")" not in given:
            return message + ': YAML split a tuple at its comma; inside {...} write ["a", "b"]'
        return message + f": write [{value!r}] or, on a line of its own, ({value!r},)"
    return message


def _to_plain(value):
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to_plain(item) for item in value]
    return value
