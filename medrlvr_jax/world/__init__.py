"""The embedded world: a table of medical knowledge, with questions, texts, tokenizers and tiny models."""

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from medrlvr_jax.config.sources import SOURCES, Source


def _lazy(function: str, *args: Any) -> Callable[[], list[Any]]:
    """Return a call of `module:function` of this package. The module is imported at the call."""
    return lambda: resolve_name(f"medrlvr_jax.world.{function}")(*args)


SPLITS = ("train", "in_distribution", "out_of_distribution")
CAUSES = ("negative", "noise", "size", "options", "wording")  # as in radiograph.py
SOURCES["embedded"] = Source(
    model=Path(__file__).parent / "embedded",
    questions={split: _lazy("world:questions", split) for split in SPLITS}
    | {"leaking": _lazy("world:leaking")}
    | {f"open_{split}": _lazy("open:questions", split) for split in SPLITS}
    | {f"radiograph_{split}": _lazy("radiograph:questions", split) for split in (*SPLITS, *CAUSES)}
    | {f"radiograph_{name}": _lazy(f"radiograph:{name}") for name in ("leaking", "blank", "text")},
    texts={name: _lazy(f"corpus:{name}") for name in ("corpus", "lists")}
    | {f"radiograph_{name}": _lazy(f"radiograph:{name}") for name in ("corpus", "captions")},
)
SOURCES["embedded_vision"] = Source(model=Path(__file__).parent / "vision", questions={}, texts={})
SOURCES["embedded_verifier"] = Source(  # grades answers to the open questions
    model=Path(__file__).parent / "verifier",
    questions={},
    texts={"rows": _lazy("open:verifier_rows"), "naive": _lazy("open:verifier_rows", 64_000, True)},
)
