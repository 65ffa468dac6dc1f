"""Saving and loading the state of a run. Files are whole or absent, and loading runs no code."""

import logging
import os
import re

import torch

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, first_line
from plaintrain.utils.files import atomic_write
from plaintrain.utils.rng import load_rng_states, rng_states
from plaintrain.utils.state import load_state, plain
from plaintrain.utils.storage import every, get_event_storage, is_logging
from plaintrain.weights import averaged_state, load_weights

logger = logging.getLogger(__name__)

_LAST = "last_checkpoint"


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read at all; an earlier one may be whole."""


class DetectionCheckpointer:
    """Saves and loads a model and whatever else has `state_dict` and `load_state_dict`."""

    def __init__(self, model, save_dir="", *, save_to_disk=None, about=None, **checkpointables):
        """
        Args:
            model: the module, possibly wrapped for several GPUs.
            save_dir: folder of the checkpoints.
            save_to_disk: whether `save` writes; default: on rank 0 only.
            about: what every file holds beside the states, such as {"class_names": [...]}.
            checkpointables: `name=object`: optimizer, scheduler, ...
        """
        self.model = comm.unwrap_model(model)
        self.save_dir = save_dir
        self.save_to_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        self.about, self.checkpointables = about or {}, checkpointables

    def save(self, name, **kwargs):
        """Write `name`.pth with the model, the checkpointables and `kwargs`, and make it the last.

        All ranks call it: within the `EventStorage` of a training, each one's random state is saved too.

        Args:
            name: file name without `.pth`.
            kwargs: further tensors, numbers, strings, or dicts and lists of these.

        Raises:
            UserError: the folder cannot be written or the disk is full; older files are kept.
        """
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        if is_logging():
            # Of a training: what each rank draws next, and the window of the log's medians.
            states |= {"rng_states": rng_states(), "log_window": get_event_storage().window()}
        self._write(name, {"model": self.model.state_dict(), **states}, kwargs)
        if self.save_to_disk:
            self.tag_last_checkpoint(name + ".pth")

    def save_weights(self, name, model, **kwargs):
        """Write `name`.pth with a model's weights and `kwargs` only; it is not one to resume from.

        Args:
            name, kwargs: see `save`.
            model: the module, for example one with averaged weights.
        """
        self._write(name, {"model": comm.unwrap_model(model).state_dict()}, kwargs)

    def _write(self, name, data, kwargs):
        if not self.save_to_disk:
            return
        data |= {key: plain(value, key) for key, value in {**self.about, **kwargs}.items()}
        path = self._path(name + ".pth")
        try:
            os.makedirs(self.save_dir, exist_ok=True)
            with atomic_write(path, "wb") as f:
                torch.save(data, f)
        except (OSError, RuntimeError) as e:
            # torch's zip writer turns a failed write into a RuntimeError.
            raise UserError(f"cannot write {path}: is the disk full? ({first_line(e)})") from e
        logger.info(f"saved {path}")

    def _path(self, basename):
        return os.path.join(self.save_dir, basename)

    def tag_last_checkpoint(self, last_filename_basename):
        """Make a file of `save_dir` the one that a resumed run starts from."""
        with atomic_write(self._path(_LAST)) as f:
            f.write(last_filename_basename)

    def link(self, source, target):
        """Give a saved checkpoint a second name, as a hard link where the file system has them."""
        if not self.save_to_disk:
            return
        temporary = self._path(f"{target}.tmp")
        if os.path.exists(temporary):
            os.unlink(temporary)
        try:
            os.link(self._path(source + ".pth"), temporary)
            os.replace(temporary, self._path(target + ".pth"))
            # Renaming onto another name of the same file does nothing, and leaves both.
            if os.path.exists(temporary):
                os.unlink(temporary)
        except OSError:
            with (
                open(self._path(source + ".pth"), "rb") as f,
                atomic_write(self._path(target + ".pth"), "wb") as out,
            ):
                out.writelines(iter(lambda: f.read(1 << 20), b""))
        self.tag_last_checkpoint(target + ".pth")

    def has_checkpoint(self):
        """Whether `save_dir` holds a checkpoint to resume from."""
        return bool(self._candidates())

    def get_checkpoint_file(self):
        """Path of the last checkpoint, or "" if there is none."""
        candidates = self._candidates()
        return candidates[0] if candidates else ""

    def get_all_checkpoint_files(self):
        """Paths of all numbered checkpoints and `model_final.pth`, by the iteration they hold."""
        if not os.path.isdir(self.save_dir):
            return []
        names = [n for n in os.listdir(self.save_dir) if re.fullmatch(r"model_(\d{7,}|final)\.pth", n)]
        return [self._path(name) for name in sorted(names, key=self._age)]

    def _age(self, name):
        """(iteration, name); model_final.pth may be of a shorter run that was extended later."""
        match = re.search(r"_(\d+)\.pth$", name)
        if match:
            return int(match[1]), name
        try:
            return torch.load(self._path(name), weights_only=True, mmap=True)["iteration"], name
        except Exception:  # A damaged file can raise anything; it comes last.
            return -1, name

    def _candidates(self):
        """What to resume from: the tagged file, then the others, newest first."""
        files = self.get_all_checkpoint_files()[::-1]
        try:
            with open(self._path(_LAST), encoding="utf-8") as f:
                tagged = self._path(os.path.basename(f.read().strip()))
        except (OSError, UnicodeDecodeError):
            return files
        if os.path.isfile(tagged):
            return [tagged, *(path for path in files if path != tagged)]
        if files:
            logger.warning(f"{self._path(_LAST)} names {tagged!r}, which is not there")
        return files

    def load(self, path, checkpointables=None):
        """Load one checkpoint of this project.

        Args:
            path: the file.
            checkpointables: names of those to load; default: all.

        Returns:
            Everything else that was saved, for example `iteration`.

        Raises:
            UserError: a file that cannot be read, or that belongs to another model.
        """
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            state = data.pop("model")
        except Exception as e:  # A damaged file can raise anything while it is unpickled.
            raise DamagedCheckpointError(f"cannot read the checkpoint {path}: {first_line(e)}") from e
        try:
            self.model.load_state_dict(state)
        except RuntimeError as e:
            reason = " ".join(line.strip() for line in str(e).splitlines()[1:2])
            raise UserError(f"{path} holds another model: {reason}") from e
        names = self.checkpointables if checkpointables is None else checkpointables
        for name in names:
            if name not in data:
                raise UserError(f"{path} holds no {name}, which is needed to resume from it")
            load_state(self.checkpointables[name], data.pop(name), f"the {name} in {path}")
        return data

    def resume_or_load(self, path, *, resume=True, class_names=None, averaged=False):
        """Resume from the last checkpoint, or start from weights.

        Args:
            path: weights to start from, as MODEL.WEIGHTS names them; "" for none.
            resume: take the last checkpoint of `save_dir` if there is one; a damaged one is
                passed over for the one before.
            class_names: the dataset's, to take published classes by name; default those of `about`.
            averaged: give the model the averaged weights (MODEL.EMA) where a file has both.

        Returns:
            What `load` returns if a checkpoint was resumed; otherwise {}, so that training
            starts at iteration 0 whatever the weights were.

        Raises:
            UserError: every checkpoint is damaged, or the weights cannot be used.
        """
        candidates = self._candidates() if resume else []
        for i, candidate in enumerate(candidates):
            try:
                data = self.load(candidate)
            except DamagedCheckpointError as e:
                if i + 1 == len(candidates):
                    raise
                logger.warning(f"{e}; trying {candidates[i + 1]}")
            else:
                logger.info(f"resumed from {candidate}")
                if self.checkpointables and "rng_states" in data:
                    load_rng_states(data.pop("rng_states"))
                if averaged and data.get("ema"):
                    self.model.load_state_dict(averaged_state(data["ema"]))
                    logger.info("its averaged weights are taken")
                return data
        if resume:
            logger.warning(f"there is no checkpoint in {self.save_dir}: starting from the beginning")
        if path:
            class_names = class_names or self.about.get("class_names")
            load_weights(self.model, path, class_names, averaged=averaged)
        else:
            logger.info("MODEL.WEIGHTS is empty: starting from random weights")
        return {}


class PeriodicCheckpointer:
    """Saves every `period` iterations, and `model_final` after the last one."""

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
        self._saved = None

    def is_due(self, iteration):
        """Whether `step(iteration)` will save."""
        return every(self.period, iteration) or self._is_last(iteration)

    def _is_last(self, iteration):
        return self.max_iter is not None and iteration >= self.max_iter - 1

    def step(self, iteration, *, now=False, **kwargs):
        """Save if it is time.

        Args:
            iteration: the iteration that was finished, counted from 0; saved as `iteration`.
            now: save a numbered checkpoint in any case.
            kwargs: passed to `save`.
        """
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
            self.checkpointer.link(f"model_{iteration:07d}", "model_final")
        else:
            self.save("model_final", iteration=iteration, **kwargs)

    def save(self, name, **kwargs):
        """Save now, under a name without `.pth`."""
        self.checkpointer.save(name, **kwargs)

    def _save_numbered(self, iteration, **kwargs):
        name = f"model_{iteration:07d}"
        self.save(name, iteration=iteration, **kwargs)
        self._saved = iteration
        self._prune(name)

    def _prune(self, saved):
        if not self.max_to_keep or not self.checkpointer.save_to_disk:
            return
        files = self.checkpointer.get_all_checkpoint_files()
        saved = f"{saved}.pth"
        others = [p for p in files if re.search(r"_\d+\.pth$", p) and os.path.basename(p) != saved]
        for path in others[: len(others) - self.max_to_keep + 1]:
            os.unlink(path)


def build_periodic_checkpointer(cfg, checkpointer, final_model=None):
    """The `PeriodicCheckpointer` of SOLVER.CHECKPOINT_PERIOD, MAX_ITER and CHECKPOINT_MAX_TO_KEEP."""
    solver = cfg.SOLVER
    periods = solver.CHECKPOINT_PERIOD, solver.MAX_ITER, solver.CHECKPOINT_MAX_TO_KEEP
    return PeriodicCheckpointer(checkpointer, *periods, final_model=final_model)
