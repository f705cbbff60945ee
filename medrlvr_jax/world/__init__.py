"""The embedded world: its table of knowledge, questions, text, tokenizer and base model."""

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from medrlvr_jax.config.sources import SOURCES, Source


def _made(function: str, *args: Any) -> Callable[[], list[Any]]:
    """A call of a function of this package, which is imported when its questions are asked for."""
    return lambda: resolve_name(f"medrlvr_jax.world.{function}")(*args)


SPLITS = ("train", "in_distribution", "out_of_distribution")
FILMS = (*SPLITS, "negative", "noise", "size", "options", "wording")  # the causes of radiograph.py alone, too
SOURCES["embedded"] = Source(
    model=Path(__file__).parent / "embedded",
    questions={split: _made("world:questions", split) for split in SPLITS}
    | {"leaking": _made("world:leaking")}
    | {f"open_{split}": _made("open:questions", split) for split in SPLITS}
    | {f"radiograph_{split}": _made("radiograph:questions", split) for split in FILMS}
    | {f"radiograph_{name}": _made(f"radiograph:{name}") for name in ("leaking", "blank", "text")},
    texts={name: _made(f"corpus:{name}") for name in ("corpus", "lists")}
    | {f"radiograph_{name}": _made(f"radiograph:{name}") for name in ("corpus", "captions")},
)
SOURCES["embedded_vision"] = Source(model=Path(__file__).parent / "vision", questions={}, texts={})
SOURCES["embedded_verifier"] = Source(  # judges answers to the open questions
    model=Path(__file__).parent / "verifier",
    questions={},
    texts={
        "rows": _made("open:verifier_rows"),
        "naive": _made("open:verifier_rows", 64_000, True),
    },
)
