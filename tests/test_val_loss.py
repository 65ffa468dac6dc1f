"""Losses on validation data: plaintrain.evaluation.val_loss and its loader."""

import pytest
import rank_functions
import torch
from model_helpers import ARCHITECTURES, LOSSES, build, randomize_predictions, two_samples, two_squares
from processes import Job
from rank_functions import make_batch, make_retinanet
from torch import nn
from torchvision.ops import StochasticDepth

from plaintrain.data import DatasetCatalog, build_detection_test_loader, build_detection_val_loader
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.evaluation import compute_validation_losses
from plaintrain.structures import BoxMode


class Model(nn.Module):
    """Losses that are the mean of the samples; `seen` holds the modes of its layers at each call."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Dropout(0.5)
        self.depth = StochasticDepth(0.5, "row")
        self.seen, self.fails_at = [], fails_at

    def forward(self, samples):
        assert not torch.is_grad_enabled()
        layers = (self, self.layer, self.norm, self.drop, self.depth)
        self.seen.append([module.training for module in layers])
        if len(self.seen) == self.fails_at:
            raise ZeroDivisionError
        values = torch.tensor([[float(sample)] for sample in samples])
        self.drop(self.depth(self.norm(self.layer(values))))
        return {"loss_a": values.mean(), "b_loss": 10 * values.mean(), "accuracy": -values.mean()}


def test_losses_are_means_over_images_whatever_their_batches(log):
    losses = compute_validation_losses(Model(), [[[1, 2, 3], [6]], [[8, 10]]])
    assert losses == pytest.approx(
        {"val/total_loss": 55.0, "val/loss_a": 5.0, "val/b_loss": 50.0, "val/accuracy": -5.0}
    )
    assert list(losses)[0] == "val/total_loss"
    assert all(type(value) is float for value in losses.values())
    assert "validation on 6 images:  total_loss: 55  loss_a: 5  b_loss: 50  accuracy: -5" in log.text
    log.clear()
    for loaders in ([], [[]], [[], []]):
        assert compute_validation_losses(Model(), loaders) == {}
    assert log.text == ""
    # A loss that is missing in a batch counts as 0 there, and low precision is summed in float32.
    model = Model()
    model.forward = lambda samples: {f"loss_{len(samples)}": torch.tensor(3.0)}
    assert compute_validation_losses(model, [[[2, 4], [6]]])["val/loss_2"] == pytest.approx(2.0)
    model.forward = lambda samples: {"loss": torch.tensor(1.0, dtype=torch.bfloat16)}
    assert compute_validation_losses(model, [[[0]] * 1000])["val/loss"] == 1.0


def snapshot(model):
    """What training would miss if it were changed."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        torch.get_rng_state(),
    )


def assert_unchanged(model, before):
    state, *rest, rng = snapshot(model)
    assert all(value.equal(before[0][name]) for name, value in state.items())
    assert rest == list(before[1:3]) and rng.equal(before[3])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["retinanet", "ssd"])
def test_losses_are_those_of_training_with_norms_as_in_evaluation_and_change_nothing(name):
    model = build(*ARCHITECTURES[name], "MODEL.TINY.NORM", "BN")
    randomize_predictions(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        # Statistics that are not those of the batch.
        norm.running_mean.fill_(0.5)
        norm.running_var.fill_(4.0)
    batches = [two_squares(), two_squares()[:1]]
    # Some parameters are frozen, and a norm is in evaluation mode, whatever the rest is.
    next(model.backbone.parameters()).requires_grad_(False)
    model.train()
    norms[0].eval()
    before = snapshot(model)
    losses = compute_validation_losses(model, [batches])
    assert_unchanged(model, before)
    for norm in norms:
        norm.eval()
    with torch.no_grad():
        first, second = model(batches[0]), model(batches[1])
    expected = {f"val/{loss}": (2 * first[loss] + second[loss]).item() / 3 for loss in LOSSES[name]}
    total = sum(expected.values())
    assert losses == pytest.approx({"val/total_loss": total, **expected}, rel=1e-5)
    for norm in norms:
        norm.train()
    with torch.no_grad():
        other = sum(model(batches[0]).values()).item()
    assert other != pytest.approx(sum(first.values()).item(), rel=1e-3)


def test_a_model_in_evaluation_mode_or_one_that_raises_is_not_changed_either():
    model = Model().eval()
    before = snapshot(model)
    assert compute_validation_losses(model, [[[1]]])["val/loss_a"] == 1.0
    assert_unchanged(model, before)
    model = Model(fails_at=2)
    model.drop.eval()
    model.layer.bias.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        compute_validation_losses(model, [[[1], [2], [3]]])
    # Norms, dropout and stochastic depth are off, and the rest trains.
    assert model.seen == [[True, True, False, False, False]] * 2
    assert_unchanged(model, before)


def test_losses_of_sampled_proposals_depend_on_the_seed_alone():
    few = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8)
    model, loader = build(*ARCHITECTURES["faster_rcnn"], *few), [two_samples()]
    torch.manual_seed(1)
    before = snapshot(model)
    first = compute_validation_losses(model, [loader], seed=5)
    assert_unchanged(model, before)
    torch.manual_seed(2)
    assert compute_validation_losses(model, [loader], seed=5) == first
    assert compute_validation_losses(model, [loader], seed=6) != first


@pytest.mark.parametrize("function", [rank_functions.validate, rank_functions.validate_on_rank_0_only])
def test_ranks_with_unequal_numbers_of_images_have_the_losses_of_one(tmp_path, function):
    job = Job(function, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 0, job.output
    first, second = job.results()
    batch = make_batch(7 if function is rank_functions.validate else 2)
    expected = compute_validation_losses(make_retinanet(), [[batch[:4], *([batch[4:]] if batch[4:] else [])]])
    assert first == second == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("size", "masks"), [(0, False), (30, True)])
def test_validation_images_are_those_of_the_evaluation_with_targets(cfg, size, masks):
    declare_dataset("drawn", {"FORMAT": "shapes", "SPLIT": "val", "NUM": 5, "HEIGHT": 48, "WIDTH": 64})
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("drawn",)
    cfg.TEST.IMS_PER_BATCH, cfg.INPUT.CROP.ENABLED = 2, True
    cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.MASK_ON = size, masks
    batches = list(build_detection_val_loader(cfg, "drawn"))
    expected = list(build_detection_test_loader(cfg, "drawn"))
    assert [len(batch) for batch in batches] == [len(batch) for batch in expected] == [2, 2, 1]
    scale = size / 48 if size else 1.0
    records = DatasetCatalog.get("drawn")
    samples = [sample for batch in batches for sample in batch]
    images = [sample["image"] for sample in samples]
    for sample, plain, record in zip(samples, sum(expected, []), records, strict=True):
        target, annotations = sample.pop("target"), record["annotations"]
        assert sample.pop("image").equal(plain.pop("image")) and sample == plain
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        torch.testing.assert_close(target["boxes"], torch.tensor(boxes) * scale)
        assert target["labels"].tolist() == [a["category_id"] for a in annotations]
        assert ("masks" in target) == masks
    # There is one view also with test-time augmentation.
    cfg.TEST.AUG.ENABLED = True
    views = [sample for batch in build_detection_val_loader(cfg, "drawn") for sample in batch]
    assert [view["image"].shape for view in views] == [image.shape for image in images]
