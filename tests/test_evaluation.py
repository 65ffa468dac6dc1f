"""Evaluators, Pascal VOC's metric, the loop that runs them, and its thread: plaintrain.evaluation."""

import math
import threading
import time
from unittest import mock

import pytest
import torch
from detection_helpers import add_dataset, evaluate, make_annotation, make_output, make_record
from model_helpers import ARCHITECTURES, build, make_sample, randomize_predictions
from torch import nn

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
from plaintrain.evaluation import evaluator as loop
from plaintrain.structures import BoxMasks, encode_masks
from plaintrain.utils.errors import UserError

A, B, FAR = [0, 0, 20, 20], [10, 10, 50, 50], [60, 60, 90, 90]


def test_images_processed_since_reset_are_scored_and_missing_and_repeated_ones_warned_about(log):
    name = add_dataset([make_record(i, make_annotation(B)) for i in range(4)])
    perfect = make_output((B, 0.9, 0))
    evaluator = COCOEvaluator(name)
    evaluate(evaluator, dict.fromkeys(range(4), perfect))
    assert "images of" not in log.text
    evaluate(evaluator, dict.fromkeys(range(3), perfect))
    assert f"only 3 of 4 images of {name} were processed" in log.text
    log.clear()
    evaluate(evaluator, dict.fromkeys(range(4), perfect))
    evaluator.process([{"image_id": 2}], [perfect])
    evaluator.evaluate()
    assert f"1 images of {name} were processed more than once" in log.text and "only" not in log.text
    # Only what was processed since the reset counts.
    assert evaluate(evaluator, {3: perfect})["bbox"]["AP"] == pytest.approx(100.0)
    assert evaluate(evaluator, {2: make_output()})["bbox"]["AP"] == 0.0


@pytest.mark.parametrize("evaluator_class", [COCOEvaluator, PascalVOCDetectionEvaluator])
def test_images_and_labels_of_another_dataset_are_rejected(evaluator_class):
    name = add_dataset([make_record("a", make_annotation(B))])
    evaluator = evaluator_class(name)
    with pytest.raises(UserError, match=f"{name} has no image 'b'"):
        evaluator.process([{"image_id": "b"}], [make_output()])
    for label in (2, -1):
        with pytest.raises(UserError, match=f"must be 0 to 1, the classes of {name}, got {label}"):
            evaluator.process([{"image_id": "a"}], [make_output((B, 0.9, label))])
        wrong = add_dataset([make_record(7, make_annotation(B, label))])
        with pytest.raises(UserError, match=f"image 7 of {wrong} has category_id {label}, but .* 0 to 1"):
            evaluator_class(wrong)
    twice = add_dataset([make_record(1), make_record(1)])
    with pytest.raises(UserError, match=f"image_id must be unique in the dataset {twice}"):
        evaluator_class(twice)


