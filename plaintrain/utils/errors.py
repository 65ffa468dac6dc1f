"""Exceptions for mistakes in the input."""

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType

from plaintrain.utils.text import truncate_text

_MAX_LENGTH = 1000


class UserError(ValueError):
    """A mistake in the input: a config key, a file, an annotation, an option.

    `plaintrain.engine.launch.launch` prints the message, one sentence, without a traceback.
    """

    def __init__(self, message: object = "") -> None:
        # Quoted input may hold line breaks, or be as long as a file.
        super().__init__(truncate_text(" ".join(str(message).splitlines()), _MAX_LENGTH))


class ConfigError(UserError):
    """An unusable config file, key or value."""


class DataError(UserError):
    """A mistake in one image or annotation; `error_type` is a key of `data.validation.PROBLEM_TYPES`."""

    def __init__(self, error_type: str, message: object) -> None:
        super().__init__(message)
        self.error_type = error_type

    def __reduce__(self):
        # Exceptions are unpickled, after a worker has raised them, with the message as only argument.
        return DataError, (self.error_type, str(self))


def get_first_line(error: BaseException) -> str:
    """Return the message as one line that is never empty, without the number and the file of an `OSError`."""
    text = str(getattr(error, "strerror", None) or error).strip()
    if "Weights only load failed" in text:
        return "it holds Python objects, whose loading could run code; only tensors and plain data are loaded"
    hint = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    return (text or type(error).__name__).splitlines()[0] + hint


def suggest_similar(name: str, candidates: Iterable[str], num: int = 1, cutoff: float = 0.0) -> str:
    """Return up to `num` similar names joined by "or", or ""; `cutoff` is the minimum similarity in 0..1."""
    return " or ".join(difflib.get_close_matches(str(name), map(str, candidates), n=num, cutoff=cutoff))


def require(module: str, feature: str, extra: str) -> ModuleType:
    """Import a module of the optional dependencies `plaintrain[extra]`; `UserError` if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f'{feature} needs {module}: pip install "plaintrain[{extra}]"') from e


def raise_or_append(errors: list[UserError] | None, error: UserError) -> None:
    """Append `error` to the list `errors`; raise it if there is no list."""
    if errors is None:
        raise error
    errors.append(error)


@contextlib.contextmanager
def collect_errors(errors: list[UserError] | None) -> Iterator[None]:
    """Append a `UserError` raised in the block to the list `errors`; without a list, it propagates."""
    try:
        yield
    except UserError as e:
        raise_or_append(errors, e)
