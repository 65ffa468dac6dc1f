"""Atomic writes, checked reads, and the files of an output folder."""

import contextlib
import csv
import errno
import itertools
import json
import os
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from plaintrain.utils.errors import DataError, UserError, get_first_line
from plaintrain.utils.lock import lock_again

# Maximum size of YAML and XML files, which parse slowly; files written by hand are far smaller.
MAX_BYTES = 2**19
FACTS_FILE = "run.json"
RESULTS_FILE = "results.json"
# An example of a start in run.json, for `keep_valid`.
_START = {
    "command": [""],
    "changes": [[]],
    "world_size": 0,
    "environment": {},
    "git": {"changed_files": [""]},
    "imports": [""],
}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file (UTF-8 or binary) that atomically replaces `path` if the block succeeds."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with writing(path):
            lock_again(path)
            # If a file has the name of the folder, open() raises the better error.
            with contextlib.suppress(FileExistsError):
                os.makedirs(os.path.dirname(path) or ".")
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        # The rename too, where the file system can.
        with contextlib.suppress(OSError):
            fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an `OSError` within the block into a `UserError` that names the file and the reason."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {path}: {get_first_line(e)}") from e


def remove_unfinished(folder: str) -> None:
    """Remove the temporary files of killed runs; no other run may use the folder."""
    names = [name for name in os.listdir(folder) if _UNFINISHED.fullmatch(name)]
    for path in [*(Path(folder, name) for name in names), *Path(folder).glob("inference/*/*.json.tmp-*")]:
        with contextlib.suppress(OSError):
            path.unlink()


# The files of a run in its output folder; any other file belongs to the user.
_RUN_FILES = re.compile(
    r"model_(\d{7,}|final|best)\.pth|last_checkpoint|config(-\d+)?\.yaml|metrics\.(json|csv)|inference"
    r"|run\.json|report\.html|log\.txt(\.rank\d+)?|events\.out\.tfevents\..*|bad_batch_\d+(\.rank\d+)?\.pth"
)
_UNFINISHED = re.compile(rf"({_RUN_FILES.pattern}|\.write-test)\.tmp-\d+")


def move_old_run(folder: str) -> str | None:
    """Move the files of an earlier run to the next free `old-N`; return its path, or None without a run."""
    names = [name for name in os.listdir(folder) if _RUN_FILES.fullmatch(name)]
    if not names:
        return None
    paths = (os.path.join(folder, f"old-{i}") for i in itertools.count(1))
    target = next(path for path in paths if not os.path.exists(path))
    os.mkdir(target)
    for name in names:
        shutil.move(os.path.join(folder, name), target)
    return target


def check_file(path: str | os.PathLike, max_bytes: int | None = None) -> None:
    """Raise an `OSError` for a file of more than `max_bytes`, and for pipes and devices, which may block."""
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
    if max_bytes and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it must have at most {max_bytes:,} bytes, got {status.st_size:,}")


def check_archive(file: IO[bytes], max_bytes: int | None = None) -> bool:
    """Return whether a file is a zip archive; verify the checksums of members up to `max_bytes`.

    Raises an `OSError` for a compressed one (a zip bomb), since torch.save does not compress.
    """
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > file.seek(0, os.SEEK_END):
            raise OSError(errno.EFBIG, f"it unpacks to {unpacked:,} bytes, more than its size")
        for member in members:
            # PyTorch writes a checksum of 0 where they are disabled.
            if member.CRC and (max_bytes is None or member.file_size <= max_bytes):
                with archive.open(member) as f:
                    while f.read(2**20):
                        pass
    return True


def read_text(path: str | os.PathLike, description: str = "file", max_bytes: int | None = None) -> str:
    """Return the text of a UTF-8 file without byte order mark; `DataError` if that fails."""
    try:
        check_file(path, max_bytes)
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise DataError("broken", f"cannot read the {description} {path}: {get_first_line(e)}") from e


def is_below(folder: str, path: str) -> bool:
    """Return whether a path, absolute or relative to `folder`, is below it; does not resolve links."""
    if ".." not in path and not os.path.isabs(path):
        return True
    folder = os.path.join(os.path.abspath(folder), "")
    return os.path.abspath(os.path.join(folder, path)).startswith(folder)


def parse_json_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.json, {"iteration": int, name: value}, without incomplete ones."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("iteration")) is int:
                yield row


def parse_csv_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.csv, {"iteration": int, name: float}, without incomplete ones."""
    # Without a newline, the last value of a line may have lost digits.
    # An unclosed quote makes a value that is longer than the csv module takes.
    with contextlib.suppress(csv.Error):
        for row in csv.DictReader(line for line in lines if line.endswith("\n")):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                # DictReader stores None in rows that are too short or too long, which float() rejects.
                yield {
                    "iteration": int(row.pop("iteration")),
                    **{k: float(v) for k, v in row.items() if v != ""},
                }


def is_number(value: Any) -> bool:
    """Return whether a value is a finite int or float that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def keep_valid(value: Any, example: Any) -> Any:
    """Return what of a value, from JSON or YAML, has the type of an example; None if nothing has.

    A float stands for any number, and the key "*" for all other keys; keys without an example are kept.
    """
    if isinstance(example, dict) and isinstance(value, dict):
        expected = {key: example.get(key, example.get("*")) for key in value}
        valid = {
            key: v if expected[key] is None else keep_valid(v, expected[key]) for key, v in value.items()
        }
        # A number or a text may be null.
        return {
            k: v for k, v in valid.items() if v is not None or isinstance(expected[k], float | str | None)
        }
    if isinstance(example, list) and isinstance(value, list):
        valid_items = [keep_valid(item, example[0]) for item in value] if example else value
        return [item for item in valid_items if item is not None]
    if isinstance(example, float):
        return value if is_number(value) else None
    return value if type(value) is type(example) else None


def read_valid(path: str, example: dict[str, Any]) -> dict[str, Any]:
    """Return what is valid in a JSON file, see `keep_valid`; {} if it is missing or incomplete."""
    with contextlib.suppress(UserError, ValueError, RecursionError):
        return keep_valid(json.loads(read_text(path)), example) or {}
    return {}


def get_dataset_root() -> str:
    """Return the folder of relative dataset paths: `$PLAINTRAIN_DATASETS`, or `datasets`."""
    return os.path.expanduser(os.environ.get("PLAINTRAIN_DATASETS", "datasets"))


def describe_dataset_root(path: str) -> str:
    """Return a hint for a missing file of a dataset; "" for one that is not in `get_dataset_root`."""
    if not is_below(get_dataset_root(), os.path.abspath(path)):
        return ""
    return f"; relative paths start at PLAINTRAIN_DATASETS, which is {get_dataset_root()!r}"


def read_starts(folder: str) -> list[dict[str, Any]]:
    """Return the `starts` of run.json (see `engine.run_facts`), oldest first."""
    facts = read_valid(os.path.join(folder, FACTS_FILE), {"starts": [_START]})
    return [{"git": None, **start} for start in facts.get("starts", ())]


def read_results_file(folder: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return {dataset: {task: {metric: value}}} of results.json; invalid values are None."""
    return read_valid(os.path.join(folder, RESULTS_FILE), {"*": {"*": {"*": 0.0}}})
