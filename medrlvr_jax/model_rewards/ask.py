"""What the policy says of answers that it did not give, after its own thoughts: one pass over a step's rows.

The host names for each row an `Ending` (joins.py); the device puts it behind the response's first
tokens and scores the new rows as it scores the rollout: all of a group behind one prompt.
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
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model_rewards.joins import Join
from medrlvr_jax.rollout.assess import assess_settings
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.sharding import map_rows
from medrlvr_jax.types import Array, Leaf, Params, Prompts, pytree

T = TypeVar("T")
Score = Literal["mean", "geometric", "product", "logmean"]


@pytree
class Ending:
    """For each row, what stands behind its first tokens; nothing of a row that is not asked about."""

    prefix: Int32[Leaf, "*rows"]  # tokens of the response that stay
    ids: Int32[Leaf, "*rows L"]
    start: Int32[Leaf, "*rows"]  # the first of `ids` that is of the answer
    size: Int32[Leaf, "*rows"]  # how many of `ids` there are


class Answers(NamedTuple):
    """Responses up to an answer. A row without one is empty."""

    rows: scoring.Rows
    answer: Bool[Array, "Q G R"]  # the answer's own tokens


class Pass(NamedTuple):
    """The static settings of a pass over rows."""

    cfg: DecoderConfig
    temperature: float
    slab: int
    shares: tuple[float, ...]  # see `scoring.row_sizes`
    micro: int  # questions at a time


class PolicyReward(NamedTuple):
    """A component that asks the policy itself: the host makes requests while it grades, a program answers."""

    program: Any  # jitted: (base, policy, prompts, rollout, request) → float32 [Q, G], laid out by rows
    request: Callable[[Scored], Any]  # a tree of arrays [N, …], one row for each that is scored
    shapes: Any  # the request of a whole batch: a tree of ShapeDtypeStructs [Q, G, …]
    # what the start policy says, by question: filled before the first step; None: it is not asked
    baseline: dict[str, float] | None = None


def pass_over(parts: Parts) -> Pass:
    """Rows are scored as the rollout's are."""
    settings, shares = assess_settings(parts), parts.config.learn.row_sizes
    return Pass(settings.cfg, settings.temperature, settings.slab, shares, settings.micro)


def shape(parts: Parts, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
    """Of an array [Q, G, …] about a step's rows."""
    return jax.ShapeDtypeStruct((parts.config.sample.questions, parts.config.sample.samples, *more), dtype)


def endings_as_shapes(parts: Parts, width: int) -> Ending:
    single = shape(parts, jnp.int32)
    return Ending(single, shape(parts, jnp.int32, width), single, single)


def endings(joined: Sequence[Join | None], width: int, room: int) -> Ending:
    """[N, …] from N joins. None is not asked about, nor a row of more than `width` ids or `room` tokens."""
    fits = [
        j if j and len(j.ids) <= width and j.prefix + len(j.ids) <= room else Join(0, [], 0) for j in joined
    ]
    ids = np.zeros((len(fits), width), np.int32)
    for row, j in zip(ids, fits, strict=True):
        row[: len(j.ids)] = j.ids
    prefix, start, size = np.array([(j.prefix, j.start, len(j.ids)) for j in fits], np.int32).reshape(-1, 3).T
    return Ending(prefix, ids, start, size)


def with_ending(prompts: Prompts, tokens: Int32[Array, "Q G R"], ending: Ending, length: int) -> Answers:
    """The responses' first tokens, each with its ending behind them, in `length` columns."""
    column = jnp.broadcast_to(jnp.arange(length), (*tokens.shape[:2], length))
    place = column - ending.prefix[..., None]  # among the ending's ids
    response = jnp.take_along_axis(tokens, jnp.minimum(column, tokens.shape[-1] - 1), axis=-1)
    added = jnp.take_along_axis(ending.ids, jnp.clip(place, 0, ending.ids.shape[-1] - 1), axis=-1)
    mask = place < ending.size[..., None]
    answer = mask & (place >= ending.start[..., None])
    return Answers(scoring.Rows(prompts, jnp.where(place < 0, response, added), mask), answer)


def answer_scores(params: Params, answers: Answers, score: Score, how: Pass) -> Float32[Array, "Q G"]:
    """How probable each answer is: `reduced` over its tokens."""
    cfg = how.cfg

    def read(hidden: Array, tokens: Array) -> Array:
        return scoring.token_logprobs(params, cfg, hidden, tokens, how.temperature, how.slab)[0]

    def at(part: Answers, size: int) -> Array:
        return reduced(scoring.at_responses(params, cfg, part.rows, size, read), part.answer, score)

    return _in_parts(answers, answers.rows.mask, at, how)


def reduced(
    logprobs: Float32[Array, "Q G R"], answer: Bool[Array, "Q G R"], score: Score
) -> Float32[Array, "Q G"]:
    """One number from the log-probs of an answer's n tokens; 0 where there are none.

    mean: Σ p ÷ n (RLPR, arXiv 2506.18254); product: Π p (VeriFree, arXiv 2505.21493); geometric: (Π p)^(1/n);
    logmean: Σ log p ÷ n.
    """
    logprobs, n = jnp.where(answer, logprobs, 0.0), answer.sum(-1)
    total, some = logprobs.sum(-1), jnp.maximum(n, 1)
    match score:
        case "mean":
            return jnp.where(answer, jnp.exp(logprobs), 0.0).sum(-1) / some
        case "product":
            return jnp.where(n > 0, jnp.exp(total), 0.0)
        case "geometric":
            return jnp.where(n > 0, jnp.exp(total / some), 0.0)
        case "logmean":
            return total / some


def differs(
    params: Params, answers: Answers, letters: Int32[Array, "Q G L"], how: Pass
) -> Bool[Array, "Q G"]:
    """Whether another letter than the answer, which is one token, is the most probable in its place.

    `letters`: the token of each letter that the question offers, else −1; the same in a group. False where
    there is no answer.
    """
    cfg, dtype = how.cfg, how.cfg.execution.dtype

    def at(part: tuple[Answers, Array], size: int) -> Array:
        (rows, answer), letters = part
        ids = letters[:, 0]
        table = params["embed"][ids] if cfg.tied else jnp.moveaxis(params["head"][:, ids], 0, -1)

        def read(hidden: Array, tokens: Array) -> Array:
            scores = jnp.einsum(
                "qgre,qle->qgrl", hidden, table.astype(dtype), preferred_element_type=jnp.float32
            )
            best = jnp.where(ids[:, None, None] >= 0, scores, -jnp.inf).argmax(-1)
            chosen = jnp.take_along_axis(ids[:, None, None], best[..., None], axis=-1)[..., 0]
            return (chosen != tokens).astype(jnp.int32)

        return (answer & (scoring.at_responses(params, cfg, rows, size, read) > 0)).any(-1)

    return _in_parts((answers, letters), answers.rows.mask, at, how)


def _in_parts(tree: T, mask: Array, at: Callable[[T, int], Array], how: Pass) -> Array:
    """`at` of `how.micro` questions of the tree at a time, each part at the least row size that holds it."""
    _, groups, length = mask.shape
    sizes = scoring.row_sizes(how.shares, groups, length)

    def part(pair: tuple[T, Array]) -> Array:
        tree, mask = pair
        return scoring.at_row_size(mask, sizes, partial(at, tree))

    return map_rows(part, (tree, mask), how.micro)
