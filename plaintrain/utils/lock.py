"""Lock of an output folder."""

import fcntl
import logging
import os
import socket
import time

from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_NAME = "run.lock"
# {folder: file descriptor} of the locks of this process. Closing any descriptor of a file releases its lock,
# so each file is opened once, and closed by `unlock_folder` or the end of the process.
_HELD: dict[str, int] = {}


def lock_folder(folder: str) -> None:
    """Lock a folder until this process ends, with a POSIX record lock (also over NFS) that is never stale."""
    folder = os.path.realpath(folder)
    path = os.path.join(folder, _NAME)
    held = _HELD.get(folder)
    # A folder that was deleted and created again has another file.
    if held and os.path.exists(path) and os.path.samestat(os.fstat(held), os.stat(path)):
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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


def unlock_folder(folder: str) -> None:
    """Release the lock of a folder before the process ends."""
    fd = _HELD.pop(os.path.realpath(folder), None)
    if fd is not None:
        os.close(fd)


def is_in_use(folder: str | os.PathLike) -> bool | None:
    """Return whether the run of another process uses a folder; None if this machine cannot tell."""
    folder = os.path.realpath(folder)
    if folder in _HELD:
        return False
    try:
        with open(os.path.join(folder, _NAME), encoding="utf-8", errors="replace") as f:
            owner = f.read(4096)
            fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    # Some file systems do not show the locks of other machines.
    return False if f" on {socket.gethostname()}, " in owner else None
