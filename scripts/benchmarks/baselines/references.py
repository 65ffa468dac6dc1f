"""torchvision's Faster R-CNN in a loop modelled on its detection references."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone


def build_model(args: argparse.Namespace, state: dict[str, Tensor]) -> FasterRCNN:
    """Build the model as fasterrcnn_resnet50_fpn does for ImageNet weights."""
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{args.depth}", weights=None, trainable_layers=3)
    # As in plaintrain: its number of proposals, and no resizing.
    sizes = {"rpn_post_nms_top_n_train": 1000, "box_batch_size_per_image": args.rois}
    model = FasterRCNN(backbone, args.classes + 1, _skip_resize=True, **sizes)
    model.load_state_dict(state)
    return model.to(args.device).train()


def make_inputs(samples: list[dict[str, Any]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return (images, targets) as in torchvision's references."""
    images = [sample["image"].float() / 255 for sample in samples]
    return images, [{**s["target"], "labels": s["target"]["labels"] + 1} for s in samples]


def make_steps(
    args: argparse.Namespace, batches: list[list[dict[str, Any]]], state: dict[str, Tensor]
) -> tuple[Callable[[], None], nn.Module]:
    """Return (function that trains a step on each batch, model)."""
    model = build_model(args, state)
    device = args.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3)
    # Repeated batches share their tensors.
    inputs = {id(samples): make_inputs(samples) for samples in batches}
    pairs = [inputs[id(samples)] for samples in batches]

    def steps():
        for images, targets in pairs:
            images = [image.to(device) for image in images]
            targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
            losses = model(images, targets)
            total = sum(losses.values())
            if not math.isfinite(total.item()):
                raise FloatingPointError(f"the losses are {losses}")
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            scheduler.step()
            for loss in (total, *losses.values()):
                loss.item()

    return steps, model
