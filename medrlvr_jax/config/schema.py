"""The settings of a run: small frozen dataclasses. Each field is checked by its type, the rest in check.py.

The comment beside or above a field is its documentation: `--help` and the reference show it.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from medrlvr_jax.config.reward import RewardConfig
from medrlvr_jax.config.section import Fraction, Name, section

Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]  # of each layer

# Estimators that compare samples of one question.
COMPARING = ("group", "group_mean", "gdpo", "rloo", "reinforce_pp_baseline")

# Metrics that checkpoint.best may name: of an evaluation, as eval.SET.SHARE, and of a training step.
EVAL_SHARES = ("accuracy", "format_rate", "response_length")
STEP_SHARES = ("reward", "accuracy", "format_ok", "response_length", "entropy")


@section
class LoRAConfig:
    """Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

    rank: PositiveInt = 16  # Inner dimension of the adapters.
    alpha: PositiveFloat = 32.0  # Adapters are multiplied by alpha / rank.
    targets: tuple[Matrix, ...] = get_args(Matrix)  # Matrices of each layer that get an adapter.


@section
class ModelConfig:
    """The decoder from which policy, reference and critic start."""

    path: str  # A Hugging Face directory, a hub name, or "embedded", the small model of the package.
    init: Literal["pretrained", "random"] = "pretrained"  # random: read only config.json and the tokenizer.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Dtype of activations and matrix products.
    # Dtype of the stored weights. bfloat16 without lora: they are updated by stochastic rounding.
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # Stored for the backward pass. none: all activations; dots: results of matmuls; full: layers' inputs.
    remat: Literal["none", "dots", "full"] = "full"
    # Attention of whole rows. auto: the splash kernel on TPU unless learn.row_sizes packs rows, else XLA's.
    attention: Literal["auto", "xla"] = "auto"
    logit_slab: PositiveInt = 8192  # Tokens whose logits are in memory at once while log-probs are computed.
    # null: train all weights. Otherwise train float32 adapters; policy and critic share one frozen base.
    lora: LoRAConfig | None = None
    # What of a vision tower is trained, whole, beside the decoder. merger: its last part, from patches to
    # image tokens; train: all of it. It is then seen again in each pass that learns.
    vision: Literal["freeze", "merger", "train"] = "freeze"


@section
class PassCountConfig:
    """Choose or order questions by how many of a model's samples were right (MedVLThinker, arXiv 2508.02669:
    1 to 7 of 16), or by how that changed during an earlier run (1-shot RLVR, LIMR; see difficulty.py)."""

    file: str  # What `medrlvr difficulty` wrote; for order variance or impact, with --history.
    # Fewest and most right samples of a used question. null: any.
    keep: tuple[NonNegativeInt, NonNegativeInt] | None = None
    # Order of the questions in each pass. variance, impact: largest first. null: random.
    order: Literal["easy_first", "hard_first", "variance", "impact"] | None = None
    top: PositiveInt | None = None  # Use only this many questions, the first ones by `order`. null: all.


