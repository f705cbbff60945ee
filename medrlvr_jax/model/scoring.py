"""Log-probs, entropies and values of given responses. Column t of every result belongs to response token t.

`at_responses` is the entry point. It can pack the G responses of a question one after another, without
padding. A row then needs the sum of their lengths, which varies far less than their maximum. Rows are
computed at one of a few sizes.
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
    """Return row sizes in tokens, ascending: each share of samples · length, rounded up, and all of it."""
    return tuple(sorted({ceil(samples * length * share) for share in shares} | {samples * length}))


def at_row_size(mask: Array, sizes: tuple[int, ...], f: Callable[[int], T]) -> T:
    """Return f(size) for the least size that holds all rows of the mask [Q, G, R]. All sizes are compiled."""
    if len(sizes) == 1:
        return f(sizes[0])
    longest = mask.sum((1, 2)).max()
    return jax.lax.switch((longest > jnp.array(sizes[:-1])).sum(), [partial(f, size) for size in sizes])


def at_responses(
    params: Params, cfg: DecoderConfig, rows: Rows | Experience, size: int, read: Callable[[Array, Array], T]
) -> T:
    """Return the results of `read` for each response token, [Q, G, R].

    `read` maps the states before each token [Q, g, r, E] and the tokens [Q, g, r] to arrays [Q, g, r]. If
    `size` is less than G · R, the responses of a row are packed: g is 1, r is `size`, which must hold every
    row's tokens (`at_row_size`), and results are 0 on padding.
    """
    n, groups, length = rows.tokens.shape
    if size == groups * length:
        known = jnp.where(rows.mask, rows.tokens, NO_TOKEN)
        return read(hidden_states(params, cfg, rows.prompts, known), rows.tokens)
    mask = rows.mask.reshape(n, -1)
    index = jnp.argsort(~mask, axis=1, stable=True)[:, :size]  # of the tokens in their order, then of padding
    keep = jnp.take_along_axis(mask, index, axis=1)
    tokens = jnp.take_along_axis(rows.tokens.reshape(n, -1), index, axis=1)[:, None]
    segments, columns = (index // length)[:, None], (index % length)[:, None]
    known = jnp.where(keep[:, None], tokens, NO_TOKEN)
    packed = read(hidden_states(params, cfg, rows.prompts, known, segments, columns), tokens)

    def unpack(x):
        blank = constrain(jnp.zeros(mask.shape, x.dtype), "batch", None)
        put = jax.vmap(lambda row, index, values: row.at[index].set(values))
        return put(blank, index, jnp.where(keep, x[:, 0], 0)).reshape(n, groups, length)

    return jax.tree.map(unpack, packed)


def hidden_states(
    params: Params,
    cfg: DecoderConfig,
    prompts: Prompts,
    tokens: Array,
    segments: Array | None = None,
    columns: Array | None = None,
) -> Array:
    """Return the state before each response token [Q, G, R, E], from which that token is predicted. No other
    code shifts tokens against states.

    For packed responses, `segments` and `columns` [Q, G, R] hold the response of each token, and its column
    there. Images without features are computed by the vision tower in `params`.
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
    """Return the entropy, in nats, of the softmax over the last axis. `total` is its logsumexp."""
    return total - jnp.sum(jnp.exp(scores - total[..., None]) * scores, axis=-1)


def values(params: Params, cfg: DecoderConfig, hidden: Array) -> Array:
    """Return the critic's value of the state before each response token, float32 [Q, G, R]."""
    return hidden.astype(jnp.float32) @ params["value"][:-1] + params["value"][-1]


def token_logprobs(
    params: Params, cfg: DecoderConfig, hidden: Array, tokens: Array, temperature: float, slab: int
) -> tuple[Array, Array]:
    """Return log π(token) and the policy's entropy in nats, float32 [Q, G, R], from logits / temperature.

    The logits of about `slab` tokens are in memory at a time. The backward pass computes them again. Each
    slab casts the output matrix by itself, so that its gradient is summed in the matrix's own dtype.
    """

    # `fsdp` splits the vocabulary here, not the rows. So devices exchange states, and neither the output
    # matrix nor its gradient is gathered.
    rows_by, words_by = ("replica", "words") if splits_words(cfg.vocab) else ("batch", "vocab")
    name, places = ("embed", (words_by, None)) if cfg.tied else ("head", (None, words_by))
    params = params | {name: constrain(params[name], *places)}

    @partial(jax.checkpoint, prevent_cse=False)
    def of_slab(hidden, tokens):
        scores = decoder.logits(params, cfg, constrain(hidden, rows_by, None, None, None)) / temperature
        scores = constrain(scores, rows_by, None, None, words_by)
        total = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
        return chosen - total, entropy(scores, total)

    rows, groups, length = tokens.shape
    slabs = -(-rows * groups * length // slab)
    if slabs == 1:
        return of_slab(hidden, tokens)
    size = -(-length // min(slabs, length))
    slabs = -(-length // size)

    def split(x):  # [slabs, Q, G, size, ...]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, slabs * size - length)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(rows, groups, slabs, size, *x.shape[3:]), 2, 0)

    parts = jax.lax.map(lambda xs: of_slab(*xs), (split(hidden), split(tokens)))
    logprobs, entropies = (jnp.moveaxis(p, 0, 2).reshape(rows, groups, -1)[..., :length] for p in parts)
    return logprobs, entropies
