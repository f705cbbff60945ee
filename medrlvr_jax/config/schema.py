"""The settings of a run, as frozen dataclasses.

Types check single fields; check.py checks combinations. The comment beside or above a field is its
documentation: `--help` and the reference page show it. The sections of data and reward are
in data.py and reward.py.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from medrlvr_jax.config.data import PromptConfig, SetConfig
from medrlvr_jax.config.reward import RewardConfig
from medrlvr_jax.config.section import Fraction, Name, section

Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]  # the matrices of a layer that can have an adapter

# Estimators that compare the samples of one question with each other.
GROUP_ESTIMATORS = ("group", "group_mean", "gdpo", "rloo", "reinforce_pp_baseline")

# checkpoint.best may name eval.SET.METRIC with the first list, or a metric of the training steps.
EVAL_METRICS = ("accuracy", "format_rate", "response_length")
STEP_METRICS = ("reward", "accuracy", "format_ok", "response_length", "entropy")


@section
class LoRAConfig:
    """Low-rank adapters on frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

    rank: PositiveInt = 16  # Inner dimension of the adapters.
    alpha: PositiveFloat = 32.0  # The adapters' output is multiplied by alpha / rank.
    targets: tuple[Matrix, ...] = get_args(Matrix)  # The matrices of each layer that get an adapter.


@section
class ModelConfig:
    """The model that policy, reference and critic start from."""

    path: str  # A Hugging Face directory, a hub name, or "embedded": the small model inside the package.
    # random: initialise the weights; only config.json and the tokenizer are read.
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16"] = "float32"  # Dtype of activations and matrix products.
    # Dtype of the stored weights. Without lora, updates of bfloat16 weights are rounded stochastically.
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # What is stored for the backward pass; the rest is recomputed. none: all activations; dots: the results
    # of matrix products; full: only each layer's input.
    remat: Literal["none", "dots", "full"] = "full"
    # Attention in training. auto: the splash kernel on TPU, except with learn.row_sizes; elsewhere XLA's.
    attention: Literal["auto", "xla"] = "auto"
    # Number of tokens whose logits are in memory at the same time while log-probs are computed.
    logit_slab: PositiveInt = 8192
    # null: train all weights. Otherwise: train float32 adapters; policy and critic share the frozen weights.
    lora: LoRAConfig | None = None
    # The part of a vision tower that is trained together with the decoder. merger: its last part, which turns
    # patches into image tokens; train: all of it. With train, every training pass computes the tower again.
    vision: Literal["freeze", "merger", "train"] = "freeze"


@section
class SampleConfig:
    """A rollout: `questions` × `samples` responses of at most `max_new_tokens` tokens."""

    questions: PositiveInt = 128  # Questions per step.
    samples: PositiveInt = 8  # Responses to each question: the group size of GRPO.
    # Dynamic sampling (DAPO, arXiv 2503.14476): a step draws further batches to replace the questions that
    # advantage.drop_equal_groups leaves out, at most this many batches in all; `passes` counts one of them.
    # 1: off.
    max_batches: PositiveInt = 1
    max_new_tokens: PositiveInt = 512  # Maximum length of a response in tokens. Longer responses are cut off.
    min_new_tokens: NonNegativeInt = 0  # Minimum length of a response in tokens.
    temperature: NonNegativeFloat = 1.0  # Sampling temperature. Training needs a temperature above 0.
    top_k: NonNegativeInt = 0  # Sample only from the k most probable tokens. 0: off.
    # Nucleus sampling: sample only from the most probable tokens that together have this probability. 1: off.
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Where the weights are during sampling. gathered: each device holds all layers, split over mesh.tensor;
    # sharded: as in training, and each token gathers them again. sharded needs less memory but is many times
    # slower.
    layout: Literal["gathered", "sharded"] = "gathered"
    # int8: sample with matrices quantised per output channel. This needs loss.sampler_cap.
    weights: Literal["same", "int8"] = "same"


@section
class SpreadConfig:
    """Do not train on questions whose samples have nearly the same reward (RLPR, arXiv 2506.18254)."""

    # Minimum standard deviation of the rewards of a question's samples, as a multiple of its running mean
    # over the earlier steps.
    beta: NonNegativeFloat = 0.5
    ema: Fraction = 0.99  # Decay of the running mean per step.
    # First step that leaves questions out. The running mean starts as the mean of the five steps before it.
    start: Annotated[int, Field(ge=2)] = 11


