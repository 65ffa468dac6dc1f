"""NaN and infinite losses and gradients: stop the run, or skip the step (SOLVER.ON_NONFINITE)."""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from plaintrain.checkpoint.state import convert_to_builtin_types
from plaintrain.config import CfgNode
from plaintrain.data.loader import TrainLoader
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import atomic_write
from plaintrain.utils.storage import EventStorage, get_event_storage

logger = logging.getLogger(__name__)

# GradScaler halves its scale after each overflow; far below 1 no step will succeed.
_MIN_SCALE = 2.0**-14


class NonfiniteGuard:
    """Check of losses and gradient norms for NaN and infinity, on all ranks together.

    Counts all skipped steps (`num_skipped`) and the consecutive ones (`num_in_row`).
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: TrainLoader,
        scaler: GradScaler,
        *,
        max_in_row: int = 0,
        dump_folder: str = "",
    ):
        """
        Args:
            model: its BatchNorm statistics are restored after a skipped step.
            max_in_row: maximum number of consecutive skipped steps; 0 disables skipping.
            dump_folder: folder for the samples of bad iterations; "" disables saving.
        """
        self.num_skipped = 0
        self.num_in_row = 0
        self._max_in_row = max_in_row
        self._data_loader = data_loader
        self._scaler = scaler
        self._dump_folder = dump_folder
        self._buffers = [buffer for norm in comm.get_batch_norms(model) for buffer in norm.buffers()]
        self._before = [buffer.clone() for buffer in self._buffers]
        # Weights may be loaded after this constructor.
        comm.unwrap_model(model).register_load_state_dict_post_hook(self._remember_buffers)

    def allows_step(self, losses: dict[str, Tensor], grad_norm: Tensor) -> bool:
        """Return whether the optimizer may step; False on all ranks if any rank has NaN or infinity.

        Always True, without a device sync, unless SOLVER.ON_NONFINITE is "skip". Restores the running
        statistics of the model before it returns False. An enabled scaler skips steps with a bad `grad_norm`
        itself. Raises a `FloatingPointError` if too many consecutive steps were skipped.
        """
        if not self._max_in_row:
            return True
        scalars = losses if self._scaler.is_enabled() else {**losses, "grad_norm": grad_norm}
        finite = torch.stack([value.detach().float() for value in scalars.values()]).isfinite()
        bad = {name for name, good in zip(scalars, finite.tolist(), strict=True) if not good}  # device sync
        if comm.any_rank(bool(bad)):  # all ranks
            self._skip(bad)
            return False
        self.num_in_row = 0
        self._remember_buffers()
        return True

    def _remember_buffers(self, *_: Any) -> None:
        comm.copy_tensors(self._buffers, self._before)

    def _skip(self, bad: set[str]) -> None:
        comm.copy_tensors(self._before, self._buffers)
        self.num_skipped += 1
        self.num_in_row += 1
        storage = get_event_storage()
        names = ", ".join(sorted(set().union(*comm.all_gather(bad))))
        images = ", ".join(self._get_images(storage.iter))
        message = f"{names} is NaN or infinite at iteration {storage.iter}; images of that batch: {images}"
        if self.num_in_row > self._max_in_row:
            raise FloatingPointError(
                f"more than SOLVER.MAX_SKIPPED_STEPS {self._max_in_row} consecutive bad steps: {message}"
            )
        logger.warning(f"skipping the step: {message}")
        storage.put_scalar("skipped_steps", self.num_skipped, smoothing_hint=False)

    def check_storage(self, storage: EventStorage) -> None:
        """Call `storage.raise_if_nonfinite` with the images of a batch; a device sync.

        Also raises a `FloatingPointError` if the loss scale is too small for any step to succeed.
        """
        storage.raise_if_nonfinite(self._get_images, check_norm=not self._scaler.is_enabled())
        scale = self._scaler.get_scale()
        if self._scaler.is_enabled() and scale < _MIN_SCALE:
            raise FloatingPointError(
                f"gradients overflow in float16 even at a loss scale of {scale:.2g}; lower SOLVER.BASE_LR, "
                "increase SOLVER.WARMUP_ITERS, or set SOLVER.AMP.PRECISION bfloat16"
            )

    def state_dict(self) -> dict[str, int]:
        return {"num_skipped": self.num_skipped, "num_in_row": self.num_in_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.num_skipped = state_dict["num_skipped"]
        self.num_in_row = state_dict["num_in_row"]

    def _get_images(self, iteration: int) -> list[str]:
        """Return the image names of all ranks in an iteration; save this rank's samples if enabled."""
        if self._dump_folder:
            self._save_samples(iteration)
        return self._data_loader.get_image_names(iteration)

    def _save_samples(self, iteration: int) -> None:
        rank = f".rank{comm.get_rank()}" if comm.get_rank() else ""
        path = os.path.join(self._dump_folder, f"bad_batch_{iteration:07d}{rank}.pth")
        try:
            samples = convert_to_builtin_types(self._data_loader.load_samples(iteration), "a sample")
            with atomic_write(path, "wb") as f:
                torch.save({"iteration": iteration, "samples": samples}, f)
        except (UserError, RuntimeError) as e:
            # This must not hide the error about the losses.
            logger.error(f"cannot save the samples: {get_first_line(e)}")
        else:
            logger.warning(f"saved the samples to {path}")


def build_nonfinite_guard(
    cfg: CfgNode, model: nn.Module, data_loader: TrainLoader, scaler: GradScaler
) -> NonfiniteGuard:
    """Build the guard of SOLVER.ON_NONFINITE, SOLVER.MAX_SKIPPED_STEPS and DEBUG.DUMP_BAD_BATCH."""
    return NonfiniteGuard(
        model,
        data_loader,
        scaler,
        max_in_row=cfg.SOLVER.MAX_SKIPPED_STEPS if cfg.SOLVER.ON_NONFINITE == "skip" else 0,
        dump_folder=cfg.OUTPUT_DIR if cfg.DEBUG.DUMP_BAD_BATCH else "",
    )
