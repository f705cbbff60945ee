"""The settings of the reward: its components, and presets named after the systems that published them.

A component is a section with a `kind`. The weighted value of a penalty is subtracted from the reward, that of
any other component is added. rewards/components.py computes the values.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from medrlvr_jax.config.section import Fraction, FunctionName, Name, section


@section
class AddedConfig:
    """A component whose weighted value is added to the reward."""

    weight: float = 1.0  # Weight of the value in the reward. 0: the component is only a metric.
    name: Name | None = None  # Name of the metric, reward/NAME. null: the kind, or the function's name.


@section
class PenaltyConfig:
    """A component whose weighted value, 0 or more, is subtracted from the reward."""

    weight: NonNegativeFloat = 1.0  # Weight of the value. 0: the component is only a metric.
    name: Name | None = None  # Name of the metric, reward/NAME. null: the kind.


@section
class RuleConfig(AddedConfig):
    """Med-RLVR's rule: it checks the format, then the answer (arXiv 2502.19655)."""

    kind: Literal["rule"] = "rule"
    unformatted: float = -1.0  # Value of a completion that breaks the format of reward.mode.
    wrong: float = 0.0  # Value of a wrong answer in the right format.
    correct: float = 1.0  # Value of the right answer in the right format.


@section
class FormatConfig(AddedConfig):
    """Rewards the format alone."""

    kind: Literal["format"] = "format"
    # mode: the format of reward.mode, with an answer of the question's kind; r1: the format of open-r1, where
    # the completion is <think>…</think> and <answer>…</answer> with any content.
    pattern: Literal["mode", "r1"] = "mode"
    broken: float = 0.0  # Value of a completion that breaks the format.
    kept: float = 1.0  # Value of a completion in the right format.


@section
class AnswerConfig(AddedConfig):
    """Rewards the right answer."""

    kind: Literal["answer"] = "answer"
    wrong: float = 0.0  # Value of any completion without the right answer.
    correct: float = 1.0  # Value of the right answer.
    # Which text is the answer. format: the answer in the format of reward.mode; r1: that in the format of
    # open-r1; tags: the text between the first <answer> and the next </answer>, in any format; text: as tags,
    # or the whole completion if it has no such tags.
    where: Literal["format", "r1", "tags", "text"] = "format"
    # Which answers are right. rule: as the component `rule`; letter: the letter alone; words: the letter, "B.
    # its text" or its text, ignoring case; mention: texts in which the letter is the only one from A to J,
    # ignoring case. Open questions are always graded by the rule.
    accept: Literal["rule", "letter", "words", "mention"] = "rule"
    among_text: float = 0.5  # accept mention: value of a right letter with other text around it.


@section
class FunctionConfig(AddedConfig):
    """Your own function, used in training only. Training by such a config runs the code that it names."""

    kind: Literal["function"] = "function"
    fn: FunctionName  # The function, as package.module:function. It may be a coroutine function.
    deadline: PositiveFloat = 60.0  # Seconds for a batch. Unfinished rows fail.
    concurrency: PositiveInt = 16  # Maximum number of open calls of a coroutine function.


