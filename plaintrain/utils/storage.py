"""Scalars, images and histograms of a run, kept without waiting for the device.

Names follow Detectron2's `utils.events`.
"""

import contextlib
import itertools
import math
import statistics
from collections import defaultdict, deque

import torch

_STORAGES = []
# Tensors are fetched at the latest when this many entries wait, so memory stays bounded.
_MAX_PENDING = 10_000
_MAX_IMAGES = 100
# Values of a scalar that are saved: the window of the writers.
_WINDOW_SIZE = 20


def get_event_storage():
    """Return the innermost `EventStorage` whose `with` block is running."""
    if not _STORAGES:
        raise RuntimeError("get_event_storage() was called outside of `with EventStorage(...):`")
    return _STORAGES[-1]


class HistoryBuffer:
    """The last values of one scalar, and the average of all of them."""

    def __init__(self, max_length=10_000):
        self._data = deque(maxlen=max_length)
        self._count = 0
        self._sum = 0.0

    def update(self, value, iteration):
        self._data.append((value, iteration))
        self._count += 1
        self._sum += value

    def latest(self):
        return self._data[-1][0]

    def median(self, window_size):
        return statistics.median(self._last(window_size))

    def avg(self, window_size):
        return statistics.fmean(self._last(window_size))

    def global_avg(self):
        return self._sum / self._count

    def values(self):
        """Return [(value, iteration)], oldest first."""
        return list(self._data)

    def _last(self, window_size):
        return [value for value, _ in itertools.islice(reversed(self._data), window_size)]


