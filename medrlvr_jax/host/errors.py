"""Errors that end a command with a message and no traceback."""

import difflib
from collections.abc import Iterable


class MedrlvrError(Exception):
    """A problem that the user can fix. The message says what is wrong, and the remedy."""


class ConfigError(MedrlvrError, ValueError):
    """An unusable setting; the message names the field, the value and the remedy."""


class Diverged(MedrlvrError, RuntimeError):
    """A run that cannot continue: its updates are not finite, or its rewards are constant."""


class Unwritable(MedrlvrError, RuntimeError):
    """A run's folder cannot be written: the disk is full, read-only or gone."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean …?" for a message about an unknown name, or "" if no known name is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""
