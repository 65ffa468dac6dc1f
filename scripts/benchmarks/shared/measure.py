"""Options, timing, tables and reports of the benchmarks.

Does not import torch, so that start-up can be measured from a process without it.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from plaintrain.utils.errors import UserError

# {row: {column: value}}.
Table = dict[str, dict[str, Any]]
# ({title: table}, targets).
Results = tuple[dict[str, Table], list[dict[str, Any]]]
_T = TypeVar("_T")
_PACKAGES = "torch torchvision numpy pillow pycocotools faster-coco-eval hotcoco detectron2 mmengine mmdet"


def positive(text: str) -> int:
    """Convert an option to an integer above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return value


def output_file(text: str) -> str:
    """Check that a file is writable, before the measurement; creates its folder."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(text)), exist_ok=True)
        open(text, "a", encoding="utf-8").close()
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {e.strerror}") from e
    return text


def parse_args(
    parser: argparse.ArgumentParser, repeats: int | None, quick: dict[str, Any]
) -> argparse.Namespace:
    """Parse the command line, with the options that all benchmarks have.

    Args:
        parser: with the options of the benchmark, and its name as `prog`.
        repeats: default of --repeats; None to omit the flag.
        quick: {option: default with --quick}.

    Returns:
        Also has `load`, of the machine, and `command`.
    """
    command = " ".join(["python scripts/benchmark.py", parser.prog, *sys.argv[1:]])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.prog = f"benchmark.py {parser.prog}"
    if repeats:
        parser.add_argument("--repeats", type=positive, default=repeats, help="measured rounds")
    parser.add_argument("--output", type=output_file, help="also write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, as a smoke test")
    if parser.parse_args().quick:
        parser.set_defaults(repeats=1, **quick)
    args = parser.parse_args()
    args.command = command
    args.load = os.getloadavg()[0]
    return args


def run(main: Callable[[], object]) -> None:
    """Call the `main` of a benchmark; a wrong device, file or folder is an error without a traceback."""
    try:
        main()
    except (UserError, FileNotFoundError, NotADirectoryError, PermissionError) as e:
        sys.exit(f"error: {e}")


def run_parts(
    args: argparse.Namespace, measurements: Mapping[str, Callable[[argparse.Namespace], Results]]
) -> None:
    """Measure and report `args.parts`."""
    tables: dict[str, Table] = {}
    targets: list[dict[str, Any]] = []
    for name in args.parts:
        new_tables, new_targets = measurements[name](args)
        tables |= new_tables
        targets += new_targets
    report(args, tables, targets)


def installed(*names: str) -> list[str]:
    """Return the packages that are installed; prints the others as not measured."""
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}")
    return [name for name in names if name not in missing]


def timed(
    function: Callable[[], object], clock: Callable[[], float] = time.process_time
) -> Callable[[], float]:
    """Wrap a function to return its seconds, with garbage collection before."""

    def seconds():
        gc.collect()
        start = clock()
        function()
        return clock() - start

    return seconds


def in_turns(
    functions: Mapping[str, Callable[[], _T]], repeats: int, warm_up: bool = True
) -> dict[str, list[_T]]:
    """Measure variants in interleaved rounds, so that other load affects all alike.

    Args:
        functions: {name: function that returns a measurement}.
        repeats: measured rounds.
        warm_up: begin with a round that is not measured.

    Returns:
        {name: [measurement of each round]}.
    """
    values: dict[str, list[_T]] = {name: [] for name in functions}
    # Existing objects must not slow down garbage collections.
    gc.collect()
    gc.freeze()
    for i in range(-int(warm_up), repeats):
        for name, function in functions.items():
            value = function()
            if i >= 0:
                values[name].append(value)
    gc.unfreeze()
    return values


def run_fresh(command: Sequence[str], until: str | None = None) -> tuple[float, float]:
    """Run a command in a new process and return its (CPU, wall) seconds.

    Args:
        command: program and arguments.
        until: kill it once it has printed a line with this text.

    Raises:
        RuntimeError: it failed, or never printed the line; with the end of its output.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    seen = False
    lines: list[str] = []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stdout or ():
            lines = [*lines[-20:], line]
            if until and until in line:
                seen = True
                process.kill()
                break
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not (seen if until else process.returncode == 0):
        raise RuntimeError(f"{' '.join(command)[-300:]} failed:\n{''.join(lines)}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def read_sizes(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (widths, heights), each `[num_images]`, with the distribution of COCO's image sizes."""
    path = Path(__file__).parent.parent / "coco_sizes.json"
    widths, heights, fractions = np.array(json.loads(path.read_text())["sizes"]).T
    counts = np.diff(np.floor(np.cumsum([0, *fractions]) * num_images + 0.5)).astype(int)
    return np.repeat(widths, counts), np.repeat(heights, counts)


def fresh(function: Callable[..., _T], *args: Any) -> _T:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def read_memory(pid: int | None, field: str) -> float:
    """Return the MB of the smaps_rollup lines that begin with `field`: "Pss:" or "Private_" (Linux)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(field)) / 1024


def make_rows(values: dict[str, list[float]], scale: float = 1.0) -> Table:
    """Return median, spread and ratio of the measurements of `in_turns`.

    Args:
        values: {name: numbers, one per round}; the first is the baseline.
        scale: factor of the shown numbers.

    Returns:
        {name: {median, lowest, highest, times less, values}}; `times less` is the median over the rounds of
        the baseline divided by the value.
    """
    baseline = next(iter(values.values()))
    table: Table = {}
    for name, numbers in values.items():
        quotients = [b / v for b, v in zip(baseline, numbers, strict=True)]
        numbers = [value * scale for value in numbers]
        spread = {"median": statistics.median(numbers), "lowest": min(numbers), "highest": max(numbers)}
        table[name] = {**spread, "times less": statistics.median(quotients), "values": numbers}
    return table


def _format_cell(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def print_table(title: str, table: Table) -> None:
    """Print as a Markdown table, without columns of lists."""
    columns = dict.fromkeys(
        key for row in table.values() for key, value in row.items() if not isinstance(value, list)
    )
    lines = [[title, *columns]]
    lines += [[name, *(_format_cell(row.get(column)) for column in columns)] for name, row in table.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        first, *rest = zip(line, widths, strict=True)
        print("| " + " | ".join([first[0].ljust(first[1]), *(v.rjust(w) for v, w in rest)]) + " |")
    print()


def target(name: str, wanted: float, measured: float, at_most: bool = False) -> dict[str, Any]:
    """Compare a number with its target, a minimum or a maximum."""
    measured = float(measured)
    met = measured <= wanted if at_most else measured >= wanted
    bound = f"{'<=' if at_most else '>='} {wanted}"
    return {"what": name, "wanted": bound, "measured": measured, "met": met}


def _cpu_facts(*keys):
    """Return entries of /proc/cpuinfo for the first processor, {} if there is no such file."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        pairs = (line.partition(":") for line in f.read().partition("\n\n")[0].splitlines())
        return {key.strip(): value.strip() for key, _, value in pairs if key.strip() in keys}
    return {}


def cpu_has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 arithmetic; without it, emulation is far slower."""
    flags = " ".join(_cpu_facts("flags", "Features").values()).split()
    has = not flags or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    if not has:
        print("this processor has no bfloat16 arithmetic, so bfloat16 is not measured")
    return has


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, GPU and the versions of the installed packages."""
    cpu = _cpu_facts("model name").get("model name") or platform.processor()
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    facts = {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "python": platform.python_version()}
    for name in _PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts


def report(args: argparse.Namespace, tables: dict[str, Table], targets: list[dict[str, Any]]) -> None:
    """Print tables, by title, and targets, and write them to `args.output` with machine, command and load."""
    for title, table in tables.items():
        print_table(title, table)
    if targets:
        print_table("target", {t["what"]: {k: v for k, v in t.items() if k != "what"} for t in targets})
    load = [args.load, os.getloadavg()[0]]
    facts = {"command": args.command, "load": load, "machine": describe_machine()}
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items() if value)
    print(f"{machine}; load {load[0]:.1f} to {load[1]:.1f}")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump({**facts, "tables": tables, "targets": targets}, f, indent=1)
