#!/usr/bin/env python
"""Measure what the tests catch: apply each defect of mutations.txt to a copy, and run the tests there.

python tests/mutation_check.py run                                  # with the tests of its module and package
python tests/mutation_check.py run --only plaintrain/solver/ema --fast
python tests/mutation_check.py run --only check_storage --every    # with every test file
python tests/mutation_check.py planted                              # whether the properties catch theirs

A defect is tried with the test file of its module, then with those that name it or its package, until a
test fails.
"""

import argparse
import contextlib
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis  # noqa: F401 - this and those below: imported once, for all that is forked
import pycocotools.mask  # noqa: F401
import pytest
import torch
import torchvision  # noqa: F401
from mutation_list import MUTATIONS, PLANTED

ROOT = Path(__file__).resolve().parent.parent
# Without the options of the project, and plugins that somebody has installed.
_ALONE = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
# It fails with each of them.
_LIST_TEST = "tests/test_layout.py::test_each_defect_of_the_mutation_check_fits_the_code"


def _run_pytest(options, output, cwd):
    """Run the tests of a copy, in a child which has torch imported already but not plaintrain."""
    sys.stdin = open(os.devnull)  # noqa: SIM115 - for the life of the process
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.setpgid(0, 0)
    os.chdir(cwd)
    sys.path[:0] = [str(cwd)]
    os.environ |= {"PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("CI", None)  # There, pytest compares long values in full, for minutes.
    sys.dont_write_bytecode = True
    code = pytest.main(options)
    sys.stdout.flush()
    os._exit(code)


def tests_of(path, every):
    """Return the test files that name the file `path`, then those that name its package; or all of them."""
    package, stem = ".".join(Path(path).parent.parts), Path(path).stem
    # `processes.Run` starts the training scripts.
    started = rf"{stem}\.py|\bRun\(" if stem.endswith("_train_net") else rf"{stem}\.py"
    module = rf"{package}(\.| import .*\b){stem}\b|\b{started}"
    of_package = rf"{package} import|from plaintrain import .*\b{Path(path).parent.name}\b"
    named = [module, of_package, *[""] * every]
    ranked = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        ranks = [rank for rank, pattern in enumerate(named) if re.search(pattern, text)]
        if ranks:
            ranked.append((file.stem != f"test_{stem}", ranks[0], str(file.relative_to(ROOT))))
    return [name for _, _, name in sorted(ranked)]


def copy_sources(target):
    """Copy what the tests read."""
    for name in ("plaintrain", "scripts", "tests", "configs", "examples", "docs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "LICENSE"]:
        shutil.copy(path, target)


def title_of(mutation):
    """Return the file of a defect, its line, and the first characters of the text that it replaces."""
    path, old, _ = mutation
    text = (ROOT / path).read_text(encoding="utf-8")
    line = text[: text.index(old)].count("\n") + 1
    return f"{path}:{line} {' '.join(old.split())[:40]}"


def try_defect(copy, mutation, tests, options):
    """Return the first test that fails with the defect in the copy, "" if none does within the seconds."""
    path, old, new = mutation
    file, output, start = copy / path, copy.with_suffix(".out"), time.perf_counter()
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(old, new), encoding="utf-8")
    marked = ["-m", "not long"] if options.fast else []
    command = ["-x", "-q", "--tb=no", "-rfE", *_ALONE, *marked, "--deselect", _LIST_TEST, *tests]
    try:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_run_pytest, args=(command, output, copy))
        process.start()
        process.join(options.seconds)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # It ended at this moment.
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            print(f"{title_of(mutation):72} no end in {options.seconds:.0f} s", flush=True)
            return ""
    finally:
        file.write_text(text, encoding="utf-8")
    if process.exitcode == pytest.ExitCode.USAGE_ERROR:
        raise SystemExit(output.read_text(errors="replace"))
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output.read_text(errors="replace"), re.MULTILINE)
    caught_by = failed[1] if failed else f"(exit {process.exitcode})" if process.exitcode else ""
    took = time.perf_counter() - start
    print(f"{title_of(mutation):72} {took:5.0f} s  {caught_by or 'NOT CAUGHT'}", flush=True)
    return caught_by


def listed(changes):
    """Return [(path, old, new)] of {path: [(old, new)]}."""
    return [(path, *texts) for path in changes for texts in changes[path]]


def try_all(tests, options):
    """Try the chosen defects of {defect: its tests}, two at a time; returns those that are not caught."""
    chosen = [m for m in tests if options.only in title_of(m)]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        copies = queue.SimpleQueue()
        for side in ("a", "b"):
            copy_sources(Path(name) / side)
            copies.put(Path(name) / side)

        def one(mutation):
            copy = copies.get()
            try:
                return try_defect(copy, mutation, tests[mutation], options)
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
    parser.add_argument("action", choices=["run", "planted"])
    parser.add_argument("--only", default="", help="run the defects whose title contains this")
    parser.add_argument("--every", action="store_true", help="with every test file")
    parser.add_argument("--fast", action="store_true", help="without the tests that are marked long")
    parser.add_argument("--seconds", type=float, default=600, help="limit for the tests of one defect")
    args = parser.parse_args()
    tests = {m: [name] for name, changes in PLANTED.items() for m in listed(changes)}
    if args.action == "run":
        tests = {m: tests_of(m[0], args.every) for m in [*listed(MUTATIONS), *tests]}
    sys.exit(bool(try_all(tests, args)))


if __name__ == "__main__":
    main()
