"""One step from a batch in parts: plaintrain.accumulation, alone and on two ranks."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import rank_functions
from processes import Job
from rank_functions import backward_in_parts, gradients, make_batch, make_retinanet

from plaintrain.accumulation import add_scaled, split_batch, sum_losses
from plaintrain.utils.errors import UserError

# ---- parts of a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 20])
def test_a_batch_is_split_in_order_into_parts_that_are_nearly_equal(number, steps):
    batch = list(range(number))
    parts = list(split_batch(None, batch, steps))
    assert [image for part, _, _ in parts for image in part] == batch
    sizes = [len(part) for part, _, _ in parts]
    assert len(sizes) == min(steps, number) and max(sizes) - min(sizes) <= 1
    assert [share for _, share, _ in parts] == [size / number for size in sizes]
    assert all(isinstance(context, nullcontext) for _, _, context in parts)


def steps_of_sgd(model, batches, parts):
    """Train on each batch in parts; the weights in one tensor, and the losses of each step."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), []
    for batch in batches:
        optimizer.zero_grad()
        losses.append({name: value.item() for name, value in backward_in_parts(model, batch, parts).items()})
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


@pytest.fixture(scope="module")
def whole():
    """(fresh model, batches, weights and losses of 5 steps on whole batches of 8)."""
    model, batch = make_retinanet(), make_batch(8)
    batches = [batch[i:] + batch[:i] for i in range(5)]
    return model, batches, *steps_of_sgd(copy.deepcopy(model), batches, parts=1)


# 8 images in 3 parts are 2, 3 and 3.
@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_a_batch_in_parts_trains_the_weights_that_the_whole_batch_trains(whole, parts):
    model, batches, weights, losses = whole
    found, found_losses = steps_of_sgd(copy.deepcopy(model), batches, parts)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (weights - start).abs().max() > 1e-3
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-5)
    for ours, expected in zip(found_losses, losses, strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
        assert set(ours) == {"total_loss", "loss_cls", "loss_box_reg"}


# ---- losses ----------------------------------------------------------------------------------


def test_only_what_is_called_loss_is_summed():
    losses = {"loss_a": torch.tensor(1.0), "accuracy": torch.tensor(50.0), "b_loss": torch.tensor(3.0)}
    assert sum_losses(losses).item() == 4.0


@pytest.mark.parametrize("names", [[], ["accuracy", "a"]])
def test_without_a_loss_the_keys_that_there_are_are_named(names):
    with pytest.raises(UserError) as error:
        sum_losses(dict.fromkeys(names, torch.tensor(1.0)))
    assert str(error.value) == (
        f"the model returned nothing to minimise: no key of {sorted(names)} contains 'loss'"
    )


@pytest.mark.parametrize("other", [0.5, torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_a_loss_may_be_a_number_or_have_a_dimension_or_another_precision(other):
    value = torch.tensor(2.0, requires_grad=True)
    total = sum_losses({"loss_a": value * value, "loss_b": other})
    total.backward()
    assert total.item() == 4.5 and value.grad == 4


def test_scalars_are_added_by_name_in_their_share_and_without_their_graph():
    first = {"loss": torch.tensor(2.0, requires_grad=True), "accuracy": torch.tensor(8.0)}
    second = {"loss": torch.tensor(6.0), "accuracy": torch.tensor(4.0), "positives": torch.tensor(4.0)}
    empty = {}
    half = add_scaled(empty, first, 0.25)
    whole = add_scaled(half, second, 0.75)
    assert {name: value.item() for name, value in half.items()} == {"loss": 0.5, "accuracy": 2.0}
    assert {name: value.item() for name, value in whole.items()} == {
        "loss": 5.0,
        "accuracy": 5.0,
        "positives": 3.0,
    }
    assert empty == {} and not any(value.requires_grad for value in (*half.values(), *whole.values()))


def test_the_scalars_of_an_undivided_batch_are_not_computed_with():
    total, scalars = {"a": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}
    found = add_scaled(total, scalars, 1)
    assert found == {**total, **scalars} and found["loss"] is scalars["loss"]
    assert list(total) == ["a"] and list(scalars) == ["loss"]


# ---- two ranks -------------------------------------------------------------------------------


def run(main, folder):
    return Job(main, folder / "job", num_gpus_per_machine=2).wait()


def test_two_ranks_send_gradients_once_for_all_parts(tmp_path):
    job = run(rank_functions.accumulate, tmp_path)
    assert job.code == 0, job.output
    first, second = job.results()
    assert first == second
    assert first["sent 3"] == first["sent 1"] > 0
    model = make_retinanet()
    losses = backward_in_parts(model, make_batch(8), 1)
    for steps in (1, 3):
        assert first[str(steps)] == pytest.approx({k: v.item() for k, v in losses.items()}, rel=1e-4)
        for rank in (0, 1):
            found = torch.load(job.folder / f"{steps}-{rank}.pt", weights_only=True)
            torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)


DIFFERENT = "the model returned different losses on different ranks: "
ADVICE = "; return every loss in every step, as zero where it does not apply"


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (
            rank_functions.a_loss_too_few_on_rank_1,
            f"{DIFFERENT}loss_mask on rank 0; none of these on rank 1{ADVICE}",
        ),
        (
            rank_functions.other_losses_on_rank_1,
            f"{DIFFERENT}loss_box on rank 0; loss_mask on rank 1{ADVICE}",
        ),
        (
            rank_functions.no_loss_on_rank_1,
            f"{DIFFERENT}loss on rank 0; accuracy on rank 1{ADVICE}",
        ),
        (
            rank_functions.no_loss_at_all,
            "the model returned nothing to minimise: no key of ['accuracy'] contains 'loss'",
        ),
    ],
)
def test_ranks_with_other_losses_end_with_one_sentence_before_backward(tmp_path, main, words):
    job = run(main, tmp_path)
    assert job.code == 1 and job.seconds < 20
    assert job.results() == [words, words]
    assert job.output.count(words) == 1 and "Traceback" not in job.output
    assert not list(job.folder.glob("backward-*"))
