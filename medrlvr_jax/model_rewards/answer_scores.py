"""Score answers that the policy did not give, behind its own thoughts, in one pass over a step's rows.

The host makes an `Ending` for each row (endings.py). The device appends it to the response's first tokens and
scores the new rows as it scores the rollout: all rows of a group share one prompt.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32

from medrlvr_jax.build import Parts
from medrlvr_jax.model import scoring
from medrlvr_jax.model_rewards.endings import Ending
from medrlvr_jax.rollout.assess import AssessSettings
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.sharding import map_rows
from medrlvr_jax.types import Array, Leaf, Params, Prompts, pytree

T = TypeVar("T")
Score = Literal["mean", "geometric", "product", "logmean"]
NO_ENDING = Ending(0, [], 0)


@pytree
class EndingBatch:
    """The endings of a batch of rows. A row that is not scored has size 0."""

    prefix: Int32[Leaf, "*rows"]  # tokens of the response that stay
    ids: Int32[Leaf, "*rows L"]
    start: Int32[Leaf, "*rows"]  # index of the first of `ids` that belongs to the answer
    size: Int32[Leaf, "*rows"]  # number of `ids`


class AnswerRows(NamedTuple):
    """Responses up to and including an answer. A row that is not scored is empty."""

    rows: scoring.Rows
    answer: Bool[Array, "Q G R"]  # the answer's tokens


class PolicyReward(NamedTuple):
    """A component that asks the policy itself: the host makes requests, and a program answers them."""

    program: Any  # jitted: (base, policy, prompts, rollout, request) → float32 [Q, G], sharded by rows
    make_request: Callable[[Scored], Any]  # a tree of arrays [N, …] for N scored rows
    shapes: Any  # of the request of a whole batch: a tree of ShapeDtypeStructs [Q, G, …]
    # the start policy's score of each question, filled before the first step; None without a baseline
    baseline: dict[str, float] | None = None


def row_shape(parts: Parts, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
    """Return the shape [Q, G, *more] of an array about a step's rows."""
    return jax.ShapeDtypeStruct((parts.config.sample.questions, parts.config.sample.samples, *more), dtype)


def ending_shapes(parts: Parts, width: int) -> EndingBatch:
    number = row_shape(parts, jnp.int32)
    return EndingBatch(number, row_shape(parts, jnp.int32, width), number, number)


def stack_endings(endings: Sequence[Ending | None], width: int, room: int) -> EndingBatch:
    """Return arrays [N, …] of N endings.

    A row is not scored if its ending is None, has more than `width` ids, or makes more than `room` tokens.
    """
    fits = [e if e and len(e.ids) <= width and e.prefix + len(e.ids) <= room else NO_ENDING for e in endings]
    ids = np.zeros((len(fits), width), np.int32)
    for row, ending in zip(ids, fits, strict=True):
        row[: len(ending.ids)] = ending.ids
    columns = np.array([(e.prefix, e.start, len(e.ids)) for e in fits], np.int32).reshape(-1, 3).T
    prefix, start, size = columns
    return EndingBatch(prefix, ids, start, size)


def append_endings(
    prompts: Prompts, tokens: Int32[Array, "Q G R"], endings: EndingBatch, length: int
) -> AnswerRows:
    """Return the responses' first tokens, each followed by its ending, in `length` columns."""
    column = jnp.broadcast_to(jnp.arange(length), (*tokens.shape[:2], length))
    index = column - endings.prefix[..., None]  # into the ending's ids
    response = jnp.take_along_axis(tokens, jnp.minimum(column, tokens.shape[-1] - 1), axis=-1)
    added = jnp.take_along_axis(endings.ids, jnp.clip(index, 0, endings.ids.shape[-1] - 1), axis=-1)
    mask = index < endings.size[..., None]
    answer = mask & (index >= endings.start[..., None])
    return AnswerRows(scoring.Rows(prompts, jnp.where(index < 0, response, added), mask), answer)


def score_answers(
    params: Params, answers: AnswerRows, score: Score, settings: AssessSettings
) -> Float32[Array, "Q G"]:
    """Return `reduce_logprobs` of each answer's tokens."""
    cfg = settings.cfg

    def read(hidden: Array, tokens: Array) -> Array:
        return scoring.token_logprobs(params, cfg, hidden, tokens, settings.temperature, settings.slab)[0]

    def score_part(part: AnswerRows, size: int) -> Array:
        logprobs = scoring.at_responses(params, cfg, part.rows, size, read)
        return reduce_logprobs(logprobs, part.answer, score)

    return _map_parts(answers, answers.rows.mask, score_part, settings)


def reduce_logprobs(
    logprobs: Float32[Array, "Q G R"], answer: Bool[Array, "Q G R"], score: Score
) -> Float32[Array, "Q G"]:
    """Return one number from the log-probabilities of an answer's n tokens; 0 if it has none.

    mean: Σ p ÷ n (RLPR, arXiv 2506.18254); product: Π p (VeriFree, arXiv 2505.21493); geometric: (Π p)^(1/n);
    logmean: Σ log p ÷ n.
    """
    logprobs, n = jnp.where(answer, logprobs, 0.0), answer.sum(-1)
    total, divisor = logprobs.sum(-1), jnp.maximum(n, 1)
    match score:
        case "mean":
            return jnp.where(answer, jnp.exp(logprobs), 0.0).sum(-1) / divisor
        case "product":
            return jnp.where(n > 0, jnp.exp(total), 0.0)
        case "geometric":
            return jnp.where(n > 0, jnp.exp(total / divisor), 0.0)
        case "logmean":
            return total / divisor


def prefers_other_letter(
    params: Params, answers: AnswerRows, letters: Int32[Array, "Q G L"], settings: AssessSettings
) -> Bool[Array, "Q G"]:
    """Return whether another letter is more probable than the answer, which is one token.

    `letters` are the tokens of the letters that the question offers, else −1; they are the same in a group.
    Rows without an answer are False.
    """
    cfg, dtype = settings.cfg, settings.cfg.execution.dtype

    def compare_part(part: tuple[AnswerRows, Array], size: int) -> Array:
        (rows, answer), letters = part
        ids = letters[:, 0]
        table = params["embed"][ids] if cfg.tied else jnp.moveaxis(params["head"][:, ids], 0, -1)

        def read(hidden: Array, tokens: Array) -> Array:
            logits = jnp.einsum(
                "qgre,qle->qgrl", hidden, table.astype(dtype), preferred_element_type=jnp.float32
            )
            best = jnp.where(ids[:, None, None] >= 0, logits, -jnp.inf).argmax(-1)
            chosen = jnp.take_along_axis(ids[:, None, None], best[..., None], axis=-1)[..., 0]
            return (chosen != tokens).astype(jnp.int32)

        return (answer & (scoring.at_responses(params, cfg, rows, size, read) > 0)).any(-1)

    return _map_parts((answers, letters), answers.rows.mask, compare_part, settings)


def _map_parts(tree: T, mask: Array, f: Callable[[T, int], Array], settings: AssessSettings) -> Array:
    """Apply f(part, size) to parts of `settings.micro` questions, each at the least size that holds it."""
    _, groups, length = mask.shape
    sizes = scoring.row_sizes(settings.shares, groups, length)

    def at_size(pair: tuple[T, Array]) -> Array:
        tree, mask = pair
        return scoring.at_row_size(mask, sizes, partial(f, tree))

    return map_rows(at_size, (tree, mask), settings.micro)
