"""YAML config files, read safely, with the files they build on."""

import os

import yaml

from plaintrain.utils.errors import ConfigError
from plaintrain.utils.files import MAX_BYTES, read_text

BASE_KEY = "_BASE_"
SPLIT_TUPLE = 'inside {...} YAML splits a tuple at its comma: write a list, ["a", "b"]'
# Values of a YAML text with its aliases written out, sections in sections, files that a file builds on.
_MAX_VALUES, _MAX_DEPTH, _MAX_FILES = 100_000, 50, 100
# Longer numbers take long to read, and may not even be printed.
_MAX_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also rejects duplicate keys and alias bombs."""

    def fetch_flow_collection_start(self, token_class):
        """Check the depth first: the time that brackets take is quadratic in it."""
        if self.flow_level >= _MAX_DEPTH:
            raise _error(f"it is nested more than {_MAX_DEPTH} levels deep", self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def get_single_node(self):
        """Count the values before they are constructed: a few aliases of aliases are billions."""
        root = super().get_single_node()
        num_values, nodes = 0, [(root, 0)]
        while nodes:
            node, depth = nodes.pop()
            num_values += 1
            if num_values > _MAX_VALUES or depth > _MAX_DEPTH:
                limits = f"{_MAX_VALUES:,} values or {_MAX_DEPTH} levels"
                raise _error(f"it holds over {limits}, aliases written out", root.start_mark)
            if isinstance(node, yaml.MappingNode):
                nodes += [(child, depth + 1) for pair in node.value for child in pair]
            elif isinstance(node, yaml.SequenceNode):
                nodes += [(child, depth + 1) for child in node.value]
            elif node and node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
                raise _error(f"a number has more than {_MAX_DIGITS} digits", node.start_mark)
        return root

    def construct_mapping(self, node, deep=False):
        """Check that no key is given twice first."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise _error(f"duplicate key {key.value}", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _error(problem, mark):
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def parse_yaml(text, source):
    """Return the mapping that a YAML text holds, {} for an empty one; `source` is its name in an error."""
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        # The others are raised for scalars that look like a date or a number, or have a tag, and are not.
        raise ConfigError(_describe(e, source)) from e
    except RecursionError as e:
        raise ConfigError(f"{source} is not valid YAML: it is nested too deeply") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must hold KEY: value lines, not a {type(content).__name__}")
    return content


def _describe(error, source):
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "python/" in problem:
        problem = "a !!python tag would run code; write the plain list or value"
    line = mark.buffer.splitlines()[mark.line : mark.line + 1] if mark and mark.buffer else []
    if line and "{" in line[0] and "(" in line[0]:
        problem = f"{problem}; {SPLIT_TUPLE}"
    return f"{source}{where} is not valid YAML: {problem}"


def flatten(tree, separator=".", prefix=""):
    """Return {"A": {"B": value}} as {"A.B": value}, at any depth, tuples as lists."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def diff_configs(before, now):
    """Return [(key, value before, value now)] of two configs in YAML; a missing value is "-"."""
    before, now = flatten(parse_yaml(before, "the saved config")), flatten(parse_yaml(now, "the config"))
    keys = sorted(before.keys() | now.keys())
    return [(k, before.get(k, "-"), now.get(k, "-")) for k in keys if before.get(k, "-") != now.get(k, "-")]


def load_chain(path, chain=()):
    """Return [(file, content)] in merge order: the bases of `path` first, `path` last.

    `chain` are the files that led here, which an error shows.
    """
    path = os.path.abspath(os.path.expanduser(path))
    shown = " -> ".join([*chain, path])
    if path in chain:
        raise ConfigError(f"{BASE_KEY} goes round in a circle: {shown}")
    if not os.path.isfile(path):
        what = "base config file not found" if chain else "config file not found"
        raise ConfigError(f"{what}: {shown}")
    content = parse_yaml(read_text(path, "config file", MAX_BYTES), path)
    bases = content.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{BASE_KEY} in {path} must be a path or a list of paths, not {bases!r}")
    loaded = []
    for base in bases:
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if max(len(loaded), len(chain)) >= _MAX_FILES:
            raise ConfigError(f"{BASE_KEY} in {path}: a config may build on {_MAX_FILES} files, not on more")
        loaded += load_chain(base, (*chain, path))
    return [*loaded, (path, content)]
