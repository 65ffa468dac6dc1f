"""Evaluators that process batches while the model computes the next: plaintrain.evaluation.background."""

import threading
import time

import pytest
import torch
from detection_helpers import add_dataset, make_annotation
from model_helpers import ARCHITECTURES, build, make_sample, randomize_predictions
from torch import nn

from plaintrain.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    loop,
)
from plaintrain.masks import BoxMasks, encode_masks
from plaintrain.utils.errors import UserError


class Model(nn.Module):
    """Returns the number of each image; `pastes` is `pastes_masks` at each call."""

    pastes_masks = True

    def __init__(self, fails_at=None):
        super().__init__()
        self.pastes, self.fails_at = [], fails_at

    def forward(self, samples):
        self.pastes.append(self.pastes_masks)
        if len(self.pastes) == self.fails_at:
            raise ZeroDivisionError
        return [{"found": torch.tensor(sample), "name": "x"} for sample in samples]


class Recorder(DatasetEvaluator):
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


class Own(Recorder):
    """Has its own `process`, and does not say that it may be called in another thread."""

    def process(self, inputs, outputs):
        super().process(inputs, outputs)


BATCHES = [[1, 2], [3], [4, 5], [6], [7], [8]]


def test_batches_are_processed_in_order_by_one_other_thread_which_ends():
    model, recorders = Model(), [Recorder(), Recorder()]
    assert inference_on_dataset(model, BATCHES, recorders) == {}
    for recorder in recorders:
        assert recorder.calls == [(batch, batch, "x") for batch in BATCHES]
    ((thread, has_grad, num_threads),) = set(recorders[0].threads + recorders[1].threads)
    assert thread is not threading.current_thread() and not thread.is_alive()
    assert (has_grad, num_threads) == (False, 1)
    assert model.pastes == [False] * 6 and model.pastes_masks


@pytest.mark.parametrize(
    "make",
    [Own, lambda: DatasetEvaluators([Own(), Recorder()])],
    ids=["alone", "one of several"],
)
def test_an_evaluator_with_its_own_process_is_called_by_the_loop_itself(make):
    model, evaluator = Model(), make()
    inference_on_dataset(model, BATCHES, evaluator)
    for member in getattr(evaluator, "_evaluators", [evaluator]):
        assert {thread for thread, *_ in member.threads} == {threading.current_thread()}
        assert [inputs for inputs, *_ in member.calls] == BATCHES
    assert model.pastes == [True] * 6


def test_the_model_is_at_most_three_batches_ahead():
    recorder, ahead = Recorder(seconds=0.02), []

    class Ahead(Model):
        def forward(self, samples):
            ahead.append(len(self.pastes) + 1 - len(recorder.calls))
            return super().forward(samples)

    inference_on_dataset(Ahead(), BATCHES * 2, recorder)
    assert max(ahead) == 3 and len(recorder.calls) == 12


# The error of the last batch comes after the last call of the model.
@pytest.mark.parametrize("fails_at", [2, 6])
def test_an_error_of_process_is_raised_by_the_loop(fails_at):
    model, recorder = Model(), Recorder(fails_at)
    with pytest.raises(ValueError, match="no such image"):
        inference_on_dataset(model, BATCHES, recorder)
    assert not recorder.threads[0][0].is_alive()
    assert len(recorder.calls) < 6 or fails_at == 6
    assert model.pastes_masks


def test_a_stop_or_an_error_of_the_model_ends_the_thread(monkeypatch):
    def stop():
        raise SystemExit(143)

    model, recorder = Model(fails_at=3), Recorder()
    with pytest.raises(ZeroDivisionError):
        inference_on_dataset(model, BATCHES, recorder)
    assert not recorder.threads[0][0].is_alive() and len(recorder.calls) <= 2
    assert model.pastes_masks
    model, recorder = Model(), Recorder()
    monkeypatch.setattr(loop, "is_requested", lambda: len(model.pastes) == 2)
    monkeypatch.setattr(loop, "end_evaluation_if_requested", stop)
    with pytest.raises(SystemExit):
        inference_on_dataset(model, BATCHES, recorder)
    assert not recorder.threads[0][0].is_alive() and len(recorder.calls) == 2


@pytest.fixture
def dataset():
    """Four images of 64 x 96, named 0 to 3, with an object each."""
    polygon = [10, 10, 50, 10, 50, 50, 10, 50]
    annotation = make_annotation([10, 10, 50, 50], segmentation=[polygon], keypoints=[20, 20, 2] * 4)
    record = {"file_name": "", "height": 64, "width": 96, "annotations": [annotation]}
    return add_dataset([{**record, "image_id": i} for i in range(4)], "abc")


class Kept(COCOEvaluator):
    """Keeps the detections that it would score."""

    def score(self, detections):
        self.detections = detections
        return {}


def test_masks_of_mask_rcnn_are_those_that_its_users_get(dataset):
    model = build(*ARCHITECTURES["mask_keypoint_rcnn"], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    randomize_predictions(model)
    loader = [[make_sample(64, 96, seed=i) for i in pair] for pair in ((2, 0), (3, 1))]
    evaluator = Kept(dataset, kpt_oks_sigmas=[0.1] * 4)
    inference_on_dataset(model, loader, evaluator)
    detections = evaluator.detections
    with torch.no_grad():
        by_image = {
            s["image_id"]: o for batch in loader for s, o in zip(batch, model.eval()(batch), strict=True)
        }
    outputs = [by_image[i] for i in range(4)]
    assert all(output["masks"].dtype == torch.bool and len(output["masks"]) > 5 for output in outputs)
    assert detections.masks == [counts for output in outputs for counts in encode_masks(output["masks"])]
    assert detections.rows[:, 1:5].tolist() == torch.cat([o["boxes"] for o in outputs]).double().tolist()
    assert detections.keypoints.tolist() == torch.cat([o["keypoints"] for o in outputs]).double().tolist()
    # Masks of pixels, as another model returns them, are accepted as well.
    evaluator.reset()
    evaluator.process([{"image_id": i} for i in range(4)], outputs)
    evaluator.evaluate()
    assert evaluator.detections.masks == detections.masks


def test_an_image_whose_masks_cannot_be_encoded_is_named(dataset):
    output = {"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.zeros(1)}
    wrong = BoxMasks(torch.ones(1, 1, 4, 4), torch.zeros(1, 4), 64, 90)
    evaluator = COCOEvaluator(dataset, ["bbox", "segm"])
    message = r"masks of image 2 in .* are \(64, 90\), but the image is \(64, 96\)"
    with pytest.raises(UserError, match=message):
        evaluator.process([{"image_id": 2}], [{**output, "masks": wrong}])
    broken = {**output, "masks": BoxMasks(None, torch.zeros(1, 4), 64, 96)}
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is, the image is named
        evaluator.process([{"image_id": 3}], [broken])
    assert error.value.__notes__ == ["while taking in what was found in image 3"]
