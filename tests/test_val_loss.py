"""Losses on validation data: plaintrain.evaluation.val_loss and its loader."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

sys.path.insert(0, str(Path(__file__).parent))

import rank_functions
from model_helpers import (
    ARCHITECTURES,
    LOSSES,
    RETINA,
    TINY,
    build,
    make_sample,
    randomize_predictions,
    two_samples,
    two_squares,
)
from processes import Job
from rank_functions import make_batch, make_retinanet

from plaintrain.data import DatasetCatalog, build_detection_test_loader, build_detection_val_loader
from plaintrain.data.builtin import declare_dataset
from plaintrain.data.samplers import batches_of_one_shape
from plaintrain.evaluation import validation_losses
from plaintrain.structures import BoxMode
from plaintrain.utils.env import forked_rng


class Model(nn.Module):
    """Losses that are the mean of the samples; `seen` holds the modes of its layers at each call."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Dropout(0.5)
        self.depth = StochasticDepth(0.5, "row")
        self.seen, self.fails_at = [], None

    def forward(self, samples):
        layers = (self, self.layer, self.norm, self.drop, self.depth)
        self.seen.append([module.training for module in layers])
        if len(self.seen) == self.fails_at:
            raise ZeroDivisionError
        values = torch.tensor([[float(sample)] for sample in samples])
        self.drop(self.depth(self.norm(self.layer(values))))
        return {"loss_a": values.mean(), "b_loss": 10 * values.mean(), "accuracy": -values.mean()}


# ---- means over images -----------------------------------------------------------------------


def test_losses_are_means_over_images_whatever_their_batches(log):
    loaders = [[[1, 2, 3], [6]], [[8, 10]]]
    found = validation_losses(Model(), loaders)
    assert found == pytest.approx(
        {"val/total_loss": 55.0, "val/loss_a": 5.0, "val/b_loss": 50.0, "val/accuracy": -5.0}
    )
    assert list(found)[0] == "val/total_loss"
    assert all(type(value) is float for value in found.values())
    assert "validation on 6 images:  total_loss: 55  loss_a: 5  b_loss: 50  accuracy: -5" in log.text


@pytest.mark.parametrize("loaders", [[], [[]], [[], []]])
def test_without_images_there_are_no_losses(loaders, log):
    assert validation_losses(Model(), loaders) == {}
    assert log.text == ""


def test_a_batch_that_lacks_a_loss_counts_as_0_there():
    class Sometimes(Model):
        def forward(self, samples):
            losses = super().forward(samples)
            return {"loss_a": losses["loss_a"]} if len(samples) == 1 else losses

    assert validation_losses(Sometimes(), [[[2, 4], [6]]])["val/b_loss"] == pytest.approx(20.0)


