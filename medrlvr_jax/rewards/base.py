"""The rule's reward: parse, grade, weigh. One function scores training and evaluation.

    reward = unformatted | wrong | correct  −  leak_penalty · leak  −  before_penalty · before

The first term depends on the format, then on the answer (Med-RLVR, arXiv 2502.19655). parse.py has the
formats, graders.py what makes an answer right, penalties.py the two penalties, user.py the rewards by
a user's functions. Every reward is a sum of components, each times its weight; if there is more than one,
the mean of each is a metric of its own.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt

from medrlvr_jax.config.schema import RewardConfig
from medrlvr_jax.data.question import LETTERS, DataError, Question
from medrlvr_jax.rewards.graders import Grade, choice, value
from medrlvr_jax.rewards.parse import parse
from medrlvr_jax.rewards.penalties import penalised

DEFAULT = RewardConfig()


@dataclass(frozen=True)
class Verdicts:
    """What the rule says of each of N completions."""

    reward: Float32[np.ndarray, " N"]
    penalty: Float64[np.ndarray, " N"]  # what `reward` lacks for a leak or for words before <think>
    format_ok: Bool[np.ndarray, " N"]
    correct: Bool[np.ndarray, " N"]
    answer: np.ndarray  # str [N], the letter or the value; "" where the format failed
    reason: np.ndarray  # str [N], a key of parse.REASONS or of values.REASONS
    components: Mapping[str, np.ndarray] = field(
        default_factory=dict
    )  # [N] each, unweighted; none if there is only one


def grade(
    completions: Sequence[str], questions: Sequence[Question], config: RewardConfig = DEFAULT
) -> Verdicts:
    """Judge completion i as a response to question i, by the rule `config`. Each row is judged by itself.

    Raises `DataError` if the two differ in length, or if a completion is no text.
    """
    _check(completions, questions=questions)
    graders = [
        partial(value, reference=q.value)
        if q.value is not None
        else partial(choice, reference=q.reference, options=q.options)
        for q in questions
    ]
    return _judge(completions, graders, [q.options for q in questions], config)


def score(
    completions: Sequence[str],
    answers: Sequence[str],
    options: Sequence[Sequence[str]],
    config: RewardConfig = DEFAULT,
) -> Verdicts:
    """`grade` for rows that are a completion, a key letter and 2 to 10 options.

    Raises `DataError` also if a row has too few or too many options, or a key that is none of them.
    """
    _check(completions, answers=answers, options=options)
    for i, (key, row) in enumerate(zip(answers, options, strict=True)):
        if not 2 <= len(row) <= len(LETTERS) or key not in list(LETTERS[: len(row)]):
            remedy = "2 to 10 options and the letter of one are needed"
            raise DataError(f"row {i}: answer {reprlib.repr(key)} with {len(row)} options: {remedy}")
    rows = zip(answers, options, strict=True)
    return _judge(
        completions, [partial(choice, reference=key, options=row) for key, row in rows], options, config
    )


def _judge(
    completions: Sequence[str],
    graders: Sequence[Callable[[str], Grade]],
    options: Sequence[Sequence[str]],
    config: RewardConfig,
) -> Verdicts:
    parsed = parse(completions, config.mode, [LETTERS[: len(row)] for row in options])
    rows = zip(parsed.format_ok, parsed.answer, parsed.reason, graders, strict=True)
    grades = [grader(answer) if ok else Grade("", False, why) for ok, answer, why, grader in rows]
    format_ok, correct = (
        np.array([g.answer != "" for g in grades], bool),
        np.array([g.correct for g in grades], bool),
    )
    worth = np.array([config.unformatted, config.wrong, config.correct], np.float32)[
        format_ok.astype(int) + correct
    ]
    penalty, components = np.zeros(len(grades)), {}
    if config.leak_penalty or config.before_penalty:
        hacks = {name: np.array(rows, bool) for name, rows in penalised(parsed).items()}
        penalty = config.leak_penalty * hacks["leak"] + config.before_penalty * hacks["before"]
        components = {"rule": worth} | hacks
    return Verdicts(
        reward=worth - penalty.astype(np.float32),
        penalty=penalty,
        format_ok=format_ok,
        correct=correct,
        answer=np.array([g.answer for g in grades], str),
        reason=np.array([g.reason for g in grades], str),
        components=components,
    )


def _check(completions: Sequence[str], **columns: Sequence[Any]) -> None:
    if any(len(column) != len(completions) for column in columns.values()):
        counts = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise DataError(f"{len(completions)} completions, {counts}: give one of each for every row")
    for i, completion in enumerate(completions):
        if not isinstance(completion, str):
            remedy = "an empty completion is an empty text"
            raise DataError(f"row {i}: its completion is {reprlib.repr(completion)}: {remedy}")


def toss(
    key: Sequence[int] | np.ndarray, ids: UInt[np.ndarray, " Q"], samples: int, config: RewardConfig
) -> Float32[np.ndarray, "Q G"]:
    """The control `reward.random` for G `samples` of Q questions: `correct` with that chance, else `wrong`.

    A function of the step's `key` (integers), of each question's number in `ids` and of the sample alone,
    never of a completion or of the question's key. Random rewards were seen to raise accuracy (arXiv
    2506.10947), so a gain must be compared with theirs.
    """
    seeds = [np.random.SeedSequence([*map(int, key), int(i)]) for i in ids]
    words = np.array(
        [np.random.Philox(seed).random_raw(samples) for seed in seeds]
    )  # raw: the same in all of NumPy's releases
    return np.where(words < (config.random or 0.0) * 2.0**64, config.correct, config.wrong).astype(np.float32)
