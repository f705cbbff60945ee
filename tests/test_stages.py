"""The stage of a completion, against hand-labelled ones.

stages.jsonl: 78 typical ones that the first definitions were set on, 36 written after. stage_borders.jsonl:
hard cases at the borders between stages, labelled by what the stages are meant to be before the detector had
seen one: 48 to mend the definitions on, 62 held out.
"""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from medrlvr_jax.config.schema import RewardConfig
from medrlvr_jax.rewards import score, stages

DATA = Path(__file__).parent / "data"
MEASURED = {  # stage: hits, said, there; precision is hits / said, recall hits / there
    "format_failure": (10, 10, 10),
    "verbose_formatter": (11, 11, 11),
    "concise_structurer": (9, 13, 10),
    "direct_answer_hacker": (10, 10, 10),
    "step_by_step_exploit": (10, 10, 10),
    "reintegrated_reasoning": (7, 8, 11),  # the missed ones infer without any word that says so
}


def judge(name, held_out):
    """hits, said, there of each stage."""
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if r.get("held_out", False) == held_out]
    verdicts = score(
        [r["completion"] for r in rows],
        ["A"] * len(rows),
        [r["options"] for r in rows],
        RewardConfig(mode="paper"),
    )
    found = [
        stages.stage(r["completion"], bool(ok), r["options"])
        for r, ok in zip(rows, verdicts.format_ok, strict=True)
    ]
    labels = [r["stage"] for r in rows]
    hits = Counter(a for a, b in zip(found, labels, strict=True) if a == b)
    return {s: (hits[s], found.count(s), labels.count(s)) for s in stages.STAGES}


@pytest.mark.parametrize(
    ("name", "held_out"), [("stages.jsonl", False), ("stages.jsonl", True), ("stage_borders.jsonl", False)]
)
def test_precision_and_recall_where_the_definitions_were_set(name, held_out):
    for stage, (hits, said, there) in judge(name, held_out).items():
        assert there >= 6 and hits / said >= 0.9 and hits / there >= 0.9, stage


def test_precision_and_recall_at_the_borders_held_out():
    assert judge("stage_borders.jsonl", True) == MEASURED


def test_an_options_own_text_is_no_reasoning():
    completion = (
        "<think>Drug-eluting stent placement in the left anterior descending artery</think><answer>B</answer>"
    )
    options = ["Aspirin", "Drug-eluting stent placement in the left anterior descending artery"]
    assert stages.stage(completion, True, options) == "direct_answer_hacker"
    assert stages.stage(completion, True, options[:1]) == "concise_structurer"


def test_long_and_hostile_texts_take_linear_time():
    for piece in ("the answer is ", "( A ", "so the final correct best ", "<think>", "a. ", "clot "):
        seconds = []
        for n in (20_000, 80_000):
            text = "<think>" + piece * (n // len(piece)) + "</think><answer>A</answer>"
            start = time.thread_time()
            stages.stage(text, True, ["aspirin"] * 4)
            seconds.append(time.thread_time() - start)
        assert seconds[1] < 12 * seconds[0] + 0.2, piece
