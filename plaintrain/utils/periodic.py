"""When a run saves, and under which names."""

import contextlib
import logging

from plaintrain.utils.checkpoint_files import prune_checkpoints
from plaintrain.utils.errors import UserError
from plaintrain.utils.stop import Stopped
from plaintrain.utils.storage import every

logger = logging.getLogger(__name__)


def _numbered(iteration):
    return f"model_{iteration:07d}.pth"


class PeriodicCheckpointer:
    """Saves every `period` iterations, and `model_final` after the last one.

    As a context manager it begins with the `model_final` that a resumed run lacks which was interrupted just
    before it, and waits, at the end of its block, until the last file is whole.
    """

    def __init__(self, checkpointer, period, max_iter=None, max_to_keep=0, *, final_model=None):
        """
        Args:
            checkpointer: a `DetectionCheckpointer`.
            period: iterations between two saves; 0 saves only at the end.
            max_iter: total number of iterations, or None if there is no end.
            max_to_keep: numbered checkpoints to keep; 0 or None keeps all.
            final_model: function to the module whose weights become `model_final`, beside a numbered
                checkpoint to resume from; None makes it the last checkpoint itself.
        """
        self.checkpointer, self.period, self.final_model = checkpointer, period, final_model
        self.max_iter, self.max_to_keep = max_iter, max_to_keep
        # What the last step was given belongs to its iteration, also when that is saved later.
        self._saved, self._given = None, {}

    def is_due(self, iteration):
        """Whether `step(iteration)` will save."""
        return every(self.period, iteration) or self._is_last(iteration)

    def _is_last(self, iteration):
        return self.max_iter is not None and iteration >= self.max_iter - 1

    def step(self, iteration, *, now=False, **kwargs):
        """Save if it is time; raises what failed in the background.

        Args:
            iteration: the iteration that was finished, counted from 0; saved as `iteration`.
            now: save a numbered checkpoint in any case.
            kwargs: passed to `save`.
        """
        self.checkpointer.check()
        self._given = kwargs
        if now or every(self.period, iteration):
            self._save_numbered(iteration, **kwargs)
        if self._is_last(iteration):
            self.finish(iteration, **kwargs)

    def finish(self, iteration, **kwargs):
        """Save `model_final`; `step` does it after the last iteration, a run that ends before calls it."""
        if self.final_model is not None:
            if self._saved != iteration:
                self._save_numbered(iteration, **kwargs)
            self.checkpointer.save_weights("model_final", self.final_model(), **kwargs)
        elif self._saved == iteration:
            self.checkpointer.link(_numbered(iteration).removesuffix(".pth"), "model_final")
        else:
            self.save("model_final", iteration=iteration, **kwargs)

    def save(self, name, **kwargs):
        """Save now, under a name without `.pth`."""
        self.checkpointer.save(name, **kwargs)

    def _save_numbered(self, iteration, **kwargs):
        name = _numbered(iteration)
        self.save(name.removesuffix(".pth"), iteration=iteration, **kwargs)
        self._saved = iteration
        if self.max_to_keep:
            self.checkpointer.in_order(prune_checkpoints, self.checkpointer.save_dir, name, self.max_to_keep)

    @contextlib.contextmanager
    def saving_if_stopped(self, iteration, **kwargs):
        """Save, unless that is done, when a signal ends an evaluation on all ranks within the block.

        Args:
            iteration: see `step`; nothing is saved before the first iteration, -1.
            kwargs: of `step`, those that are other ones by now.
        """
        try:
            yield
        except Stopped:
            if iteration >= 0 and self.checkpointer.iteration != iteration:
                self._save_numbered(iteration, **{**self._given, **kwargs})
            raise

    def __enter__(self):
        last = self.checkpointer.iteration
        if last is not None and self._is_last(last) and self.checkpointer.resumed_from == _numbered(last):
            self._saved = last
            self.finish(last)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.checkpointer.wait()
        except UserError as e:
            # What ended the block before is what is to be told.
            if error is None or isinstance(error, Stopped):
                raise
            logger.error(str(e))
