"""One run's settings: small frozen dataclasses, each field checked by its type; configs.py reads and checks the whole."""

from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def section(cls: type[T]) -> type[T]:
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)  # pyright: ignore[reportReturnType]


Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
]  # of a file or folder, so that it cannot leave its own
Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]  # of a layer


COMPARING = ("group", "group_mean", "rloo", "reinforce_pp_baseline")  # estimators that hold samples of one question against each other


# Metrics that checkpoint.best may name, as eval.<set>.<share> or, of a training step, alone: those of which more can be better.
EVAL_SHARES = ("accuracy", "format_rate", "response_length")
STEP_SHARES = ("reward", "accuracy", "format_ok", "response_length", "entropy")


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the field, the value and the remedy."""


class Diverged(RuntimeError):
    """A run that cannot go on: its updates are not finite, or its rewards teach nothing."""


class Unwritable(RuntimeError):
    """A run's folder on a disk that is full, read-only or gone."""


@section
class LoRAConfig:
    """Adapters of rank `rank` beside frozen weights (Hu et al. 2021, arXiv 2106.09685); they are added times alpha / rank."""

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: tuple[Matrix, ...] = get_args(Matrix)


@section
class ModelConfig:
    """The decoder: policy, reference and critic all start from it."""

    path: str  # "embedded", a Hugging Face directory, or a hub name
    init: Literal["pretrained", "random"] = "pretrained"  # random: only config.json and the tokenizer are read
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the arithmetic
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the master weights
    remat: Literal["none", "dots", "full"] = "full"  # what the backward pass keeps: all, matmul results, layer inputs
    attention: Literal["auto", "xla"] = "auto"  # of whole rows; auto: on TPU its splash kernel, unless learn.row_sizes packs; else XLA's
    logit_slab: Count = 8192  # tokens whose logits are alive at once while log-probs are taken
    lora: LoRAConfig | None = None  # null: all weights are trained; else adapters alone, in float32, policy's and critic's on one base


@section
class PassCountConfig:
    """Questions chosen or ordered by how many of a model's samples were right (MedVLThinker, arXiv 2508.02669: 1 to 7 of 16), or by how
    that moved in an earlier run (1-shot RLVR, LIMR; see difficulty.py)."""

    file: str  # what `medrlvr difficulty` wrote; by variance or impact: with --history
    keep: tuple[Size, Size] | None = None  # the least and the most right samples of a question that is taken; null: all
    order: Literal["easy_first", "hard_first", "variance", "impact"] | None = None  # each pass goes so; null: at random, as ever
    top: Count | None = None  # only so many, the first in that order


@section
class SetConfig:
    """One set of questions: a file, a hub name, or `embedded:{train,in_distribution,out_of_distribution}`."""

    path: str
    format: Literal["auto", "plain", "medqa", "mmlu_pro", "mmlu", "medmcqa", "pubmedqa", "text"] = "auto"
    subset: str | None = None  # the hub's configuration name
    split: str | None = None  # the hub's split; files have none
    limit: Count | None = None  # the first so many questions
    shuffle_options: bool = False  # another order of the options in each epoch of training, and for each sample of an evaluation
    pass_count: PassCountConfig | None = None  # null: all questions


@section
class PromptConfig:
    """How a question becomes prompt tokens."""

    template: Literal["think", "direct", "none"] = "think"  # none: the question and options alone
    chat: bool = False  # wrap in the tokenizer's chat template
    system: str | None = None  # with chat: the system turn; null: the template's own, if it has one
    template_args: dict[str, Any] = Field(default_factory=dict)  # with chat: the template's variables, such as {enable_thinking: false}
    prefill: str = ""  # how every response begins, such as "<answer>": given, not sampled, and judged as part of the completion
    max_tokens: Count = 512  # longer prompts are dropped and counted


@section
class SampleConfig:
    """A rollout: `questions` × `samples` responses of at most `max_new_tokens` tokens."""

    questions: Count = 128
    samples: Count = 8
    max_new_tokens: Count = 512
    min_new_tokens: Size = 0
    temperature: Weight = 1.0  # 0: greedy
    top_k: Size = 0  # 0: off
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # sharded: for weights that do not fit along mesh.tensor; each layer is then gathered at each token, which is many times slower.
    layout: Literal["gathered", "sharded"] = "gathered"
    weights: Literal["same", "int8"] = "same"  # int8: the layers' matrices by output channel; needs loss.sampler_cap


@section
class RewardConfig:
    """Med-RLVR's rule: format first, then the letter (rewards.py)."""

    mode: Literal["strict", "paper", "direct"] = "strict"  # direct: the answer alone, no thought
    unformatted: float = -1.0
    wrong: float = 0.0  # a control: as much as `correct`, so that the format alone is paid
    correct: float = 1.0
    random: Share | None = None  # a control: training pays `correct` with this chance, else `wrong`, whatever a completion says
    leak_penalty: Weight = 0.0  # taken off where the thought states the answer; arXiv 2509.15557 has 0.5
    before_penalty: Weight = 0.0  # taken off where more than 15 words stand before <think>; 0.3 there
    # Your own instead of these three numbers, package.module:function; user_reward.py says how it is called. A config runs what it names.
    fn: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    deadline: Annotated[float, Field(gt=0)] = 60.0  # seconds that fn may take over a batch


