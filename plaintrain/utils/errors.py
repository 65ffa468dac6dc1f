"""Exceptions for mistakes that the person who runs a script can mend."""


class UserError(ValueError):
    """A mistake in the input: a config key, a file, an annotation, an option.

    Its message is one sentence that says what was found, where, and what was expected.
    `plaintrain.launch.launch` prints it without a traceback; every other exception is a bug.
    """


class ConfigError(UserError):
    """A config file, key or value that cannot be used."""
