"""The settings of the reward: its components, and presets named after the systems that published them.

A component is a section with a `kind`. It pays, or it is a penalty: its value is subtracted, and its `weight`
cannot be negative. rewards/components.py computes the values.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from medrlvr_jax.config.section import Fraction, FunctionName, Name, section


@section
class PayingConfig:
    """A component whose value, times its weight, is added to the reward."""

    weight: float = 1.0  # The component's value is multiplied by this. 0: only a metric.
    name: Name | None = None  # Name of its metric, reward/NAME. null: the kind, or the function's name.


@section
class PenaltyConfig:
    """A component whose value, 0 or more, times its weight, is subtracted from the reward."""

    weight: NonNegativeFloat = 1.0  # The penalty is this times the component's value. 0: only a metric.
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
    """Pays for the format alone."""

    kind: Literal["format"] = "format"
    # mode: the format of reward.mode, with an answer of the question's kind; r1: open-r1's pattern, the whole
    # completion is <think>…</think> and <answer>…</answer>, whatever they hold.
    pattern: Literal["mode", "r1"] = "mode"
    broken: float = 0.0  # Value of a completion that breaks the format.
    kept: float = 1.0  # Value of a completion that has it.


@section
class AnswerConfig(PayingConfig):
    """Pays for the right answer."""

    kind: Literal["answer"] = "answer"
    wrong: float = 0.0  # Value of any completion without the right answer.
    correct: float = 1.0  # Value of the right answer.
    # Where the answer stands. format: in the format of reward.mode; r1: in that of open-r1 (see `format`);
    # tags: between the first <answer> and the next </answer>, whatever surrounds them; text: there or, if
    # there are no such tags, the whole completion.
    where: Literal["format", "r1", "tags", "text"] = "format"
    # What is right. rule: what `rule` accepts; letter: the letter alone; words: also "B. its text" or its
    # text, ignoring case; mention: the only letter from A to J in it, ignoring case. Open questions: rule.
    accept: Literal["rule", "letter", "words", "mention"] = "rule"
    among_text: float = 0.5  # accept mention: value if other text stands around the letter.


@section
class FunctionConfig(PayingConfig):
    """Your own function, in training alone. A config runs the code that it names (rewards/user.py)."""

    kind: Literal["function"] = "function"
    fn: FunctionName  # The function, as package.module:function. It may be a coroutine function.
    deadline: PositiveFloat = 60.0  # Seconds that it may take for a batch.
    concurrency: PositiveInt = 16  # Calls of a coroutine function that wait at a time.


@section
class VerifierConfig(PayingConfig):
    """A model that says whether the answer means what the right answer means, where the rule cannot tell: in
    training alone. The rule's right answers are 1, answers that are wrong or not asked about are 0."""

    kind: Literal["verifier"] = "verifier"
    # A Hugging Face directory or hub name, whose weights are then on the run's mesh; with url, the name that
    # the server gives it.
    model: str
    # binary; general_reasoner, the wording of TIGER-Lab/general-verifier; or a text with {answer}, and with
    # {question}, {reference}, {thought} and {response} where they are wanted.
    prompt: str = "binary"
    chat: bool = False  # Wrap the prompt in the chat template of the verifier's tokenizer.
    # soft: the probability of Yes, in one pass over the prompt; hard: 1 or 0 by a reply that is written out.
    score: Literal["soft", "hard"] = "soft"
    # What says Yes and No behind "Final Decision:". For soft, each is one token of the verifier.
    verdicts: tuple[str, str] = (" Yes", " No")
    # undecided: asked where the rule finds a text wrong; wrong: where it finds any answer wrong; always: of
    # each completion that has an answer.
    when: Literal["undecided", "wrong", "always"] = "undecided"
    no_answer: float = -0.5  # Value of a completion without an answer in the format of reward.mode.
    # A right answer of n tokens is worth 1 − this · min(10, |n − the reference's|). General-Reasoner: 0.05.
    length_penalty: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    # Subtract the batch's mean and divide by its spread. null: where the score is soft, and
    # advantage.estimator does not itself divide by a spread.
    standardise: bool | None = None
    max_tokens: PositiveInt = 1024  # Longer prompts are not asked about: the answer stays wrong.
    max_new_tokens: PositiveInt = 256  # Tokens of a hard verifier's reply at most.
    batch: PositiveInt = 32  # Prompts at a time, rounded up to what the mesh can split.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # Dtype of the weights and of products.
    offload: bool = False  # Keep the weights in the host's pinned memory while they are not used.
    # A server with OpenAI's interface, such as http://localhost:8000/v1. null: the model is on the mesh.
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    key: str | None = None  # With url: the environment variable that holds the API key. null: no key.
    deadline: PositiveFloat = 300.0  # With url: seconds for a batch, after which its other rows fail.
    retries: NonNegativeInt = 3  # With url: requests after a first one that fails.
    concurrency: Annotated[int, Field(ge=1, le=256)] = 16  # With url: requests at a time.


