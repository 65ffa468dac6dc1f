"""Detectron2's `PathManager`, for local files."""

import os
import shutil
from collections.abc import Callable
from typing import Any

from plaintrain.utils.errors import UserError


def _reject_urls(function: Callable[..., Any]) -> Any:
    def call(path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if "://" in os.fsdecode(path):
            raise UserError(f"path must be local, got {path}; download it, or set MODEL.WEIGHTS for weights")
        return function(path, *args, **kwargs)

    return staticmethod(call)


def _copy(source, target, overwrite=False):
    if not overwrite and os.path.exists(target):
        raise UserError(f"{target} exists; overwrite=True replaces it")
    shutil.copyfile(source, target)
    return True


class PathManager:
    """Functions of the standard library under the names of iopath."""

    open = _reject_urls(open)
    exists = _reject_urls(os.path.exists)
    isfile = _reject_urls(os.path.isfile)
    isdir = _reject_urls(os.path.isdir)
    ls = _reject_urls(os.listdir)
    rm = _reject_urls(os.remove)
    copy = _reject_urls(_copy)
    mkdirs = _reject_urls(lambda path: os.makedirs(path, exist_ok=True))
    get_local_path = _reject_urls(lambda path, force=False: os.fspath(path))
