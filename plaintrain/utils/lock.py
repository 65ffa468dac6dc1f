"""Lock of an output folder."""

import fcntl
import glob
import logging
import multiprocessing
import os
import shutil
import socket
import stat
import tempfile
import time
from multiprocessing.util import get_temp_dir

from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_NAME = "run.lock"
# {folder: file descriptor} of the locks of this process. Closing any descriptor of a file releases its lock,
# so each file is opened once, and closed by `unlock_folder` or the end of the process.
_HELD: dict[str, int] = {}


def lock_folder(folder: str) -> None:
    """Lock a folder until this process ends, with a POSIX record lock (also over NFS) that is never stale."""
    folder = os.path.abspath(folder)
    path = os.path.join(folder, _NAME)
    # A folder that was deleted and created again has another file.
    if folder in _HELD and _is_same_file(_HELD[folder], path):
        return
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(f"{path} must be a regular file, not a link, a folder or a pipe; delete it")
    fd = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        owner = os.pread(fd, 4096, 0).decode(errors="replace") or "owner unknown"
        os.close(fd)
        raise UserError(
            f"{folder} is in use by another run ({owner}); wait until it ends, or choose another OUTPUT_DIR"
        ) from e
    except OSError as e:
        # Some clusters mount file systems without locks.
        logger.warning(f"cannot lock {path} ({e.strerror}); make sure that no other run uses the folder")
    _HELD[folder] = fd
    owner = f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.ftruncate(fd, 0)
    os.pwrite(fd, owner.encode(), 0)


def _open(path, flags):
    # Not the file at the other end of a link; a pipe would block.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


def _is_same_file(fd, path):
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def lock_again(path: str | os.PathLike) -> None:
    """Before a file is written, lock its folder again if that was locked, and deleted or replaced since."""
    path = os.path.abspath(path)
    for folder, fd in list(_HELD.items()):
        if path.startswith(folder + os.sep) and not _is_same_file(fd, os.path.join(folder, _NAME)):
            os.makedirs(folder, exist_ok=True)
            lock_folder(folder)
            logger.warning(f"{folder} was deleted during the run; created and locked again")


def lock_temp_dir() -> None:
    """Let child processes use one temporary folder, `pymp-...`; delete those of runs that were killed."""
    # An inherited folder belongs to the process that has started this one, which may outlive it.
    if not multiprocessing.current_process()._config.get("tempdir"):  # type: ignore[attr-defined]
        lock_folder(get_temp_dir())
    for folder in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), "pymp-*")):
        if os.path.abspath(folder) not in _HELD and is_in_use(folder) is False:
            shutil.rmtree(folder, ignore_errors=True)


def unlock_folder(folder: str) -> None:
    """Release the lock of a folder before the process ends."""
    fd = _HELD.pop(os.path.abspath(folder), None)
    if fd is not None:
        os.close(fd)


def is_in_use(folder: str | os.PathLike) -> bool | None:
    """Return whether the run of another process uses a folder; None if this machine cannot tell."""
    path = os.path.join(folder, _NAME)
    # Closing the file would release a lock of this process.
    if any(_is_same_file(fd, path) for fd in _HELD.values()):
        return False
    try:
        with open(path, encoding="utf-8", errors="replace", opener=_open) as f:
            owner = f.read(4096)
            fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    # Some file systems do not show the locks of other machines.
    return False if f" on {socket.gethostname()}, " in owner else None
