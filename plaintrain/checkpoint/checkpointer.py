"""Save and load the state of a run. Writes are atomic, and loading runs no code."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from plaintrain.checkpoint import files, state
from plaintrain.checkpoint.async_writer import AsyncWriter
from plaintrain.checkpoint.pretrained import download_weights, get_averaged_state, load_weights
from plaintrain.checkpoint.validation import check_states
from plaintrain.solver.schedule import every
from plaintrain.utils import comm

logger = logging.getLogger(__name__)


class DetectionCheckpointer:
    """Saves and loads a model and other objects that have a state, such as the optimizer.

    Attributes:
        last_name: the checkpoint last saved or resumed from, without `.pth`; "" before.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        metadata: dict[str, Any] | None = None,
        asynchronous: bool = False,
        **checkpointables: Any,
    ):
        """
        Args:
            save_to_disk: None writes on rank 0 only.
            metadata: entries of every file, such as {"class_names": [...]}.
            asynchronous: write in a thread; the next `save` or `wait` raises its errors.
        """
        self.model = comm.unwrap_model(model)
        self.save_dir = save_dir
        self.save_to_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        self.metadata = metadata or {}
        self.checkpointables = checkpointables
        self.last_name = ""
        self._writer = AsyncWriter(asynchronous)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `name`.pth with the model, the checkpointables and `kwargs`, and tag it as the last.

        All ranks call it: with checkpointables, the file also holds the RNG state of each rank. `kwargs` are
        tensors, numbers, strings, or dicts and lists of these.
        """
        states: dict[str, Any] = {"model": self.model.state_dict()}
        states |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        if self.checkpointables:
            # These states differ between ranks.
            states["rng_states"] = state.gather_rng_states()  # all ranks
            states |= state.gather_norm_buffers(states)  # all ranks
        self._write(name, states, kwargs, last=True)
        self.last_name = name

    def save_weights(self, name: str, model: nn.Module, **kwargs: Any) -> None:
        """Write `name`.pth with a model's weights and `kwargs`, not to resume from; all ranks call it."""
        weights = comm.unwrap_model(model).state_dict()
        state.average_norm_buffers(weights)  # all ranks
        self._write(name, {"model": weights}, kwargs, last=False)

    def _write(self, name: str, data: dict[str, Any], kwargs: dict[str, Any], *, last: bool) -> None:
        if not self.save_to_disk:
            return
        entries = {**self.metadata, **kwargs}
        data |= {key: state.convert_to_builtin_types(value, key) for key, value in entries.items()}
        path = os.path.join(self.save_dir, name + ".pth")
        self._submit(files.write_checkpoint, path, self._writer.copy(data), last)

    def _submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Call `function(*args)` after all earlier writes, on the rank that writes."""
        if self.save_to_disk:
            self._writer.submit(function, *args)

    def wait(self) -> None:
        """Wait until all files are complete, and raise the first error."""
        self._writer.wait()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a file of `save_dir` the one to resume from."""
        files.write_last_checkpoint(self.save_dir, last_filename_basename)

    def link(self, source: str, target: str) -> None:
        """Give a checkpoint a second name, as a hard link where the file system supports it."""
        self._submit(files.link_checkpoint, self.save_dir, source + ".pth", target + ".pth")

    def prune(self, max_to_keep: int) -> None:
        """Delete the oldest numbered checkpoints until `max_to_keep` remain, the last one included."""
        self._submit(files.prune_checkpoints, self.save_dir, self.last_name + ".pth", max_to_keep)

    def has_checkpoint(self) -> bool:
        """Return whether `save_dir` of rank 0 holds a checkpoint to resume from; all ranks call it."""
        return comm.broadcast(bool(files.list_resume_candidates(self.save_dir)))

    def get_checkpoint_file(self) -> str:
        """Return the path of the last checkpoint, or "" if there is none."""
        return next(iter(files.list_resume_candidates(self.save_dir)), "")

    def get_all_checkpoint_files(self) -> list[str]:
        """Return the paths of the numbered checkpoints and `model_final.pth`, by iteration."""
        return files.list_checkpoints(self.save_dir)

    def load(self, path: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        """Load a checkpoint, or its content `data`; return the other entries, such as `iteration`."""
        data = data or files.read_checkpoint(path)
        check_states(path, data, self.model, self.checkpointables)
        return self._load(path, data)

    def _load(self, path: str, data: dict[str, Any]) -> dict[str, Any]:
        """Load content that `check_states` has accepted."""
        state.convert_older_states(data)
        if self.checkpointables:
            state.restore_norm_buffers(data)
        self.model.load_state_dict(data.pop("model"))
        for name, item in self.checkpointables.items():
            state.load_state(item, data.pop(name), f"the {name} in {path}")
        return data

    def _resume(self, path: str, data: dict[str, Any], averaged: bool) -> dict[str, Any]:
        self._load(path, data)
        logger.info(f"resumed from {path}")
        self.last_name = os.path.basename(path).removesuffix(".pth")
        if self.checkpointables and "rng_states" in data:
            state.load_rng_states(data.pop("rng_states"))
        if averaged and data.get("ema"):
            self.model.load_state_dict(get_averaged_state(data["ema"]))
            logger.info("using its averaged weights (MODEL.EMA)")
        return data

    def resume_or_load(self, path: str, *, resume: bool = True, averaged: bool = False) -> dict[str, Any]:
        """Resume from the last checkpoint, or load pretrained weights; all ranks call it.

        Rank 0 reads the files and sends them to ranks that do not share its file system. Return the result
        of `load` for a resumed checkpoint, otherwise {}: fine-tuning starts at iteration 0.

        Args:
            path: pretrained weights, as MODEL.WEIGHTS, or "".
            resume: prefer the last checkpoint of `save_dir`; if it is damaged, the one before it.
            averaged: load the averaged weights (MODEL.EMA) of a file that has both.
        """
        is_main = comm.is_main_process()
        if resume:
            last = ""
            data = None
            if is_main:
                check = partial(check_states, model=self.model, items=self.checkpointables, averaged=averaged)
                last, data = files.read_last_checkpoint(self.save_dir, check=check)
            # On other machines the folder may be missing or hold another run.
            last, content = files.broadcast_file(last)
            if last:
                return self._resume(last, data or files.read_checkpoint(last, content), averaged)
            logger.warning(f"no checkpoint in {self.save_dir}; starting from the beginning")
        if not path:
            logger.info("MODEL.WEIGHTS is empty; starting from random weights")
            return {}
        file, content = files.broadcast_file(download_weights(path) if is_main else "")
        class_names = self.metadata.get("class_names")
        load_weights(self.model, path, class_names, averaged=averaged, file=content or file)
        return {}


@dataclass(eq=False)
class PeriodicCheckpointer:
    """Checkpointer of every `period` iterations, unless 0, and `model_final` after `max_iter`.

    Another `file_prefix` than "model" replaces it in all names.
    """

    checkpointer: DetectionCheckpointer
    period: int
    max_iter: int | None = None
    max_to_keep: int | None = None
    file_prefix: str = "model"

    def step(self, iteration: int, **kwargs: Any) -> None:
        """Save with `kwargs` if a checkpoint is due after this iteration (from 0)."""
        name = files.get_checkpoint_name(iteration, self.file_prefix)
        if every(self.period, iteration):
            self.save(name, iteration=iteration, **kwargs)
            if self.max_to_keep:
                self.checkpointer.prune(self.max_to_keep)
        if self.max_iter is None or iteration < self.max_iter - 1:
            return
        if self.checkpointer.last_name == name:
            self.checkpointer.link(name, f"{self.file_prefix}_final")
        else:
            self.save(f"{self.file_prefix}_final", iteration=iteration, **kwargs)

    def save(self, name: str, **kwargs: Any) -> None:
        self.checkpointer.save(name, **kwargs)
