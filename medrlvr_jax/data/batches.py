"""Which questions a run trains on, and which of them each step takes: functions of config and step."""

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
    """Return the indices of the `size` questions, of `n`, in batch `number`, which is 0, 1, ….

    Each epoch has n // size steps and its own permutation, keyed by (seed, epoch). The rest that does not
    fill a batch is left out; it differs between epochs. `in_order`: an epoch takes its questions in the
    set's order. The permutation sorts raw Philox words: NumPy keeps that stream across versions, not
    `Generator.permutation`.
    """
    if size > n:
        remedy = f"set sample.questions to {n} or less"
        raise DataError(f"a batch of {size} questions cannot be drawn from {n} without repeats; {remedy}")
    epoch, i = divmod(number, n // size)
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    taken = np.argsort(words, kind="stable")[: n // size * size]
    return (np.sort(taken) if in_order else taken)[i * size : (i + 1) * size]


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
    """The questions that `keep` and `top` select, in `order`; none that was too long to be sampled."""
    low, high = config.keep or (0, float("inf"))
    field = config.order if config.order in ("variance", "impact") else "right"
    counts = _read_counts(config, field)
    if missing := [q.id for q in questions if q.id not in counts]:
        some = f"{len(missing)} of {len(questions)} questions"
        remedy = f"the first is {missing[0]!r}; run `medrlvr difficulty` on this set, to its end"
        raise DataError(f"pass_count.file {config.file!r}: {some} have no count there, {remedy}")
    selected = [q for q in questions if (right := counts[q.id][0]) is not None and low <= right <= high]
    if not selected:
        problem = f"no question has {low} to {high} right samples by {config.file}"
        raise DataError(f"pass_count.keep: {problem}; widen it")
    sign = {None: 0, "hard_first": 1}.get(config.order, -1)  # every other order: the largest first
    return sorted(selected, key=lambda q: sign * counts[q.id][1])[: config.top]


def _read_counts(config: PassCountConfig, field: str) -> dict[str, tuple[int | None, float]]:
    """By question id: right samples (None: not sampled), and the number in `field`, by which to sort."""
    path = Path(config.file).expanduser()
    if not path.is_file():
        raise DataError(f"pass_count.file {config.file!r}: no such file; `medrlvr difficulty` writes one")
    counts = {}
    for number, row in read_json(path):
        where, fields = f"{path}, line {number}", {} if isinstance(row, DataError) else row
        name, right, score = fields.get("id"), fields.get("right"), fields.get(field)
        if type(name) is not str or type(right) not in (int, type(None)):
            example = '{"id": "train-1", "right": 3}'
            raise DataError(f"{where}: a line such as {example} is needed, as `medrlvr difficulty` writes")
        if right is not None and type(score) not in (int, float):
            remedy = "`medrlvr difficulty --history` writes one"
            raise DataError(f"{where}: no number {field!r} in it, by which pass_count.order goes; {remedy}")
        counts[name] = right, score or 0.0
    return counts
