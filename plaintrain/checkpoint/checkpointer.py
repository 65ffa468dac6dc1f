"""Saving and loading the state of a run. Files are whole or absent, and loading runs no code."""

import logging
import os

from plaintrain.checkpoint.async_writer import Background
from plaintrain.checkpoint.files import (
    broadcast_file,
    get_checkpoint_name,
    link_checkpoint,
    list_checkpoints,
    list_resume_candidates,
    prune_checkpoints,
    read_checkpoint,
    read_last_checkpoint,
    write_checkpoint,
    write_last_checkpoint,
)
from plaintrain.checkpoint.pretrained import download_weights, get_averaged_state, load_weights
from plaintrain.checkpoint.state import (
    average_norm_buffers,
    convert_older_states,
    convert_to_builtin_types,
    gather_norm_buffers,
    gather_rng_states,
    load_rng_states,
    load_state,
    restore_norm_buffers,
)
from plaintrain.solver.schedule import every
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)


class DetectionCheckpointer:
    """Saves and loads a model and whatever else has `state_dict` and `load_state_dict`.

    Attributes:
        last_name: name, without `.pth`, of the checkpoint that was last saved or resumed from; "" before.
    """

    def __init__(
        self, model, save_dir="", *, save_to_disk=None, about=None, asynchronous=False, **checkpointables
    ):
        """
        Args:
            model: the module, possibly wrapped for several GPUs.
            save_dir: folder of the checkpoints.
            save_to_disk: whether `save` writes; default: on rank 0 only.
            about: what every file holds beside the states, such as {"class_names": [...]}.
            asynchronous: write in a thread, and wait only for the copy to the host's memory. What fails is
                raised by the next call of `save` or `wait`.
            checkpointables: `name=object`: optimizer, scheduler, ...
        """
        self.model = comm.unwrap_model(model)
        self.save_dir = save_dir
        self.save_to_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        self.about = about or {}
        self.checkpointables = checkpointables
        self.last_name = ""
        self._background = Background(asynchronous)

    def save(self, name, **kwargs):
        """Write `name`.pth with the model, the checkpointables and `kwargs`, and make it the last.

        All ranks call it: with checkpointables, each one's random state is saved too. `kwargs` are tensors,
        numbers, strings, or dicts and lists of these.
        """
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        states["model"] = self.model.state_dict()
        if self.checkpointables:
            # Of a training: what is each rank's own.
            states["rng_states"] = gather_rng_states()  # all ranks
            states |= gather_norm_buffers(states)  # all ranks
        self._write(name, states, kwargs, last=True)
        self.last_name = name

    def save_weights(self, name, model, **kwargs):
        """Write `name`.pth with a model's weights and `kwargs` only; it is not one to resume from.

        All ranks call it.
        """
        state = comm.unwrap_model(model).state_dict()
        average_norm_buffers(state)  # all ranks
        self._write(name, {"model": state}, kwargs, last=False)

    def _write(self, name, data, kwargs, *, last):
        if not self.save_to_disk:
            return
        data |= {key: convert_to_builtin_types(value, key) for key, value in {**self.about, **kwargs}.items()}
        path = os.path.join(self.save_dir, name + ".pth")
        self.in_order(write_checkpoint, path, self._background.copy(data), last)

    def in_order(self, function, *args):
        """Call `function(*args)` after all files so far are written, on the rank that writes them."""
        if self.save_to_disk:
            self._background.submit(function, *args)

    def wait(self):
        """Wait until every file is whole, and raise what failed."""
        self._background.wait()

    def tag_last_checkpoint(self, last_filename_basename):
        """Make a file of `save_dir` the one that a resumed run starts from."""
        write_last_checkpoint(self.save_dir, last_filename_basename)

    def link(self, source, target):
        """Give a saved checkpoint a second name, as a hard link where the file system has them."""
        self.in_order(link_checkpoint, self.save_dir, source + ".pth", target + ".pth")

    def prune(self, max_to_keep):
        """Delete the oldest numbered checkpoints, so that `max_to_keep` are left with the newest one."""
        self.in_order(prune_checkpoints, self.save_dir, self.last_name + ".pth", max_to_keep)

    def has_checkpoint(self):
        """Return whether `save_dir` of rank 0 holds a checkpoint to resume from; all ranks call it."""
        return comm.broadcast(bool(list_resume_candidates(self.save_dir)))

    def get_checkpoint_file(self):
        """Return the path of the last checkpoint, or "" if there is none."""
        return next(iter(list_resume_candidates(self.save_dir)), "")

    def get_all_checkpoint_files(self):
        """Return the paths of all numbered checkpoints and `model_final.pth`, by the iteration they hold."""
        return list_checkpoints(self.save_dir)

    def load(self, path, data=None):
        """Load one checkpoint of this project; return what else was saved, for example `iteration`.

        Args:
            path: the file.
            data: what `read_checkpoint` returned for it, if that was called before.
        """
        data = data or read_checkpoint(path)
        convert_older_states(data)
        for name in self.checkpointables:
            if name not in data:
                raise UserError(f"{path} holds no {name}, which is needed to resume from it")
        if self.checkpointables:
            restore_norm_buffers(data)
        try:
            self.model.load_state_dict(data.pop("model"))
        except RuntimeError as e:
            reason = " ".join(line.strip() for line in str(e).splitlines()[1:2])
            raise UserError(f"{path} holds another model: {reason}") from e
        for name, item in self.checkpointables.items():
            load_state(item, data.pop(name), f"the {name} in {path}")
        return data

    def _resume(self, path, data, averaged):
        self.load(path, data)
        logger.info(f"resumed from {path}")
        self.last_name = os.path.basename(path).removesuffix(".pth")
        if self.checkpointables and "rng_states" in data:
            load_rng_states(data.pop("rng_states"))
        if averaged and data.get("ema"):
            self.model.load_state_dict(get_averaged_state(data["ema"]))
            logger.info("its averaged weights are taken")
        return data

    def resume_or_load(self, path, *, resume=True, averaged=False):
        """Resume from the last checkpoint, or start from weights; all ranks call it.

        The files are those of rank 0, also for ranks on machines that do not share them. Published classes
        are taken by the `class_names` of `about`.

        Args:
            path: weights to start from, as MODEL.WEIGHTS names them; "" for none.
            resume: take the last checkpoint of `save_dir` if there is one; a damaged one is
                passed over for the one before.
            averaged: give the model the averaged weights (MODEL.EMA) where a file has both.

        Returns:
            What `load` returns if a checkpoint was resumed; otherwise {}, so that training
            starts at iteration 0 whatever the weights were.
        """
        is_main = comm.is_main_process()
        if resume:
            last, data = read_last_checkpoint(self.save_dir) if is_main else ("", None)
            # Other machines may have another folder of that name, without it or of another run.
            last, content = broadcast_file(last)
            if last:
                return self._resume(last, data or read_checkpoint(last, content), averaged)
            logger.warning(f"there is no checkpoint in {self.save_dir}: starting from the beginning")
        if not path:
            logger.info("MODEL.WEIGHTS is empty: starting from random weights")
            return {}
        file, content = broadcast_file(download_weights(path) if is_main else "")
        class_names = self.about.get("class_names")
        load_weights(self.model, path, class_names, averaged=averaged, file=content or file)
        return {}


