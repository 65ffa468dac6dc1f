"""Every way in which one rank of a job can fail, and how long it takes until all of its processes have ended.

python tests/faults/failures.py
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import processes
import torch
from processes import Run
from run_files import newest_checkpoint

from plaintrain.data import dataset_mapper
from plaintrain.evaluation.coco import COCOEvaluator
from plaintrain.solver.ema import ModelEMA
from plaintrain.utils import comm
from plaintrain.utils.storage import get_event_storage

# The iteration in which it happens; a checkpoint is saved every 4.
AT = 6


def _is_there(rank=1):
    return comm.get_rank() == rank and get_event_storage().iter >= AT


def change_losses(change):
    """Let `change(losses)` act on the losses of the training from iteration AT on, on rank 1."""

    def change_on_rank_1(module, losses):
        if _is_there():
            change(losses)
        return losses

    processes.change_losses(change_on_rank_1)


def nan_loss():
    change_losses(lambda losses: losses.update(loss_cls=losses["loss_cls"] * float("nan")))


class UnprintableError(Exception):
    def __str__(self):
        raise KeyError


def exception():
    change_losses(Mock(side_effect=ValueError("something in the model of rank 1")))


def unprintable_exception():
    change_losses(Mock(side_effect=UnprintableError()))


def rank_killed():
    change_losses(lambda losses: os.kill(os.getpid(), signal.SIGKILL))


def main_thread_hangs():
    change_losses(lambda losses: time.sleep(1000))


def process_frozen():
    change_losses(lambda losses: os.kill(os.getpid(), signal.SIGSTOP))


def before_saves(act):
    """Call `act(iteration)` in each iteration, before its checkpoint is saved."""
    update = ModelEMA.update

    def acting(self, model):
        act(get_event_storage().iter)
        update(self, model)

    ModelEMA.update = acting


def on_rank_0(act):
    before_saves(lambda iteration: act() if _is_there(0) else None)


def rank_0_killed():
    on_rank_0(lambda: os.kill(os.getpid(), signal.SIGKILL))


def rank_0_frozen():
    on_rank_0(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def rank_0_calls_sys_exit():
    on_rank_0(lambda: sys.exit(0))


def rank_0_calls_os_exit():
    on_rank_0(lambda: os._exit(0))


def _in_workers(act, rank=1):
    read = dataset_mapper.read_image

    def failing(*args):
        if comm.get_rank() == rank and np.random.default_rng().random() < 0.2:
            act()
        return read(*args)

    dataset_mapper.read_image = failing


def worker_killed():
    _in_workers(lambda: os.kill(os.getpid(), signal.SIGKILL))


def worker_frozen():
    _in_workers(lambda: os.kill(os.getpid(), signal.SIGSTOP), rank=0)


def worker_out_of_memory():
    _in_workers(Mock(side_effect=MemoryError("a worker of rank 1")))


def evaluator_raises():
    def evaluate(self):
        if comm.is_main_process():
            raise RuntimeError("something in the scoring")

    COCOEvaluator.evaluate = evaluate


def disk_full():
    whole = torch.save

    def save(data, f, **kwargs):
        # torch sends tensors between ranks by it too.
        if kwargs:
            return whole(data, f, **kwargs)
        f.write(b"half")
        raise OSError(28, "No space left on device")

    def fill(iteration):
        if iteration >= AT:
            torch.save = save

    before_saves(fill)


WORKERS = ["DATALOADER.NUM_WORKERS", 2, "DATALOADER.WORKER_TYPE", "process"]
HANG = ["HANG_TIMEOUT", 2]
ASYNC = ["SOLVER.ASYNC_CHECKPOINT", True]
LOADER = "a data loading worker has failed"
NAN = ["NaN or infinite at iteration 6", "images of that batch"]
HANGS = ["no step was finished within 2 s", "rank 1 is in", "tests/faults/failures.py, line"]
WAITS = ["no step was finished within 2 s", "rank 0 waits for its data loader in"]
SINGLE = "the same with a single process"
# {failure: (faults, options, words in the output)}.
FAILURES = {
    "NaN loss on one rank": (nan_loss, [], NAN),
    "an exception on one rank": (exception, [], ["ValueError: something in the model of rank 1"]),
    "a rank killed (SIGKILL)": (rank_killed, [], ["error: rank 1 was killed by SIGKILL"]),
    "rank 0 killed (SIGKILL)": (rank_0_killed, [], ["error: rank 0 was killed by SIGKILL"]),
    "rank 0 calls sys.exit(0)": (rank_0_calls_sys_exit, [], ["rank 0: error: it called sys.exit(0) in"]),
    "rank 0 calls os._exit(0)": (rank_0_calls_os_exit, [], ["error: rank 0 has exited with code 0"]),
    "an exception whose `__str__` raises": (
        unprintable_exception,
        [],
        ["<exception str() failed>"],
    ),
    "a loader worker killed (SIGKILL)": (worker_killed, WORKERS, [LOADER]),
    "a loader worker out of memory": (worker_out_of_memory, WORKERS, [f"{LOADER} (Caught MemoryError"]),
    "the evaluator raises": (evaluator_raises, [], ["RuntimeError: something in the scoring"]),
    "the disk is full": (disk_full, [], ["No space left on device"]),
    "the disk is full, asynchronous checkpoint": (disk_full, ASYNC, ["No space left on device"]),
    "one rank hangs (2 s allowed)": (main_thread_hangs, HANG, HANGS),
    "one rank is frozen (2 s allowed)": (process_frozen, HANG, ["rank 1 does not respond"]),
    "rank 0 is frozen (2 s allowed)": (rank_0_frozen, HANG, ["rank 0 does not respond"]),
    "a loader worker is frozen (2 s allowed)": (worker_frozen, [*WORKERS, *HANG], WAITS),
    SINGLE: (worker_frozen, [*WORKERS, *HANG], WAITS),
}


def fail(name, folder, ranks=2):
    """Let it happen; returns (run, exit code, seconds to the end of all processes, newest checkpoint)."""
    faults, options, _ = FAILURES[name]
    ranks = 1 if name == SINGLE else ranks
    run = Run(folder, [*options, "TEST.EVAL_PERIOD", 0, "SOLVER.MAX_ITER", 12], faults=faults, ranks=ranks)
    # From where every rank is at work; a failure in the first of workers may come before.
    run.wait_for("starting training" if options[:1] == WORKERS[:1] else "iter: 5")
    start = time.monotonic()
    code = run.wait(120).code
    while run.children() and time.monotonic() - start < 60:
        time.sleep(0.1)
    return run, code, time.monotonic() - start, newest_checkpoint(folder)[0]


def main():
    print("| failure | seconds to the end of every process | exit code | newest checkpoint | message |")
    print("| --- | --- | --- | --- | --- |")
    wrong = []
    with tempfile.TemporaryDirectory() as root:
        for number, (name, (_, _, texts)) in enumerate(FAILURES.items()):
            run, code, seconds, saved = fail(name, Path(root) / f"run-{number}")
            message = next((line for line in run.output.splitlines() if texts[0] in line), "")
            print(f"| {name} | {seconds:.1f} | {code} | {saved} | `{message[:70]}` |", flush=True)
            if code == 0 or run.children() or not all(text in run.output for text in texts):
                wrong.append(f"{name}:\n{run.output[-3000:]}")
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
