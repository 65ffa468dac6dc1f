"""Detectron2's model, storage and writers; as a script, its start-up."""

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.data import build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_setup
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm, events
from torch import nn

from baselines import parse_start_args

# Suffix of the last norm of each residual block.
LAST_NORM = "conv3.norm.weight"


def run_loop(
    make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]], batches: Any, folder: str, period: int
) -> None:
    """Run the loop of Detectron2's plain_train_net.py with its storage and writers."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)
    writers = [
        events.CommonMetricPrinter(batches.num_iters + 1),
        events.JSONWriter(os.path.join(folder, "metrics.json")),
        events.TensorboardXWriter(folder),
    ]
    with events.EventStorage(0) as storage:
        for iteration, data in enumerate(batches, start=1):
            storage.step()
            loss_dict = model(data)
            losses = sum(loss_dict.values())
            assert torch.isfinite(losses).all()
            values = {name: loss.item() for name, loss in comm.reduce_dict(loss_dict).items()}
            storage.put_scalars(total_loss=sum(values.values()), **values)
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()
            if iteration % period == 0:
                for writer in writers:
                    writer.write()


def _make_cfg(device, depth):
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", device, "MODEL.RESNETS.DEPTH", depth, "MODEL.WEIGHTS", ""])
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    # Without trained weights, normalized pixels keep the losses finite.
    cfg.merge_from_list(["MODEL.PIXEL_STD", [57.375, 57.12, 58.395], "SOLVER.BASE_LR", 0.0])
    return cfg


def make_steps(
    args: argparse.Namespace, batches: list[list[dict[str, Any]]]
) -> tuple[Callable[[], None], nn.Module]:
    """Return (function that trains a step on each batch, model)."""
    cfg = _make_cfg(args.device, args.depth)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = args.rois
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)

    def convert(sample):
        instances = Instances(sample["image"].shape[1:])
        instances.gt_boxes = Boxes(sample["target"]["boxes"])
        instances.gt_classes = sample["target"]["labels"]
        return {"image": sample["image"].flip(0), "instances": instances}

    converted = [[convert(sample) for sample in batch] for batch in batches]

    def steps():
        for inputs in converted:
            losses = model(inputs)
            total = sum(losses.values())
            assert torch.isfinite(total).all()
            for loss in losses.values():
                loss.item()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

    return steps, model


def main() -> None:
    """Train the first iteration."""
    args = parse_start_args()
    torch.set_num_threads(1)
    register_coco_instances("benchmark", {}, args.json, args.root)
    cfg = _make_cfg("cpu", args.depth)
    cfg.merge_from_list(["DATASETS.TRAIN", ("benchmark",), "DATASETS.TEST", (), "SEED", 1])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", args.batch])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (args.size,), "OUTPUT_DIR", tempfile.mkdtemp()])
    default_setup(cfg, args)
    model = build_model(cfg).train()
    print(model)
    optimizer = build_optimizer(cfg, model)
    losses = model(next(iter(build_detection_train_loader(cfg))))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    print("iter: 0", {name: loss.item() for name, loss in losses.items()}, flush=True)


if __name__ == "__main__":
    main()