@section
class AdvantageConfig:
    """How rewards become one advantage per token."""

    # gae: PPO, needs learn.critic; group: GRPO; group_mean: Dr.GRPO; gdpo: GRPO on each reward component
    # separately (arXiv 2601.05242); rloo: RLOO; reinforce_pp, reinforce_pp_baseline: REINFORCE++.
    estimator: Literal[
        "gae", "group", "group_mean", "gdpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"
    ] = "gae"
    gamma: Fraction = 1.0  # Discount γ.
    lam: Fraction = 1.0  # λ of GAE.
    # gae, gdpo, reinforce_pp, reinforce_pp_baseline: scale the advantages of a step to mean 0 and variance 1.
    whiten: bool = True
    # group, gdpo: the standard deviation of G samples divides by G − std_ddof. 1: as verl, TRL and OpenRLHF;
    # 0: as simply and EasyDeL.
    std_ddof: Literal[0, 1] = 1
    # group, gdpo: added to the standard deviation. 1e-6 in verl, 1e-4 in TRL, 1e-9 in OpenRLHF.
    std_eps: NonNegativeFloat = 1e-6
    # Rewards are clipped to ± this value. With gdpo only the metrics are clipped.
    reward_clip: PositiveFloat = 10.0
    # Do not train on questions whose samples all have the same reward before penalties (DAPO, arXiv
    # 2503.14476).
    drop_equal_groups: bool = False
    # Do not train on questions whose samples have nearly the same reward. null: off.
    spread: SpreadConfig | None = None


@section
class KLConfig:
    """The penalty on the KL divergence of the policy from the reference model."""

    coef: NonNegativeFloat = 0.01  # Coefficient β. 0: no reference model is loaded.
    # reward: subtract the penalty from each token's reward; loss: add it to the loss.
    into: Literal["reward", "loss"] = "reward"
    # Estimator of a token's KL divergence, with x = log π_ref − log π. k1: −x; k2: x²/2; k3: eˣ − 1 − x; abs:
    # |x|.
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    # Adapt the coefficient to reach this KL divergence per response (Ziegler et al. 2019). null: keep it
    # fixed.
    target: PositiveFloat | None = None
    # Horizon of the adaptive coefficient, in responses. Larger: slower changes.
    horizon: PositiveInt = 10_000


