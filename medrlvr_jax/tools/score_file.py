"""The reward's dry run: a JSONL file of completions judged into another, as `medrlvr score` does."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medrlvr_jax.config.schema import RewardConfig
from medrlvr_jax.data.formats import options_and_key
from medrlvr_jax.data.question import LETTERS, DataError, field_names
from medrlvr_jax.data.readers import read_json
from medrlvr_jax.rewards.rule import BLOCK, brief, score


def score_file(in_path: str | Path, out_path: str | Path, config: RewardConfig, overwrite: bool = False, prefill: str = "") -> Counter[str]:
    """Score a JSONL file into another, line by line in the same order, and return how many lines had each reason.

    In: `{"completion": str, "answer": "C", "options": [str, …] or {"A": str, …}}`, 2 to 10 options, other fields ignored; read as
    questions are (`readers.read_json`), so blank lines are passed over and have no line in the output.
    Out: `{"reward": float, "format_ok": bool, "answer": "C" or null, "reason": a key of REASONS}`.
    `prefill` stood at the end of each prompt, and is judged as the beginning of each completion.
    A line that cannot be scored raises `DataError`, and then there is no output at all: the file gets its name when it is whole.
    """
    source, target = Path(in_path), Path(out_path)
    if not source.exists():
        raise DataError(f"{source}: no such file; give a JSONL file of completions, answers and options")
    if not target.parent.is_dir():
        raise DataError(f"{target}: its folder does not exist; make {target.parent} first")
    if target.exists() and (not overwrite or target.samefile(source)):
        raise DataError(f"{target}: exists already, and is not overwritten; give another name or move it away")
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    worth = [config.unformatted, config.wrong, config.correct]  # the settings' own numbers, not float32's
    reasons: Counter[str] = Counter()
    try:
        with part.open("x", encoding="utf-8", newline="\n") as file:
            for block in _blocks(source):
                completions, answers, options = zip(*block, strict=True)
                verdicts = score([prefill + completion for completion in completions], answers, options, config)
                rank = (verdicts.format_ok.astype(int) + verdicts.correct).tolist()
                told = zip(rank, verdicts.penalty.tolist(), verdicts.answer.tolist(), verdicts.reason.tolist(), strict=True)
                for r, penalty, answer, reason in told:
                    line = {"reward": round(worth[r] - penalty, 9), "format_ok": r > 0, "answer": answer or None, "reason": reason}
                    file.write(json.dumps(line) + "\n")
                reasons.update(verdicts.reason.tolist())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return reasons


def _blocks(source: Path, most_rows: int = BLOCK, most_bytes: int = 1 << 25) -> Iterator[list[tuple[str, str, tuple[str, ...]]]]:
    """The file's records, as many at a time as are good for speed and kind to memory."""
    block, size = [], 0
    for number, row in read_json(source):
        try:
            block.append(_record(row))
        except DataError as e:
            raise DataError(f"{source}, line {number}: {e}") from None
        size += len(block[-1][0])
        if len(block) >= most_rows or size >= most_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def _record(row: dict[str, Any] | DataError) -> tuple[str, str, tuple[str, ...]]:
    """Completion, key letter and options of one line, or a `DataError` that says what is wrong with it."""
    if isinstance(row, DataError):
        raise row
    completion = row.get("completion")
    if not isinstance(completion, str):
        raise DataError(f'field completion: {brief(completion)} is not a text; an empty completion is ""; the line has {field_names(row)}')
    options, key = options_and_key(row)
    return completion, LETTERS[key], options
