"""One run's settings: small frozen dataclasses, each field checked by its type; config/load.py reads and checks the whole."""

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


@section
class LoRAConfig:
    """Adapters of rank `rank` beside frozen weights (Hu et al. 2021, arXiv 2106.09685); they are added times alpha / rank."""

    rank: Count = 16  # the adapters' inner dimension
    alpha: Annotated[float, Field(gt=0)] = 32.0  # adapters are scaled by alpha / rank
    targets: tuple[Matrix, ...] = get_args(Matrix)  # matrices of each layer that get an adapter


@section
class ModelConfig:
    """The decoder: policy, reference and critic all start from it."""

    path: str  # "embedded", a Hugging Face directory, or a hub name
    init: Literal["pretrained", "random"] = "pretrained"  # random: only config.json and the tokenizer are read
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matrix products
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the stored weights; bfloat16 without lora: updated by stochastic rounding
    # What is stored for the backward pass. none: all activations; dots: results of matmuls; full: the layers' inputs alone.
    remat: Literal["none", "dots", "full"] = "full"
    # The attention of whole rows. auto: the splash kernel on TPU, unless learn.row_sizes packs rows; elsewhere XLA's.
    attention: Literal["auto", "xla"] = "auto"
    logit_slab: Count = 8192  # tokens whose logits are in memory at once while log-probs are computed
    # null: all weights are trained. Otherwise only float32 adapters; policy and critic share one frozen base.
    lora: LoRAConfig | None = None


@section
class PassCountConfig:
    """Questions chosen or ordered by how many of a model's samples were right (MedVLThinker, arXiv 2508.02669: 1 to 7 of 16), or by how
    that moved in an earlier run (1-shot RLVR, LIMR; see difficulty.py)."""

    file: str  # the output of `medrlvr difficulty`; for order variance or impact: of `medrlvr difficulty --history`
    keep: tuple[Size, Size] | None = None  # fewest and most right samples of a question that is used; null: all questions
    # The order of the questions in each pass; null: random. variance and impact: the largest first.
    order: Literal["easy_first", "hard_first", "variance", "impact"] | None = None
    top: Count | None = None  # use only this many questions, the first ones in `order`


@section
class SetConfig:
    """One set of questions: a file, a hub name, or `embedded:{train,in_distribution,out_of_distribution}`."""

    path: str  # a file (JSONL, JSON, CSV, parquet), a hub name, or embedded:NAME
    # auto: recognised from the first record; plain: your own questions; text: prompt and response, for medrlvr sft
    format: Literal["auto", "plain", "medqa", "mmlu_pro", "mmlu", "medmcqa", "pubmedqa", "text"] = "auto"
    subset: str | None = None  # the hub's configuration name
    split: str | None = None  # the hub's split; files have none
    limit: Count | None = None  # only the first N questions; null: all
    # true: a new order of the options in each epoch of training, and for each sample of an evaluation
    shuffle_options: bool = False
    pass_count: PassCountConfig | None = None  # choose or order questions by difficulty; null: all, in random order


@section
class PromptConfig:
    """How a question becomes prompt tokens."""

    # think: asks for a thought and an answer; direct: for the answer alone; none: question and options, no instruction
    template: Literal["think", "direct", "none"] = "think"
    chat: bool = False  # wrap in the tokenizer's chat template
    system: str | None = None  # with chat: the system turn; null: the template's default, if it has one
    # with chat: variables of the template, such as {enable_thinking: false}
    template_args: dict[str, Any] = Field(default_factory=dict)
    # The beginning of every response, such as "<answer>". It is given, not sampled, and is scored as part of the completion.
    prefill: str = ""
    max_tokens: Count = 512  # longer prompts are dropped and counted


@section
class SampleConfig:
    """A rollout: `questions` × `samples` responses of at most `max_new_tokens` tokens."""

    questions: Count = 128  # questions in a step
    samples: Count = 8  # responses to each question (the group of GRPO)
    max_new_tokens: Count = 512  # a response that reaches this length is cut off
    min_new_tokens: Size = 0  # a response cannot stop before this many tokens
    temperature: Weight = 1.0  # 0: greedy
    top_k: Size = 0  # draw from the k most probable tokens; 0: off
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # nucleus sampling; 1: off
    # gathered: each chip holds all layers, split over mesh.tensor. sharded: layers stay in training's shards and
    # are gathered at each token, which is many times slower; for weights that do not fit otherwise.
    layout: Literal["gathered", "sharded"] = "gathered"
    # int8: sample from matrices quantised by output channel; needs loss.sampler_cap
    weights: Literal["same", "int8"] = "same"


