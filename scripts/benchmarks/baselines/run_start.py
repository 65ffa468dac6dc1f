"""Start-up as in Detectron2, written with torch, torchvision and pycocotools; run in its own process.

Imports everything, parses the COCO file into serialized records, builds and logs Faster R-CNN, and trains one
iteration.
"""

import collections
import pickle
from typing import Any

import numpy as np
import pycocotools.cocoeval  # noqa: F401
import pycocotools.mask  # noqa: F401
import tensorboardX  # noqa: F401
import torch
import torchvision  # noqa: F401
import tqdm  # noqa: F401
import yacs.config  # noqa: F401
import yaml  # noqa: F401
from PIL import Image
from pycocotools.coco import COCO
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from baselines import parse_start_args


def read_records(path: str, root: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (serialized records, the end of each, number of classes) of a COCO file."""
    coco = COCO(path)
    labels = {id_: i for i, id_ in enumerate(sorted(coco.getCatIds()))}
    records = []
    for id_ in sorted(coco.imgs):
        image = coco.imgs[id_]
        annotations = []
        for a in coco.imgToAnns[id_]:
            box = {key: a[key] for key in ("iscrowd", "bbox", "segmentation") if key in a}
            annotations.append({**box, "category_id": labels[a["category_id"]]})
        size = {"height": image["height"], "width": image["width"], "image_id": id_}
        records.append({"file_name": f"{root}/{image['file_name']}", **size, "annotations": annotations})
    records = [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]
    print(collections.Counter(a["category_id"] for r in records for a in r["annotations"]))
    serialized = [np.frombuffer(pickle.dumps(record, protocol=-1), dtype=np.uint8) for record in records]
    return np.concatenate(serialized), np.cumsum([len(data) for data in serialized]), len(labels)


def load(record: dict[str, Any], size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return (image, target) for torchvision's model, with the shorter side resized."""
    image = Image.open(record["file_name"]).convert("RGB")
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    boxes = torch.tensor([a["bbox"] for a in annotations]) * scale
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].clamp(min=1)
    labels = torch.tensor([a["category_id"] + 1 for a in annotations])
    pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1).float() / 255
    return pixels, {"boxes": boxes, "labels": labels}


def main() -> None:
    """Train the first iteration."""
    args = parse_start_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{args.depth}", weights=None, trainable_layers=3)
    data, ends, classes = read_records(args.json, args.root)
    model = FasterRCNN(backbone, classes + 1, _skip_resize=True, rpn_post_nms_top_n_train=1000).train()
    print(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=1e-4)
    batch = []
    for i in np.random.default_rng(1).permutation(len(ends))[: args.batch]:
        record = pickle.loads(data[ends[i - 1] if i else 0 : ends[i]].data)  # noqa: S301 - made above
        batch.append(load(record, args.size))
    losses = model(*zip(*batch, strict=True))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    print("iter: 0", {name: loss.item() for name, loss in losses.items()}, flush=True)


if __name__ == "__main__":
    main()
