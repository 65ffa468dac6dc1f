#!/usr/bin/env python
"""Measure plaintrain against named baselines: in one run, in turns, in CPU time where nothing else is said.

python scripts/benchmark.py loop
python scripts/benchmark.py step --batch 8 --size 256 320 --output step.json
python scripts/benchmark.py all --output all.json
python scripts/benchmark.py loop --help

loop        what a training loop costs beside forward, backward and optimizer step
data        the training loader, images per second, and padding at COCO's sizes
records     from a COCO file to the first batch, and the memory of a worker
step        the training step of Faster R-CNN R50-FPN, and what of it makes a GPU's host wait
precision   the training step of any config in float32 and bfloat16
eval        COCO's metrics
checkpoint  how long a save holds the loop up, and what a resume costs
startup     --help, and from the command to the end of the first iteration
scaling     what 1, 2 and 4 processes cost, part by part of an iteration
all         all of them, one after the other; together some 40 minutes of one core

Each runs in a process of its own, scripts/benchmarks/WHAT.py, and prints medians, lowest and highest values
and ratios; --output writes them as JSON with machine, versions, command and load; --quick is for trying out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from benchmarks.shared.measure import output_file

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "benchmarks")
WHAT = ("loop", "data", "records", "step", "precision", "eval", "checkpoint", "startup", "scaling")


def run(what, options):
    """Run one benchmark; returns its exit code."""
    return subprocess.call([sys.executable, os.path.join(FOLDER, f"{what}.py"), *options])


def run_all(options):
    """Run every benchmark; returns ({what: its numbers}, those that failed)."""
    results, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for what in WHAT:
            print(f"\n==== {what} ====\n", flush=True)
            path = os.path.join(folder, f"{what}.json")
            if run(what, [*options, "--output", path]):
                failed.append(what)
                continue
            with open(path, encoding="utf-8") as f:
                results[what] = json.load(f)
    return results, failed


def main():
    if sys.argv[1:] and sys.argv[1] in WHAT:
        return run(sys.argv[1], sys.argv[2:])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=[*WHAT, "all"], help="what to measure")
    parser.add_argument("--output", type=output_file, help="also write the numbers as JSON to this file")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: does it work at all?")
    args = parser.parse_args()
    results, failed = run_all(["--quick"] * args.quick)
    print("\n==== wanted ====\n")
    for target in (target for result in results.values() for target in result["targets"]):
        met = "met" if target["met"] else "not met"
        print(f"{target['what']}: {target['measured']:.3g}, wanted {target['wanted']}: {met}")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump(results, f, indent=1)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
