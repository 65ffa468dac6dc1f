"""COCO's metrics of boxes, masks and keypoints, by every backend; recall of proposals: COCOEvaluator."""

import contextlib
import importlib.util
import io
import json
import math

import numpy as np
import pytest
import torch
from detection_helpers import add_dataset, evaluate, make_annotation, make_mask, make_record, random_outputs
from processes import Job
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rank_functions import evaluate_a_part

from plaintrain.data import DatasetCatalog, MetadataCatalog, register_coco_instances
from plaintrain.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, coco_backend
from plaintrain.evaluation.coco import compute_average_recall, compute_proposal_coverage
from plaintrain.utils.errors import UserError

_BOX = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_KEYPOINT = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
METRICS = {"bbox": _BOX, "segm": _BOX, "keypoints": _KEYPOINT}
INSTALLED = [name for name in coco_backend.BACKENDS if importlib.util.find_spec(name)]
FAST = [name for name in INSTALLED if name != "pycocotools"]
HEIGHT, WIDTH = 150, 200


def encode(mask):
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def register_difficult(path, kp=17, images=14, seed=0):
    """Register a COCO file with crowds, objects of all sizes, and images and classes without any."""
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
            x, y = box[:2]
            triangles = [[x, top, x + w, top, x + w / 2, top + h / 2.5] for top in (y, y + h / 2)]
            as_polygons = not crowd and rng.random() < 0.4
            mask = encode(make_mask(x, y, x + w, y + h, (HEIGHT, WIDTH), rng))
            annotation = {"bbox": box, "area": round(w * h * float(rng.uniform(0.4, 1)), 2), "iscrowd": crowd}
            annotation |= {"segmentation": triangles if as_polygons else mask, "keypoints": keypoints}
            annotation |= {"id": len(annotations) + 1, "num_keypoints": int((visible > 0).sum())}
            category_id = int(rng.choice([5, 2]))
            annotations.append({**annotation, "image_id": image_id, "category_id": category_id})
    names = [f"k{i}" for i in range(kp)]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in ids],
        "categories": [{"id": i, "name": f"c{i}", "keypoints": names, "skeleton": []} for i in (9, 5, 2)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content))
    register_coco_instances("difficult", {}, str(path), "nowhere")


def coco_results(outputs, category_ids):
    """The outputs in COCO's results format, written independently of what is tested."""
    results = []
    for image_id, output in outputs.items():
        for i, (x0, y0, x1, y1) in enumerate(output["boxes"].tolist()):
            keypoints = [[x - 0.5, y - 0.5, score] for x, y, score in output["keypoints"][i].tolist()]
            category_id, score = category_ids[int(output["labels"][i])], float(output["scores"][i])
            result = {"image_id": image_id, "category_id": category_id, "score": score}
            result |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "keypoints": sum(keypoints, [])}
            results.append({**result, "segmentation": encode(output["masks"][i].numpy())})
    return results


def run_pycocotools(json_file, results, task, image_ids, sigmas):
    """{metric: percent} of pycocotools on the original file."""
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
    metrics = dict(zip(METRICS[task], evaluation.stats, strict=True))
    for k, category in enumerate(evaluation.params.catIds if task != "keypoints" else ()):
        values = evaluation.eval["precision"][:, :, k, 0, -1]
        mean = values[values > -1].mean() if values.max() > -1 else -1
        metrics[f"AP-{truths.cats[category]['name']}"] = mean
    return {name: 100 * value if value > -1 else math.nan for name, value in metrics.items()}


@pytest.fixture
def difficult(tmp_path):
    """Name of the written dataset with 17 keypoints, and outputs for it."""
    register_difficult(tmp_path / "a.json")
    return "difficult", random_outputs("difficult")


def evaluate_by_all(evaluator, outputs):
    """The results, which are the same by every backend."""
    by_backend = []
    for evaluator.backend in INSTALLED:
        by_backend.append(evaluate(evaluator, outputs))
    assert all(repr(results) == repr(by_backend[0]) for results in by_backend)
    return by_backend[0]


