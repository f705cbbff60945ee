"""Models and question sets inside the package, which settings name in place of a path.

Examples are the model `embedded` and the set `embedded:train`. A source adds itself to SOURCES when its
module is imported, so that the readers of paths need not import it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """The model and the sets of one name. The functions make the sets."""

    model: Path  # the model's directory
    questions: Mapping[str, Callable[[], list[Any]]]  # sets of questions by the name after the colon
    texts: Mapping[str, Callable[[], list[Any]]]  # sets of texts for fine-tuning, by the name after the colon


SOURCES: dict[str, Source] = {}
