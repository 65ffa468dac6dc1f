"""When a run saves, and under which names."""

from plaintrain.solver.schedule import every


def checkpoint_name(iteration):
    """Return the name, without `.pth`, of the checkpoint after an iteration."""
    return f"model_{iteration:07d}"


class PeriodicCheckpointer:
    """Saves every `period` iterations, and `model_final` after the last one, as Detectron2's does."""

    def __init__(self, checkpointer, period, max_iter=None, max_to_keep=None):
        """
        Args:
            checkpointer: a `DetectionCheckpointer`.
            period: iterations between two saves; 0 saves only at the end.
            max_iter: total number of iterations, or None if there is no end.
            max_to_keep: numbered checkpoints to keep; 0 or None keeps all.
        """
        self.checkpointer = checkpointer
        self.period = period
        self.max_iter = max_iter
        self.max_to_keep = max_to_keep

    def step(self, iteration, **kwargs):
        """Save if it is time.

        Args:
            iteration: the iteration that was finished, counted from 0; saved as `iteration`.
            kwargs: passed to `save`.
        """
        is_last = self.max_iter is not None and iteration >= self.max_iter - 1
        if every(self.period, iteration):
            self.checkpointer.save(checkpoint_name(iteration), iteration=iteration, **kwargs)
            if self.max_to_keep:
                self.checkpointer.prune(self.max_to_keep)
        if is_last and self.checkpointer.iteration == iteration:
            self.checkpointer.link(checkpoint_name(iteration), "model_final")
        elif is_last:
            self.save("model_final", iteration=iteration, **kwargs)

    def save(self, name, **kwargs):
        """Save now, under a name without `.pth`."""
        self.checkpointer.save(name, **kwargs)
