"""The Python API beside `train` and `sft`: load a model, generate completions, evaluate."""

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

BATCH = 32  # default number of prompts or questions per batch


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A policy in memory, for `generate` and `evaluate`."""

    source: str  # the run's folder, directory or hub name
    step: int  # of the run's checkpoint; 0 for a model without a run
    params: Params  # sharded over `mesh`; with LoRA, adapters are next to their matrices
    parts: Parts = dataclasses.field(repr=False)

    @property
    def architecture(self) -> DecoderConfig:
        """Sizes and types of the decoder's layers."""
        return self.parts.cfg

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts.tokenizer

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.parts.mesh

    @property
    def config(self) -> Config:
        """The run's settings. Without a run, the defaults and what `load_model` was given."""
        return self.parts.config

    @cached_property
    def sync_weights(self) -> WeightSync:
        """The function from `params` to the sampler's layout of the weights."""
        return make_weight_sync(self.parts, self.parts.cfg)


@dataclass(frozen=True, eq=False)
class Completion:
    """One response to a prompt, of T tokens."""

    prompt: str  # with special tokens
    text: str  # without the stop token
    tokens: np.ndarray  # int32 [T], with the stop token
    # float32 [T], nats: the model's log-probability of each token at `temperature` (at 1 if that is 0)
    logprobs: np.ndarray
    stopped: bool  # ended by a stop token; False: cut off at max_new_tokens


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's graded answers to a set of questions."""

    # n, questions, correct, accuracy, accuracy_low, … with the names of summary.json and eval.json
    counts: dict[str, Any]
    # one row per answer, as in an evaluation's JSONL file
    answers: list[dict[str, Any]] = dataclasses.field(repr=False)

    @property
    def accuracy(self) -> float:
        return self.counts["accuracy"]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy, over questions."""
        return self.counts["accuracy_low"], self.counts["accuracy_high"]


def load_model(
    source: str | Path, step: int | Literal["best"] | None = None, settings: Mapping[str, Any] | None = None
) -> LoadedModel:
    """Load a run's policy, or another model, onto this machine's devices.

    `source`: a run's folder, a Hugging Face directory, a hub name or "embedded".
    `step`: the run's checkpoint. Default: the newest complete one.
    `settings`: replace the run's settings, as in `load_config`, for example {"mesh.fsdp": 4} or
    {"model.dtype": "bfloat16"}. A model without a run has the defaults of `Config`; set {"prompt.template":
    "none"} to ask questions without Med-RLVR's instructions.

    Raises `ConfigError` if there is no such model or it does not fit this machine, and `CheckpointError` if
    the run has no such checkpoint.
    """
    folder, changes = Path(source), dict(settings or {})
    if (folder / "config.yaml").is_file():
        parts, params, step = evaluation.open_policy(folder, changes, step)
        return LoadedModel(str(source), step, params, parts)
    if step is not None:
        why = f"{source} is no run's folder, so there are no checkpoints"
        raise ConfigError(f"step: {step}: {why}; leave it out")
    n = len(jax.devices())  # nothing is trained, so the sizes only need to divide over any mesh
    defaults = {"name": "loaded", "model.path": str(source), "data.path": PYTHON, "learn.policy.lr": 0.0}
    sizes = dict.fromkeys(("sample.questions", "learn.minibatch", "eval.batch"), n)
    parts = build(configs.load({"steps": 1}, defaults | sizes | changes))
    with jax.set_mesh(parts.mesh):
        return LoadedModel(str(source), 0, load_policy(parts), parts)


class Sampling(TypedDict, total=False):
    """Sampling options of `generate`."""

    samples: int  # Completions of each prompt. Default 1.
    max_new_tokens: int  # Tokens after which a completion is cut off. Default 256.
    min_new_tokens: int  # Tokens before which a completion cannot stop. Default 0.
    temperature: float  # 0 is greedy. Default 1.
    top_k: int  # Sample from the k most probable tokens. Default 0: from all.
    top_p: float  # Nucleus sampling: the probability mass to sample from. Default 1: all.


def generate(
    model: LoadedModel,
    prompts: str | Question | Mapping[str, Any] | Sequence[str | Question | Mapping[str, Any]],
    *,
    seed: int = 0,
    batch: int = BATCH,
    **sampling: Unpack[Sampling],
) -> list[Completion]:
    """Sample completions with the sampler of training. Return `samples` for each prompt, in prompt order.

    `prompts`: texts, which are not changed; or questions (`Question`, or dicts with the fields of
    formats.py), which are rendered by the model's `config.prompt`.
    `batch`: the number of prompts per batch.
    `sampling`: `max_new_tokens`, `samples`, `temperature`, `top_k`, `top_p`, `min_new_tokens`; see
    `Sampling`.

    Sample j of prompt i depends only on (`seed`, i, j), not on `batch` or the other prompts.

    Raises `ConfigError` if a prompt and `max_new_tokens` together exceed the model's positions, or if a
    prompt has no tokens.
    """
    parts = model.parts
    prompts = [prompts] if isinstance(prompts, str | Question | Mapping) else list(prompts)
    if not prompts:
        return []
    encoded = _encode(parts, prompts)
    n = len(encoded.tokens)
    size = sharding.round_up_rows(parts.mesh, max(1, min(batch, n)))
    defaults = {"questions": size, "samples": 1, "max_new_tokens": 256}
    sample = validate(SampleConfig, defaults | dict(sampling))
    check_positions(parts, encoded.longest, sample.max_new_tokens, "max_new_tokens")
    key, completions = jax.random.key(seed), []
    with jax.set_mesh(parts.mesh):
        params = model.sync_weights(model.params)
        for start in range(0, n, size):
            index = np.arange(start, min(start + size, n))
            # the last batch repeats its prompts to fill up
            placed = place_prompts(params, parts, encoded, np.resize(index, size))
            rollout = sharding.to_host(draw(params, placed, key, draw_settings(parts, parts.cfg, sample)))
            for row, i in enumerate(index):
                completions += _completions(parts.tokenizer, encoded.tokens[i], rollout, row)
    return completions


def _completions(tokenizer: Tokenizer, prompt: list[int], rollout: Rollout, row: int) -> list[Completion]:
    """Return the samples of one row of a rollout on the host."""
    logprobs = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    prompt_text, out = tokenizer.show(prompt), []
    texts = tokenizer.decode(rollout.tokens[row], rollout.mask[row])
    for sample, (completion, mask) in enumerate(zip(texts, rollout.mask[row], strict=True)):
        ids = rollout.tokens[row, sample][mask]
        stopped = bool(len(ids)) and int(ids[-1]) in tokenizer.stop_ids
        out.append(Completion(prompt_text, completion, ids, logprobs[row, sample][mask], stopped))
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
    """Ask a model questions and grade its answers by the model's `config.reward`, as `medrlvr eval` does.

    `model`: a `LoadedModel`, or a source for `load_model`.
    `questions`: `Question`s or dicts, a `datasets.Dataset`, or a path such as "dev.jsonl" or
    "embedded:in_distribution".
    `max_new_tokens`: the default is the run's.

    Raises `ConfigError` for unusable questions; formats.py describes the fields.
    """
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    spec, records = data.resolve_data(SetConfig(path=PYTHON), questions)
    size = sharding.round_up_rows(loaded.mesh, batch)
    sampling = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    settings = validate(EvalConfig, {"batch": size} | sampling)
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
    """Tokenize texts, or questions as rendered by the config with their images."""
    is_text, questions, images = [isinstance(prompt, str) for prompt in prompts], [], None
    if all(is_text):
        rows = parts.tokenizer.encode_texts(prompts)
    elif any(is_text):
        raise ConfigError("prompts: texts and questions are mixed; pass them in two calls")
    else:
        # one by one, because a set must not contain a question twice
        questions = [data.read(SetConfig(path=PYTHON), [prompt])[0][0] for prompt in prompts]
        images = measure_images(questions, parts.cfg.vision) if parts.cfg.vision else None
        image_tokens = images and images.prompt_tokens()
        rows = text.encode_questions(parts.tokenizer, questions, parts.config.prompt, images=image_tokens)
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ConfigError(f"prompts: number {empty[0] + 1} has no tokens; pass a text that is not empty")
    ids, columns = np.arange(len(rows), dtype=np.uint32), width(max(map(len, rows)))
    return Encoded(questions, rows, ids, 0, columns, images=images)
