#!/usr/bin/env python
"""Measure what the tests catch: apply each defect of mutation_list.py to a copy, and run the tests there.

python tests/mutation_check.py record                        # which test runs which line (needs coverage)
python tests/mutation_check.py record --tests tests/test_ema # again, of some files
python tests/mutation_check.py run                           # which defects the recorded tests catch
python tests/mutation_check.py run --source plaintrain/ema --fast
python tests/mutation_check.py planted                       # whether the properties catch theirs

A defect is tried with the tests that run its lines, the quickest first, until one fails.
"""

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import coverage
import hypothesis  # noqa: F401 - this and those below: imported once, for all that is forked
import pycocotools.mask  # noqa: F401
import pytest
import torch
import torchvision  # noqa: F401
from mutation_list import MUTATIONS, PLANTED

ROOT = Path(__file__).resolve().parent.parent
# Without the options of the project, and plugins that somebody has installed.
_ALONE = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
# The static context is the test file; in its own process, the running test is added to it.
_COVERAGE = """
[run]
source = plaintrain,scripts,examples
concurrency = multiprocessing,thread
parallel = true
patch = subprocess,_exit,fork
sigterm = true
context = {test_file}
data_file = {folder}/{name}.part
"""


class Recorder:
    """A pytest plugin that names the running test, or the shared fixture that it sets up, to coverage."""

    def __init__(self):
        self.tests = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        coverage.Coverage.current().switch_context(item.nodeid)
        start = time.perf_counter()
        result = yield
        self.tests[item.nodeid] = {
            "seconds": time.perf_counter() - start,
            "fixtures": item.fixturenames,
            "long": item.get_closest_marker("long") is not None,
        }
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        current = coverage.Coverage.current()
        current.switch_context(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            current.switch_context(request.node.nodeid)


def run_file(folder, test_file, fast):
    """Run one test file under coverage in a process of its own; print its last line."""
    name, start = test_file.replace("/", "."), time.perf_counter()
    rc, output = folder / f"{name}.rc", folder / f"{name}.out"
    rc.write_text(_COVERAGE.format(test_file=test_file, folder=folder, name=name))
    fork(_record_here, folder, test_file, rc, fast, output=output).join()
    data = coverage.CoverageData(str(folder / f"{name}.coverage"))
    data.erase()
    for path in folder.glob(f"{name}.part*"):
        # A process that was killed may have left half a file.
        with contextlib.suppress(coverage.CoverageException, OSError):
            part = coverage.CoverageData(str(path))
            part.read()
            data.update(part)
    data.write()
    last = (output.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    for path in (rc, output, *folder.glob(f"{name}.part*")):
        path.unlink(missing_ok=True)
    print(f"{test_file:45} {time.perf_counter() - start:5.0f} s  {last}", flush=True)


def _record_here(folder, test_file, rc, fast):
    """The child of `run_file`."""
    measured, recorder = coverage.Coverage(config_file=str(rc)), Recorder()
    measured.start()
    options = [test_file, "-q", "--tb=no", *_ALONE, *(["-m", "not long"] if fast else [])]
    code = pytest.main(options, plugins=[recorder])
    measured.stop()
    measured.save()
    (folder / f"{test_file.replace('/', '.')}.json").write_text(json.dumps(recorder.tests))
    return code


def record(folder, prefixes, fast):
    """Run the tests under coverage, two files at a time; write FILE.json and FILE.coverage into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        chosen = [file for file in files if file.startswith(prefixes)]
        list(pool.map(lambda name: run_file(folder, name, fast), chosen))


def fork(function, *args, output, cwd=ROOT):
    """Call a function in a child, which has torch imported already but not plaintrain."""
    process = multiprocessing.get_context("fork").Process(
        target=_in_child, args=(function, args, output, cwd)
    )
    process.start()
    return process


def _in_child(function, args, output, cwd):
    sys.stdin = open(os.devnull)  # noqa: SIM115 - for the life of the process
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.setpgid(0, 0)
    os.chdir(cwd)
    sys.path[:0] = [str(cwd)]
    os.environ |= {"PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    code = function(*args)
    sys.stdout.flush()
    os._exit(code)


def mutated_lines(text, old):
    """The numbers, from 1, of the lines that a snippet spans, and those of the function around it."""
    if text.count(old) != 1:
        raise SystemExit(f"a snippet occurs {text.count(old)} times instead of once: {old!r}")
    first = text[: text.index(old)].count("\n") + 1
    lines, around = set(range(first, first + old.count("\n") + 1)), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.lineno <= first <= node.end_lineno:
            around = set(range(node.body[0].lineno, node.end_lineno + 1))
    return lines, around


class Covering:
    """Which tests run which lines, as `record` has written it."""

    def __init__(self, folder):
        self.data, self.tests = coverage.CoverageData(no_disk=True), {}
        for path in sorted(folder.glob("tests.*.json")):
            self.tests |= json.loads(path.read_text())
            part = coverage.CoverageData(str(path.with_suffix(".coverage")))
            part.read()
            self.data.update(part)

    def tests_of(self, path, text, old):
        """Tests that run the snippet `old`, or else its function, or else its file; the quickest first.

        Those that ran it in another process are known by their file only, and come last.
        """
        contexts_of = self._contexts(path)
        for lines in (*mutated_lines(text, old), set(contexts_of)):
            contexts = {context for line in lines for context in contexts_of.get(line, ())}
            exact = {context.partition("|")[2] for context in contexts if "|" in context}
            fixtures = {name.removeprefix("fixture ") for name in exact if name.startswith("fixture ")}
            exact |= {name for name, test in self.tests.items() if fixtures.intersection(test["fixtures"])}
            if exact or any(context not in self._importing(contexts_of) for context in contexts):
                break
        files = {context.partition("|")[0] for context in contexts} if lines else set()
        of_files = {name for name in self.tests if name.partition("::")[0] in files}
        return self._sorted(exact & set(self.tests)) + self._sorted(of_files - exact)

    def _contexts(self, path):
        """{line: contexts} of a file, wherever the checkout was that was recorded."""
        contexts = defaultdict(set)
        for file in self.data.measured_files():
            if file.endswith(f"/{path}"):
                for line, names in self.data.contexts_by_lineno(file).items():
                    contexts[line].update(names)
        return contexts

    def _importing(self, contexts_of):
        first = min(contexts_of, default=0)
        return {context for context in contexts_of.get(first, ()) if "|" not in context}

    def _sorted(self, names):
        return sorted(names, key=lambda name: self.tests[name]["seconds"])


def copy_tree(target):
    """Copy the files that git knows, and new ones it does not ignore."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def title_of(mutation):
    """Return the file of a defect, its line, and the first characters of the text that it replaces."""
    path, old, _ = mutation
    text = (ROOT / path).read_text(encoding="utf-8")
    line = text[: text.index(old)].count("\n") + 1
    return f"{path}:{line} {' '.join(old.split())[:40]}"


def try_defect(copy, mutation, tests, seconds):
    """Return the first test that fails with the defect in the copy, "" if none does within the seconds."""
    path, old, new = mutation
    file, output = copy / path, copy.with_suffix(".out")
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(old, new), encoding="utf-8")
    options = ["-x", "-q", "--tb=no", "-rfE", *_ALONE, *tests]
    try:
        process = fork(pytest.main, options, output=output, cwd=copy)
        process.join(seconds)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # It ended at this moment.
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return ""
    finally:
        file.write_text(text, encoding="utf-8")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output.read_text(errors="replace"), re.MULTILINE)
    if process.exitcode == pytest.ExitCode.USAGE_ERROR:
        raise SystemExit(
            f"a recorded test is gone, record again: {output.read_text(errors='replace')[-300:]}"
        )
    if process.exitcode and not failed:
        return f"(exit {process.exitcode})"
    return failed[1] if failed else ""


