"""NaN and infinite losses: plaintrain.engine.nonfinite."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.engine.nonfinite import NonfiniteGuard, build_nonfinite_guard
from plaintrain.utils import comm
from plaintrain.utils.storage import EventStorage

NAN, INF, ONE = torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(1.0)
PLAIN = torch.amp.GradScaler("cpu", enabled=False)
SCALER = torch.amp.GradScaler("cpu", enabled=True)


class Loader:
    """Knows the images and the samples of an iteration."""

    def get_image_names(self, iteration):
        return [f"{iteration}0 (a.jpg)", f"{iteration}1 (b.jpg)"]

    def load_samples(self, iteration):
        target = {"boxes": torch.ones(1, 4), "labels": torch.tensor([iteration])}
        return [{"image": torch.zeros(3, 2, 2, dtype=torch.uint8), "image_id": 7, "target": target}]


def guard(model=None, scaler=PLAIN, **kwargs):
    return NonfiniteGuard(model or nn.Linear(1, 1), Loader(), scaler, **kwargs)


def scalars(value=ONE, norm=ONE):
    """(losses, grad_norm)."""
    return {"total_loss": value + 1, "loss_a": value, "loss_b": ONE}, norm


def test_allows_step_reads_nothing_without_skipping_and_else_asks_the_other_ranks(monkeypatch):
    meta = torch.ones((), device="meta")
    assert guard().allows_step({"total_loss": meta}, meta)
    monkeypatch.setattr(comm, "any_rank", lambda flag: True)
    monkeypatch.setattr(comm, "all_gather", lambda names: [names, {"loss_of_rank_1"}])
    with EventStorage():
        assert not guard(max_in_row=2).allows_step(*scalars())


@pytest.mark.parametrize(
    ("step", "scaler", "words"),
    [
        (scalars(NAN), PLAIN, "loss_a, total_loss is NaN"),
        (scalars(-INF, INF), SCALER, "loss_a, total_loss is NaN"),
        (scalars(norm=INF), PLAIN, "grad_norm is NaN"),
        (scalars(norm=NAN), SCALER, None),
        (scalars(), PLAIN, None),
    ],
)
def test_allows_step_names_and_counts_what_is_skipped(step, scaler, words, log):
    nonfinite = guard(scaler=scaler, max_in_row=2)
    with EventStorage(5) as storage:
        assert nonfinite.allows_step(*step) is (words is None)
    number = 0 if words is None else 1
    assert nonfinite.state_dict() == {"num_skipped": number, "num_in_row": number}
    if words is None:
        assert log.text == ""
        return
    assert f"{words} or infinite at iteration 5; images of that batch: 50 (a.jpg), 51 (b.jpg)" in log.text
    assert storage.latest() == {"skipped_steps": (1.0, 5)}


def test_allows_step_raises_after_too_many_in_a_row():
    nonfinite = guard(max_in_row=2)
    nonfinite.load_state_dict({"num_skipped": 10, "num_in_row": 1})
    with EventStorage(3):
        assert nonfinite.allows_step(*scalars())
        assert nonfinite.state_dict() == {"num_skipped": 10, "num_in_row": 0}
        for _ in range(2):
            assert not nonfinite.allows_step(*scalars(NAN))
        with pytest.raises(FloatingPointError, match="more than SOLVER.MAX_SKIPPED_STEPS 2 consecutive"):
            nonfinite.allows_step(*scalars(NAN))
    assert nonfinite.state_dict() == {"num_skipped": 13, "num_in_row": 3}


@pytest.mark.parametrize("resumed", [False, True])
def test_batch_norm_forgets_a_skipped_step(tmp_path, resumed):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    nonfinite = guard(model, max_in_row=2)
    if resumed:
        # The statistics that a skipped first step goes back to are those that were loaded.
        other = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        other(torch.randn(4, 2) + 5)
        DetectionCheckpointer(other, str(tmp_path)).save("model_0000000", iteration=0)
        DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    with EventStorage():
        if not resumed:
            model(torch.randn(4, 2))
            nonfinite.allows_step(*scalars())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model(torch.full((4, 2), math.nan))
        nonfinite.allows_step(*scalars(NAN))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("mode", "skips"), [("stop", False), ("skip", True)])
def test_config_says_whether_steps_are_skipped_and_samples_saved(mode, skips, tmp_path, log):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.ON_NONFINITE", mode, "OUTPUT_DIR", str(tmp_path)])
    storage = EventStorage(12)
    storage.put_scalar("loss_a", math.nan)
    for cfg.DEBUG.DUMP_BAD_BATCH, number in ((False, 0), (True, 1)):
        nonfinite = build_nonfinite_guard(cfg, nn.Linear(1, 1), Loader(), PLAIN)
        assert (nonfinite._max_in_row > 0) is skips
        storage.put_scalar("loss_a", math.nan)
        with pytest.raises(FloatingPointError, match=r"iteration 12.*120 \(a.jpg\), 121 \(b.jpg\)"):
            nonfinite.check_storage(storage)
        assert len(list(tmp_path.iterdir())) == number
    saved = torch.load(tmp_path / "bad_batch_0000012.pth", weights_only=True)
    assert saved["iteration"] == 12 and saved["samples"][0]["target"]["labels"].tolist() == [12]
    # A failing dump does not hide the error.
    storage.put_scalar("loss_a", math.nan)
    with pytest.raises(FloatingPointError, match="loss_a"):
        guard(dump_folder="/proc/nowhere").check_storage(storage)
    assert "cannot save the samples" in log.text


def scaler_at(scale):
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    scaler.scale(torch.ones(()))
    return scaler


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_check_storage_raises_for_the_norm_without_a_scaler_or_for_a_small_scale(value):
    norm_found = pytest.raises(FloatingPointError, match="grad_norm became NaN or infinite at iteration 4")
    for scale, expected in ((None, norm_found), (8.0, nullcontext())):
        nonfinite = guard(scaler=scaler_at(scale))
        with EventStorage(4) as storage:
            storage.put_scalars(total_loss=1.0, grad_norm=value)
            with expected:
                nonfinite.check_storage(storage)
            nonfinite.check_storage(storage)
            # A loss counts with a scaler too.
            storage.put_scalars(total_loss=value)
            with pytest.raises(FloatingPointError, match="total_loss"):
                nonfinite.check_storage(storage)
    with EventStorage() as storage:
        guard(scaler=scaler_at(2.0**-14)).check_storage(storage)
        with pytest.raises(FloatingPointError, match="overflow in float16 even at a loss scale of 3.1e-05"):
            guard(scaler=scaler_at(2.0**-15)).check_storage(storage)
