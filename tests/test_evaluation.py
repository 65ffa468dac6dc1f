"""Evaluators and the loop that feeds them: plaintrain.evaluation."""

import contextlib
import io
import json
import math
import os

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from plaintrain.data import DatasetCatalog, MetadataCatalog, register_coco_instances
from plaintrain.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    flatten_results,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from plaintrain.evaluation.voc import voc_ap
from plaintrain.structures import BoxMode
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

torch.set_num_threads(1)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


# ---- helpers -----------------------------------------------------------------------------------


@pytest.fixture
def register():
    """Function (records, classes, **metadata) that registers a dataset and returns its name."""

    def add(records, classes=("cat", "dog"), **metadata):
        name = f"evaluation_test_{len(DatasetCatalog.list())}"
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=list(classes), **metadata)
        return name

    return add


def truth(box, label=0, mode=BoxMode.XYXY_ABS, **more):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": label, **more}


def image(image_id, *annotations):
    return {
        "file_name": f"{image_id}.jpg",
        "image_id": image_id,
        "height": 100,
        "width": 100,
        "annotations": list(annotations),
    }


def found(*rows):
    """A model's output from rows (box, score, label)."""
    return {
        "boxes": torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([row[1] for row in rows], dtype=torch.float32),
        "labels": torch.tensor([row[2] for row in rows], dtype=torch.int64),
    }


def evaluate(evaluator, outputs):
    """The box metrics of {image_id: output}."""
    evaluator.reset()
    for image_id, output in outputs.items():
        evaluator.process([{"image_id": image_id}], [output])
    return evaluator.evaluate()["bbox"]


