"""The user's code of --import, which registers datasets, backbones or models."""

import importlib
import os
import sys
import traceback
from collections.abc import Iterable

from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import read_starts

# Files (absolute) and modules that this process has imported; spawned ranks and workers repeat it.
IMPORTED: list[str] = []
# Imports of the runs that were read; they are only named, since code of others must not run unasked.
RECORDED: list[str] = []


def import_user_code(names: Iterable[str]) -> None:
    """Import .py files and modules, once per process; their folder, or the current one, joins `sys.path`."""
    for name in names:
        path = os.path.abspath(os.path.expanduser(name)) if name.endswith(".py") else ""
        if (path or name) in IMPORTED:
            continue
        if path and not os.path.isfile(path):
            raise UserError(f"cannot import {name}: there is no such file")
        module_name = os.path.basename(path).removesuffix(".py") or name
        # Last, so that the user's files replace no other module; spawned processes inherit sys.path.
        sys.path.append(os.path.dirname(path) or os.getcwd())
        try:
            file = getattr(importlib.import_module(module_name), "__file__", None)
        except (Exception, SystemExit) as e:
            lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
            position = f", line {lines[-1]}" if lines else ""
            raise UserError(f"cannot import {name}{position}: {type(e).__name__}: {get_first_line(e)}") from e
        if not file or (path and not os.path.samefile(path, file)):
            raise UserError(f"cannot import {name}: {module_name} is {file or 'no file'}; rename yours")
        IMPORTED.append(path or name)


def note_imports(folder: str) -> None:
    """Add the last imports of a run to `RECORDED`."""
    RECORDED.extend(name for start in read_starts(folder)[-1:] for name in start.get("imports", ()))


def describe_import() -> str:
    """Return the hint of errors about a name that only the user's code may know."""
    recorded = " ".join(f"--import {name}" for name in RECORDED if name not in IMPORTED)
    if recorded:
        return f"the run has used {recorded}: add it if you trust that code"
    return "code that registers it must be given with --import FILE.py"
