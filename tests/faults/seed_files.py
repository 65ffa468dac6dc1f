"""A small good dataset of each format, and a config: the files that the fuzzer breaks."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.data.loader import TrainLoader
from plaintrain.data.samplers import TrainingSampler
from plaintrain.engine.early_stopping import EarlyStopping
from plaintrain.engine.nonfinite import NonfiniteGuard
from plaintrain.solver import build_lr_scheduler, build_optimizer
from plaintrain.solver.ema import ModelEMA
from plaintrain.utils.storage import EventStorage

_COCO = {
    "images": [
        {"id": i, "file_name": f"{name}.png", "width": 40, "height": 30}
        for i, name in ((11, "a"), (2, "b"), (5, "c"))
    ],
    "annotations": [
        {"id": 1, "image_id": 11, "category_id": 7, "bbox": [4, 5, 10.5, 8], "area": 84.0, "iscrowd": 0},
        {"id": 2, "image_id": 11, "category_id": 3, "bbox": [20, 10, 15, 15]},
        {"id": 3, "image_id": 2, "category_id": 3, "bbox": [0, 0, 30, 20], "iscrowd": 1},
        {"id": 4, "image_id": 2, "category_id": 3, "bbox": [3, 4, 20, 20]},
    ],
    "categories": [
        {"id": 7, "name": "dog"},
        {"id": 3, "name": "person", "keypoints": ["head", "foot"], "skeleton": [[1, 2]]},
    ],
}
_MASK = np.zeros((30, 40), dtype=np.uint8, order="F")
_MASK[10:25, 20:35] = 1
_COCO["annotations"][0]["segmentation"] = [[4, 5, 14, 5, 14, 13, 4, 13]]
_COCO["annotations"][1]["segmentation"] = {
    "size": [30, 40],
    "counts": coco_mask.encode(_MASK)["counts"].decode(),
}
_COCO["annotations"][2]["segmentation"] = {"size": [30, 40], "counts": [0, 600, 600]}
_COCO["annotations"][3] |= {"segmentation": [[3, 4, 23, 4, 9, 24]], "keypoints": [5, 6, 2, 20, 20, 1]}
_RESULTS = [
    {"image_id": 11, "category_id": 7, "bbox": [4, 5, 10.5, 8], "score": 0.5},
    {"image_id": 2, "category_id": 3, "bbox": [0, 0, 10, 8.5], "score": 1},
    {"image_id": 2, "category_id": 3, "score": 0.25},
]
for _result in _RESULTS:
    _result["segmentation"] = {"size": [30, 40], "counts": [100, 300, 800]}
_OBJECT = (
    "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>20</xmax>"
    "<ymax>21</ymax></bndbox></object>"
)
_VOC = (
    '<?xml version="1.0"?>\n<annotation><size><width>40</width><height>30</height><depth>3</depth></size>'
    f"{_OBJECT.format('ant', 1)}{_OBJECT.format('bee', 4.5)}</annotation>"
)
_CONFIG = """\
_BASE_: base.yaml
MODEL: {META_ARCHITECTURE: RetinaNet, MASK_ON: false, PIXEL_MEAN: [103.5, 116.3, 123.7], EMA: {DECAY: 0.9}}
DATASETS:
  DECLARE:
    cells: {FORMAT: coco, JSON: a.json, IMAGE_ROOT: images, CLASSES: [red, white], FRACTION: 0.5}
    marks: {FORMAT: shapes, SPLIT: train, NUM: 8, SEED: 3}
  TRAIN: ("cells",)
INPUT:
  MIN_SIZE_TRAIN: (640, 800)
SOLVER: &solver
  BASE_LR: 1e-3
  STEPS: [100, 200]
"""
_OVERRIDES = ["SOLVER.BASE_LR", "0.01", "INPUT.MIN_SIZE_TRAIN", "(600, 800)", "MODEL.DEVICE", "cpu"]


def _png(seed=0, kind="png"):
    image = Image.effect_noise((40, 30), 50 + seed).convert("RGB")
    exif = Image.Exif()
    exif[274] = 1 + seed % 8
    data = io.BytesIO()
    image.save(data, kind, **({"exif": exif} if kind in ("png", "jpeg", "webp", "tiff") else {}))
    return data.getvalue()


_RUN_CONFIG = b"""\
DATASETS:
  DECLARE: {fuzzed_val: {FORMAT: shapes, SPLIT: val, NUM: 3, HEIGHT: 32, WIDTH: 32}}
  TEST: [fuzzed_val]
