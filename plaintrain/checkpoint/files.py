"""Checkpoint files: reading and writing, names, and files of rank 0's machine for the others."""

import io
import logging
import os
import re
import shutil
import zlib

import torch

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, first_line
from plaintrain.utils.files import atomic_write, check_file, check_stored, writing

logger = logging.getLogger(__name__)

_LAST = "last_checkpoint"
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read at all; an earlier one may be whole."""


def read_checkpoint(path, source=None, **kwargs):
    """The dict that a checkpoint holds, on the CPU; loading it runs no code.

    Args:
        path: the file.
        source: an file object with its content, in place of it.
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
        raise DamagedCheckpointError(f"cannot read the checkpoint {path}: {first_line(e)}") from e
    return data


def write_checkpoint(path, data, last):
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file; its folder is made.
        data: what `torch.save` takes.
        last: make it the one that a resumed run starts from, once it is whole.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_write(path, "wb") as f:
            torch.save(data, f)
    except (OSError, RuntimeError) as e:
        # torch's zip writer turns a failed write into a RuntimeError, with the system's reason before it.
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(f"cannot write {path}: is the disk full? ({first_line(cause)})") from e
    logger.info(f"saved {path}")
    if last:
        tag_last(os.path.dirname(path), os.path.basename(path))


def tag_last(folder, basename):
    """Make a file of a folder the one that a resumed run starts from."""
    with atomic_write(os.path.join(folder, _LAST)) as f:
        f.write(basename)


def link_checkpoint(folder, source, target):
    """Give `source` the second name `target`, as a hard link where there are any, and make it the last."""
    source, path = os.path.join(folder, source), os.path.join(folder, target)
    temporary = f"{path}.tmp-{os.getpid()}"
    with writing(path):
        if os.path.exists(temporary):
            os.unlink(temporary)
        try:
            os.link(source, temporary)
            os.replace(temporary, path)
            # Renaming onto another name of the same file does nothing, and leaves both.
            if os.path.exists(temporary):
                os.unlink(temporary)
        except OSError:
            with open(source, "rb") as f, atomic_write(path, "wb") as out:
                shutil.copyfileobj(f, out)
    tag_last(folder, target)


def checkpoint_files(folder):
    """Paths of all numbered checkpoints and `model_final.pth` of a folder, by the iteration they hold."""
    if not os.path.isdir(folder):
        return []
    names = [n for n in os.listdir(folder) if _NUMBERED.fullmatch(n) or n == "model_final.pth"]
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


def read_last(folder, *others, **kwargs):
    """(path, data) of the checkpoint to resume from, ("", None) without one; `kwargs` of `torch.load`.

    `others` are paths to try after all of the folder's.

    Raises:
        DamagedCheckpointError: none of those that are there can be read.
    """
    candidates = [*resume_candidates(folder), *others]
    for i, candidate in enumerate(candidates):
        try:
            return candidate, read_checkpoint(candidate, **kwargs)
        except DamagedCheckpointError as e:
            if i + 1 == len(candidates):
                raise
            logger.warning(f"{e}; trying {candidates[i + 1]}")
    return "", None


def resume_candidates(folder):
    """Paths of what to resume from: the file that was tagged, then the others, newest first."""
    files = checkpoint_files(folder)[::-1]
    try:
        with open(os.path.join(folder, _LAST), encoding="utf-8") as f:
            tagged = os.path.join(folder, os.path.basename(f.read().strip()))
    except (OSError, UnicodeDecodeError):
        return files
    if os.path.isfile(tagged):
        return [tagged, *(path for path in files if path != tagged)]
    if files:
        logger.warning(f"{os.path.join(folder, _LAST)} names {tagged!r}, which is not there")
    return files


def prune_checkpoints(folder, saved, max_to_keep):
    """Remove the oldest numbered checkpoints of a folder, so that `max_to_keep` with `saved` are left."""
    names = [os.path.basename(path) for path in checkpoint_files(folder)]
    others = [name for name in names if _NUMBERED.fullmatch(name) and name != saved]
    for name in others[: max(0, len(others) - max_to_keep + 1)]:
        delete_checkpoint(folder, name)


def delete_checkpoint(folder, name):
    """Delete a checkpoint; one that is gone already is no error."""
    try:
        os.unlink(os.path.join(folder, name))
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"cannot delete the old checkpoint {name} in {folder}: {e.strerror}") from e


def from_rank_0(path):
    """A file of rank 0 on every rank: the path where all see that very file, elsewhere its bytes.

    All ranks call it, and the path of rank 0 counts.

    Returns:
        (rank 0's path, what `torch.load` takes).
    """
    path, facts = comm.broadcast((path, _facts(path)))
    if not comm.any_rank(_facts(path) != facts):
        return path, path
    content = None
    if comm.is_main_process():
        with open(path, "rb") as f:
            content = f.read()
    return path, io.BytesIO(comm.broadcast(content))


def _facts(path):
    """What two files hardly share that are not the same: size and time, to the nanosecond."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def check_same(path, what):
    """Refuse a file that every machine has, but not the same.

    Args:
        path: the file; all ranks call it.
        what: what the file is to the person, such as MODEL.WEIGHTS and its value.

    Raises:
        UserError: names the first rank that has another file than rank 0.
    """
    if comm.get_local_size() == comm.get_world_size():
        return
    sums = comm.all_gather(_checksum(path))
    other = [rank for rank, checksum in enumerate(sums) if checksum != sums[0]]
    if other:
        raise UserError(
            f"{what} is another file on the machine of rank {other[0]} than on that of rank 0: copy it there"
        )


def _checksum(path):
    checksum = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
