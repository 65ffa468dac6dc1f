"""Losses and gradients that are not finite: which images gave them, and going on without their step."""

import logging
import os

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, first_line
from plaintrain.utils.files import atomic_write
from plaintrain.utils.state import plain
from plaintrain.utils.storage import get_event_storage

logger = logging.getLogger(__name__)


class StepGuard:
    """Says which steps to leave out, on all ranks together, because of a loss or gradient that is not finite.

    Attributes:
        enabled: False leaves none out, and reads nothing.
        counts: (steps left out in all, and in a row just now), to be saved.
    """

    def __init__(self, model, data_loader, *, max_in_row=0, counts=(0, 0), dump_folder=""):
        """
        Args:
            model: its batch norm forgets what it saw in a step that is left out.
            data_loader: names the images of an iteration, and makes its samples once more.
            max_in_row: how many steps in a row may be left out; 0 disables it.
            counts: those of the run that is resumed.
            dump_folder: where `images_of` saves the samples; "" for nowhere.
        """
        self.enabled, self.counts = max_in_row > 0, tuple(counts)
        self._max_in_row, self._data_loader, self._dump_folder = max_in_row, data_loader, dump_folder
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._buffers = [b for m in norms for b in m.buffers(recurse=False)] if self.enabled else []
        self._before = [b.clone() for b in self._buffers]

    def only_finite(self, losses, norm, scaler):
        """What was given, or ({}, {}) on all ranks to leave the step out; a sync point if enabled.

        Args:
            losses: {"total_loss": 0-d tensor, ...} of this rank.
            norm: {"grad_norm": 0-d tensor}. With an enabled scaler it is left to that.
            scaler: the `GradScaler`.

        Raises:
            FloatingPointError: too many in a row.
        """
        if not self.enabled:
            return losses, norm
        numbers = losses if scaler.is_enabled() else {**losses, **norm}
        finite = torch.stack([value.detach().float() for value in numbers.values()]).isfinite()
        bad = {name for name, good in zip(numbers, finite.tolist(), strict=True) if not good}  # sync point
        if comm.any_rank(bad):
            self._leave_out(bad)
            return {}, {}
        self.counts = self.counts[0], 0
        _copy(self._before, self._buffers)
        return losses, norm

    def _leave_out(self, bad):
        _copy(self._buffers, self._before)
        total, in_row = self.counts
        self.counts = total + 1, in_row + 1
        storage = get_event_storage()
        names = sorted(set().union(*comm.all_gather(bad)))
        images = ", ".join(self.images_of(storage.iter))
        what = f"{', '.join(names)} is NaN or infinite at iteration {storage.iter}"
        what += f"; images of that batch: {images}"
        if in_row >= self._max_in_row:
            raise FloatingPointError(
                f"{what}; {in_row} steps before it were left out too, and SOLVER.MAX_SKIPPED_STEPS is "
                f"{self._max_in_row}"
            )
        logger.warning(f"the step is left out: {what}")
        storage.put_scalar("skipped_steps", total + 1, smoothing_hint=False)

    def images_of(self, iteration):
        """The images that all ranks see in an iteration; saves this rank's samples if that is wanted."""
        if self._dump_folder:
            self._dump(iteration)
        return self._data_loader.image_names(iteration)

    def _dump(self, iteration):
        rank = f".rank{comm.get_rank()}" if comm.get_rank() else ""
        path = os.path.join(self._dump_folder, f"bad_batch_{iteration:07d}{rank}.pth")
        try:
            samples = plain(self._data_loader.samples(iteration), "a sample")
            with atomic_write(path, "wb") as f:
                torch.save({"iteration": iteration, "samples": samples}, f)
        except (UserError, RuntimeError) as e:
            # What is wrong with the losses is more important.
            logger.error(f"cannot save the samples: {first_line(e)}")
        else:
            logger.warning(f"the samples are saved in {path}")


def _copy(targets, sources):
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)


def build_step_guard(cfg, model, data_loader, counts=(0, 0)):
    """The `StepGuard` of SOLVER.ON_NONFINITE, SOLVER.MAX_SKIPPED_STEPS and DEBUG.DUMP_BAD_BATCH."""
    return StepGuard(
        model,
        data_loader,
        max_in_row=cfg.SOLVER.MAX_SKIPPED_STEPS if cfg.SOLVER.ON_NONFINITE == "skip" else 0,
        counts=counts,
        dump_folder=cfg.OUTPUT_DIR if cfg.DEBUG.DUMP_BAD_BATCH else "",
    )
