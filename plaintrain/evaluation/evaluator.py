"""The inference loop and the base class of evaluators."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from plaintrain.config.yaml import flatten
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.heartbeat import end_loop
from plaintrain.utils.logger import build_progress_bar
from plaintrain.utils.stop import end_evaluation_if_requested, is_requested
from plaintrain.utils.text import truncate_text

logger = logging.getLogger(__name__)

# Maximum number of batches that the model is ahead of the evaluator.
_MAX_PENDING = 2
# Minimum time between log lines.
_LOG_SECONDS = 30


class DatasetEvaluator:
    """Base class of evaluators: `reset`, `process` each batch, then `evaluate`.

    With `in_background`, `process` may run in a thread, parallel to the model, on CPU outputs whose masks may
    be `BoxMasks`. A subclass that overrides `process` must set it again.
    """

    in_background = False

    def reset(self) -> None:
        """Delete the collected outputs."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collect the outputs of the model for a batch of samples."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return {task: {metric: value}} on rank 0, None on other ranks."""


def _reject(self: DatasetEvaluator, *args: Any, **kwargs: Any) -> None:
    use = "COCOEvaluator for boxes and masks, or your own DatasetEvaluator"
    raise UserError(f"{type(self).__name__} is not supported; use {use}")


# Detectron2's scripts import them for datasets that they may never evaluate.
CityscapesInstanceEvaluator = type("CityscapesInstanceEvaluator", (DatasetEvaluator,), {"__init__": _reject})
CityscapesSemSegEvaluator = type("CityscapesSemSegEvaluator", (DatasetEvaluator,), {"__init__": _reject})
COCOPanopticEvaluator = type("COCOPanopticEvaluator", (DatasetEvaluator,), {"__init__": _reject})
SemSegEvaluator = type("SemSegEvaluator", (DatasetEvaluator,), {"__init__": _reject})


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators with different tasks as one."""

    def __init__(self, evaluators: Iterable[DatasetEvaluator]) -> None:
        self._evaluators = list(evaluators)

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        results: dict[str, dict[str, float]] = {}
        for evaluator in self._evaluators:
            for task, metrics in (evaluator.evaluate() or {}).items():
                if task in results:
                    raise ValueError(f"tasks of evaluators must be different, got {task} twice")
                results[task] = metrics
        return results or None


def _runs_in_background(evaluator: Any) -> bool:
    # The class that defines `process` decides, since it may need outputs on the device and pasted masks.
    owner = next((c for c in type(evaluator).__mro__ if "process" in vars(c)), object)
    if owner is DatasetEvaluators:
        return all(map(_runs_in_background, evaluator._evaluators))
    return vars(owner).get("in_background", False)


