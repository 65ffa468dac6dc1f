"""The guides for those who come from elsewhere: what they name exists, and what they quote stands there."""

import ast
import re
from functools import cache

import pytest
from processes import ROOT
from script_helpers import help_flags

from plaintrain.config import check_cfg, get_cfg, get_value
from plaintrain.utils.errors import UserError

# The number of rows that each guide has at least.
GUIDES = {"FROM_MMDET.md": 200, "FROM_DETECTRON2.md": 170}
_REFERENCE = re.compile(r"[\w/]+\.py: [\w.]+")
_KEY = re.compile(r"([A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)*)(?: (.+))?")
_SPAN = re.compile(r"`([^`]+)`")
# One place: a reference, and after a colon a line that stands there.
_ITEM = re.compile(r"`(scripts/\w+\.py|[\w/]+\.py: [\w.]+)`(?:: `([^`]+)`)?")


def rows(guide):
    """(line number, cells) of the rows under each table's head."""
    in_table = False
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("|"):
            in_table = False
        elif in_table and not re.fullmatch(r"[|\- ]+", line):
            yield number, [cell.strip() for cell in line.strip("|").split("|")]
        in_table = line.startswith("|")


@cache
def source(path):
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def parsed(path):
    return ast.parse(source(path))


def _names(node):
    """The names that a statement gives a meaning to."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]


def find(reference):
    """The source of `file.py: name` (function, class, method, name of the module), or None without one."""
    path, name = reference.split(": ")
    if not (ROOT / path).is_file():
        return None
    node = parsed(path)
    for part in name.split("."):
        found = [child for child in node.body if part in _names(child)]
        if not found:
            return None
        node = found[-1]
    return ast.get_source_segment(source(path), node)


@cache
def flags(script=None):
    """The flags of a script; of all scripts, by default."""
    scripts = [script] if script else [f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")]
    return set().union(*map(help_flags, scripts))


def wrong_key(key, value):
    """What is wrong with a config key and the value given for it, or None."""
    cfg = get_cfg()
    try:
        get_value(cfg, key)
        if value:
            cfg.merge_from_list([key, value])
            check_cfg(cfg)
    except (KeyError, AttributeError, UserError) as e:
        return f"{key}: {e}"
    return None


def wrong_span(span):
    """What is wrong with something between backquotes in a column of ours, or None."""
    if _REFERENCE.fullmatch(span):
        return None if find(span) else f"{span} does not exist"
    script = re.search(r"scripts/\w+\.py", span)
    if script or span.startswith("--"):
        known = flags(script.group() if script else None)
        given = span[script.end() :] if script else span
        unknown = [flag for flag in re.findall(r"(?<!\S)--[\w-]+", given) if flag not in known]
        return f"{script.group() if script else 'no script'} has no {unknown}" if unknown else None
    match = _KEY.fullmatch(span)
    return wrong_key(*match.groups()) if match else None


@pytest.mark.parametrize("guide", GUIDES)
def test_rows_have_three_columns(guide):
    found = list(rows(guide))
    assert len(found) >= GUIDES[guide]
    assert not [line for line, cells in found if len(cells) != 3 or not all(cells)]


@pytest.mark.parametrize("guide", GUIDES)
def test_what_our_columns_name_exists(guide):
    wrong = []
    for number, cells in rows(guide):
        spans = _SPAN.findall(" ".join(cells[1:]))
        wrong += [f"line {number}: {problem}" for problem in map(wrong_span, spans) if problem]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_last_column_says_where_and_quotes_lines_that_stand_there(guide):
    wrong = []
    for number, cells in rows(guide):
        where = cells[-1].removeprefix("not here").removeprefix(": add to ")
        items = where.split("; ") if where else []
        for item in items:
            match = _ITEM.fullmatch(item)
            if not match:
                wrong.append(f"line {number}: {item} is no `file.py: name`")
            elif not (ROOT / match[1].partition(":")[0]).is_file():
                wrong.append(f"line {number}: there is no {match[1]}")
            elif match[2] and match[2] not in (find(match[1]) or ""):
                wrong.append(f"line {number}: {match[1]} has no line with {match[2]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("guide", GUIDES)
def test_text_outside_the_tables_names_what_exists(guide):
    text = source(f"docs/{guide}")
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    wrong = [problem for problem in map(wrong_span, _SPAN.findall(outside)) if problem]
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ ([\w .]+)$", text, re.M)}
    wrong += [anchor for anchor in re.findall(r"\]\(#([^)]+)\)", text) if anchor not in anchors]
    wrong += [line for line in outside.splitlines() if len(line) > 112]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "span",
    [
        "plaintrain/ema.py: ModelEMA.renamed",
        "plaintrain/gone.py: ModelEMA",
        "SOLVER.NO_SUCH_KEY",
        "SOLVER.MAX_ITER many",
        "TEST.PRECISE_BN.ENABLED True",
        "--no-such-flag 3",
        "python scripts/plain_train_net.py --config-file FILE --predictions FILE",
    ],
)
def test_what_does_not_exist_is_found(span):
    assert wrong_span(span)
