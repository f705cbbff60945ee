"""A completion's reward: parse, grade, weigh. One function scores training and evaluation.

parse.py has the formats, graders.py what makes an answer right, components.py the terms of the sum,
penalties.py two of them, judges.py and user.py the rewards by a user's functions.
"""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt

from medrlvr_jax.config.reward import RewardConfig
from medrlvr_jax.data.question import LETTERS, DataError, Question
from medrlvr_jax.rewards.components import Component, Graded, Tokens, pure, values
from medrlvr_jax.rewards.graders import Grade, judge_answer
from medrlvr_jax.rewards.parse import parse

DEFAULT = RewardConfig()


@dataclass(frozen=True)
class Verdicts:
    """What N completions are worth, and why."""

    paid: Float64[np.ndarray, " N"]  # the sum of what pays; NaN where a component failed
    penalty: Float64[np.ndarray, " N"]  # the sum of penalties, which is subtracted
    format_ok: Bool[np.ndarray, " N"]
    correct: Bool[np.ndarray, " N"]
    answer: np.ndarray  # str [N], the letter or the value; "" where the format failed
    reason: np.ndarray  # str [N], a key of parse.REASONS or of values.REASONS
    components: Mapping[str, np.ndarray] = field(default_factory=dict)  # values [N], before the weight
    failed: Mapping[int, str] = field(default_factory=dict)  # rows on which a component failed, and why
    shares: Mapping[str, np.ndarray] = field(default_factory=dict)  # [N], whose means are metrics

    @cached_property
    def reward(self) -> Float32[np.ndarray, " N"]:
        return self.paid.astype(np.float32) - self.penalty.astype(np.float32)

    @property
    def several(self) -> Mapping[str, np.ndarray]:
        """The components where there are several: a single one is the reward itself."""
        return self.components if len(self.components) > 1 else {}


def grade(
    completions: Sequence[str],
    questions: Sequence[Question],
    config: RewardConfig = DEFAULT,
    tokens: Tokens | None = None,
    terms: Sequence[Component] | None = None,
) -> Verdicts:
    """Judge completion i as a response to question i. Each row is judged by itself.

    `terms`: what is paid, where that is not what `config` pays for a completion alone (`components.pure`).
    Raises `DataError` if completions and questions differ in number, or if a completion is no text.
    """
    _check(completions, questions=questions)
    graded = read(completions, questions, config, tokens)
    terms = pure(config) if terms is None else terms
    columns, failed, shares = {}, {}, {}
    for term in terms:
        if term.judge is None:
            columns[term.name] = values(term.settings, graded)
            continue
        column, reasons, counted = term.judge.judge(graded)
        columns[term.name] = np.array(column, float)
        shares |= counted
        prefix = f"{term.name}: " if len(terms) > 1 else ""
        failed = {row: prefix + reason for row, reason in reasons.items()} | failed
    paid, penalty = add_terms(np.zeros(len(completions)), np.zeros(len(completions)), terms, columns)
    verdict = {name: getattr(graded, name) for name in ("format_ok", "correct", "answer", "reason")}
    return Verdicts(paid, penalty, **verdict, components=columns, failed=failed, shares=shares)


def add_terms(
    paid: Float64[np.ndarray, " N"],
    penalty: Float64[np.ndarray, " N"],
    terms: Sequence[Component],
    columns: Mapping[str, np.ndarray],
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """What is paid and what is subtracted, with the terms added, each by its weight; columns [N] by name."""
    for term in terms:
        if term.penalty:
            penalty = penalty - term.weight * columns[term.name]
        else:
            paid = paid + term.weight * columns[term.name]
    return paid, penalty


def read(
    completions: Sequence[str], questions: Sequence[Question], config: RewardConfig, tokens: Tokens | None
) -> Graded:
    """Parse each completion once, and grade its answer once."""
    parsed = parse(completions, config.mode, [LETTERS[: len(q.options)] for q in questions])
    # samples of a question give few answers: each is graded once
    seen: dict[tuple[int, str, str], Grade] = {}
    grades = []
    for question, answer, why in zip(questions, parsed.answer, parsed.reason, strict=True):
        key = id(question), answer, why
        if (judged := seen.get(key)) is None:
            judged = seen[key] = Grade("", False, why) if why else judge_answer(answer, question)
        grades.append(judged)
    answers, correct, reasons = zip(*grades, strict=True) if grades else ((), (), ())
    answer = np.array(answers, str)
    verdict = {"correct": np.array(correct, bool), "answer": answer, "reason": np.array(reasons, str)}
    return Graded(completions, questions, parsed, format_ok=answer != "", **verdict, tokens=tokens)


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
    distinct: dict[tuple[str, ...], Question] = {}
    questions = []
    for i, (key, row) in enumerate(zip(answers, options, strict=True)):
        if not 2 <= len(row) <= len(LETTERS) or key not in list(LETTERS[: len(row)]):
            remedy = "2 to 10 options and the letter of one are needed"
            raise DataError(f"row {i}: answer {reprlib.repr(key)} with {len(row)} options: {remedy}")
        if (question := distinct.get((key, *row))) is None:
            question = distinct[key, *row] = Question("", "", tuple(row), LETTERS.index(key))
        questions.append(question)
    return grade(completions, questions, config)


def tossed(verdicts: Verdicts, rewards: Float32[np.ndarray, " N"]) -> Verdicts:
    """The verdicts with the rewards of `toss` as all that is paid."""
    paid = rewards.astype(float)
    return dataclasses.replace(verdicts, paid=paid, penalty=np.zeros_like(paid), components={})


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