INPUT: {PIXEL_RANGE: [0, 255]}
SOLVER: {MAX_ITER: 9, IMS_PER_BATCH: 2}
TEST: {KEYPOINT_OKS_SIGMAS: [0.1]}
"""
_METRICS = {"iteration": 3, "total_loss": 2.5, "lr": 0.1, "time": 0.5, "data_time": None, "max_mem": 3}
_START = {"command": ["python", "a.py"], "world_size": 1, "environment": {"torch": "2"}, "config_file": ""}
_START |= {"git": {"commit": "a", "branch": "b", "changed_files": ["c"]}, "changes": [["SEED", -1, 3]]}
_SCORES = {"fuzzed_val": {"bbox": {"AP": 20.5, "AP50": None, "AP-circle": 1, "AP-square": 2}}}


def _run_files():
    """Return the files of a run folder."""
    scored = "inference/fuzzed_val"
    detections = [{"image_id": 1, "category_id": 1, "bbox": [4, 5, 9.5, 8], "score": 0.5}]
    return {
        "config.yaml": _RUN_CONFIG,
        "metrics.json": json.dumps(_METRICS).encode() + b"\n",
        "csv/metrics.csv": b"iteration,total_loss,lr\n1,2.5,0.1\n3,,0.1\n",
        "run.json": json.dumps({"starts": [_START, _START]}).encode(),
        "log.txt": b"[11/27 05:46:56 plaintrain.data] WARNING: 3 boxes\nand so on\n",
        "last_checkpoint": b"model_final.pth",
        f"{scored}/results.json": json.dumps(_SCORES).encode(),
        f"{scored}/coco_instances_results.json": json.dumps(detections).encode(),
    }


def build_run(optimizer="AdamW"):
    """(model, what a checkpoint holds beside it, function that trains one step) of a tiny run."""
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.OPTIMIZER", optimizer])
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer, scaler = build_optimizer(cfg, model), torch.amp.GradScaler("cpu", init_scale=64.0)
    states = {"optimizer": optimizer, "scheduler": build_lr_scheduler(cfg, optimizer), "scaler": scaler}
    states |= {"ema": ModelEMA(model), "early_stopping": EarlyStopping("AP"), "storage": EventStorage()}
    states["nonfinite"] = NonfiniteGuard(model, None, None)
    states["data_loader"] = TrainLoader([], lambda record, rng: record, TrainingSampler(10, 2))

    def step(iteration):
        loss = model(torch.randn(5, 3)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        states["scheduler"].step()
        states["ema"].update(model)
        states["storage"].put_scalars(loss=loss.detach())
        states["storage"].latest_with_smoothing_hint()
        states["early_stopping"].update(iteration, {"bbox/AP": 1.0})

    return model, states, step


def _files():
    coco = {f"images/{name}.png": _png(i) for i, name in enumerate("abc")}
    coco["a.json"] = json.dumps(_COCO).encode()
    voc = {f"JPEGImages/{name}.jpg": _png(i, "jpeg") for i, name in enumerate("ab")}
    voc |= {f"Annotations/{name}.xml": _VOC.encode() for name in "ab"}
    voc["ImageSets/Main/train.txt"] = b"a\nb  1\n"
    yolo = {f"images/train/{name}.png": _png(i) for i, name in enumerate("ab")}
    yolo["labels/train/a.txt"] = b"1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.5 0.2 0.5 0.8\n"
    yolo["list.txt"] = b"images/train/a.png\nimages/train/b.png\n"
    yolo["data.yaml"] = b"path: .\ntrain: [images/train]\nval: list.txt\nnc: 2\nnames: {0: ant, 1: bee}\n"
    config = {"config.yaml": _CONFIG.encode(), "overrides": "\n".join(_OVERRIDES).encode()}
    config["base.yaml"] = b"SOLVER:\n  MAX_ITER: 10\n"
    images = {f"a.{kind}": _png(3, kind) for kind in ("jpeg", "png", "webp", "tiff", "bmp", "gif")}
    results = {**coco, "results.json": json.dumps(_RESULTS).encode()}
    model, states, step = build_run()
    step(0)
    with tempfile.TemporaryDirectory() as folder:
        metadata = {"config": "MODEL: {A: 1}", "class_names": ["a", "b"]}
        DetectionCheckpointer(model, folder, metadata=metadata, **states).save("model_0000001", iteration=1)
        checkpoint = {"model_0000001.pth": Path(folder, "model_0000001.pth").read_bytes()}
    return {
        "checkpoint": checkpoint,
        "config": config,
        "coco": coco,
        "results": results,
        "voc": voc,
        "yolo": yolo,
        "image": images,
        "report": _run_files(),
    }


# Reader -> {name of the file: bytes}.
FILES = _files()
