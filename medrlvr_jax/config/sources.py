"""What the package brings under a name in place of a path: the set `embedded:train`, the model `embedded`.

A source registers itself in SOURCES when its package is imported. Readers of paths look here; they import no
source.
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
