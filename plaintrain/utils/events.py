"""The console writer, and all names of Detectron2's `utils.events`."""

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence

from plaintrain.utils.storage import EventStorage, get_event_storage, has_event_storage
from plaintrain.utils.writers import CSVWriter, EventWriter, JSONWriter, TensorboardXWriter

__all__ = [
    "WRITERS", "CSVWriter", "CommonMetricPrinter", "EventStorage", "EventWriter", "JSONWriter",
    "TensorboardXWriter", "get_event_storage", "has_event_storage",
]  # fmt: skip


def write_all(writers: Sequence[EventWriter]) -> None:
    """Call `write` of each writer."""
    for writer in writers:
        writer.write()


@contextlib.contextmanager
def closing_all(writers: Sequence[EventWriter]) -> Iterator[Sequence[EventWriter]]:
    """Begin the writers, and close them at the end of the block.

    Unless the block raises, scalars that are still unwritten are written first.
    """
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
            writer.begin(get_event_storage().start_iter)
        yield writers
        if get_event_storage().has_unwritten():
            write_all(writers)


class CommonMetricPrinter(EventWriter):
    """Writer of one log line: eta, iteration, losses, time and data_time (s), lr, memory (MiB)."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        self.logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window_size = window_size
        # Iteration and time.
        self._first_write: tuple[int, float] | None = None

    def _measure_time(self, iteration: int) -> float | None:
        """Return the seconds per iteration, with evaluations, since the first write; None at the first."""
        now = iteration, time.perf_counter()
        # The first write follows the slow start of workers and kernels, and what a resumed run catches up on.
        before = self._first_write = self._first_write or now
        return (now[1] - before[1]) / (now[0] - before[0]) if now[0] > before[0] else None

    def write(self) -> None:
        """Log one line with the latest scalars."""
        storage = get_event_storage()
        latest = storage.latest_with_smoothing_hint(self._window_size)
        seconds = self._measure_time(storage.iter)
        if seconds is None and "time" in latest:
            seconds = latest["time"][0]
        fields = [f"iter: {storage.iter}"]
        if seconds is not None and self._max_iter is not None:
            left = max(0, self._max_iter - storage.iter - 1)
            fields.insert(0, f"eta: {datetime.timedelta(seconds=int(seconds * left))}")
        # Results and validation losses, whose names have a slash, are logged by the evaluation.
        losses = [k for k in latest if "loss" in k and "/" not in k]
        fields += [f"{k}: {latest[k][0]:.4g}" for k in losses]
        fields += [f"{k}: {latest[k][0]:.4g}" for k in latest if "[metric]" in k]
        fields += [f"{k}: {latest[k][0]:.4f}" for k in ("time", "data_time") if k in latest]
        if "lr" in latest:
            fields.append(f"lr: {latest['lr'][0]:.5g}")
        if "max_mem" in latest:
            fields.append(f"max_mem: {latest['max_mem'][0]:.0f}M")
        self.logger.info("  ".join(fields))


# Name in OUTPUT.WRITERS -> function (output_dir, max_iter) that builds the writer.
WRITERS: dict[str, Callable[[str, int | None], EventWriter]] = {
    "console": lambda output_dir, max_iter: CommonMetricPrinter(max_iter),
    "json": lambda output_dir, max_iter: JSONWriter(os.path.join(output_dir, "metrics.json")),
    "csv": lambda output_dir, max_iter: CSVWriter(os.path.join(output_dir, "metrics.csv")),
    "tensorboard": lambda output_dir, max_iter: TensorboardXWriter(output_dir),
}