class SinglePrecision(torch.Tensor):
    """A tensor on a device that has no float64, such as Apple's."""

    def double(self):
        raise TypeError("this device has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_outputs_may_be_on_a_device_without_float64():
    name = add_dataset([make_record(0, make_annotation(B, keypoints=[20.5, 20.5, 2]))])
    output = make_output((B, 0.9, 0)) | {"keypoints": torch.tensor([[[20.5, 20.5, 1.0]]])}
    output = {key: value.as_subclass(SinglePrecision) for key, value in output.items()}
    results = evaluate(COCOEvaluator(name, kpt_oks_sigmas=[0.05]), {0: output})
    assert results["keypoints"]["AP"] == pytest.approx(100)


def score_voc(records, outputs, classes=("cat",), metadata=None, **kwargs):
    name = add_dataset(records, classes, **(metadata or {}))
    return evaluate(PascalVOCDetectionEvaluator(name, **kwargs), outputs)["bbox"]


X_AND_Y = [make_record("x", make_annotation(A)), make_record("y", make_annotation(B))]
HITS = {"x": make_output((B, 0.95, 0), (B, 0.94, 0), (A, 0.5, 0))}
ONLY_A = {"x": make_output((A, 0.5, 0))}


def a_and(*boxes, **entries):
    others = [make_annotation(box, **entries) for box in boxes]
    return [make_record("x", make_annotation(A), *others)]


A_AND_B = {"x": make_output((A, 0.9, 0)), "y": make_output((B, 0.3, 0))}
MISS = {"x": make_output((FAR, 0.8, 0), (A, 0.9, 0)), "y": make_output((B, 0.7, 0))}
DUPLICATE = {"x": make_output((A, 0.9, 0), ([0, 0, 20, 19], 0.8, 0)), "y": make_output((B, 0.7, 0))}
# records, outputs, AP50 of the one class
VOC_CASES = {
    "perfect": (X_AND_Y, A_AND_B, 100),
    "a miss between hits": (X_AND_Y, MISS, 100 * 5 / 6),
    "a duplicate is a miss": (X_AND_Y, DUPLICATE, 100 * 5 / 6),
    "the highest IoU is claimed": (a_and([0, 0, 20, 18]), {"x": make_output((A, 0.9, 0), (A, 0.8, 0))}, 50),
    "two detections of a difficult object": (a_and(B, difficult=1), HITS, 100),
    "two detections of a crowd": (a_and(B, iscrowd=1), HITS, 100),
    "two detections of a plain object": (a_and(B), HITS, 100 * 5 / 6),
    "a missed difficult object": (a_and(B, difficult=1), ONLY_A, 100),
    "an IoU of the threshold is not enough": (a_and(), {"x": make_output(([0, 0, 20, 10], 0.9, 0))}, 0),
    "an IoU above the threshold": (a_and(), {"x": make_output(([0, 0, 20, 10.01], 0.9, 0))}, 100),
    "nothing to detect": ([make_record("x")], ONLY_A, math.nan),
}


@pytest.mark.parametrize("case", VOC_CASES)
def test_voc_ap50_by_hand(case):
    records, outputs, expected = VOC_CASES[case]
    assert score_voc(records, outputs)["AP50"] == pytest.approx(expected, nan_ok=True)


def test_voc_scores_classes_and_images_apart():
    records = [
        make_record("x", make_annotation(A, 0)),
        make_record("y", make_annotation(B, 1), make_annotation(FAR, 2, difficult=1)),
    ]
    outputs = {"x": make_output((A, 0.9, 1)), "y": make_output((A, 0.9, 0), (B, 0.9, 1), (FAR, 0.8, 3))}
    metrics = score_voc(records, outputs, ("cat", "dog", "cow", "emu"))
    assert metrics["AP50-cat"] == 0.0
    # Of two detections with one score the one of the first image counts first.
    assert metrics["AP50-dog"] == pytest.approx(50.0)
    # Classes without objects that count are no part of the mean.
    assert math.isnan(metrics["AP50-cow"]) and math.isnan(metrics["AP50-emu"])
    assert metrics["AP50"] == pytest.approx(25.0)


def test_voc_ap_is_the_mean_over_ious_and_that_of_2007_has_its_own_formula():
    # IoU 0.72 exceeds 0.50, 0.55, 0.60, 0.65 and 0.70.
    metrics = score_voc(a_and(), {"x": make_output(([0, 0, 20, 14.4], 0.9, 0))})
    assert [metrics[key] for key in ("AP", "AP50", "AP75")] == pytest.approx([50.0, 100.0, 0.0])
    in_2007, usual = 100 * (6 + 10 / 3) / 11, 100 * 5 / 6
    for metadata, options, expected in (
        ({"year": 2007}, {}, in_2007),
        ({}, {"use_07_metric": True}, in_2007),
        ({"year": 2012}, {}, usual),
        ({"year": 2007}, {"use_07_metric": False}, usual),
    ):
        metrics = score_voc(X_AND_Y, MISS, metadata=metadata, **options)
        assert metrics["AP50"] == pytest.approx(expected)


def make_recorder(results=None):
    """An evaluator that records its calls."""
    recorder = mock.Mock(spec=DatasetEvaluator)
    recorder.evaluate.return_value = results
    return recorder


class Numbers(nn.Module):
    """Returns the number of each image; `seen` and `pastes` hold modes and `pastes_masks` of each call."""

    pastes_masks = True

    def __init__(self, fails_at=None):
        super().__init__()
        self.frozen, self.trained = nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2))
        self.seen, self.pastes, self.fails_at = [], [], fails_at
        self.train()
        self.frozen.eval()

    def forward(self, samples):
        self.seen.append((any(m.training for m in self.modules()), torch.is_grad_enabled()))
        self.pastes.append(self.pastes_masks)
        if len(self.pastes) == self.fails_at:
            raise ZeroDivisionError
        return [{"found": torch.tensor(sample), "name": "x"} for sample in samples]

    def modes(self):
        return [self.training, self.frozen.training, self.trained.training, self.trained[0].training]


