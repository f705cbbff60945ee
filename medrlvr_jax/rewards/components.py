"""The components of a reward: what each is worth on N completions, and which of them run where.

    reward = Σ weight · value of what pays  −  Σ weight · value of penalties

A penalty (leak, before, …) shapes the reward: its value is 0 or more and is subtracted. A component's mean
value before the weight is the metric `reward/NAME`, if there are several.

To add a component:

1. A section in config/reward.py with its `kind`, its settings and their comments, in the union `Component`.
2. What computes its values; each row is judged by itself:
   - From the completion alone: a case in `values`, a pure function of `Graded`. Training, evaluation and
     `medrlvr score` then share it.
   - By something outside (a function in a worker, another model): a `Judge`, started in judges.py for the
     length of a training, and its section in `JUDGED`. A row on which it fails gets NaN and a reason: it
     is left out of learning. All processes call it together, each with its own rows, which may be none.
   - By the policy itself: its section in `ON_DEVICE`, and an `ask.PolicyReward` in a file of
     model_rewards/: the host makes a request for each row while it grades; a program answers for all rows
     on the device.
3. If a combination of settings makes it constant, a complaint in config/check.py.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float64, Int

from medrlvr_jax.config.reward import (
    AnswerConfig,
    BeforeConfig,
    ConsistencyConfig,
    FormatConfig,
    FunctionConfig,
    LeakConfig,
    LengthConfig,
    LooksConfig,
    OverlongConfig,
    PenaltyConfig,
    ProbabilityConfig,
    ProcessConfig,
    RepetitionConfig,
    RewardConfig,
    RuleConfig,
    VerifierConfig,
)
from medrlvr_jax.data.question import Question
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards.graders import accepts, judge_answer
from medrlvr_jax.rewards.parse import Parsed, answer_text, is_r1
from medrlvr_jax.rewards.penalties import leaks, much_before, repeats

JUDGED = (FunctionConfig, ProcessConfig, VerifierConfig)  # need a `Judge`
ON_DEVICE = (ProbabilityConfig, ConsistencyConfig, LooksConfig)  # ask the policy


class Tokens(NamedTuple):
    """Of N completions that were sampled here."""

    lengths: Int[np.ndarray, " N"]  # tokens up to and including the stop token
    stopped: Bool[np.ndarray, " N"]  # False where the budget cut the response
    budget: int  # tokens that a response may have


@dataclass(frozen=True)
class Graded:
    """N completions, parsed and graded once: what components read."""

    completions: Sequence[str]
    questions: Sequence[Question]
    parsed: Parsed
    format_ok: Bool[np.ndarray, " N"]
    correct: Bool[np.ndarray, " N"]
    answer: np.ndarray  # str [N], the letter or the value; "" where the format failed
    reason: np.ndarray  # str [N], a key of parse.REASONS or of values.REASONS
    tokens: Tokens | None = None  # None: of texts that were not sampled here


class Judged(NamedTuple):
    """What a judge makes of N completions."""

    values: Sequence[float]  # NaN where it failed
    failed: Mapping[int, str]  # why, by row
    shares: Mapping[str, np.ndarray] = {}  # bool or float [N]: their means are metrics of these names


class Judge(Protocol):
    """What computes a component's values outside of this process's pure functions."""

    def judge(self, graded: Graded) -> Judged: ...


@dataclass(frozen=True)
class Component:
    """A term of the reward."""

    name: str  # of the metric reward/NAME
    weight: float  # of its values in the sum: negative for a penalty
    penalty: bool = False  # it shapes the reward
    settings: Any = None  # its section; None: a callable of `train(rewards=…)`
    judge: Judge | None = None

    @property
    def on_device(self) -> bool:
        return isinstance(self.settings, ON_DEVICE)


def components(config: RewardConfig) -> tuple[Component, ...]:
    """The terms of the reward in their order; those in `JUDGED` still without a judge."""
    sections: Sequence[Any] = config.components
    if not sections and config.fn:
        sections = [FunctionConfig(fn=config.fn, deadline=config.deadline)]
    elif not sections:
        sections = [_rule(config)]
        if config.leak_penalty or config.before_penalty:
            sections += [LeakConfig(weight=config.leak_penalty), BeforeConfig(weight=config.before_penalty)]
    names = unique_names([section.name or short_name(section) for section in sections])
    signs = [-1.0 if isinstance(section, PenaltyConfig) else 1.0 for section in sections]
    return tuple(
        Component(name, sign * section.weight, sign < 0, section)
        for name, sign, section in zip(names, signs, sections, strict=True)
    )


def pure(config: RewardConfig, facts: Judge | None = None) -> tuple[Component, ...]:
    """The terms that need the completion alone, and `process` where there is a judge for it: by them
    evaluations and files are paid. Without any that pays, the rule is one.
    """
    listed = [
        replace(term, judge=facts) if isinstance(term.settings, ProcessConfig) else term
        for term in components(config)
    ]
    outside = (*JUDGED, *ON_DEVICE)
    terms = tuple(term for term in listed if term.judge or not isinstance(term.settings, outside))
    if all(term.penalty for term in terms):
        return Component("rule", 1.0, settings=_rule(config)), *terms
    return terms


def _rule(config: RewardConfig) -> RuleConfig:
    return RuleConfig(unformatted=config.unformatted, wrong=config.wrong, correct=config.correct)


def short_name(section: Any) -> str:
    return section.fn.partition(":")[2] if isinstance(section, FunctionConfig) else section.kind


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, a second `f` as `f_2`."""
    out: list[str] = []
    for name in names:
        choices = (name if n == 1 else f"{name}_{n}" for n in itertools.count(1))
        out.append(next(choice for choice in choices if choice not in out))
    return out


