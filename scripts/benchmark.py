#!/usr/bin/env python
"""Compare plaintrain with baselines: interleaved in one run, in CPU time unless stated otherwise.

python scripts/benchmark.py loop
python scripts/benchmark.py step --batch 8 --size 256 320 --output step.json
python scripts/benchmark.py all --output all.json
python scripts/benchmark.py loop --help

loop        overhead of a training loop over forward, backward and optimizer step
data        training loader: images per second, and padding at COCO's image sizes
records     from a COCO file to the first batch, and the memory of a worker
step        training step of Faster R-CNN R50-FPN, and its device syncs
precision   training step of any config in float32 and bfloat16
eval        COCO metrics
checkpoint  how long a save blocks the loop, and the time of a resume
startup     --help, and the time to the end of the first iteration
scaling     phases of an iteration with 1, 2 and 4 processes
all         all of them in order; about 40 minutes on one core

Each one runs in its own process, scripts/benchmarks/NAME.py, and prints medians, minima, maxima and ratios.
--output writes them as JSON with machine, versions, command and load; --quick is a smoke test.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.shared.measure import output_file

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "benchmarks")
BENCHMARKS = ("loop", "data", "records", "step", "precision", "eval", "checkpoint", "startup", "scaling")


def run(name: str, options: list[str]) -> int:
    """Run one benchmark and return its exit code."""
    return subprocess.call([sys.executable, os.path.join(FOLDER, f"{name}.py"), *options])


def run_all(options: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Run all benchmarks and return ({name: results}, names of those that failed)."""
    results = {}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in BENCHMARKS:
            print(f"\n==== {name} ====\n", flush=True)
            path = os.path.join(folder, f"{name}.json")
            if run(name, [*options, "--output", path]):
                failed.append(name)
                continue
            with open(path, encoding="utf-8") as f:
                results[name] = json.load(f)
    return results, failed


def main() -> int:
    if sys.argv[1:] and sys.argv[1] in BENCHMARKS:
        return run(sys.argv[1], sys.argv[2:])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("name", metavar="NAME", choices=[*BENCHMARKS, "all"], help="one of the above")
    parser.add_argument("--output", type=output_file, help="also write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, as a smoke test")
    args = parser.parse_args()
    results, failed = run_all(["--quick"] if args.quick else [])
    print("\n==== targets ====\n")
    for result in results.values():
        for target in result["targets"]:
            met = "met" if target["met"] else "not met"
            print(f"{target['what']}: {target['measured']:.3g}, target {target['wanted']}: {met}")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump(results, f, indent=1)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
