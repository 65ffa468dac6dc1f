"""plaintrain.evaluation.lvis_evaluation and data.datasets.lvis; checked against the lvis package by hand."""

import json

import pytest
import torch

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog
from plaintrain.data.datasets import register_lvis_instances
from plaintrain.evaluation import LVISEvaluator, build_evaluator

BOX = [10, 10, 40, 40]
# Category id -> its frequency; label is the order of the ids.
CATEGORIES = {3: "f", 5: "c", 8: "r", 9: "r"}


@pytest.mark.parametrize(
    ("wrong", "negative", "not_exhaustive", "expected"),
    [
        # A false positive with a higher score than the object counts if the category was verified,
        (3, [], [], {"AP": 50, "APf": 50}),
        (5, [5], [], {"AP": 100, "APf": 100}),
        # and is ignored if it was not, or if not all of its objects are annotated.
        (5, [], [], {"AP": 100, "APf": 100}),
        (3, [], [3], {"AP": 100, "APf": 100}),
    ],
)
def test_only_verified_categories_count(tmp_path, wrong, negative, not_exhaustive, expected):
    name = tmp_path.name
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": BOX, "area": 1600}
    image = {"id": 7, "height": 100, "width": 100, "coco_url": "http://a/val2017/7.jpg"}
    image |= {"neg_category_ids": negative, "not_exhaustive_category_ids": not_exhaustive}
    categories = [{"id": i, "name": f"c{i}", "frequency": f} for i, f in CATEGORIES.items()]
    content = {"images": [image], "annotations": [annotation], "categories": categories}
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    register_lvis_instances(name, {}, str(tmp_path / "lvis.json"), "coco")
    assert DatasetCatalog.get(name)[0]["file_name"] == "coco/val2017/7.jpg"
    evaluator = build_evaluator(get_cfg(), name)
    assert isinstance(evaluator, LVISEvaluator)
    boxes = torch.tensor([[60.0, 60, 90, 90], [10, 10, 50, 50]])
    labels = torch.tensor([list(CATEGORIES).index(wrong), 0])
    outputs = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": labels}
    evaluator.process([{"image_id": 7}], [outputs])
    metrics = evaluator.evaluate()["bbox"]
    assert {k: round(v, 6) for k, v in metrics.items() if k in expected} == expected
    assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
    # The best detection of the image alone is wrong.
    if wrong == 3 and not not_exhaustive:
        limited = LVISEvaluator(name, max_dets_per_image=1)
        limited.process([{"image_id": 7}], [outputs])
        assert limited.evaluate()["bbox"]["AP"] == 0