def quiet(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


# ---- COCO: against pycocotools on real annotations ---------------------------------------------


@pytest.fixture
def coco_val(data_root):
    """(name of the registered real COCO subset, path of its JSON)."""
    json_file = os.path.join(data_root, "coco/annotations/instances_val2017.json")
    register_coco_instances("evaluation_coco_val", {}, json_file, os.path.join(data_root, "coco/val2017"))
    DatasetCatalog.get("evaluation_coco_val")
    return "evaluation_coco_val", json_file


def made_up_detections(name, shift, seed=0):
    """{image_id: output}: moved, mislabelled, doubled, spurious and missing boxes, scores with ties."""
    rng = np.random.default_rng(seed)
    num_classes = len(MetadataCatalog.get(name).thing_classes)
    outputs = {}
    for record in DatasetCatalog.get(name):
        rows = []
        for a in record["annotations"]:
            x, y, w, h = a["bbox"]
            for _ in range(rng.integers(0, 3)):
                dx, dy = rng.uniform(-shift, shift, 2) * (w, h)
                label = a["category_id"] if rng.random() < 0.8 else int(rng.integers(num_classes))
                box = [x + dx, y + dy, x + w + dx, y + h + dy]
                rows.append((box, round(float(rng.random()), 1), label))
        for _ in range(rng.integers(0, 20)):
            x, y, w, h = rng.uniform(1, 200, 4)
            rows.append(([x, y, x + w, y + h], float(rng.random()), int(rng.integers(num_classes))))
        outputs[record["image_id"]] = found(*rows)
    return outputs


def run_pycocotools(json_file, name, outputs):
    """(12 numbers, {category id: AP}) of pycocotools on the original file, ids as they are there."""
    truths = quiet(COCO, json_file)
    ids = {label: i for i, label in MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id.items()}
    results = []
    for image_id, output in outputs.items():
        rows = zip(*(output[key].tolist() for key in ("boxes", "scores", "labels")), strict=True)
        for (x0, y0, x1, y1), score, label in rows:
            box = [x0, y0, x1 - x0, y1 - y0]
            results.append({"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score})
    evaluation = COCOeval(truths, quiet(truths.loadRes, results), "bbox")
    evaluation.params.imgIds = sorted(outputs)
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        quiet(step)
    per_class = {}
    for k, category in enumerate(evaluation.params.catIds):
        values = evaluation.eval["precision"][:, :, k, 0, -1]
        per_class[category] = 100 * values[values > -1].mean() if (values > -1).any() else math.nan
    return [100 * value if value > -1 else math.nan for value in evaluation.stats], per_class


@pytest.mark.parametrize("shift", [0.05, 0.3])
def test_coco_numbers_are_those_of_pycocotools(coco_val, shift):
    name, json_file = coco_val
    outputs = made_up_detections(name, shift)
    expected, per_class = run_pycocotools(json_file, name, outputs)
    # In another order than the dataset's, several images at a time.
    evaluator = COCOEvaluator(name)
    ids = list(outputs)[::-1]
    for i in range(0, len(ids), 3):
        evaluator.process([{"image_id": j} for j in ids[i : i + 3]], [outputs[j] for j in ids[i : i + 3]])
    metrics = evaluator.evaluate()["bbox"]
    assert [metrics[metric] for metric in METRICS] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert 5 < metrics["AP"] < 95
    categories = {c["id"]: c["name"] for c in quiet(COCO, json_file).loadCats(list(per_class))}
    assert {key for key in metrics if key.startswith("AP-")} == {f"AP-{c}" for c in categories.values()}
    for category, value in per_class.items():
        assert metrics[f"AP-{categories[category]}"] == pytest.approx(value, abs=1e-9, nan_ok=True)


def test_coco_numbers_of_a_part_of_the_images_are_those_of_pycocotools(coco_val):
    name, json_file = coco_val
    outputs = dict(list(made_up_detections(name, 0.2, seed=1).items())[::2])
    expected, _ = run_pycocotools(json_file, name, outputs)
    metrics = evaluate(COCOEvaluator(name), outputs)
    assert [metrics[metric] for metric in METRICS] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_perfect_boxes_on_real_images_score_100(coco_val):
    name, _ = coco_val
    outputs = {}
    for record in DatasetCatalog.get(name):
        rows = []
        for a in record["annotations"]:
            x, y, w, h = a["bbox"]
            rows += [] if a["iscrowd"] else [([x, y, x + w, y + h], 0.9, a["category_id"])]
        outputs[record["image_id"]] = found(*rows)
    metrics = evaluate(COCOEvaluator(name), outputs)
    assert [metrics[key] for key in ("AP", "AP50", "AP75")] == pytest.approx([100.0] * 3)


def test_results_file_holds_the_datasets_own_ids_and_scores_the_same(coco_val, tmp_path):
    name, json_file = coco_val
    outputs = made_up_detections(name, 0.1)
    metrics = evaluate(COCOEvaluator(name, output_dir=str(tmp_path / "new" / "folder")), outputs)
    path = tmp_path / "new" / "folder" / "coco_instances_results.json"
    results = json.loads(path.read_text())
    assert sum(len(output["scores"]) for output in outputs.values()) == len(results)
    truths = quiet(COCO, json_file)
    assert {result["category_id"] for result in results} <= set(truths.getCatIds())
    assert {result["image_id"] for result in results} <= set(truths.getImgIds())
    evaluation = COCOeval(truths, quiet(truths.loadRes, str(path)), "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        quiet(step)
    assert 100 * evaluation.stats[0] == pytest.approx(metrics["AP"], abs=1e-9)


# ---- COCO: small cases -------------------------------------------------------------------------


def test_without_any_detection_the_score_is_0(register):
    name = register([image(1, truth([0, 0, 10, 10])), image(2)])
    metrics = evaluate(COCOEvaluator(name), {1: found(), 2: found()})
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == metrics["AP-cat"] == 0.0
    # There is no dog, and nothing large.
    assert math.isnan(metrics["AP-dog"]) and math.isnan(metrics["APl"])


def test_without_any_ground_truth_the_score_is_nan(register):
    metrics = evaluate(COCOEvaluator(register([image(1)])), {1: found(([0, 0, 5, 5], 0.9, 0))})
    assert math.isnan(metrics["AP"]) and math.isnan(metrics["AP-cat"])


def test_image_ids_may_be_strings(register, tmp_path):
    boxes = {"b": [0, 0, 10, 10], "a": [5, 5, 50, 60], "c": [1, 1, 30, 30]}
    name = register([image(key, truth(box)) for key, box in boxes.items()])
    outputs = {key: found((boxes[key], 0.9, 0)) for key in ("a", "b", "c")}
    assert evaluate(COCOEvaluator(name, output_dir=str(tmp_path)), outputs)["AP"] == pytest.approx(100.0)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {result["image_id"]: result["bbox"][2:] for result in results} == {
        "b": [10, 10],
        "a": [45, 55],
        "c": [29, 29],
    }
    swapped = {"a": outputs["b"], "b": outputs["a"], "c": outputs["c"]}
    assert evaluate(COCOEvaluator(name), swapped)["AP"] < 50


def test_both_modes_of_boxes_are_understood(register):
    boxes = [truth([10, 20, 40, 60]), truth([50, 10, 30, 20], 1, BoxMode.XYWH_ABS)]
    name = register([image(1, *boxes)])
    output = found(([10, 20, 40, 60], 0.9, 0), ([50, 10, 80, 30], 0.8, 1))
    assert evaluate(COCOEvaluator(name), {1: output})["AP"] == pytest.approx(100.0)


def test_crowds_are_ignored(register):
    crowd = truth([50, 50, 100, 100], iscrowd=1)
    name = register([image(1, truth([0, 0, 20, 20], iscrowd=0), crowd)])
    hit = ([0, 0, 20, 20], 0.5, 0)
    inside = [([50 + i, 50, 80 + i, 90], 0.9, 0) for i in (0, 10, 20)]
    assert evaluate(COCOEvaluator(name), {1: found(*inside, hit)})["AP"] == pytest.approx(100.0)
    outside = ([20, 50, 45, 80], 0.9, 0)
    assert evaluate(COCOEvaluator(name), {1: found(outside, hit)})["AP"] == pytest.approx(50.0)


def test_an_annotations_own_area_decides_its_size(register):
    # 60 x 60 is medium (32^2 to 96^2); its mask is small.
    name = register([image(1, truth([0, 0, 60, 60], area=500.0))])
    metrics = evaluate(COCOEvaluator(name), {1: found(([0, 0, 60, 60], 0.9, 0))})
    assert metrics["APs"] == pytest.approx(100.0) and math.isnan(metrics["APm"])
    name = register([image(1, truth([0, 0, 60, 60]))])
    metrics = evaluate(COCOEvaluator(name), {1: found(([0, 0, 60, 60], 0.9, 0))})
    assert metrics["APm"] == pytest.approx(100.0) and math.isnan(metrics["APs"])


def test_category_ids_of_the_dataset_are_used_and_classes_keep_their_labels(register, tmp_path):
    records = [image(1, truth([0, 0, 20, 20], 0), truth([40, 40, 90, 90], 1))]
    name = register(records, ["zebra", "ant"], thing_dataset_id_to_contiguous_id={17: 0, 3: 1})
    output = found(([0, 0, 20, 20], 0.9, 0), ([40, 40, 90, 60], 0.8, 1))
    metrics = evaluate(COCOEvaluator(name, output_dir=str(tmp_path)), {1: output})
    # The ant's IoU is 0.4.
    assert metrics["AP-zebra"] == pytest.approx(100.0)
    assert metrics["AP-ant"] == 0.0
    assert metrics["AP"] == pytest.approx(50.0)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [result["category_id"] for result in results] == [17, 3]


def test_only_images_that_were_seen_are_scored(register):
    name = register([image(1, truth([0, 0, 20, 20])), image(2, truth([0, 0, 20, 20]))])
    evaluator = COCOEvaluator(name)
    assert evaluate(evaluator, {1: found(([0, 0, 20, 20], 0.9, 0))})["AP"] == pytest.approx(100.0)
    assert evaluate(evaluator, {2: found()})["AP"] == 0.0


@pytest.mark.parametrize("kind", [COCOEvaluator, PascalVOCDetectionEvaluator])
def test_what_the_ranks_found_is_joined_on_the_main_process(register, monkeypatch, kind):
    boxes = {i: [5.0 * i, 4.0, 40.0 + 3 * i, 50.0] for i in range(8)}
    name = register([image(i, truth(box, i % 2)) for i, box in boxes.items()])
    # Ties between images of different ranks, and a wrong box on every third image.
    outputs = {
        i: found((box, 0.5, i % 2), *([([60, 60, 90, 90], 0.6, i % 2)] if i % 3 == 0 else []))
        for i, box in boxes.items()
    }
    alone = evaluate(kind(name), outputs)
    ranks = [kind(name), kind(name)]
    for i, output in outputs.items():
        ranks[i % 2].process([{"image_id": i}], [output])
    sent = []
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "gather", lambda data: sent.append(data) or [])
    assert ranks[1].evaluate() is None
    monkeypatch.setattr(comm, "is_main_process", lambda: True)
    monkeypatch.setattr(comm, "gather", lambda data: [data, *sent])
    assert ranks[0].evaluate()["bbox"] == pytest.approx(alone, abs=1e-12, nan_ok=True)
    assert 0 < alone["AP"] < 100
    # Each rank for itself, when asked to.
    monkeypatch.setattr(comm, "gather", lambda data: pytest.fail("gathered"))
    part = evaluate(kind(name, distributed=False), {i: outputs[i] for i in (0, 1)})
    assert part["AP50"] < 100


def test_reset_forgets_what_was_processed(register):
    name = register([image(1, truth([0, 0, 20, 20]))])
    evaluator = COCOEvaluator(name)
    evaluator.process([{"image_id": 1}], [found(*[([60, 60, 90, 90], 0.95, 0)] * 5)])
    assert evaluate(evaluator, {1: found(([0, 0, 20, 20], 0.9, 0))})["AP"] == pytest.approx(100.0)


def test_images_that_are_missing_or_come_twice_are_warned_about(register, log):
    name = register([image(i, truth([10, 10, 50, 50])) for i in range(4)])
    perfect = found(([10, 10, 50, 50], 0.9, 0))
    evaluator = COCOEvaluator(name)
    evaluate(evaluator, dict.fromkeys(range(4), perfect))
    assert "images of" not in log.text
    evaluate(evaluator, dict.fromkeys(range(3), perfect))
    assert f"only 3 of the 4 images of {name} are scored" in log.text
    log.clear()
    evaluate(evaluator, dict.fromkeys(range(4), perfect))
    evaluator.process([{"image_id": 2}], [perfect])
    evaluator.evaluate()
    assert f"of {name}, 1 images were given to the model once again" in log.text and "only" not in log.text


@pytest.mark.parametrize("kind", [COCOEvaluator, PascalVOCDetectionEvaluator])
def test_an_image_or_a_label_of_another_dataset_is_refused(register, kind):
    name = register([image("a", truth([10, 10, 50, 50]))])
    evaluator = kind(name)
    with pytest.raises(UserError, match=f"{name} has no image 'b'"):
        evaluator.process([{"image_id": "b"}], [found()])
    for label in (2, -1):
        with pytest.raises(UserError, match=f"finds the label {label}, but {name} has 2 classes, 0 to 1"):
            evaluator.process([{"image_id": "a"}], [found(([10, 10, 50, 50], 0.9, label))])


class SinglePrecision(torch.Tensor):
    """A tensor on a device that has no float64, as Apple's."""

    def double(self):
        raise TypeError("this device has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_outputs_may_be_on_a_device_without_double_precision(register):
    name = register([image(0, truth([10, 10, 50, 50], keypoints=[20.5, 20.5, 2]))])
    output = found(([10, 10, 50, 50], 0.9, 0)) | {"keypoints": torch.tensor([[[20.5, 20.5, 1.0]]])}
    evaluator = COCOEvaluator(name, kpt_oks_sigmas=[0.05])
    evaluator.process([{"image_id": 0}], [{k: v.as_subclass(SinglePrecision) for k, v in output.items()}])
    assert evaluator.evaluate()["keypoints"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("kind", [COCOEvaluator, PascalVOCDetectionEvaluator])
@pytest.mark.parametrize("label", [2, -1])
def test_an_object_of_no_class_is_refused_before_anything_is_run(register, kind, label):
    name = register([image(7, truth([10, 10, 50, 50], label))])
    with pytest.raises(UserError, match=f"image 7 of {name} has category_id {label}, but .* 0 to 1"):
        kind(name)


def test_ids_may_be_numpys(register, tmp_path):
    records = [image(np.int64(i), truth([10, 10, 50, 50])) for i in (9, 7)]
    name = register(records, thing_dataset_id_to_contiguous_id={np.int64(5): 0, np.int64(3): 1})
    perfect = found(([10, 10, 50, 50], 0.9, 0))
    evaluate(COCOEvaluator(name, output_dir=str(tmp_path)), dict.fromkeys([9, 7], perfect))
    rows = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(9, 5), (7, 5)]


def test_an_image_id_that_stands_twice_is_refused(register):
    name = register([image(1), image(1)])
    with pytest.raises(UserError, match=name):
        COCOEvaluator(name)


# ---- Pascal VOC --------------------------------------------------------------------------------


def test_voc_ap_by_hand():
    # Two truths; the detections are a hit, a miss, a hit.
    recall, precision = np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])
    assert voc_ap(recall, precision) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # Recalls 0, 0.1, ..., 0.5 have precision 1, the five above 2/3.
    assert voc_ap(recall, precision, use_07_metric=True) == pytest.approx((6 + 5 * 2 / 3) / 11)
    # Recall ends at 0.25: above it the precision is 0.
    recall, precision = np.array([0.25, 0.25]), np.array([1.0, 0.5])
    assert voc_ap(recall, precision) == pytest.approx(0.25)
    assert voc_ap(recall, precision, use_07_metric=True) == pytest.approx(3 / 11)
    assert voc_ap(np.zeros(0), np.zeros(0)) == voc_ap(np.zeros(0), np.zeros(0), True) == 0.0


_A, _B, _FAR = [0, 0, 20, 20], [10, 10, 50, 50], [60, 60, 90, 90]


def voc_score(register, records, outputs, classes=("cat",), **kwargs):
    return evaluate(PascalVOCDetectionEvaluator(register(records, classes), **kwargs), outputs)


@pytest.mark.parametrize("use_07_metric", [False, True])
def test_voc_perfect_detections_score_100(register, use_07_metric):
    records = [image("x", truth(_A, 0), truth(_B, 1)), image("y", truth(_FAR, 0))]
    outputs = {"x": found((_A, 0.9, 0), (_B, 0.3, 1)), "y": found((_FAR, 0.6, 0))}
    metrics = voc_score(register, records, outputs, ("cat", "dog"), use_07_metric=use_07_metric)
    keys = ["AP", "AP50", "AP75", "AP50-cat", "AP50-dog"]
    assert list(metrics) == keys
    assert list(metrics.values()) == pytest.approx([100.0] * 5)


@pytest.mark.parametrize(
    ("use_07_metric", "expected"), [(False, 100 * 5 / 6), (True, 100 * (6 + 10 / 3) / 11)]
)
def test_voc_a_hit_a_miss_a_hit(register, use_07_metric, expected):
    records = [image("x", truth(_A)), image("y", truth(_B))]
    outputs = {"x": found((_FAR, 0.8, 0), (_A, 0.9, 0)), "y": found((_B, 0.7, 0))}
    metrics = voc_score(register, records, outputs, use_07_metric=use_07_metric)
    assert metrics["AP50"] == pytest.approx(expected)


def test_voc_a_second_detection_of_an_object_is_a_miss(register):
    records = [image("x", truth(_A)), image("y", truth(_B))]
    outputs = {"x": found((_A, 0.9, 0), ([0, 0, 20, 19], 0.8, 0)), "y": found((_B, 0.7, 0))}
    assert voc_score(register, records, outputs)["AP50"] == pytest.approx(100 * 5 / 6)


def test_voc_a_detection_claims_only_the_object_it_overlaps_most(register):
    near = [0, 0, 20, 18]
    outputs = {"x": found((_A, 0.9, 0), (_A, 0.8, 0))}
    assert voc_score(register, [image("x", truth(_A), truth(near))], outputs)["AP50"] == pytest.approx(50.0)


@pytest.mark.parametrize("mark", [{"difficult": 1}, {"iscrowd": 1}])
def test_voc_difficult_objects_count_neither_for_nor_against(register, mark):
    hard = truth(_B, **mark)
    hits = [(_B, 0.95, 0), (_B, 0.94, 0), (_A, 0.5, 0)]
    metrics = voc_score(register, [image("x", truth(_A), hard)], {"x": found(*hits)})
    assert metrics["AP50"] == pytest.approx(100.0)
    # The same boxes without the mark: the second is a duplicate.
    plain = voc_score(register, [image("x", truth(_A), truth(_B))], {"x": found(*hits)})
    assert plain["AP50"] == pytest.approx(100 * 5 / 6)
    # Missing it costs nothing either.
    metrics = voc_score(register, [image("x", truth(_A), hard)], {"x": found((_A, 0.5, 0))})
    assert metrics["AP50"] == pytest.approx(100.0)


def test_voc_a_class_without_objects_is_left_out_of_the_mean(register, tmp_path):
    records = [image("x", truth(_A, 0), truth(_B, 1, difficult=1))]
    outputs = {"x": found((_A, 0.9, 0), (_FAR, 0.8, 1), (_FAR, 0.8, 2))}
    metrics = voc_score(register, records, outputs, ("cat", "dog", "cow"), output_dir=str(tmp_path))
    assert metrics["AP50"] == metrics["AP50-cat"] == pytest.approx(100.0)
    assert math.isnan(metrics["AP50-dog"]) and math.isnan(metrics["AP50-cow"])
    written = json.loads((tmp_path / "voc_results.json").read_text(), parse_constant=pytest.fail)
    assert written == {**metrics, "AP50-dog": None, "AP50-cow": None}


def test_voc_without_any_object_is_nan(register):
    metrics = voc_score(register, [image("x")], {"x": found((_A, 0.9, 0))})
    assert math.isnan(metrics["AP"]) and math.isnan(metrics["AP50"])


def test_voc_ap_is_the_mean_over_ious_from_050_to_095(register):
    # IoU 0.72 exceeds 0.50, 0.55, 0.60, 0.65 and 0.70.
    outputs = {"x": found(([0, 0, 20, 14.4], 0.9, 0))}
    metrics = voc_score(register, [image("x", truth(_A))], outputs)
    assert [metrics[key] for key in ("AP", "AP50", "AP75")] == pytest.approx([50.0, 100.0, 0.0])


def test_voc_an_iou_of_just_the_threshold_is_not_enough(register):
    outputs = {"x": found(([0, 0, 20, 10], 0.9, 0))}
    assert voc_score(register, [image("x", truth(_A))], outputs)["AP50"] == 0.0
    outputs = {"x": found(([0, 0, 20, 10.01], 0.9, 0))}
    assert voc_score(register, [image("x", truth(_A))], outputs)["AP50"] == pytest.approx(100.0)


def test_voc_labels_and_images_are_told_apart(register):
    records = [image("x", truth(_A, 0)), image("y", truth(_B, 1))]
    outputs = {"x": found((_A, 0.9, 1)), "y": found((_A, 0.9, 0), (_B, 0.9, 1))}
    metrics = voc_score(register, records, outputs, ("cat", "dog"))
    assert metrics["AP50-cat"] == 0.0
    # Of two detections with one score the one of the first image counts first.
    assert metrics["AP50-dog"] == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("year", "argument", "is_07"), [(2007, None, True), (2012, None, False), (None, None, False)]
)
def test_voc_2007_has_its_own_metric(register, year, argument, is_07):
    metadata = {} if year is None else {"year": year}
    name = register([image("x", truth(_A)), image("y", truth(_B))], ["cat"], **metadata)
    outputs = {"x": found((_A, 0.9, 0), (_FAR, 0.8, 0)), "y": found((_B, 0.7, 0))}
    expected = 100 * (6 + 10 / 3) / 11 if is_07 else 100 * 5 / 6
    assert evaluate(PascalVOCDetectionEvaluator(name), outputs)["AP50"] == pytest.approx(expected)
    forced = evaluate(PascalVOCDetectionEvaluator(name, use_07_metric=False), outputs)
    assert forced["AP50"] == pytest.approx(100 * 5 / 6)


# ---- the loop ----------------------------------------------------------------------------------


class Recorder(DatasetEvaluator):
    """Remembers what it is called with; raises where it is told to."""

    def __init__(self, raise_in=None, result=None):
        self.calls, self.raise_in, self.result = [], raise_in, result

    def _call(self, *call):
        self.calls.append(call)
        if self.raise_in == call[0]:
            raise ZeroDivisionError

    def reset(self):
        self._call("reset")

    def process(self, inputs, outputs):
        self._call("process", inputs, outputs)

    def evaluate(self):
        self._call("evaluate")
        return self.result


class Echo(nn.Module):
    """A model with a part in evaluation mode; returns its inputs and notes the mode it ran in."""

    def __init__(self, fail=False):
        super().__init__()
        self.frozen, self.trained = nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2))
        self.fail, self.seen = fail, []
        self.train()
        self.frozen.eval()

    def forward(self, samples):
        self.seen.append((any(m.training for m in self.modules()), torch.is_grad_enabled()))
        if self.fail:
            raise ZeroDivisionError
        return [f"found {sample}" for sample in samples]

    def modes(self):
        return [self.training, self.frozen.training, self.trained.training, self.trained[0].training]