@pytest.mark.parametrize(("seed", "kp", "sigmas"), [(0, 17, ()), (1, 4, (0.05, 0.1, 0.02, 0.08))])
def test_metrics_by_every_backend_are_those_of_pycocotools_on_the_file(tmp_path, seed, kp, sigmas):
    register_difficult(tmp_path / "a.json", kp, images=20, seed=seed)
    outputs = random_outputs("difficult", seed)
    # Neither images nor outputs are in the order of their ids, in which COCO breaks ties; one is missing.
    outputs = dict(list(outputs.items())[:0:-1])
    records, metadata = DatasetCatalog.get("difficult"), MetadataCatalog.get("difficult")
    ids = metadata.thing_dataset_id_to_contiguous_id
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records)).tolist()]
    name = add_dataset(shuffled, metadata.thing_classes, thing_dataset_id_to_contiguous_id=ids)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "new" / "folder"), kpt_oks_sigmas=sigmas)
    found, results = evaluate_by_all(evaluator, outputs), coco_results(outputs, [2, 5, 9])
    assert list(found) == list(METRICS)
    for task, metrics in found.items():
        expected = run_pycocotools(tmp_path / "a.json", results, task, outputs, sigmas)
        assert metrics == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert 5 < metrics["AP"] < 95
    # No object is of class 9.
    assert math.isnan(found["segm"]["AP-c9"])
    # The results file, in the order of the records.
    by_record = {r["image_id"]: outputs[r["image_id"]] for r in shuffled if r["image_id"] in outputs}
    written = json.loads((tmp_path / "new" / "folder" / "coco_instances_results.json").read_text())
    for ours, expected in zip(written, coco_results(by_record, [2, 5, 9]), strict=True):
        assert ours == {**expected, "keypoints": pytest.approx(expected["keypoints"])}


def test_the_fastest_installed_backend_is_used_and_logged(difficult, monkeypatch, log):
    log.set_level("DEBUG", "plaintrain")
    name, outputs = difficult
    assert COCOEvaluator(name, use_fast_impl=False).backend == "pycocotools"
    evaluate(COCOEvaluator(name, ["bbox"]), outputs)
    assert f"bbox is scored by {INSTALLED[0]}" in log.messages
    find = importlib.util.find_spec
    for missing, backend in (("hotcoco", "faster_coco_eval"), (FAST, "pycocotools")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, m=missing: None if n in m else find(n))
        assert COCOEvaluator(name).backend == backend


def rectangle(x0, y0, x1, y1):
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def make_outputs(boxes, masks=None, keypoints=None, labels=None):
    """A model's output; scores fall, labels are 0."""
    output = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.linspace(0.9, 0.5, len(boxes)),
        "labels": torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
    }
    if masks is not None:
        output["masks"] = torch.stack(masks) if masks else torch.zeros(0, 100, 100, dtype=torch.bool)
    if keypoints is not None:
        points = torch.tensor(keypoints, dtype=torch.float32)
        output["keypoints"] = points.reshape(len(boxes), -1 if boxes else 2, 3)
    return output


