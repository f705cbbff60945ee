"""From questions to scored responses: encode, generate, decode, score. Evaluation and training share it.

A process encodes the rows of a batch that its devices hold. If several processes hold a row, one of them
decodes and scores it.
"""

import dataclasses
import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jax
import numpy as np

from medrlvr_jax.build import Parts
from medrlvr_jax.config.schema import Config, SampleConfig
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.options import shuffle_options
from medrlvr_jax.data.patches import ImageSet, measure_images, vision_inputs
from medrlvr_jax.data.question import LETTERS, Question, fingerprint, repeats
from medrlvr_jax.data.tokenizer import Progress, Tokenizer, no_progress
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import require_equal
from medrlvr_jax.model.architecture import VisionConfig
from medrlvr_jax.rewards import Verdicts, grade, parse, stages
from medrlvr_jax.rewards.components import Component
from medrlvr_jax.rewards.graders import TokenCounts
from medrlvr_jax.rewards.parse import graded_prefix
from medrlvr_jax.rewards.verdicts import random_rewards, replace_rewards
from medrlvr_jax.rollout.generate import draw_settings, generate
from medrlvr_jax.rollout.see import add_features
from medrlvr_jax.sharding import fetch_rows, local_rows, place_rows
from medrlvr_jax.types import Array, Params, Prompts, Rollout

WIDTH_STEP = 16  # widths are multiples of this, so that few shapes are compiled