def test_every_batch_is_run_in_evaluation_mode_without_gradients_and_processed_in_order():
    model, recorder = Echo(), Recorder(result={"bbox": {"AP": 1.0}})
    assert inference_on_dataset(model, [["a", "b"], ["c"]], recorder) == {"bbox": {"AP": 1.0}}
    assert recorder.calls == [
        ("reset",),
        ("process", ["a", "b"], ["found a", "found b"]),
        ("process", ["c"], ["found c"]),
        ("evaluate",),
    ]
    assert model.seen == [(False, False)] * 2
    assert model.modes() == [True, False, True, True]


@pytest.mark.parametrize("where", ["model", "process", "evaluate"])
def test_every_module_gets_its_mode_back_also_after_an_error(where):
    model = Echo(fail=where == "model")
    with pytest.raises(ZeroDivisionError):
        inference_on_dataset(model, [["a"]], Recorder(raise_in=where))
    assert model.modes() == [True, False, True, True]
    assert torch.is_grad_enabled()


def test_a_model_in_evaluation_mode_stays_there():
    model = Echo().eval()
    inference_on_dataset(model, [["a"]], Recorder())
    assert model.modes() == [False] * 4


def test_a_model_can_be_run_without_an_evaluator():
    model = Echo()
    assert inference_on_dataset(model, [["a"], ["b"]], None) == {}
    assert len(model.seen) == 2


