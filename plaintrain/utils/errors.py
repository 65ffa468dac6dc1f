"""Exceptions for mistakes that the person who runs a script can mend."""

import contextlib
import difflib
import importlib

_LONGEST = 1000


class UserError(ValueError):
    """A mistake in the input: a config key, a file, an annotation, an option.

    Its message is one sentence that says what was found, where, and what was expected.
    `plaintrain.engine.launch.launch` prints it without a traceback; every other exception is a bug.
    """

    def __init__(self, message=""):
        # What it quotes is somebody else's: it may hold line breaks, or be as long as a file.
        text = " ".join(str(message).splitlines())
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST - 200]} ... {text[-190:]}"
        super().__init__(text)


def get_first_line(error):
    """What an exception says, in one line that is never empty."""
    text = str(error).strip()
    if "Weights only load failed" in text:
        return "it is not plain data: loading it could run code, which is refused"
    return (text or type(error).__name__).splitlines()[0]


def suggest_similar(name, known, number=1, least=0.0):
    """Return up to `number` known names most like a name, for a hint in an error: a text, "" for none.

    `least`, 0 to 1, says how alike they must be.
    """
    near = difflib.get_close_matches(str(name), map(str, known), n=number, cutoff=least)
    return " or ".join(near)


def require(module, what, extra):
    """Import a module that `what` needs and an extra of plaintrain installs; a `UserError` without it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f'{what} needs {module}: pip install "plaintrain[{extra}]"') from e


class ConfigError(UserError):
    """A config file, key or value that cannot be used."""


class DataError(UserError):
    """A mistake in one image or annotation of a dataset; `kind` is a key of `data.validation.PROBLEM_TYPES`."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):
        # An error's own way would call it with the message alone, in the process that gets it from a worker.
        return DataError, (self.kind, str(self))


def reject(problems, error):
    """Raise a `UserError`, or with a list `problems` add it to that and continue: for readers of datasets."""
    if problems is None:
        raise error
    problems.append(error)


@contextlib.contextmanager
def collecting(problems):
    """`refuse` the `UserError` that ends the block."""
    try:
        yield
    except UserError as e:
        reject(problems, e)
