"""Errors that end a command with a message and no traceback."""


class ConfigError(ValueError):
    """An unusable setting; the message names the field, the value and the remedy."""


class Diverged(RuntimeError):
    """A run that cannot continue: its updates are not finite, or its rewards are constant."""


class Unwritable(RuntimeError):
    """A run's folder cannot be written: the disk is full, read-only or gone."""
