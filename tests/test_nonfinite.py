"""Losses that are not finite: plaintrain.nonfinite."""

import math

import pytest
import torch
from torch import nn

from plaintrain.config import get_cfg
from plaintrain.nonfinite import StepGuard, build_step_guard
from plaintrain.utils import comm
from plaintrain.utils.storage import EventStorage

NAN, INF, ONE = torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(1.0)
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


def losses(value=ONE):
    return {"total_loss": value + 1, "loss_a": value, "loss_b": ONE}


def test_a_guard_that_is_off_reads_nothing_and_lets_everything_pass():
    meta = torch.ones((), device="meta")
    given = {"total_loss": meta}, {"grad_norm": meta}
    assert guard().only_finite(*given, PLAIN) == given


@pytest.mark.parametrize(
    ("given", "norm", "scaler", "words"),
    [
        (losses(NAN), ONE, PLAIN, "loss_a, total_loss is NaN"),
        (losses(-INF), INF, SCALER, "loss_a, total_loss is NaN"),
        (losses(), INF, PLAIN, "grad_norm is NaN"),
        (losses(), NAN, SCALER, None),
        (losses(), ONE, PLAIN, None),
    ],
)
def test_a_step_that_is_not_finite_is_left_out_named_and_counted(given, norm, scaler, words, log):
    norm, skips = {"grad_norm": norm}, guard(max_in_row=2)
    with EventStorage(5) as storage:
        kept = skips.only_finite(given, norm, scaler)
    if words is None:
        assert kept == (given, norm) and skips.counts == (0, 0) and log.text == ""
        return
    assert kept == ({}, {}) and skips.counts == (1, 1)
    assert f"{words} or infinite at iteration 5; images of that batch: 50 (a.jpg), 51 (b.jpg)" in log.text
    assert storage.latest() == {"skipped_steps": (1.0, 5)}


def test_a_step_is_left_out_where_another_ranks_is_not_finite(monkeypatch):
    skips = guard(max_in_row=2)
    monkeypatch.setattr(comm, "any_rank", lambda flag: True)
    monkeypatch.setattr(comm, "all_gather", lambda names: [names, {"loss_of_rank_1"}])
    with EventStorage():
        assert skips.only_finite(losses(), {}, PLAIN) == ({}, {})


def test_too_many_in_a_row_end_the_run():
    skips = guard(max_in_row=2, counts=(10, 1))
    with EventStorage(3):
        skips.only_finite(losses(), {}, PLAIN)
        assert skips.counts == (10, 0)
        for _ in range(2):
            skips.only_finite(losses(NAN), {}, PLAIN)
        with pytest.raises(FloatingPointError, match="2 steps before it .*MAX_SKIPPED_STEPS is 2"):
            skips.only_finite(losses(NAN), {}, PLAIN)
    assert skips.counts == (13, 3)


def test_batch_norm_forgets_what_it_saw_in_a_step_that_is_left_out():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    skips = guard(model, max_in_row=2)
    with EventStorage():
        model(torch.randn(4, 2))
        skips.only_finite(losses(), {}, PLAIN)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model(torch.full((4, 2), math.nan))
        skips.only_finite(losses(NAN), {}, PLAIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("mode", "enabled"), [("stop", False), ("skip", True)])
def test_the_config_says_what_happens_and_whether_the_samples_are_saved(mode, enabled, tmp_path, log):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.ON_NONFINITE", mode, "OUTPUT_DIR", str(tmp_path)])
    for cfg.DEBUG.DUMP_BAD_BATCH, iteration in ((False, 3), (True, 12)):
        built = build_step_guard(cfg, nn.Linear(1, 1), Loader(), (4, 1))
        assert built.enabled is enabled and built.counts == (4, 1)
        assert built.images_of(iteration) == [f"{iteration}0 (a.jpg)", f"{iteration}1 (b.jpg)"]
    assert [path.name for path in tmp_path.iterdir()] == ["bad_batch_0000012.pth"]
    saved = torch.load(tmp_path / "bad_batch_0000012.pth", weights_only=True)
    assert saved["iteration"] == 12 and saved["samples"][0]["target"]["labels"].tolist() == [12]
    # What is wrong with the losses is not hidden.
    assert guard(dump_folder="/proc/nowhere").images_of(1) == ["10 (a.jpg)", "11 (b.jpg)"]
    assert "cannot save the samples" in log.text