@section
class LossConfig:
    """The surrogate objective of the policy and the loss of the critic."""

    # clip: PPO's clipped surrogate; cispo: clipped importance weights (arXiv 2506.13585).
    surrogate: Literal["clip", "cispo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"  # Probability ratio per token, or per response (GSPO).
    clip_low: NonNegativeFloat = 0.2  # Lower ε: the ratio is clipped at 1 − clip_low.
    clip_high: NonNegativeFloat = 0.2  # Upper ε: the ratio is clipped at 1 + clip_high.
    # Upper limit of the ratio in the unclipped term, TRL's delta. null: no limit.
    ratio_cap: Annotated[float, Field(gt=1)] | None = None
    # Truncated importance sampling: multiply a token's loss by min(π_old / π_sampler, sampler_cap). null:
    # off.
    sampler_cap: PositiveFloat | None = None
    # Dual-clip PPO: the bound for tokens with negative advantage. verl has 3.0. null: off.
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    # How token losses become one loss. token_mean: mean over all tokens; sequence_mean: mean of the
    # responses' means; constant: sum ÷ (responses × max_new_tokens), as in Dr.GRPO.
    aggregate: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    # Do not train on responses that max_new_tokens cut off (DAPO). They still count in means over samples.
    mask_truncated: bool = False
    entropy_coef: float = 0.0  # Coefficient of the entropy bonus. A positive value raises the entropy.
    # PPO's value clipping: the largest change of a value prediction within a step. null: no limit.
    value_clip: NonNegativeFloat | None = 0.5


@section
class OptimConfig:
    """An optimiser with linear warm-up. All three kinds have learning rates on AdamW's scale."""

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"  # adafactor and muon need less memory than adamw.
    lr: NonNegativeFloat  # Peak learning rate.
    warmup: Fraction = 0.03  # Fraction of all optimiser steps during which the learning rate rises linearly.
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # Learning rate after the warm-up.
    b1: Fraction = 0.9  # adamw: decay of the first moment; muon: momentum; adafactor has no momentum.
    b2: Fraction = 0.95  # Decay of Adam's second moment.
    eps: PositiveFloat = 1e-8  # Added to the root of the second moment.
    # Decoupled weight decay. Norms, biases and the value head do not decay.
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0  # Maximum global norm of the gradient. Larger gradients are scaled down.
    moments: Literal["float32", "bfloat16"] = "float32"  # Dtype of the first moment.


@section
class LearnConfig:
    """The update on a rollout. Sizes are numbers of questions, each with all its samples."""

    epochs: PositiveInt = 1  # Number of passes over each rollout.
    minibatch: PositiveInt = 16  # Questions per optimiser step.
    # Pack short responses: also compile the training pass for these fractions of samples × max_new_tokens.
    # Each micro-batch uses the smallest size that holds its tokens. [0.25, 0.5] saves time if responses are
    # short, and costs compile time.
    row_sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    # Questions per forward and backward pass. null: the whole minibatch.
    microbatch: PositiveInt | None = None
    policy: OptimConfig  # Optimiser of the policy.
    critic: OptimConfig | None = None  # Optimiser of the critic. null: there is no critic, as in GRPO.
    critic_warmup: NonNegativeInt = 0  # Number of first steps that train only the critic.
    # Keep the reference model and inactive optimiser states in pinned host memory. This saves nothing on CPU.
    offload: bool = False


@section
class SFTConfig:
    """Supervised fine-tuning on `data`."""

    # What the model learns to produce. answer: the right answer; rationale: the reasoning in the data and the
    # right answer; text: the field response of each record.
    target: Literal["answer", "rationale", "text"] = "answer"
    max_new_tokens: PositiveInt = 512  # Maximum length of a target. Longer targets are dropped and counted.


@section
class EvalConfig:
    """Evaluation before, during and after training."""

    sets: dict[Name, SetConfig] = Field(default_factory=dict)  # The sets to evaluate on: {NAME: {path: …}}.
    every: NonNegativeInt = 0  # Steps between evaluations. 0: evaluate only before and after training.
    batch: PositiveInt = 32  # Questions that are answered at the same time.
    samples: PositiveInt = 1  # Answers to each question. More than 1: also compute pass@k and maj@k.
    temperature: NonNegativeFloat = 0.0  # Sampling temperature. 0: greedy.
    max_new_tokens: PositiveInt | None = None  # Maximum tokens of an answer. null: sample.max_new_tokens.


@section
class CheckpointConfig:
    """Checkpoints, written asynchronously by Orbax."""

    every: NonNegativeInt = 50  # Steps between checkpoints. 0: save only at the end.
    keep: PositiveInt = 2  # Number of newest checkpoints to keep.
    accept_changed_inputs: bool = False  # Resume even if data, model or reward function have changed.
    # Also keep the checkpoint with the largest value of this metric: eval.SET.accuracy, eval.SET.format_rate,
    # eval.SET.response_length, or the training metric reward, accuracy, format_ok, response_length or
    # entropy. null: keep only the newest.
    best: str | None = None


@section
class LogConfig:
    """What a run logs besides metrics.jsonl."""

    samples_every: NonNegativeInt = 10  # Steps between logged completions. 0: log none.
    samples: PositiveInt = 8  # Number of completions to log each time.
    # Number of questions of each evaluation set whose answers are written to answers/, for the report page.
    answers: NonNegativeInt = 400
    # Stop the run after this many steps in a row in which all rewards are equal. 0: never stop.
    stop_constant: NonNegativeInt = 20
    # First and last step to trace with jax.profiler. null: trace none.
    profile: tuple[PositiveInt, PositiveInt] | None = None
    tensorboard: bool = False  # Also write TensorBoard events (pip install '.[tensorboard]').
    # Also log to this Weights & Biases project (pip install '.[wandb]', then `wandb login`). null: off.
    wandb: str | None = None
    # Also log to this trackio project, which is stored on this machine (pip install '.[trackio]'). null: off.
    trackio: str | None = None


@section
class MeshConfig:
    """Number of devices along each axis of the mesh. The batch is split over slices × data × fsdp."""

    # Number of TPU slices, or of nodes with a slow network between them. Each holds whole copies of the
    # weights.
    slices: PositiveInt = 1
    data: Annotated[int, Field(ge=-1)] = -1  # Number of copies of the weights. -1: use all other devices.
    fsdp: PositiveInt = 1  # Devices that share one copy of weights, gradients and optimiser states.
    tensor: PositiveInt = 1  # Devices that share attention heads and hidden dimensions.


@section
class Config:
    """All settings of one run: the content of a config file."""

    name: Name  # Name of the run and of its folder inside `runs`.
    runs: str = "runs"  # Folder that holds all runs.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # Seed of batches, sampling and initialisation.
    steps: PositiveInt | None = None  # Number of training steps. Give either steps or passes.
    passes: PositiveFloat | None = None  # Number of passes over the training questions (epochs).
    model: ModelConfig
    data: SetConfig  # The training questions.
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

    @property
    def question_sets(self) -> dict[str, SetConfig]:
        """The training set and the evaluation sets, by the names of their settings."""
        return {"data": self.data} | {f"eval.sets.{name}": spec for name, spec in self.eval.sets.items()}