SQUARE = [10, 10, 50, 50]
POINTS = [20.0, 20.0, 2, 40.0, 30.0, 1]
MASK = rectangle(*SQUARE)
PARTS = {"segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]], "keypoints": POINTS}
FULL = make_annotation(SQUARE, **PARTS)
# What the backends might not do alike: records, outputs.
EDGE_CASES = {
    "no ground truth": ([make_record(1), make_record(2)], {1: make_outputs([SQUARE], [MASK], [POINTS])}),
    "no detection": ([make_record(1, FULL)], {1: make_outputs([], [], [])}),
    "only crowds": (
        [make_record(1, FULL | {"iscrowd": 1})],
        {1: make_outputs([SQUARE] * 2, [MASK] * 2, [POINTS] * 2)},
    ),
    "an empty class, no area, no keypoints for some": (
        [
            make_record(0, FULL | {"category_id": 1}, make_annotation([0, 60, 90, 90], 1, keypoints=POINTS)),
            make_record(7, FULL | {"category_id": 1, "keypoints": [0.0] * 6}),
        ],
        {i: make_outputs([SQUARE, [0, 60, 90, 91]], [MASK] * 2, [POINTS] * 2, [1, 1]) for i in (0, 7)},
    ),
    "more detections than count": (
        [make_record(1, FULL)],
        {1: make_outputs([[60, 60, 90, 90]] * 299 + [SQUARE], [MASK] * 300, [POINTS] * 300)},
    ),
    "empty masks and boxes": (
        [make_record(1, FULL, make_annotation([5, 5, 5, 5]))],
        {1: make_outputs([[3, 3, 3, 3], SQUARE], [rectangle(0, 0, 0, 0), MASK], [POINTS] * 2)},
    ),
}


@pytest.mark.parametrize("case", EDGE_CASES)
def test_all_backends_agree_where_something_is_missing(case):
    records, outputs = EDGE_CASES[case]
    evaluator = COCOEvaluator(add_dataset(records), kpt_oks_sigmas=(0.1, 0.1))
    found = evaluate_by_all(evaluator, outputs)
    assert list(found) == ["bbox", "segm", "keypoints"]
    # Without objects an AP is NaN, with some that were missed it is 0.
    expected = {"no ground truth": math.nan, "only crowds": math.nan, "no detection": 0}
    if case in expected:
        assert found["bbox"]["AP"] == pytest.approx(expected[case], nan_ok=True)


def test_image_ids_may_be_names(tmp_path):
    boxes = {"b": [0, 0, 10, 10], "a": [5, 5, 50, 60], "c": [1, 1, 30, 30]}
    name = add_dataset([make_record(key, make_annotation(box)) for key, box in boxes.items()])
    outputs = {key: make_outputs([boxes[key]]) for key in "abc"}
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path))
    assert evaluate_by_all(evaluator, outputs)["bbox"]["AP"] == pytest.approx(100.0)
    rows = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {row["image_id"]: row["bbox"][2:] for row in rows} == {"b": [10, 10], "a": [45, 55], "c": [29, 29]}


def test_the_area_is_that_of_the_annotation_its_mask_or_its_box():
    # A box of 100 x 100 is large; its mask has 40 x 40 pixels.
    box = [0, 0, 100, 100]
    bad = {"segmentation": [[1, 2, 3, 4]]}
    for entries, size in (({**PARTS, "area": 500.0}, "s"), (PARTS, "m"), ({}, "l"), (bad, "l")):
        name = add_dataset([make_record(1, make_annotation(box, **entries))])
        metrics = evaluate(COCOEvaluator(name), {1: make_outputs([box])})["bbox"]
        assert [s for s in "sml" if not math.isnan(metrics[f"AP{s}"])] == [size]


def test_tasks_are_those_asked_for_without_what_the_dataset_does_not_have(log):
    name = add_dataset([make_record(1, make_annotation(SQUARE))])
    output = make_outputs([SQUARE], [MASK], [POINTS])
    assert list(evaluate(COCOEvaluator(name), {1: output})) == ["bbox"]
    warnings = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert [warning.split()[1] for warning in warnings] == ["segm:", "keypoints:"]
    voc = evaluate(PascalVOCDetectionEvaluator(name), {1: {**output, "masks": torch.zeros(1, 3, 3)}})
    assert voc["bbox"]["AP50"] == 100.0
    # Nor are tasks that nobody asks for.
    name = add_dataset([make_record(1, FULL)])
    for tasks in (["segm"], ["bbox", "box_proposals"]):
        assert list(evaluate(COCOEvaluator(name, tasks[::-1]), {1: output})) == tasks