@section
class VerifierConfig(AddedConfig):
    """A model that decides whether an answer means the same as the right one, used in training only.

    Answers that the rule finds right are worth 1. Wrong ones that are not sent to the model are worth 0.
    """

    kind: Literal["verifier"] = "verifier"
    # A Hugging Face directory or hub name; the weights are on the run's mesh. With url: the model's name on
    # the server.
    model: str
    # binary; general_reasoner: the prompt of TIGER-Lab/general-verifier; or a text with {answer} or
    # {response}, and optionally with {question}, {reference} and {thought}.
    prompt: str = "binary"
    chat: bool = False  # Wrap the prompt in the chat template of the verifier's tokenizer.
    # soft: the probability of Yes after one pass over the prompt; hard: 1 or 0 by a generated reply.
    score: Literal["soft", "hard"] = "soft"
    # The texts for Yes and No behind "Final Decision:". For soft, each must be one token of the verifier.
    verdicts: tuple[str, str] = (" Yes", " No")
    # Which answers are sent. undecided: texts that the rule finds wrong; wrong: all that it finds wrong;
    # always: all answers.
    when: Literal["undecided", "wrong", "always"] = "undecided"
    no_answer: float = -0.5  # Value of a completion without an answer in the format of reward.mode.
    # A right answer of n tokens is worth 1 − this · min(10, |n − tokens of the reference|). General-Reasoner
    # has 0.05.
    length_penalty: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    # Scale the values of a batch to mean 0 and variance 1. null: only with a soft score, if
    # advantage.estimator does not divide by a standard deviation itself.
    standardise: bool | None = None
    max_tokens: PositiveInt = 1024  # Maximum length of a prompt in tokens. Longer prompts are not sent.
    max_new_tokens: PositiveInt = 256  # hard: maximum length of a reply in tokens.
    batch: PositiveInt = 32  # Prompts in a batch, rounded up to a number that the mesh can split.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # Dtype of the weights and of matrix products.
    offload: bool = False  # Keep the weights in the host's pinned memory while the verifier is not used.
    # A server with OpenAI's interface, such as http://localhost:8000/v1. null: the model is on the mesh.
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    key: str | None = None  # With url: the environment variable with the API key. null: no key is sent.
    deadline: PositiveFloat = 300.0  # With url: seconds for a batch. Unfinished rows fail.
    retries: NonNegativeInt = 3  # With url: how often a failed request is sent again.
    concurrency: Annotated[int, Field(ge=1, le=256)] = 16  # With url: open requests.


@section
class LeakConfig(PenaltyConfig):
    """1 if the thought states the answer (arXiv 2509.15557)."""

    kind: Literal["leak"] = "leak"
    weight: NonNegativeFloat = 0.5  # Weight of the value. 0: the component is only a metric.


@section
class BeforeConfig(PenaltyConfig):
    """1 if more than 15 words stand before <think> (arXiv 2509.15557)."""

    kind: Literal["before"] = "before"
    weight: NonNegativeFloat = 0.3  # Weight of the value. 0: the component is only a metric.


@section
class ProcessConfig(AddedConfig):
    """Which of the question's facts the thought names; half of that if the answer is wrong."""

    kind: Literal["process"] = "process"
    weight: float = 0.5  # Weight of the value, which is 0 to 1. 0: the component is only a metric.
    # share: share of the question's facts that the thought names, less if it names over four times as many
    # facts; f1: F1 of named facts; radr: mean of RadRScore's completeness, factuality and effectiveness.
    measure: Literal["share", "f1", "radr"] = "share"
    negation: bool = False  # true: a denied fact ("no effusion") does not count as named.


@section
class ProbabilityConfig(AddedConfig):
    """How much more probable the thought makes the right answer (RLPR, arXiv 2506.18254)."""

    kind: Literal["probability"] = "probability"
    # letter: the right option's letter; text: its text. Open questions have their value for both.
    of: Literal["text", "letter"] = "text"
    # Score of the answer's tokens. mean: mean probability (RLPR); product: product of probabilities
    # (VeriFree, with baseline false and format 0); geometric: their geometric mean; logmean: mean
    # log-probability.
    score: Literal["mean", "product", "geometric", "logmean"] = "mean"
    # Subtract the start policy's score of the answer without a thought. Scores below it count as 0.
    baseline: bool = True
    format: Fraction = 0.1  # Share of the value that rewards the format of reward.mode alone.
    max_tokens: PositiveInt = 32  # Number of the answer's first tokens that are scored.


@section
class ConsistencyConfig(PenaltyConfig):
    """1 if the policy itself, after its thought without the last sentence, prefers another letter."""

    kind: Literal["consistency"] = "consistency"
    # all: every answer in the right format; right: right answers only. A guess is always consistent, so `all`
    # with a large weight teaches the policy to guess.
    of: Literal["all", "right"] = "all"


@section
class LooksConfig(AddedConfig):
    """How much more probable the images make the response than grey ones (after CAPO, arXiv 2506.12849)."""

    kind: Literal["looks"] = "looks"
    weight: float = 0.5  # Weight of the value. 0: the component is only a metric.
    clip: PositiveFloat = 1.0  # The value, in nats per token, is clipped to ± this number.


