"""One run's settings: small frozen dataclasses, read from YAML and `a.b=value`, checked before any device work."""

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_type_hints

import pydantic
import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import to_jsonable_python

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
    best: str | None = None  # a key of metrics.jsonl, larger is better, such as eval.dev.accuracy


@section
class LogConfig:
    """What a run writes besides metrics.jsonl."""

    samples_every: Size = 10  # steps between samples; 0: never
    samples: Count = 8  # completions each time
    stop_constant: Size = 20  # steps in a row with one reward for all, after which a run stops; 0: never
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


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML too) and check everything that needs no device."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; `configs/` holds the ready ones") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not a YAML file: {e}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping of settings is needed, got {type(tree).__name__}")
    for item in overrides:
        override(tree, item)
    return from_tree(tree, str(path))


def from_tree(tree: dict[str, Any], source: str = "config") -> Config:
    """Build and check a `Config` from nested dicts; every complaint in one `ConfigError`."""
    try:
        config = pydantic.TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(f"{source}: {_complaint(error)}" for error in e.errors())) from None
    problems = _cross_checks(config)
    if problems:
        raise ConfigError("\n".join(f"{source}: {p}" for p in problems))
    return config


def to_tree(config: Any) -> dict[str, Any]:
    """Nested dicts and lists, as YAML reads them back."""
    return to_jsonable_python(config)