def width(longest: int) -> int:
    return -(-longest // WIDTH_STEP) * WIDTH_STEP


@dataclass(frozen=True)
class Encoded:
    """A set of questions with the tokens of their prompts."""

    questions: list[Question]
    tokens: list[list[int]]
    ids: np.ndarray  # uint32 [n], the questions' places in the file; dropped questions are counted, too
    dropped: int
    width: int  # columns of a batch of prompts, enough for all questions and all orders of their options
    shuffle: bool = False  # whether its options are to be shuffled: see `reorder`
    repeats: dict[str, str] = dataclasses.field(default_factory=dict)  # see `question.repeats`
    how_read: str = ""  # how the set was read, for the console: see `load.read`
    images: ImageSet | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, over all orders of the options."""
        return self.width if self.shuffle else max(map(len, self.tokens), default=0)

    @property
    def windows(self) -> int:
        """Windows of patches of a question's images; 0 without images."""
        return self.images.windows if self.images else 0

    def prompts(self, index: Sequence[int] | np.ndarray, pad_id: int) -> Prompts:
        """Return the padded prompts of the questions at `index`. Features of images are still missing."""
        rows = [self.tokens[i] for i in index]
        prompts = text.pad_prompts(rows, self.ids[np.asarray(index)], self.width, pad_id)
        if self.images is None:
            return prompts
        grids, cfg = self.images.subset(index).grids, self.images.cfg
        return dataclasses.replace(prompts, vision=vision_inputs(rows, grids, None, self.width, cfg))


@dataclass(frozen=True)
class Scored:
    """The rows of a rollout that this process has scored: N responses, question by question."""

    questions: list[Question]  # [N]
    prompts: list[list[int]]  # [N], their tokens
    places: np.ndarray  # int [N], each row's place among the Q·G of the whole batch
    completions: list[str]  # [N]
    tokens: np.ndarray  # int32 [N, R], as they were drawn; `lengths` of each are the response's
    verdicts: Verdicts  # of the same rows
    lengths: np.ndarray  # int [N], tokens up to and including the stop token
    stopped: np.ndarray  # bool [N], False where the budget cut the response
    # [N], which of the paper's six stages each completion shows; None of open questions, and under `direct`
    stages: list[str | None]
    # float [N], the policy's, in nats, mean over the response's tokens; None where it was not taken
    entropy: np.ndarray | None = None

    def record(self, row: int) -> dict[str, Any]:
        """Return one completion as a JSON object, for samples.jsonl and for the answers of an evaluation."""
        v, question = self.verdicts, self.questions[row]
        failed = {"reward_error": v.failed[row]} if row in v.failed else {}
        values = {name: float(column[row]) for name, column in v.reported_components.items()}
        values = {name: None if math.isnan(value) else value for name, value in values.items()}
        return {
            "id": question.id,
            "completion": self.completions[row],
            "key": question.reference,
            "kind": question.kind,
            "options": question.choice_count,
            "answer": str(v.answer[row]) or None,
            "reward": None if failed else float(v.reward[row]),
            **({"components": values} if values else {}),
            "format_ok": bool(v.format_ok[row]),
            "correct": bool(v.correct[row]),
            "reason": str(v.reason[row]),
            "stage": self.stages[row],
            "length": int(self.lengths[row]),
            "stopped": bool(self.stopped[row]),
            **({"order": question.order} if question.order else {}),
            **({} if self.entropy is None else {"entropy": round(float(self.entropy[row]), 6)}),
        } | failed


def encode(
    tokenizer: Tokenizer,
    questions: list[Question],
    config: Config,
    shuffle: bool = False,
    vision: VisionConfig | None = None,
    progress: Progress = no_progress,
) -> Encoded:
    """Encode prompts. Those that are too long are dropped and counted. `vision`: the model's, or None."""
    if config.reward.mode == "paper" and (other := next((q for q in questions if q.value is not None), None)):
        problem = f"it pays for one letter alone, and question {other.id} is not answered by one"
        raise ConfigError(f"reward.mode: paper: {problem}; set reward.mode=strict or direct")
    images = measure_images(questions, vision) if vision else None
    image_tokens = images.prompt_tokens() if images else None
    tokens, dropped = text.encode_prompts(tokenizer, questions, config.prompt, image_tokens, progress)
    gone = set(dropped)
    fitting = [i for i in range(len(questions)) if i not in gone]
    left, columns = [questions[i] for i in fitting], width(max(map(len, tokens), default=0))
    require_equal(lambda: {"questions": fingerprint(left), "tokens of their prompts": fingerprint(tokens)})
    ids, seen = np.array(fitting, np.uint32), images.subset(fitting) if images else None
    again = repeats(left)
    return Encoded(left, tokens, ids, len(dropped), columns, shuffle, again, images=seen)


def check_seen(parts: Parts, images: ImageSet | None) -> None:
    """Raise `ConfigError` if a vision tower is to be trained on questions without images: only weight decay
    would change it.
    """
    if images is None and parts.cfg.execution.tower != "freeze":
        problem = "no question of data has an image"
        raise ConfigError(f"model.vision: {parts.cfg.execution.tower}: {problem}; set it to freeze")


def reorder(parts: Parts, encoded: Encoded, index: np.ndarray, draw: int) -> Encoded:
    """Return `encoded` with the options shuffled in the questions at `index` that this process holds. `draw`:
    the number of the epoch or sample, which selects the order.

    If the shuffled prompt has too many tokens, the question keeps the order of its file.
    """
    mine = index[local_rows(len(index), parts.mesh)[0]].tolist()
    wanted = [shuffle_options(encoded.questions[i], parts.config.seed, draw) for i in mine]
    image_tokens = encoded.images.subset(mine).prompt_tokens() if encoded.images else None
    rows = text.encode_questions(parts.tokenizer, wanted, parts.config.prompt, images=image_tokens)
    limit = min(encoded.width, parts.config.prompt.max_tokens)
    questions, tokens = list(encoded.questions), list(encoded.tokens)
    for i, question, row in zip(mine, wanted, rows, strict=True):
        if len(row) <= limit:
            questions[i], tokens[i] = question, row
        else:
            questions[i] = dataclasses.replace(questions[i], order=LETTERS[: len(question.options)])
    return dataclasses.replace(encoded, questions=questions, tokens=tokens)


def before_response(parts: Parts, encoded: Encoded) -> Encoded:
    """Return the prompts without the beginning of the response that the template or `prefill` gives."""
    image_tokens, config = encoded.images.prompt_tokens() if encoded.images else None, parts.config.prompt
    questions = encoded.questions
    tokens = text.encode_questions(parts.tokenizer, questions, config, with_prefix=False, images=image_tokens)
    return dataclasses.replace(encoded, tokens=tokens)


def score_rollout(
    parts: Parts,
    encoded: Encoded,
    index: np.ndarray,
    rollout: Rollout,
    coin: Array | None = None,
    components: Sequence[Component] | None = None,
) -> Scored:
    """Fetch this process's tokens to the host, decode and score them. `index`: the questions of the whole
    rollout.

    `components` of the reward are by default those that need the completion alone. `coin`: the key of the
    control `reward.random`. Evaluations have neither.
    """
    tokenizer, rule = parts.tokenizer, parts.config.reward
    mine, counted = local_rows(len(index), parts.mesh)
    mine = mine[counted]
    tokens, mask = (x[counted] for x in fetch_rows((rollout.tokens, rollout.mask), parts.mesh))
    groups, length = tokens.shape[1:]
    flat, flat_mask = tokens.reshape(-1, length), mask.reshape(-1, length)
    begun = graded_prefix(text.response_prefix(tokenizer, parts.config.prompt), rule.mode)
    completions = [begun + c for c in tokenizer.decode(flat, flat_mask)]
    lengths = flat_mask.sum(1)
    stopped = np.isin(flat[np.arange(len(flat)), np.maximum(lengths - 1, 0)], tokenizer.stop_ids)
    rows = np.repeat(index[mine], groups).tolist()
    questions, prompts = [encoded.questions[i] for i in rows], [encoded.tokens[i] for i in rows]
    if components is not None:
        components = [c for c in components if not c.on_device]
    verdicts = grade(completions, questions, rule, TokenCounts(lengths, stopped, length), components)
    if rule.random is not None and coin is not None:
        paid = random_rewards(np.asarray(jax.random.key_data(coin)), encoded.ids[index[mine]], groups, rule)
        verdicts = replace_rewards(verdicts, paid.ravel())
    places = (mine[:, None] * groups + np.arange(groups)).ravel()
    shown = shown_stages(completions, questions, verdicts, rule.mode)
    return Scored(questions, prompts, places, completions, flat, verdicts, lengths, stopped, shown)


def join_scored(batches: Sequence[Scored], size: int) -> Scored:
    """Concatenate what was scored of several batches of `size` rows each. Places count the rows of all."""
    if len(batches) == 1:
        return batches[0]
    starts = np.cumsum([0, *(len(batch.questions) for batch in batches)]).tolist()
    failed = [
        {start + row: reason for row, reason in batch.verdicts.failed.items()}
        for start, batch in zip(starts, batches, strict=False)
    ]
    verdicts = _concatenated([batch.verdicts for batch in batches], failed=dict(ChainMap(*failed)))
    places = np.concatenate([k * size + batch.places for k, batch in enumerate(batches)])
    return _concatenated(batches, verdicts=verdicts, places=places)


def _concatenated(items: Sequence[Any], **fields: Any) -> Any:
    """Concatenate dataclasses field by field, except for the given `fields`."""

    def join(columns: Sequence[Any]) -> Any:
        match columns[0]:
            case np.ndarray():
                return np.concatenate(columns)
            case Mapping():
                return {name: join([column[name] for column in columns]) for name in columns[0]}
            case list():
                return list(chain.from_iterable(columns))

    names = [f.name for f in dataclasses.fields(items[0]) if f.name not in fields]
    return type(items[0])(**{name: join([getattr(x, name) for x in items]) for name in names}, **fields)


def shown_stages(
    completions: list[str], questions: list[Question], verdicts: Verdicts, mode: str
) -> list[str | None]:
    """Return the stage of each completion, or None for questions without letters and in mode `direct`."""
    if mode == "direct":
        return [None] * len(completions)
    lenient = verdicts if mode == "paper" else parse(completions, "paper", [q.letters for q in questions])
    rows = zip(completions, lenient.format_ok.tolist(), questions, strict=True)
    return [stages.stage(text, ok, q.options) if q.letters else None for text, ok, q in rows]


def place_prompts(
    params: Params | None, parts: Parts, encoded: Encoded, index: np.ndarray, blank: bool = False
) -> Prompts:
    """Return the prompts of the questions at `index` on the mesh. Each process pads and places its own rows.
    `params`, `blank`: see `add_features`.
    """
    mine, _ = local_rows(len(index), parts.mesh)
    prompts = encoded.prompts(index[mine], parts.tokenizer.pad_id)
    placed = place_rows(prompts, len(index), parts.mesh)
    if encoded.images is None:
        return placed
    images = encoded.images.prepare(encoded.questions, index[mine].tolist())
    placed_images = place_rows(images, len(index), parts.mesh)
    return add_features(parts, params, placed, placed_images, blank)


def prefetch_images(parts: Parts, encoded: Encoded, index: np.ndarray) -> None:
    """Prefetch the images of the questions at `index`, the next batch of `place_prompts`, in a thread."""
    if encoded.images:
        encoded.images.prefetch(encoded.questions, index[local_rows(len(index), parts.mesh)[0]].tolist())


def sample_and_score(
    decode_params: Params,
    parts: Parts,
    encoded: Encoded,
    index: np.ndarray,
    key: Array,
    sample: SampleConfig,
    entropies: bool = False,
) -> Scored:
    """Draw and score responses for an evaluation. `entropies`: also record each response's mean entropy."""
    settings = draw_settings(parts, parts.cfg, sample, entropies)
    prompts = place_prompts(decode_params, parts, encoded, index)
    rollout = generate(decode_params, prompts, key, settings)
    scored = score_rollout(parts, encoded, index, rollout)
    if not entropies:
        return scored
    _, counted = local_rows(len(index), parts.mesh)
    entropy, mask = (x[counted] for x in fetch_rows((rollout.entropy, rollout.mask), parts.mesh))
    means = entropy.sum(-1) / np.maximum(mask.sum(-1), 1)
    return dataclasses.replace(scored, entropy=means.ravel())
