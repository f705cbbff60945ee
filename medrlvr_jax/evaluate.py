"""Evaluation: the first half of a training step, over whole sets, with the training's own sampler and reward."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from medrlvr_jax import data
from medrlvr_jax.build import Parts
from medrlvr_jax.config import ConfigError, SampleConfig
from medrlvr_jax.experience import Encoded, encode, sample_and_score
from medrlvr_jax.types import Params

NOISE = 2**31 + 1  # folded into the seed: evaluation draws from a stream of its own, the same at every step


def load_sets(parts: Parts) -> dict[str, Encoded]:
    """Read and encode every evaluation set of the config."""
    sets = {}
    for name, spec in parts.config.eval.sets.items():
        sets[name] = encode(parts.tokenizer, data.load(spec), parts.config)
        if not sets[name].questions:
            raise ConfigError(f"eval.sets.{name}: no question of {spec.path} fits prompt.max_tokens = {parts.config.prompt.max_tokens}; raise it")
    return sets


def evaluate(parts: Parts, decode_params: Params, encoded: Encoded, progress: Callable[[int, int], None] = lambda done, n: None) -> tuple:
    """Answer every question of a set. Returns (counts for summary.json, rows for a JSONL file)."""
    c = parts.config
    sample = SampleConfig(
        questions=c.eval.batch,
        samples=c.eval.samples,
        max_new_tokens=c.eval.max_new_tokens or c.sample.max_new_tokens,
        temperature=c.eval.temperature,
    )
    key = jax.random.fold_in(jax.random.key(c.seed), np.uint32(NOISE))
    n, rows = len(encoded.questions), []
    for start in range(0, n, c.eval.batch):
        index = np.arange(start, start + c.eval.batch) % n  # the last batch is filled up; its surplus is not counted
        scored = sample_and_score(decode_params, parts, encoded, index, key, sample)
        v = scored.verdicts
        for row in range(min(c.eval.batch, n - start) * c.eval.samples):
            question = encoded.questions[start + row // c.eval.samples]
            rows.append(
                {
                    "id": question.id,
                    "subject": question.subject,
                    "sample": row % c.eval.samples,
                    "completion": scored.completions[row],
                    "key": data.LETTERS[question.answer],
                    "answer": str(v.answer[row]) or None,
                    "reward": float(v.reward[row]),
                    "format_ok": bool(v.format_ok[row]),
                    "correct": bool(v.correct[row]),
                    "reason": str(v.reason[row]),
                    "length": int(scored.lengths[row]),
                    "stopped": bool(scored.stopped[row]),
                }
            )
        progress(min(start + c.eval.batch, n), n)
    return summarise(rows, encoded.dropped), rows


def summarise(rows: list[dict[str, Any]], dropped: int) -> dict[str, Any]:
    """Counts over completions: n, correct, format_ok; and their shares, for reading."""
    n = len(rows)
    correct, formatted = sum(r["correct"] for r in rows), sum(r["format_ok"] for r in rows)
    return {
        "n": n,
        "correct": correct,
        "format_ok": formatted,
        "accuracy": correct / n,
        "format_rate": formatted / n,
        "response_length": sum(r["length"] for r in rows) / n,
        "truncated": sum(not r["stopped"] for r in rows),
        "dropped_prompts": dropped,
    }


def evaluate_sets(parts: Parts, decode_params: Params, sets: dict[str, Encoded], run) -> dict[str, Any]:
    """Evaluate each set of a run and write its rows to `eval/<set>.<step>.jsonl`; flat `eval.<set>.<count>` metrics."""
    metrics = {}
    for name, encoded in sets.items():
        counts, rows = evaluate(parts, decode_params, encoded, lambda done, n, name=name: run.progress(f"eval {name}", done, n))
        metrics |= {f"eval.{name}.{k}": v for k, v in counts.items()}
    return metrics
