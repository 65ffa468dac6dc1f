"""One run at a time in a folder."""

import fcntl
import json
import logging
import os
import socket
import time

from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_NAME = "run.lock"
# What this process holds, by folder. The system lets go of a lock when its process ends, however it
# ends, and when any handle of the file is closed: so each is opened once, and never closed.
_HELD = {}


def lock_folder(folder):
    """Claim a folder for the run of this process, until the process ends.

    The lock is one of the operating system (POSIX record locks, also over NFS), so it is gone with its
    process and none is ever stale; who holds it stands in `run.lock`.

    Args:
        folder: the folder, which exists.

    Raises:
        UserError: another run is alive in it; names its process and host.
        OSError: the file cannot be written.
    """
    folder = os.path.realpath(folder)
    path = os.path.join(folder, _NAME)
    held = _HELD.get(folder)
    # A folder that was removed and made again has another file.
    if held and os.path.exists(path) and os.path.samestat(os.fstat(held), os.stat(path)):
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        owner = _read(handle)
        os.close(handle)
        raise UserError(
            f"another run is at work in {folder}: {owner}; wait for its end, or choose another OUTPUT_DIR"
        ) from e
    except OSError as e:
        # Some file systems of clusters are mounted without locks.
        logger.warning(f"{path} cannot be locked ({e.strerror}): see to it that no other run uses the folder")
    _HELD[folder] = handle
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)


def unlock_folder(folder):
    """Let go of a folder that `lock_folder` has claimed, before the process ends."""
    handle = _HELD.pop(os.path.realpath(folder), None)
    if handle is not None:
        os.close(handle)


def alive(folder):
    """Whether another process' run is at work in a folder; None if it cannot be told from this machine."""
    folder = os.path.realpath(folder)
    path = os.path.join(folder, _NAME)
    # A handle of one's own file must not be opened: closing it would let go of the lock.
    if folder in _HELD:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    finally:
        owner = os.read(handle, 4096)
        os.close(handle)
    # Not every file system shows one machine the locks of another.
    here = f'"host": {json.dumps(socket.gethostname())}'.encode()
    return False if here in owner else None


def _read(handle):
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        # It was locked a moment ago.
        return "its process has not yet written its number"
