"""What an evaluator does while the model goes on: plaintrain.evaluation.background."""

import threading
import time

import pytest
import torch
from model_helpers import ARCHITECTURES, build, make_sample, randomize_predictions
from torch import nn

from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    loop,
)
from plaintrain.masks import BoxMasks, encode_masks
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

torch.set_num_threads(1)


class Model(nn.Module):
    """Finds in image i the number i; `pastes` is what it was told of masks at each call."""

    pastes_masks = True

    def __init__(self):
        super().__init__()
        self.pastes, self.fails_at = [], None

    def forward(self, samples):
        self.pastes.append(self.pastes_masks)
        if len(self.pastes) == self.fails_at:
            raise ZeroDivisionError
        return [{"found": torch.tensor(sample), "name": "x"} for sample in samples]


class Recorder(DatasetEvaluator):
    """Keeps what it is given, and the thread that gave it."""

    in_background = True

    def __init__(self):
        self.calls, self.threads, self.seconds, self.fails_at = [], [], 0, None

    def process(self, inputs, outputs):
        time.sleep(self.seconds)
        self.threads.append((threading.current_thread(), torch.is_grad_enabled(), torch.get_num_threads()))
        self.calls.append((inputs, [output["found"].item() for output in outputs], outputs[0]["name"]))
        if len(self.calls) == self.fails_at:
            raise ValueError("no such image")

    def evaluate(self):
        return {"bbox": {"AP": float(len(self.calls))}}


class Here(Recorder):
    """Its `process` is another one, and does not say that it may be called elsewhere."""

    def process(self, inputs, outputs):
        super().process(inputs, outputs)


class Several(DatasetEvaluators):
    """Its own `process` hands on what it gets."""

    def process(self, inputs, outputs):
        super().process(inputs, outputs)


def _patched():
    recorder = Recorder()
    recorder.process = recorder.process
    return recorder


BATCHES = [[1, 2], [3], [4, 5], [6], [7], [8]]


def test_batches_are_processed_in_order_by_one_other_thread_which_ends():
    model, recorder = Model(), Recorder()
    assert inference_on_dataset(model, BATCHES, recorder) == {"bbox": {"AP": 6.0}}
    assert recorder.calls == [(batch, batch, "x") for batch in BATCHES]
    ((thread, has_grad, num_threads),) = set(recorder.threads)
    assert thread is not threading.current_thread() and not thread.is_alive()
    assert (has_grad, num_threads) == (False, 1)
    assert model.pastes == [False] * 6 and model.pastes_masks


@pytest.mark.parametrize(
    "evaluator", [Here(), DatasetEvaluators([Here(), Recorder()]), Several([Recorder()]), _patched()]
)
def test_one_that_does_not_say_so_is_called_by_the_loop_itself(evaluator):
    model = Model()
    members = getattr(evaluator, "_evaluators", [evaluator])
    for member in members:
        member.evaluate = lambda: None
    inference_on_dataset(model, BATCHES, evaluator)
    for member in members:
        assert {thread for thread, *_ in member.threads} == {threading.current_thread()}
        assert [inputs for inputs, *_ in member.calls] == BATCHES
    assert model.pastes == [True] * 6


def test_several_are_processed_elsewhere_if_all_may_be():
    recorders = [Recorder(), Recorder()]
    recorders[1].evaluate = lambda: None
    inference_on_dataset(Model(), BATCHES, recorders)
    assert all(len(recorder.calls) == 6 for recorder in recorders)
    assert {thread for r in recorders for thread, *_ in r.threads}.isdisjoint({threading.current_thread()})


def test_the_model_is_at_most_three_batches_ahead():
    recorder, ahead = Recorder(), []
    recorder.seconds = 0.02

    class Ahead(Model):
        def forward(self, samples):
            ahead.append(len(self.pastes) + 1 - len(recorder.calls))
            return super().forward(samples)

    inference_on_dataset(Ahead(), BATCHES * 2, recorder)
    assert max(ahead) == 3 and len(recorder.calls) == 12


def test_what_process_raises_is_raised_by_the_loop_with_the_thread_ended():
    model, recorder = Model(), Recorder()
    recorder.fails_at = 2
    with pytest.raises(ValueError, match="no such image"):
        inference_on_dataset(model, BATCHES, recorder)
    assert not recorder.threads[0][0].is_alive()
    assert len(recorder.calls) < 6 and model.pastes_masks
    # Also of the last batch, which nothing comes after.
    recorder = Recorder()
    recorder.fails_at = 6
    with pytest.raises(ValueError, match="no such image"):
        inference_on_dataset(Model(), BATCHES, recorder)


