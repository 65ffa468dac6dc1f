"""One run at a time in a folder."""

import fcntl
import logging
import os
import socket
import time

from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_NAME = "run.lock"
# {folder: file descriptor} of what this process holds. The system releases a lock when any descriptor of its
# file is closed: so each file is opened once, and closed by `unlock_folder` or the end of the process.
_HELD = {}


def lock_folder(folder):
    """Claim a folder for the run of this process, until the process ends.

    The lock is one of the operating system (POSIX record locks, also over NFS), so it is gone with its
    process and none is ever stale; `run.lock` names its owner.
    """
    folder = os.path.realpath(folder)
    path = os.path.join(folder, _NAME)
    held = _HELD.get(folder)
    # A folder that was deleted and made again has another file.
    if held and os.path.exists(path) and os.path.samestat(os.fstat(held), os.stat(path)):
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        owner = os.pread(fd, 4096, 0).decode(errors="replace") or "its process has not yet written its number"
        os.close(fd)
        raise UserError(
            f"another run is at work in {folder}: {owner}; wait for its end, or choose another OUTPUT_DIR"
        ) from e
    except OSError as e:
        # Some file systems of clusters are mounted without locks.
        logger.warning(f"{path} cannot be locked ({e.strerror}): make sure that no other run uses the folder")
    _HELD[folder] = fd
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.ftruncate(fd, 0)
    os.pwrite(fd, owner.encode(), 0)


def unlock_folder(folder):
    """Release a folder that `lock_folder` has claimed, before the process ends."""
    fd = _HELD.pop(os.path.realpath(folder), None)
    if fd is not None:
        os.close(fd)


def is_in_use(folder):
    """Return whether another process' run is at work in a folder; None if this machine cannot tell."""
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
    # Not every file system shows one machine the locks of another.
    return False if f" on {socket.gethostname()}, " in owner else None