def test_inference_processes_every_batch_in_order_in_evaluation_mode_without_gradients():
    model, recorder = Numbers(), make_recorder({"bbox": {"AP": 1.0}})
    assert inference_on_dataset(model, [[1, 2], [3]], recorder) == {"bbox": {"AP": 1.0}}
    one, two, three = ({"found": torch.tensor(number), "name": "x"} for number in (1, 2, 3))
    processed = [mock.call.process([1, 2], [one, two]), mock.call.process([3], [three])]
    assert recorder.mock_calls == [mock.call.reset(), *processed, mock.call.evaluate()]
    assert model.seen == [(False, False)] * 2
    assert model.modes() == [True, False, True, True]
    assert inference_on_dataset(model.eval(), [[1]], None) == {}
    assert len(model.seen) == 3 and model.modes() == [False] * 4
    # The modes are restored after an error, too.
    for where in ("model", "process", "evaluate"):
        model, recorder = Numbers(fails_at=1 if where == "model" else None), make_recorder()
        recorder.process.side_effect = ZeroDivisionError if where == "process" else None
        recorder.evaluate.side_effect = ZeroDivisionError
        with pytest.raises(ZeroDivisionError):
            inference_on_dataset(model, [[1]], recorder)
        assert model.modes() == [True, False, True, True]
        assert torch.is_grad_enabled()


def test_several_evaluators_work_as_one():
    first, second = make_recorder({"bbox": {"AP": 1.0}}), make_recorder({"mine": {"x": 2.0}})
    results = inference_on_dataset(Numbers(), [[1]], [first, second, make_recorder()])
    assert results == {"bbox": {"AP": 1.0}, "mine": {"x": 2.0}}
    assert [name for name, *_ in first.mock_calls] == ["reset", "process", "evaluate"]
    assert first.mock_calls == second.mock_calls
    with pytest.raises(ValueError, match="bbox"):
        DatasetEvaluators([first, make_recorder({"bbox": {}})]).evaluate()


def test_results_are_flattened_and_logged_as_csv(log):
    nested = {"coco_val": {"bbox": {"AP": 1.0, "AP-cat": 2.0}}, "loss": 3.0, "empty": {}}
    assert flatten_results(nested) == {"coco_val/bbox/AP": 1.0, "coco_val/bbox/AP-cat": 2.0, "loss": 3.0}
    print_csv_format({"bbox": {"AP": 12.34567, "AP50": float("nan"), "AP-cat": 99.0}})
    assert log.messages == ["copypaste: Task: bbox", "copypaste: AP,AP50", "copypaste: 12.3457,nan"]


def test_expected_results_fail_if_they_differ_are_missing_or_nan():
    results = {"bbox": {"AP": 37.4, "AP50": 60.0, "APl": float("nan")}}
    good = [["bbox", "AP", 37.0, 0.5], ["bbox", "AP50", 60.0, 0.0]]
    verify_results(good, results)
    wrong = {
        "bbox/AP is 37.4": ["bbox", "AP", 37.8, 0.3],
        "bbox/AP50 is 60.0": ["bbox", "AP50", 59.0, 0.9],
        "bbox/APl is nan": ["bbox", "APl", 37.0, 100.0],
        "bbox/AP99 is None": ["bbox", "AP99", 37.0, 100.0],
        "segm/AP is None": ["segm", "AP", 37.0, 100.0],
    }
    with pytest.raises(UserError) as error:
        verify_results([*good, *wrong.values()], results)
    assert all(words in str(error.value) for words in wrong)
    assert str(error.value).count("expected") == len(wrong)


class InBackground(DatasetEvaluator):
    """Records its batches, and the thread that it is called in."""

    in_background = True

    def __init__(self, fails_at=None, seconds=0):
        self.calls, self.threads, self.fails_at, self.seconds = [], [], fails_at, seconds

    def process(self, inputs, outputs):
        time.sleep(self.seconds)
        self.threads.append((threading.current_thread(), torch.is_grad_enabled(), torch.get_num_threads()))
        self.calls.append((inputs, [output["found"].item() for output in outputs], outputs[0]["name"]))
        if len(self.calls) == self.fails_at:
            raise ValueError("no such image")


class Own(InBackground):
    """Has its own `process`, and does not say that it may be called in another thread."""

    def process(self, inputs, outputs):
        super().process(inputs, outputs)


BATCHES = [[1, 2], [3], [4, 5], [6], [7], [8]]


def test_batches_are_processed_in_order_by_one_other_thread_which_ends():
    model, recorders = Numbers(), [InBackground(), InBackground()]
    assert inference_on_dataset(model, BATCHES, recorders) == {}
    for recorder in recorders:
        assert recorder.calls == [(batch, batch, "x") for batch in BATCHES]
    ((thread, has_grad, num_threads),) = set(recorders[0].threads + recorders[1].threads)
    assert thread is not threading.current_thread() and not thread.is_alive()
    assert (has_grad, num_threads) == (False, 1)
    assert model.pastes == [False] * 6 and model.pastes_masks