def test_an_error_of_the_model_ends_the_thread_and_leaves_the_rest(monkeypatch):
    model, recorder = Model(), Recorder()
    model.fails_at = 3
    with pytest.raises(ZeroDivisionError):
        inference_on_dataset(model, BATCHES, recorder)
    assert not recorder.threads[0][0].is_alive() and len(recorder.calls) <= 2
    assert model.pastes_masks


def test_a_stop_ends_the_thread(monkeypatch):
    model, recorder = Model(), Recorder()
    monkeypatch.setattr(loop, "is_requested", lambda: len(model.pastes) == 2)
    monkeypatch.setattr(loop, "end_evaluation_if_requested", lambda: (_ for _ in ()).throw(SystemExit(143)))
    with pytest.raises(SystemExit):
        inference_on_dataset(model, BATCHES, recorder)
    assert not recorder.threads[0][0].is_alive() and len(recorder.calls) == 2


# ---- masks -------------------------------------------------------------------------------------


@pytest.fixture
def dataset():
    """Four images of 64 x 96, named 0 to 3, with an object each."""
    thing = {"bbox": [10, 10, 50, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
    thing["segmentation"] = [[10, 10, 50, 10, 50, 50, 10, 50]]
    thing["keypoints"] = [20, 20, 2] * 4
    names = {"file_name": "", "height": 64, "width": 96}
    records = [{**names, "image_id": i, "annotations": [thing]} for i in range(4)]
    DatasetCatalog.register("four", lambda: records)
    MetadataCatalog.get("four").set(thing_classes=["a", "b", "c"])
    return "four"


class Kept(COCOEvaluator):
    """Keeps the detections that it would score."""

    def score(self, detections):
        self.detections = detections
        return {}


def test_a_mask_rcnns_masks_are_those_that_its_users_get(dataset):
    model = build(*ARCHITECTURES["mask_keypoint_rcnn"], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    randomize_predictions(model)
    loader = [[make_sample(64, 96, seed=i) for i in pair] for pair in ((2, 0), (3, 1))]
    evaluator = Kept(dataset, kpt_oks_sigmas=[0.1] * 4)
    inference_on_dataset(model, loader, evaluator)
    found = evaluator.detections
    with torch.no_grad():
        samples = {
            s["image_id"]: o for batch in loader for s, o in zip(batch, model.eval()(batch), strict=True)
        }
    outputs = [samples[i] for i in range(4)]
    assert all(output["masks"].dtype == torch.bool and len(output["masks"]) > 5 for output in outputs)
    assert found.masks == [counts for output in outputs for counts in encode_masks(output["masks"])]
    assert found.rows[:, 1:5].tolist() == torch.cat([o["boxes"] for o in outputs]).double().tolist()
    assert found.keypoints.tolist() == torch.cat([o["keypoints"] for o in outputs]).double().tolist()
    # Masks of pixels, as another model gives them, are taken as well.
    evaluator.reset()
    evaluator.process([{"image_id": i} for i in range(4)], outputs)
    evaluator.evaluate()
    assert evaluator.detections.masks == found.masks


def test_the_image_is_named_whose_masks_cannot_be_taken_in(dataset):
    output = {"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.zeros(1)}
    wrong = BoxMasks(torch.ones(1, 1, 4, 4), torch.zeros(1, 4), 64, 90)

    class Wrong(nn.Module):
        def forward(self, samples):
            return [{**output, "masks": wrong} for _ in samples]

    with pytest.raises(
        UserError, match=r"masks of image 2 in four are \(64, 90\), but the image is \(64, 96\)"
    ):
        inference_on_dataset(Wrong(), [[{"image_id": 2}]], COCOEvaluator(dataset, ["bbox", "segm"]))
    broken = {**output, "masks": BoxMasks(None, torch.zeros(1, 4), 64, 96)}
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is, the image is named
        COCOEvaluator(dataset, ["bbox", "segm"]).process([{"image_id": 3}], [broken])
    assert error.value.__notes__ == ["while taking in what was found in image 3"]
