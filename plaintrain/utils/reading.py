"""Reading files that somebody else wrote."""

import errno
import os
import stat
import zipfile
from pathlib import Path

# Of what is parsed slowly, as YAML and XML are. A file that a person wrote is far smaller.
MAX_BYTES = 2**19


def check_file(path):
    """Refuse, with an `OSError`, a pipe or a device, which `open` would wait for or read without end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")


def check_stored(path):
    """Refuse, with an `OSError`, a zip that unpacks to more than it is; torch itself compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > os.path.getsize(path):
            raise OSError(errno.EFBIG, f"it unpacks to {unpacked:,} bytes, more than it has")


def read_text(path, limit=None):
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        limit: how many bytes it may have, or None.

    Raises:
        OSError, ValueError: `reason` says why it cannot be read.
    """
    check_file(path)
    if limit and os.path.getsize(path) > limit:
        raise OSError(errno.EFBIG, f"it has more than the {limit:,} bytes that are read")
    return Path(path).read_text(encoding="utf-8-sig")


def is_below(folder, path):
    """Whether a path, absolute or from the folder on, stays in the folder; links are not followed."""
    if ".." not in path and not os.path.isabs(path):
        return True
    folder = os.path.join(os.path.abspath(folder), "")
    return os.path.abspath(os.path.join(folder, path)).startswith(folder)


def reason(error):
    """Why a file cannot be read, of an `OSError` or another error."""
    return getattr(error, "strerror", None) or error
