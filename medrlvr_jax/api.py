"""What a notebook calls beside `train` and `sft`: a model in memory, its completions, and what an evaluation
says of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import jax
import numpy as np

from medrlvr_jax import sharding
from medrlvr_jax.build import Parts, build, check_positions, load_policy
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config, EvalConfig, SampleConfig, SetConfig
from medrlvr_jax.config.section import validate
from medrlvr_jax.data import load as data
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.patches import measure_images
from medrlvr_jax.data.question import Question
from medrlvr_jax.data.readers import PYTHON, Records
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.evaluation import evaluate as evaluation
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.rollout.generate import draw_settings
from medrlvr_jax.rollout.generate import generate as draw
from medrlvr_jax.rollout.rollout import Encoded, encode, place_prompts, width
from medrlvr_jax.rollout.sync import WeightSync, make_weight_sync
from medrlvr_jax.types import Params, Rollout

BATCH = 32  # prompts, or questions of an evaluation, at a time unless the caller says otherwise


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A policy in memory: what `generate` and `evaluate` take."""

    source: str  # what it was loaded from
    step: int  # of the run's checkpoint; 0 where it is no run's
    params: Params  # sharded over `mesh`; with a run's adapters beside the matrices that they belong to
    parts: Parts = dataclasses.field(repr=False)

    @property
    def architecture(self) -> DecoderConfig:
        """Sizes and kinds of the decoder's layers."""
        return self.parts.cfg

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts.tokenizer

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.parts.mesh

    @property
    def config(self) -> Config:
        """The run's settings; without a run, those the model is asked with: `prompt`, `reward`, `model`."""
        return self.parts.config

    @cached_property
    def sync_weights(self) -> WeightSync:
        """From `params` to what the sampler takes."""
        return make_weight_sync(self.parts, self.parts.cfg)


