"""CPU time of a training loop over that of forward, backward and optimizer step.

The loop of plain_train_net.py, and one in the style of Detectron2's (`.item()` on every loss, the same
three writers every 20 iterations, one TensorBoard event per scalar), each over a trivial model and minus a
bare loop over the same model. Detectron2's own loop and MMEngine's runner are measured if they are installed.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import logging
import os
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from shared.measure import in_turns, installed, make_rows, parse_args, positive, report, run, target
from tensorboardX import SummaryWriter
from torch import Tensor, nn

from plaintrain.config import get_cfg

_PERIOD = 20
# {optional package: module of the baseline}.
_OTHERS = {"detectron2": "baselines.run_detectron2", "mmengine": "baselines.run_mmdet"}
_TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "plain_train_net.py")
BARE = "bare step"
ITEM = ".item() on every loss, as Detectron2's"
PLAIN = "plain_train_net.py"


class TrivialModel(nn.Module):
    """Four losses from one small layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, samples: list[Tensor]) -> dict[str, Tensor]:
        names = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
        return dict(zip(names, self.layer(samples[0]).square().mean(0).unbind(), strict=True))


class Batches:
    """The same batch `num_iters` + 1 times; `seconds` is the CPU time from the first to the last.

    Excludes the time of a loop before and after its iterations.
    """

    def __init__(self, num_iters: int) -> None:
        self.num_iters = num_iters
        self.data: Any = [torch.ones(8, 4)]
        self.seconds = 0.0
        # MMEngine looks for class names there.
        self.dataset = None

    def __iter__(self):
        for _, samples in self.iterations(0, self.num_iters + 1):
            yield samples

    def iterations(self, start_iter: int, end_iter: int) -> Iterator[tuple[int, Any]]:
        for i in range(start_iter, end_iter):
            if i in (0, self.num_iters):
                self.seconds = time.process_time() - self.seconds
            yield i, self.data

    def __len__(self):
        return self.num_iters + 1

    def state_dict(self) -> dict[str, Any]:
        return {}


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a new model and its optimizer."""
    torch.manual_seed(0)
    model = TrivialModel()
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)


def bare_loop(batches: Batches, folder: str) -> None:
    """Run forward, backward and optimizer step."""
    model, optimizer = make()
    for data in batches:
        losses = sum(model(data).values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()


def item_loop(batches: Batches, folder: str) -> None:
    """Run a loop with the bookkeeping of Detectron2's plain_train_net.py."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)
    logger = logging.getLogger("plaintrain")
    history: dict[str, list[float]] = {}
    path = os.path.join(folder, "metrics.json")
    with SummaryWriter(folder) as board, open(path, "w", encoding="utf-8") as f:
        for iteration, data in enumerate(batches):
            loss_dict = model(data)
            losses = sum(loss_dict.values())
            assert torch.isfinite(losses).all()
            values = {name: loss.item() for name, loss in loss_dict.items()}
            values |= {"total_loss": sum(values.values()), "lr": optimizer.param_groups[0]["lr"]}
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            scheduler.step()
            for name, value in values.items():
                history.setdefault(name, []).append(value)
            if (iteration + 1) % _PERIOD == 0:
                shown = {name: statistics.median(v[-_PERIOD:]) for name, v in history.items()}
                logger.info("  ".join(f"{name}: {value:.4g}" for name, value in shown.items()))
                f.write(json.dumps({"iteration": iteration, **shown}) + "\n")
                f.flush()
                for name, value in shown.items():
                    board.add_scalar(name, value, iteration)


def plaintrain_loop(batches: Batches, folder: str) -> None:
    """Run `do_train` of plain_train_net.py with a trivial data loader."""
    do_train = runpy.run_path(_TRAIN)["do_train"]
    do_train.__globals__["build_detection_train_loader"] = lambda cfg: batches
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", batches.num_iters + 1, "SOLVER.CHECKPOINT_PERIOD", 0])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "LOG_PERIOD", _PERIOD, "OUTPUT_DIR", folder])
    torch.manual_seed(0)
    do_train(cfg, TrivialModel())


def measure(
    variants: Mapping[str, Callable[[Batches, str], object]], iterations: int, repeats: int
) -> dict[str, list[float]]:
    """Return {variant: [CPU seconds per iteration, one per round]}."""
    with tempfile.TemporaryDirectory() as root:

        def seconds(run):
            batches = Batches(iterations)
            with contextlib.redirect_stdout(io.StringIO()):
                run(batches, tempfile.mkdtemp(dir=root))
            return batches.seconds / iterations

        logger = logging.getLogger("plaintrain")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(logging.FileHandler(f"{root}/log.txt"))
        return in_turns({name: functools.partial(seconds, run) for name, run in variants.items()}, repeats)


def compute_overhead(times: dict[str, list[float]]) -> dict[str, float]:
    """Return {variant: median CPU seconds of an iteration minus those of the bare loop in the same round}."""
    # Noise can make the difference 0 or negative.
    return {
        name: max(1e-9, statistics.median(v - bare for v, bare in zip(values, times[BARE], strict=True)))
        for name, values in times.items()
        if name != BARE
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("loop", description=__doc__)
    parser.add_argument("--iterations", type=positive, default=2000, help="per round")
    args = parse_args(parser, repeats=9, quick={"iterations": 100})
    torch.set_num_threads(1)
    variants = {BARE: bare_loop, ITEM: item_loop, PLAIN: plaintrain_loop}
    for name in installed(*_OTHERS):
        run = importlib.import_module(_OTHERS[name]).run_loop
        variants[name] = functools.partial(run, make, period=_PERIOD)
    times = measure(variants, args.iterations, args.repeats)
    table = make_rows(times, 1e6)
    overhead = compute_overhead(times)
    for name, seconds in overhead.items():
        table[name]["over the bare step"] = seconds * 1e6
    ratio = overhead[ITEM] / overhead[PLAIN]
    wanted = [target(f"loop, over the bare step: {PLAIN}, times less than {ITEM}", 2, ratio)]
    report(args, {"CPU of an iteration, us": table}, wanted)


if __name__ == "__main__":
    run(main)
