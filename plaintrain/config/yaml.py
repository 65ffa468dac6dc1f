"""Safe loading of YAML config files and their `_BASE_` files."""

import os
from typing import Any, ClassVar

import yaml

from plaintrain.utils.errors import ConfigError
from plaintrain.utils.files import MAX_BYTES, read_text

BASE_KEY = "_BASE_"
SPLIT_TUPLE = 'YAML splits a tuple inside {...} at its comma; write a list, ["a", "b"]'
# Limits of a file, with its aliases expanded, and of a chain of `_BASE_` files.
_MAX_VALUES = 100_000
_MAX_DEPTH = 50
_MAX_FILES = 100
# Parsing and printing longer numbers is slow or fails.
_MAX_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that also rejects duplicate keys and alias bombs."""

    def fetch_flow_collection_start(self, token_class):
        """Check the depth first: parsing nested brackets takes quadratic time."""
        if self.flow_level >= _MAX_DEPTH:
            raise _build_error(f"nested more than {_MAX_DEPTH} levels deep", self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def get_single_node(self):
        """Count the values before constructing them: nested aliases may expand to billions."""
        root = super().get_single_node()
        num_values = 0
        nodes = [(root, 0)]
        while nodes:
            node, depth = nodes.pop()
            num_values += 1
            if num_values > _MAX_VALUES or depth > _MAX_DEPTH:
                limits = f"{_MAX_VALUES:,} values or {_MAX_DEPTH} levels"
                raise _build_error(f"more than {limits}, with aliases expanded", root.start_mark)
            if isinstance(node, yaml.MappingNode):
                nodes += [(child, depth + 1) for pair in node.value for child in pair]
            elif isinstance(node, yaml.SequenceNode):
                nodes += [(child, depth + 1) for child in node.value]
            elif node and node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
                raise _build_error(f"a number has more than {_MAX_DIGITS} digits", node.start_mark)
        return root

    def construct_mapping(self, node, deep=False):
        """Reject duplicate keys."""
        seen = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for key, _ in pairs:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise _build_error(f"duplicate key {key.value}", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """Loader of scalars as they are written: yes, 010 and null are strings."""

    yaml_implicit_resolvers: ClassVar = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


def _build_error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def parse_yaml(text: str, source: str, as_text: bool = False) -> dict[str, Any]:
    """Parse a YAML mapping; `source` names it in errors, `as_text` keeps all scalars as strings."""
    try:
        content = yaml.load(text, Loader=_TextLoader if as_text else _Loader)  # noqa: S506 - SafeLoaders
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        # PyYAML raises the other errors for malformed dates, numbers and tags.
        raise ConfigError(_describe_error(e, source)) from e
    except RecursionError as e:
        raise ConfigError(f"{source} is not valid YAML: nested too deeply") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must contain KEY: value lines, got a {type(content).__name__}")
    return content


def _describe_error(error: Exception, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "python/" in problem:
        problem = "a !!python tag would run code; write the plain list or value"
    line = mark.buffer.splitlines()[mark.line : mark.line + 1] if mark and mark.buffer else []
    if line and "{" in line[0] and "(" in line[0]:
        problem = f"{problem}; {SPLIT_TUPLE}"
    return f"{source}{where} is not valid YAML: {problem}"


def flatten(tree: dict[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts, {"A": {"B": value}} to {"A.B": value}; tuples become lists."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def diff_configs(saved: str, current: str) -> list[tuple[str, Any, Any]]:
    """Return the differences of two YAML configs as [(key, saved, current)]; a missing value is "-"."""
    old = flatten(parse_yaml(saved, "the saved config"))
    new = flatten(parse_yaml(current, "the config"))
    values = [(key, old.get(key, "-"), new.get(key, "-")) for key in sorted(old.keys() | new.keys())]
    return [(key, before, after) for key, before, after in values if before != after]


def load_chain(path: str, chain: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Load a file and its bases as [(file, content)] in merge order, `path` last.

    `chain` are the files whose `_BASE_` led to this file.
    """
    path = os.path.abspath(os.path.expanduser(path))
    shown = " -> ".join([*chain, path])
    if path in chain:
        raise ConfigError(f"{BASE_KEY} is circular: {shown}")
    if not os.path.isfile(path):
        raise ConfigError(f"{'base config' if chain else 'config'} file not found: {shown}")
    content = parse_yaml(read_text(path, "config file", MAX_BYTES), path)
    bases = content.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{BASE_KEY} in {path} must be a path or a list of paths, got {bases!r}")
    loaded: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if max(len(loaded), len(chain)) >= _MAX_FILES:
            raise ConfigError(f"{BASE_KEY} in {path} leads to more than {_MAX_FILES} files")
        loaded += load_chain(base, (*chain, path))
    return [*loaded, (path, content)]
