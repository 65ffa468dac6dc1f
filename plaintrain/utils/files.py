"""Reading files that somebody else wrote, writing files whole, and the files of a run's folder."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import zipfile
from pathlib import Path

from plaintrain.utils.errors import DataError, UserError

# Of what is parsed slowly, as YAML and XML are. A file that a person wrote is far smaller.
MAX_BYTES = 2**19
# Files of a run's folder that a training writes and reads again.
FACTS_FILE, RESULTS_FILE = "run.json", "results.json"


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a temporary file beside `path` that replaces it, after fsync, when the block succeeds.

    Args:
        path: the file to write; its folder is made.
        mode: "w" (UTF-8 text) or "wb".

    Raises:
        UserError: the folder cannot be written, or the disk is full; `path` is as it was before.
    """
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with writing(path):
            # Where a file is in the way, open() says so.
            with contextlib.suppress(FileExistsError):
                os.makedirs(os.path.dirname(path) or ".")
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
    """Turn an `OSError` within the block into a `UserError` that names the file and the system's reason."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


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


def check_file(path, limit=None):
    """Refuse, with an `OSError`, a file of more bytes than `limit`, and what is no file.

    `open` would wait for a pipe, and read a device without end.
    """
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
    if limit and status.st_size > limit:
        raise OSError(errno.EFBIG, f"it has more than the {limit:,} bytes that are read")


def check_stored(path):
    """Refuse, with an `OSError`, a zip that unpacks to more than it is; torch itself compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > os.path.getsize(path):
            raise OSError(errno.EFBIG, f"it unpacks to {unpacked:,} bytes, more than it has")


def read_text(path, what="file", limit=None):
    """Return the text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        what: what to call it in a `DataError`.
        limit: how many bytes it may have, or None.
    """
    try:
        check_file(path, limit)
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise DataError("broken", f"cannot read the {what} {path}: {describe_os_error(e)}") from e


def is_below(folder, path):
    """Whether a path, absolute or from the folder on, stays in the folder; links are not followed."""
    if ".." not in path and not os.path.isabs(path):
        return True
    folder = os.path.join(os.path.abspath(folder), "")
    return os.path.abspath(os.path.join(folder, path)).startswith(folder)


def describe_os_error(error):
    """Why a file cannot be read, of an `OSError` or another error."""
    return getattr(error, "strerror", None) or error


def read_json(path):
    """Return the content of a JSON file; None if it is missing or cannot be read, as while it is written."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as f:
        return json.load(f)
    return None


def read_starts(folder):
    """Return the `starts` of run.json (see `engine.run_facts`), oldest first; [] without any."""
    facts = read_json(os.path.join(folder, FACTS_FILE))
    starts = facts.get("starts") if isinstance(facts, dict) else None
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def read_results_file(folder):
    """Return {dataset: {task: {metric: number or None}}} of a results.json; {} without a whole one."""
    content = read_json(os.path.join(folder, RESULTS_FILE))
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return {d: {t: dict(m) for t, m in tasks.items()} for d, tasks in content.items()}
    return {}
