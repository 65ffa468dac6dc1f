"""Checkpoint files: reading, writing, names, and rank 0's files on other machines."""

import io
import logging
import os
import re
import shutil
from pathlib import Path

import torch

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import atomic_write, check_file, check_stored, writing

logger = logging.getLogger(__name__)

_LAST = "last_checkpoint"
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read at all; an earlier one may be whole."""


def get_checkpoint_name(iteration):
    """Return the name, without `.pth`, of the checkpoint after an iteration."""
    return f"model_{iteration:07d}"


def read_checkpoint(path, source=None, **kwargs):
    """Return the dict that a checkpoint holds, on the CPU; loading it runs no code.

    Args:
        path: the file.
        source: a file object with its content, in place of it.
        kwargs: of `torch.load`, such as mmap=True to leave the tensors on the disk.

    Raises:
        DamagedCheckpointError: a file that is missing, cut off, or no checkpoint of this project.
    """
    try:
        if source is None:
            check_file(path)
            check_stored(path)
        data = torch.load(source or path, map_location="cpu", weights_only=True, **kwargs)
        if "model" not in data:
            raise KeyError("it has no model")
    except Exception as e:  # A damaged file can raise anything while it is unpickled.
        raise DamagedCheckpointError(f"cannot read the checkpoint {path}: {get_first_line(e)}") from e
    return data


def write_checkpoint(path, data, last):
    """Write a checkpoint, whole or not at all, and its folder.

    Args:
        path, data: the file, and what `torch.save` takes.
        last: make it the one that a resumed run starts from, once it is whole.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
        with atomic_write(path, "wb") as f:
            torch.save(data, f)
    except (OSError, RuntimeError) as e:
        # torch's zip writer turns a failed write into a RuntimeError, with the system's reason before it.
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(f"cannot write {path}: is the disk full? ({get_first_line(cause)})") from e
    logger.info(f"saved {path}")
    if last:
        write_last_checkpoint(os.path.dirname(path), os.path.basename(path))


def write_last_checkpoint(folder, basename):
    """Make a file of a folder the one that a resumed run starts from."""
    with atomic_write(os.path.join(folder, _LAST)) as f:
        f.write(basename)


def link_checkpoint(folder, source, target):
    """Give `source` the second name `target`, as a hard link where there are any, and make it the last."""
    source = Path(folder, source)
    path = Path(folder, target)
    temporary = Path(f"{path}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        with open(source, "rb") as f, atomic_write(path, "wb") as copy:
            shutil.copyfileobj(f, copy)
    else:
        with writing(path):
            temporary.replace(path)
        # Renaming onto another name of the same file does nothing, and leaves both.
        temporary.unlink(missing_ok=True)
    write_last_checkpoint(folder, target)


def list_checkpoints(folder):
    """Return the paths of all numbered checkpoints and `model_final.pth`, by the iteration they hold."""
    names = [path.name for path in Path(folder).glob("model_*.pth")]
    names = [name for name in names if _NUMBERED.fullmatch(name) or name == "model_final.pth"]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: _age(folder, name))]


def _age(folder, name):
    """(iteration, name); model_final.pth may be of a shorter run that was extended later."""
    match = _NUMBERED.fullmatch(name)
    if match:
        return int(match[1]), name
    try:
        return int(read_checkpoint(os.path.join(folder, name), mmap=True)["iteration"]), name
    except (DamagedCheckpointError, KeyError):
        return -1, name


def read_last_checkpoint(folder, *others, **kwargs):
    """Return (path, data) of the checkpoint to resume from, ("", None) without one.

    Args:
        folder, kwargs: OUTPUT_DIR, and those of `torch.load`.
        others: paths to try after all of the folder's.

    Raises:
        DamagedCheckpointError: none of those that are there can be read.
    """
    candidates = [*list_resume_candidates(folder), *others]
    for i, candidate in enumerate(candidates):
        try:
            return candidate, read_checkpoint(candidate, **kwargs)
        except DamagedCheckpointError as e:
            if i + 1 == len(candidates):
                raise
            logger.warning(f"{e}; trying {candidates[i + 1]}")
    return "", None


def list_resume_candidates(folder):
    """Return the paths of what to resume from: the file that was tagged, then the others, newest first."""
    files = list_checkpoints(folder)[::-1]
    tag = Path(folder, _LAST)
    try:
        tagged = os.path.join(folder, os.path.basename(tag.read_text(encoding="utf-8").strip()))
    except (OSError, UnicodeDecodeError):
        return files
    if os.path.isfile(tagged):
        return [tagged, *(path for path in files if path != tagged)]
    if files:
        logger.warning(f"{tag} names {tagged!r}, which does not exist")
    return files


def prune_checkpoints(folder, saved, max_to_keep):
    """Delete the oldest numbered checkpoints of a folder, so that `max_to_keep` with `saved` are left."""
    names = [os.path.basename(path) for path in list_checkpoints(folder)]
    others = [name for name in names if _NUMBERED.fullmatch(name) and name != saved]
    for name in others[: max(0, len(others) - max_to_keep + 1)]:
        delete_checkpoint(folder, name)


def delete_checkpoint(folder, name):
    """Delete a checkpoint; one that is gone already is no error."""
    path = Path(folder, name)
    with writing(path):
        path.unlink(missing_ok=True)


def broadcast_file(path):
    """Return (rank 0's path, the content where a rank does not see that very file, else None).

    All ranks call it.
    """
    path, stamp = comm.broadcast((path, _stamp(path)))
    if not comm.any_rank(_stamp(path) != stamp):
        return path, None
    content = None
    if comm.is_main_process():
        with open(path, "rb") as f:
            content = f.read()
    return path, io.BytesIO(comm.broadcast(content))


def _stamp(path):
    """What two files hardly share that are not the same: size and time, to the nanosecond."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
