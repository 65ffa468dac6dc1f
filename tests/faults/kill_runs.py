"""Kill real training runs at random moments, resume them, and compare with runs that were left alone.

python tests/faults/kill_runs.py --kills 500 --seed 0
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from file_events import kill_at, record_events
from processes import EPOCHS, MASKS_AND_KEYPOINTS, STEP, Run
from run_files import differences, lines, newest_checkpoint

REPEAT = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9]
PASTE = [*MASKS_AND_KEYPOINTS, "DATALOADER.NUM_WORKERS", 3]
PASTE += ["INPUT.AUGMENTATIONS", "['SimpleCopyPaste', 'RandomPhotometricDistort']"]
ASYNC = ["SOLVER.ASYNC_CHECKPOINT", True]
SPARSE = ["LOG_PERIOD", 20, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 5]
GROUPED = ["DATALOADER.GROUP_WINDOW", 2, "DATASETS.TRAIN", "['few_train', 'wide_train']"]
WORKER = ["DATALOADER.WORKER_TYPE", "process", "DATALOADER.NUM_WORKERS", 1, "TEST.VAL_LOSS_PERIOD", 6]
THREADS = ["DATALOADER.NUM_WORKERS", 4]
KEPT = ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 2]
# Both scripts evaluate at the end of each second epoch of 6 iterations.
EITHER = ["SOLVER.MAX_EPOCHS", 5, "TEST.EVAL_PERIOD", 12]

# {mix: (script, processes, options)}; of several, each start takes one.
MIXES = {
    "R-CNN, crops, varying image sizes, 4 threads": ("plain", 1, [*GROUPED, *THREADS]),
    "R-CNN, bf16, EMA, accumulation, clipping, 1 worker": ("plain", 1, [*STEP, *GROUPED, *WORKER]),
    "Mask R-CNN, repeat factors, copy-paste, 3 workers": ("plain", 1, [*REPEAT, *PASTE]),
    "R-CNN, asynchronous checkpoints, 2 kept": ("plain", 1, [*STEP, *ASYNC, *KEPT]),
    "epochs, bf16, EMA, accumulation": ("epoch", 1, [*STEP, *EPOCHS]),
    "two ranks": ("plain", 2, [*STEP, *GROUPED]),
    "two ranks, epochs, asynchronous checkpoints": ("epoch", 2, [*EPOCHS, *ASYNC]),
    "R-CNN, a log row every 20 iterations": ("plain", 1, [*SPARSE, "TEST.VAL_LOSS_PERIOD", 4]),
    "epochs, a log row every 20 iterations": ("epoch", 1, [*SPARSE, *EPOCHS]),
    "one or two ranks": ("plain", (1, 2), [*STEP, *GROUPED, *THREADS]),
    "plain or epoch script": (("plain", "epoch"), 1, [*STEP, *EITHER]),
}
# {way to be killed: how often, in percent}.
WAYS = {"random time": 35, "file event": 40, "SIGTERM": 8, "SIGINT, pipe": 9, "SIGHUP": 8}
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT, pipe": signal.SIGINT, "SIGHUP": signal.SIGHUP}
COLUMNS = ("kills", *WAYS, "resumes", "lost iterations")
COLUMNS += ("unreadable", "lost", "missing metrics", "differing bits")


def pipe_output():
    """Let the run print into a pipe whose reader, as that of `2>&1 | tee log`, is ended by Ctrl-C."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.dup2(reader, 0)
        os.close(writer)
        os.execvp("cat", ["cat"])
    for standard in (1, 2):
        os.dup2(writer, standard)
    os.close(reader)


