"""`EventStorage` of Detectron2's `utils.events`, without a device sync per scalar."""

import contextlib
import itertools
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

_STORAGES: list["EventStorage"] = []
# Maximum number of entries that are not yet fetched from the device, which bounds the memory.
_MAX_PENDING = 10_000
_MAX_IMAGES = 100
# Default window of the writers, and the number of values per scalar in a checkpoint.
_WINDOW_SIZE = 20


def get_event_storage() -> "EventStorage":
    """Return the innermost active `EventStorage`."""
    if not _STORAGES:
        raise RuntimeError("get_event_storage() was called outside of `with EventStorage(...):`")
    return _STORAGES[-1]


def has_event_storage() -> bool:
    """Return whether an `EventStorage` is active."""
    return bool(_STORAGES)


class HistoryBuffer:
    """The last values of one scalar, and the mean of all."""

    def __init__(self, max_length: int = 10_000) -> None:
        self._data: deque[tuple[float, int]] = deque(maxlen=max_length)
        self._count = 0
        self._sum = 0.0

    def update(self, value: float, iteration: int) -> None:
        self._data.append((value, iteration))
        self._count += 1
        self._sum += value

    def latest(self) -> float:
        return self._data[-1][0]

    def median(self, window_size: int) -> float:
        return statistics.median(self._last(window_size))

    def avg(self, window_size: int) -> float:
        return statistics.fmean(self._last(window_size))

    def global_avg(self) -> float:
        return self._sum / self._count

    def values(self) -> list[tuple[float, int]]:
        """Return (value, iteration) pairs, oldest first."""
        return list(self._data)

    def _last(self, window_size: int) -> list[float]:
        return [value for value, _ in itertools.islice(reversed(self._data), window_size)]