@section
class SetConfig:
    """A set of questions: a file, a hub name, or `embedded:{train,in_distribution,out_of_distribution}`."""

    path: str  # A file (JSONL, JSON, CSV, parquet), a hub name, or embedded:NAME.
    # auto: recognised by the first record; plain: your own questions; open: your own questions without
    # options, whose answers are numbers, dates, durations, labels or texts; text: prompt and response, for
    # SFT; vqa: image, question, answer; or a published set with images (data/published.py).
    format: (
        Literal["auto", "plain", "open", "vqa", "text"]
        | Literal["medqa", "mmlu_pro", "mmlu", "medmcqa", "pubmedqa", "medcalc", "trec"]
        | Literal["omnimedvqa", "med_r1", "pmc_vqa", "vqa_rad", "slake", "medxpertqa", "medvlthinker"]
    ) = "auto"
    subset: str | None = None  # The hub's configuration name.
    split: str | None = None  # The hub's split. Files have none.
    revision: str | None = None  # The hub's commit, branch or tag. null: the newest. A run prints the commit.
    # The format's fields by those of the file: {question: q, options: [op1, op2], answer: gold}. `a.b` is
    # field b of the object a; null: do not read that field.
    fields: dict[str, str | list[str] | None] = Field(default_factory=dict)
    # Fields that are the same for every record, such as {kind: number, tolerance: 0.05}.
    constants: dict[str, Any] = Field(default_factory=dict)
    # Parts of a field, as new fields, by a regular expression that matches all of it and names the parts:
    # {solution: "<answer> (?P<answer>.) </answer>"}. They are read before `fields`.
    patterns: dict[str, str] = Field(default_factory=dict)
    # Folder of the image files, from the data file's own folder on. null: that folder.
    image_folder: str | None = None
    # Use only records whose fields have these values: {split: test, type: [decimal, date]}.
    where: dict[str, Any] = Field(default_factory=dict)
    # Records that cannot be read. refuse: stop and list them; skip: leave them out and count them.
    on_bad: Literal["refuse", "skip"] = "refuse"
    limit: PositiveInt | None = None  # Use only the first N questions. null: all.
    shuffle_options: bool = False  # Shuffle options anew in each epoch, and in each sample of an evaluation.
    pass_count: PassCountConfig | None = None  # Choose or order questions by difficulty. null: neither.


@section
class PromptConfig:
    """How a question becomes the tokens of a prompt."""

    # think: ask for a thought and an answer; direct: for the answer alone; none: give no instruction. Or a
    # wording of your own, in which {question} is the question with its lettered options, {answer} what is
    # asked for ("the letter of the one best option"), and {form} the word for it ("letter").
    template: str = "think"
    chat: bool = False  # Wrap the prompt in the tokenizer's chat template.
    system: str | None = None  # With chat: the system turn. null: the template's default, if it has one.
    # With chat: variables of the template, such as {enable_thinking: false}.
    template_args: dict[str, Any] = Field(default_factory=dict)
    # Beginning of every response, such as "<answer>". It is not sampled, and is scored with the completion.
    prefill: str = ""
    max_tokens: PositiveInt = 512  # Longer prompts are dropped and counted. Image tokens count, too.
    # Larger images are reduced to this many pixels; an image token has 28 × 28. null: as the model's
    # preprocessor_config.json says.
    max_pixels: Annotated[int, Field(ge=28 * 28)] | None = None


@section
class SampleConfig:
    """A rollout: `questions` × `samples` responses of at most `max_new_tokens` tokens."""

    questions: PositiveInt = 128  # Questions per step.
    samples: PositiveInt = 8  # Responses to each question: the group of GRPO.
    max_new_tokens: PositiveInt = 512  # Tokens after which a response is cut off.
    min_new_tokens: NonNegativeInt = 0  # Tokens before which a response cannot stop.
    temperature: NonNegativeFloat = 1.0  # Sampling temperature. Training needs more than 0, which is greedy.
    top_k: NonNegativeInt = 0  # Sample from the k most probable tokens. 0: from all.
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # Nucleus sampling: probability that is kept. 1: off.
    # gathered: each device holds all layers, split over mesh.tensor; sharded: layers keep training's shards
    # and are gathered at each token: many times slower, for weights that do not fit otherwise.
    layout: Literal["gathered", "sharded"] = "gathered"
    # int8: sample with matrices quantised by output channel; needs loss.sampler_cap.
    weights: Literal["same", "int8"] = "same"


@section
class SpreadConfig:
    """Leave out questions whose samples earn nearly the same (RLPR, arXiv 2506.18254)."""

    # A question is learned from if the standard deviation of its samples' rewards is at least this times the
    # running mean of the steps before.
    beta: NonNegativeFloat = 0.5
    ema: Fraction = 0.99  # Decay of the running mean, a step.
    # First step that leaves questions out. The running mean begins as the mean of the five steps before it.
    start: Annotated[int, Field(ge=2)] = 11