@section
class RewardConfig:
    """Med-RLVR's rule: format first, then the letter (rule.py)."""

    # strict: exactly one thought and one answer; paper: the lenient rule of the paper; direct: the answer alone, no thought
    mode: Literal["strict", "paper", "direct"] = "strict"
    unformatted: float = -1.0  # the reward of a completion that breaks the format
    wrong: float = 0.0  # of the right format with a wrong answer; as much as `correct`: a control that pays for format alone
    correct: float = 1.0  # of the right format and the right answer
    # A control: training pays `correct` with this probability, otherwise `wrong`, and ignores the completion.
    random: Share | None = None
    leak_penalty: Weight = 0.0  # subtracted where the thought states the answer; 0.5 in arXiv 2509.15557
    before_penalty: Weight = 0.0  # subtracted where more than 15 words stand before <think>; 0.3 there
    # Your own reward function, package.module:function, in place of the rule in training. A config runs the code that it names.
    fn: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    deadline: Annotated[float, Field(gt=0)] = 60.0  # seconds that fn may take for a batch


@section
class AdvantageConfig:
    """From rewards to one advantage per token."""

    # gae: PPO, needs learn.critic; group: GRPO; group_mean: Dr.GRPO; rloo: RLOO; reinforce_pp…: REINFORCE++
    estimator: Literal["gae", "group", "group_mean", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "gae"
    gamma: Share = 1.0  # discount γ
    lam: Share = 1.0  # λ of GAE
    whiten: bool = True  # gae and reinforce_pp…: scale advantages to zero mean, unit variance over the step's tokens
    std_ddof: Literal[0, 1] = 1  # group: std divides by G − this; 1 as verl, TRL and OpenRLHF; 0 as simply and EasyDeL
    std_eps: Weight = 1e-6  # group: added to std; 1e-6 as verl, 1e-4 as TRL, 1e-9 as OpenRLHF
    reward_clip: Annotated[float, Field(gt=0)] = 10.0  # rewards are clipped to ± this


@section
class KLConfig:
    """The KL penalty towards the reference model."""

    coef: Weight = 0.01  # β; 0: no reference model is loaded
    into: Literal["reward", "loss"] = "reward"  # subtracted from token rewards, or added to the loss
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1"  # with x = log π_ref − log π: −x, x²/2, eˣ − 1 − x, |x|
    target: Annotated[float, Field(gt=0)] | None = None  # adaptive coefficient (Ziegler et al. 2019); null: fixed
    horizon: Count = 10_000  # responses over which the adaptive coefficient moves


@section
class LossConfig:
    """The policy's surrogate and the critic's loss."""

    surrogate: Literal["clip", "cispo"] = "clip"  # clip: PPO's; cispo: arXiv 2506.13585
    ratio: Literal["token", "sequence"] = "token"  # of probabilities, by token or by response; sequence: GSPO
    clip_low: Weight = 0.2  # ε below: the ratio is clipped at 1 − this
    clip_high: Weight = 0.2  # ε above: the ratio is clipped at 1 + this
    ratio_cap: Annotated[float, Field(gt=1)] | None = None  # TRL's two-sided clip δ: also the unclipped ratio is capped here; null: not
    # Truncated importance sampling: a token's loss is multiplied by min(π_old / π_sampler, this); null: not.
    sampler_cap: Annotated[float, Field(gt=0)] | None = None
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # verl's lower bound for negative advantages, 3.0 there; null: none
    # From losses of tokens to one number; constant: Dr.GRPO's sum ÷ (responses × max_new_tokens).
    aggregate: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    entropy_coef: float = 0.0  # weight of the entropy bonus; positive favours entropy
    value_clip: Weight | None = 0.5  # the critic's value may move this far from its old one within a step; null: no limit


@section
class OptimConfig:
    """An optimiser with linear warm-up, then constant, linear or cosine; lr is AdamW's for all three (see `learn.make_optimizer`)."""

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"  # adafactor and muon need less memory
    lr: Weight  # the peak learning rate
    warmup: Share = 0.03  # the share of all optimiser steps in which lr rises linearly
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of lr after the warm-up
    b1: Share = 0.9  # decay of the first moment, and Muon's momentum; Adafactor has none
    b2: Share = 0.95  # decay of Adam's second moment
    eps: Annotated[float, Field(gt=0)] = 1e-8  # added to the root of the second moment
    weight_decay: Weight = 0.0  # decoupled; norms, biases and the value head do not decay
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # gradients are scaled down to this global norm
    moments: Literal["float32", "bfloat16"] = "float32"  # dtype of the first moment


@section
class LearnConfig:
    """How a rollout is learned from. Sizes count questions; each brings all its samples."""

    epochs: Count = 1  # passes over one rollout
    minibatch: Count = 16  # questions per optimiser step
    # Passes over responses are also compiled for these shares of samples × max_new_tokens, and each micro-batch takes the
    # smallest that holds its tokens. [0.25, 0.5] saves time where few responses use their budget; each adds compile time.
    row_sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    microbatch: Count | None = None  # questions per forward and backward pass; null: the whole minibatch
    policy: OptimConfig  # the policy's optimiser
    critic: OptimConfig | None = None  # the critic's optimiser; null: no critic (GRPO and its kin)
    critic_warmup: Size = 0  # number of first steps in which only the critic learns
    # true: the reference and idle optimiser states are kept in the host's pinned memory (no gain on a CPU)
    offload: bool = False


@section
class SFTConfig:
    """Supervised fine-tuning on `data`."""

    # answer: the key in the answer's form; rationale: a thought and the key; text: the response that each line brings
    target: Literal["answer", "rationale", "text"] = "answer"
    max_new_tokens: Count = 512  # longer targets are dropped and counted


@section
class EvalConfig:
    """Evaluation before, during and after training."""

    sets: dict[Name, SetConfig] = Field(default_factory=dict)  # name: set of questions
    every: Size = 0  # steps between evaluations; 0: only before and after training
    batch: Count = 32  # questions at a time
    samples: Count = 1  # answers to each question; above 1: also pass@k and maj@k
    temperature: Weight = 0.0  # 0: greedy
    max_new_tokens: Count | None = None  # null: sample.max_new_tokens


@section
class CheckpointConfig:
    """Checkpoints, written asynchronously by Orbax."""

    every: Size = 50  # steps between checkpoints; 0: only at the end
    keep: Count = 2  # how many of the newest stay on disk
    accept_changed_inputs: bool = False  # true: resume although data, model or reward.fn differ from those at the start
    # Also keep the checkpoint that is best by this metric (larger is better): eval.SET.accuracy, .format_rate or
    # .response_length, or a step's reward, accuracy, format_ok, response_length or entropy; null: none.
    best: str | None = None


@section
class LogConfig:
    """What a run writes besides metrics.jsonl."""

    samples_every: Size = 10  # steps between logged completions; 0: never
    samples: Count = 8  # completions logged each time
    # A run stops after this many steps in a row whose rewards teach nothing, since all are equal; 0: never.
    stop_constant: Size = 20
    profile: tuple[Count, Count] | None = None  # first and last step that jax.profiler traces into profile/
    tensorboard: bool = False  # true: also write TensorBoard events (pip install '.[tensorboard]')
    wandb: str | None = None  # the Weights & Biases project to log to; null: none


@section
class MeshConfig:
    """The number of devices along each axis of the mesh. The batch is split over slices × data × fsdp."""

    slices: Count = 1  # the slow outer axis: TPU slices, or nodes; it splits the batch, never the weights
    data: Annotated[int, Field(ge=-1)] = -1  # data parallel: copies of the weights; -1: all devices that are left
    fsdp: Count = 1  # weights, gradients and optimiser states are split over these devices
    tensor: Count = 1  # heads and hidden dimensions are split over these devices


@section
class Config:
    """What a config file holds: one run."""

    name: Name  # the run's name, and the name of its folder inside `runs`
    runs: str = "runs"  # the folder of all runs
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # the source of all randomness: batches, sampling, initialisation
    steps: Count | None = None  # the number of steps; give either steps or passes
    passes: Annotated[float, Field(gt=0)] | None = None  # passes over the questions (the paper's epochs)
    model: ModelConfig
    data: SetConfig  # the training questions
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
