"""`medrlvr score`: compute the reward of completions in a JSONL file, to test a reward on text."""

import json
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medrlvr_jax.config.schema import RewardConfig
from medrlvr_jax.data.formats import key_of
from medrlvr_jax.data.question import DataError, Question, strip_labels
from medrlvr_jax.data.readers import read_json
from medrlvr_jax.data.record import facts_of, field_names
from medrlvr_jax.host import files, tables
from medrlvr_jax.rewards import grade
from medrlvr_jax.rewards.verdicts import evaluation_components

BLOCK = 4096  # rows scored at the same time, so that a file of any size fits into memory


def score_file(
    in_path: str | Path, out_path: str | Path, config: RewardConfig, prefill: str = ""
) -> Counter[str]:
    """Write the score of each line of a JSONL file to another file. Return the number of lines by reason.

    Input lines: `{"completion": str, "answer": "C", "options": [str, …] or {"A": str, …}}` with 2 to 10
    options, or `{"completion": str, "kind": "number", "answer": 5.2, …}` as in the format `open`. The
    component `process` also needs `facts`. Other fields are ignored, and blank lines are skipped.

    Output lines: `{"reward": float, "format_ok": bool, "answer": "C" or null, "reason": a key of
    rewards.REASONS}`, with the components' values if there are several. The reward is the sum of the
    components that need only the completion, and of `process` (`evaluation_components`).

    `prefill`: the end of each prompt, which is scored as the start of each completion.
    Raises `DataError` for an invalid line. Then no output file is left: it gets its name when it is complete.
    """
    source, target = Path(in_path), Path(out_path)
    with files.reading(source, "give a JSONL file of completions, answers and options", DataError):
        source.open("rb").close()
    if not target.parent.is_dir():
        raise DataError(f"{target}: the folder does not exist; create {target.parent} first")
    if target.exists():
        raise DataError(f"{target}: the file exists already and is not overwritten; give another name")
    reasons: Counter[str] = Counter()
    files.write_text(target, _score_lines(source, config, prefill, reasons))
    return reasons


def _score_lines(source: Path, config: RewardConfig, prefill: str, reasons: Counter[str]) -> Iterator[str]:
    """Yield the output's lines and count their reasons in `reasons`."""
    facts_needed = any(section.kind == "process" for section in config.components)
    components = evaluation_components(config, questions_with_facts(source) if facts_needed else ())
    for block in _blocks(source):
        completions, questions = zip(*block, strict=True)
        verdicts = grade([prefill + text for text in completions], questions, config, components=components)
        reasons.update(verdicts.reason.tolist())
        # float64 prints 0.2 where float32 would print 0.19999999
        rewards = [round(reward, 9) for reward in (verdicts.unpenalised - verdicts.penalty).tolist()]
        for i, reward in enumerate(rewards):
            line = {
                "reward": reward,
                "format_ok": bool(verdicts.format_ok[i]),
                "answer": str(verdicts.answer[i]) or None,
                "reason": str(verdicts.reason[i]),
            }
            if verdicts.reported_components:
                values = verdicts.reported_components.items()
                line["components"] = {name: float(column[i]) for name, column in values}
            yield json.dumps(line) + "\n"


def format_counts(reasons: Counter[str]) -> str:
    """Return the number and share of completions with each reason as a table."""
    rows = [(reason, f"{n:,}", f"{100 * n / reasons.total():.1f} %") for reason, n in reasons.most_common()]
    return tables.plain(("reason", "completions", "share"), rows)


def questions_with_facts(source: Path) -> list[Question]:
    """Return the questions of all lines. Raise `DataError` if none has facts."""
    questions = [question for block in _blocks(source) for _, question in block]
    if not any(question.facts for question in questions):
        remedy = "add the field facts to the lines, or remove the component"
        raise DataError(f"{source}: reward.components: process: no line has facts; {remedy}")
    return questions


def _blocks(source: Path, max_chars: int = 1 << 25) -> Iterator[list[tuple[str, Question]]]:
    """Yield the file's records in blocks of at most `BLOCK` rows and about `max_chars` characters."""
    block, size = [], 0
    for number, row in read_json(source):
        try:
            block.append(_record(row))
        except DataError as e:
            raise DataError(f"{source}, line {number}: {e}") from None
        size += len(block[-1][0])
        if len(block) >= BLOCK or size >= max_chars:
            yield block
            block, size = [], 0
    if block:
        yield block


def _record(row: dict[str, Any] | DataError) -> tuple[str, Question]:
    """Return the completion and the question of one line. Raise `DataError` if one is missing or invalid."""
    if isinstance(row, DataError):
        raise row
    completion = row.get("completion")
    if not isinstance(completion, str):
        problem = f'{reprlib.repr(completion)} is not a string; an empty completion is ""'
        raise DataError(f"field completion: {problem}; the line has {field_names(row)}")
    options, answer = key_of(row)
    key: dict[str, Any] = {"answer" if isinstance(answer, int) else "value": answer}
    return completion, Question("", "", strip_labels(options), facts=facts_of(row), **key)