def test_objects_without_a_mask_or_labelled_keypoints_are_ignored_not_missed():
    blank = make_annotation([60, 60, 90, 90], keypoints=[0.0] * 6)
    name = add_dataset([make_record(1, FULL, blank)])
    output = make_outputs(
        [[60, 60, 90, 90], SQUARE],
        [rectangle(61, 61, 88, 89), MASK],
        [[70.0, 70.0, 1, 80.0, 80.0, 1], POINTS],
    )
    results = evaluate(COCOEvaluator(name, kpt_oks_sigmas=(0.1, 0.1)), {1: output})
    assert results["segm"]["AP"] == results["keypoints"]["AP"] == results["keypoints"]["AR"] == 100.0


@pytest.mark.parametrize(
    ("sigmas", "kp", "words"),
    [((), 4, "default is for 17"), ((0.1,) * 3, 4, "got \\[0.1, 0.1, 0.1\\]"), ((0.1, 0.0), 2, "positive")],
)
def test_a_wrong_number_of_sigmas_is_rejected(sigmas, kp, words):
    name = add_dataset([make_record(1, make_annotation(SQUARE, keypoints=[20.0, 20.0, 2] * kp))])
    message = f"TEST.KEYPOINT_OKS_SIGMAS must be {kp} positive numbers.*{words}|{words}"
    with pytest.raises(UserError, match=message):
        COCOEvaluator(name, ["bbox", "keypoints"], kpt_oks_sigmas=sigmas)
    with pytest.raises(UserError, match=message):
        output = make_outputs([SQUARE], keypoints=[[20.0, 20.0, 2] * kp])
        evaluate(COCOEvaluator(name, kpt_oks_sigmas=sigmas), {1: output})


