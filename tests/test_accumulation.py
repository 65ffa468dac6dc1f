"""Gradient accumulation over micro-batches: plaintrain.solver.accumulation, on one rank and on two."""

from contextlib import nullcontext
from functools import partial

import pytest
import rank_functions
import torch
from processes import Job
from rank_functions import backward_in_parts, gradients, make_batch, make_retinanet

from plaintrain.solver.accumulation import add_losses, split_batch, sum_losses, sync_gradients


@pytest.mark.parametrize(("number", "steps"), [(1, 2), (7, 1), (7, 3), (8, 3), (8, 8), (8, 20)])
def test_split_batch_gives_nearly_equal_micro_batches_in_order(number, steps):
    batch = list(range(number))
    micro_batches, weights, are_last = zip(*split_batch(batch, steps), strict=True)
    assert [image for micro_batch in micro_batches for image in micro_batch] == batch
    sizes = [len(micro_batch) for micro_batch in micro_batches]
    assert len(sizes) == min(steps, number) and max(sizes) - min(sizes) <= 1
    assert list(weights) == [size / number for size in sizes]
    assert list(are_last) == [False] * (len(sizes) - 1) + [True]
    assert all(
        isinstance(sync_gradients(torch.nn.Linear(1, 1), is_last), nullcontext) for is_last in are_last
    )


def test_sum_losses_and_add_losses_add_by_name():
    value = torch.tensor(2.0, requires_grad=True)
    others = {"b_loss": torch.tensor([0.5]), "loss_c": 0.5, "loss_d": torch.tensor(1.0, dtype=torch.bfloat16)}
    for name, other in others.items():
        value.grad = None
        total = sum_losses({"loss_a": value * value, "accuracy": torch.tensor(50.0), name: other})
        total.backward()
        assert total.item() == 4.0 + float(other) and value.grad == 4
    # With a weight and without the graph.
    first = {"loss": value, "accuracy": torch.tensor(8.0)}
    second = {"loss": torch.tensor(6.0), "accuracy": torch.tensor(4.0), "positives": torch.tensor(4.0)}
    empty = {}
    half = add_losses(empty, first, 0.25)
    whole = add_losses(half, second, 0.75)
    assert half == {"loss": 0.5, "accuracy": 2.0}
    assert whole == {"loss": 5.0, "accuracy": 5.0, "positives": 3.0}
    assert empty == {} and not any(value.requires_grad for value in (*half.values(), *whole.values()))
    assert add_losses(empty, first, 1) == {"loss": 2.0, "accuracy": 8.0} and empty == {}


def test_gradients_of_two_ranks_are_reduced_once_for_all_micro_batches(tmp_path):
    job = Job(rank_functions.accumulate, tmp_path / "job", num_gpus_per_machine=2).wait(code=0)
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
    ("names", "words"),
    [
        # As a mask head would do that returns nothing for a batch without objects.
        (
            [("accuracy", "loss_cls", "loss_mask"), ("accuracy", "loss_cls")],
            f"{DIFFERENT}loss_mask on rank 0; none of these on rank 1{ADVICE}",
        ),
        ([("loss",), ("accuracy",)], f"{DIFFERENT}loss on rank 0; accuracy on rank 1{ADVICE}"),
        ([("accuracy",)] * 2, "the model must return a key that contains 'loss', got ['accuracy']"),
    ],
)
def test_ranks_with_different_losses_end_with_one_message_before_backward(tmp_path, names, words):
    main = partial(rank_functions.step_with_losses, names=names)
    job = Job(main, tmp_path / "job", num_gpus_per_machine=2).wait()
    assert job.code == 1 and job.seconds < 20
    # One rank may end the other before that has raised it too.
    assert set(job.results()) == {words}
    assert job.output.count(words) == 1 and "Traceback" not in job.output
    assert not list(job.folder.glob("backward-*"))