class PeriodicCheckpointer:
    """Saves every `period` iterations, and `model_final` after the last one, as Detectron2's does."""

    def __init__(self, checkpointer, period, max_iter=None, max_to_keep=None):
        """
        Args:
            checkpointer: a `DetectionCheckpointer`.
            period: iterations between two saves; 0 saves only at the end, after `max_iter` iterations.
            max_to_keep: numbered checkpoints to keep; 0 or None keeps all.
        """
        self.checkpointer = checkpointer
        self.period = period
        self.max_iter = max_iter
        self.max_to_keep = max_to_keep

    def step(self, iteration, **kwargs):
        """Save if it is time, after an iteration (from 0); `kwargs` are those of `save`."""
        is_last = self.max_iter is not None and iteration >= self.max_iter - 1
        if every(self.period, iteration):
            self.checkpointer.save(get_checkpoint_name(iteration), iteration=iteration, **kwargs)
            if self.max_to_keep:
                self.checkpointer.prune(self.max_to_keep)
        if is_last and self.checkpointer.last_name == get_checkpoint_name(iteration):
            self.checkpointer.link(get_checkpoint_name(iteration), "model_final")
        elif is_last:
            self.save("model_final", iteration=iteration, **kwargs)

    def save(self, name, **kwargs):
        """Save now, under a name without `.pth`."""
        self.checkpointer.save(name, **kwargs)