def test_losses_in_low_precision_are_summed_in_float32():
    class Low(nn.Linear):
        def forward(self, samples):
            return {"loss": torch.tensor(1.0, dtype=torch.bfloat16)}

    assert validation_losses(Low(1, 1), [[[0]] * 1000])["val/loss"] == 1.0


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd"])
def test_losses_are_those_of_training_with_the_norms_as_in_evaluation(name):
    model = build(*ARCHITECTURES[name], "MODEL.TINY.NORM", "BN")
    randomize_predictions(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        # Statistics that are not those of the batch.
        norm.running_mean.fill_(0.5)
        norm.running_var.fill_(4.0)
    batches = [two_squares(), two_squares()[:1]]
    found = validation_losses(model, [batches])
    model.train()
    for norm in norms:
        norm.eval()
    with torch.no_grad():
        first, second = model(batches[0]), model(batches[1])
    assert {f"val/{loss}" for loss in LOSSES[name]} == set(found) - {"val/total_loss"}
    for loss in LOSSES[name]:
        expected = (2 * first[loss] + second[loss]).item() / 3
        assert found[f"val/{loss}"] == pytest.approx(expected, rel=1e-5)
    assert found["val/total_loss"] == pytest.approx(sum(found[f"val/{loss}"] for loss in LOSSES[name]))
    for norm in norms:
        norm.train()
    with torch.no_grad():
        total = sum(model(batches[0]).values()).item()
    assert total != pytest.approx(sum(first.values()).item(), rel=1e-3)


# ---- what is left as it was ------------------------------------------------------------------


def settings(model):
    """What training would miss, if it were changed."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        torch.get_rng_state(),
    )


def assert_unchanged(model, before):
    state, *rest, rng = settings(model)
    assert all(value.equal(before[0][name]) for name, value in state.items())
    assert rest == list(before[1:3]) and rng.equal(before[3])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_neither_the_model_nor_the_random_generator_is_changed(name):
    model = build(*ARCHITECTURES[name], "MODEL.TINY.NORM", "BN")
    model.train()
    # Some are frozen, and some in evaluation mode, whatever the rest is.
    next(model.backbone.parameters()).requires_grad_(False)
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    torch.manual_seed(3)
    before = settings(model)
    validation_losses(model, [[two_squares() if name == "ssd" else two_samples()]])
    assert_unchanged(model, before)


def test_a_model_that_is_in_evaluation_stays_there():
    model = Model().eval()
    before = settings(model)
    assert validation_losses(model, [[[1]]])["val/loss_a"] == 1.0
    assert_unchanged(model, before)


def test_a_model_that_raises_is_left_as_it_was():
    model = Model()
    model.drop.eval()
    model.layer.bias.requires_grad_(False)
    model.fails_at = 2
    before = settings(model)
    with pytest.raises(ZeroDivisionError):
        validation_losses(model, [[[1], [2], [3]]])
    assert len(model.seen) == 2
    assert_unchanged(model, before)


def test_norms_dropout_and_stochastic_depth_are_off_and_the_rest_trains():
    model = Model()
    validation_losses(model, [[[1, 2]]])
    assert model.seen == [[True, True, False, False, False]]


def test_no_graph_is_kept():
    class Grad(Model):
        def forward(self, samples):
            assert not torch.is_grad_enabled()
            return super().forward(samples)

    validation_losses(Grad(), [[[1]]])


def test_a_wrapped_model_is_used_without_its_wrapper():
    class Wrapper(nn.DataParallel):
        def forward(self, samples):
            pytest.fail("the wrapper waits for the other ranks")

    model = Model()
    assert validation_losses(Wrapper(model), [[[1]]])["val/loss_a"] == 1.0
    assert model.training and len(model.seen) == 1


# ---- chance ----------------------------------------------------------------------------------


def test_a_model_that_draws_proposals_gives_the_same_losses_each_time():
    few = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8)
    model = build(*ARCHITECTURES["faster_rcnn"], *few)
    loader = [two_samples()]
    torch.manual_seed(1)
    first = validation_losses(model, [loader], seed=5)
    torch.manual_seed(2)
    torch.rand(3)
    assert validation_losses(model, [loader], seed=5) == first
    assert validation_losses(model, [loader], seed=6) != first


@pytest.mark.parametrize("fails", [False, True])
def test_forked_generators_are_seeded_within_the_block_and_as_before_after_it(fails):
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(9)
    torch.rand(5)
    after = torch.get_rng_state()
    try:
        with forked_rng(7, torch.device("cpu")):
            found = torch.rand(2)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert found.equal(expected) and torch.get_rng_state().equal(after)


# ---- two ranks -------------------------------------------------------------------------------


def test_two_ranks_with_unequal_shares_have_the_losses_of_one(tmp_path):
    job = Job(rank_functions.validate, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    first, second = job.results()
    assert first == second
    batch = make_batch(7)
    assert first == pytest.approx(validation_losses(make_retinanet(), [[batch[:4], batch[4:]]]), rel=1e-5)


def test_a_rank_without_images_has_the_losses_of_the_others(tmp_path):
    job = Job(rank_functions.validate_on_rank_0_only, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    first, second = job.results()
    assert first == second == pytest.approx(validation_losses(make_retinanet(), [[make_batch(2)]]), rel=1e-5)


# ---- the loader ------------------------------------------------------------------------------


@pytest.fixture
def shapes(cfg):
    """A config that tests on 5 drawn images, and augments its training as much as it can."""
    declared = {"FORMAT": "shapes", "SPLIT": "val", "NUM": 5, "HEIGHT": 48, "WIDTH": 64}
    declare_dataset("val_shapes", declared)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("val_shapes",)
    cfg.TEST.IMS_PER_BATCH = 2
    cfg.INPUT.CROP.ENABLED = True
    return cfg


@pytest.mark.parametrize(("size", "masks"), [(0, False), (30, True)])
def test_validation_images_are_those_of_the_evaluation_with_targets(shapes, size, masks):
    cfg = shapes
    cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.MASK_ON = size, masks
    batches = list(build_detection_val_loader(cfg, "val_shapes"))
    expected = list(build_detection_test_loader(cfg, "val_shapes"))
    assert [len(batch) for batch in batches] == [len(batch) for batch in expected] == [2, 2, 1]
    scale = size / 48 if size else 1.0
    records = DatasetCatalog.get("val_shapes")
    samples = [sample for batch in batches for sample in batch]
    for sample, plain, record in zip(samples, sum(expected, []), records, strict=True):
        assert sample["image"].equal(plain["image"]) and "target" not in plain
        assert {k: v for k, v in sample.items() if k not in ("image", "target")} == {
            k: v for k, v in plain.items() if k != "image"
        }
        target, annotations = sample["target"], record["annotations"]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        torch.testing.assert_close(target["boxes"], torch.tensor(boxes) * scale)
        assert target["labels"].tolist() == [a["category_id"] for a in annotations]
        assert ("masks" in target) == masks
    assert len(build_detection_val_loader(cfg, "val_shapes")) == 3


def test_validation_looks_at_one_view_also_with_test_time_augmentation(shapes):
    shapes.TEST.AUG.ENABLED = True
    (first, *_) = build_detection_val_loader(shapes, "val_shapes")
    assert first[0]["image"].shape == (3, 48, 64) and len(first[0]["target"]["labels"]) > 0


def test_validation_losses_of_a_dataset(shapes):
    loader = build_detection_val_loader(shapes, "val_shapes")
    found = validation_losses(build(*TINY, *RETINA), [loader])
    assert set(found) == {"val/total_loss", "val/loss_cls", "val/loss_box_reg"}
    assert found == validation_losses(build(*TINY, *RETINA), [loader])


def test_losses_do_not_depend_on_which_images_share_a_batch():
    """Batches of one shape: what RetinaNet's images lose is theirs, whoever is beside them."""
    boxes = [[3, 4, 40, 50], [30, 10, 60, 60]]
    samples = [make_sample(64, (64, 96)[i % 2], boxes[: i % 3], [0, 2][: i % 3], seed=i) for i in range(6)]
    batches = batches_of_one_shape(range(6), [((64, s["width"]),) for s in samples], 3)
    assert batches == [[1, 3, 5], [0, 2, 4]]
    model = make_retinanet()
    alone = validation_losses(model, [[[sample] for sample in samples]])
    assert validation_losses(model, [[[samples[i] for i in b] for b in batches]]) == pytest.approx(alone)
    # Padded to the largest they would not be the same.
    mixed = validation_losses(model, [[samples[:3], samples[3:]]])
    assert mixed["val/loss_cls"] != pytest.approx(alone["val/loss_cls"], rel=1e-5)
