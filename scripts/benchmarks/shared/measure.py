"""What the benchmarks share: options, turns, tables, and a report with what it takes to judge a number.

Nothing here imports torch, so that a start can be measured from a process that has none of it in memory.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from plaintrain.utils.errors import UserError

_PACKAGES = "torch torchvision numpy pillow pycocotools faster-coco-eval hotcoco detectron2 mmengine mmdet"


def positive(text):
    """A whole number above 0 from the command line."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def output_file(text):
    """A file from the command line that can be written; its folder is made, now and not after an hour."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(text)), exist_ok=True)
        open(text, "a", encoding="utf-8").close()
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {e.strerror}") from e
    return text


def parse_args(parser, repeats, quick):
    """Parse the command line, with the options that every benchmark has.

    Args:
        parser: the benchmark's own, with its options and its name as `prog`.
        repeats: default of --repeats, or None without such a flag.
        quick: {option: value}, what --quick makes the defaults.

    Returns:
        Namespace; `load` is that of the machine now, `command` what was asked for.
    """
    command = " ".join(["python scripts/benchmark.py", parser.prog, *sys.argv[1:]])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.prog = f"benchmark.py {parser.prog}"
    if repeats:
        parser.add_argument("--repeats", type=positive, default=repeats, help="turns that count")
    parser.add_argument("--output", type=output_file, help="also write the numbers as JSON to this file")
    parser.add_argument("--quick", action="store_true", help="the smallest size: does it work at all?")
    if parser.parse_args().quick:
        parser.set_defaults(repeats=1, **quick)
    args = parser.parse_args()
    args.command, args.load = command, os.getloadavg()[0]
    return args


def run(main):
    """Call a benchmark's `main`; of a wrong device, file or folder one sentence is said."""
    try:
        main()
    except (UserError, FileNotFoundError, NotADirectoryError, PermissionError) as e:
        sys.exit(f"error: {e}")


def run_parts(args, measurements):
    """Measure the parts of `args.parts`, and report; {name: function (args) -> ({title: rows}, targets)}."""
    tables, targets = {}, []
    for part in args.parts:
        rows, wanted = measurements[part](args)
        tables |= rows
        targets += wanted
    report(args, tables, targets)


def installed(*names):
    """Those of some packages that can be imported; a line says which cannot, and are not measured."""
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}")
    return [name for name in names if name not in missing]


def timed(function, clock=time.process_time):
    """A function that calls another one and returns the seconds it took; garbage is collected before."""

    def seconds():
        gc.collect()
        start = clock()
        function()
        return clock() - start

    return seconds


def in_turns(functions, repeats, warm_up=True):
    """Measure variants one after the other, again and again, so that whatever else runs meets all alike.

    Args:
        functions: {name: function without arguments that returns what was measured}.
        repeats: turns that count.
        warm_up: begin with a turn that does not count.

    Returns:
        {name: [what each turn returned]}.
    """
    values = {name: [] for name in functions}
    # What is there already need not be looked at whenever garbage is collected.
    gc.collect()
    gc.freeze()
    for turn in range(-int(warm_up), repeats):
        for name, function in functions.items():
            value = function()
            if turn >= 0:
                values[name].append(value)
    gc.unfreeze()
    return values


def run_fresh(command, until=None):
    """Run a command in a new process; returns its (CPU, wall) seconds.

    Args:
        command: program and arguments.
        until: end it as soon as it has printed a line with this text; None: when it ends itself.

    Raises:
        RuntimeError: it failed, or never printed the line; with the end of what it printed.
    """
    before, start, seen, lines = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), False, []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stdout:
            lines = [*lines[-20:], line]
            if until and until in line:
                seen = True
                process.kill()
                break
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if not (seen if until else process.returncode == 0):
        raise RuntimeError(f"{' '.join(command)[-300:]} failed:\n{''.join(lines)}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def read_sizes(number):
    """(widths, heights), each `[number]`, of images as large as COCO's: a list of [width, height, share]."""
    path = Path(__file__).parent.parent / "coco_sizes.json"
    widths, heights, shares = np.array(json.loads(path.read_text())["sizes"]).T
    counts = np.diff(np.floor(np.cumsum([0, *shares]) * number + 0.5)).astype(int)
    return np.repeat(widths, counts), np.repeat(heights, counts)


def fresh(function, *args):
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def read_memory(pid, field):
    """MB of a process in the lines of its memory that begin with `field`: "Pss:" or "Private_" (Linux)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(field)) / 1024


def make_rows(values, scale=1.0):
    """Median, spread and ratio of what `in_turns` returned.

    Args:
        values: {name: numbers, one a turn}; the first is the baseline.
        scale: factor for what is shown.

    Returns:
        {name: {median, lowest, highest, times less, values}}; `times less` than the baseline, the median of
        the quotients of each turn.
    """
    base, rows = next(iter(values.values())), {}
    for name, numbers in values.items():
        quotients = [b / v for b, v in zip(base, numbers, strict=True)]
        numbers = [number * scale for number in numbers]
        spread = {"median": statistics.median(numbers), "lowest": min(numbers), "highest": max(numbers)}
        rows[name] = {**spread, "times less": statistics.median(quotients), "values": numbers}
    return rows


def _cell(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def print_table(title, rows):
    """Print {name: {column: value}} as a Markdown table; lists are left out."""
    columns = dict.fromkeys(
        key for row in rows.values() for key, value in row.items() if not isinstance(value, list)
    )
    lines = [[title, *columns]]
    lines += [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        first, *rest = zip(line, widths, strict=True)
        print("| " + " | ".join([first[0].ljust(first[1]), *(v.rjust(w) for v, w in rest)]) + " |")
    print()


def target(what, wanted, measured, at_most=False):
    """What is wanted of a number beside what was measured: at least `wanted`, or at most."""
    measured = float(measured)
    met = measured <= wanted if at_most else measured >= wanted
    wanted = f"{'<=' if at_most else '>='} {wanted}"
    return {"what": what, "wanted": wanted, "measured": measured, "met": met}


def _cpu_facts(*keys):
    """What /proc/cpuinfo says of the first processor; {} where there is no such file."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        pairs = (line.partition(":") for line in f.read().partition("\n\n")[0].splitlines())
        return {key.strip(): value.strip() for key, _, value in pairs if key.strip() in keys}
    return {}


def cpu_has_bfloat16():
    """Whether the processor computes in bfloat16; a line says where it does not, and is far slower in it."""
    flags = " ".join(_cpu_facts("flags", "Features").values()).split()
    has = not flags or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    if not has:
        print("this processor has no bfloat16 arithmetic: what needs it is not measured")
    return has


def describe_machine():
    """{what: versions, processor, cores, GPU}, of the packages that are installed."""
    cpu = _cpu_facts("model name").get("model name") or platform.processor()
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    facts = {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "python": platform.python_version()}
    for name in _PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts


def report(args, tables, targets):
    """Print tables and targets, and write them to `args.output` with machine, command and load.

    Args:
        args: from `parse_args`.
        tables: {title: {name: {column: value}}}.
        targets: list of `target`.
    """
    for title, rows in tables.items():
        print_table(title, rows)
    if targets:
        print_table("wanted", {t["what"]: {k: v for k, v in t.items() if k != "what"} for t in targets})
    load = [args.load, os.getloadavg()[0]]
    facts = {"command": args.command, "load": load, "machine": describe_machine()}
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items() if value)
    print(f"{machine}; load {load[0]:.1f} to {load[1]:.1f}")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump({**facts, "tables": tables, "targets": targets}, f, indent=1)
