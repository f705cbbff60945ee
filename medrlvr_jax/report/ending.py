"""The last message of `medrlvr train` and `sft`: what changed, where the run is, and the next commands."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medrlvr_jax.evaluation.answers import interval, percent, remarks
from medrlvr_jax.evaluation.stats import Interval
from medrlvr_jax.runs.console import format_duration

MEASURES = (("accuracy", "right answers"), ("format", "in the format"))


def ending(summary: dict[str, Any], folder: Path) -> str:
    """Return the last message in at most 80 columns. `summary` is the result of `runs.log.Run.finish`."""
    duration = f" in {format_duration(summary['seconds'])}" if "seconds" in summary else ""
    lines = ["", f"{folder}: {summary['steps']} steps{duration}"]
    for name, when in summary["eval"].items():
        lines += ["", *changes(name, when.get("before"), when.get("after"))]
    if not summary["eval"]:
        lines += ["", "Nothing was evaluated: eval.sets names no set."]
    return "\n".join([*lines, "", *next_commands(folder, bool(summary["eval"]))])


def changes(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> Iterator[str]:
    """Yield lines on a set: accuracy and format rate before and after training, and whether it improved."""
    last = after or before or {}
    yield f"{name}, {last.get('questions', last.get('n', 0)):,} questions (95 % intervals)"
    for key, words in MEASURES:
        yield f"  {words:14} {_share(before, key):>20}  →  {_share(after, key)}"
    if before and after:
        yield f"  {verdict(interval(before), interval(after))}"
    yield from remarks(name, last)


def verdict(before: Interval, after: Interval) -> str:
    """Return whether two intervals are disjoint. A paired test finds some differences that this misses."""
    points = f"{100 * (after.value - before.value):+.1f} points"
    if after.low > before.high:
        return f"Significantly more answers are right than before: {points}."
    if after.high < before.low:
        return f"Significantly fewer answers are right than before: {points}."
    return f"No clear change: {points}, and the intervals overlap."


def next_commands(folder: Path, evaluated: bool) -> Iterator[str]:
    yield "Next:"
    yield f"  {(folder / 'report.html').absolute().as_uri()}"
    yield "      the page of this run: curves, alarms and answers, before and after"
    yield f"  medrlvr eval {folder}" + ("" if evaluated else " eval.sets.mine.path=FILE")
    yield "      each answer, by subject and letter; then `medrlvr compare RUN RUN`"
    yield f"  medrlvr export {folder} DIRECTORY"
    yield "      the model for transformers, vLLM and others"


def _share(counts: dict[str, Any] | None, key: str) -> str:
    return percent(interval(counts, key)) if counts else "–"
