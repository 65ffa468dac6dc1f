"""Run a model over a test loader and let an evaluator score what it finds."""

import contextlib
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from plaintrain.config.yaml import flatten
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError
from plaintrain.utils.heartbeat import LONG, beat
from plaintrain.utils.logger import build_progress_bar
from plaintrain.utils.stop import end_evaluation_if_requested, is_requested

logger = logging.getLogger(__name__)

# Batches that wait for the evaluator, or that it is at, beside the one that the model is at.
_WAITING = 2
# Lines in the log, at least this many seconds apart, where no progress bar can be shown.
_LOG_SECONDS = 30


class DatasetEvaluator:
    """Base of the evaluators: `reset`, then `process` each batch, then `evaluate`.

    Attributes:
        in_background: `process` may be called in another thread while the model goes on, with outputs on
            the host and masks that are `BoxMasks`. A class that has its own `process` says so itself.
    """

    in_background = False

    def reset(self):
        """Forget what was processed."""

    def process(self, inputs, outputs):
        """Take in a `list[sample]` and the model's output for it."""

    def evaluate(self):
        """Score what all ranks processed.

        Returns:
            {task: {metric: number}} on rank 0; other ranks return None.
        """


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one; their tasks must have different names."""

    def __init__(self, evaluators):
        self._evaluators = list(evaluators)

    def reset(self):
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs, outputs):
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self):
        results = {}
        for evaluator in self._evaluators:
            for task, metrics in (evaluator.evaluate() or {}).items():
                if task in results:
                    raise ValueError(f"two evaluators return results for the task {task}")
                results[task] = metrics
        return results or None


def _runs_in_background(evaluator):
    # A class with its own `process` may count on the model's device and masks of pixels.
    owner = next((c for c in type(evaluator).__mro__ if "process" in vars(c)), object)
    if owner is DatasetEvaluators:
        return all(map(_runs_in_background, evaluator._evaluators))
    return vars(owner).get("in_background", False)


@contextlib.contextmanager
def inference_context(model):
    """Put the model into evaluation mode; afterwards each module has the mode it had.

    Running statistics are averaged over ranks within the block, so all ranks enter it.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with comm.averaged_norm_buffers(model):  # all ranks
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def in_background(process, model):
    """A function `(inputs, outputs)` that leaves it to another thread to call an evaluator's `process`.

    There outputs are on the host, and masks `BoxMasks` where the model has `pastes_masks`. Batches are
    processed one by one and in order, all by the end of the block, which also ends the thread, whatever
    ends the block. What `process` raises is raised by a later call, or at the end of the block.
    """
    # A thread's first computation asks how many cores to use: this one's comes before the other's.
    torch.get_num_threads()
    # One core is enough for it, the others are the model's.
    pool, waiting = ThreadPoolExecutor(1, "evaluate", torch.set_num_threads, (1,)), deque()

    def submit(inputs, outputs):
        if len(waiting) >= _WAITING:
            waiting.popleft().result()
        waiting.append(pool.submit(_call, process, inputs, *_to_host(outputs)))

    try:
        with unpasted_masks(comm.unwrap_model(model)):
            yield submit
        for future in waiting:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def unpasted_masks(model):
    """Within the block, masks are `BoxMasks` where the model has `pastes_masks`."""
    if not getattr(model, "pastes_masks", False):
        yield
        return
    model.pastes_masks = False
    try:
        yield
    finally:
        model.pastes_masks = True


def _to_host(outputs):
    """Outputs on the host, and the events after which they are there: nothing is waited for."""
    copies = [
        {k: v.to("cpu", non_blocking=v.is_cuda) if hasattr(v, "is_cuda") else v for k, v in output.items()}
        for output in outputs
    ]
    devices = {v.device for output in outputs for v in output.values() if getattr(v, "is_cuda", False)}
    return copies, [torch.cuda.current_stream(device).record_event() for device in devices]


@torch.no_grad()
def _call(process, inputs, outputs, events):
    for event in events:
        event.synchronize()
    process(inputs, outputs)


def inference_on_dataset(model, data_loader, evaluator):
    """Run a model on every batch and evaluate.

    Batches come to the evaluator in the loader's order, which with TEST.IMS_PER_BATCH above 1 is by size.

    Args:
        model: takes a `list[sample]`; put in evaluation mode for the time, also if it raises.
        data_loader: iterable of `list[sample]` with a length.
        evaluator: a `DatasetEvaluator`, several in a list, or None to only run the model.

    Returns:
        What `evaluate` returned, or {} where that is None (ranks other than 0).

    Raises:
        Stopped: on all ranks, in a training that a signal asks to stop (`plaintrain.utils.stop`).
    """
    if isinstance(evaluator, list | tuple):
        evaluator = DatasetEvaluators(evaluator)
    evaluator = DatasetEvaluator() if evaluator is None else evaluator
    evaluator.reset()
    total, background = len(data_loader), contextlib.nullcontext(evaluator.process)
    if _runs_in_background(evaluator):
        background = in_background(evaluator.process, model)
    start = logged = time.perf_counter()
    with inference_context(model), torch.no_grad(), background as process:
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
    beat(LONG)
    return evaluator.evaluate() or {}


def print_csv_format(results):
    """Log {task: {metric: number}} as lines that paste into a spreadsheet."""
    for task, metrics in results.items():
        main = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info(f"copypaste: Task: {task}")
        logger.info("copypaste: " + ",".join(main))
        logger.info("copypaste: " + ",".join(f"{value:.4f}" for value in main.values()))


def flatten_results(results):
    """{a: {b: number}} -> {"a/b": number}, at any depth."""
    return flatten(results, "/")


def verify_results(expected_results, results):
    """Compare results with TEST.EXPECTED_RESULTS.

    Args:
        expected_results: [[task, metric, value, tolerance], ...].
        results: {task: {metric: number}}.

    Raises:
        UserError: names every metric that is missing or further off than its tolerance.
    """
    wrong = []
    for task, metric, expected, tolerance in expected_results:
        actual = results.get(task, {}).get(metric)
        # Written so that NaN counts as wrong.
        if actual is None or not abs(actual - expected) <= tolerance:
            wrong.append(f"{task}/{metric} is {actual}, expected {expected} +- {tolerance}")
    if wrong:
        raise UserError("results differ from TEST.EXPECTED_RESULTS: " + "; ".join(wrong))
    if expected_results:
        logger.info("results are as TEST.EXPECTED_RESULTS says")


def format_table(rows, header):
    """Rows of strings and numbers (two decimals) as an aligned text table."""
    rows = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(v.rjust(w) for v, w in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