@section
class AdvantageConfig:
    """From rewards to one advantage per token."""

    # gae: PPO, needs learn.critic; group: GRPO; group_mean: Dr.GRPO; gdpo: GRPO for each component of the
    # reward by itself (arXiv 2601.05242); rloo: RLOO; reinforce_pp…: REINFORCE++.
    estimator: Literal[
        "gae", "group", "group_mean", "gdpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"
    ] = "gae"
    gamma: Fraction = 1.0  # Discount γ.
    lam: Fraction = 1.0  # λ of GAE.
    # gae, gdpo, reinforce_pp…: scale a step's advantages to mean 0 and variance 1 over tokens.
    whiten: bool = True
    # group, gdpo: std divides by G − this. 1: verl, TRL, OpenRLHF; 0: simply, EasyDeL.
    std_ddof: Literal[0, 1] = 1
    # group, gdpo: added to std. 1e-6 in verl, 1e-4 in TRL, 1e-9 in OpenRLHF.
    std_eps: NonNegativeFloat = 1e-6
    reward_clip: PositiveFloat = 10.0  # Rewards are clipped to ± this. gdpo: only for the metrics.
    # Do not learn from questions whose samples all earn the same before penalties (DAPO, arXiv 2503.14476).
    drop_equal_groups: bool = False
    # Do not learn from questions whose samples earn nearly the same. They are not replaced. null: off.
    spread: SpreadConfig | None = None


@section
class KLConfig:
    """The KL penalty towards the reference model."""

    coef: NonNegativeFloat = 0.01  # Coefficient β. 0: no reference model is loaded.
    into: Literal["reward", "loss"] = "reward"  # Subtract from the rewards of tokens, or add to the loss.
    # With x = log π_ref − log π: −x, x²/2, eˣ − 1 − x, |x|.
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    target: PositiveFloat | None = None  # Aim of an adaptive coefficient (Ziegler et al. 2019). null: fixed.
    horizon: PositiveInt = 10_000  # Responses over which the adaptive coefficient moves.


@section
class LossConfig:
    """The policy's surrogate and the critic's loss."""

    surrogate: Literal["clip", "cispo"] = "clip"  # clip: PPO's; cispo: arXiv 2506.13585.
    ratio: Literal["token", "sequence"] = "token"  # Probability ratio of a token, or of a response (GSPO).
    clip_low: NonNegativeFloat = 0.2  # Lower ε: the ratio is clipped at 1 − this.
    clip_high: NonNegativeFloat = 0.2  # Upper ε: the ratio is clipped at 1 + this.
    ratio_cap: Annotated[float, Field(gt=1)] | None = None  # Cap of the unclipped ratio, TRL's δ. null: none.
    # Truncated importance sampling: a token's loss is multiplied by min(π_old / π_sampler, this). null: off.
    sampler_cap: PositiveFloat | None = None
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # Bound for negative advantages (verl: 3.0).
    # From losses of tokens to one number. constant: Dr.GRPO's sum ÷ (responses × max_new_tokens).
    aggregate: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    # Do not learn from responses that max_new_tokens cut off; they still count in means over samples (DAPO).
    mask_truncated: bool = False
    entropy_coef: float = 0.0  # Weight of the entropy bonus. Above 0: more entropy.
    # How far a value may move from its old one in a step. null: no limit.
    value_clip: NonNegativeFloat | None = 0.5


@section
class OptimConfig:
    """An optimiser with linear warm-up. lr is AdamW's for all three kinds (see `learn.make_optimizer`)."""

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"  # adafactor and muon need less memory.
    lr: NonNegativeFloat  # Peak learning rate.
    warmup: Fraction = 0.03  # Share of all optimiser steps in which lr rises linearly.
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # lr after the warm-up.
    b1: Fraction = 0.9  # Decay of the first moment, and Muon's momentum. Adafactor has none.
    b2: Fraction = 0.95  # Decay of Adam's second moment.
    eps: PositiveFloat = 1e-8  # Added to the root of the second moment.
    # Decoupled weight decay. Norms, biases and the value head have none.
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0  # Gradients are scaled down to this global norm.
    moments: Literal["float32", "bfloat16"] = "float32"  # Dtype of the first moment.


