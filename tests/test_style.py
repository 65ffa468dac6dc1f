"""Style rules that a program can check: docstrings, assignments, names, type hints."""

import ast
from collections import Counter

import pytest
from test_layout import MODULES, PACKAGE, ROOT, SCRIPTS, SHARED, parsed

FILES = [*PACKAGE, *SCRIPTS, *SHARED]
# First words that are not verbs in the imperative; ruff's D401 rejects "Returns" and the like.
NOT_IMPERATIVE = {
    *("A", "All", "An", "Any", "As", "Each", "For", "How", "In", "Its", "Mean", "Name", "Names", "None"),
    *("Number", "Of", "On", "One", "Path", "The", "Their", "This", "True", "What", "When", "Where"),
    *("Whether", "Which", "Who", "With", "Within"),
}
# Names that do not say what they stand for.
NOT_NAMES = {
    *("about", "found", "given", "it", "kind", "number", "part", "parts", "place", "rows", "said", "what"),
    "which",
}


def walk(path, *types):
    return [node for node in ast.walk(parsed(path)) if isinstance(node, types)]


def check_docstrings(path):
    for node in walk(path, ast.FunctionDef):
        for word in (ast.get_docstring(node) or "").split(maxsplit=1)[:1]:
            word = word.rstrip(",;:.")
            if not word.isalpha() or not word[0].isupper() or word in NOT_IMPERATIVE:
                yield node.lineno, f"the docstring must begin with a verb, got {word}"


def is_swap(assign):
    """Return whether the assignment only reorders values."""
    return set(map(ast.unparse, assign.value.elts)) == set(map(ast.unparse, assign.targets[0].elts))


def check_assignments(path):
    for node in walk(path, ast.Assign):
        if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple) and not is_swap(node):
            yield node.lineno, f"one assignment per line, got {ast.unparse(node)}"


def check_iterables(path):
    for node in walk(path, ast.For, ast.comprehension):
        if isinstance(node.iter, ast.IfExp):
            yield node.iter.lineno, f"no condition in an iterable, got {ast.unparse(node.iter)}"
    for node in walk(path, ast.BinOp):
        is_list = isinstance(node.left, ast.List | ast.ListComp) and isinstance(node.op, ast.Mult)
        if is_list and isinstance(node.right, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield node.lineno, f"no list times bool, got {ast.unparse(node)}"


def check_names(path):
    names = [(node.lineno, node.arg) for node in walk(path, ast.arg)]
    names += [(n.lineno, n.id) for n in walk(path, ast.Name) if isinstance(n.ctx, ast.Store)]
    for line, name in names:
        if name in NOT_NAMES:
            yield line, f"{name} does not say what it is"


def list_public_functions(path):
    """Return the functions of a module and the methods of its classes, without private ones."""
    body = list(parsed(path).body)
    for node in parsed(path).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            body += node.body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return [n for n in functions if not n.name.startswith("_") or n.name in ("__init__", "__call__")]


def check_hints(path):
    for node in list_public_functions(path):
        args = node.args
        parameters = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        missing = [p.arg for p in parameters if p and not p.annotation and p.arg not in ("self", "cls")]
        if not node.returns and node.name != "__init__":
            missing.append("return")
        if missing:
            yield node.lineno, f"{node.name} has no type hints for {', '.join(missing)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_style_of_a_file(path):
    checks = [check_docstrings, check_assignments, check_iterables, check_names]
    # Without hints the training loops read like pseudocode.
    if not path.name.endswith("_train_net.py"):
        checks.append(check_hints)
    problems = sorted(problem for check in checks for problem in check(path))
    assert not problems, "\n".join(f"{path}:{line}: {text}" for line, text in problems)


def test_public_names_are_unique_in_the_package():
    names = Counter(
        node.name
        for path in MODULES.values()
        for node in parsed(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (check_docstrings, 'def f(): "The number."'),
        (check_assignments, "a, b = 1, 2"),
        (check_iterables, "for a in x if y else (): pass"),
        (check_iterables, "a = [1] * (b > 2)"),
        (check_names, "found = 1"),
    ],
)
def test_checks_find_problems(check, code, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(code)
    assert list(check(path))