def test_an_evaluator_without_results_gives_an_empty_dict():
    assert inference_on_dataset(Echo(), [["a"]], Recorder(result=None)) == {}


def test_several_evaluators_work_as_one():
    first, second = Recorder(result={"bbox": {"AP": 1.0}}), Recorder(result={"mine": {"x": 2.0}})
    results = inference_on_dataset(Echo(), [["a"]], [first, second, Recorder()])
    assert results == {"bbox": {"AP": 1.0}, "mine": {"x": 2.0}}
    assert first.calls == second.calls
    assert [call[0] for call in first.calls] == ["reset", "process", "evaluate"]


def test_two_evaluators_with_one_task_are_refused():
    evaluators = DatasetEvaluators([Recorder(result={"bbox": {"AP": 1.0}}), Recorder(result={"bbox": {}})])
    with pytest.raises(ValueError, match="bbox"):
        evaluators.evaluate()
    assert DatasetEvaluators([Recorder(), Recorder()]).evaluate() is None


def test_a_detector_is_evaluated_from_its_samples_to_its_score(register):
    boxes = {7: [10.0, 10.0, 40.0, 60.0], 3: [20.0, 5.0, 90.0, 50.0]}
    name = register([image(image_id, truth(box, 1)) for image_id, box in boxes.items()])

    class Perfect(nn.Module):
        def forward(self, samples):
            return [found((boxes[sample["image_id"]], 0.9, 1)) for sample in samples]

    loader = [[{"image_id": 3}, {"image_id": 7}]]
    results = inference_on_dataset(
        Perfect(), loader, [COCOEvaluator(name), Renamed(PascalVOCDetectionEvaluator(name))]
    )
    assert results["bbox"]["AP"] == pytest.approx(100.0)
    assert results["voc"]["AP50"] == pytest.approx(100.0)


