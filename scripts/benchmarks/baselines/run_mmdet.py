"""MMDetection's training step and MMEngine's runner; as a script, their start-up."""

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from baselines import parse_start_args

# Suffix of the last norm of each residual block.
LAST_NORM = "bn3.weight"


class OnBatch(BaseModel):
    """Model with the interface of MMEngine."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, data: Any, mode: str) -> Any:
        return self.inner(data)


def run_loop(
    make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]], batches: Any, folder: str, period: int
) -> None:
    """Run MMEngine's runner with its default hooks, without checkpoints."""
    inner, optimizer = make()
    batches.data = {"data": batches.data}
    runner = Runner(
        OnBatch(inner),
        folder,
        train_dataloader=batches,
        train_cfg={"by_epoch": False, "max_iters": batches.num_iters + 1},
        optim_wrapper=OptimWrapper(optimizer),
        default_hooks={"logger": {"type": "LoggerHook", "interval": period}, "checkpoint": None},
        experiment_name=folder.replace(os.sep, "-"),
    )
    runner.train()


def _make_cfg():
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = get_config("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py")
    cfg.model.backbone.init_cfg = None
    return cfg


def make_steps(
    args: argparse.Namespace, batches: list[list[dict[str, Any]]]
) -> tuple[Callable[[], None], nn.Module]:
    """Return (function that trains a step on each batch, model)."""
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample

    cfg = _make_cfg()
    cfg.model.train_cfg.rcnn.sampler.num = args.rois
    model = MODELS.build(cfg.model).to(args.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OptimWrapper(torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4))

    def convert(sample):
        size = tuple(sample["image"].shape[1:])
        target = sample["target"]
        data_sample = DetDataSample(
            metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        )
        data_sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"])
        return sample["image"].flip(0), data_sample

    converted = [[convert(sample) for sample in batch] for batch in batches]

    def steps():
        for pairs in converted:
            images, data_samples = zip(*pairs, strict=True)
            model.train_step({"inputs": list(images), "data_samples": list(data_samples)}, optimizer)

    return steps, model


def main() -> None:
    """Train the first iteration of R50-FPN."""
    args = parse_start_args()
    torch.set_num_threads(1)
    cfg = _make_cfg()
    loader = cfg.train_dataloader
    loader.update(batch_size=args.batch, num_workers=0, persistent_workers=False)
    loader.dataset.update(data_root="", ann_file=args.json, data_prefix={"img": args.root + os.sep})
    for transform in loader.dataset.pipeline:
        if transform["type"] == "Resize":
            transform["scale"] = (1333, args.size)
    for split in ("val", "test"):
        for name in ("cfg", "dataloader", "evaluator"):
            cfg[f"{split}_{name}"] = None
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = tempfile.mkdtemp()
    Runner.from_cfg(cfg).train()


if __name__ == "__main__":
    main()
