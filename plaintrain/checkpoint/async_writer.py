"""Asynchronous checkpoint writing: copy the tensors to the host, write the file in a thread."""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class AsyncWriter:
    """A thread that calls functions in the order of submission; the process waits for it at exit.

    After a failure it skips the remaining functions, and the next call of any method raises the error.
    With `asynchronous=False`, `submit` calls the function itself.
    """

    def __init__(self, asynchronous: bool = True):
        self._executor = ThreadPoolExecutor(1) if asynchronous else None
        self._last: Future | None = None

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        if self._executor is None:
            function(*args)
            return
        if self._last is not None and self._last.done():
            self.wait()
        self._last = self._executor.submit(_call_after, self._last, function, args)

    def copy(self, data: Any) -> Any:
        """Return a snapshot for `submit`, so that the caller may change `data`."""
        # Host memory holds one snapshot at a time.
        self.wait()
        return copy_to_host(data) if self._executor else data

    def wait(self) -> None:
        """Wait for all submitted functions, and raise the first error."""
        last = self._last
        self._last = None
        if last is not None:
            last.result()


def _call_after(previous: Future | None, function: Callable[..., Any], args: tuple) -> None:
    if previous is not None:
        # Raises the error of an earlier function again.
        previous.result()
    function(*args)


def copy_to_host(data: Any) -> Any:
    """Copy dicts, lists and tuples of tensors to host memory."""
    copied = _copy(data)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # device sync
    return copied


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # PyTorch caches freed pinned memory, so the next copy reuses it.
        buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return buffer.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        # A shallow copy keeps the type and the `_metadata` of a module's state dict.
        copied = copy.copy(value)
        copied.update({key: _copy(item) for key, item in value.items()})
        return copied
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    return value