@section
class AdvantageConfig:
    """From rewards to one advantage per token."""

    estimator: Literal["gae", "group", "group_mean", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "gae"
    gamma: Share = 1.0
    lam: Share = 1.0
    whiten: bool = True  # gae and reinforce_pp…: zero mean, unit variance over the step's tokens
    std_ddof: Literal[0, 1] = 1  # group: 1 as verl, TRL and OpenRLHF; 0 as simply and EasyDeL
    std_eps: Weight = 1e-6  # group: 1e-6 as verl, 1e-4 as TRL, 1e-9 as OpenRLHF
    reward_clip: Annotated[float, Field(gt=0)] = 10.0  # rewards are clipped to ± this


@section
class KLConfig:
    """The leash to the reference model; coef 0 means there is no reference at all."""

    coef: Weight = 0.01
    into: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    target: Annotated[float, Field(gt=0)] | None = None  # adaptive coefficient (Ziegler et al. 2019); null: fixed
    horizon: Count = 10_000  # samples over which the adaptive coefficient moves


@section
class LossConfig:
    """The policy's surrogate and the critic's loss."""

    surrogate: Literal["clip", "cispo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"  # sequence: GSPO
    clip_low: Weight = 0.2
    clip_high: Weight = 0.2
    ratio_cap: Annotated[float, Field(gt=1)] | None = None  # TRL's two-sided clip δ: the unclipped ratio is cut here
    sampler_cap: Annotated[float, Field(gt=0)] | None = None  # truncated importance sampling: tokens weigh min(π_old / π_sampler, this)
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # verl's lower bound for negative advantages, 3.0 there
    aggregate: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"  # constant: Dr.GRPO, by max_new_tokens
    entropy_coef: float = 0.0  # positive rewards entropy
    value_clip: Weight | None = 0.5


@section
class OptimConfig:
    """An optimiser with linear warm-up, then constant, linear or cosine; lr is AdamW's for all three (see `learn.make_optimizer`)."""

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    lr: Weight
    warmup: Share = 0.03  # of all optimiser steps
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    b1: Share = 0.9  # of the first moment, and Muon's momentum; Adafactor has none
    b2: Share = 0.95  # of Adam's second moment
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Weight = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"  # of the first moment


@section
class LearnConfig:
    """How a rollout is learned from. Sizes count questions; each brings all its samples."""

    epochs: Count = 1  # passes over one rollout
    minibatch: Count = 16  # questions per optimiser step
    # Shares of samples × max_new_tokens for which passes over the responses are compiled, beside the whole. Padding beyond the least that
    # holds a micro-batch is not computed. [0.25, 0.5] where few responses use their budget; each adds to what compiling takes.
    row_sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    microbatch: Count | None = None  # questions per forward and backward pass; null: the whole minibatch
    policy: OptimConfig
    critic: OptimConfig | None = None  # null: no critic (GRPO and its kin)
    critic_warmup: Size = 0  # first steps in which only the critic learns
    offload: bool = False  # reference and idle optimiser states wait in the host's pinned memory (on a CPU: no gain)


@section
class SFTConfig:
    """Supervised fine-tuning on `data`; `text` lines bring prompt and response themselves."""

    target: Literal["answer", "rationale", "text"] = "answer"
    max_new_tokens: Count = 512  # longer targets are dropped and counted


@section
class EvalConfig:
    """Evaluation before, during and after training."""

    sets: dict[Name, SetConfig] = Field(default_factory=dict)
    every: Size = 0  # steps; 0: only before and after
    batch: Count = 32  # questions at a time
    samples: Count = 1
    temperature: Weight = 0.0
    max_new_tokens: Count | None = None  # null: the rollout's


@section
class CheckpointConfig:
    """Orbax, asynchronous: the newest `keep`, and the best by `best` if named."""

    every: Size = 50  # steps; 0: only at the end
    keep: Count = 2
    accept_changed_inputs: bool = False  # go on although data, model or reward.fn are not those that the run was begun with
    best: str | None = None  # a metric, larger is better, such as eval.dev.accuracy: EVAL_SHARES of eval.sets, or STEP_SHARES


@section
class LogConfig:
    """What a run writes besides metrics.jsonl."""

    samples_every: Size = 10  # steps between samples; 0: never
    samples: Count = 8  # completions each time
    stop_constant: Size = 20  # steps in a row from whose rewards nothing is learned, after which a run stops; 0: never
    profile: tuple[Count, Count] | None = None  # first and last step that jax.profiler traces into profile/
    tensorboard: bool = False
    wandb: str | None = None  # the project's name


@section
class MeshConfig:
    """Devices along each axis; data -1 takes what is left."""

    slices: Count = 1  # the slow outer axis: TPU slices, or nodes; it splits the batch, never the weights
    data: Annotated[int, Field(ge=-1)] = -1
    fsdp: Count = 1
    tensor: Count = 1


@section
class Config:
    """A run."""

    name: Name
    runs: str = "runs"  # the folder of all runs
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    steps: Count | None = None  # either steps …
    passes: Annotated[float, Field(gt=0)] | None = None  # … or passes over the questions (the paper's epochs)
    model: ModelConfig
    data: SetConfig
    prompt: PromptConfig = PromptConfig()
    sample: SampleConfig = SampleConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()
    loss: LossConfig = LossConfig()
    learn: LearnConfig
    sft: SFTConfig = SFTConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
