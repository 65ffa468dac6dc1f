"""Build the checkpointer of a training run, and load the weights of an evaluation, from a config."""

import logging
from collections.abc import Callable
from typing import Any, Self

from torch import nn

from plaintrain.checkpoint.checkpointer import DetectionCheckpointer
from plaintrain.checkpoint.files import delete_checkpoint, get_checkpoint_name
from plaintrain.config import CfgNode
from plaintrain.data.catalog import compute_hashes, get_class_names
from plaintrain.solver.schedule import every
from plaintrain.utils.errors import UserError
from plaintrain.utils.stop import Stopped

logger = logging.getLogger(__name__)


class TrainingCheckpointer(DetectionCheckpointer):
    """Checkpointer of a run; as a context manager it waits until the last file is complete."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        period: int = 0,
        max_to_keep: int = 0,
        final_model: Callable[[], nn.Module] | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            period: other checkpoints, such as before an evaluation, are deleted once the next is written.
            max_to_keep: numbered checkpoints to keep; 0 keeps all.
            final_model: returns the module to save as `model_final`; None takes the last checkpoint.
        """
        super().__init__(model, save_dir, **kwargs)
        self._period = period
        self._max_to_keep = max_to_keep
        self._final_model = final_model
        self._temporary: int | None = None

    def save_iteration(self, iteration: int) -> None:
        """Save everything as `model_ITERATION`, after that iteration (from 0); all ranks call it."""
        self.save(get_checkpoint_name(iteration), iteration=iteration)
        self._delete_temporary()
        if not every(self._period, iteration):
            self._temporary = iteration
        elif self._max_to_keep:
            self.prune(self._max_to_keep)

    def save_final(self) -> None:
        """Write `model_final` from the newest checkpoint or the weights of `final_model`."""
        if self._final_model is not None:
            self.save_weights("model_final", self._final_model())
        else:
            self.link(self.last_name, "model_final")
            self._delete_temporary()

    def _delete_temporary(self) -> None:
        if self._temporary is not None:
            self._submit(delete_checkpoint, self.save_dir, get_checkpoint_name(self._temporary) + ".pth")
            self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait()
        except UserError as e:
            # The error that ended the block came first and must be reported.
            if error is None or isinstance(error, Stopped):
                raise
            logger.error(str(e))


def build_checkpointer(cfg: CfgNode, model: nn.Module, **checkpointables: Any) -> TrainingCheckpointer:
    """Build the checkpointer of SOLVER.*, MODEL.EMA and OUTPUT_DIR; "ema" may be a `ModelEMA`."""
    ema: Any = checkpointables.get("ema")
    train = cfg.DATASETS.TRAIN
    hashes = compute_hashes(train)
    is_averaged = ema is not None and ema.enabled and cfg.MODEL.EMA.FINAL == "averaged"
    return TrainingCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        period=cfg.SOLVER.CHECKPOINT_PERIOD,
        max_to_keep=cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP,
        final_model=(lambda: ema.module) if is_averaged else None,
        metadata={"config": cfg.dump(), "class_names": get_class_names(train), "data_hashes": hashes},
        asynchronous=cfg.SOLVER.ASYNC_CHECKPOINT,
        **checkpointables,
    )


def load_for_evaluation(cfg: CfgNode, model: nn.Module, *, resume: bool) -> None:
    """Load MODEL.WEIGHTS, or with `resume` the last checkpoint of OUTPUT_DIR, averaged as in MODEL.EMA."""
    metadata = {"class_names": get_class_names(cfg.DATASETS.TEST)}
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, metadata=metadata)
    if resume and not checkpointer.has_checkpoint():
        raise UserError(f"--resume: there is no checkpoint in {cfg.OUTPUT_DIR}; set MODEL.WEIGHTS instead")
    averaged = cfg.MODEL.EMA.ENABLED and cfg.MODEL.EMA.EVALUATE == "averaged"
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume, averaged=averaged)