class EventStorage:
    """Collects scalars, images and histograms of the current iteration; a context manager.

    A scalar may be a number or a 0-d tensor. Tensors stay on their device, as detached copies,
    and all that wait are fetched in one transfer when somebody reads.
    """

    def __init__(self, start_iter=0):
        """start_iter: the iteration to count from; `iter` equals it until `step()`."""
        self.start_iter = start_iter
        self.iter = start_iter
        self._history = defaultdict(HistoryBuffer)
        self._hints = {}
        self._latest = {}
        # [(iteration, names, number or tensor of as many values)] that wait to be fetched.
        self._pending = []
        # [(iteration, name)] of NaN and infinite losses and gradient norms.
        self._nonfinite = []
        # The names of the scalars that no writer has read.
        self._unwritten = set()
        self._scope = ""
        self.clear_images()
        self.clear_histograms()

    def state_dict(self):
        """Return the log window, so that the medians of a resumed run continue; a device sync."""
        scalars = {
            name: [[list(pair) for pair in history.values()[-_WINDOW_SIZE:]], self._hints[name]]
            for name, history in self.histories().items()
        }
        return {"iteration": self.iter, "scalars": scalars, "unwritten": sorted(self._unwritten)}

    def load_state_dict(self, state_dict):
        """Continue from a saved log window: `iter` is the iteration that was finished last."""
        self.iter = state_dict["iteration"]
        self.start_iter = self.iter + 1
        self._unwritten = set(state_dict["unwritten"])
        for name, (values, hint) in state_dict["scalars"].items():
            self._hints[name] = hint
            for value, iteration in values:
                self._history[name].update(value, iteration)
            if name in self._unwritten:
                self._latest[name] = tuple(values[-1])

    def put_scalar(self, name, value, smoothing_hint=True, cur_iter=None):
        """Store one scalar; see `put_scalars`."""
        self.put_scalars(smoothing_hint=smoothing_hint, cur_iter=cur_iter, **{name: value})

    def put_scalars(self, *, smoothing_hint=True, cur_iter=None, **scalars):
        """Store scalars, given as `name=value`.

        Args:
            smoothing_hint: writers show the median of a window (True) or the latest value.
            cur_iter: the iteration they belong to, default `iter`.
        """
        iteration = self.iter if cur_iter is None else cur_iter
        if self._scope:
            scalars = {self._scope + name: value for name, value in scalars.items()}
        names, tensors = [], []
        for name, value in scalars.items():
            if self._hints.setdefault(name, smoothing_hint) is not smoothing_hint:
                raise ValueError(f"scalar {name} was stored with the other smoothing_hint before")
            if isinstance(value, torch.Tensor):
                names.append(name)
                tensors.append(value if value.dim() == 0 else value.reshape(()))
            else:
                self._pending.append((iteration, (name,), float(value)))
        if names:
            # stack copies, so that a tensor changed in place later is kept as it is now; detaching
            # its one result is cheaper than entering no_grad.
            self._pending.append((iteration, names, torch.stack(tensors).detach()))
        self._unwritten.update(scalars)
        if len(self._pending) > _MAX_PENDING:
            self._fetch()

    def _fetch(self):
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        tensors = defaultdict(list)
        for _, _, value in pending:
            if isinstance(value, torch.Tensor):
                tensors[value.device].append(value)
        # One transfer for each device.
        fetched = {device: iter(torch.cat(t).tolist()) for device, t in tensors.items()}  # device sync
        for iteration, names, value in pending:
            is_tensor = isinstance(value, torch.Tensor)
            for name in names:
                number = next(fetched[value.device]) if is_tensor else value
                self._history[name].update(number, iteration)
                self._latest[name] = (number, iteration)
                # Names with a slash are results: of a dataset or a class with "loss" in its name, or val/.
                is_of_step = "/" not in name and ("loss" in name or name == "grad_norm")
                if is_of_step and not math.isfinite(number):
                    self._nonfinite.append((iteration, name))

    def has_unwritten(self):
        """Return whether a scalar was stored since a writer last looked."""
        return bool(self._unwritten)

    def raise_if_nonfinite(self, images_of=None, *, norm_too=True):
        """Stop when a loss or `grad_norm` stored since the last call is NaN or infinite; a device sync.

        Reduced losses are the same on every rank, so all ranks stop.

        Args:
            images_of: function from an iteration to the names of the images it trained on.
            norm_too: False where a step whose `grad_norm` is not finite is not taken (float16).

        Raises:
            FloatingPointError: names the first bad iteration, its terms and its images.
        """
        self._fetch()
        bad = [(at, name) for at, name in self._nonfinite if norm_too or name != "grad_norm"]
        self._nonfinite = []
        if not bad:
            return
        iteration = min(bad)[0]
        names = ", ".join(sorted({name for at, name in bad if at == iteration}))
        images = f"; images of that batch: {', '.join(images_of(iteration))}" if images_of else ""
        raise FloatingPointError(
            f"{names} became NaN or infinite at iteration {iteration}; lower SOLVER.BASE_LR, "
            f"lengthen SOLVER.WARMUP_ITERS or clip gradients{images}"
        )

    def put_image(self, img_name, img_tensor):
        """Store an image for TensorBoard: `[3, H, W]`, uint8 in 0..255 or float in 0..1."""
        self.images.append((self._scope + img_name, img_tensor.detach().to("cpu", copy=True), self.iter))

    def put_histogram(self, hist_name, hist_tensor, bins=1000):
        """Store a histogram of a tensor's values for TensorBoard."""
        values = hist_tensor.detach().to("cpu", torch.float32, copy=True).flatten()
        self.histograms.append((self._scope + hist_name, values, bins, self.iter))

    def clear_images(self):
        # The newest only: on ranks without writers nobody takes them out.
        self.images = deque(maxlen=_MAX_IMAGES)

    def clear_histograms(self):
        self.histograms = deque(maxlen=_MAX_IMAGES)

    def history(self, name):
        """Return the `HistoryBuffer` of a scalar; `KeyError` if it was never stored."""
        return self.histories()[name]

    def histories(self):
        self._fetch()
        return dict(self._history)

    def latest(self):
        """Return name -> (latest value, its iteration)."""
        self._fetch()
        return self._latest

    def latest_with_smoothing_hint(self, window_size=_WINDOW_SIZE):
        """Return name -> (median of the window or latest value, iteration of the latest); for writers."""
        self._unwritten.clear()
        return {
            name: (self._history[name].median(window_size) if self._hints[name] else value, at)
            for name, (value, at) in self.latest().items()
        }

    def smoothing_hints(self):
        return self._hints

    def step(self):
        """Go to the next iteration."""
        self.iter += 1

    @property
    def iteration(self):
        return self.iter

    @contextlib.contextmanager
    def name_scope(self, name):
        """Prefix the names stored within the block by `name/`."""
        before, self._scope = self._scope, name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._scope = before

    def __enter__(self):
        _STORAGES.append(self)
        return self

    def __exit__(self, *exc_info):
        _STORAGES.pop()