@dataclass(frozen=True, eq=False)
class Completion:
    """One response to a prompt, of T tokens."""

    prompt: str  # as the model was given it
    text: str  # of the tokens, without the stop token
    tokens: np.ndarray  # int32 [T], with the stop token
    # float32 [T], nats: of each token, by the model at the temperature asked for (1 where that is 0)
    logprobs: np.ndarray
    stopped: bool  # by a stop token; else it was cut at max_new_tokens


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the rule says of a model's answers to a set of questions."""

    # n, questions, correct, accuracy, accuracy_low, …, as summary.json and eval.json have them
    counts: dict[str, Any]
    # a row of an evaluation's JSONL for each answer
    answers: list[dict[str, Any]] = dataclasses.field(repr=False)

    @property
    def accuracy(self) -> float:
        return self.counts["accuracy"]

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, over questions."""
        return self.counts["accuracy_low"], self.counts["accuracy_high"]


def load_model(
    source: str | Path, step: int | Literal["best"] | None = None, settings: Mapping[str, Any] | None = None
) -> LoadedModel:
    """A run's policy, or a model that no run has trained, on this machine's devices.

    `source`: a run's folder; or a Hugging Face directory, a hub name or "embedded".
    `step`: of a run, the checkpoint to take; the newest whole one unless given.
    `settings`: replace the run's, as in `load_config`, such as {"mesh.fsdp": 4} or {"model.dtype":
    "bfloat16"}; a model without a run has the defaults of `Config`, and needs {"prompt.template": "none"}
    where questions are to be asked without the instructions that Med-RLVR puts before them.

    Raises `ConfigError` where there is no such model, or it does not fit this machine; `CheckpointError`
    where a run has no such checkpoint.
    """
    folder, changes = Path(source), dict(settings or {})
    if (folder / "config.yaml").is_file():
        parts, params, step = evaluation.open_policy(folder, changes, step)
        return LoadedModel(str(source), step, params, parts)
    if step is not None:
        why = f"{source} is no run's folder, so there are no checkpoints"
        raise ConfigError(f"step: {step}: {why}; leave it out")
    n = len(jax.devices())  # sizes that any mesh can split; nothing is trained
    usual = {"name": "loaded", "model.path": str(source), "data.path": PYTHON, "learn.policy.lr": 0.0}
    sizes = dict.fromkeys(("sample.questions", "learn.minibatch", "eval.batch"), n)
    parts = build(configs.load({"steps": 1}, usual | sizes | changes))
    with jax.set_mesh(parts.mesh):
        return LoadedModel(str(source), 0, load_policy(parts), parts)


class Sampling(TypedDict, total=False):
    """How `generate` draws."""

    samples: int  # Completions of each prompt. Default 1.
    max_new_tokens: int  # Tokens after which a completion is cut off. Default 256.
    min_new_tokens: int  # Tokens before which a completion cannot stop. Default 0.
    temperature: float  # 0 is greedy. Default 1.
    top_k: int  # Draw from the k most probable tokens. Default 0: from all.
    top_p: float  # Nucleus sampling: probability that is kept. Default 1: all.


def generate(
    model: LoadedModel,
    prompts: str | Question | Mapping[str, Any] | Sequence[str | Question | Mapping[str, Any]],
    *,
    seed: int = 0,
    batch: int = BATCH,
    **sampling: Unpack[Sampling],
) -> list[Completion]:
    """Completions of prompts by the training's own sampler: `samples` of each, prompt after prompt.

    `prompts`: texts, which the model gets as they stand; or questions (`Question`, or dicts with the fields
    of formats.py), which are worded as the model's `config.prompt` says.
    `sampling`: `max_new_tokens`, `samples`, `temperature`, `top_k`, `top_p`, `min_new_tokens`; see
    `Sampling`.

    Sample j of prompt i is a function of (`seed`, i, j): neither `batch`, the number of prompts at a time,
    nor the other prompts change it.

    Raises `ConfigError` where a prompt and `max_new_tokens` together are more than the model's positions, or
    a prompt has no tokens.
    """
    parts = model.parts
    given = [prompts] if isinstance(prompts, str | Question | Mapping) else list(prompts)
    if not given:
        return []
    encoded = _encode(parts, given)
    n = len(encoded.tokens)
    size = sharding.rows_that_split(parts.mesh, max(1, min(batch, n)))
    usual = {"questions": size, "samples": 1, "max_new_tokens": 256}
    sample = validate(SampleConfig, usual | dict(sampling))
    check_positions(parts, encoded.longest, sample.max_new_tokens, "max_new_tokens")
    key, completions = jax.random.key(seed), []
    with jax.set_mesh(parts.mesh):
        params = model.sync_weights(model.params)
        for start in range(0, n, size):
            index = np.arange(start, min(start + size, n))
            # the last batch is filled up with its first prompts
            placed = place_prompts(params, parts, encoded, np.resize(index, size))
            rollout = sharding.to_host(draw(params, placed, key, draw_settings(parts, parts.cfg, sample)))
            for row, i in enumerate(index):
                completions += _completions(parts.tokenizer, encoded.tokens[i], rollout, row)
    return completions


def _completions(tokenizer: Tokenizer, prompt: list[int], rollout: Rollout, row: int) -> list[Completion]:
    """All samples of one row of a rollout on the host."""
    logprobs = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    shown, out = tokenizer.show(prompt), []
    texts = tokenizer.decode(rollout.tokens[row], rollout.mask[row])
    for completion, tokens, mask, nats in zip(
        texts, rollout.tokens[row], rollout.mask[row], logprobs[row], strict=True
    ):
        ids = tokens[mask]
        stopped = bool(len(ids)) and int(ids[-1]) in tokenizer.stop_ids
        out.append(Completion(shown, completion, ids, nats[mask], stopped))
    return out


def evaluate(
    model: LoadedModel | str | Path,
    questions: Records | str | Path,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
    batch: int = BATCH,
) -> Evaluation:
    """Ask a model questions, and judge its answers by the rule of its `config.reward`, as `medrlvr eval`
    does.

    `model`: a `LoadedModel`, or what `load_model` takes.
    `questions`: `Question`s or dicts, a `datasets.Dataset`, or a path such as "dev.jsonl" or
    "embedded:in_distribution".
    `max_new_tokens`: the run's own, unless given.

    Raises `ConfigError` for questions that cannot be used: see formats.py.
    """
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    spec, records = data.resolve_data(SetConfig(path=PYTHON), questions)
    asked = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    settings = validate(EvalConfig, {"batch": sharding.rows_that_split(loaded.mesh, batch)} | asked)
    parts = dataclasses.replace(loaded.parts, config=dataclasses.replace(loaded.config, eval=settings))
    questions = data.read(spec, records)[0]
    encoded = encode(parts.tokenizer, questions, parts.config, vision=parts.cfg.vision)
    if not encoded.questions:
        limit = f"prompt.max_tokens = {parts.config.prompt.max_tokens}"
        raise ConfigError(
            f"questions: none fits {limit}; load the model with settings={{'prompt.max_tokens': …}}"
        )
    new = evaluation.rollout_settings(parts.config, encoded).max_new_tokens
    check_positions(parts, encoded.longest, new, "max_new_tokens")
    with jax.set_mesh(parts.mesh):
        return Evaluation(*evaluation.evaluate(parts, loaded.sync_weights(loaded.params), encoded))


def _encode(parts: Parts, prompts: list[Any]) -> Encoded:
    """Texts as they stand, or questions as the config words them, with their images."""
    texts, questions, images = [isinstance(prompt, str) for prompt in prompts], [], None
    if all(texts):
        rows = parts.tokenizer.encode_texts(prompts)
    elif any(texts):
        raise ConfigError("prompts: texts and questions together; give either, in two calls")
    else:
        questions = [_question(prompt) for prompt in prompts]
        images = measure_images(questions, parts.cfg.vision) if parts.cfg.vision else None
        pads = images and images.prompt_tokens()
        rows = text.encode_questions(parts.tokenizer, questions, parts.config.prompt, images=pads)
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ConfigError(f"prompts: number {empty[0] + 1} has no tokens; give a text that is not empty")
    ids, columns = np.arange(len(rows), dtype=np.uint32), width(max(map(len, rows)))
    return Encoded(questions, rows, ids, 0, columns, images=images)


def _question(prompt: Any) -> Question:
    """By itself, for the same question may be asked more than once."""
    return data.read(SetConfig(path=PYTHON), [prompt])[0][0]
