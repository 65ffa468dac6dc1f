"""Kill real training runs at random moments, resume them, and compare with runs that were left alone.

python tests/faults/kill_runs.py --kills 200 --seed 0
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
from pathlib import Path

from processes import EPOCHS, MASKS_AND_KEYPOINTS, STEP, Run
from run_files import differences, lines, newest_checkpoint

REPEAT = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9]
PASTE = [*MASKS_AND_KEYPOINTS, "DATALOADER.NUM_WORKERS", 3]
PASTE += ["INPUT.AUGMENTATIONS", "['SimpleCopyPaste', 'RandomPhotometricDistort']"]
ASYNC = ["SOLVER.ASYNC_CHECKPOINT", True]
SPARSE = ["LOG_PERIOD", 20, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 5]
GROUPED = ["DATALOADER.GROUP_WINDOW", 2]
WORKER = ["DATALOADER.WORKER_TYPE", "process", "DATALOADER.NUM_WORKERS", 1, "TEST.VAL_LOSS_PERIOD", 6]

KEPT = ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 2]

# {mix: (script, processes, options)}.
MIXES = {
    "R-CNN": ("plain", 1, GROUPED),
    "R-CNN, bf16, EMA, accumulation, clipping, 1 worker": ("plain", 1, [*STEP, *GROUPED, *WORKER]),
    "Mask R-CNN, repeat factors, copy-paste, 3 workers": ("plain", 1, [*REPEAT, *PASTE]),
    "R-CNN, asynchronous checkpoints, 2 kept": ("plain", 1, [*STEP, *ASYNC, *KEPT]),
    "epochs, bf16, EMA, accumulation": ("epoch", 1, [*STEP, *EPOCHS]),
    "two ranks": ("plain", 2, [*STEP, *GROUPED]),
    "two ranks, epochs, asynchronous checkpoints": ("epoch", 2, [*EPOCHS, *ASYNC]),
    "R-CNN, a log row every 20 iterations": ("plain", 1, [*SPARSE, "TEST.VAL_LOSS_PERIOD", 4]),
    "epochs, a log row every 20 iterations": ("epoch", 1, [*SPARSE, *EPOCHS]),
}


def pause_in_writes():
    """Lengthen the moments in which a file is written but not yet whole, and say when they begin."""
    sync = os.fsync

    def slow(fd):
        print("WRITING", flush=True)
        time.sleep(0.15)
        sync(fd)

    os.fsync = slow


class Trial:
    """One feature mix: a run that is left alone, and others that are not."""

    def __init__(self, root, number, mix, rng):
        self.root, self.rng = Path(root) / f"mix-{number}", rng
        self.script, self.num_gpus, self.options = mix
        self.counts, self.found = Counter(), []
        self.whole = self.root / "whole"
        run = self._start(self.whole)
        code, self.seconds = run.wait(300).code, run.seconds
        assert code == 0, run.output

    def _start(self, folder, *, resume=False, faults=None):
        flags = ["--resume"] if resume else []
        return Run(folder, self.options, script=self.script, flags=flags, faults=faults, ranks=self.num_gpus)

    def kill_until(self, kills):
        """Kill runs at random moments and resume them, until that many kills have hit."""
        while self.counts["kills"] < kills:
            folder, ended = self.root / f"killed-{self.counts['runs']}", False
            self.counts["runs"] += 1
            while not ended:
                ended = self._once(folder, last=self.counts["kills"] >= kills)
            self.found += [f"{folder.name}: {text}" for text in differences(self.whole, folder)]
            if not self.found:
                shutil.rmtree(folder)

    def _once(self, folder, last):
        """Start or resume, and kill; returns whether the run came to its end."""
        resume, in_write = newest_checkpoint(folder)[0] >= 0, not last and self.rng.random() < 0.3
        run = self._start(folder, resume=resume, faults=pause_in_writes if in_write else None)
        self.counts["resumes"] += resume
        if last:
            run.wait(300)
        elif in_write:
            target = self.rng.randrange(1, 12)
            run.wait_for(lambda: run.output.count("WRITING") >= target)
            time.sleep(self.rng.uniform(0, 0.15))
        else:
            run.process.join(self.rng.uniform(0.1, 1.0) * self.seconds)
        code = run.process.exitcode
        if code is None:
            self._kill(run, folder, in_write)
        elif code:
            self.counts["lost"] += 1
            self.found.append(f"ended with {code}:\n{run.output[-2000:]}")
        return code is not None

    def _kill(self, run, folder, in_write):
        reached = max(lines(folder), default=-1)
        number = self.rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM])
        run.kill(number)
        code = run.wait(60).code
        if code == 0:
            # It had ended by itself a moment before.
            return
        self.counts["kills"] += 1
        self.counts["in a write"] += in_write
        self.counts["SIGTERM"] += number == signal.SIGTERM
        saved, passed = newest_checkpoint(folder)
        self.counts["unreadable"] += passed
        self.counts["lost iterations"] += max(0, reached - saved)


COLUMNS = ("kills", "in a write", "SIGTERM", "resumes", "lost iterations", "unreadable", "lost")


def print_row(*cells):
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, total, differing = random.Random(args.seed), Counter(), []
    print_row("mix", *COLUMNS, "differences")
    print_row(*["---"] * (len(COLUMNS) + 2))
    with tempfile.TemporaryDirectory() as root:
        for number, (name, mix) in enumerate(MIXES.items()):
            trial = Trial(root, number, mix, rng)
            trial.kill_until(args.kills // len(MIXES) + (number < args.kills % len(MIXES)))
            print_row(name, *(trial.counts[c] for c in COLUMNS), len(trial.found))
            total += trial.counts
            differing += trial.found
    print_row("all", *(total[c] for c in COLUMNS), len(differing))
    print("\n".join(differing[:20]))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
