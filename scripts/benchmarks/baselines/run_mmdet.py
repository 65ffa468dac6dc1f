"""MMDetection, where it is installed, and MMEngine, whose runner trains its models; its start as a script."""

import os
import tempfile

import torch
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from baselines import parse_start_args

# How the names of the last norms of a block's branch end.
LAST_NORM = "bn3.weight"


class OnBatch(BaseModel):
    """A model that takes a batch, as MMEngine calls one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, data, mode):
        return self.inner(data)


def run_loop(make, batches, folder, period):
    """MMEngine's runner, which MMDetection trains with, and its default hooks without checkpoints."""
    inner, optimizer = make()
    batches.data = {"data": batches.data}
    runner = Runner(
        OnBatch(inner),
        folder,
        train_dataloader=batches,
        train_cfg={"by_epoch": False, "max_iters": batches.number + 1},
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


def make_steps(args, batches):
    """(function that takes MMDetection's training step on each batch, its model)."""
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample

    cfg = _make_cfg()
    cfg.model.train_cfg.rcnn.sampler.num = args.rois
    model = MODELS.build(cfg.model).to(args.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OptimWrapper(torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4))

    def convert(sample):
        size, target = tuple(sample["image"].shape[1:]), sample["target"]
        truth = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
        truth.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"])
        return sample["image"].flip(0), truth

    batches = [[convert(sample) for sample in batch] for batch in batches]

    def steps():
        for pairs in batches:
            images, truths = zip(*pairs, strict=True)
            model.train_step({"inputs": list(images), "data_samples": list(truths)}, optimizer)

    return steps, model


def main():
    """From the command line to the end of the first iteration, of R50-FPN."""
    args = parse_start_args()
    torch.set_num_threads(1)
    cfg = _make_cfg()
    loader = cfg.train_dataloader
    loader.update(batch_size=args.batch, num_workers=0, persistent_workers=False)
    loader.dataset.update(data_root="", ann_file=args.json, data_prefix={"img": args.root + os.sep})
    for transform in loader.dataset.pipeline:
        if transform["type"] == "Resize":
            transform["scale"] = (1333, args.size)
    for part in ("val", "test"):
        for name in ("cfg", "dataloader", "evaluator"):
            cfg[f"{part}_{name}"] = None
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = tempfile.mkdtemp()
    Runner.from_cfg(cfg).train()


if __name__ == "__main__":
    main()