class Trial:
    """One feature mix: a run that is left alone, and others that are not."""

    def __init__(self, root, name, seed):
        self.root, self.name, self.rng = Path(root), name, random.Random(f"{seed} {name}")
        self.scripts, self.ranks, self.options = MIXES[name]
        self.counts, self.found = Counter(), []
        self.whole, events = self.root / "whole", self.root / "events"
        run = self._start(self.whole, partial(record_events, self.whole, events))
        code, self.seconds = run.wait(300).code, run.seconds
        assert code == 0, run.output
        self.events, self.iterations = Counter(events.read_text().splitlines()), max(lines(self.whole)) + 1

    def _start(self, folder, faults, resume=False):
        choose = self.rng.choice if resume else min
        script = self.scripts if isinstance(self.scripts, str) else choose(self.scripts)
        ranks = self.ranks if isinstance(self.ranks, int) else choose(self.ranks)
        self.counts["resumes"] += resume
        flags = ["--resume"] if resume else []
        return Run(folder, self.options, script=script, flags=flags, faults=faults, ranks=ranks)

    def kill_until(self, kills):
        """Kill runs at random moments and resume them, until that many kills have hit."""
        while self.counts["kills"] < kills:
            folder, ended = self.root / f"killed-{self.counts['runs']}", False
            self.counts["runs"] += 1
            while not ended:
                ended = self._once(folder, last=self.counts["kills"] >= kills)
            if (folder / "metrics.json").exists():
                self._compare(folder)
            shutil.rmtree(folder)

    def _find(self, fault, text):
        self.counts[fault] += 1
        self.found.append(f"{self.name}: {fault}: {text}")
        print(self.found[-1], file=sys.stderr, flush=True)

    def _once(self, folder, last):
        """Start or resume, and kill; returns whether the run came to its end."""
        saved = newest_checkpoint(folder)[0]
        resume = saved >= 0 or self.rng.random() < 0.5
        way = None if last else self.rng.choices(list(WAYS), WAYS.values())[0]
        text, faults = self._plan(folder, way, remaining=1 - (saved + 1) / self.iterations)
        run = self._start(folder, faults, resume=resume)
        run.process.join(300 if way in (None, "file event") else self.rng.uniform(0.05, 1) * self.seconds)
        number = SIGNALS.get(way, signal.SIGKILL)
        trains = "iter: " in run.output
        if run.process.exitcode is None:
            # To the process that was started, and none to its children; Ctrl-C and others reach the group.
            os.kill(run.pid, number) if number == signal.SIGTERM else run.kill(number)
            run.process.join(60)
        code, trains = run.process.exitcode, trains and not (folder / "model_final.pth").exists()
        text = f"{text}, {'--resume' if resume else 'start'} at {saved}, exit code {code}"
        # A signal before the first step, or after the last, has its default effect.
        expected = [128 + number] if trains else [128 + number, -number, 1]
        if way not in SIGNALS:
            expected = [] if last else [-signal.SIGKILL]
        if code not in (0, *expected):
            run.kill()
            self._find("lost", f"{folder.name}: {text}\n{run.output[-2000:]}")
            return True
        if code != 0:
            self._count_kill(folder, way, keeps_all=trains and way in SIGNALS, text=text)
        return code == 0

    def _plan(self, folder, way, remaining):
        """(description, faults of the run) of a way to be killed."""
        if way != "file event":
            return way, pipe_output if way == "SIGINT, pipe" else None
        target = self.rng.choice(sorted(self.events))
        count = self.rng.randint(1, max(1, round(self.events[target] * remaining)))
        moment = self.rng.choice(("before", "after", "within") if "write" in target else ("before", "after"))
        return f"{moment} {target} {count}", partial(kill_at, folder, target, count, moment)

    def _count_kill(self, folder, way, *, keeps_all, text):
        saved, passed = newest_checkpoint(folder)
        lost = max(0, max(lines(folder), default=-1) - saved)
        if lost and keeps_all:
            self._find("lost", f"{folder.name}: {lost} iterations: {text}")
        if passed:
            self._find("unreadable", f"{folder.name}: {text}")
        self.counts.update({"kills": 1, way: 1, "lost iterations": lost})
        print(f"{self.name}: {self.counts['kills']}: {text}, saved {saved}", file=sys.stderr, flush=True)

    def _compare(self, folder):
        """Compare a run with the one that was left alone."""
        for text in differences(self.whole, folder, exact=isinstance(self.ranks, int)):
            # Only the epoch script has this scalar.
            if isinstance(self.scripts, str) or "'epoch'" not in text:
                is_metric = text.startswith(("metrics", "events"))
                self._find("missing metrics" if is_metric else "differing bits", f"{folder.name}: {text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the names of the mixes")
    args = parser.parse_args()
    names = [name for name in MIXES if args.only in name]
    trials, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(names):
            trials.append(Trial(Path(root) / str(number), name, args.seed))
            trials[-1].kill_until(args.kills // len(names) + (number < args.kills % len(names)))
            print(f"{name}: {time.monotonic() - start:.0f} s so far", file=sys.stderr, flush=True)
    total = sum((trial.counts for trial in trials), Counter())
    rows = [("configuration", *COLUMNS), ["---"] * (1 + len(COLUMNS))]
    for name, counts in [*((trial.name, trial.counts) for trial in trials), ("all", total)]:
        rows.append((name, *(counts[column] for column in COLUMNS)))
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))
    sys.exit(any(trial.found for trial in trials))


if __name__ == "__main__":
    main()
