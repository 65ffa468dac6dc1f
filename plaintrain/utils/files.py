"""Files that are whole or not there."""

import contextlib
import os
import re
import shutil

from plaintrain.utils.errors import UserError


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a temporary file beside `path` that replaces it, after fsync, when the block succeeds.

    Args:
        path: the file to write.
        mode: "w" (UTF-8 text) or "wb".

    Raises:
        UserError: the folder cannot be written, or the disk is full; `path` is as it was before.
    """
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with writing(path):
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        _sync_folder(os.path.dirname(path) or ".")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def writing(path):
    """Say which file cannot be written when the system raises an error within the block.

    Raises:
        UserError: names the file and the system's reason.
    """
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def make_parent(path):
    """Make the folder that a file is to be in.

    Raises:
        UserError: it cannot be made.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder of {path}: {e.strerror}") from e


def _sync_folder(folder):
    """Bring a renamed file's new name to the disk too, where folders can be synchronised."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_unfinished(folder):
    """Remove what runs that were killed while they wrote have left; nobody may be writing."""
    for name in os.listdir(folder):
        if _UNFINISHED.fullmatch(name):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))


# What a run leaves in its output folder; anything else there belongs to somebody else.
_RUN_FILES = re.compile(
    r"model_(\d{7,}|final|best)\.pth|last_checkpoint|config(-\d+)?\.yaml|metrics\.(json|csv)|inference"
    r"|run\.json|report\.html|log\.txt(\.rank\d+)?|events\.out\.tfevents\..*|bad_batch_\d+(\.rank\d+)?\.pth"
)
_UNFINISHED = re.compile(rf"({_RUN_FILES.pattern})\.tmp-\d+")


def move_old_run(folder):
    """Move the files of an earlier run in `folder` into `old-1`, or the next free `old-N`.

    Returns:
        The folder they went to, or None if there was no earlier run.
    """
    names = [name for name in os.listdir(folder) if _RUN_FILES.fullmatch(name)]
    if not names:
        return None
    number = 1
    while os.path.exists(os.path.join(folder, f"old-{number}")):
        number += 1
    target = os.path.join(folder, f"old-{number}")
    os.mkdir(target)
    for name in names:
        shutil.move(os.path.join(folder, name), target)
    return target
