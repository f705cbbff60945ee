"""`medrlvr score`: completions in a JSONL file, judged by the rule; to try the reward on text."""

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

BLOCK = 4096  # rows scored at a time, so that a file of any size fits the memory


def score_file(
    in_path: str | Path, out_path: str | Path, config: RewardConfig, prefill: str = ""
) -> Counter[str]:
    """Score a JSONL file into another, in the same order; returns how many lines had each reason.

    In: `{"completion": str, "answer": "C", "options": [str, …] or {"A": str, …}}` with 2 to 10 options, or
    `{"completion": str, "kind": "number", "answer": 5.2, …}` as in the format `open`; `facts` where the
    reward has a component `process`; other fields are ignored. Read as questions are (`readers.read_json`):
    blank lines have no line in the output.
    Out: `{"reward": float, "format_ok": bool, "answer": "C" or null, "reason": a key of rewards.REASONS}`,
    and the values of the reward's components if there are several. Only those that need the completion alone,
    and `process`, are paid (`evaluation_components`).
    `prefill`: the end of each prompt, judged as the beginning of each completion.
    Raises `DataError` for a line that cannot be scored, and then leaves no output: the file gets its name
    once it is complete.
    """
    source, target = Path(in_path), Path(out_path)
    with files.reading(source, "give a JSONL file of completions, answers and options", DataError):
        source.open("rb").close()
    if not target.parent.is_dir():
        raise DataError(f"{target}: its folder does not exist; make {target.parent} first")
    if target.exists():
        raise DataError(f"{target}: exists already, and is not overwritten; give another name")
    reasons: Counter[str] = Counter()
    files.write_text(target, _scored(source, config, prefill, reasons))
    return reasons


def _scored(source: Path, config: RewardConfig, prefill: str, reasons: Counter[str]) -> Iterator[str]:
    """The output's lines; `reasons` counts them."""
    facts_needed = any(section.kind == "process" for section in config.components)
    components = evaluation_components(config, questions_with_facts(source) if facts_needed else ())
    for block in _blocks(source):
        completions, questions = zip(*block, strict=True)
        verdicts = grade([prefill + text for text in completions], questions, config, components=components)
        reasons.update(verdicts.reason.tolist())
        # float64, so that a file has 0.2 and not float32's 0.19999999
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


def show(reasons: Counter[str]) -> str:
    """How many lines had each reason, as a table."""
    rows = [(reason, f"{n:,}", f"{100 * n / reasons.total():.1f} %") for reason, n in reasons.most_common()]
    return tables.plain(("reason", "completions", "share"), rows)


def questions_with_facts(source: Path) -> list[Question]:
    """Return the questions of all lines. `process` counts a thought's facts among the facts of all."""
    questions = [question for block in _blocks(source) for _, question in block]
    if not any(question.facts for question in questions):
        remedy = "give lines a field facts, or take the component out"
        raise DataError(f"{source}: reward.components: process: no line has facts; {remedy}")
    return questions


def _blocks(source: Path, most_bytes: int = 1 << 25) -> Iterator[list[tuple[str, Question]]]:
    """The file's records, in blocks of at most `BLOCK` rows and about `most_bytes` characters."""
    block, size = [], 0
    for number, row in read_json(source):
        try:
            block.append(_record(row))
        except DataError as e:
            raise DataError(f"{source}, line {number}: {e}") from None
        size += len(block[-1][0])
        if len(block) >= BLOCK or size >= most_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def _record(row: dict[str, Any] | DataError) -> tuple[str, Question]:
    """The completion and the question of one line; raises `DataError` if one is missing or wrong."""
    if isinstance(row, DataError):
        raise row
    completion = row.get("completion")
    if not isinstance(completion, str):
        problem = f'{reprlib.repr(completion)} is not a text; an empty completion is ""'
        raise DataError(f"field completion: {problem}; the line has {field_names(row)}")
    options, answer = key_of(row)
    key: dict[str, Any] = {"answer" if isinstance(answer, int) else "value": answer}
    return completion, Question("", "", strip_labels(options), facts=facts_of(row), **key)
