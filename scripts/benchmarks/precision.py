"""CPU time of a config's training step in float32 and bfloat16, on batches in memory."""

import argparse
import itertools
from collections.abc import Callable

import torch
from shared.measure import (
    cpu_has_bfloat16,
    in_turns,
    make_rows,
    parse_args,
    positive,
    report,
    run,
    timed,
)
from shared.steps import make_training_steps

from plaintrain.config import get_cfg
from plaintrain.data import build_detection_train_loader, declare_datasets
from plaintrain.engine.preflight import resolve_num_classes


def make_steps(config_file: str, batches: int) -> dict[str, Callable[[], None]]:
    """Return {precision: function that trains a step on each batch}."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SEED", max(cfg.SEED, 0)])
    declare_datasets(cfg)
    resolve_num_classes(cfg, eval_only=False)
    data = list(itertools.islice(build_detection_train_loader(cfg), batches))
    functions = {}
    precisions = ["float32", "bfloat16"] if cpu_has_bfloat16() else ["float32"]
    for precision in precisions:
        cfg.merge_from_list(["SOLVER.AMP.ENABLED", precision == "bfloat16"])
        cfg.merge_from_list(["SOLVER.AMP.PRECISION", "bfloat16"])
        functions[precision], _ = make_training_steps(cfg, data)
    return functions


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("precision", description=__doc__)
    parser.add_argument("--config-file", default="configs/quickstart.yaml")
    parser.add_argument(
        "--batches", type=positive, default=8, help="different batches, one step each per round"
    )
    args = parse_args(parser, repeats=7, quick={"batches": 1})
    torch.set_num_threads(1)
    functions = {name: timed(f) for name, f in make_steps(args.config_file, args.batches).items()}
    table = make_rows(in_turns(functions, args.repeats), 1e3 / args.batches)
    for row in table.values():
        row["of float32"] = 1 / row["times less"]
    report(args, {f"a step of {args.config_file}, ms": table}, [])


if __name__ == "__main__":
    run(main)
