"""Processes forked from a server that has imported torch once: a start costs a tenth of a second.

`Run` is a training script on a tiny detector, `Job` a function of this folder under `launch`, and
`run_script` any script as a user calls it.
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
from types import SimpleNamespace

import torch
from torch import multiprocessing as torch_mp

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
_SERVER = multiprocessing.get_context("forkserver")
_PRELOAD = [
    "plaintrain",
    "torch.distributed",
    "torchvision",
    "plaintrain.engine",
    "plaintrain.modeling",
    "plaintrain.evaluation",
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
    wide_train: {FORMAT: shapes, SPLIT: train, NUM: 9, HEIGHT: 40, WIDTH: 80, SEED: 1}
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
# Options over CONFIG: all that a step can hold, epochs, the other heads.
STEP = [
    *["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16", "SOLVER.ACCUMULATE_STEPS", 2],
    *["MODEL.EMA.ENABLED", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True],
    *["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"],
]
EPOCHS = ["SOLVER.MAX_EPOCHS", 4, "WORKFLOW", "[['train', 1], ['val', 1]]"]
MASKS_AND_KEYPOINTS = [
    *["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8],
    *["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[8]"],
    *["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1, 0.1]"],
]


class Process:
    """A function in a process of its own, the leader of a session, and what that prints.

    Attributes:
        pid: of the process.
        code, seconds: its exit code and how long it took, after `wait`.
    """

    def __init__(self, log, function, *args, env=None, cwd=None):
        """`args` are pickled; an environment variable of None is removed."""
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        _SERVER.set_forkserver_preload(_PRELOAD)
        arguments = (str(log), env or {}, str(cwd or os.getcwd()), function, args)
        self.process = _SERVER.Process(target=_in_child, args=arguments)
        self.process.start()
        self.pid = self.process.pid
        self._start = time.monotonic()

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    @property
    def tail(self):
        """The last lines of it, for what a failed test shows."""
        return "\n".join(self.output.splitlines()[-60:])

    def wait(self, timeout=120, code=None):
        """Wait for the end, and return this; the test fails without one, or with another exit code."""
        self.process.join(timeout)
        running = self.process.is_alive()
        self.code, self.seconds = self.process.exitcode, time.monotonic() - self._start
        if running:
            self.kill()
        assert not running, f"still running after {timeout} s; it printed:\n{self.tail}"
        assert code in (None, self.code), f"exit code {self.code}; it printed:\n{self.tail}"
        return self

    def wait_for(self, condition, timeout=60):
        """Wait until `condition()` is true, or the output has a text; False if the process ended before."""
        if isinstance(condition, str):
            text = condition
            return self.wait_for(lambda: text in self.output, timeout)
        end = time.monotonic() + timeout
        while not condition():
            if not self.process.is_alive():
                return bool(condition())
            assert time.monotonic() < end, f"waited for {timeout} s; it printed:\n{self.tail}"
            time.sleep(0.01)
        return True

    def kill(self, number=signal.SIGKILL):
        """Send a signal to every process of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
        if number == signal.SIGKILL:
            self.process.join()

    def children(self):
        """Return {pid: pid of its parent} of what this one has started, ranks and loader workers."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.pid and int(path.name) != self.pid:
                    found[int(path.name)] = int(fields[1])
            except (OSError, IndexError):
                continue
        return found


def _in_child(log, env, cwd, function, args):
    # A session of its own: the first terminal that it opens is its controlling terminal.
    os.setsid()
    # A shell's background job, as CI may be, hands down that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.chdir(cwd)
    for key in list(os.environ):
        if key.startswith(_SCHEDULER) or env.get(key, "") is None:
            del os.environ[key]
    os.environ.update(OMP_NUM_THREADS="1", PLAINTRAIN_CACHE="")
    os.environ.update({key: value for key, value in env.items() if value is not None})
    # Loader workers start as those of a script that is called from a shell, and ranks are forked.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    start = torch_mp.start_processes
    torch_mp.start_processes = lambda *a, **kw: start(*a, **{**kw, "start_method": "fork"})
    function(*args)


# ---- scripts ----------------------------------------------------------------------------------------


def run_script(script, *args, folder, faults=None, env=None, cwd=None, code=None):
    """Run a script of scripts/, or of a path, to its end; a `Process` with `code` and `output`.

    The test fails with another exit code than `code`, if that is given. The log is a file in `folder`.
    `faults` is a function of a module, called before the script is: it may replace what the script imports.
    """
    log = Path(folder) / f"{Path(script).stem}-{time.monotonic_ns()}.out"
    path = str(SCRIPTS / script)
    return Process(log, _run_script, path, [*map(str, args)], faults, env=env, cwd=cwd).wait(code=code)


def _run_script(path, args, faults):
    sys.argv = [path, *args]
    sys.path.insert(0, str(Path(path).parent))
    if faults is not None:
        faults()
    runpy.run_path(path, run_name="__main__")


class Run(Process):
    """A training script on CONFIG."""

    def __init__(self, folder, options, *, script="plain", flags=(), faults=None, ranks=1):
        """`folder` is OUTPUT_DIR, `script` "plain" or "epoch"; for `faults` see `run_script`."""
        self.folder = folder = Path(folder)
        config = write_config(folder.parent)
        words = ["--config-file", config, "--num-gpus", ranks, *flags]
        words = [*map(str, [*words, "OUTPUT_DIR", folder, *options])]
        path = str(SCRIPTS / f"{script}_train_net.py")
        log = folder.parent / f"{folder.name}-{time.monotonic_ns()}.out"
        super().__init__(log, _run_script, path, words, faults)


def write_config(folder):
    """Write CONFIG as config.yaml into a folder, unless it is there; returns its path."""
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        part = folder / f"config.{time.monotonic_ns()}"
        part.write_text(CONFIG)
        part.rename(path)
    return path


def change_losses(change):
    """Let the model return `change(model, losses)` for the losses of its training."""
    from plaintrain import modeling

    build_model = modeling.build_model

    def hook(module, inputs, losses):
        return change(module, losses) if module.training else losses

    def build(cfg):
        model = build_model(cfg)
        model.register_forward_hook(hook)
        return model

    modeling.build_model = build


# ---- functions under launch -------------------------------------------------------------------------


class Job(Process):
    """`launch(main_func, args=(args,), **kwargs)`; each rank may `save` facts."""

    def __init__(self, main_func, folder, *, env=None, slow=0.0, **kwargs):
        """`slow` is the time in seconds that each process stands still after it has met the others."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        args = SimpleNamespace(folder=str(folder))
        super().__init__(self.folder / "output.txt", _call_launch, slow, main_func, args, kwargs, env=env)

    def results(self):
        """What each rank that ran here gave to `save`, in their order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank-*.json"))]


def _call_launch(slow, main_func, args, kwargs):
    import torch.distributed as dist

    from plaintrain.engine.launch import launch

    meet = dist.init_process_group
    dist.init_process_group = lambda *a, **kw: (meet(*a, **kw), time.sleep(slow))
    launch(main_func, args=(args,), **kwargs)


def save(args, facts):
    """Hand facts to `Job.results`."""
    from plaintrain.utils import comm

    Path(args.folder, f"rank-{comm.get_rank()}.json").write_text(json.dumps(facts))