@section
class LeakConfig(PenaltyConfig):
    """1 where the thought states the answer (arXiv 2509.15557)."""

    kind: Literal["leak"] = "leak"
    weight: NonNegativeFloat = 0.5  # Subtracted where it applies.


@section
class BeforeConfig(PenaltyConfig):
    """1 where over 15 words stand before <think> (arXiv 2509.15557)."""

    kind: Literal["before"] = "before"
    weight: NonNegativeFloat = 0.3  # Subtracted where it applies.


@section
class ProcessConfig(PayingConfig):
    """Which of the question's facts the thought names (rewards/facts.py); half where the answer is wrong."""

    kind: Literal["process"] = "process"
    weight: float = 0.5  # The value, 0 to 1, is multiplied by this. 0: only a metric.
    # share: of the question's facts, less where the thought names over four times as many; f1: of those facts
    # against all that the thought names; radr: mean of RadRScore's completeness, factuality, effectiveness.
    measure: Literal["share", "f1", "radr"] = "share"
    negation: bool = False  # A fact that is denied ("no effusion") is not named. false: the words suffice.


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
    format: Fraction = 0.1  # Share of the value that the format of reward.mode earns alone.
    max_tokens: PositiveInt = 32  # Of longer answers, only the first tokens are scored.


@section
class ConsistencyConfig(PenaltyConfig):
    """1 where the policy itself, after its thought without the last sentence, prefers another letter."""

    kind: Literal["consistency"] = "consistency"
    # all: of every answer in the right format; right: of right answers alone. A guess is always consistent,
    # so `all` with a large weight teaches to guess.
    of: Literal["all", "right"] = "all"


@section
class LooksConfig(PayingConfig):
    """How much more probable the images make the response than grey images do, in nats a token (after CAPO,
    arXiv 2506.12849)."""

    kind: Literal["looks"] = "looks"
    weight: float = 0.5  # The value is multiplied by this. 0: only a metric.
    clip: PositiveFloat = 1.0  # The value is clipped to ± this.


@section
class OverlongConfig(PenaltyConfig):
    """0 up to `buffer` tokens before the limit, then linear to 1 at the limit (DAPO, arXiv 2503.14476)."""

    kind: Literal["overlong"] = "overlong"
    # Tokens before sample.max_new_tokens at which the penalty begins. 4,096 of 20,480 in DAPO.
    buffer: PositiveInt


@section
class LengthConfig(PenaltyConfig):
    """Tokens by which a response misses a budget, times `per_token` (L1-Exact, arXiv 2503.04697)."""

    kind: Literal["length"] = "length"
    budget: PositiveInt  # Tokens that a response should have.
    per_token: PositiveFloat = 0.0003  # Value of each token of the difference. 0.0003 in L1.
    shorter: bool = True  # Shorter responses are penalised too, as in L1-Exact. false: only longer ones.


@section
class RepetitionConfig(PenaltyConfig):
    """1 where some run of words occurs again and again (RLPR, arXiv 2506.18254)."""

    kind: Literal["repetition"] = "repetition"
    words: PositiveInt = 10  # Words in a run.
    times: Annotated[int, Field(ge=2)] = 10  # Occurrences from which it is penalised; they may overlap.


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
    random: Fraction | None = None
    # Subtracted if the thought states the answer. 0.5 in arXiv 2509.15557.
    leak_penalty: NonNegativeFloat = 0.0
    # Subtracted if over 15 words stand before <think>. 0.3 in arXiv 2509.15557.
    before_penalty: NonNegativeFloat = 0.0
    # Your own reward function for training, as package.module:function. A config runs the code that it names.
    fn: FunctionName | None = None
    deadline: PositiveFloat = 60.0  # Seconds that fn may take for a batch.


# Rewards of published systems, as `reward: NAME` takes them; docs/pages/explanation/reward.md says how well
# each is known.
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
