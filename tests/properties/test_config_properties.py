"""Properties of configs: any value of a key's type is kept, dumps and loads, and the later one wins."""

import contextlib
import itertools
import os
import tempfile

import config_defects as broken
import pytest
import yaml
from config_cases import (
    DEFAULTS,
    INTS,
    LEAVES,
    SECTIONS,
    mistakes,
    nested,
    same,
    settings_of,
    stored,
)
from hypothesis import assume
from hypothesis import strategies as st
from property_helpers import assert_caught, checks_of, defects_of, examine, for_all, patched

from plaintrain import config
from plaintrain.config import CfgNode, get_cfg, get_value
from plaintrain.utils.errors import UserError

DEFAULT_DUMP = get_cfg().dump()


def merged(settings, as_text=False):
    cfg = get_cfg()
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


@for_all(settings_of(), st.booleans())
def check_a_value_sticks(setting, as_text):
    key, value = setting
    # An infinity has no literal.
    assume(not as_text or "inf" not in repr(value))
    cfg = merged([setting], as_text)
    assert same(get_value(cfg, key), stored(key, value))
    others = get_cfg()
    assert all(same(get_value(cfg, other), get_value(others, other)) for other in LEAVES if other != key)
    assert others.dump() == DEFAULT_DUMP


@for_all(st.lists(settings_of(), min_size=10, max_size=24), examples=15)
def check_a_dumped_config_merges_back_equal(settings):
    cfg = merged(settings)
    again = read(cfg.dump())
    assert same(again, cfg)
    assert again.dump() == cfg.dump()
    other = merged([("SOLVER.MAX_ITER", 7), ("SEED", 3)])
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
        yaml.safe_dump(_as_yaml(content), f)
    return path, [*itertools.chain(*(order for _, order in written)), *settings]


def _as_yaml(value):
    if isinstance(value, dict):
        return {key: _as_yaml(item) for key, item in value.items()}
    return [_as_yaml(item) for item in value] if isinstance(value, list | tuple) else value


@for_all(FILES, st.lists(settings_of(FEW_KEYS), min_size=1, max_size=4))
def check_later_files_win_over_bases_and_the_last_override_over_all(file, overrides):
    with tempfile.TemporaryDirectory() as folder:
        path, order = _write(folder, itertools.count(), file)
        cfg = get_cfg()
        cfg.merge_from_file(path)
    expected = {key: DEFAULTS[key] for key in FEW_KEYS} | dict(order)
    assert all(same(get_value(cfg, key), stored(key, value)) for key, value in expected.items())
    cfg.merge_from_list([part for key, value in overrides for part in (key, as_given(value, False))])
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
    assume(wrong[start:] and wrong not in LEAVES and wrong not in SECTIONS)
    return key, wrong


@for_all(typing_mistakes(), INTS)
def check_an_unknown_key_is_named_with_the_one_that_was_meant(mistake, value):
    key, wrong = mistake
    with rejected(wrong, key if len(key.rsplit(".", 1)[-1]) > 4 else ""):
        get_cfg().merge_from_list([wrong, value])
    with rejected(wrong, "config.yaml"):
        read(yaml.safe_dump(nested([(wrong, value)])))


@for_all(mistakes())
def check_a_wrong_type_is_rejected_by_name(mistake):
    key, value = mistake
    cfg = get_cfg()
    with rejected(key):
        cfg.merge_from_list([key, value])
    assert same(cfg, get_cfg())
    with rejected(key, "config.yaml"):
        read(yaml.safe_dump(_as_yaml(nested([mistake]))))


CHECKS = checks_of(globals())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check):
    examine(check)


# ---- planted defects -------------------------------------------------------------------------

DEFECTS = {
    check_a_value_sticks: {
        "all configs are one": broken.configs_are_one,
        "inner tuples stay": patched(config, "_plain_item", lambda value, *_: value),
    },
    check_a_dumped_config_merges_back_equal: {
        "an empty value is left out": broken.dump_from(broken.without_empty),
        "strings are stripped": broken.dump_from(broken.with_stripped_strings),
    },
    check_later_files_win_over_bases_and_the_last_override_over_all: {
        "the first override wins": broken.pairs_reversed,
        "a list is added to": broken.coerce_from(broken.extend_lists),
        "bases win": broken.chain_from(lambda chain: chain[::-1]),
        "bases are merged last to first": broken.chain_from(lambda chain: chain[-2::-1] + chain[-1:]),
    },
    check_an_unknown_key_is_named_with_the_one_that_was_meant: {
        "it is taken": patched(CfgNode, "is_new_allowed", lambda self: True),
        "it is passed over": broken.unknown_keys_are_passed_over,
        "no near name is given": patched(config.difflib, "get_close_matches", lambda *_, **__: []),
    },
    check_a_wrong_type_is_rejected_by_name: {
        "True is an int": broken.coerce_from(broken.subclasses_are_taken),
        "only the last part is named": broken.coerce_from(broken.name_is_short),
    },
}


def test_every_property_has_a_planted_defect():
    assert list(DEFECTS) == CHECKS


@pytest.mark.long
@pytest.mark.parametrize(("check", "defect"), defects_of(DEFECTS))
def test_planted_defect_is_caught(check, defect, monkeypatch):
    defect(monkeypatch)
    assert_caught(check)


def test_planted_defect_in_merging_is_caught(monkeypatch):
    broken.coerce_from(broken.extend_lists)(monkeypatch)
    assert_caught(check_later_files_win_over_bases_and_the_last_override_over_all)