@contextlib.contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode within the block, and average its running statistics over ranks."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with comm.averaged_norm_buffers(model):  # all ranks
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def process_in_background(process: Callable, model: nn.Module) -> Iterator[Callable]:
    """Yield a function that calls `process(inputs, outputs)` of an evaluator in a thread.

    It gets outputs on the CPU, with `BoxMasks` if the model has `pastes_masks`. All batches are processed in
    order by the end of the block. A later call, or the end of the block, raises the exceptions of `process`.
    """
    # Initialize the number of threads of the main thread before the other thread sets its own.
    torch.get_num_threads()
    # One core, to leave the others to the model.
    pool = ThreadPoolExecutor(1, "evaluate", torch.set_num_threads, (1,))
    pending: deque[Future] = deque()

    @torch.no_grad()
    def process_on_host(inputs, outputs, events):
        for event in events:
            event.synchronize()
        process(inputs, outputs)

    def submit(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        if len(pending) >= _MAX_PENDING:
            pending.popleft().result()
        pending.append(pool.submit(process_on_host, inputs, *_copy_to_host(outputs)))

    try:
        with unpasted_masks(comm.unwrap_model(model)):
            yield submit
        for future in pending:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def unpasted_masks(model: Any) -> Iterator[None]:
    """Let a model with `pastes_masks` return `BoxMasks` within the block."""
    if not getattr(model, "pastes_masks", False):
        yield
        return
    model.pastes_masks = False
    try:
        yield
    finally:
        model.pastes_masks = True


def _copy_to_host(outputs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[torch.cuda.Event]]:
    """Return asynchronous copies, and the CUDA events after which they are valid."""
    copies = [
        {k: v.to("cpu", non_blocking=v.is_cuda) if hasattr(v, "is_cuda") else v for k, v in output.items()}
        for output in outputs
    ]
    devices = {v.device for output in outputs for v in output.values() if getattr(v, "is_cuda", False)}
    return copies, [torch.cuda.current_stream(device).record_event() for device in devices]


def inference_on_dataset(
    model: nn.Module, data_loader: Any, evaluator: DatasetEvaluator | list[DatasetEvaluator] | None
) -> dict[str, dict[str, float]]:
    """Run a model in evaluation mode on all batches of a loader, and return the results of the evaluator.

    Returns {} on other ranks than 0. Raises `plaintrain.utils.stop.Stopped` if a signal stops the training.
    """
    if isinstance(evaluator, list | tuple):
        evaluator = DatasetEvaluators(evaluator)
    evaluator = DatasetEvaluator() if evaluator is None else evaluator
    evaluator.reset()
    total = len(data_loader)
    context: contextlib.AbstractContextManager[Callable] = contextlib.nullcontext(evaluator.process)
    if _runs_in_background(evaluator):
        context = process_in_background(evaluator.process, model)
    start = logged = time.perf_counter()
    with inference_context(model), torch.no_grad(), context as process:
        for i, inputs in enumerate(build_progress_bar(data_loader, desc="evaluation", total=total)):
            if is_requested():
                break
            process(inputs, model(inputs))
            if time.perf_counter() - logged > _LOG_SECONDS:
                logged = time.perf_counter()
                left = (logged - start) / (i + 1) * (total - i - 1)
                logger.info(f"evaluated {i + 1} of {total} batches, {left:.0f} s left")
    end_evaluation_if_requested()
    logger.info(f"evaluated {total} batches in {time.perf_counter() - start:.1f} s")
    end_loop()
    return evaluator.evaluate() or {}


def print_csv_format(results: dict[str, dict[str, float]], level: int = logging.INFO) -> None:
    """Log {task: {metric: value}} as comma-separated lines for spreadsheets."""
    for task, metrics in results.items():
        main = {name: value for name, value in metrics.items() if "-" not in name}
        logger.log(level, f"copypaste: Task: {task}")
        logger.log(level, "copypaste: " + ",".join(main))
        logger.log(level, "copypaste: " + ",".join(f"{value:.4f}" for value in main.values()))


def flatten_results(results: dict[str, Any]) -> dict[str, float]:
    """Flatten {a: {b: value}} to {"a/b": value}, at any depth."""
    return flatten(results, "/")


def verify_results(expected_results: Sequence[Sequence[Any]], results: dict[str, dict[str, float]]) -> None:
    """Raise a `UserError` unless results match [[task, metric, value, tolerance], ...]."""
    wrong = []
    for task, metric, expected, tolerance in expected_results:
        actual = results.get(task, {}).get(metric)
        # Negated, so that NaN does not match.
        if actual is None or not abs(actual - expected) <= tolerance:
            wrong.append(f"{task}/{metric} is {actual}, expected {expected} +- {tolerance}")
    if wrong:
        raise UserError("results differ from TEST.EXPECTED_RESULTS: " + "; ".join(wrong))
    if expected_results:
        logger.info("results match TEST.EXPECTED_RESULTS")


def format_table(cells: Iterable[Iterable[Any]], header: list[str]) -> str:
    """Format rows of strings and numbers (two decimals) as an aligned text table."""
    texts = [
        [f"{v:.2f}" if isinstance(v, float) else truncate_text(str(v), 80) for v in row] for row in cells
    ]
    widths = [max(len(row[i]) for row in [header, *texts]) for i in range(len(header))]
    lines = ["  ".join(v.rjust(w) for v, w in zip(row, widths, strict=True)) for row in [header, *texts]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
