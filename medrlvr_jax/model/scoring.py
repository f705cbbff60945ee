"""What a decoder says of responses that are there: log-probs, entropy, values. Column t of every result is
about response token t.

`at_responses` is the one way in. Rows of responses are computed at one of a few sizes, without most of their
padding: the G responses of a question stand one behind the other, so what a row needs is their lengths' sum,
which varies far less than the longest of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from medrlvr_jax.model import decoder, vision
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.decoder import NO_TOKEN
from medrlvr_jax.sharding import constrain, splits_words
from medrlvr_jax.types import Array, Experience, Params, Prompts

T = TypeVar("T")


class Rows(NamedTuple):
    """Questions and their responses; an `Experience` has the same fields."""

    prompts: Prompts
    tokens: Array  # int32 [Q, G, R]
    mask: Array  # bool [Q, G, R]


def row_sizes(shares: Sequence[float], samples: int, length: int) -> tuple[int, ...]:
    """Tokens of each share of a row's samples · length, rounded up; ascending, and the whole last."""
    return tuple(sorted({ceil(samples * length * share) for share in shares} | {samples * length}))


def at_row_size(mask: Array, sizes: tuple[int, ...], f: Callable[[int], T]) -> T:
    """f(size) at the least size that holds every row of the mask [Q, G, R]; all of them are compiled."""
    if len(sizes) == 1:
        return f(sizes[0])
    longest = mask.sum((1, 2)).max()
    return jax.lax.switch((longest > jnp.array(sizes[:-1])).sum(), [partial(f, size) for size in sizes])


def at_responses(
    params: Params, cfg: DecoderConfig, rows: Rows | Experience, size: int, read: Callable[[Array, Array], T]
) -> T:
    """`read` at each response token, [Q, G, R]; 0 on padding where `size` is less than G · R.

    read: states before each token [Q, g, r, E], tokens [Q, g, r] → arrays [Q, g, r]. With a `size` below G ·
    R, g is 1 and r is `size`, which must hold every row's tokens (`at_row_size`).
    """
    n, groups, length = rows.tokens.shape
    if size == groups * length:
        known = jnp.where(rows.mask, rows.tokens, NO_TOKEN)
        return read(hidden_states(params, cfg, rows.prompts, known), rows.tokens)
    mask = rows.mask.reshape(n, -1)
    place = jnp.argsort(~mask, axis=1, stable=True)[:, :size]  # tokens first, in their order
    keep = jnp.take_along_axis(mask, place, axis=1)
    tokens = jnp.take_along_axis(rows.tokens.reshape(n, -1), place, axis=1)[:, None]
    segments, columns = (place // length)[:, None], (place % length)[:, None]
    known = jnp.where(keep[:, None], tokens, NO_TOKEN)
    packed = read(hidden_states(params, cfg, rows.prompts, known, segments, columns), tokens)

    def unpack(x):
        blank = constrain(jnp.zeros(mask.shape, x.dtype), "batch", None)
        put = jax.vmap(lambda row, place, values: row.at[place].set(values))
        return put(blank, place, jnp.where(keep, x[:, 0], 0)).reshape(n, groups, length)

    return jax.tree.map(unpack, packed)


def hidden_states(
    params: Params,
    cfg: DecoderConfig,
    prompts: Prompts,
    tokens: Array,
    segments: Array | None = None,
    columns: Array | None = None,
) -> Array:
    """[Q, G, R, E]: the state *before* each response token, the one that predicts it. The only shift in the
    project.

    `segments` and `columns` [Q, G, R], where several responses stand in one: which of them a token is of, and
    its place there. Images of prompts without features are seen by the tower in `params`.
    """
    if prompts.vision and prompts.vision.images and prompts.vision.features is None:
        prompts = prompts.with_vision(features=vision.see(params, cfg, prompts.vision.images))
    packed, _ = decoder.forward(params, cfg, prompts, tokens, segments, columns)
    rows, groups, length = tokens.shape
    width = prompts.tokens.shape[1]
    last = jnp.broadcast_to(packed[:, None, None, width - 1], (rows, groups, 1, cfg.embed))
    after = packed[:, width:].reshape(rows, groups, length, cfg.embed)
    states = jnp.concatenate([last, after[:, :, :-1]], axis=2)
    return states if columns is None else jnp.where(columns[..., None] == 0, last, states)


def entropy(scores: Array, total: Array) -> Array:
    """In nats, of the softmax over the last axis, whose logsumexp is `total`."""
    return total - jnp.sum(jnp.exp(scores - total[..., None]) * scores, axis=-1)


def values(params: Params, cfg: DecoderConfig, hidden: Array) -> Array:
    """The critic's estimate [Q, G, R] of the state before each response token, in float32."""
    return hidden.astype(jnp.float32) @ params["value"][:-1] + params["value"][-1]


def token_logprobs(
    params: Params, cfg: DecoderConfig, hidden: Array, tokens: Array, temperature: float, slab: int
) -> tuple[Array, Array]:
    """log π(token) and the policy's entropy in nats, float32 [Q, G, R], at logits / temperature.

    Logits exist for at most about `slab` tokens at a time, in the forward and (recomputed) in the backward
    pass. Each slab rounds the table to the arithmetic's dtype itself, so that the slabs' gradients of it add
    up in the table's own.
    """

    # Over `fsdp` the words are split, not the rows: then states travel, and neither the table nor its
    # gradient is ever whole.
    rows_by, words_by = ("replica", "words") if splits_words(cfg.vocab) else ("batch", "vocab")
    name, places = ("embed", (words_by, None)) if cfg.tied else ("head", (None, words_by))
    params = params | {name: constrain(params[name], *places)}

    @partial(jax.checkpoint, prevent_cse=False)
    def piece(hidden, tokens):
        scores = decoder.logits(params, cfg, constrain(hidden, rows_by, None, None, None)) / temperature
        scores = constrain(scores, rows_by, None, None, words_by)
        total = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
        return chosen - total, entropy(scores, total)

    rows, groups, length = tokens.shape
    pieces = -(-rows * groups * length // slab)
    if pieces == 1:
        return piece(hidden, tokens)
    size = -(-length // min(pieces, length))
    pieces = -(-length // size)

    def cut(x):  # [pieces, Q, G, size, ...]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pieces * size - length)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(rows, groups, pieces, size, *x.shape[3:]), 2, 0)

    parts = jax.lax.map(lambda xs: piece(*xs), (cut(hidden), cut(tokens)))
    logprobs, entropies = (jnp.moveaxis(p, 0, 2).reshape(rows, groups, -1)[..., :length] for p in parts)
    return logprobs, entropies
