#!/usr/bin/env python
"""Say what a detector is made of and what it costs: parameters, FLOPs, activations, memory.

python scripts/analyze_model.py output/quickstart
python scripts/analyze_model.py --config-file configs/quickstart.yaml --depth 3 --batch 1
python scripts/analyze_model.py --config-file configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml \\
    --size 800x1216 --json retinanet.json MODEL.RETINANET.NUM_CLASSES 80

RUN_FOLDER is that of a run (OUTPUT_DIR). Weights are not needed, nor images if the config says how many
classes (and keypoints) there are. One inference and one training step are run on random images, on the CPU.
"""

from plaintrain.utils.arguments import build_run_parser, parse_run_arguments

if __name__ == "__main__":
    parser = build_run_parser(__doc__)
    parser.add_argument(
        "--size", default="", metavar="HxW", help="of an image; default: one of 3 to 4, as INPUT resizes it"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="images of a step; default: as SOLVER says")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to list, default 2")
    parser.add_argument("--json", metavar="FILE", help="write all of it to this file too")
    args = parse_run_arguments(parser)
    height, cross, width = args.size.partition("x")
    if args.size and not (cross and height.isdigit() and width.isdigit()):
        parser.error(f"--size is {args.size!r}, but must be HEIGHTxWIDTH, such as 800x1216")
    args.size = (int(height), int(width)) if args.size else None
    if args.depth < 0 or (args.batch is not None and args.batch < 1):
        parser.error("--depth must be at least 0, and --batch at least 1")

from plaintrain.analysis.command import load_tool_cfg
from plaintrain.analysis.model import NOT_COUNTED, analyze_model, make_random_samples
from plaintrain.config import check_cfg, get_value
from plaintrain.data.transforms.geometric import get_shortest_edge_size
from plaintrain.engine.launch import launch
from plaintrain.engine.preflight import resolve_num_classes
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import write_json
from plaintrain.modeling import build_model
from plaintrain.modeling.build import get_num_classes_key
from plaintrain.utils.errors import UserError


def read_model_config(args):
    """The config, frozen, with its number of classes, for one process on the CPU that compiles nothing.

    The datasets are read only where the config leaves the number of classes, or of keypoints, to them.
    """
    cfg = load_tool_cfg(args)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.COMPILE", False])
    cfg.freeze()
    check_cfg(cfg)
    keypoints = cfg.MODEL.KEYPOINT_ON and not cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if keypoints or not get_value(cfg, get_num_classes_key(cfg)):
        resolve_num_classes(cfg, eval_only=True)
    return cfg


def default_size(cfg):
    """(height, width) of an image of 3 to 4 as INPUT resizes it in training.

    Raises:
        UserError: INPUT keeps images as they are.
    """
    if min(cfg.INPUT.FIXED_SIZE) > 0:
        return tuple(cfg.INPUT.FIXED_SIZE)
    if not max(cfg.INPUT.MIN_SIZE_TRAIN):
        raise UserError("INPUT.MIN_SIZE_TRAIN keeps images as they are: give --size HEIGHTxWIDTH")
    return get_shortest_edge_size(3000, 4000, max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN)


def report(cost):
    """Print the tables."""
    header = ["module", "type", "parameters", "trainable", "GFLOPs", "activations", "MB"]
    rows = [
        [
            ("  " * (row["name"].count(".") + 1) + row["name"].rsplit(".", 1)[-1]) if row["name"] else "all",
            row["type"],
            f"{row['parameters']:,}",
            f"{row['trainable']:,}",
            row["flops"] / 1e9,
            f"{row['activations']:,}",
            row["activation_bytes"] / 2**20,
        ]
        for row in cost["modules"]
    ]
    widest = max(len(row[0]) for row in rows)
    print(format_table([[row[0].ljust(widest), *row[1:]] for row in rows], header))
    height, width = cost["size"]
    print(
        f"\nGFLOPs, and activations (what modules give), are of an inference with {cost['batch']} images of "
        f"{height}x{width}. {NOT_COUNTED}"
    )
    steps = [[name.replace("_", " "), value / 1e9] for name, value in cost["flops"].items()]
    print("\n" + format_table(steps, ["run", "GFLOPs"]))
    parts = [[name, value / 2**20] for name, value in cost["memory"].items()]
    print("\n" + format_table(parts, ["memory of a training step", "MB"]))
    print(
        "activations: what the forward pass keeps for the backward pass, in float32. On top comes what "
        "libraries need while they compute."
    )


def main(args):
    """Analyse one model."""
    cfg = read_model_config(args)
    solver, classes = cfg.SOLVER, get_value(cfg, get_num_classes_key(cfg))
    size = args.size or default_size(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "SSD" and size != tuple(cfg.INPUT.FIXED_SIZE):
        raise UserError(
            f"--size is {size}, but SSD takes INPUT.FIXED_SIZE {tuple(cfg.INPUT.FIXED_SIZE)} only"
        )
    batch = args.batch if args.batch is not None else max(1, solver.IMS_PER_BATCH // solver.ACCUMULATE_STEPS)
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
    samples = make_random_samples(size, batch, classes, keypoints)
    has_momentum = solver.MOMENTUM or solver.MOMENTUM_SCHEDULE
    num_states = 2 if solver.OPTIMIZER == "AdamW" else int(bool(has_momentum))
    model = build_model(cfg)
    cost = {"architecture": cfg.MODEL.META_ARCHITECTURE, "size": size, "batch": batch}
    options = {"depth": args.depth, "num_states": num_states, "averaged": cfg.MODEL.EMA.ENABLED}
    cost |= analyze_model(model, samples, **options)
    report(cost)
    if args.json:
        write_json(args.json, cost | {"not_counted": NOT_COUNTED}, indent=1)
        print(f"written to {args.json}")


if __name__ == "__main__":
    launch(main, args=(args,))