class Renamed(DatasetEvaluator):
    """An evaluator whose task is called voc."""

    def __init__(self, evaluator):
        self.reset, self.process, self._evaluator = evaluator.reset, evaluator.process, evaluator

    def evaluate(self):
        return {"voc": self._evaluator.evaluate()["bbox"]}


# ---- results -----------------------------------------------------------------------------------


def test_flatten_results():
    nested = {"coco_val": {"bbox": {"AP": 1.0, "AP-cat": 2.0}}, "loss": 3.0, "empty": {}}
    assert flatten_results(nested) == {"coco_val/bbox/AP": 1.0, "coco_val/bbox/AP-cat": 2.0, "loss": 3.0}


def test_results_within_their_tolerance_pass():
    results = {"bbox": {"AP": 37.4, "AP50": 60.0}}
    verify_results([["bbox", "AP", 37.0, 0.5], ["bbox", "AP50", 60.0, 0.0]], results)
    verify_results([], results)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (["bbox", "AP", 37.0, 0.3], "37.4"),
        (["bbox", "AP", 37.8, 0.3], "37.4"),
        (["bbox", "APl", 37.0, 100.0], "nan"),
        (["bbox", "AP99", 37.0, 100.0], "None"),
        (["segm", "AP", 37.0, 100.0], "None"),
    ],
)
def test_results_that_differ_are_missing_or_nan_fail(row, shown):
    results = {"bbox": {"AP": 37.4, "APl": float("nan")}}
    with pytest.raises(UserError) as error:
        verify_results([["bbox", "AP", 37.4, 0.1], row], results)
    assert f"{row[0]}/{row[1]} is {shown}" in str(error.value)
    assert str(error.value).count("expected") == 1


def test_every_result_that_differs_is_named():
    with pytest.raises(UserError, match=r"bbox/AP is 1.*bbox/AP50 is 2"):
        verify_results([["bbox", "AP", 9, 1], ["bbox", "AP50", 9, 1]], {"bbox": {"AP": 1, "AP50": 2}})


def test_print_csv_format_logs_the_main_numbers(log):
    print_csv_format({"bbox": {"AP": 12.34567, "AP50": float("nan"), "AP-cat": 99.0}})
    assert log.messages == ["copypaste: Task: bbox", "copypaste: AP,AP50", "copypaste: 12.3457,nan"]