@section
class LearnConfig:
    """How a rollout is learned from. Sizes count questions; each brings all its samples."""

    epochs: PositiveInt = 1  # Passes over one rollout.
    minibatch: PositiveInt = 16  # Questions per optimiser step.
    # Also compile passes over responses for these shares of samples × max_new_tokens. A micro-batch takes the
    # smallest that holds its tokens: [0.25, 0.5] saves time if responses are short. Each adds compile time.
    row_sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    # Questions per forward and backward pass. null: the whole minibatch.
    microbatch: PositiveInt | None = None
    policy: OptimConfig  # The policy's optimiser.
    critic: OptimConfig | None = None  # The critic's optimiser. null: no critic, as in GRPO.
    critic_warmup: NonNegativeInt = 0  # First steps in which only the critic learns.
    # Keep the reference and idle optimiser states in the host's pinned memory. No gain on CPU.
    offload: bool = False


@section
class SFTConfig:
    """Supervised fine-tuning on `data`."""

    # answer: the right answer; rationale: a thought and the right answer; text: the response in each line.
    target: Literal["answer", "rationale", "text"] = "answer"
    max_new_tokens: PositiveInt = 512  # Longer targets are dropped and counted.


@section
class EvalConfig:
    """Evaluation before, during and after training."""

    sets: dict[Name, SetConfig] = Field(default_factory=dict)  # Sets of questions, by name.
    every: NonNegativeInt = 0  # Steps between evaluations. 0: only before and after training.
    batch: PositiveInt = 32  # Questions at a time.
    samples: PositiveInt = 1  # Answers to each question. Above 1: also pass@k and maj@k.
    temperature: NonNegativeFloat = 0.0  # Sampling temperature. 0: greedy.
    max_new_tokens: PositiveInt | None = None  # Tokens of an answer at most. null: sample.max_new_tokens.


@section
class CheckpointConfig:
    """Checkpoints, written asynchronously by Orbax."""

    every: NonNegativeInt = 50  # Steps between checkpoints. 0: only at the end.
    keep: PositiveInt = 2  # Number of newest checkpoints that stay on disk.
    accept_changed_inputs: bool = False  # Resume although data, model or reward.fn have changed.
    # Also keep the checkpoint that is largest in this metric: eval.SET.accuracy, .format_rate or
    # .response_length, or a step's reward, accuracy, format_ok, response_length or entropy. null: none.
    best: str | None = None


@section
class LogConfig:
    """What a run writes besides metrics.jsonl."""

    samples_every: NonNegativeInt = 10  # Steps between logged completions. 0: never.
    samples: PositiveInt = 8  # Completions logged each time.
    # Of each evaluated set, questions whose answers go to answers/, for the page.
    answers: NonNegativeInt = 400
    # Stop after this many steps in a row whose rewards are all equal, which teach nothing. 0: never.
    stop_constant: NonNegativeInt = 20
    # First and last step that jax.profiler traces. null: none.
    profile: tuple[PositiveInt, PositiveInt] | None = None
    tensorboard: bool = False  # Also write TensorBoard events (pip install '.[tensorboard]').
    # The Weights & Biases project to log to (pip install '.[wandb]', and `wandb login`). null: none.
    wandb: str | None = None
    # The trackio project to log to (pip install '.[trackio]'); trackio keeps it on this machine. null: none.
    trackio: str | None = None


@section
class MeshConfig:
    """Number of devices along each axis of the mesh. The batch is split over slices × data × fsdp."""

    slices: PositiveInt = 1  # TPU slices, or nodes (slow network): they split the batch, never the weights.
    data: Annotated[int, Field(ge=-1)] = -1  # Copies of the weights. -1: use all devices that are left.
    fsdp: PositiveInt = 1  # Devices over which weights, gradients and optimiser states are split.
    tensor: PositiveInt = 1  # Devices over which heads and hidden dimensions are split.


@section
class Config:
    """What a config file holds: one run."""

    name: Name  # Name of the run, and of its folder inside `runs`.
    runs: str = "runs"  # The folder of all runs.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # Seed of batches, sampling and initialisation.
    steps: PositiveInt | None = None  # Number of steps. Give either steps or passes.
    passes: PositiveFloat | None = None  # Passes over the questions: the paper's epochs.
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
