"""Attention over `prompt | response 1 | … | response G`: a token sees its prompt, and what stands before it
in its own response.

The scores prompt × prompt and response × (prompt + response) exist; what lies between two responses is never
computed. splash.py is the same as a TPU kernel. Shapes: KV heads K, query heads K·h, head size D; the queries
come scaled.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medrlvr_jax.types import Array

LEAST = jnp.finfo(jnp.float32).min
PIECE = 128  # of queries in `causal`, at least


class Window(NamedTuple):
    """A bound on how far back a token attends: to positions less than `size` before its own."""

    positions: Array  # int32 [Q, N]
    size: Array  # int32 []


def plain(
    q: Array,
    k: Array,
    v: Array,
    prompt_mask: Array,
    segments: Array | None,
    groups: int,
    window: Window | None = None,
) -> Array:
    """q [Q, N, K, h, D], k and v [Q, N, K, D] → [Q, N, K, h, D], where N = P + G·R, G = `groups`, and
    prompt_mask is [Q, P].

    With `segments` [Q, G, R], several responses stand in one: a token sees those of its own segment. Heads
    come to the front once, so that every product reads and writes its scores as they lie.
    """
    width = prompt_mask.shape[1]

    # [Q, K, n, h, R, D] and twice [Q, K, n, R, D]
    def cut(part: slice, n: int) -> tuple[Array, Array, Array]:
        x, y, z = (y[:, part].reshape(y.shape[0], n, -1, *y.shape[2:]) for y in (q, k, v))
        return jnp.moveaxis(x, (3, 4), (1, 3)), jnp.moveaxis(y, 3, 1), jnp.moveaxis(z, 3, 1)

    def back(y: Array) -> Array:  # [Q, K, n, h, R, D] → [Q, n·R, K, h, D]
        y = jnp.moveaxis(y, (1, 3), (3, 4))
        return y.reshape(y.shape[0], -1, *y.shape[3:])

    def near(queries: slice, n: int, keys: slice, m: int) -> Array | bool:  # [Q, 1, n, 1, R, S]
        if window is None:
            return True
        of, to = (window.positions[:, part].reshape(len(q), i, -1) for part, i in ((queries, n), (keys, m)))
        return of[:, None, :, None, :, None] - to[:, None, :, None, None, :] < window.size

    own, rest = slice(None, width), slice(width, None)
    prompt, real = cut(own, 1), prompt_mask[:, None, None, None, None, :]
    attended = back(causal(*prompt, real & near(own, 1, own, 1)))
    if not groups:
        return attended
    together = (
        jnp.ones((1,) * 6, bool)
        if segments is None
        else (segments[..., :, None] == segments[..., None, :])[:, None, :, None]
    )
    together &= near(rest, groups, rest, groups)
    before = prompt[1][:, :, 0], prompt[2][:, :, 0], real & near(rest, groups, own, 1)
    return jnp.concatenate([attended, back(causal(*cut(rest, groups), together, before))], axis=1)


def causal(
    q: Array, k: Array, v: Array, keep: Array, before: tuple[Array, Array, Array] | None = None
) -> Array:
    """q [Q, K, n, h, N, D] over k and v [Q, K, n, N, D] up to its own place, where `keep`, which broadcasts
    to the scores; and over all of `before`: k and v [Q, K, P, D] that the n share, and which of these to
    keep.

    Queries go in up to four pieces, each with the keys up to its end: of four times four blocks of scores,
    six never exist.
    """
    rows, kv_heads, n, _, length, _ = q.shape
    piece, out = max(PIECE, -(-length // (4 * PIECE)) * PIECE), []
    flat = lambda y, *axes: y.reshape(rows, kv_heads, *axes, -1, y.shape[-1])
    for start in range(0, length, piece):
        end = min(start + piece, length)
        part = q[..., start:end, :]
        order = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        keeps = order & (keep[..., start:end, :end] if keep.shape[-2] > 1 else keep[..., :end])
        shape, (part_k, part_v) = part.shape[:-1], (y[..., :end, :] for y in (k, v))
        scores = [(products(flat(part, n), part_k).reshape(*shape, end), keeps)]
        if before:
            seen = before[2][..., start:end, :] if before[2].shape[-2] > 1 else before[2]
            scores.append((products(flat(part), before[0]).reshape(*shape, -1), seen))
        weights, total = weigh(scores)
        mix = weighted_sum(flat(weights[0], n), part_v).reshape(part.shape)
        if before:
            mix += weighted_sum(flat(weights[1]), before[1]).reshape(part.shape)
        out.append((mix / total).astype(q.dtype))
    return jnp.concatenate(out, axis=-2)


# Scores, weights and sums of values are float32: a score of 40 rounded to bfloat16 is up to 0.125 off, and
# its weight 13 %. Only what goes into a product is rounded to the dtype of queries, keys and values. The two
# functions below do so in the backward pass, too; autodiff would multiply float32 gradients there, at half
# the speed on a GPU.
float_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def products(q: Array, k: Array) -> Array:
    """q [..., N, D] · kᵀ of k [..., P, D]: float32 [..., N, P]."""
    return float_einsum("...nd,...pd->...np", q, k)


@jax.custom_vjp
def weighted_sum(weights: Array, v: Array) -> Array:
    """float32 weights [..., N, P], rounded to v's dtype, · v [..., P, D]: float32 [..., N, D]."""
    return jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _products_backward(saved, g):
    q, k = saved
    g = g.astype(q.dtype)
    return g @ k, jnp.einsum("...np,...nd->...pd", g, q)


