"""NaN and infinite losses and gradients: stop the run, or skip the step (SOLVER.ON_NONFINITE)."""

import logging
import os

import torch

from plaintrain.checkpoint.state import convert_to_builtin_types
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import atomic_write
from plaintrain.utils.storage import get_event_storage

logger = logging.getLogger(__name__)

# The scaler halves its scale at each step whose gradients overflow. Far below 1 it no longer helps.
_LEAST_SCALE = 2.0**-14


class NonfiniteGuard:
    """Looks for NaN and infinity, on all ranks together.

    Attributes:
        num_skipped: steps that were skipped.
        num_in_row: steps that were skipped since the last good one.
    """

    def __init__(self, model, data_loader, scaler, *, max_in_row=0, dump_folder=""):
        """
        Args:
            model: its batch norm forgets what it saw in a skipped step.
            data_loader: names the images of an iteration, and makes its samples once more.
            scaler: the `GradScaler`; if it is enabled, it skips steps whose gradients are not finite.
            max_in_row: how many steps in a row may be skipped; 0 skips none.
            dump_folder: where the samples of a bad iteration are saved; "" for nowhere.
        """
        self.num_skipped = 0
        self.num_in_row = 0
        self._max_in_row = max_in_row
        self._data_loader = data_loader
        self._scaler = scaler
        self._dump_folder = dump_folder
        self._buffers = [buffer for norm in comm.get_batch_norms(model) for buffer in norm.buffers()]
        self._before = [buffer.clone() for buffer in self._buffers]
        # Weights are loaded later.
        comm.unwrap_model(model).register_load_state_dict_post_hook(self._remember_buffers)

    def allows_step(self, losses, grad_norm):
        """Return whether the optimizer may step; False on all ranks if a value of one is not finite.

        Always True, without a device sync, unless steps are skipped (SOLVER.ON_NONFINITE). For a skipped
        step, the model's running statistics are set back.

        Args:
            losses: {name: 0-d tensor} of this rank.
            grad_norm: 0-d tensor; ignored with an enabled scaler, which skips such a step itself.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        if not self._max_in_row:
            return True
        scalars = losses if self._scaler.is_enabled() else {**losses, "grad_norm": grad_norm}
        finite = torch.stack([value.detach().float() for value in scalars.values()]).isfinite()
        bad = {name for name, good in zip(scalars, finite.tolist(), strict=True) if not good}  # device sync
        if comm.any_rank(bad):  # all ranks
            self._skip(bad)
            return False
        self.num_in_row = 0
        self._remember_buffers()
        return True

    def _remember_buffers(self, *_):
        comm.copy_tensors(self._buffers, self._before)

    def _skip(self, bad):
        comm.copy_tensors(self._before, self._buffers)
        self.num_skipped += 1
        self.num_in_row += 1
        storage = get_event_storage()
        names = ", ".join(sorted(set().union(*comm.all_gather(bad))))
        images = ", ".join(self._images_of(storage.iter))
        message = f"{names} is NaN or infinite at iteration {storage.iter}; images of that batch: {images}"
        if self.num_in_row > self._max_in_row:
            raise FloatingPointError(
                f"{message}; {self.num_in_row - 1} steps before it were skipped too, and "
                f"SOLVER.MAX_SKIPPED_STEPS is {self._max_in_row}"
            )
        logger.warning(f"skipping the step: {message}")
        storage.put_scalar("skipped_steps", self.num_skipped, smoothing_hint=False)

    def raise_if_found(self, storage):
        """Raise if a loss or `grad_norm` in the storage is NaN or infinite; a device sync.

        The losses in the storage are reduced over ranks, so all ranks raise. With an enabled scaler,
        `grad_norm` may be infinite, since such a step is not taken.

        Raises:
            FloatingPointError: names the iteration, the losses and the images; or the loss scale is so
                small that no step is taken any more.
        """
        storage.raise_if_nonfinite(self._images_of, check_norm=not self._scaler.is_enabled())
        scale = self._scaler.get_scale()
        if self._scaler.is_enabled() and scale < _LEAST_SCALE:
            raise FloatingPointError(
                f"gradients overflow in float16 even at a loss scale of {scale:.2g}, so "
                "nothing is learned; lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set "
                "SOLVER.AMP.PRECISION bfloat16"
            )

    def state_dict(self):
        return {"num_skipped": self.num_skipped, "num_in_row": self.num_in_row}

    def load_state_dict(self, state_dict):
        self.num_skipped = state_dict["num_skipped"]
        self.num_in_row = state_dict["num_in_row"]

    def _images_of(self, iteration):
        """Return the images that all ranks see in an iteration; saves this rank's samples if asked for."""
        if self._dump_folder:
            self._dump(iteration)
        return self._data_loader.image_names(iteration)

    def _dump(self, iteration):
        rank = f".rank{comm.get_rank()}" if comm.get_rank() else ""
        path = os.path.join(self._dump_folder, f"bad_batch_{iteration:07d}{rank}.pth")
        try:
            samples = convert_to_builtin_types(self._data_loader.samples(iteration), "a sample")
            with atomic_write(path, "wb") as f:
                torch.save({"iteration": iteration, "samples": samples}, f)
        except (UserError, RuntimeError) as e:
            # What is wrong with the losses is more important.
            logger.error(f"cannot save the samples: {get_first_line(e)}")
        else:
            logger.warning(f"saved the samples in {path}")


def build_nonfinite_guard(cfg, model, data_loader, scaler):
    """Build the guard of SOLVER.ON_NONFINITE, SOLVER.MAX_SKIPPED_STEPS and DEBUG.DUMP_BAD_BATCH."""
    return NonfiniteGuard(
        model,
        data_loader,
        scaler,
        max_in_row=cfg.SOLVER.MAX_SKIPPED_STEPS if cfg.SOLVER.ON_NONFINITE == "skip" else 0,
        dump_folder=cfg.OUTPUT_DIR if cfg.DEBUG.DUMP_BAD_BATCH else "",
    )
