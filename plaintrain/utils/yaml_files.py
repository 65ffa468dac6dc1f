"""YAML config files, read safely, with the files they build on."""

import os

import yaml

from plaintrain.utils.errors import ConfigError

BASE_KEY = "_BASE_"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node, deep=False):
        """PyYAML's method, with the check before it."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value} stands twice in one section", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


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
    except (ValueError, KeyError, RecursionError) as e:
        # Raised for scalars that look like a date or a number and are none, and for deep nesting.
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else e
        raise ConfigError(f"{source} is not valid YAML: {reason}") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must hold KEY: value lines, not a {type(content).__name__}")
    return content


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
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the config file {shown}: {e}") from e
    content = parse_yaml(text, path)
    bases = content.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{BASE_KEY} in {path} must be a path or a list of paths, not {bases!r}")
    loaded = []
    for base in bases:
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        loaded += load_chain(base, (*chain, path))
    return [*loaded, (path, content)]
