"""Attention over `prompt | response 1 | … | response G`: a token attends to its prompt and to the tokens
before it in its own response.

Scores between two responses are never computed. splash.py does the same by a TPU kernel. Sizes: K KV heads,
K·h query heads, head size D. Queries are already scaled.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medrlvr_jax.types import Array

MASKED = jnp.finfo(jnp.float32).min  # the score of a masked pair
CHUNK = 128  # the least number of queries of a chunk in `causal`


class Window(NamedTuple):
    """Limits attention to the last `size` positions, the token's own included."""

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
    """Compute attention of q [Q, N, K, h, D] to k and v [Q, N, K, D]. The result is [Q, N, K, h, D].

    N = P + G·R with G = `groups`; prompt_mask is [Q, P]. With `segments` [Q, G, R], a row's responses are
    packed one after another, and a token attends only within its own segment. Heads are moved to the front
    once, so that no product has to transpose its scores.
    """
    width = prompt_mask.shape[1]

    # Returns [Q, K, n, h, R, D] and twice [Q, K, n, R, D].
    def split(part: slice, n: int) -> tuple[Array, Array, Array]:
        x, y, z = (y[:, part].reshape(y.shape[0], n, -1, *y.shape[2:]) for y in (q, k, v))
        return jnp.moveaxis(x, (3, 4), (1, 3)), jnp.moveaxis(y, 3, 1), jnp.moveaxis(z, 3, 1)

    def join(y: Array) -> Array:  # [Q, K, n, h, R, D] → [Q, n·R, K, h, D]
        y = jnp.moveaxis(y, (1, 3), (3, 4))
        return y.reshape(y.shape[0], -1, *y.shape[3:])

    def in_window(queries: slice, n: int, keys: slice, m: int) -> Array | bool:  # [Q, 1, n, 1, R, S]
        if window is None:
            return True
        query, key = (window.positions[:, p].reshape(len(q), i, -1) for p, i in ((queries, n), (keys, m)))
        return query[:, None, :, None, :, None] - key[:, None, :, None, None, :] < window.size

    prompt, responses = slice(None, width), slice(width, None)
    of_prompt, real = split(prompt, 1), prompt_mask[:, None, None, None, None, :]
    attended = join(causal(*of_prompt, real & in_window(prompt, 1, prompt, 1)))
    if not groups:
        return attended
    same_segment = (
        jnp.ones((1,) * 6, bool)
        if segments is None
        else (segments[..., :, None] == segments[..., None, :])[:, None, :, None]
    )
    keep = same_segment & in_window(responses, groups, responses, groups)
    seen = real & in_window(responses, groups, prompt, 1)
    shared = of_prompt[1][:, :, 0], of_prompt[2][:, :, 0], seen
    return jnp.concatenate([attended, join(causal(*split(responses, groups), keep, shared))], axis=1)


def causal(
    q: Array, k: Array, v: Array, keep: Array, shared: tuple[Array, Array, Array] | None = None
) -> Array:
    """Compute causal attention of q [Q, K, n, h, N, D] to k and v [Q, K, n, N, D] where `keep` is True, and
    to all of `shared`.

    `shared` holds k and v [Q, K, P, D], the same for all n, and their own mask. Both masks broadcast to the
    scores. The queries are split into up to four chunks, each with the keys up to its end, so that 6 of
    4 × 4 blocks of scores are not computed.
    """
    rows, kv_heads, n, _, length, _ = q.shape
    chunk, out = max(CHUNK, -(-length // (4 * CHUNK)) * CHUNK), []
    flat = lambda y, *axes: y.reshape(rows, kv_heads, *axes, -1, y.shape[-1])
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        part = q[..., start:end, :]
        order = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        keeps = order & of_queries(keep, start, end)[..., :end]
        shape, (part_k, part_v) = part.shape[:-1], (y[..., :end, :] for y in (k, v))
        scores = [(products(flat(part, n), part_k).reshape(*shape, end), keeps)]
        if shared:
            scores.append(
                (products(flat(part), shared[0]).reshape(*shape, -1), of_queries(shared[2], start, end))
            )
        weights, total = exp_weights(scores)
        mix = weighted_sum(flat(weights[0], n), part_v).reshape(part.shape)
        if shared:
            mix += weighted_sum(flat(weights[1]), shared[1]).reshape(part.shape)
        out.append((mix / total).astype(q.dtype))
    return jnp.concatenate(out, axis=-2)


def of_queries(mask: Array, start: int, end: int) -> Array:
    """Slice a mask [..., N or 1, P] to the queries from `start` to `end`."""
    return mask[..., start:end, :] if mask.shape[-2] > 1 else mask


# Scores, weights and sums of values are float32: bfloat16 would change a score of 40 by up to 0.125, and its
# weight by 13 %. Only the inputs of products are rounded to the dtype of q, k and v. The two functions below
# do so in the backward pass, too. Autodiff would multiply float32 gradients there, which takes twice as long
# on a GPU.
float_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def products(q: Array, k: Array) -> Array:
    """Return q·kᵀ of q [..., N, D] and k [..., P, D] as float32 [..., N, P]."""
    return float_einsum("...nd,...pd->...np", q, k)


@jax.custom_vjp
def weighted_sum(weights: Array, v: Array) -> Array:
    """Round float32 weights [..., N, P] to v's dtype and return weights·v, float32 [..., N, D]."""
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


def exp_weights(parts: list[tuple[Array, Array]]) -> tuple[list[Array], Array]:
    """Compute a float32 softmax over the last axes of all parts, without its division: return the weights of
    each part, and their total.

    A part is scores and their mask. In a row without any True (padding) all weights are 1, so that nothing
    becomes NaN.
    """
    scores = [jnp.where(keep, x, MASKED) for x, keep in parts]
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
    """Compute attention of one token of each sample, q [Q, G, K, h, D], to its prompt and its response.

    `prompt` holds keys [Q, K, D, P] and values [Q, K, P, D]; `response` holds keys [Q, G, K, D, R] and values
    [Q, G, K, R, D], of which columns 0 … t are used. Both share one softmax. `window` is the number of tokens
    that the token attends to; None stands for all.
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
    with_prompt = jnp.where(prompt_mask[:, None, None, None, :], with_prompt, MASKED)
    with_response = jnp.where((column <= t) & response_mask, with_response, MASKED)
    top = jnp.maximum(by_heads(with_prompt.max(-1)), with_response.max(-1))[..., None]
    prompt_weights, response_weights = jnp.exp(with_prompt - by_heads(top)), jnp.exp(with_response - top)
    total = by_heads(prompt_weights.sum(-1)) + response_weights.sum(-1)
    prompt_part = float_einsum("qkghp,qkpd->qkghd", prompt_weights.astype(q.dtype), prompt_v)
    response_part = float_einsum("qgkhr,qgkrd->qgkhd", response_weights.astype(q.dtype), response_v)
    return ((by_heads(prompt_part) + response_part) / total[..., None]).astype(q.dtype)
