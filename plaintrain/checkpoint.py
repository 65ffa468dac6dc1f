"""Saving and loading the state of a run. Files are whole or absent, and loading runs no code."""

import logging
import numbers
import os
import re

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, first_line
from plaintrain.utils.files import atomic_write
from plaintrain.utils.storage import every
from plaintrain.weights import load_weights

logger = logging.getLogger(__name__)

_LAST = "last_checkpoint"


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read at all; an earlier one may be whole."""


def unwrap_model(model):
    """The module inside DistributedDataParallel or DataParallel, or the model itself."""
    if isinstance(model, DistributedDataParallel | DataParallel):
        return model.module
    return model


class DetectionCheckpointer:
    """Saves and loads a model and whatever else has `state_dict` and `load_state_dict`."""

    def __init__(self, model, save_dir="", *, save_to_disk=None, **checkpointables):
        """
        Args:
            model: the module, possibly wrapped for several GPUs.
            save_dir: folder of the checkpoints.
            save_to_disk: whether `save` writes; default: on rank 0 only.
            checkpointables: `name=object`: optimizer, scheduler, ...
        """
        self.model = unwrap_model(model)
        self.save_dir = save_dir
        self.save_to_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        self.checkpointables = checkpointables

    def save(self, name, **kwargs):
        """Write `name`.pth with the model, the checkpointables and `kwargs`, and make it the last.

        Args:
            name: file name without `.pth`.
            kwargs: further tensors, numbers, strings, or dicts and lists of these.

        Raises:
            UserError: the folder cannot be written or the disk is full; older files are kept.
        """
        if not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        data |= {key: _plain(value, key) for key, value in kwargs.items()}
        path = self._path(name + ".pth")
        try:
            os.makedirs(self.save_dir, exist_ok=True)
            with atomic_write(path, "wb") as f:
                torch.save(data, f)
        except (OSError, RuntimeError) as e:
            # torch's zip writer turns a failed write into a RuntimeError.
            raise UserError(f"cannot write {path}: is the disk full? ({first_line(e)})") from e
        logger.info(f"saved {path}")
        self.tag_last_checkpoint(name + ".pth")

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
            _load_state(self.checkpointables[name], data.pop(name), f"the {name} in {path}")
        return data

    def resume_or_load(self, path, *, resume=True, class_names=None):
        """Resume from the last checkpoint, or start from weights.

        Args:
            path: weights to start from, as MODEL.WEIGHTS names them; "" for none.
            resume: take the last checkpoint of `save_dir` if there is one; a damaged one is
                passed over for the one before.
            class_names: the dataset's, to take the classes of published weights by name.

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
                return data
        if resume:
            logger.warning(f"there is no checkpoint in {self.save_dir}: starting from the beginning")
        if path:
            load_weights(self.model, path, class_names)
        else:
            logger.info("MODEL.WEIGHTS is empty: starting from random weights")
        return {}


def _load_state(item, state, what):
    """`item.load_state_dict(state)`, refusing the state of another kind of optimizer."""
    kinds = [
        {"betas", "momentum"} & set(group)
        for groups in (state, item.state_dict())
        for group in groups.get("param_groups", [])[:1]
    ]
    try:
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            raise ValueError("it is of another kind, see SOLVER.OPTIMIZER")
        item.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{what} does not fit this run: {e}") from e


def _plain(value, name):
    """`value` as types that `torch.load(weights_only=True)` reads: NumPy's numbers become Python's."""
    if isinstance(value, bool | str | torch.Tensor | type(None)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, dict):
        return {key: _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, name) for item in value)
    raise UserError(f"a checkpoint cannot hold {name}, a {type(value).__name__}")


class PeriodicCheckpointer:
    """Saves every `period` iterations, and `model_final` after the last one."""

    def __init__(self, checkpointer, period, max_iter=None, max_to_keep=0):
        """
        Args:
            checkpointer: a `DetectionCheckpointer`.
            period: iterations between two saves; 0 saves only at the end.
            max_iter: total number of iterations, or None if there is no end.
            max_to_keep: numbered checkpoints to keep; 0 or None keeps all.
        """
        self.checkpointer, self.period = checkpointer, period
        self.max_iter, self.max_to_keep = max_iter, max_to_keep

    def is_due(self, iteration):
        """Whether `step(iteration)` will save."""
        return every(self.period, iteration) or self._is_last(iteration)

    def _is_last(self, iteration):
        return self.max_iter is not None and iteration >= self.max_iter - 1

    def step(self, iteration, **kwargs):
        """Save if it is time.

        Args:
            iteration: the iteration that was finished, counted from 0; saved as `iteration`.
            kwargs: passed to `save`.
        """
        name = f"model_{iteration:07d}"
        if every(self.period, iteration):
            self.save(name, iteration=iteration, **kwargs)
            if self._is_last(iteration):
                self.checkpointer.link(name, "model_final")
            self._prune(name)
        elif self._is_last(iteration):
            self.save("model_final", iteration=iteration, **kwargs)

    def save(self, name, **kwargs):
        """Save now, under a name without `.pth`."""
        self.checkpointer.save(name, **kwargs)

    def _prune(self, saved):
        if not self.max_to_keep or not self.checkpointer.save_to_disk:
            return
        files = self.checkpointer.get_all_checkpoint_files()
        saved = f"{saved}.pth"
        others = [p for p in files if re.search(r"_\d+\.pth$", p) and os.path.basename(p) != saved]
        for path in others[: len(others) - self.max_to_keep + 1]:
            os.unlink(path)
