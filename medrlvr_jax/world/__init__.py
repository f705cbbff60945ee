"""The embedded world: its table of knowledge, questions, text, tokenizer and base model."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medrlvr_jax.config.sources import SOURCES, Source


def _made(name: str, *args: Any, module: str = "world") -> Callable[[], list[Any]]:
    """A call of `<module>.<name>`; the world itself is imported when its questions are asked for."""

    def make() -> list[Any]:
        return getattr(importlib.import_module(f"medrlvr_jax.world.{module}"), name)(*args)

    return make


SPLITS = ("train", "in_distribution", "out_of_distribution")
FILMS = (*SPLITS, "negative", "noise", "size", "options", "wording")  # the causes of radiograph.py alone, too
SOURCES["embedded"] = Source(
    model=Path(__file__).parent / "embedded",
    questions={split: _made("questions", split) for split in SPLITS}
    | {"leaking": _made("leaking")}
    | {f"open_{split}": _made("questions", split, module="open") for split in SPLITS}
    | {f"radiograph_{split}": _made("questions", split, module="radiograph") for split in FILMS}
    | {f"radiograph_{name}": _made(name, module="radiograph") for name in ("leaking", "blank", "text")},
    texts={name: _made(name, module="corpus") for name in ("corpus", "lists")}
    | {f"radiograph_{name}": _made(name, module="radiograph") for name in ("corpus", "captions")},
)
SOURCES["embedded_vision"] = Source(model=Path(__file__).parent / "vision", questions={}, texts={})
SOURCES["embedded_verifier"] = Source(  # judges answers to the open questions
    model=Path(__file__).parent / "verifier",
    questions={},
    texts={
        "rows": _made("verifier_rows", module="open"),
        "naive": _made("verifier_rows", 64_000, True, module="open"),
    },
)
