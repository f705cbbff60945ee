"""The components of the reward: which ones a config lists, and the values of those that are pure functions.

    reward = Σ weight · value, over all components but penalties  −  Σ weight · value, over penalties

The value of a penalty is 0 or more. If there are several components, the mean value of each, before the
weight, is the metric `reward/NAME`.

To add a component:

1. Add a section to config/reward.py with its `kind` and its settings, and list it in the union `Component`.
2. Compute its values. There are three ways:
   - A pure function of `Graded`: add a case to `compute_values`. Training, evaluation and `medrlvr score`
     then share it.
   - A function with state or side effects (a worker process, another model): write a `RewardFunction`, start
     it in training.py, and add the section to `NEED_FUNCTION`. Where it fails on a row, the value is NaN and
     the row is not learned from. All processes call it together, each with its own rows, which may be none.
   - A question to the policy itself: write an `answer_scores.PolicyReward` in a file of its own in
     model_rewards/, and add the section to `NEED_POLICY`. The host makes one request for each row when it
     grades the row. A program on the device then computes the values of all rows.
3. If some settings make the component constant, refuse them in config/check.py.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float64, Int

from medrlvr_jax.config import reward as sections
from medrlvr_jax.config.reward import RewardConfig
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards.graders import Graded, accepts, grade_answer
from medrlvr_jax.rewards.parse import answer_text, is_r1
from medrlvr_jax.rewards.penalties import find_leaks, find_repetition, has_preamble

NEED_FUNCTION = (sections.FunctionConfig, sections.ProcessConfig, sections.VerifierConfig)
NEED_POLICY = (sections.ProbabilityConfig, sections.ConsistencyConfig, sections.LooksConfig)


class ComponentValues(NamedTuple):
    """What a reward function returns for N completions."""

    values: Sequence[float]  # NaN where the function failed
    failed: Mapping[int, str]  # row → why it failed
    row_metrics: Mapping[str, np.ndarray] = {}  # bool or float [N]; the mean of each is a metric


class RewardFunction(Protocol):
    """Computes the values of a component in `NEED_FUNCTION`."""

    def compute(self, graded: Graded) -> ComponentValues: ...


@dataclass(frozen=True)
class Component:
    """One component of the reward."""

    name: str  # of the metric reward/NAME
    weight: float  # factor of its values in the sum: negative for a penalty
    penalty: bool = False
    settings: Any = None  # its section of the config; None for a callable of `train(rewards=…)`
    function: RewardFunction | None = None

    @property
    def on_device(self) -> bool:
        return isinstance(self.settings, NEED_POLICY)

    @property
    def is_pure(self) -> bool:
        """Whether the values depend on the graded completion alone (`compute_values`)."""
        return self.settings is not None and not isinstance(self.settings, (*NEED_FUNCTION, *NEED_POLICY))


def list_components(config: RewardConfig) -> tuple[Component, ...]:
    """Return the components of the reward in their order. Those in `NEED_FUNCTION` have no function yet."""
    listed: Sequence[Any] = config.components
    if not listed and config.fn:
        listed = [sections.FunctionConfig(fn=config.fn, deadline=config.deadline)]
    elif not listed:
        listed = [rule_section(config)]
        if config.leak_penalty or config.before_penalty:
            listed += [
                sections.LeakConfig(weight=config.leak_penalty),
                sections.BeforeConfig(weight=config.before_penalty),
            ]
    names = unique_names([section.name or _default_name(section) for section in listed])
    penalties = [isinstance(section, sections.PenaltyConfig) for section in listed]
    return tuple(
        Component(name, -section.weight if penalty else section.weight, penalty, section)
        for name, penalty, section in zip(names, penalties, listed, strict=True)
    )


def rule_section(config: RewardConfig) -> sections.RuleConfig:
    return sections.RuleConfig(unformatted=config.unformatted, wrong=config.wrong, correct=config.correct)


def _default_name(section: Any) -> str:
    return section.fn.partition(":")[2] if isinstance(section, sections.FunctionConfig) else section.kind


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names with repeated ones numbered: the second `f` becomes `f_2`."""
    out: list[str] = []
    for name in names:
        choices = (name if n == 1 else f"{name}_{n}" for n in itertools.count(1))
        out.append(next(choice for choice in choices if choice not in out))
    return out


def compute_values(section: Any, graded: Graded) -> Float64[np.ndarray, " N"]:
    """Return the values of a component that is a pure function of the graded completions."""
    rank = graded.format_ok.astype(int) + graded.correct  # 0: unformatted, 1: wrong, 2: right
    match section:
        case sections.RuleConfig():
            return np.array([section.unformatted, section.wrong, section.correct])[rank]
        case sections.FormatConfig():
            r1 = section.pattern == "r1"
            ok = np.array([is_r1(c) for c in graded.completions], bool) if r1 else graded.format_ok
            return np.where(ok, section.kept, section.broken)
        case sections.AnswerConfig(where="format", accept="rule"):
            return np.where(graded.correct, section.correct, section.wrong)
        case sections.AnswerConfig():
            return _answer_values(section, graded)
        case sections.LeakConfig():
            return np.array([match is not None for match in find_leaks(graded.parsed.thought)], float)
        case sections.BeforeConfig():
            return np.array(has_preamble(graded.parsed.before), float)
        case sections.OverlongConfig():
            lengths, budget = _lengths(section, graded)
            return np.clip((lengths - (budget - section.buffer)) / section.buffer, 0, 1)
        case sections.LengthConfig():
            over = _lengths(section, graded)[0] - section.budget
            return section.per_token * (np.abs(over) if section.shorter else np.maximum(over, 0))
        case sections.RepetitionConfig():
            return find_repetition(graded.completions, section.words, section.times).astype(float)
    raise TypeError(f"{type(section).__name__} is not computed from the completion alone")


def _lengths(section: Any, graded: Graded) -> tuple[Int[np.ndarray, " N"], int]:
    if graded.tokens is None:
        remedy = "a file of texts has no counts of tokens; take the component out"
        raise ConfigError(f"reward.components: {section.kind}: {remedy}")
    return graded.tokens.lengths, graded.tokens.budget


def _answer_values(section: sections.AnswerConfig, graded: Graded) -> Float64[np.ndarray, " N"]:
    out = np.full(len(graded.completions), section.wrong)
    for i, (completion, question) in enumerate(zip(graded.completions, graded.questions, strict=True)):
        if section.where == "format":
            text = graded.parsed.answer[i] if graded.parsed.format_ok[i] else None
        else:
            text = answer_text(completion, section.where)
        if text is None:
            continue
        if section.accept == "rule" or question.value is not None:
            out[i] = section.correct if grade_answer(text, question).correct else section.wrong
        elif accepts(text, question, section.accept):
            is_only_answer = section.accept != "mention" or len(text) == 1
            out[i] = section.correct if is_only_answer else section.among_text
    return out