def check(covering, copy, mutation, options):
    """Print what one defect led to; returns the test that caught it, or ""."""
    start = time.perf_counter()
    path, old, _ = mutation
    text = (ROOT / path).read_text(encoding="utf-8")
    tests = covering.tests_of(path, text, old)
    # The test of the list of defects fails with each of them.
    tests = [name for name in tests if not name.endswith("defect_of_the_mutation_check_fits_the_code")]
    tests = [name for name in tests if not (options.fast and covering.tests[name]["long"])]
    failed = try_defect(copy, mutation, tests, options.seconds) if tests else ""
    took = time.perf_counter() - start
    title = title_of(mutation)
    print(f"{title:72} {len(tests):5} tests {took:5.0f} s  {failed or 'NOT CAUGHT'}", flush=True)
    return failed


def listed(changes):
    """Return [(path, old, new)] of {path: [(old, new)]}."""
    return [(path, *texts) for path in changes for texts in changes[path]]


def run(folder, options):
    """Check the defects that are chosen; returns the titles of those that no test caught."""
    covering, prefixes = Covering(folder), tuple(options.source.split(","))
    mutations = [*listed(MUTATIONS), *(m for changes in PLANTED.values() for m in listed(changes))]
    chosen = [m for m in mutations if m[0].startswith(prefixes) and options.only in title_of(m)]
    return in_copies(lambda copy, mutation: check(covering, copy, mutation, options), chosen)


def run_planted(options):
    """Check the planted defects with their test files; returns the titles of those that are not caught."""
    tests = {mutation: name for name, changes in PLANTED.items() for mutation in listed(changes)}
    chosen = [m for m in tests if options.only in title_of(m)]
    return in_copies(lambda copy, m: try_defect(copy, m, [tests[m]], options.seconds), chosen)


def in_copies(function, chosen):
    """Call `function(copy, mutation)`, two at a time; returns the titles of those for which it gave ""."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        copies = queue.SimpleQueue()
        for side in ("a", "b"):
            copy_tree(Path(name) / side)
            copies.put(Path(name) / side)

        def one(mutation):
            copy = copies.get()
            try:
                return function(copy, mutation)
            finally:
                copies.put(copy)

        results = list(pool.map(one, chosen))
    survivors = [title_of(m) for m, failed in zip(chosen, results, strict=True) if not failed]
    print(f"{len(results) - len(survivors)} of {len(results)} defects caught; not caught:")
    print("\n".join(survivors) or "-")
    return survivors


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "run", "planted"])
    recorded = str(ROOT / "output" / "mutations")
    parser.add_argument("folder", nargs="?", default=recorded, help="where the record is")
    parser.add_argument("--tests", default="", help="record the test files that begin with one of these, a,b")
    parser.add_argument("--source", default="", help="run the defects of files that begin with one of these")
    parser.add_argument("--only", default="", help="run the defects whose title contains this")
    parser.add_argument("--fast", action="store_true", help="without the tests that are marked long")
    parser.add_argument("--seconds", type=float, default=300, help="limit for the tests of one defect")
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    if args.action == "record":
        record(folder, tuple(args.tests.split(",")), args.fast)
    else:
        sys.exit(bool(run(folder, args) if args.action == "run" else run_planted(args)))


if __name__ == "__main__":
    main()
