"""README and guides: their commands, messages, examples and files are those of the project.

`python tests/test_guides.py` writes the README's tree anew, from the first sentence of each file.
"""

import ast
import re
import sys
import textwrap
from functools import cache
from types import SimpleNamespace

from processes import ROOT
from script_helpers import help_flags

from plaintrain.config import get_cfg, get_value
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import EventStorage

PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("examples/*.md")]


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(path, language):
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", read(path), re.S)


@cache
def messages():
    """The texts in the code; in the place of what a message fills in stands a zero character."""
    found = []
    for path in [*ROOT.glob("plaintrain/**/*.py"), *ROOT.glob("scripts/*.py")]:
        tree = ast.parse(read(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def first_sentence(path):
    """What a file says of itself, without addresses."""
    paragraph = (ast.get_docstring(ast.parse(read(path))) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r" \(https?://[^)]+\)", "", paragraph)


def tree():
    """Every Python file of the project but the tests', one line each."""
    lines = []
    for folder in ("scripts", "scripts/benchmarks", "examples", "plaintrain", "plaintrain/*"):
        for path in sorted(ROOT.glob(f"{folder}/*.py"), key=lambda path: (path.parent, path.name)):
            if path.name == "__init__.py":
                continue
            if f"{path.parent.relative_to(ROOT)}/" not in lines:
                lines.append(f"{path.parent.relative_to(ROOT)}/")
            lines.append(f"  {path.name:<22} {first_sentence(path)}")
    return "\n".join(lines)


_TREE = re.compile(r"(<summary>Every file, one line each</summary>\n\n```\n)(.*?)(\n```)", re.S)


def test_the_readme_has_a_line_for_every_file():
    assert _TREE.search(read(ROOT / "README.md"))[2] == tree(), "run python tests/test_guides.py"


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    table = read(ROOT / "docs" / "TROUBLESHOOTING.md").split("## No message")[0]
    rows = re.findall(r"^\| `(.+?)`[^|`]*\| .+ \|$", table, re.M)
    assert len(rows) > 25
    for message in rows:
        parts = [part.strip() for part in message.split("...") if part.strip()]
        assert any(all(part in text for part in parts) for text in messages()), message


def has_key(key):
    try:
        get_value(get_cfg(), key)
    except (KeyError, AttributeError, UserError):
        return False
    return True


def test_the_pages_name_keys_and_files_that_exist():
    assert not has_key("SOLVER.NO_SUCH_KEY")
    for page in PAGES:
        text = read(page)
        if "FROM_" not in page.name:
            spans = " ".join(re.findall(r"`([^`\n]+)`", text))
            keys = set(re.findall(r"\b(?:[A-Z][A-Z0-9_]+\.)+[A-Z][A-Z0-9_]+\b", spans))
            assert not [key for key in keys if not has_key(key)], page.name
        for name in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / name).exists(), (page.name, name)
        for name in re.findall(r"(?:configs|scripts|docs|plaintrain)/[\w/.-]+\.(?:yaml|py|md)\b", text):
            # The reader's own.
            assert name == "configs/my.yaml" or (ROOT / name).is_file(), (page.name, name)


def test_the_readme_shows_the_loop_as_it_is_and_small_pictures():
    readme = read(ROOT / "README.md")
    shown = re.search(r"```python\n(with storage.*?)```", readme, re.S).group(1)
    minimal = read(ROOT / "examples" / "minimal_train.py")
    assert textwrap.indent(shown, "    ") in minimal
    pictures = re.findall(r"(?:src=\"|\]\()(docs/images/[\w.-]+)", readme)
    assert pictures and all((ROOT / name).stat().st_size < 150_000 for name in pictures)


def commands():
    """(page, script, flags) of each command in the pages."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", read(page))
        for command in re.findall(r"python ((?:scripts|examples)/[\w/]+\.py[^\n`|#]*)", text):
            script, *words = command.split()
            yield page.name, script, [word.split("=")[0] for word in words if word.startswith("--")]


def test_the_commands_of_the_pages_name_scripts_and_flags_that_exist():
    found = list(commands())
    assert len(found) > 30
    for page, script, flags in found:
        assert (ROOT / script).is_file(), (page, script)
        # What a benchmark measures is a command with flags of its own.
        known = set(flags) if "bench" in script else help_flags(script)
        assert [flag for flag in flags if flag not in known] == [], (page, script)


def test_the_writer_of_the_guide_sends_what_is_new_and_has_at_most_25_lines(monkeypatch):
    sent, finished = [], []
    run = SimpleNamespace(log=lambda row, step: sent.append((step, row)), finish=lambda: finished.append(1))
    begun = []
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **known: begun.append(known) or run)
    )
    code, use = blocks(ROOT / "docs" / "WRITERS.md", "python")
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
    assert sent == [(0, {"total_loss": 2.0, "lr": 0.5}), (3, {"total_loss": 1.5, "cells/bbox/AP": 40.0})]
    assert begun[0]["project"] == "cells" and begun[0]["config"]["SEED"] == -1 and finished == [1]
    main = read(ROOT / "scripts" / "plain_train_net.py")
    assert "writers = build_writers(cfg)" in main and "from plaintrain.utils import comm" in main


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = _TREE.sub(lambda m: m[1] + tree() + m[3], read(readme))
    readme.write_text(text, encoding="utf-8")
