"""README and guides: their commands, keys, messages, quotes and files are those of the project."""

import ast
import pkgutil
import re
import sys
from functools import cache
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from processes import ROOT
from script_helpers import help_flags

from plaintrain.config import check_cfg, get_cfg, get_value
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import EventStorage

PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("examples/*.md")]
# For those who come from elsewhere; the number of rows that each has at least.
GUIDES = {"FROM_MMDET.md": 200, "FROM_DETECTRON2.md": 170}
_IMPORT = re.compile(r"plaintrain(?:\.\w+)*")
_KEY = re.compile(r"([A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)*)(?: (.+))?")
_SPAN = re.compile(r"`([^`]+)`")


def rows(guide):
    """(line number, cells) of the rows under each table's head."""
    in_table = False
    for number, line in enumerate(read(f"docs/{guide}").splitlines(), start=1):
        if not line.startswith("|"):
            in_table = False
        elif in_table and not re.fullmatch(r"[|\- ]+", line):
            yield number, [cell.strip() for cell in line.strip("|").split("|")]
        in_table = line.startswith("|")


@cache
def read(path):
    """The text of a file, given from the project's folder."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def flags(script=None):
    """The flags of a script; of all scripts, by default."""
    scripts = [script] if script else [f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")]
    return set().union(*map(help_flags, scripts))


def wrong_key(key, value=None):
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
    if _IMPORT.fullmatch(span):
        try:
            pkgutil.resolve_name(span)
        except (ImportError, AttributeError):
            return f"{span} cannot be imported"
        return None
    script = re.search(r"scripts/\w+\.py", span)
    if script or span.startswith("--"):
        known = flags(script.group() if script else None)
        given = span[script.end() :] if script else span
        unknown = [flag for flag in re.findall(r"(?<!\S)--[\w-]+", given) if flag not in known]
        return f"{script.group() if script else 'no script'} has no {unknown}" if unknown else None
    match = _KEY.fullmatch(span)
    return wrong_key(*match.groups()) if match else None


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_names_what_exists(guide):
    found, wrong = list(rows(guide)), []
    assert len(found) >= GUIDES[guide]
    for number, cells in found:
        problems = [] if len(cells) == 3 and all(cells) else ["there are not three columns"]
        problems += filter(None, map(wrong_span, _SPAN.findall(" ".join(cells[1:]))))
        where = cells[-1].removeprefix("not here").removeprefix(": add to ")
        for item in where.split("; ") if where else []:
            if not re.fullmatch(r"`(scripts/\w+\.py|plaintrain[\w.]+)`", item):
                problems.append(f"{item} is neither a script nor something to import")
        wrong += [f"line {number}: {problem}" for problem in problems]
    text = read(f"docs/{guide}")
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    wrong += filter(None, map(wrong_span, _SPAN.findall(outside)))
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ ([\w .]+)$", text, re.M)}
    wrong += [anchor for anchor in re.findall(r"\]\(#([^)]+)\)", text) if anchor not in anchors]
    wrong += [line for line in outside.splitlines() if len(line) > 112]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "span",
    [
        "plaintrain.solver.renamed",
        "plaintrain.gone",
        "SOLVER.NO_SUCH_KEY",
        "SOLVER.MAX_ITER many",
        "TEST.PRECISE_BN.ENABLED True",
        "--no-such-flag 3",
        "python scripts/plain_train_net.py --config-file FILE --predictions FILE",
    ],
)
def test_what_does_not_exist_is_found(span):
    assert wrong_span(span)


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    table = read("docs/TROUBLESHOOTING.md").split("## No message")[0]
    rows = re.findall(r"^\| `(.+?)`[^|`]*\| .+ \|$", table, re.M)
    assert len(rows) > 25
    # In the place of what a message fills in stands a zero character.
    texts = []
    for path in [*ROOT.glob("plaintrain/**/*.py"), *ROOT.glob("scripts/*.py")]:
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    for message in rows:
        parts = [part.strip() for part in message.split("...") if part.strip()]
        assert any(all(part in text for part in parts) for text in texts), message


def test_the_pages_name_keys_and_files_that_exist():
    for page in PAGES:
        text = read(page)
        if "FROM_" not in page.name:
            spans = " ".join(re.findall(r"`([^`\n]+)`", text))
            keys = set(re.findall(r"\b(?:[A-Z][A-Z0-9_]+\.)+[A-Z][A-Z0-9_]+\b", spans))
            assert not [key for key in keys if wrong_key(key)], page.name
        for name in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / name).exists(), (page.name, name)
        for name in re.findall(r"(?:configs|scripts|docs|plaintrain)/[\w/.-]+\.(?:yaml|py|md)\b", text):
            # The reader's own.
            assert name == "configs/my.yaml" or (ROOT / name).is_file(), (page.name, name)


def test_the_readme_shows_the_loop_as_it_is_and_small_pictures():
    readme = read("README.md")
    assert f"```python\n{read('examples/minimal_train.py')}```" in readme
    pictures = re.findall(r"(?:src=\"|\]\()(docs/images/[\w.-]+)", readme)
    assert pictures and all((ROOT / name).stat().st_size < 150_000 for name in pictures)


def test_the_commands_of_the_pages_name_scripts_and_flags_that_exist():
    texts = [re.sub(r"\\\n\s*", " ", read(page)) for page in PAGES]
    found = re.findall(r"python ((?:scripts|examples)/[\w/]+\.py[^\n`|#]*)", "\n".join(texts))
    assert len(found) > 30
    for command in found:
        script, *words = command.split()
        assert (ROOT / script).is_file(), command
        flags = [word.split("=")[0] for word in words if word.startswith("--")]
        # What a benchmark measures is a command with flags of its own.
        known = set(flags) if "bench" in script else help_flags(script)
        assert [flag for flag in flags if flag not in known] == [], command


def test_the_writer_of_the_guide_sends_what_is_new_and_has_at_most_25_lines(monkeypatch):
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    code, use = re.findall(r"```python\n(.*?)```", read("docs/WRITERS.md"), re.S)
    assert len(code.splitlines()) + len(use.splitlines()) <= 25
    names = {"cfg": get_cfg(), "writers": [], "comm": SimpleNamespace(is_main_process=lambda: True)}
    exec(code, names)
    exec(use, names)
    (writer,) = names["writers"]
    with EventStorage() as storage:
        storage.put_scalars(total_loss=2.0, lr=0.5)
        writer.write()
        writer.write()
        storage.iter = 3
        storage.put_scalars(total_loss=1.0, **{"cells/bbox/AP": 40.0}, smoothing_hint=True)
        writer.write()
    writer.close()
    run, begun = wandb.init.return_value, wandb.init.call_args.kwargs
    sent = [(call.kwargs["step"], *call.args) for call in run.log.call_args_list]
    assert sent == [(0, {"total_loss": 2.0, "lr": 0.5}), (3, {"total_loss": 1.5, "cells/bbox/AP": 40.0})]
    assert begun["project"] == "cells" and begun["config"]["SEED"] == -1
    assert run.finish.call_count == 1
    main = read("scripts/plain_train_net.py")
    assert "writers = build_writers(cfg)" in main and "from plaintrain.utils import comm" in main
