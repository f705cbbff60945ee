"""The reward of completions: parse, grade, compute the components, add them by their weights.

The steps stand in this order in parse.py, graders.py, components.py and here. Training and evaluation call
the same function, `grade`.
"""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt

from medrlvr_jax.config.reward import ProcessConfig, RewardConfig
from medrlvr_jax.data.question import LETTERS, DataError, Question
from medrlvr_jax.rewards.components import Component, compute_values, list_components, rule_section
from medrlvr_jax.rewards.facts import FactMatcher
from medrlvr_jax.rewards.graders import TokenCounts, parse_and_grade

DEFAULT = RewardConfig()


@dataclass(frozen=True)
class Verdicts:
    """The rewards of N completions, with the grades and the components from which they follow."""

    unpenalised: Float64[np.ndarray, " N"]  # sum of all components but penalties; NaN where one failed
    penalty: Float64[np.ndarray, " N"]  # sum of the penalties, which is subtracted
    format_ok: Bool[np.ndarray, " N"]
    correct: Bool[np.ndarray, " N"]
    answer: np.ndarray  # str [N], the letter or the value; "" where the format failed
    reason: np.ndarray  # str [N], a key of parse.REASONS or of values.REASONS
    components: Mapping[str, np.ndarray] = field(default_factory=dict)  # values [N], before the weight
    failed: Mapping[int, str] = field(default_factory=dict)  # rows on which a component failed, and why
    row_metrics: Mapping[str, np.ndarray] = field(default_factory=dict)  # [N], the mean of each is a metric

    @cached_property
    def reward(self) -> Float32[np.ndarray, " N"]:
        return self.unpenalised.astype(np.float32) - self.penalty.astype(np.float32)

    @property
    def reported_components(self) -> Mapping[str, np.ndarray]:
        """The components if there are several. A single one is not reported, since it is the reward."""
        return self.components if len(self.components) > 1 else {}


def grade(
    completions: Sequence[str],
    questions: Sequence[Question],
    config: RewardConfig = DEFAULT,
    tokens: TokenCounts | None = None,
    components: Sequence[Component] | None = None,
) -> Verdicts:
    """Return the verdicts on completion i as a response to question i. A row does not depend on the others.

    `components` are by default those of `config` that need nothing but the completion. Raises `DataError` if
    completions and questions differ in number, or if a completion is not a text.
    """
    _check(completions, questions=questions)
    graded = parse_and_grade(completions, questions, config, tokens)
    components = evaluation_components(config) if components is None else components
    values, failed, row_metrics = {}, {}, {}
    for component in components:
        if component.function is None:
            values[component.name] = compute_values(component.settings, graded)
            continue
        computed = component.function.compute(graded)
        values[component.name] = np.array(computed.values, float)
        row_metrics |= computed.row_metrics
        prefix = f"{component.name}: " if len(components) > 1 else ""
        failed = {row: prefix + reason for row, reason in computed.failed.items()} | failed
    zeros = np.zeros(len(completions))
    unpenalised, penalty = add_components(zeros, zeros, components, values)
    fields = {name: getattr(graded, name) for name in ("format_ok", "correct", "answer", "reason")}
    return Verdicts(unpenalised, penalty, **fields, components=values, failed=failed, row_metrics=row_metrics)


def evaluation_components(config: RewardConfig, questions: Sequence[Question] = ()) -> tuple[Component, ...]:
    """Return the components that need nothing but the completion: the reward of an evaluation and of a file.

    With `questions`, the component `process` is among them. If only penalties are left, the rule is added.
    """
    out = []
    for component in list_components(config):
        if component.is_pure:
            out.append(component)
        elif isinstance(component.settings, ProcessConfig) and questions:
            function = FactMatcher(questions, component.settings, component.name)
            out.append(dataclasses.replace(component, function=function))
    if all(component.penalty for component in out):
        out.insert(0, Component("rule", 1.0, settings=rule_section(config)))
    return tuple(out)


def add_components(
    unpenalised: Float64[np.ndarray, " N"],
    penalty: Float64[np.ndarray, " N"],
    components: Sequence[Component],
    values: Mapping[str, np.ndarray],
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """Return both sums with the components added, each by its weight. `values` has [N] for each name."""
    for component in components:
        if component.penalty:
            penalty = penalty - component.weight * values[component.name]
        else:
            unpenalised = unpenalised + component.weight * values[component.name]
    return unpenalised, penalty


def score(
    completions: Sequence[str],
    answers: Sequence[str],
    options: Sequence[Sequence[str]],
    config: RewardConfig = DEFAULT,
) -> Verdicts:
    """Return `grade` of rows that have a completion, the letter of the right option, and 2 to 10 options.

    Raises `DataError` also if a row has too few or too many options, or if its letter is not one of theirs.
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


def _check(completions: Sequence[str], **columns: Sequence[Any]) -> None:
    if any(len(column) != len(completions) for column in columns.values()):
        counts = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise DataError(f"{len(completions)} completions, {counts}: give one of each for every row")
    for i, completion in enumerate(completions):
        if not isinstance(completion, str):
            remedy = "an empty completion is an empty text"
            raise DataError(f"row {i}: its completion is {reprlib.repr(completion)}: {remedy}")


def random_rewards(
    key: Sequence[int] | np.ndarray, ids: UInt[np.ndarray, " Q"], samples: int, config: RewardConfig
) -> Float32[np.ndarray, "Q G"]:
    """Return the control `reward.random`: `correct` with that probability, else `wrong`.

    A reward depends on the step's `key` (integers), the question's number in `ids` and the sample's number
    alone, not on the completion and not on the right answer. Random rewards were seen to raise accuracy
    (arXiv 2506.10947), so a gain must be compared with theirs.
    """
    seeds = [np.random.SeedSequence([*map(int, key), int(i)]) for i in ids]
    # random_raw gives the same bits in all releases of NumPy, unlike the generators' methods
    words = np.array([np.random.Philox(seed).random_raw(samples) for seed in seeds])
    return np.where(words < (config.random or 0.0) * 2.0**64, config.correct, config.wrong).astype(np.float32)


def replace_rewards(verdicts: Verdicts, rewards: Float32[np.ndarray, " N"]) -> Verdicts:
    """Return the verdicts with these rewards in place of all components."""
    new = rewards.astype(float)
    return dataclasses.replace(verdicts, unpenalised=new, penalty=np.zeros_like(new), components={})
