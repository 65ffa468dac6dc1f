"""Config keys, values of their types, and values of no type that they take."""

from hypothesis import strategies as st

from plaintrain.config import CfgNode, get_cfg, get_value
from plaintrain.defaults import NULLABLE


def _leaves(node, path=()):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, (*path, key))
        else:
            yield ".".join((*path, key))


def _sections(node, path=()):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield ".".join((*path, key))
            yield from _sections(value, (*path, key))


LEAVES = list(_leaves(get_cfg()))
SECTIONS = list(_sections(get_cfg()))
DEFAULTS = {key: NULLABLE.get(key, get_value(get_cfg(), key)) for key in LEAVES}

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_WORDS = st.sampled_from(["", "a: b", " a ", "\ta", "a\n"]) | st.sampled_from(
    ["null", "none", "~", "true", "yes", "1e-3", "0x1F", "12:30", "2020-01-01", "-"]
)
STRINGS = _TEXT | _WORDS
# A file may hold no longer ones.
INTS = st.integers(-(2**63), 2**64 - 1)
FLOATS = st.floats(allow_nan=False)
_SCALARS = st.one_of(st.booleans(), INTS, FLOATS, STRINGS, st.none())
_ITEMS = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
# As in INPUT.AUGMENTATIONS.
_PAIRS = st.lists(_SCALARS, max_size=2)
_ITEMS |= st.dictionaries(STRINGS, _SCALARS | _PAIRS | _PAIRS.map(tuple), max_size=2)
LISTS = st.lists(_ITEMS, max_size=4)
# A whole number stands for a float.
NUMBERS = FLOATS | st.integers(-(2**60), 2**60)
KINDS = {bool: st.booleans(), int: INTS, float: NUMBERS, str: STRINGS, list: LISTS, tuple: LISTS.map(tuple)}


def _plain(value):
    """Sequences inside of a value are lists in a config."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def stored(key, value):
    """What a config holds after it was given a value of the key's type."""
    kind = type(DEFAULTS[key])
    if value is None:
        return None
    return kind(map(_plain, value)) if kind in (list, tuple) else kind(value)


def same(a, b):
    """Equal, and of equal types throughout: 1, 1.0 and True are three values."""
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@st.composite
def settings_of(draw, keys=LEAVES):
    """(key, value): a key and a value that it takes; each type is as likely."""
    kind = draw(st.sampled_from(sorted({type(DEFAULTS[key]).__name__ for key in keys})))
    key = draw(st.sampled_from([key for key in keys if type(DEFAULTS[key]).__name__ == kind]))
    value = KINDS[type(DEFAULTS[key])]
    return key, draw(value | st.none() if key in NULLABLE else value)


@st.composite
def mistakes(draw):
    """(key, value): a key and a value of a type that it does not take."""
    key = draw(st.sampled_from(LEAVES))
    kind = type(DEFAULTS[key])
    takes = {float: (float, int), list: (list, tuple), tuple: (list, tuple)}.get(kind, (kind,))
    words = st.text("abcxyz", min_size=1, max_size=6).map(lambda word: f"x{word}")
    kinds = {**KINDS, float: FLOATS, str: words, dict: st.dictionaries(words, INTS, max_size=2)}
    values = [strategy for other, strategy in kinds.items() if other not in takes]
    return key, draw(st.one_of(*values))


def nested(settings):
    """[(dotted key, value)] as the nested mapping of a YAML file."""
    content = {}
    for key, value in settings:
        *path, leaf = key.split(".")
        node = content
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return content
