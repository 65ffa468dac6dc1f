"""Small datasets in memory, detections in them, and evaluations of those."""

import numpy as np
import torch

from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.evaluation.detections import Detections
from plaintrain.structures import BoxMode


def add_dataset(records, classes=("cat", "dog"), **metadata):
    """Register records as a dataset, and return its name."""
    name = f"detections_{len(DatasetCatalog.list())}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list(classes), **metadata)
    return name


def make_record(image_id, *annotations):
    """A record of an image of 100 x 100 pixels."""
    size = {"height": 100, "width": 100}
    return {"image_id": image_id, "file_name": f"{image_id}.jpg", **size, "annotations": list(annotations)}


def make_annotation(box, label=0, **entries):
    return {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, **entries}


def make_output(*rows):
    """A model's output from rows (box, score, label)."""
    return {
        "boxes": torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([row[1] for row in rows], dtype=torch.float32),
        "labels": torch.tensor([row[2] for row in rows], dtype=torch.int64),
    }


def make_mask(x0, y0, x1, y1, size, rng):
    """An ellipse with random holes that fills a box."""
    y, x = np.mgrid[: size[0], : size[1]]
    ellipse = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return ellipse & (rng.random(size) < 0.9)


def random_outputs(name, seed=1):
    """{image_id: output} for a dataset: objects moved, mislabelled and repeated, some of one score.

    There are none in the first image.
    """
    rng, outputs = np.random.default_rng(seed), {}
    num_keypoints = len(DatasetCatalog.get(name)[0]["annotations"][0]["keypoints"]) // 3
    for place, record in enumerate(DatasetCatalog.get(name)):
        size = record["height"], record["width"]
        rows, masks, keypoints = [], [], []
        for a in [a for a in record["annotations"] for _ in range(rng.integers(0, 4) if place else 0)]:
            box = np.array(BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS))
            sides = box[2:] - box[:2]
            box = box + rng.normal(0, 0.06, 4) * np.tile(sides, 2)
            label = a["category_id"] if rng.random() < 0.8 else int(rng.integers(3))
            rows.append((box.tolist(), round(float(rng.random()), 1), label))
            masks.append(make_mask(*box[:2], *np.maximum(box[2:], box[:2] + 1), size, rng))
            points = np.array(a["keypoints"], dtype=float).reshape(-1, 3)
            points[:, :2] += rng.normal(0, 0.03, (len(points), 2)) * sides
            points[:, 2] = rng.random(len(points))
            keypoints.append(points)
        outputs[record["image_id"]] = {
            **make_output(*rows),
            "masks": torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *size)),
            "keypoints": torch.tensor(np.array(keypoints)).float().reshape(-1, num_keypoints, 3),
        }
    return outputs


def evaluate(evaluator, outputs):
    """The results of {image_id: output}."""
    evaluator.reset()
    for image_id, output in outputs.items():
        evaluator.process([{"image_id": image_id}], [output])
    return evaluator.evaluate()


def random_dataset(seed=0, images=30, classes=4, boxes=12):
    """Register records with crowds, and `Detections` for them; (name, records, detections)."""
    rng = np.random.default_rng(seed)
    records, rows = [], []
    for i in range(images):
        number = rng.integers(0, 6) if i else 0
        objects = np.concatenate([rng.integers(0, 60, (number, 2)), rng.integers(4, 50, (number, 2))], 1)
        labels, crowd = rng.integers(classes, size=number), rng.random(number) < 0.1
        annotations = [
            {"bbox": b.tolist(), "bbox_mode": BoxMode.XYWH_ABS, "category_id": int(k), "iscrowd": int(c)}
            for b, k, c in zip(objects, labels, crowd, strict=True)
        ]
        image_id = int(1000 - 7 * i)
        size = {"height": 120, "width": 120}
        name = f"{i}.jpg"
        records.append({"image_id": image_id, "file_name": name, **size, "annotations": annotations})
        near = objects[rng.integers(number, size=boxes)] if number else rng.integers(1, 60, (boxes, 4))
        label = labels[rng.integers(number, size=boxes)] if number else np.zeros(boxes)
        near = near + rng.integers(-4, 5, (boxes, 4)) * (rng.random((boxes, 1)) < 0.8)
        near[:, 2:] = near[:, :2] + np.maximum(near[:, 2:], 1)
        label = np.where(rng.random(boxes) < 0.7, label, rng.integers(classes, size=boxes))
        # Few different scores: ties are as COCO breaks them.
        scores = rng.integers(1, 20, boxes) / 20
        rows.append(np.concatenate([np.full((boxes, 1), i), near, scores[:, None], label[:, None]], 1))
    name = f"errors_{seed}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=[f"c{i}" for i in range(classes)], evaluator_type="coco")
    return name, records, Detections(np.concatenate(rows), np.arange(images))
