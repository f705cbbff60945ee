"""The settings of the reward: its components, and presets named after the systems that published them.

A component is a section with a `kind`. It pays, or it is a penalty: its value is subtracted, and its `weight`
cannot be negative. rewards/components.py computes the values.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from medrlvr_jax.config.section import Count, FunctionName, Name, Positive, Share, Weight, section


@section
class PayingConfig:
    """A component whose value, times its weight, is added to the reward."""

    weight: float = 1.0  # The component's value is multiplied by this. 0: only a metric.
    name: Name | None = None  # Name of its metric, reward/NAME. null: the kind, or the function's name.


@section
class PenaltyConfig:
    """A component whose value, 0 or more, times its weight, is subtracted from the reward."""

    weight: Weight = 1.0  # The penalty is this times the component's value. 0: only a metric.
    name: Name | None = None  # Name of its metric, reward/NAME. null: the kind.


@section
class RuleConfig(PayingConfig):
    """Med-RLVR's rule: first the format, then the answer (arXiv 2502.19655)."""

    kind: Literal["rule"] = "rule"
    unformatted: float = -1.0  # Value of a completion that breaks the format of reward.mode.
    wrong: float = 0.0  # Value of a wrong answer in the right format.
    correct: float = 1.0  # Value of the right answer in the right format.


@section
class FormatConfig(PayingConfig):
    """Pays for the format of reward.mode alone."""

    kind: Literal["format"] = "format"
    broken: float = 0.0  # Value of a completion that breaks the format.
    kept: float = 1.0  # Value of a completion that has it.


@section
class AnswerConfig(PayingConfig):
    """Pays for the right answer."""

    kind: Literal["answer"] = "answer"
    wrong: float = 0.0  # Value of any completion without the right answer.
    correct: float = 1.0  # Value of the right answer.
    # Where the format is broken, judge the text in <answer>, or the completion if it has no such tags.
    lenient: bool = False


@section
class FunctionConfig(PayingConfig):
    """Your own function, in training alone. A config runs the code that it names (rewards/user.py)."""

    kind: Literal["function"] = "function"
    fn: FunctionName  # The function, as package.module:function. It may be a coroutine function.
    deadline: Positive = 60.0  # Seconds that it may take for a batch.


@section
class LeakConfig(PenaltyConfig):
    """1 where the thought states the answer (arXiv 2509.15557)."""

    kind: Literal["leak"] = "leak"
    weight: Weight = 0.5  # Subtracted where it applies.


@section
class BeforeConfig(PenaltyConfig):
    """1 where over 15 words stand before <think> (arXiv 2509.15557)."""

    kind: Literal["before"] = "before"
    weight: Weight = 0.3  # Subtracted where it applies.


@section
class ProcessConfig(PayingConfig):
    """Which of the question's facts the thought names (rewards/facts.py); half where the answer is wrong."""

    kind: Literal["process"] = "process"
    weight: float = 0.5  # The value, 0 to 1, is multiplied by this. 0: only a metric.


@section
class ProbabilityConfig(PayingConfig):
    """How much more probable the thought makes the right answer (RLPR, arXiv 2506.18254)."""

    kind: Literal["probability"] = "probability"
    # The right answer as its letter, or in words: the option's text. Of open questions both are the value.
    of: Literal["text", "letter"] = "text"
    # One number from the answer's tokens. mean: of probabilities (RLPR); product: of probabilities (VeriFree,
    # with baseline false and format 0); geometric: the product's root; logmean: mean of log-probabilities.
    score: Literal["mean", "product", "geometric", "logmean"] = "mean"
    # Subtract the start policy's score of the answer without a thought; less than that pays 0.
    baseline: bool = True
    format: Share = 0.1  # Share of the value that the format of reward.mode earns alone.
    max_tokens: Count = 32  # Of longer answers, only the first tokens are scored.


@section
class ConsistencyConfig(PenaltyConfig):
    """1 where the policy itself, after its thought without the last sentence, prefers another letter."""

    kind: Literal["consistency"] = "consistency"


Component = Annotated[
    RuleConfig
    | FormatConfig
    | AnswerConfig
    | FunctionConfig
    | ProcessConfig
    | ProbabilityConfig
    | LeakConfig
    | BeforeConfig
    | ConsistencyConfig,
    Field(discriminator="kind"),
]


@section
class RewardConfig:
    """What a completion is paid: a sum of components, or Med-RLVR's rule if none is listed."""

    # strict: one thought and one answer; paper: the paper's lenient rule; direct: an answer, no thought.
    mode: Literal["strict", "paper", "direct"] = "strict"
    # What is paid: a sum of these, each times its weight. Short forms: `reward: [{kind: …}, …]`, and
    # `reward: NAME` for a preset. []: the settings below.
    components: tuple[Component, ...] = ()
    unformatted: float = -1.0  # Reward of a completion that breaks the format.
    wrong: float = 0.0  # Reward of a wrong answer in the right format. As `correct`: pays for format alone.
    correct: float = 1.0  # Reward of the right answer in the right format.
    # A control: pay `correct` with this probability and `wrong` otherwise, for any completion. null: off.
    random: Share | None = None
    leak_penalty: Weight = 0.0  # Subtracted if the thought states the answer. 0.5 in arXiv 2509.15557.
    before_penalty: Weight = 0.0  # Subtracted if over 15 words stand before <think>. 0.3 in arXiv 2509.15557.
    # Your own reward function for training, as package.module:function. A config runs the code that it names.
    fn: FunctionName | None = None
    deadline: Positive = 60.0  # Seconds that fn may take for a batch.


# Rewards of published systems, as `reward: NAME` takes them; docs/pages/explanation/reward.md says how well
# each is known.
PRESETS: dict[str, dict[str, Any]] = {
    "med_rlvr": {"components": [{"kind": "rule"}]},
    "composite": {"components": [{"kind": "rule"}, {"kind": "leak"}, {"kind": "before"}]},
    "ehrmind": {"components": [{"kind": "rule", "unformatted": -2.0, "wrong": 0.0, "correct": 1.1}]},
    "medvlthinker": {"components": [{"kind": "rule", "unformatted": 0.0, "wrong": 0.0, "correct": 1.0}]},
    "med_r1": {"components": [{"kind": "format"}, {"kind": "answer", "lenient": True}]},
    "medvlm_r1": {"components": [{"kind": "format"}, {"kind": "answer", "lenient": True}]},
}
