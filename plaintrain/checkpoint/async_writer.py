"""Writing checkpoints in a thread, from copies in the host's memory."""

import copy
from concurrent.futures import ThreadPoolExecutor

import torch


class Background:
    """Calls functions one after the other, in a thread that the process waits for at its end.

    After a failure nothing more is done, and the next call of any method raises it. If not `asynchronous`,
    each function is called at once, in the thread of the caller.
    """

    def __init__(self, asynchronous=True):
        self._executor = ThreadPoolExecutor(1) if asynchronous else None
        self._last = None

    def submit(self, function, *args):
        """Call `function(*args)` when what was submitted before is done."""
        if self._executor is None:
            function(*args)
            return
        if self._last is not None and self._last.done():
            self.wait()
        self._last = self._executor.submit(_call_after, self._last, function, args)

    def copy(self, data):
        """Return data that `submit` may be given while the original is changed."""
        # There is memory for one copy at a time.
        self.wait()
        return copy_to_host(data) if self._executor else data

    def wait(self):
        """Wait until all is done, and raise what has failed."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _call_after(previous, function, args):
    if previous is not None:
        # It raises again what failed before.
        previous.result()
    function(*args)


def copy_to_host(data):
    """Copy dicts, lists, tuples and their tensors to the host's memory."""
    copied = _copy(data)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # device sync
    return copied


def _copy(value):
    if isinstance(value, torch.Tensor):
        # torch keeps pinned memory that is freed for the next copy.
        buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return buffer.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        # A shallow copy keeps the type, and the versions that a module notes in its state.
        copied = copy.copy(value)
        copied.update({key: _copy(item) for key, item in value.items()})
        return copied
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    return value
