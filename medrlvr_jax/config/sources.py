"""What comes with the package under a name in place of a path: `embedded:train` names a set, `model.path: embedded` a model.

A source registers itself in SOURCES when its package is imported. Those who read paths look here, and import no source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """One name: its model's directory, and its sets by what follows the colon, made when they are called."""

    model: Path
    questions: Mapping[str, Callable[[], list[Any]]]
    texts: Mapping[str, Callable[[], list[Any]]]


SOURCES: dict[str, Source] = {}
