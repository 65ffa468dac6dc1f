"""Checkpoint files: names, atomic writes, reading, and broadcasting to other machines."""

import contextlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from plaintrain.config.yaml import parse_yaml
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import atomic_write, check_archive, check_file, writing

logger = logging.getLogger(__name__)

_LAST = "last_checkpoint"
_NUMBERED = re.compile(r"(.+)_(\d{7,})\.pth")


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read; an earlier one may be intact."""


def get_checkpoint_name(iteration: int, prefix: str = "model") -> str:
    """Return the name, without `.pth`, of the checkpoint after an iteration."""
    return f"{prefix}_{iteration:07d}"


def read_checkpoint(path: str, source: BinaryIO | None = None, **kwargs: Any) -> dict[str, Any]:
    """Return the content of a checkpoint, or of a file object, on the CPU; loading runs no code.

    `kwargs` are those of `read_archive`.
    """
    with reading(path):
        data = read_archive(source or path, **kwargs)
        if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
            raise ValueError("it has no model")
        for name, value in data["model"].items():
            if not str(name).endswith("_extra_state"):
                check_plain(value, name)
        iteration = data.get("iteration", 0)
        if type(iteration) is not int or iteration not in range(-1, 2**31):
            raise ValueError("its iteration is invalid")
        names = data.get("class_names") or []
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("its class_names are no list of names")
        for item in data.get("data_hashes") or []:
            if not isinstance(item, list) or list(map(type, item)) != [int, str, str]:
                raise ValueError("its data_hashes are invalid")
        if isinstance(data.get("config"), str):
            parse_yaml(data["config"], "its config")
    return data


def read_archive(file: str | BinaryIO, mmap: bool = False) -> Any:
    """Return the content of a file of `torch.save` on the CPU; loading runs no code.

    Verifies the checksums; with `mmap`, the tensors stay on disk and are not verified.
    """
    if isinstance(file, str):
        check_file(file)
    with open(file, "rb") if isinstance(file, str) else contextlib.nullcontext(file) as f:
        is_zip = check_archive(f, max_bytes=2**20 if mmap else None)
        f.seek(0)
        if not is_zip and f.read(1) != b"\x80":
            raise ValueError("it is damaged, or not a file of torch.save")
        f.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and is_zip)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn any error within the block into a `DamagedCheckpointError` that names the checkpoint."""
    try:
        yield
    except Exception as e:  # Unpickling a damaged file can raise anything.
        raise DamagedCheckpointError(f"cannot read the checkpoint {path}: {get_first_line(e)}") from e


def check_plain(value: Any, name: Any) -> None:
    """Raise a `ValueError` if a value read from a file is not a dense tensor of numbers in memory."""
    is_tensor = isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
    if not is_tensor or value.is_nested or value.is_quantized or value.is_complex() or value.is_meta:
        raise ValueError(f"{name} must be a dense tensor of numbers, got {type(value).__name__}")
    # An expanded tensor may be far larger than its file.
    if value.numel() * value.element_size() > max(value.untyped_storage().nbytes(), 2**26):
        raise ValueError(f"{name} must have the size of its data, got {list(value.shape)}")


def are_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN or infinity, without memory for a mask."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(-torch.inf < low <= high < torch.inf)


def write_checkpoint(path: str, data: dict[str, Any], last: bool) -> None:
    """Write a checkpoint atomically and create its folder; `last` makes it the one to resume from."""
    try:
        with atomic_write(path, "wb") as f:
            torch.save(data, f)
    except (OSError, RuntimeError) as e:
        # PyTorch's zip writer raises a RuntimeError whose context is the OSError of a failed write.
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(f"cannot write {path}: is the disk full? ({get_first_line(cause)})") from e
    logger.info(f"saved {path}")
    if last:
        write_last_checkpoint(os.path.dirname(path), os.path.basename(path))


def write_last_checkpoint(folder: str, basename: str) -> None:
    with atomic_write(os.path.join(folder, _LAST)) as f:
        f.write(basename)


def link_checkpoint(folder: str, source: str, target: str) -> None:
    """Link (or copy) `source` to `target`, and make it the checkpoint to resume from."""
    path = Path(folder, target)
    temporary = Path(f"{path}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(Path(folder, source))
    except OSError:
        with open(Path(folder, source), "rb") as f, atomic_write(path, "wb") as copy:
            shutil.copyfileobj(f, copy)
    else:
        with writing(path):
            temporary.replace(path)
        # Renaming a file onto another of its names does nothing and keeps both.
        temporary.unlink(missing_ok=True)
    write_last_checkpoint(folder, target)


def list_checkpoints(folder: str, prefix: str = "model") -> list[str]:
    """Return the paths of the numbered checkpoints and `model_final.pth`, by iteration."""
    pattern = re.compile(rf"{re.escape(prefix)}_(\d{{7,}}|final)\.pth")
    names = [path.name for path in Path(folder).glob("*.pth") if pattern.fullmatch(path.name)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: _get_age(folder, name))]


def _get_age(folder: str, name: str) -> tuple[int, str]:
    """Return (iteration, name); model_final.pth may come from a shorter run that was extended later."""
    match = _NUMBERED.fullmatch(name)
    if match:
        return int(match[2]), name
    try:
        return int(read_checkpoint(os.path.join(folder, name), mmap=True)["iteration"]), name
    except (DamagedCheckpointError, KeyError):
        return -1, name


def read_last_checkpoint(
    folder: str, *others: str, check: Callable[..., None] | None = None, **kwargs: Any
) -> tuple[str, dict[str, Any] | None]:
    """Return (path, content) of the checkpoint to resume from, ("", None) if there is none.

    It tries `others` after those of the folder, and raises the first error if no existing file can be read;
    `check(path, content)` may raise a `DamagedCheckpointError` too.
    """
    candidates = [*list_resume_candidates(folder), *others]
    errors = []
    for candidate in candidates:
        try:
            data = read_checkpoint(candidate, **kwargs)
            if check is not None:
                check(candidate, data)
            return candidate, data
        except DamagedCheckpointError as e:
            errors.append(e)
            if len(errors) < len(candidates):
                logger.warning(f"{e}; trying {candidates[len(errors)]}")
    if errors:
        raise errors[0]
    return "", None


def list_resume_candidates(folder: str) -> list[str]:
    """Return the checkpoints to try when resuming: the tagged file, then the others, newest first."""
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


def prune_checkpoints(folder: str, saved: str, max_to_keep: int) -> None:
    """Delete the oldest numbered checkpoints until `max_to_keep` remain, `saved` included."""
    match = _NUMBERED.fullmatch(saved)
    names = [os.path.basename(path) for path in list_checkpoints(folder, match[1] if match else "model")]
    others = [name for name in names if _NUMBERED.fullmatch(name) and name != saved]
    for name in others[: max(0, len(others) - max_to_keep + 1)]:
        delete_checkpoint(folder, name)


def delete_checkpoint(folder: str, name: str) -> None:
    path = Path(folder, name)
    with writing(path):
        path.unlink(missing_ok=True)


def broadcast_file(path: str) -> tuple[str, io.BytesIO | None]:
    """Return rank 0's path, and the content if any rank does not see the same file; all ranks call it."""
    path, stamp = comm.broadcast((path, _get_stamp(path)))
    if not comm.any_rank(_get_stamp(path) != stamp):
        return path, None
    content = None
    if comm.is_main_process():
        with open(path, "rb") as f:
            content = f.read()
    return path, io.BytesIO(comm.broadcast(content))


def _get_stamp(path: str) -> tuple[int, int] | None:
    """Return the size and the modification time in ns, by which files are compared across machines."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
