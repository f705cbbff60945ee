"""Select the questions that a run trains on, and those of each step, as functions of config and step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from medrlvr_jax.config.data import PassCountConfig
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data.question import DataError, Question
from medrlvr_jax.data.readers import read_json


def batch_at(n: int, number: int, size: int, seed: int, in_order: bool = False) -> Int64[np.ndarray, " size"]:
    """Return the indices, of n questions, of batch `number`, which is 0, 1, …. A resumed run gets the same.

    Each epoch has n // size batches and its own permutation, keyed by (seed, epoch). Questions that do not
    fill a batch are left out; they differ between epochs. `in_order`: an epoch takes its questions in the
    set's order. The permutation sorts raw Philox words: NumPy guarantees this stream across versions, but not
    `Generator.permutation`.
    """
    if size > n:
        problem = f"a batch of {size} questions cannot be drawn from {n} without repeats"
        raise DataError(f"{problem}; set sample.questions to {n} or less")
    epoch, i = divmod(number, n // size)
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    used = np.argsort(words, kind="stable")[: n // size * size]
    return (np.sort(used) if in_order else used)[i * size : (i + 1) * size]


def run_batch(config: Config, n: int, number: int) -> Int64[np.ndarray, " questions"]:
    """Return `batch_at` for a run over n questions."""
    in_order = config.data.pass_count is not None and config.data.pass_count.order is not None
    return batch_at(n, number, config.sample.questions, config.seed, in_order)


def first_batch(history: Sequence[Mapping[str, Any]], step: int) -> int:
    """Return the number of the first batch of the 0-based step `step`.

    It is the step's own number, unless earlier steps drew several batches (`sample.max_batches`). Those
    record the next batch's number in `history`, the records of the steps before, so a resumed run takes the
    same batches.
    """
    return int(history[-1].get("next_batch", step)) if history else step


def select(questions: list[Question], config: PassCountConfig) -> list[Question]:
    """Select and order questions by their counts of right samples, as `PassCountConfig` says.

    Questions that were too long to be sampled have no count and are left out. Raises `DataError` if a
    question is missing in the file, or if none is left.
    """
    low, high = config.keep or (0, float("inf"))
    field = config.order if config.order in ("variance", "impact") else "right"
    counts = _read_counts(config, field)
    if missing := [q.id for q in questions if q.id not in counts]:
        problem = f"{len(missing)} of {len(questions)} questions have no count there, such as {missing[0]!r}"
        remedy = "run `medrlvr difficulty` on this set, to its end"
        raise DataError(f"pass_count.file {config.file!r}: {problem}; {remedy}")
    selected = [q for q in questions if (right := counts[q.id][0]) is not None and low <= right <= high]
    if not selected:
        problem = f"no question has {low} to {high} right samples by {config.file}"
        raise DataError(f"pass_count.keep: {problem}; widen it")
    sign = {None: 0, "hard_first": 1}.get(config.order, -1)  # all other orders put the largest first
    return sorted(selected, key=lambda q: sign * counts[q.id][1])[: config.top]


def _read_counts(config: PassCountConfig, field: str) -> dict[str, tuple[int | None, float]]:
    """Return, by question id, the right samples (None: not sampled) and the number in `field`, to sort by."""
    path = Path(config.file).expanduser()
    if not path.is_file():
        problem = "there is no such file; `medrlvr difficulty` writes one"
        raise DataError(f"pass_count.file {config.file!r}: {problem}")
    counts = {}
    for number, row in read_json(path):
        where, fields = f"{path}, line {number}", {} if isinstance(row, DataError) else row
        name, right, score = fields.get("id"), fields.get("right"), fields.get(field)
        if type(name) is not str or type(right) not in (int, type(None)):
            example = '{"id": "train-1", "right": 3}'
            raise DataError(f"{where}: it is not a line of `medrlvr difficulty`, such as {example}")
        if right is not None and type(score) not in (int, float):
            remedy = "`medrlvr difficulty --history` writes it"
            raise DataError(f"{where}: it lacks {field!r}, by which pass_count.order sorts; {remedy}")
        counts[name] = right, score or 0.0
    return counts
