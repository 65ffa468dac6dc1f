"""A run's folder as a training leaves it, made in a moment: images are drawn, detections near objects."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from plaintrain.config import get_cfg
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.data.datasets.write import get_category_ids
from plaintrain.data.images import read_image
from plaintrain.data.serialized import SerializedRecords
from plaintrain.report.build import build_report
from plaintrain.structures import BoxMode

# What must never be taken for HTML.
EVIL = "<script>alert(1)</script>\"'&"

LOG = """\
[11/27 05:46:56 plaintrain.engine] INFO: rank 0 of 2
python: 3.12.1
GPUs: none
[11/27 05:46:56 plaintrain.engine] INFO: command line: scripts/plain_train_net.py OUTPUT_DIR here
[11/27 05:46:57 plaintrain.data] WARNING: 3 boxes are odd
and so on
[11/27 05:46:58 plaintrain.data] WARNING: 12 boxes are odd
and so on
[11/27 05:46:59 plaintrain] INFO: a line
"""


def make_run(folder, *, iterations=100, offset=0.0, seed=0, **keys):
    """Write a finished run of 2 x `iterations` into a folder, and return that; every other one is logged.

    `offset` is added to the scores; `seed` is of the detections; `keys` are of the config, `A__B` for A.B.
    """
    folder.mkdir(parents=True)
    cfg = get_cfg()
    few = {"FORMAT": "shapes", "HEIGHT": 64, "WIDTH": 64}
    declared = {f"report_{s}": {**few, "SPLIT": s, "NUM": n} for s, n in (("train", 6), ("val", 12))}
    datasets = {"DECLARE": declared, "TRAIN": ("report_train",), "TEST": ("report_val",)}
    cfg.merge_from_other_cfg({"DATASETS": datasets, "OUTPUT_DIR": str(folder)})
    cfg.merge_from_list(["SOLVER.MAX_ITER", 2 * iterations])
    cfg.merge_from_list([part for k, v in keys.items() for part in (k.replace("__", "."), v)])
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "log.txt").write_text(LOG)
    (folder / "log.txt.rank1").write_text(LOG.splitlines()[4] + "\n")
    (folder / "last_checkpoint").write_text("model_final.pth")
    lines = [_line(2 * i + 1, i == iterations - 1, offset) for i in range(iterations)]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    declare_datasets(cfg)
    predictions = folder / "inference" / "report_val" / "coco_instances_results.json"
    predictions.parent.mkdir(parents=True)
    predictions.write_text(json.dumps(detections("report_val", seed)))
    scores = {n.split("/", 2)[2]: v for n, v in lines[-1].items() if n.startswith("report_val/bbox/")}
    (predictions.parent / "results.json").write_text(json.dumps({"report_val": {"bbox": scores}}))
    return folder


def _line(iteration, last, offset):
    losses = {"loss_cls": 10 / (iteration + 1), "loss_box_reg": 1.0, "total_loss": 1 + 10 / (iteration + 1)}
    line = {"iteration": iteration, "lr": 0.1, "time": 0.5, "data_time": 0.01, **losses}
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP-circle", "AP-square", "AP-triangle")
    if last or iteration == 9:
        line |= {f"report_val/bbox/{n}": iteration / 10 + i + offset for i, n in enumerate(names)}
        line["report_val/bbox/APl"] = None
    return line


def detections(dataset_name, seed=0):
    """Detections of a dataset in COCO's results format: near an object each, some of a wrong class."""
    rng, found = np.random.default_rng(seed), []
    records = DatasetCatalog.get(dataset_name)
    ids = get_category_ids(MetadataCatalog.get(dataset_name))
    for record in records:
        for a in record["annotations"]:
            box = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS)
            box = (np.array(box) + rng.normal(0, 2.0, 4)).clip(1).tolist()
            label = a["category_id"] if rng.random() < 0.8 else rng.integers(len(ids))
            detection = {"image_id": record["image_id"], "category_id": ids[int(label)], "bbox": box}
            found.append({**detection, "score": float(rng.uniform(0.3, 1))})
    return found


@functools.cache
def full_report():
    """The file of a report with all its sections, made once; all names in it hold `EVIL`."""
    root = Path(tempfile.mkdtemp())
    folder = make_run(root / "run", OUTPUT_DIR=EVIL)
    start = {"command": ["python", f"a {EVIL}"], "started": "2026-11-27T07:30:00+00:00", "world_size": 2}
    start |= {"config_file": "my.yaml", "changes": [["SOLVER.BASE_LR", 1, EVIL]]}
    start |= {"environment": {"torch": "9.9"}}
    start |= {"git": {"commit": "abc", "branch": EVIL, "changed_files": [EVIL]}}
    (folder / "run.json").write_text(json.dumps({"starts": [start, start]}))
    with (folder / "log.txt").open("a") as f:
        f.write(f"[11/27 05:47:00 plaintrain] WARNING: {EVIL}\n")
    with (folder / "metrics.json").open("a") as f:
        f.write(json.dumps({"iteration": 100, EVIL: 3.0, f"report_val/bbox/AP-{EVIL}": 1.0}) + "\n")
    MetadataCatalog.get("report_val").thing_classes = [f"{EVIL}{i}" for i in range(3)]
    records = list(DatasetCatalog.get("report_val"))
    for record in records:
        path = root / f"{record['image_id']}<script>.png"
        Image.fromarray(read_image(record["file_name"]).permute(1, 2, 0).numpy()).save(path)
        record["file_name"] = str(path)
    DatasetCatalog._loaded["report_val"] = SerializedRecords(records)
    build_report([str(folder)], str(root / "report.html"))
    return root / "report.html"