TASKS = "bbox, segm, keypoints, box_proposals"
NO_MASK, ONLY_BOX = make_outputs([SQUARE]), make_annotation(SQUARE)
SMALL_MASK = make_outputs([SQUARE], [MASK[:50]])
THREE_POINTS = make_outputs([SQUARE], keypoints=[[20.0, 20.0, 2] * 3])
BROKEN = make_annotation(SQUARE, segmentation=[[1, 2, 3, 4]])
# tasks, annotation, outputs, words of the error; without outputs it is raised before an evaluation.
MISTAKES = {
    "an unknown task": (("bbox", "panoptic"), FULL, [], TASKS),
    "no task": ((), FULL, [], TASKS),
    "no annotations": (["segm"], ONLY_BOX, [], "segm cannot be scored: .*detections_"),
    "a small mask": (None, FULL, [SMALL_MASK], r"image 1 .*\(100, 100\).*\(50, 100\)"),
    "some masks": (None, FULL, [make_outputs([SQUARE], [MASK]), NO_MASK], "2 .* must have masks, got 1"),
    "no masks": (["segm"], FULL, [NO_MASK], "segm needs masks"),
    "a broken polygon": (["segm"], BROKEN, [make_outputs([SQUARE], [MASK])], "image 1 .*polygon"),
    "other keypoints": (None, FULL, [THREE_POINTS], "predict the 2 keypoints of .*, got 3"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_tasks_and_outputs_that_cannot_be_scored_are_rejected(case):
    tasks, annotation, outputs, words = MISTAKES[case]
    name = add_dataset([make_record(1, annotation), make_record(2)])
    with pytest.raises(UserError, match=words):
        evaluator = COCOEvaluator(name, tasks, kpt_oks_sigmas=(0.1, 0.1))
        if outputs:
            evaluate(evaluator, dict(enumerate(outputs, start=1)))


def test_two_processes_gather_masks_as_rle_and_score_as_one(tmp_path, difficult):
    name, outputs = difficult
    alone = evaluate(COCOEvaluator(name), outputs)
    torch.save(outputs, tmp_path / "outputs.pt")
    job = Job(evaluate_a_part, tmp_path / "job", num_gpus_per_machine=2).wait(code=0)
    facts = job.results()
    assert facts[1]["results"] is None
    assert repr(facts[0]["results"]) == repr(alone)
    bitmaps = sum(output["masks"].numel() for output in outputs.values())
    assert facts[0]["mask_bytes"] + facts[1]["mask_bytes"] < bitmaps / 4
    assert facts[0]["kinds"] == facts[1]["kinds"] == ["list", "ndarray", "set"]


@pytest.mark.parametrize("evaluator_class", [COCOEvaluator, PascalVOCDetectionEvaluator])
def test_a_rank_without_images_or_masks_changes_nothing(difficult, monkeypatch, evaluator_class):
    name, outputs = difficult
    evaluator, idle, sent = evaluator_class(name), evaluator_class(name), []
    alone = evaluate(evaluator, outputs)
    monkeypatch.setattr("plaintrain.utils.comm.gather", lambda data: sent.append(data))
    monkeypatch.setattr("plaintrain.utils.comm.is_main_process", lambda: False)
    assert evaluator.evaluate() is None
    assert repr(evaluate(evaluator_class(name, distributed=False), outputs)) == repr(alone)
    monkeypatch.setattr("plaintrain.utils.comm.gather", lambda data: [data, *sent])
    monkeypatch.setattr("plaintrain.utils.comm.is_main_process", lambda: True)
    # The rank that scores has seen nothing.
    assert repr(idle.evaluate()) == repr(alone)


def test_coverage_and_average_recall_by_hand():
    # The second proposal is best for both objects; the first object is left with the first proposal.
    assert sorted(compute_proposal_coverage(np.array([[0.5, 0.3], [0.6, 0.8], [0.1, 0.2]]))) == [0.5, 0.8]
    # More objects than proposals.
    assert sorted(compute_proposal_coverage(np.array([[0.5, 0.3, 0.9]]))) == [0.0, 0.0, 0.9]
    assert compute_proposal_coverage(np.zeros((0, 2))).tolist() == [0.0, 0.0]
    boxes = np.array([[0.0, 0, 20, 20], [100, 100, 150, 150]])
    objects = np.array([[0.0, 0, 20, 20], [100, 100, 150, 136], [300, 300, 500, 500]])
    areas = np.array([400.0, 1800.0, 40000.0])
    metrics = compute_average_recall([(boxes, objects, areas)])
    assert list(metrics) == [f"AR{size}@{limit}" for limit in (100, 1000) for size in ("", "s", "m", "l")]
    # IoUs are 1, 0.72 (above 0.50 to 0.70) and 0.
    assert [metrics[f"AR{size}@100"] for size in ("s", "m", "l", "")] == pytest.approx([100, 50, 0, 50])
    # The hit is the 101st.
    far = np.tile([900.0, 900, 950, 950], (100, 1))
    metrics = compute_average_recall([(np.concatenate([far, boxes[:1]]), objects[:1], areas[:1])])
    assert metrics["AR@100"] == 0.0 and metrics["AR@1000"] == 100.0
    assert math.isnan(metrics["ARl@100"])


def test_proposals_are_scored_by_score_whatever_their_class_and_without_crowds(tmp_path):
    crowd = make_annotation([60, 60, 90, 90], iscrowd=1)
    name = add_dataset(
        [make_record(1, make_annotation(SQUARE, 1), crowd), make_record(2, make_annotation(SQUARE, 0))]
    )
    evaluator = COCOEvaluator(name, ("box_proposals",), output_dir=str(tmp_path / "none"))
    # Worst first: sorted by score, the hit is among the first hundred.
    output = make_outputs([[0, 0, 5, 5]] * 100 + [SQUARE])
    output["scores"] = output["scores"].flip(0)
    results = evaluate(evaluator, {1: output, 2: make_outputs([])})
    assert list(results) == ["box_proposals"]
    assert results["box_proposals"]["AR@100"] == pytest.approx(50.0)
    assert math.isnan(results["box_proposals"]["ARl@1000"])
    assert not (tmp_path / "none").exists()