def dump(config: Config) -> str:
    """The resolved settings as YAML; `load` reads it back to an equal `Config`."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def override(tree: dict[str, Any], item: str) -> None:
    name, sep, text = item.partition("=")
    if not sep or not name:
        raise ConfigError(f"override {item!r}: write it as a.b=value, such as sample.temperature=0.7")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {item!r}: the value is not YAML: {e}") from None
    *parents, leaf = name.split(".")
    node = tree
    for i, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            raise ConfigError(f"override {item!r}: {'.'.join(parents[: i + 1])} is a value, it has no fields")
        node = node[key]
    node[leaf] = value


def _fields_at(path: tuple) -> list[str]:
    """The names of the fields of the section that `path` leads to."""
    cls: Any = Config
    for key in path:
        kind = get_type_hints(cls).get(key) if dataclasses.is_dataclass(cls) else None
        found = [t for t in (kind, *get_args(kind)) if dataclasses.is_dataclass(t)]
        cls = found[0] if found else SetConfig if cls is EvalConfig and key == "sets" else cls
    return [f.name for f in dataclasses.fields(cls)]


def _complaint(error: Any) -> str:
    path = tuple(error["loc"])
    name, value = ".".join(map(str, path)), error.get("input")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        return f"{name}: no such setting; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
    if error["type"] in ("missing", "missing_argument"):
        return f"{name}: needed, and not given"
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{name}: {value!r} is a value where a section with {', '.join(_fields_at(path))} is needed"
    if name == "name":
        return f"name: {value!r} must be letters, digits, '.', '_' and '-' only, since it names a folder inside runs"
    if path[-1] == "[key]":
        return f"{'.'.join(map(str, path[:-2]))}: {value!r} must be letters, digits, '.', '_' and '-' only, since it names a file"
    return f"{name}: {value!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _cross_checks(c: Config) -> list[str]:
    """What no single field can say; a list of complaints, empty when all is well."""
    out = []
    if (c.steps is None) == (c.passes is None):
        out.append(f"steps: {c.steps} and passes: {c.passes}: give exactly one of the two")
    if (c.prompt.template, c.reward.mode == "direct") in (("direct", False), ("think", True)):
        pays = "an answer without a thought" if c.reward.mode == "direct" else "a thought and an answer"
        asks, mend = c.prompt.template, "reward.mode=direct" if c.prompt.template == "direct" else "prompt.template=direct"
        out.append(f"reward.mode: {c.reward.mode} pays for {pays}, which prompt.template {asks} does not ask for; set {mend}")
    paying = [name for name in ("fn", "random") if getattr(c.reward, name) is not None]
    if len(paying + [name for name in ("leak_penalty", "before_penalty") if getattr(c.reward, name)]) > 1 and paying:
        out.append(f"reward.{paying[0]}: it alone says what is paid; take the other of fn, random, leak_penalty and before_penalty out")
    if c.model.lora and not c.model.lora.targets:
        out.append("model.lora.targets: [] would train nothing; name some of the layers' matrices, or set model.lora to null")
    if c.sample.questions % c.learn.minibatch:
        out.append(_divide("learn.minibatch", c.learn.minibatch, "sample.questions", c.sample.questions))
    if c.learn.microbatch and c.learn.minibatch % c.learn.microbatch:
        out.append(_divide("learn.microbatch", c.learn.microbatch, "learn.minibatch", c.learn.minibatch))
    if c.advantage.estimator == "gae" and c.learn.critic is None:
        out.append("advantage.estimator: gae needs learn.critic (such as {lr: 9e-6}); or take estimator group")
    if c.advantage.estimator != "gae" and c.learn.critic is not None:
        out.append(f"learn.critic: {c.advantage.estimator} has no use for a critic; set learn.critic to null, or take estimator gae")
    if c.advantage.estimator in COMPARING and c.sample.samples < 2:
        compared = f"{c.advantage.estimator} compares samples of one question"
        out.append(f"sample.samples: {c.sample.samples}: {compared}, so at least 2 are needed")
    if c.sample.min_new_tokens >= c.sample.max_new_tokens:
        out.append(f"sample.min_new_tokens: {c.sample.min_new_tokens} must be below sample.max_new_tokens = {c.sample.max_new_tokens}")
    if c.sample.weights == "int8" and c.loss.sampler_cap is None:
        out.append("sample.weights: int8 draws from another policy than the one that learns; set loss.sampler_cap, 2.0 is usual")
    if c.sample.temperature == 0:
        out.append("sample.temperature: 0 is greedy, and greedy rollouts teach nothing; set it above 0 (eval.temperature may be 0)")
    if c.kl.coef > 0 and c.kl.into == "loss" and c.kl.estimator == "k1":
        out.append("kl.estimator: k1 in the loss has an expected gradient of zero; take k3 (GRPO) or k2, or put it into reward")
    if c.loss.surrogate == "cispo" and (c.loss.ratio_cap or c.loss.dual_clip):
        out.append("loss.surrogate: cispo has no use for loss.ratio_cap or loss.dual_clip; set them to null")
    if c.kl.target is not None and not (c.kl.coef > 0 and c.kl.into == "reward"):
        out.append(f"kl.target: {c.kl.target}: the adaptive coefficient needs kl.coef > 0 and kl.into reward")
    if c.log.profile and c.log.profile[0] > c.log.profile[1]:
        out.append(f"log.profile: {list(c.log.profile)}: the first step comes first, then the last")
    for name, spec in [("data", c.data), *((f"eval.sets.{name}", spec) for name, spec in c.eval.sets.items())]:
        counted = spec.pass_count
        if counted and counted.top and not counted.order:
            out.append(f"{name}.pass_count.top: {counted.top} of which? give order, such as variance")
        if counted and not counted.keep and not counted.order:
            out.append(f"{name}.pass_count: neither keep nor order, so it does nothing; give keep, such as [1, 7], or order")
        if counted and counted.keep and counted.keep[0] > counted.keep[1]:
            out.append(f"{name}.pass_count.keep: {list(counted.keep)}: the least comes first, then the most")
    same = [name for name, spec in c.eval.sets.items() if not spec.shuffle_options]
    if c.eval.samples > 1 and c.eval.temperature == 0 and (same or not c.eval.sets):
        remedy = "set eval.temperature above 0, or shuffle_options of " + (", ".join(same) or "the sets")
        out.append(f"eval.samples: {c.eval.samples} greedy samples are all the same; {remedy}")
    return out


def _divide(small: str, s: int, large: str, n: int) -> str:
    return f"{small}: {s} does not divide {large} = {n}; the nearest that do: {nearest_divisors(s, n)}"


def nearest_divisors(wanted: int, n: int) -> str:
    """The two divisors of n that are nearest to `wanted`, for messages."""
    near = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))[:2]
    return ", ".join(map(str, sorted(near)))
