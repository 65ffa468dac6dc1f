"""Real training runs as processes of their own, to be killed and resumed, and compared at the end.

The processes are forked from a server that has imported torch once: a start costs a tenth of a second.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch
from torch import multiprocessing as torch_mp

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from writer_helpers import value_differences  # noqa: E402

_SERVER = multiprocessing.get_context("forkserver")
_PRELOAD = [
    "torch",
    "torch.distributed",
    "torchvision",
    "plaintrain.engine",
    "plaintrain.modeling",
    "hotcoco",
    "tensorboardX",
]
# What a scheduler around the tests may have set.
_SCHEDULER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_")

# A detector that takes milliseconds. Image sizes vary: the first batch's tallest image has 64 pixels, and the
# batches after most checkpoints have some whose padding makes their feature maps half as tall again.
CONFIG = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_tiny_backbone, FREEZE_AT: 0}
  TINY: {CHANNELS: [8, 16], OUT_CHANNELS: 16, NORM: BN}
  ANCHOR_GENERATOR: {SIZES: [[16, 32]]}
  RPN: {PRE_NMS_TOPK_TRAIN: 50, PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 20}
  ROI_HEADS: {BATCH_SIZE_PER_IMAGE: 16, POSITIVE_FRACTION: 0.5, SCORE_THRESH_TEST: 0.01}
  ROI_BOX_HEAD: {FC_DIM: 16}
INPUT: {MIN_SIZE_TRAIN: [40, 64, 66], MIN_SIZE_TEST: 64, CROP: {ENABLED: True, SIZE: [0.7, 0.9]}}
DATASETS:
  DECLARE:
    few_train: {FORMAT: shapes, SPLIT: train, NUM: 22, HEIGHT: 64, WIDTH: 64}
    few_val: {FORMAT: shapes, SPLIT: val, NUM: 6, HEIGHT: 64, WIDTH: 64}
  TRAIN: [few_train]
  TEST: [few_val]
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {OPTIMIZER: AdamW, IMS_PER_BATCH: 4, BASE_LR: 0.002, STEPS: [], WARMUP_ITERS: 2, MAX_ITER: 24,
  CHECKPOINT_PERIOD: 4}
TEST: {EVAL_PERIOD: 8, BEST_METRIC: auto}
LOG_PERIOD: 1
OUTPUT: {REPORT: False, WRITERS: [console, json, csv, tensorboard]}
SEED: 2
"""


class Run:
    """A script of the collection in a process group of its own, with what it prints."""

    def __init__(self, folder, options, *, script="plain", flags=(), faults=None, launch=None):
        """
        Args:
            folder: OUTPUT_DIR.
            options: KEY VALUE pairs over CONFIG.
            script: "plain" or "epoch".
            flags: such as ["--resume"].
            faults: function of a module, called in the process before the script with its names: it may
                replace what the script calls.
            launch: arguments of `plaintrain.launch.launch`, such as {"num_gpus_per_machine": 2}.
        """
        self.folder = Path(folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.folder.parent / f"{self.folder.name}-{time.monotonic_ns()}.out"
        self.log.touch()
        arguments = [*flags, "OUTPUT_DIR", str(folder), *map(str, options)]
        _SERVER.set_forkserver_preload(_PRELOAD)
        self.process = _SERVER.Process(
            target=_run_script, args=(str(self.log), script, arguments, launch or {}, faults)
        )
        self.process.start()
        self._start = time.monotonic()

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    @property
    def tail(self):
        """The last lines of it, for what a failed test shows."""
        return "\n".join(self.output.splitlines()[-60:])

    def wait(self, timeout=120):
        """Wait for the end; returns (exit code, seconds since the start)."""
        self.process.join(timeout)
        seconds, running = time.monotonic() - self._start, self.process.is_alive()
        if running:
            self.kill()
        assert not running, f"still running after {timeout} s; it printed:\n{self.tail}"
        return self.process.exitcode, seconds

    def wait_for(self, condition, timeout=60):
        """Wait until `condition()` is true; False if the run ended before."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.process.is_alive():
                return bool(condition())
            assert time.monotonic() < end, f"waited for {timeout} s; it printed:\n{self.tail}"
            time.sleep(0.01)
        return True

    def has_said(self, text):
        return lambda: text in self.output

    def kill(self, number=signal.SIGKILL):
        """Send a signal to every process of the run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join()

    def children(self):
        """{pid: command line} of the processes that the run has started, ranks and loader workers."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid and int(path.name) != self.process.pid:
                    found[int(path.name)] = int(fields[1])
            except (OSError, IndexError):
                continue
        return found


def _run_script(log, script, arguments, launch, faults):
    # A session of its own: the first terminal that it opens is its controlling terminal.
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    for key in list(os.environ):
        if key.startswith(_SCHEDULER):
            del os.environ[key]
    os.environ["OMP_NUM_THREADS"] = "1"
    # Loader workers start as those of a script that is called from a shell.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    start = torch_mp.start_processes
    torch_mp.start_processes = lambda *a, **kw: start(*a, **{**kw, "start_method": "fork"})
    config = Path(log).parent / "config.yaml"
    if not config.exists():
        config.write_text(CONFIG)
    space = runpy.run_path(str(ROOT / "scripts" / f"{script}_train_net.py"))
    names = space["main"].__globals__
    parser = names["default_argument_parser"]()
    args = parser.parse_args(["--config-file", str(config), *arguments])
    if faults is not None:
        faults(names)
    names["launch"](names["main"], args=(args,), **launch)


# ---- what a run has left --------------------------------------------------------------------------


def load(path):
    return torch.load(path, weights_only=True)


def lines(folder):
    """{iteration: what metrics.json says, without times}."""
    path = Path(folder) / "metrics.json"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # The last line of a run that was killed.
            continue
        found[entry["iteration"]] = {
            k: v for k, v in entry.items() if k not in ("time", "data_time", "max_mem")
        }
    return found


def newest_checkpoint(folder):
    """(iteration, number of files that had to be passed over) of what `--resume` would take; -1 if none."""
    from plaintrain.utils.checkpoint_files import DamagedCheckpointError, read_checkpoint, resume_candidates

    for passed, path in enumerate(resume_candidates(str(folder))):
        try:
            return read_checkpoint(path, mmap=True)["iteration"], passed
        except DamagedCheckpointError:
            continue
    return -1, 0


def differences(whole, killed):
    """What differs between the folder of an undisturbed run and that of one that was killed and resumed."""
    found = value_differences(Path(whole), Path(killed))
    for name in ("model_final.pth", "model_best.pth"):
        paths = [Path(folder) / name for folder in (whole, killed)]
        if [p.exists() for p in paths] != [True, True]:
            found += [f"{p} is missing" for p in paths if not p.exists()]
            continue
        first, second = (load(p) for p in paths)
        parts = ("model", "ema", "optimizer", "scheduler", "best", "data_loader")
        found += [f"{name}: {part}" for part in parts if not _same(first.get(part), second.get(part))]
    return found


def _same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
