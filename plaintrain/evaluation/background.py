"""What an evaluator does with a batch, done while the model computes the next ones."""

import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from plaintrain.utils import comm

# Batches that wait, or are worked on, beside the one that the model is at.
_WAITING = 2


@contextlib.contextmanager
def in_background(process, model):
    """A function `(inputs, outputs)` that leaves it to another thread to call `process` with them.

    There outputs are on the host, and masks `BoxMasks` where the model has `pastes_masks`. Batches are
    processed one by one and in order, all by the end of the block, which also ends the thread, whatever
    ends the block. What `process` raises is raised by a later call, or at the end of the block.

    Args:
        process: the `process` of an evaluator.
        model: the model whose outputs are processed, possibly wrapped for several GPUs.
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
    tensors = (v for output in outputs for v in output.values() if getattr(v, "is_cuda", False))
    devices = {tensor.device for tensor in tensors}
    return copies, [torch.cuda.current_stream(device).record_event() for device in devices]


@torch.no_grad()
def _call(process, inputs, outputs, events):
    for event in events:
        event.synchronize()
    process(inputs, outputs)
