"""YAML config files, read safely, with the files they build on."""

import os

import yaml

from plaintrain.utils.errors import ConfigError
from plaintrain.utils.files import MAX_BYTES, read_text, reason

BASE_KEY = "_BASE_"
# Values of a YAML text with its aliases written out, sections in sections, files that a file builds on.
_MAX_VALUES, _MAX_DEPTH, _MAX_FILES = 100_000, 50, 100


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that stands twice in one mapping, and alias bombs."""

    def fetch_flow_collection_start(self, token_class):
        """PyYAML's method, with the check before it: each level is looked at for each further bracket."""
        if self.flow_level >= _MAX_DEPTH:
            problem = f"it is nested more than {_MAX_DEPTH} levels deep"
            raise yaml.scanner.ScannerError(None, None, problem, self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def get_single_node(self):
        """PyYAML's method, with the check after it: a few aliases of aliases are billions of values."""
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def construct_number(self, node):
        """PyYAML's methods, for numbers of 64 bits: more digits take long, and may not even be printed."""
        known = {"int": self.construct_yaml_int, "float": self.construct_yaml_float}
        number = known[node.tag.rsplit(":", 1)[-1]](node) if len(node.value) < 80 else 2**64
        if isinstance(number, int) and number.bit_length() > 64:
            what = "a number has more than 64 bits"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        return number

    def construct_mapping(self, node, deep=False):
        """PyYAML's method, with the check before it."""
        seen = set()
        # With a tag it may be no mapping, which PyYAML says.
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value} stands twice in one section", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _measure(node, known):
    """(values, depth) of a node, what it refers to counted each time; `known` are those of others."""
    if id(node) not in known:
        # Met again before it is measured, it is in itself.
        known[id(node)] = _MAX_VALUES, _MAX_DEPTH
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        measured = [_measure(part, known) for part in flat]
        values, depth = 1 + sum(v for v, _ in measured), 1 + max((d for _, d in measured), default=0)
        if values > _MAX_VALUES or depth > _MAX_DEPTH:
            what = f"holds over {_MAX_VALUES:,} values or {_MAX_DEPTH} levels, aliases written out"
            raise yaml.constructor.ConstructorError(None, None, f"it {what}", node.start_mark)
        known[id(node)] = values, depth
    return known[id(node)]


def parse_yaml(text, source):
    """The mapping that a YAML text holds; {} for an empty one.

    Args:
        text: the YAML.
        source: what to call it in an error.

    Raises:
        ConfigError: not YAML, a tag that would run code, a key given twice, or not a mapping.
    """
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.constructor.ConstructorError as e:
        problem = str(e.problem)
        if "python/" in problem:
            problem = "a !!python tag would run code and is refused; write the plain list or value"
        raise ConfigError(f"{source}, line {e.problem_mark.line + 1}: {problem}") from e
    except yaml.YAMLError as e:
        raise ConfigError(_describe(e, source)) from e
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
        # Raised for scalars that look like a date or a number, or have a tag, and are none of the kind,
        # and for deep nesting.
        what = "it is nested too deeply" if isinstance(e, RecursionError) else e
        raise ConfigError(f"{source} is not valid YAML: {what}") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must hold KEY: value lines, not a {type(content).__name__}")
    return content


def flatten(tree, separator=".", prefix=""):
    """{"A": {"B": value}} as {"A.B": value}, at any depth, tuples as lists."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _describe(error, source):
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    line = mark.buffer.splitlines()[mark.line : mark.line + 1] if mark and mark.buffer else []
    hint = ""
    if line and "{" in line[0] and "(" in line[0]:
        hint = '; inside {...} YAML splits a tuple at its comma: write a list, ["a", "b"]'
    return f"{source}{where} is not valid YAML: {what}{hint}"


def load_chain(path, chain=()):
    """[(file, content)] in merge order: the bases of `path` first, `path` last.

    Args:
        path: the file. `_BASE_` in it is one path or a list of paths, each absolute, starting
            with `~`, or relative to the file.
        chain: the files that led here.

    Raises:
        ConfigError: a missing or unreadable file, or a cycle, with the chain of files.
    """
    path = os.path.abspath(os.path.expanduser(path))
    shown = " -> ".join([*chain, path])
    if path in chain:
        raise ConfigError(f"{BASE_KEY} goes round in a circle: {shown}")
    if not os.path.isfile(path):
        what = "base config file not found" if chain else "config file not found"
        raise ConfigError(f"{what}: {shown}")
    try:
        text = read_text(path, MAX_BYTES)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read the config file {shown}: {reason(e)}") from e
    content = parse_yaml(text, path)
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
