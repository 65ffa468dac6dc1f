"""Losses that are not finite: plaintrain.nonfinite."""

import math

import pytest
import torch
from torch import nn

from plaintrain.config import get_cfg
from plaintrain.nonfinite import StepGuard, build_step_guard
from plaintrain.utils.storage import EventStorage

NAN, INF = torch.tensor(math.nan), torch.tensor(math.inf)
PLAIN = torch.amp.GradScaler("cpu", enabled=False)
SCALER = torch.amp.GradScaler("cpu", enabled=True)


class Loader:
    """Knows the images and the samples of an iteration."""

    def image_names(self, iteration):
        return [f"{iteration}0 (a.jpg)", f"{iteration}1 (b.jpg)"]

    def samples(self, iteration):
        target = {"boxes": torch.ones(1, 4), "labels": torch.tensor([iteration])}
        return [{"image": torch.zeros(3, 2, 2, dtype=torch.uint8), "image_id": 7, "target": target}]


def guard(model=None, **kwargs):
    return StepGuard(model or nn.Linear(1, 1), Loader(), **kwargs)


def losses(value=1.0):
    value = torch.as_tensor(value)
    return {"total_loss": value + 1, "loss_a": value, "loss_b": torch.tensor(1.0)}


def test_a_guard_that_is_off_reads_nothing_and_lets_everything_pass():
    off = guard()
    meta = torch.ones((), device="meta")
    assert off.only_finite({"total_loss": meta}, {"grad_norm": meta}, PLAIN) == (
        {"total_loss": meta},
        {"grad_norm": meta},
    )
    assert not off.enabled


@pytest.mark.parametrize(
    "given, norm, scaler, what",
    [
        (losses(math.nan), torch.tensor(1.0), PLAIN, "loss_a, total_loss is NaN"),
        (losses(-math.inf), torch.tensor(1.0), PLAIN, "loss_a, total_loss is NaN"),
        (losses(), INF, PLAIN, "grad_norm is NaN"),
        (losses(), NAN, SCALER, None),
        (losses(math.nan), INF, SCALER, "loss_a, total_loss is NaN"),
        (losses(), torch.tensor(1.0), PLAIN, None),
    ],
)
def test_a_step_that_is_not_finite_is_left_out_named_and_counted(given, norm, scaler, what, log):
    norm, skips = {"grad_norm": norm}, guard(max_in_row=2)
    with EventStorage(5) as storage:
        found = skips.only_finite(given, norm, scaler)
        if what is None:
            assert found == (given, norm) and skips.counts == (0, 0) and log.text == ""
            return
        assert found == ({}, {}) and skips.counts == (1, 1)
        assert f"{what} or infinite at iteration 5; images of that batch: 50 (a.jpg), 51 (b.jpg)" in log.text
        assert storage.latest() == {"skipped_steps": (1.0, 5)}


def test_too_many_in_a_row_end_the_run():
    skips = guard(max_in_row=2, counts=(10, 1))
    with EventStorage(3):
        skips.only_finite(losses(), {}, PLAIN)
        assert skips.counts == (10, 0)
        for _ in range(2):
            skips.only_finite(losses(math.nan), {}, PLAIN)
        with pytest.raises(FloatingPointError, match="2 steps before it .*MAX_SKIPPED_STEPS is 2"):
            skips.only_finite(losses(math.nan), {}, PLAIN)
    assert skips.counts == (13, 3)


def test_batch_norm_forgets_what_it_saw_in_a_step_that_is_left_out():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    skips = guard(model, max_in_row=2)
    with EventStorage():
        model(torch.randn(4, 2))
        skips.only_finite(losses(), {}, PLAIN)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model(torch.full((4, 2), math.nan))
        skips.only_finite(losses(math.nan), {}, PLAIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_samples_are_saved_as_plain_data(tmp_path, log):
    assert guard(dump_folder=str(tmp_path)).images_of(12) == ["120 (a.jpg)", "121 (b.jpg)"]
    saved = torch.load(tmp_path / "bad_batch_0000012.pth", weights_only=True)
    assert saved["iteration"] == 12 and saved["samples"][0]["target"]["labels"].tolist() == [12]
    assert "bad_batch_0000012.pth" in log.text
    guard().images_of(13)
    assert not (tmp_path / "bad_batch_0000013.pth").exists()


def test_samples_that_cannot_be_saved_do_not_hide_what_is_wrong(log):
    assert guard(dump_folder="/proc/nowhere").images_of(1) == ["10 (a.jpg)", "11 (b.jpg)"]
    assert "cannot save the samples" in log.text


@pytest.mark.parametrize("mode, enabled", [("stop", False), ("skip", True)])
def test_the_config_says_what_happens(mode, enabled, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["SOLVER.ON_NONFINITE", mode, "OUTPUT_DIR", str(tmp_path), "DEBUG.DUMP_BAD_BATCH", True]
    )
    built = build_step_guard(cfg, nn.Linear(1, 1), Loader(), (4, 1))
    assert built.enabled is enabled and built.counts == (4, 1)
    built.images_of(3)
    assert (tmp_path / "bad_batch_0000003.pth").exists()