class EventStorage:
    """Storage of scalars (numbers or 0-d tensors), images and histograms; a context manager.

    Tensors stay on their device, as detached copies; reading a scalar fetches all of them in one transfer.
    """

    def __init__(self, start_iter: int = 0) -> None:
        self.start_iter = start_iter
        self.iter = start_iter
        self._history: defaultdict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._hints: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        # (iteration, names, value or tensor with one value per name) not yet fetched.
        self._pending: list[tuple[int, Sequence[str], float | Tensor]] = []
        # (iteration, name) of NaN and infinite losses and gradient norms.
        self._nonfinite: list[tuple[int, str]] = []
        # Scalars that no writer has read.
        self._unwritten: set[str] = set()
        # Scalars of a checkpoint, whose hints may differ from those of the code.
        self._restored: set[str] = set()
        self._scope = ""
        self.clear_images()
        self.clear_histograms()

    def state_dict(self) -> dict[str, Any]:
        """Return the window of the medians; a device sync."""
        scalars = {
            name: [[list(pair) for pair in history.values()[-self.count_samples(name) :]], self._hints[name]]
            for name, history in self.histories().items()
        }
        return {"iteration": self.iter, "scalars": scalars, "unwritten": sorted(self._unwritten)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window of the medians and the last finished iteration, `iter`."""
        self.iter = state_dict["iteration"]
        self.start_iter = self.iter + 1
        self._unwritten = set(state_dict["unwritten"])
        self._restored = set(state_dict["scalars"])
        for name, (values, hint) in state_dict["scalars"].items():
            self._hints[name] = hint
            for value, iteration in values:
                self._history[name].update(value, iteration)
            if name in self._unwritten:
                self._latest[name] = tuple(values[-1])

    def put_scalar(
        self, name: str, value: float | Tensor, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Store one scalar; see `put_scalars`."""
        self.put_scalars(smoothing_hint=smoothing_hint, cur_iter=cur_iter, **{name: value})

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **scalars: float | Tensor
    ) -> None:
        """Store scalars; writers show the median of a window, without `smoothing_hint` the latest value."""
        iteration = self.iter if cur_iter is None else cur_iter
        if self._scope:
            scalars = {self._scope + name: value for name, value in scalars.items()}
        names = []
        tensors = []
        for name, value in scalars.items():
            if name in self._restored:
                self._restored.remove(name)
                self._hints[name] = smoothing_hint
            if self._hints.setdefault(name, smoothing_hint) is not smoothing_hint:
                raise ValueError(f"smoothing_hint of {name} must be {not smoothing_hint} as before")
            if isinstance(value, Tensor):
                names.append(name)
                tensors.append(value if value.dim() == 0 else value.reshape(()))
            else:
                self._pending.append((iteration, (name,), float(value)))
        if names:
            # stack copies, so later in-place changes have no effect; detaching once is cheaper than no_grad.
            self._pending.append((iteration, names, torch.stack(tensors).detach()))
        self._unwritten.update(scalars)
        if len(self._pending) > _MAX_PENDING:
            self._fetch()

    def _fetch(self) -> None:
        pending = self._pending
        self._pending = []
        tensors = defaultdict(list)
        for _, _, values in pending:
            if isinstance(values, Tensor):
                tensors[values.device].append(values)
        # One transfer per device.
        fetched = {device: iter(torch.cat(t).tolist()) for device, t in tensors.items()}  # device sync
        for iteration, names, values in pending:
            for name in names:
                value = next(fetched[values.device]) if isinstance(values, Tensor) else values
                self._history[name].update(value, iteration)
                self._latest[name] = (value, iteration)
                # Names with a slash are results, which may also contain "loss" (in the name of a class).
                is_checked = "/" not in name and ("loss" in name or name == "grad_norm")
                if is_checked and not math.isfinite(value):
                    self._nonfinite.append((iteration, name))

    def has_unwritten(self) -> bool:
        """Return whether a scalar was stored since the last write."""
        return bool(self._unwritten)

    def raise_if_nonfinite(
        self, images_of: Callable[[int], Iterable[str]] | None = None, *, check_norm: bool = True
    ) -> None:
        """Raise a `FloatingPointError` if a loss or `grad_norm` is NaN or infinite; a device sync.

        Checks all values since the last call; `check_norm` is False if the scaler skips non-finite steps.
        Reduced losses are equal on all ranks, so all ranks raise. `images_of` lists images of an iteration.
        """
        self._fetch()
        bad = [(i, name) for i, name in self._nonfinite if check_norm or name != "grad_norm"]
        self._nonfinite = []
        if not bad:
            return
        iteration = min(bad)[0]
        names = ", ".join(sorted({name for i, name in bad if i == iteration}))
        images = f"; images of that batch: {', '.join(images_of(iteration))}" if images_of else ""
        raise FloatingPointError(
            f"{names} became NaN or infinite at iteration {iteration}; lower SOLVER.BASE_LR, "
            f"lengthen SOLVER.WARMUP_ITERS or clip gradients{images}"
        )

    def put_image(self, img_name: str, img_tensor: Tensor) -> None:
        """Store an image for TensorBoard: `[3, H, W]`, uint8 in 0..255 or float in 0..1."""
        self.images.append((self._scope + img_name, img_tensor.detach().to("cpu", copy=True), self.iter))

    def put_histogram(self, hist_name: str, hist_tensor: Tensor, bins: int = 1000) -> None:
        """Store the histogram of a tensor for TensorBoard."""
        values = hist_tensor.detach().to("cpu", torch.float32, copy=True).flatten()
        self.histograms.append((self._scope + hist_name, values, bins, self.iter))

    def clear_images(self) -> None:
        # Bounded, because ranks without writers never clear it.
        self.images: deque[tuple[str, Tensor, int]] = deque(maxlen=_MAX_IMAGES)

    def clear_histograms(self) -> None:
        self.histograms: deque[tuple[str, Tensor, int, int]] = deque(maxlen=_MAX_IMAGES)

    def history(self, name: str) -> HistoryBuffer:
        return self.histories()[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        self._fetch()
        return dict(self._history)

    def latest(self) -> dict[str, tuple[float, int]]:
        """Return {name: (latest value, iteration)}."""
        self._fetch()
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = _WINDOW_SIZE) -> dict[str, tuple[float, int]]:
        """Return {name: (median of the window or latest value, latest iteration)}, for writers."""
        self._unwritten.clear()

        def smooth(name, value):
            if not self._hints[name]:
                return value
            return self._history[name].median(self.count_samples(name, window_size))

        return {name: (smooth(name, value), iteration) for name, (value, iteration) in self.latest().items()}

    def count_samples(self, name: str, window_size: int = _WINDOW_SIZE) -> int:
        """Return the number of values of a scalar in the `window_size` iterations up to its last."""
        values = self.history(name).values()
        start = values[-1][1] - window_size + 1
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[1] >= start, reversed(values)))

    def smoothing_hints(self) -> dict[str, bool]:
        return self._hints

    def step(self) -> None:
        """Go to the next iteration."""
        self.iter += 1

    @property
    def iteration(self) -> int:
        return self.iter

    @contextlib.contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Prefix the names that are stored within the block with `name/`."""
        before = self._scope
        self._scope = name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._scope = before

    def __enter__(self) -> Self:
        _STORAGES.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _STORAGES.pop()
