"""Errors that end a command with a sentence and no traceback."""


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the field, the value and the remedy."""


class Diverged(RuntimeError):
    """A run that cannot go on: its updates are not finite, or its rewards teach nothing."""


class Unwritable(RuntimeError):
    """A run's folder on a disk that is full, read-only or gone."""