@section
class OverlongConfig(PenaltyConfig):
    """Rises from 0 to 1 over the last `buffer` tokens before the limit (DAPO, arXiv 2503.14476)."""

    kind: Literal["overlong"] = "overlong"
    # Tokens before sample.max_new_tokens where the penalty begins. DAPO: 4,096 of 20,480.
    buffer: PositiveInt


@section
class LengthConfig(PenaltyConfig):
    """The distance of a response's length from a budget, times `per_token` (L1-Exact, arXiv 2503.04697)."""

    kind: Literal["length"] = "length"
    budget: PositiveInt  # Tokens that a response should have.
    per_token: PositiveFloat = 0.0003  # Value of each token of difference. L1: 0.0003.
    shorter: bool = True  # true: penalise shorter responses too, as in L1-Exact. false: only longer ones.


@section
class RepetitionConfig(PenaltyConfig):
    """1 if the same words in a row occur many times (RLPR, arXiv 2506.18254)."""

    kind: Literal["repetition"] = "repetition"
    words: PositiveInt = 10  # Number of words in a row.
    times: Annotated[int, Field(ge=2)] = 10  # Occurrences from which the value is 1. They may overlap.


Component = Annotated[
    RuleConfig
    | FormatConfig
    | AnswerConfig
    | FunctionConfig
    | VerifierConfig
    | ProcessConfig
    | ProbabilityConfig
    | LeakConfig
    | BeforeConfig
    | OverlongConfig
    | LengthConfig
    | RepetitionConfig
    | ConsistencyConfig
    | LooksConfig,
    Field(discriminator="kind"),
]


@section
class RewardConfig:
    """The reward of a completion: a weighted sum of components, or Med-RLVR's rule if none is listed."""

    # Format. strict: one thought and one answer; paper: the paper's lenient format; direct: one answer alone.
    mode: Literal["strict", "paper", "direct"] = "strict"
    # The components. Short forms: `reward: [{kind: …}, …]`, and `reward: NAME` for a preset. []: the reward
    # follows from the settings below.
    components: tuple[Component, ...] = ()
    unformatted: float = -1.0  # Reward of a completion that breaks the format.
    wrong: float = 0.0  # Reward of a wrong answer in the right format. If equal to correct: a format reward.
    correct: float = 1.0  # Reward of the right answer in the right format.
    # Control: the reward is `correct` with this probability, else `wrong`, for any completion. null: off.
    random: Fraction | None = None
    # Subtracted if the thought states the answer. arXiv 2509.15557: 0.5.
    leak_penalty: NonNegativeFloat = 0.0
    # Subtracted if more than 15 words stand before <think>. arXiv 2509.15557: 0.3.
    before_penalty: NonNegativeFloat = 0.0
    # Your own function, used in training only, as package.module:function. Training by such a config runs the
    # code that it names.
    fn: FunctionName | None = None
    deadline: PositiveFloat = 60.0  # Seconds for a batch of fn. Unfinished rows fail.


# Rewards of published systems for `reward: NAME`. docs/pages/explanation/reward.md says how well each is
# known.
PRESETS: dict[str, dict[str, Any]] = {
    "med_rlvr": {"components": [{"kind": "rule"}]},
    "composite": {"components": [{"kind": "rule"}, {"kind": "leak"}, {"kind": "before"}]},
    "ehrmind": {"components": [{"kind": "rule", "unformatted": -2.0, "wrong": 0.0, "correct": 1.1}]},
    "medvlthinker": {"components": [{"kind": "answer", "where": "r1", "accept": "words"}]},
    "med_r1": {
        "components": [
            {"kind": "format", "pattern": "r1"},
            {"kind": "answer", "where": "text", "accept": "letter"},
        ]
    },
    "medvlm_r1": {
        "components": [
            {"kind": "format", "pattern": "r1"},
            {"kind": "answer", "where": "tags", "accept": "mention"},
        ]
    },
}
