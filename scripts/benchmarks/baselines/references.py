"""torchvision's Faster R-CNN in a loop modelled on its detection references."""

import math

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone


def build_model(args, state):
    """Build the model as fasterrcnn_resnet50_fpn does for ImageNet weights."""
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{args.depth}", weights=None, trainable_layers=3)
    # As in plaintrain: its number of proposals, and no resizing.
    sizes = {"rpn_post_nms_top_n_train": 1000, "box_batch_size_per_image": args.rois}
    model = FasterRCNN(backbone, args.classes + 1, _skip_resize=True, **sizes)
    model.load_state_dict(state)
    return model.to(args.device).train()


def make_inputs(samples):
    """Return (images, targets) as in torchvision's references."""
    images = [sample["image"].float() / 255 for sample in samples]
    return images, [{**s["target"], "labels": s["target"]["labels"] + 1} for s in samples]


def make_steps(args, batches, state):
    """Return (function that trains a step on each batch, model)."""
    model = build_model(args, state)
    device = args.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3)
    # Repeated batches share their tensors.
    inputs = {id(samples): make_inputs(samples) for samples in batches}
    batches = [inputs[id(samples)] for samples in batches]

    def steps():
        for images, targets in batches:
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
