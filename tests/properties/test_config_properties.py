"""Properties of configs: any value of a key's type is kept, dumps and loads, and the later one wins."""

import contextlib
import itertools
import os
import tempfile

import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plaintrain.config import CfgNode, get_cfg, get_value
from plaintrain.config.config import NULLABLE, iterate_keys
from plaintrain.utils.errors import UserError

KEYS = list(iterate_keys(get_cfg()))
LEAVES = [key for key in KEYS if not isinstance(get_value(get_cfg(), key), CfgNode)]
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


DEFAULT_DUMP = get_cfg().dump()


def merge(cfg, settings, as_text=False):
    cfg.merge_from_list([part for key, value in settings for part in (key, as_given(value, as_text))])
    return cfg


def as_given(value, as_text):
    """A value as the command line gives it; a string in quotes keeps what it holds."""
    return repr(value) if as_text or isinstance(value, str) else value


def read(text):
    """A config with a YAML text merged from a file."""
    cfg = get_cfg()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        cfg.merge_from_file(path)
    return cfg


@contextlib.contextmanager
def rejected(*words):
    """Check that the block raises a `UserError` whose message has these words."""
    try:
        yield
    except UserError as e:
        assert all(word in str(e) for word in words), e
    else:
        raise AssertionError(f"not rejected: {words}")


@given(settings_of(), st.booleans())
def test_a_value_sticks(setting, as_text):
    key, value = setting
    # An infinity has no literal.
    assume(not as_text or "inf" not in repr(value))
    cfg = merge(get_cfg(), [setting], as_text)
    assert same(get_value(cfg, key), stored(key, value))
    others = get_cfg()
    assert all(same(get_value(cfg, other), get_value(others, other)) for other in LEAVES if other != key)
    assert others.dump() == DEFAULT_DUMP


@settings(max_examples=15)
@given(st.lists(settings_of(), min_size=10, max_size=24))
def test_a_dumped_config_merges_back_equal(settings):
    cfg = merge(get_cfg(), settings)
    again = read(cfg.dump())
    assert same(again, cfg)
    assert again.dump() == cfg.dump()
    other = merge(get_cfg(), [("SOLVER.MAX_ITER", 7), ("SEED", 3)])
    other.merge_from_other_cfg(cfg)
    assert same(other, cfg)


FEW_KEYS = ["SEED", "SOLVER.MAX_ITER", "SOLVER.STEPS", "MODEL.WEIGHTS"]
FILES = st.recursive(
    st.tuples(st.lists(settings_of(FEW_KEYS), max_size=3), st.just([])),
    lambda files: st.tuples(st.lists(settings_of(FEW_KEYS), max_size=3), st.lists(files, max_size=3)),
    max_leaves=6,
)


def _write(folder, numbers, file):
    """Write a file and its bases, some of them elsewhere; returns (path, its settings in order)."""
    settings, bases = file
    number = next(numbers)
    home = os.path.join(folder, "sub") if number % 2 else folder
    os.makedirs(home, exist_ok=True)
    written = [_write(folder, numbers, base) for base in bases]
    content = nested(settings)
    paths = [path if number % 3 else os.path.relpath(path, home) for path, _ in written]
    if paths:
        content["_BASE_"] = paths if len(paths) > 1 or number % 2 else paths[0]
    path = os.path.join(home, f"{number}.yaml")
    with open(path, "w", encoding="utf-8") as f:
        yaml.safe_dump(_plain(content), f)
    return path, [*itertools.chain(*(order for _, order in written)), *settings]


@given(FILES, st.lists(settings_of(FEW_KEYS), min_size=1, max_size=4))
def test_later_files_win_over_bases_and_the_last_override_over_all(file, overrides):
    with tempfile.TemporaryDirectory() as folder:
        path, order = _write(folder, itertools.count(), file)
        cfg = get_cfg()
        cfg.merge_from_file(path)
    expected = {key: DEFAULTS[key] for key in FEW_KEYS} | dict(order)
    assert all(same(get_value(cfg, key), stored(key, value)) for key, value in expected.items())
    merge(cfg, overrides)
    expected |= dict(overrides)
    assert all(same(get_value(cfg, key), stored(key, value)) for key, value in expected.items())


@st.composite
def typing_mistakes(draw):
    """(a key of the config, the same with one letter doubled, dropped or changed)."""
    key = draw(st.sampled_from(LEAVES))
    start = key.rfind(".") + 1
    place = draw(st.integers(start, len(key) - 1))
    new = draw(st.sampled_from([key[place] * 2, "", "Q"]))
    wrong = key[:place] + new + key[place + 1 :]
    assume(wrong[start:] and wrong not in KEYS)
    return key, wrong


@given(typing_mistakes(), INTS)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(mistake, value):
    key, wrong = mistake
    with rejected(wrong, key if len(key.rsplit(".", 1)[-1]) > 4 else ""):
        get_cfg().merge_from_list([wrong, value])
    with rejected(wrong, "config.yaml"):
        read(yaml.safe_dump(nested([(wrong, value)])))


@given(mistakes())
def test_a_wrong_type_is_rejected_by_name(mistake):
    key, value = mistake
    cfg = get_cfg()
    with rejected(key):
        cfg.merge_from_list([key, value])
    assert same(cfg, get_cfg())
    with rejected(key, "config.yaml"):
        read(yaml.safe_dump(_plain(nested([mistake]))))
