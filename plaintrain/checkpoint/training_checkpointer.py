"""The checkpoints of a training run, and the weights of an evaluation, as a config describes them."""

import logging

from plaintrain.checkpoint.checkpointer import DetectionCheckpointer
from plaintrain.checkpoint.files import delete_checkpoint, get_checkpoint_name
from plaintrain.data.catalog import get_class_names
from plaintrain.solver.schedule import every
from plaintrain.utils.errors import UserError
from plaintrain.utils.stop import Stopped

logger = logging.getLogger(__name__)


class TrainingCheckpointer(DetectionCheckpointer):
    """The checkpoints of a run: numbered ones, and `model_final` at its end.

    As a context manager it waits, at the end of its block, until the last file is whole.
    """

    def __init__(self, model, save_dir, *, period=0, max_to_keep=0, final_model=None, **kwargs):
        """
        Args:
            model, save_dir, kwargs: see `DetectionCheckpointer`.
            period: checkpoints that are not due by it, such as before an evaluation, are deleted once the
                next one is written.
            max_to_keep: numbered checkpoints to keep; 0 keeps all.
            final_model: function to the module whose weights become `model_final`, beside a numbered
                checkpoint to resume from; None makes the last checkpoint itself `model_final`.
        """
        super().__init__(model, save_dir, **kwargs)
        self._period = period
        self._max_to_keep = max_to_keep
        self._final_model = final_model
        self._temporary = None

    def save_iteration(self, iteration):
        """Save everything as `model_ITERATION`; all ranks call it after that iteration (from 0)."""
        self.save(get_checkpoint_name(iteration), iteration=iteration)
        self._delete_temporary()
        if not every(self._period, iteration):
            self._temporary = iteration
        elif self._max_to_keep:
            self.prune(self._max_to_keep)

    def save_final(self):
        """Write `model_final` from the newest checkpoint, or with the weights of `final_model`."""
        if self._final_model is not None:
            self.save_weights("model_final", self._final_model())
        else:
            self.link(self.last_name, "model_final")
            self._delete_temporary()

    def _delete_temporary(self):
        if self._temporary is not None:
            self.in_order(delete_checkpoint, self.save_dir, get_checkpoint_name(self._temporary) + ".pth")
            self._temporary = None

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        try:
            self.wait()
        except UserError as e:
            # The error that ended the block before is the one to report.
            if error is None or isinstance(error, Stopped):
                raise
            logger.error(str(e))


def build_checkpointer(cfg, model, **checkpointables):
    """Build the `TrainingCheckpointer` of SOLVER.*, MODEL.EMA and OUTPUT_DIR; "ema" may be a `ModelEMA`."""
    ema = checkpointables.get("ema")
    ends_averaged = ema is not None and ema.enabled and cfg.MODEL.EMA.FINAL == "averaged"
    return TrainingCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        period=cfg.SOLVER.CHECKPOINT_PERIOD,
        max_to_keep=cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP,
        final_model=(lambda: ema.module) if ends_averaged else None,
        about={"config": cfg.dump(), "class_names": get_class_names(cfg.DATASETS.TRAIN)},
        asynchronous=cfg.SOLVER.ASYNC_CHECKPOINT,
        **checkpointables,
    )


def load_for_evaluation(cfg, model, *, resume):
    """Load MODEL.WEIGHTS, or with `resume` the last checkpoint of OUTPUT_DIR, averaged as MODEL.EMA says.

    Published classes are taken by the names of those of DATASETS.TEST.
    """
    about = {"class_names": get_class_names(cfg.DATASETS.TEST)}
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, about=about)
    if resume and not checkpointer.has_checkpoint():
        raise UserError(f"--resume: there is no checkpoint in {cfg.OUTPUT_DIR}; set MODEL.WEIGHTS instead")
    averaged = cfg.MODEL.EMA.ENABLED and cfg.MODEL.EMA.EVALUATE == "averaged"
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume, averaged=averaged)
