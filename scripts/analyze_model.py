#!/usr/bin/env python
"""Print the parameters, FLOPs, activations and training memory of a detector.

python scripts/analyze_model.py output/quickstart
python scripts/analyze_model.py --config-file configs/quickstart.yaml --depth 3 --batch 1
python scripts/analyze_model.py --config-file configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml \\
    --size 800x1216 --output retinanet.json MODEL.RETINANET.NUM_CLASSES 80

RUN_FOLDER is the OUTPUT_DIR of a run. Weights are not needed; the dataset is needed only if the config does
not set the number of classes or keypoints. Runs an inference and a training step with random images on the
CPU.
"""

from plaintrain.utils.arguments import add_renamed_argument, build_run_parser, parse_run_arguments

if __name__ == "__main__":
    parser = build_run_parser(__doc__)
    parser.add_argument(
        "--size",
        default="",
        metavar="HxW",
        help="image size (default: aspect ratio 3:4, resized as in training)",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="batch size (default: SOLVER.IMS_PER_BATCH)")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to list (default: 2)")
    add_renamed_argument(parser, "--output", "--json", metavar="FILE", help="also write the numbers as JSON")
    args = parse_run_arguments(parser)
    height, cross, width = args.size.partition("x")
    if args.size and not (cross and height.isdigit() and width.isdigit()):
        parser.error(f"--size must be HEIGHTxWIDTH, such as 800x1216, got {args.size!r}")
    args.size = (int(height), int(width)) if args.size else None
    if args.depth < 0 or (args.batch is not None and args.batch < 1):
        parser.error("--depth must be at least 0, and --batch at least 1")

from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F

from plaintrain.analysis.command import load_tool_cfg
from plaintrain.analysis.model import analyze_model
from plaintrain.config import CfgNode, check_cfg, get_value
from plaintrain.data.transforms.geometric import get_shortest_edge_size
from plaintrain.engine.launch import launch
from plaintrain.engine.preflight import resolve_num_classes
from plaintrain.evaluation.evaluator import format_table
from plaintrain.evaluation.predictions import write_json
from plaintrain.modeling import build_model
from plaintrain.modeling.build import get_num_classes_key
from plaintrain.utils.errors import UserError

_OBJECTS_PER_IMAGE = 5
_NOT_COUNTED = (
    "FLOPs include convolutions and matrix products (a multiply-add is 2 FLOPs), not norms, activation "
    "functions, resizing, RoIAlign, NMS, box arithmetic and losses."
)


def read_model_config(args: Namespace) -> CfgNode:
    """Return the frozen config, for the CPU and with the number of classes.

    Datasets are read only if the config does not set the number of classes or keypoints.
    """
    cfg = load_tool_cfg(args)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.COMPILE", False])
    cfg.freeze()
    check_cfg(cfg)
    keypoints = cfg.MODEL.KEYPOINT_ON and not cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if keypoints or not get_value(cfg, get_num_classes_key(cfg)):
        resolve_num_classes(cfg, eval_only=True)
    return cfg


def get_default_size(cfg: CfgNode) -> tuple[int, int]:
    """Return (height, width) of a 3:4 image after the resizing of the training."""
    height, width = cfg.INPUT.FIXED_SIZE
    if min(height, width) > 0:
        return height, width
    if not max(cfg.INPUT.MIN_SIZE_TRAIN):
        raise UserError("INPUT.MIN_SIZE_TRAIN does not resize images; give --size HEIGHTxWIDTH")
    return get_shortest_edge_size(3000, 4000, max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN)


def make_random_samples(
    size: tuple[int, int], batch_size: int, num_classes: int, num_keypoints: int = 0
) -> list[dict[str, Any]]:
    """Return training samples of random pixels, `size` is (height, width), with random objects."""
    height, width = size
    if min(size) < 32:
        raise UserError(f"the image size must be at least 32x32, got {height}x{width}")
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(batch_size):
        start = torch.rand(_OBJECTS_PER_IMAGE, 2, generator=generator) * 0.5
        side = 0.1 + 0.4 * torch.rand(_OBJECTS_PER_IMAGE, 2, generator=generator)
        boxes = torch.cat([start, start + side], dim=1) * torch.tensor([width, height, width, height])
        masks = torch.zeros(_OBJECTS_PER_IMAGE, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        points = F.pad(centres.expand(-1, num_keypoints, -1), (0, 1), value=2.0)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, num_classes, (_OBJECTS_PER_IMAGE,), generator=generator)
        target = {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": points}
        sample = {"image": image, "target": target, "height": height, "width": width}
        samples.append({**sample, "image_id": index, "file_name": f"random {index}"})
    return samples


def print_cost(cost: dict[str, Any]) -> None:
    """Print the tables."""
    header = ["module", "type", "parameters", "trainable", "GFLOPs", "activations", "MB"]
    table = [
        [
            ("  " * (m["name"].count(".") + 1) + m["name"].rsplit(".", 1)[-1]) if m["name"] else "all",
            m["type"],
            f"{m['parameters']:,}",
            f"{m['trainable']:,}",
            m["flops"] / 1e9,
            f"{m['activations']:,}",
            m["activation_bytes"] / 2**20,
        ]
        for m in cost["modules"]
    ]
    width = max(len(name) for name, *_ in table)
    print(format_table([[name.ljust(width), *values] for name, *values in table], header))
    height, width = cost["size"]
    print(
        f"\nGFLOPs and activations (module outputs): inference with {cost['batch']} images of "
        f"{height}x{width}. {_NOT_COUNTED}"
    )
    steps = [[name.replace("_", " "), value / 1e9] for name, value in cost["flops"].items()]
    print("\n" + format_table(steps, ["run", "GFLOPs"]))
    memory = [[name, value / 2**20] for name, value in cost["memory"].items()]
    print("\n" + format_table(memory, ["memory of a training step", "MB"]))
    print("activations: saved for the backward pass, in float32; without the libraries' temporary buffers.")


def main(args: Namespace) -> None:
    """Analyze one model."""
    cfg = read_model_config(args)
    solver = cfg.SOLVER
    num_classes = get_value(cfg, get_num_classes_key(cfg))
    size = args.size or get_default_size(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "SSD" and size != tuple(cfg.INPUT.FIXED_SIZE):
        raise UserError(f"--size must be INPUT.FIXED_SIZE {tuple(cfg.INPUT.FIXED_SIZE)} for SSD, got {size}")
    batch = args.batch if args.batch is not None else max(1, solver.IMS_PER_BATCH // solver.ACCUMULATE_STEPS)
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
    samples = make_random_samples(size, batch, num_classes, num_keypoints)
    has_momentum = solver.MOMENTUM or solver.MOMENTUM_SCHEDULE
    num_states = 2 if solver.OPTIMIZER == "AdamW" else int(bool(has_momentum))
    model = build_model(cfg)
    cost = {"architecture": cfg.MODEL.META_ARCHITECTURE, "size": size, "batch": batch}
    options = {"depth": args.depth, "num_states": num_states, "averaged": cfg.MODEL.EMA.ENABLED}
    cost |= analyze_model(model, samples, **options)
    print_cost(cost)
    if args.output:
        write_json(args.output, cost | {"not_counted": _NOT_COUNTED}, indent=1)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    launch(main, args=(args,))