def _weighted_sum_backward(saved, g):
    weights, v = saved
    g = g.astype(v.dtype)
    return products(g, v), jnp.einsum("...np,...nd->...pd", weights, g)


products.defvjp(lambda q, k: (products(q, k), (q, k)), _products_backward)
weighted_sum.defvjp(
    lambda weights, v: (weighted_sum(weights, v), (weights.astype(v.dtype), v)), _weighted_sum_backward
)


def weigh(parts: list[tuple[Array, Array]]) -> tuple[list[Array], Array]:
    """Softmax over the last axis of several parts together, in float32, not divided yet: each part's weights,
    and the sum over all.

    parts: (scores, which of them to keep). Where nothing is to be kept (padding), all weights are 1: never
    NaN.
    """
    scores = [jnp.where(keep, x, LEAST) for x, keep in parts]
    top = jax.lax.stop_gradient(reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores]))
    weights = [jnp.exp(x - top) for x in scores]
    return weights, reduce(jnp.add, [w.sum(-1, keepdims=True) for w in weights])


def decode(
    q: Array,
    prompt: tuple[Array, Array],
    response: tuple[Array, Array],
    prompt_mask: Array,
    t: Array,
    window: Array | None = None,
) -> Array:
    """One token of each sample, q [Q, G, K, h, D], over its prompt's keys [Q, K, D, P] and values [Q, K, P,
    D], and columns 0 … t of its response [Q, G, K, D, R] and [Q, G, K, R, D]: two parts with one maximum and
    one sum.
    """
    (prompt_k, prompt_v), (response_k, response_v) = prompt, response
    by_heads = lambda y: y.swapaxes(1, 2)
    with_prompt = float_einsum("qkghd,qkdp->qkghp", by_heads(q), prompt_k)
    with_response = float_einsum("qgkhd,qgkdr->qgkhr", q, response_k)
    column, response_mask = jnp.arange(with_response.shape[-1]), True
    if window is not None:
        width = prompt_mask.shape[1]
        prompt_mask = prompt_mask & (width + t - jnp.arange(width) < window)
        response_mask = t - column < window
    with_prompt = jnp.where(prompt_mask[:, None, None, None, :], with_prompt, LEAST)
    with_response = jnp.where((column <= t) & response_mask, with_response, LEAST)
    top = jnp.maximum(by_heads(with_prompt.max(-1)), with_response.max(-1))[..., None]
    prompt_weights, response_weights = jnp.exp(with_prompt - by_heads(top)), jnp.exp(with_response - top)
    total = by_heads(prompt_weights.sum(-1)) + response_weights.sum(-1)
    prompt_part = float_einsum("qkghp,qkpd->qkghd", prompt_weights.astype(q.dtype), prompt_v)
    response_part = float_einsum("qgkhr,qgkrd->qgkhd", response_weights.astype(q.dtype), response_v)
    return ((by_heads(prompt_part) + response_part) / total[..., None]).astype(q.dtype)