@pytest.mark.parametrize("others", [[], [InBackground]])
def test_an_evaluator_with_its_own_process_is_called_by_the_loop_itself(others):
    model, evaluators = Numbers(), [Own(), *(make() for make in others)]
    inference_on_dataset(model, BATCHES, evaluators if others else evaluators[0])
    for evaluator in evaluators:
        assert {thread for thread, *_ in evaluator.threads} == {threading.current_thread()}
        assert [inputs for inputs, *_ in evaluator.calls] == BATCHES
    assert model.pastes == [True] * 6


def test_the_model_is_at_most_three_batches_ahead():
    recorder, ahead = InBackground(seconds=0.02), []

    class Ahead(Numbers):
        def forward(self, samples):
            ahead.append(len(self.pastes) + 1 - len(recorder.calls))
            return super().forward(samples)

    inference_on_dataset(Ahead(), BATCHES * 2, recorder)
    assert max(ahead) == 3 and len(recorder.calls) == 12


def test_a_stop_or_an_error_of_either_ends_the_thread(monkeypatch):
    def stop():
        raise SystemExit(143)

    # The error of the last batch comes after the last call of the model.
    for fails_at in (2, 6):
        model, recorder = Numbers(), InBackground(fails_at)
        with pytest.raises(ValueError, match="no such image"):
            inference_on_dataset(model, BATCHES, recorder)
        assert not recorder.threads[0][0].is_alive()
        assert len(recorder.calls) < 6 or fails_at == 6
        assert model.pastes_masks
    model, recorder = Numbers(fails_at=3), InBackground()
    with pytest.raises(ZeroDivisionError):
        inference_on_dataset(model, BATCHES, recorder)
    assert not recorder.threads[0][0].is_alive() and len(recorder.calls) <= 2
    assert model.pastes_masks
    model, recorder = Numbers(), InBackground()
    monkeypatch.setattr(loop, "is_requested", lambda: len(model.pastes) == 2)
    monkeypatch.setattr(loop, "end_evaluation_if_requested", stop)
    with pytest.raises(SystemExit):
        inference_on_dataset(model, BATCHES, recorder)
    assert not recorder.threads[0][0].is_alive() and len(recorder.calls) == 2


@pytest.fixture
def wide_images():
    """Four images of 64 x 96, named 0 to 3, with an object each."""
    polygon = [10, 10, 50, 10, 50, 50, 10, 50]
    annotation = make_annotation([10, 10, 50, 50], segmentation=[polygon], keypoints=[20, 20, 2] * 4)
    record = {"file_name": "", "height": 64, "width": 96, "annotations": [annotation]}
    return add_dataset([{**record, "image_id": i} for i in range(4)], "abc")


def test_masks_of_mask_rcnn_are_those_that_its_users_get(wide_images):
    model = build(*ARCHITECTURES["mask_keypoint_rcnn"], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    randomize_predictions(model)
    loader = [[make_sample(64, 96, seed=i) for i in pair] for pair in ((2, 0), (3, 1))]
    evaluator, scored = COCOEvaluator(wide_images, kpt_oks_sigmas=[0.1] * 4), []
    evaluator.score = lambda detections: scored.append(detections)
    inference_on_dataset(model, loader, evaluator)
    (detections,) = scored
    with torch.no_grad():
        by_image = {
            s["image_id"]: o for batch in loader for s, o in zip(batch, model.eval()(batch), strict=True)
        }
    outputs = [by_image[i] for i in range(4)]
    assert all(output["masks"].dtype == torch.bool and len(output["masks"]) > 5 for output in outputs)
    assert detections.masks == [counts for output in outputs for counts in encode_masks(output["masks"])]
    assert detections.table[:, 1:5].tolist() == torch.cat([o["boxes"] for o in outputs]).double().tolist()
    assert detections.keypoints.tolist() == torch.cat([o["keypoints"] for o in outputs]).double().tolist()
    # Masks of pixels, as another model returns them, are accepted as well.
    evaluator.reset()
    evaluator.process([{"image_id": i} for i in range(4)], outputs)
    evaluator.evaluate()
    assert scored[1].masks == detections.masks


def test_an_image_whose_masks_cannot_be_encoded_is_named(wide_images):
    output = {"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.zeros(1)}
    broken = {**output, "masks": BoxMasks(None, torch.zeros(1, 4), 64, 96)}
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is, the image is named
        COCOEvaluator(wide_images, ["bbox", "segm"]).process([{"image_id": 3}], [broken])
    assert error.value.__notes__ == ["while processing the detections of image 3"]
