"""Starts `launch` in processes of their own, and holds the functions that those processes run.

The processes are forked from a server that has imported torch once, so that one costs a tenth of
a second instead of two; `launch` forks its ranks too, instead of spawning them.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import multiprocessing as torch_mp
from torch import nn

from plaintrain.config import get_cfg
from plaintrain.data.catalog import DatasetCatalog
from plaintrain.launch import launch
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

TINY_CONFIG = {
    "MODEL": {
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": "build_tiny_backbone", "FREEZE_AT": 0},
        "TINY": {"CHANNELS": [8], "OUT_CHANNELS": 8},
        "ANCHOR_GENERATOR": {"SIZES": [[16]]},
        "ROI_BOX_HEAD": {"FC_DIM": 8, "POOLER_RESOLUTION": 2},
    },
    "DATASETS": {
        "DECLARE": {
            "engine_tiny_train": {"FORMAT": "shapes", "SPLIT": "train", "NUM": 4},
            "engine_tiny_val": {"FORMAT": "shapes", "SPLIT": "val", "NUM": 2},
        },
        "TRAIN": ("engine_tiny_train",),
        "TEST": ("engine_tiny_val",),
    },
}

_SERVER = multiprocessing.get_context("forkserver")
# What a scheduler around the tests may have set.
_SCHEDULER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_")


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """One process that calls `launch(main_func, args=(args,), **kwargs)`, and what it prints.

    It is the leader of a process group of its own.
    """

    def __init__(self, main_func, folder, *, env=None, debug=False, slow=0.0, **kwargs):
        """
        Args:
            main_func: function of this module that takes `args`.
            folder: folder for the job's files; `args.folder`.
            env: environment variables to set before.
            debug: `args.debug`.
            slow: seconds that this process stands still after it has met the others.
            kwargs: arguments of `launch`.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = self.folder / "output.txt"
        self._log.touch()
        _SERVER.set_forkserver_preload(["torch", "torch.distributed", "plaintrain.engine"])
        args = SimpleNamespace(folder=str(folder), debug=debug)
        self._process = _SERVER.Process(
            target=_call_launch, args=(str(self._log), env or {}, slow, main_func, args, kwargs)
        )
        self._process.start()
        self.pid = self._process.pid
        self._start = time.monotonic()

    def wait(self, timeout=60):
        """Wait until the process has ended; then `code`, `output` and `seconds` are set."""
        self._process.join(timeout)
        running = self._process.is_alive()
        if running:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
        self.seconds = time.monotonic() - self._start
        self.code, self.output = self._process.exitcode, self._log.read_text()
        assert not running, f"still running after {timeout} s; it printed:\n{self.output}"
        return self

    def results(self):
        """What each rank that ran here gave to `save`, in their order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank-*.json"))]


def _call_launch(log, env, slow, main_func, args, kwargs):
    os.setpgid(0, 0)
    # A shell's background job, as CI may be, hands down that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    for key in list(os.environ):
        if key.startswith(_SCHEDULER):
            del os.environ[key]
    os.environ.update(OMP_NUM_THREADS="1", **env)
    start = torch_mp.start_processes
    torch_mp.start_processes = lambda *a, **kw: start(*a, **{**kw, "start_method": "fork"})
    meet = dist.init_process_group
    dist.init_process_group = lambda *a, **kw: (meet(*a, **kw), time.sleep(slow))
    launch(main_func, args=(args,), **kwargs)


def save(args, facts):
    """Hand facts to `Job.results`."""
    Path(args.folder, f"rank-{comm.get_rank()}.json").write_text(json.dumps(facts))


# ---- what the ranks run ----------------------------------------------------------------------


def report(args):
    """Save what this rank knows of itself and of the others."""
    ranks = {"rank": torch.tensor(float(comm.get_rank()))}
    facts = {
        "rank": comm.get_rank(),
        "world_size": comm.get_world_size(),
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        "main": comm.is_main_process(),
        "sum": comm.reduce_dict(ranks, average=False)["rank"].item(),
    }
    save(args, facts)


def collect(args):
    """Save what every collective of `comm` returns on this rank."""
    rank = comm.get_rank()
    # Other orders on other ranks: the names decide what is added to what.
    losses = {"b": torch.tensor(1.0 + rank), "a": torch.tensor(10.0 * (rank + 1), dtype=torch.float64)}
    given = losses if rank == 0 else dict(reversed(losses.items()))
    given["c"] = torch.tensor(3.0 * rank, requires_grad=True)
    mean, total = comm.reduce_dict(given), comm.reduce_dict(given, average=False)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1),
        nn.BatchNorm2d(2),
        nn.GroupNorm(1, 2),
        nn.BatchNorm1d(3, track_running_stats=False),
    )
    for tensor in model.state_dict().values():
        tensor.fill_(rank + 1)
    model[1].running_var[1] = 5 * rank
    comm.average_buffers(model)
    comm.average_buffers(nn.Linear(1, 1))
    comm.synchronize()
    facts = {
        "mean": list(mean.items()),
        "sum": list(total.items()),
        "grad": any(value.requires_grad for value in mean.values()),
        "untouched": [given["b"].item(), given["c"].requires_grad],
        "all_gather": comm.all_gather({"rank": rank, "data": [None, "x" * rank]}),
        "gather": comm.gather(("rank", rank)),
        "gather to 1": comm.gather(rank, dst=1),
        "broadcast": comm.broadcast({"from": rank}),
        "broadcast from 1": comm.broadcast(rank, src=1),
        "seed": comm.shared_random_seed(),
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
    }
    Path(args.folder, f"rank-{rank}.json").write_text(json.dumps(facts, default=torch.Tensor.item))


def both_refuse(args):
    raise UserError("both ranks find this")


def rank_1_refuses(args):
    if comm.get_rank() == 1:
        raise UserError("only rank 1 finds this")
    time.sleep(100)


def rank_1_fails_while_0_works(args):
    if comm.get_rank() == 1:
        raise RuntimeError("rank 1 broke")
    time.sleep(100)


def rank_0_fails_while_1_works(args):
    if comm.get_rank() == 0:
        raise RuntimeError("rank 0 broke")
    time.sleep(100)


def rank_1_fails_while_0_waits(args):
    if comm.get_rank() == 1:
        time.sleep(0.3)
        raise RuntimeError("rank 1 broke")
    comm.synchronize()


def rank_1_is_killed(args):
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


def wait_for_the_end(args):
    """Touch `ready-N`, then work; rank 0 is the last to feel an interrupt."""
    Path(args.folder, f"ready-{comm.get_rank()}").touch()
    try:
        time.sleep(100)
    finally:
        if comm.is_main_process():
            time.sleep(0.3)


def _setup(args, *overrides):
    from plaintrain.engine import default_setup

    cfg = get_cfg()
    cfg.merge_from_other_cfg(TINY_CONFIG)
    cfg.merge_from_list(["OUTPUT_DIR", os.path.join(args.folder, "output"), *overrides])
    cfg.freeze()
    default_setup(cfg, argparse.Namespace())
    return cfg


def setup_frozen(args):
    """`default_setup` of a frozen config in the folder of an earlier run; rank 1 reads slowly."""
    if not comm.is_main_process():
        get = DatasetCatalog.get
        DatasetCatalog.get = lambda name: (time.sleep(0.2), get(name))[1]
    cfg = _setup(args, "MODEL.WEIGHTS", os.path.join(args.folder, "output", "model_final.pth"))
    facts = {"seed": cfg.SEED, "classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES, "frozen": cfg.is_frozen()}
    save(args, {**facts, "weights": cfg.MODEL.WEIGHTS})
    Path(args.folder, f"draw-{comm.get_rank()}.txt").write_text(str(torch.rand(()).item()))


def setup_odd_batch(args):
    _setup(args, "SOLVER.IMS_PER_BATCH", "3")


def evaluate_a_part(args):
    """Score every other image of `outputs.pt`, beside the folder; save results and what masks take."""
    from plaintrain.data import register_coco_instances
    from plaintrain.evaluation import COCOEvaluator

    folder = Path(args.folder).parent
    register_coco_instances("part", {}, str(folder / "a.json"), "nowhere")
    outputs = torch.load(folder / "outputs.pt")
    evaluator = COCOEvaluator("part")
    sent, gather = [], comm.gather
    comm.gather = lambda data: sent.append(data) or gather(data)
    for image_id in sorted(outputs)[comm.get_rank() :: comm.get_world_size()]:
        evaluator.process([{"image_id": image_id}], [outputs[image_id]])
    results = evaluator.evaluate()
    kinds = sorted({type(value).__name__ for value in sent[0].values()})
    save(args, {"results": results, "mask_bytes": len(sent[0]["counts"]), "kinds": kinds})
