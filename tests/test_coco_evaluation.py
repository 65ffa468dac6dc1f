"""COCO's numbers of boxes, masks and keypoints, by every implementation; proposals: COCOEvaluator."""

import contextlib
import importlib.util
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Job
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rank_functions import evaluate_a_part

from plaintrain.config import get_cfg
from plaintrain.data import DatasetCatalog, MetadataCatalog, register_coco_instances
from plaintrain.evaluation import (
    COCOEvaluator,
    PascalVOCDetectionEvaluator,
    build_evaluator,
    coco_backend,
)
from plaintrain.evaluation.proposals import average_recall, box_ious, coverage
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

torch.set_num_threads(1)

BOX_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
INSTALLED = [name for name in coco_backend.BACKENDS if importlib.util.find_spec(name)]
FAST = [name for name in INSTALLED if name != "pycocotools"]
HEIGHT, WIDTH = 150, 200
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


# ---- a written dataset with all that is hard, and what a model finds in it ---------------------


def box_mask(x, y, w, h, rng=None, size=(HEIGHT, WIDTH)):
    """A mask that fills a box but for an ellipse's outside, or random holes."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    mask = ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1
    return mask & (rng.random(size) < 0.9) if rng is not None else mask


def uncompressed(mask):
    """RLE with a list of counts."""
    flat = mask.astype(int).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def ellipse(x, y, w, h, points=12):
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    xs, ys = x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))
    return np.stack([xs, ys], axis=1).round(2).ravel().tolist()


def segmentation(kind, box, rng):
    """Two polygons, a compressed or an uncompressed RLE."""
    x, y, w, h = box
    if kind == 0:
        return [ellipse(x, y, w, h / 2.5), ellipse(x, y + h / 2, w, h / 2.5)]
    if kind == 1:
        rle = coco_mask.encode(np.asfortranarray(box_mask(*box, rng), dtype=np.uint8))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    return uncompressed(box_mask(*box, rng))


def write_coco(path, kp=17, images=14, seed=0):
    """A COCO file with crowds, objects of all sizes, and images and classes without any."""
    rng = np.random.default_rng(seed)
    annotations = []
    ids = rng.permutation(100)[:images].tolist()
    for image_id in ids[:-2]:
        for _ in range(rng.integers(1, 7)):
            # Areas are on both sides of 32^2 and 96^2.
            w, h = np.exp(rng.uniform(np.log(8), np.log([195, 145]))).round(1).tolist()
            box = [round(float(rng.uniform(0, side - s)), 1) for side, s in ((WIDTH, w), (HEIGHT, h))]
            box, crowd = [*box, w, h], int(rng.random() < 0.2)
            points = np.concatenate([rng.integers(box[:2], [box[0] + w, box[1] + h], (kp, 2))], axis=1)
            visible = rng.choice([0, 1, 2], size=(kp, 1), p=[0.3, 0.2, 0.5])
            visible *= int(rng.random() < 0.8 and not crowd)
            keypoints = np.concatenate([points * (visible > 0), visible], axis=1).ravel().tolist()
            mask = segmentation(2 if crowd else int(rng.integers(3)), box, rng)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice([5, 2])),
                    "bbox": box,
                    "area": round(w * h * float(rng.uniform(0.4, 1)), 2),
                    "iscrowd": crowd,
                    "segmentation": mask,
                    "keypoints": keypoints,
                    "num_keypoints": int((visible > 0).sum()),
                }
            )
    names = [f"k{i}" for i in range(kp)]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in ids],
        "categories": [{"id": i, "name": f"c{i}", "keypoints": names, "skeleton": []} for i in (9, 5, 2)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content))
    return content


def found_in(content, seed=1):
    """{image_id: output}: moved, mislabelled, doubled and spurious objects, scores with ties."""
    rng = np.random.default_rng(seed)
    labels = {5: 1, 2: 0, 9: 2}
    by_image = {image["id"]: [] for image in content["images"]}
    size = content["images"][0]["height"], content["images"][0]["width"]
    kp = len(content["categories"][0]["keypoints"])
    for a in content["annotations"]:
        by_image[a["image_id"]].append(a)
    outputs = {}
    for image_id, annotations in by_image.items():
        boxes, scores, classes, masks, keypoints = [], [], [], [], []
        for a in [a for a in annotations for _ in range(rng.integers(0, 4))]:
            x, y, w, h = a["bbox"] + rng.normal(0, 0.06, 4) * np.array(a["bbox"])[[2, 3, 2, 3]]
            boxes.append([x, y, x + w, y + h])
            scores.append(round(float(rng.random()), 1))
            classes.append(labels[a["category_id"]] if rng.random() < 0.8 else int(rng.integers(3)))
            masks.append(box_mask(x, y, max(w, 1), max(h, 1), rng, size))
            points = np.array(a["keypoints"]).reshape(kp, 3)[:, :2] + 0.5
            points = points + rng.normal(0, 0.03, (kp, 2)) * [w, h]
            keypoints.append(np.concatenate([points, rng.random((kp, 1))], axis=1))
        outputs[image_id] = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(classes, dtype=torch.int64),
            "masks": torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *size)),
            "keypoints": torch.tensor(np.array(keypoints), dtype=torch.float32).reshape(-1, kp, 3),
        }
    return outputs


def register(path, name="coco_evaluation_test"):
    register_coco_instances(name, {}, str(path), "nowhere")
    return name


def evaluate(evaluator, outputs):
    evaluator.reset()
    for image_id, output in outputs.items():
        evaluator.process([{"image_id": image_id}], [output])
    return evaluator.evaluate()


def coco_results(outputs, category_ids):
    """The outputs in COCO's results format, written apart from what is tested."""
    results = []
    for image_id, output in outputs.items():
        for i, (x0, y0, x1, y1) in enumerate(output["boxes"].tolist()):
            mask = np.asfortranarray(output["masks"][i].numpy(), dtype=np.uint8)
            rle = coco_mask.encode(mask)
            keypoints = [[x - 0.5, y - 0.5, score] for x, y, score in output["keypoints"][i].tolist()]
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[int(output["labels"][i])],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": float(output["scores"][i]),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "keypoints": sum(keypoints, []),
                }
            )
    return results


