"""CPU time of the training step of a config's model, in float32 and in bfloat16, on batches in memory."""

import argparse
import itertools

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

from plaintrain.config import get_cfg
from plaintrain.data import build_detection_train_loader, declare_datasets
from plaintrain.engine.preflight import settle_num_classes
from plaintrain.modeling import build_model
from plaintrain.solver import build_optimizer
from plaintrain.solver.amp import build_autocast


def make_steps(config_file, batches):
    """{precision: function that takes a training step on each of a few batches}."""
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SEED", max(cfg.SEED, 0)])
    declare_datasets(cfg)
    settle_num_classes(cfg, eval_only=False)
    data = list(itertools.islice(build_detection_train_loader(cfg), batches))
    functions = {}
    for precision, enabled in (("float32", False), ("bfloat16", True)):
        if enabled and not cpu_has_bfloat16():
            break
        torch.manual_seed(cfg.SEED)
        model = build_model(cfg)
        optimizer, autocast = build_optimizer(cfg, model), build_autocast(enabled, "bfloat16", "cpu")

        def steps(model=model, optimizer=optimizer, autocast=autocast):
            for samples in data:
                with autocast:
                    losses = sum(model(samples).values())
                optimizer.zero_grad()
                losses.backward()
                optimizer.step()

        functions[precision] = steps
    return functions


def main(argv=None):
    """Measure and report."""
    parser = argparse.ArgumentParser("precision", description=__doc__)
    parser.add_argument("--config-file", default="configs/quickstart.yaml")
    parser.add_argument("--batches", type=positive, default=8, help="different batches, each a step a turn")
    args = parse_args(parser, argv, repeats=7, quick={"batches": 1})
    torch.set_num_threads(1)
    functions = {name: timed(f) for name, f in make_steps(args.config_file, args.batches).items()}
    rows = make_rows(in_turns(functions, args.repeats), 1e3 / args.batches)
    for row in rows.values():
        row["of float32"] = 1 / row["times less"]
    report(args, {f"a step of {args.config_file}, ms": rows}, [])


if __name__ == "__main__":
    run(main)