def values(section: Any, graded: Graded) -> Float64[np.ndarray, " N"]:
    """What a component on the host is worth on each row, before its weight."""
    rank = graded.format_ok.astype(int) + graded.correct  # 0: unformatted, 1: wrong, 2: right
    match section:
        case RuleConfig():
            return np.array([section.unformatted, section.wrong, section.correct])[rank]
        case FormatConfig():
            r1 = section.pattern == "r1"
            ok = np.array([is_r1(c) for c in graded.completions], bool) if r1 else graded.format_ok
            return np.where(ok, section.kept, section.broken)
        case AnswerConfig(where="format", accept="rule"):
            return np.where(graded.correct, section.correct, section.wrong)
        case AnswerConfig():
            return _answers(section, graded)
        case LeakConfig():
            return np.array([match is not None for match in leaks(graded.parsed.thought)], float)
        case BeforeConfig():
            return np.array(much_before(graded.parsed.before), float)
        case OverlongConfig():
            lengths, budget = _lengths(section, graded)
            return np.clip((lengths - (budget - section.buffer)) / section.buffer, 0, 1)
        case LengthConfig():
            over = _lengths(section, graded)[0] - section.budget
            return section.per_token * (np.abs(over) if section.shorter else np.maximum(over, 0))
        case RepetitionConfig():
            return repeats(graded.completions, section.words, section.times).astype(float)
    raise TypeError(f"{type(section).__name__} has no values on the host")


def _lengths(section: Any, graded: Graded) -> tuple[Int[np.ndarray, " N"], int]:
    if graded.tokens is None:
        remedy = "a file of texts has no counts of tokens; take the component out"
        raise ConfigError(f"reward.components: {section.kind}: {remedy}")
    return graded.tokens.lengths, graded.tokens.budget


def _answers(section: AnswerConfig, graded: Graded) -> Float64[np.ndarray, " N"]:
    """Values of answers that stand or read otherwise than the rule wants."""
    out = np.full(len(graded.completions), section.wrong)
    for i, (completion, question) in enumerate(zip(graded.completions, graded.questions, strict=True)):
        text = answer_text(completion, section.where)
        if section.where == "format":
            text = graded.parsed.answer[i] if graded.parsed.format_ok[i] else None
        if text is None:
            continue
        if question.value is not None or section.accept == "rule":
            right = judge_answer(text, question).correct
        else:
            right = accepts(text, question, section.accept)
        if right:
            out[i] = section.correct
            if section.accept == "mention" and len(text) > 1:
                out[i] = section.among_text
    return out
