"""The stage of a completion, against hand-labelled ones: 78 that the definitions were set on, and 36 written after, at their borders."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from medrlvr_jax import stages
from medrlvr_jax.config import RewardConfig
from medrlvr_jax.rewards import score

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data" / "stages.jsonl").read_text(encoding="utf-8").splitlines()]


def told(rows):
    verdicts = score([r["completion"] for r in rows], ["A"] * len(rows), [r["options"] for r in rows], RewardConfig(mode="paper"))
    return [stages.stage(r["completion"], bool(ok), r["options"]) for r, ok in zip(rows, verdicts.format_ok, strict=True)]


@pytest.mark.parametrize("held_out", [False, True])
def test_precision_and_recall(held_out):
    rows = [r for r in ROWS if r.get("held_out", False) == held_out]
    found, labels = told(rows), [r["stage"] for r in rows]
    hits, said, there = Counter(a for a, b in zip(found, labels, strict=True) if a == b), Counter(found), Counter(labels)
    assert set(there) == set(stages.STAGES) and min(there.values()) >= 6
    for name in stages.STAGES:
        assert hits[name] / said[name] >= 0.95 and hits[name] / there[name] >= 0.95, (name, Counter(zip(labels, found, strict=True)))


def test_an_options_own_text_is_no_reasoning():
    completion = "<think>Drug-eluting stent placement in the left anterior descending artery</think><answer>B</answer>"
    options = ["Aspirin", "Drug-eluting stent placement in the left anterior descending artery"]
    assert stages.stage(completion, True, options) == "direct_answer_hacker"
    assert stages.stage(completion, True, options[:1]) == "concise_structurer"


def test_long_and_hostile_texts_take_linear_time():
    for piece in ("the answer is ", "( A ", "so the final correct best ", "<think>", "a. ", "clot "):
        seconds = []
        for n in (20_000, 80_000):
            text = "<think>" + piece * (n // len(piece)) + "</think><answer>A</answer>"
            start = time.process_time()
            stages.stage(text, True, ["aspirin"] * 4)
            seconds.append(time.process_time() - start)
        assert seconds[1] < 12 * seconds[0] + 0.2, piece
