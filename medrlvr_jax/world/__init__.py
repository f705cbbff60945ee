"""The embedded world: its table of knowledge, questions, text, tokenizer and base model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medrlvr_jax.config.sources import SOURCES, Source


def _made(name: str, *args: Any) -> Callable[[], list[Any]]:
    """A call of `world.<name>`; the world itself is imported when its questions are asked for."""

    def make() -> list[Any]:
        from medrlvr_jax.world import world

        return getattr(world, name)(*args)

    return make


SOURCES["embedded"] = Source(
    model=Path(__file__).parent / "embedded",
    questions={
        split: _made("questions", split) for split in ("train", "in_distribution", "out_of_distribution")
    }
    | {"leaking": _made("leaking")},
    texts={name: _made(name) for name in ("corpus", "lists")},
)