def run_pycocotools(json_file, results, task, image_ids, sigmas=None):
    """(percentages, {category: AP}) of pycocotools on the original file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truths = COCO(str(json_file))
        # With a box in it, a mask would have the box's area.
        drop = {"bbox"} if task == "segm" else {"segmentation"}
        found = truths.loadRes([{k: v for k, v in r.items() if k not in drop} for r in results])
        evaluation = COCOeval(truths, found, task)
        evaluation.params.imgIds = sorted(image_ids)
        if sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = {}
    for k, category in enumerate(evaluation.params.catIds):
        values = evaluation.eval["precision"][:, :, k, 0, -1]
        per_class[f"AP-{truths.cats[category]['name']}"] = values
    per_class = {k: 100 * v[v > -1].mean() if (v > -1).any() else math.nan for k, v in per_class.items()}
    return [100 * value if value > -1 else math.nan for value in evaluation.stats], per_class


def expected_metrics(json_file, results, image_ids, sigmas=None):
    expected = {}
    for task in ("bbox", "segm", "keypoints"):
        stats, per_class = run_pycocotools(json_file, results, task, image_ids, sigmas)
        names = KEYPOINT_METRICS if task == "keypoints" else BOX_METRICS
        expected[task] = dict(zip(names, stats, strict=True)) | (per_class if task != "keypoints" else {})
    return expected


def assert_same(results, expected):
    assert list(results) == list(expected)
    for task, metrics in expected.items():
        assert set(results[task]) == set(metrics)
        assert results[task] == pytest.approx(metrics, abs=1e-9, nan_ok=True)


# ---- against pycocotools -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize(("kp", "sigmas"), [(17, ()), (4, (0.05, 0.1, 0.02, 0.08))])
def test_the_numbers_are_those_of_pycocotools_on_the_file(tmp_path, backend, kp, sigmas):
    content = write_coco(tmp_path / "a.json", kp)
    outputs = found_in(content)
    evaluator = COCOEvaluator(register(tmp_path / "a.json"), kpt_oks_sigmas=sigmas)
    evaluator.backend = backend
    results = evaluate(evaluator, outputs)
    expected = coco_results(outputs, [2, 5, 9])
    assert_same(results, expected_metrics(tmp_path / "a.json", expected, outputs, sigmas))
    assert all(5 < metrics["AP"] < 95 for metrics in results.values())
    # There are some of each size, and no object of class 9.
    assert not any(math.isnan(results["segm"][f"AP{size}"]) for size in "sml")
    assert math.isnan(results["segm"]["AP-c9"])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("seed", range(4))
def test_faster_implementations_agree_to_the_last_digit(tmp_path, backend, seed):
    content = write_coco(tmp_path / "a.json", images=30, seed=seed)
    outputs = found_in(content, seed=seed)
    evaluator = COCOEvaluator(register(tmp_path / "a.json"))
    evaluator.backend = backend
    fast = evaluate(evaluator, outputs)
    evaluator.backend = "pycocotools"
    slow = evaluate(evaluator, outputs)
    assert repr(fast) == repr(slow)
    assert set(fast) == {"bbox", "segm", "keypoints"}


@pytest.fixture
def real_coco(data_root):
    """(name, annotation file) of the real subset with masks, or with keypoints."""

    def add(kind):
        json_file = os.path.join(data_root, f"coco/annotations/{kind}_val2017.json")
        return register(json_file, f"coco_evaluation_{kind}"), json_file

    return add


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("kind", ["instances", "person_keypoints"])
def test_the_numbers_on_real_images_are_those_of_pycocotools(real_coco, backend, kind):
    name, json_file = real_coco(kind)
    tasks = ("bbox", "segm", *(["keypoints"] if kind == "person_keypoints" else []))
    evaluator = COCOEvaluator(name, tasks)
    evaluator.backend = backend
    outputs, results = real_outputs(json_file, MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id)
    metrics = evaluate(evaluator, outputs)
    for task in tasks:
        stats, _ = run_pycocotools(json_file, results, task, outputs)
        names = KEYPOINT_METRICS if task == "keypoints" else BOX_METRICS
        assert [metrics[task][key] for key in names] == pytest.approx(stats, abs=1e-9, nan_ok=True)
        assert 20 < metrics[task]["AP"] < 99


def real_outputs(json_file, labels):
    """Outputs and COCO results: the ground truth, crowds too, moved by some pixels."""
    with contextlib.redirect_stdout(io.StringIO()):
        truths = COCO(json_file)
    rng = np.random.default_rng(0)
    outputs, results, category_ids = {}, [], {label: i for i, label in labels.items()}
    for image_id, image in truths.imgs.items():
        annotations = truths.imgToAnns[image_id]
        shifts = rng.integers(-4, 5, (len(annotations), 2)) if annotations else np.zeros((0, 2), int)
        boxes = np.array([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [np.roll(truths.annToMask(a), s, (1, 0)) for a, s in zip(annotations, shifts, strict=True)]
        keypoints = np.array([a.get("keypoints", [0] * 51) for a in annotations], float).reshape(-1, 17, 3)
        keypoints[..., :2] += shifts[:, None] + 0.5
        outputs[image_id] = {
            "boxes": torch.from_numpy(boxes + np.tile(shifts, 2)).float(),
            "scores": torch.from_numpy(rng.integers(1, 10, len(annotations)) / 16),
            "labels": torch.tensor([labels[a["category_id"]] for a in annotations], dtype=torch.int64),
            "masks": torch.from_numpy(np.array(masks, bool).reshape(-1, image["height"], image["width"])),
            "keypoints": torch.from_numpy(keypoints),
        }
    results = coco_results(outputs, category_ids)
    return outputs, results


def test_the_results_file_holds_masks_and_keypoints(tmp_path):
    outputs = found_in(write_coco(tmp_path / "a.json"))
    evaluator = COCOEvaluator(register(tmp_path / "a.json"), output_dir=str(tmp_path))
    evaluate(evaluator, outputs)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    expected = [r for i in sorted(outputs) for r in coco_results({i: outputs[i]}, [2, 5, 9])]
    assert len(written) == len(expected) > 50
    for a, b in zip(written, expected, strict=True):
        assert a == {**b, "keypoints": pytest.approx(b["keypoints"])}


# ---- which implementation ----------------------------------------------------------------------


def test_the_fastest_that_is_installed_is_used_and_named_in_the_log(tmp_path, monkeypatch, log):
    content = write_coco(tmp_path / "a.json", images=4)
    name = register(tmp_path / "a.json")
    assert COCOEvaluator(name).backend == INSTALLED[0]
    assert COCOEvaluator(name, use_fast_impl=False).backend == "pycocotools"
    evaluate(COCOEvaluator(name, ["bbox"]), found_in(content))
    assert f"bbox is scored by {INSTALLED[0]}" in log.messages
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "hotcoco" else find(n))
    assert COCOEvaluator(name).backend != "hotcoco"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in FAST else find(n))
    assert COCOEvaluator(name).backend == "pycocotools"


def small(image_id, *annotations):
    return {
        "file_name": f"{image_id}.jpg",
        "image_id": image_id,
        "height": 100,
        "width": 100,
        "annotations": list(annotations),
    }


def thing(box, label=0, **more):
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0, **more}


def rectangle(x0, y0, x1, y1):
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def output_of(boxes, masks=None, keypoints=None, labels=None):
    """A model's output; scores fall, labels are 0."""
    output = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.linspace(0.9, 0.5, len(boxes)),
        "labels": torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
    }
    if masks is not None:
        output["masks"] = torch.stack(masks) if masks else torch.zeros(0, 100, 100, dtype=torch.bool)
    if keypoints is not None:
        output["keypoints"] = torch.tensor(keypoints, dtype=torch.float32).reshape(
            len(boxes), -1 if boxes else 2, 3
        )
    return output


