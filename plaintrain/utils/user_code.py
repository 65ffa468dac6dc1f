"""The user's code of --import, which registers datasets, evaluators or backbones."""

import importlib
import os
import sys
import traceback
from collections.abc import Iterable

from plaintrain.utils.errors import UserError, get_first_line

# Files (absolute) and modules that this process has imported; spawned ranks and workers repeat it.
IMPORTED: list[str] = []
# Imports of the runs that were read; they are only named, since code of others must not run unasked.
RECORDED: list[str] = []


def import_user_code(names: Iterable[str]) -> None:
    """Import .py files and modules, once per process; their folder, or the current one, joins `sys.path`."""
    for name in names:
        path = os.path.abspath(os.path.expanduser(name)) if name.endswith(".py") else ""
        if path and not os.path.isfile(path):
            raise UserError(f"--import {name}: there is no such file")
        module_name = os.path.basename(path).removesuffix(".py") or name
        if "." in module_name if path else not name.replace(".", "_").isidentifier():
            raise UserError(f"--import must be a .py file (no further dot) or a dotted module, got {name!r}")
        folder = os.path.dirname(path) or os.getcwd()
        if folder not in sys.path:
            # Last, so that the user's files replace no other module; spawned processes inherit sys.path.
            sys.path.append(folder)
        file = _import(module_name, name, path)
        if not file:
            raise UserError(f"--import {name}: it is a folder or built in; give a .py file or a module")
        if path and not os.path.samefile(path, file):
            raise UserError(f"--import {name}: another module {module_name} exists ({file}); rename the file")
        if (path or name) not in IMPORTED:
            IMPORTED.append(path or name)


def _import(module_name: str, name: str, path: str) -> str | None:
    """Import a module and return its file."""
    try:
        return getattr(importlib.import_module(module_name), "__file__", None)
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        position = f", line {lines[-1]}" if lines else ""
        error_type = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        raise UserError(f"--import {name}{position}: {error_type}{get_first_line(e)}") from e


def describe_import() -> str:
    """Return the hint of errors about a name that only the user's code may know."""
    missing = [name for name in RECORDED if name not in IMPORTED]
    if missing:
        return f"the run has used --import {' --import '.join(missing)}: add it if you trust that code"
    return "code that registers it must be given with --import FILE.py"