def add(records, **metadata):
    name = f"coco_evaluation_{len(DatasetCatalog.list())}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["cat", "dog"], **metadata)
    return name


SQUARE = [10, 10, 50, 50]
CORNERS = [[10, 10, 50, 10, 50, 50, 10, 50]]
POINTS = [20.0, 20.0, 2, 40.0, 30.0, 1]
# What the implementations might not do alike.
EDGE_CASES = {
    "no ground truth": ([small(1), small(2)], {1: output_of([SQUARE], [rectangle(*SQUARE)], [POINTS])}),
    "no detection": (
        [small(1, thing(SQUARE, segmentation=CORNERS, keypoints=POINTS))],
        {1: output_of([], [], [])},
    ),
    "only crowds": (
        [small(1, thing(SQUARE, segmentation=CORNERS, keypoints=POINTS, iscrowd=1))],
        {1: output_of([SQUARE] * 2, [rectangle(*SQUARE)] * 2, [POINTS] * 2)},
    ),
    "names for images": (
        [small(i, thing(SQUARE, segmentation=CORNERS, keypoints=POINTS)) for i in ("b", "a", "c")],
        {
            i: output_of([SQUARE, [0, 0, 9, 9]], [rectangle(*SQUARE), rectangle(0, 0, 9, 9)], [POINTS] * 2)
            for i in ("a", "c", "b")
        },
    ),
    "no class, no area, no keypoints for some": (
        [
            small(0, thing(SQUARE, 1, segmentation=CORNERS), thing([0, 60, 90, 90], 1, keypoints=POINTS)),
            small(7, thing(SQUARE, 1, segmentation=CORNERS, keypoints=[0.0] * 6)),
        ],
        {
            i: output_of([SQUARE, [0, 60, 90, 91]], [rectangle(*SQUARE)] * 2, [POINTS] * 2, [1, 1])
            for i in (0, 7)
        },
    ),
    "more detections than count": (
        [small(1, thing(SQUARE, segmentation=CORNERS, keypoints=POINTS))],
        {1: output_of([[60, 60, 90, 90]] * 299 + [SQUARE], [rectangle(*SQUARE)] * 300, [POINTS] * 300)},
    ),
    "empty masks and boxes": (
        [small(1, thing(SQUARE, segmentation=CORNERS, keypoints=POINTS), thing([5, 5, 5, 5]))],
        {1: output_of([[3, 3, 3, 3], SQUARE], [rectangle(0, 0, 0, 0), rectangle(*SQUARE)], [POINTS] * 2)},
    ),
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_faster_implementations_agree_where_something_is_missing(backend, case):
    records, outputs = EDGE_CASES[case]
    evaluator = COCOEvaluator(add(records), kpt_oks_sigmas=(0.1, 0.1))
    evaluator.backend = backend
    fast = evaluate(evaluator, outputs)
    evaluator.backend = "pycocotools"
    assert repr(fast) == repr(evaluate(evaluator, outputs))
    assert set(fast) == {"bbox", "segm", "keypoints"}


# ---- masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_mask_is_scored_by_its_pixels_and_its_box_by_itself(backend):
    name = add([small(1, thing(SQUARE, segmentation=CORNERS))])
    evaluator = COCOEvaluator(name)
    evaluator.backend = backend
    # The box is right; the mask has 0.775 of it.
    results = evaluate(evaluator, {1: output_of([SQUARE], [rectangle(10, 10, 50, 41)])})
    assert results["bbox"]["AP"] == 100.0
    assert results["segm"]["AP"] == pytest.approx(60.0)
    assert results["segm"]["APm"] == pytest.approx(60.0)


@pytest.mark.parametrize("backend", INSTALLED)
def test_the_masks_area_and_not_the_boxs_decides_what_is_small(backend):
    name = add([small(1, thing(SQUARE, segmentation=CORNERS))])
    evaluator = COCOEvaluator(name)
    evaluator.backend = backend
    # A false one of 40 x 40 pixels' box, and 10 pixels: in no way a medium one.
    wrong = output_of([[50, 50, 90, 90], SQUARE], [rectangle(60, 60, 62, 65), rectangle(*SQUARE)])
    results = evaluate(evaluator, {1: wrong})
    assert results["segm"]["APm"] == pytest.approx(100.0)
    assert results["bbox"]["APm"] == pytest.approx(50.0)


def test_without_masks_in_the_dataset_segm_is_left_out_with_a_warning(log):
    name = add([small(1, thing(SQUARE))])
    results = evaluate(COCOEvaluator(name), {1: output_of([SQUARE], [rectangle(*SQUARE)], [POINTS])})
    assert list(results) == ["bbox"]
    warnings = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert [w.split()[0] for w in warnings] == ["segm", "keypoints"]
    assert all(name in w for w in warnings)


def test_what_is_found_over_an_object_without_a_mask_is_ignored():
    name = add([small(1, thing(SQUARE, segmentation=CORNERS), thing([60, 60, 90, 90]))])
    inside = output_of([[60, 60, 90, 90], SQUARE], [rectangle(61, 61, 88, 89), rectangle(*SQUARE)])
    results = evaluate(COCOEvaluator(name), {1: inside})
    assert results["segm"]["AP"] == 100.0


def test_masks_of_another_size_or_missing_ones_are_refused():
    name = add([small(1, thing(SQUARE, segmentation=CORNERS)), small(2)])
    evaluator = COCOEvaluator(name)
    wrong = output_of([SQUARE], [torch.zeros(50, 100, dtype=torch.bool)])
    with pytest.raises(UserError, match=r"image 1 .*\(50, 100\).*\(100, 100\)"):
        evaluate(evaluator, {1: wrong})
    with pytest.raises(UserError, match="1 of 2 detections have masks"):
        evaluate(evaluator, {1: output_of([SQUARE], [rectangle(*SQUARE)]), 2: output_of([SQUARE])})
    with pytest.raises(UserError, match="segm needs masks"):
        evaluate(COCOEvaluator(name, ["segm"]), {1: output_of([SQUARE])})


def test_a_segmentation_that_cannot_be_read_is_named():
    name = add([small("x9", thing(SQUARE, segmentation=[[1, 2, 3, 4]]))])
    with pytest.raises(UserError, match="x9.*polygon"):
        evaluate(COCOEvaluator(name, ["segm"]), {"x9": output_of([SQUARE], [rectangle(*SQUARE)])})


@pytest.mark.parametrize(("area", "size"), [(500.0, "s"), (None, "m")])
def test_the_area_is_the_annotations_or_its_masks_or_its_boxs(area, size):
    # A box of 100 x 100 is large; its mask has 40 x 40 pixels.
    box = [0, 0, 100, 100]
    annotation = thing(box, segmentation=CORNERS) | ({"area": area} if area else {})
    metrics = evaluate(COCOEvaluator(add([small(1, annotation)])), {1: output_of([box])})["bbox"]
    assert [s for s in "sml" if not math.isnan(metrics[f"AP{s}"])] == [size]
    metrics = evaluate(COCOEvaluator(add([small(1, thing(box))])), {1: output_of([box])})["bbox"]
    assert [s for s in "sml" if not math.isnan(metrics[f"AP{s}"])] == ["l"]


# ---- keypoints ---------------------------------------------------------------------------------


def test_keypoints_are_compared_without_a_shift():
    # OKS of a shift d on every point: exp(-d^2 / (2 * area * (2 sigma)^2)).
    name = add([small(1, thing(SQUARE, keypoints=POINTS, area=1600.0))])
    evaluator = COCOEvaluator(name, kpt_oks_sigmas=(0.05, 0.05))
    exact = evaluate(evaluator, {1: output_of([SQUARE], keypoints=[POINTS])})
    assert exact["keypoints"]["AP"] == 100.0
    shift = math.sqrt(-math.log(0.77) * 2 * 1600 * 0.1**2)
    moved = [20 + shift, 20, 2, 40 + shift, 30, 1]
    results = evaluate(evaluator, {1: output_of([SQUARE], keypoints=[moved])})
    # 0.77 is above 0.50, 0.55, ..., 0.75.
    assert results["keypoints"]["AP"] == pytest.approx(60.0)
    assert list(results["keypoints"]) == list(KEYPOINT_METRICS)


@pytest.mark.parametrize(
    ("sigmas", "kp", "shown"),
    [((), 4, "COCO's are for 17"), ((0.1,) * 3, 4, "not \\[0.1, 0.1, 0.1\\]"), ((0.1, 0.0), 2, "positive")],
)
def test_a_wrong_number_of_sigmas_is_refused(sigmas, kp, shown):
    records = [small(1, thing(SQUARE, keypoints=[20.0, 20.0, 2] * kp))]
    message = f"TEST.KEYPOINT_OKS_SIGMAS must be {kp} positive numbers.*{shown}|{shown}"
    with pytest.raises(UserError, match=message):
        COCOEvaluator(add(records), ["bbox", "keypoints"], kpt_oks_sigmas=sigmas)
    named = add(records, keypoint_names=[f"k{i}" for i in range(kp)])
    with pytest.raises(UserError, match=message):
        COCOEvaluator(named, ["keypoints"], kpt_oks_sigmas=sigmas)
    with pytest.raises(UserError, match=message):
        output = output_of([SQUARE], keypoints=[[20.0, 20.0, 2] * kp])
        evaluate(COCOEvaluator(named, kpt_oks_sigmas=sigmas), {1: output})


def test_a_model_with_another_number_of_keypoints_is_refused():
    name = add([small(1, thing(SQUARE, keypoints=POINTS))])
    output = output_of([SQUARE], keypoints=[[20.0, 20.0, 2] * 3])
    with pytest.raises(UserError, match="finds 3 keypoints, .* has 2"):
        evaluate(COCOEvaluator(name, kpt_oks_sigmas=(0.1, 0.1)), {1: output})


def test_objects_without_a_labelled_keypoint_are_ignored_not_missed():
    blank = thing([60, 60, 90, 90], keypoints=[0.0] * 6)
    name = add([small(1, thing(SQUARE, keypoints=POINTS), blank)])
    evaluator = COCOEvaluator(name, kpt_oks_sigmas=(0.1, 0.1))
    there = [70.0, 70.0, 1, 80.0, 80.0, 1]
    found = output_of([[60, 60, 90, 90], SQUARE], keypoints=[there, POINTS])
    results = evaluate(evaluator, {1: found})
    assert results["keypoints"]["AP"] == results["keypoints"]["AR"] == 100.0


# ---- tasks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [("bbox", "panoptic"), (), "bbox"])
def test_unknown_tasks_are_refused(tasks):
    with pytest.raises(UserError, match="bbox, segm, keypoints, box_proposals"):
        COCOEvaluator(add([small(1)]), tasks)


def test_a_task_without_annotations_is_refused_before_anything_is_run():
    name = add([small(1, thing(SQUARE))])
    with pytest.raises(UserError, match=f"segm cannot be scored: .*{name}"):
        COCOEvaluator(name, ["bbox", "segm"])


def test_only_the_tasks_that_were_asked_for_are_scored():
    records = [small(1, thing(SQUARE, segmentation=CORNERS, keypoints=POINTS))]
    output = output_of([SQUARE], [rectangle(*SQUARE)], [POINTS])
    name = add(records)
    assert list(evaluate(COCOEvaluator(name, ["segm"]), {1: output})) == ["segm"]
    both = COCOEvaluator(name, ("box_proposals", "bbox"))
    assert list(evaluate(both, {1: output})) == ["bbox", "box_proposals"]


# ---- ranks -------------------------------------------------------------------------------------


def test_two_processes_gather_masks_as_rle_and_score_as_one(tmp_path):
    content = write_coco(tmp_path / "a.json")
    outputs = found_in(content)
    alone = evaluate(COCOEvaluator(register(tmp_path / "a.json")), outputs)
    torch.save(outputs, tmp_path / "outputs.pt")
    job = Job(evaluate_a_part, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    facts = job.results()
    assert facts[1]["results"] is None
    assert repr(facts[0]["results"]) == repr(alone)
    bitmaps = sum(output["masks"].numel() for output in outputs.values())
    assert facts[0]["mask_bytes"] + facts[1]["mask_bytes"] < bitmaps / 4
    assert facts[0]["kinds"] == facts[1]["kinds"] == ["bytes", "ndarray", "set"]


def test_a_rank_without_images_or_masks_changes_nothing(tmp_path, monkeypatch):
    from plaintrain.utils import comm

    content = write_coco(tmp_path / "a.json")
    outputs = found_in(content)
    evaluator = COCOEvaluator(register(tmp_path / "a.json"))
    alone = evaluate(evaluator, outputs)
    idle = COCOEvaluator(evaluator.dataset_name)
    sent = []
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "gather", lambda data: sent.append(data) or [])
    assert evaluate(evaluator, outputs) is None
    monkeypatch.setattr(comm, "is_main_process", lambda: True)
    monkeypatch.setattr(comm, "gather", lambda data: [data, *sent])
    # The rank that scores has seen nothing.
    assert repr(idle.evaluate()) == repr(alone)


def test_voc_scores_boxes_of_outputs_with_masks_and_keypoints():
    name = add([small(1, thing(SQUARE))])
    evaluator = PascalVOCDetectionEvaluator(name)
    output = output_of([SQUARE], [torch.zeros(3, 3, dtype=torch.bool)], [POINTS])
    assert evaluate(evaluator, {1: output})["bbox"]["AP50"] == 100.0


# ---- proposals ---------------------------------------------------------------------------------


def test_each_proposal_covers_one_object_and_the_best_pair_comes_first():
    # The second proposal is best for both objects; the first object is left with the first proposal.
    ious = np.array([[0.5, 0.3], [0.6, 0.8], [0.1, 0.2]])
    assert sorted(coverage(ious)) == [0.5, 0.8]
    assert ious.max() == 0.8
    # More objects than proposals.
    assert sorted(coverage(np.array([[0.5, 0.3, 0.9]]))) == [0.0, 0.0, 0.9]
    assert coverage(np.zeros((0, 2))).tolist() == [0.0, 0.0]


def test_box_ious_by_hand():
    ious = box_ious(
        np.array([[0.0, 0, 10, 10]]), np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    )
    assert ious.tolist() == [[1.0, pytest.approx(1 / 3), 0.0]]
    assert box_ious(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]


def test_average_recall_by_hand():
    boxes = np.array([[0.0, 0, 20, 20], [100, 100, 150, 150]])
    objects = np.array([[0.0, 0, 20, 20], [100, 100, 150, 136], [300, 300, 500, 500]])
    areas = np.array([400.0, 1800.0, 40000.0])
    metrics = average_recall([(boxes, objects, areas)])
    assert list(metrics) == [f"AR{size}@{limit}" for limit in (100, 1000) for size in ("", "s", "m", "l")]
    # IoUs are 1, 0.72 (above 0.50 to 0.70) and 0.
    assert metrics["ARs@100"] == 100.0
    assert metrics["ARm@100"] == pytest.approx(50.0)
    assert metrics["ARl@100"] == 0.0
    assert metrics["AR@100"] == pytest.approx(50.0)
    # The hit comes at the 101st place.
    far = np.tile([900.0, 900, 950, 950], (100, 1))
    metrics = average_recall([(np.concatenate([far, boxes[:1]]), objects[:1], areas[:1])])
    assert metrics["AR@100"] == 0.0 and metrics["AR@1000"] == 100.0
    assert math.isnan(metrics["ARl@100"])


def test_proposals_are_scored_by_score_whatever_their_class_and_without_crowds(tmp_path):
    crowd = thing([60, 60, 90, 90], iscrowd=1)
    name = add([small(1, thing(SQUARE, 1), crowd), small(2, thing(SQUARE, 0))])
    evaluator = COCOEvaluator(name, ("box_proposals",), output_dir=str(tmp_path / "none"))
    # Worst first: sorted by score, the hit is among the first hundred.
    output = output_of([[0, 0, 5, 5]] * 100 + [SQUARE])
    output["scores"] = output["scores"].flip(0)
    results = evaluate(evaluator, {1: output, 2: output_of([])})
    assert list(results) == ["box_proposals"]
    assert results["box_proposals"]["AR@100"] == pytest.approx(50.0)
    assert math.isnan(results["box_proposals"]["ARl@1000"])
    assert not (tmp_path / "none").exists()


# ---- scripts -----------------------------------------------------------------------------------


def test_the_evaluator_is_chosen_by_model_and_dataset():
    records = [small(1, thing(SQUARE, keypoints=POINTS))]
    coco, voc = add(records, evaluator_type="coco"), add(records, evaluator_type="pascal_voc")
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    assert isinstance(build_evaluator(cfg, voc, None), PascalVOCDetectionEvaluator)
    output = output_of([SQUARE], keypoints=[POINTS])
    assert list(evaluate(build_evaluator(cfg, coco, None), {1: output})) == ["bbox", "keypoints"]
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    for name in (coco, voc):
        assert list(evaluate(build_evaluator(cfg, name, None), {1: output})) == ["box_proposals"]
