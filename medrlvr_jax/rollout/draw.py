"""Sampling a token from logits: noise, truncation, and the choice.

The noise is counter-based. A token's uniform number depends on (seed, batch, question, sample, position)
alone, so a sample does not depend on the padding or the mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from medrlvr_jax.config.schema import SampleConfig
from medrlvr_jax.model.scoring import entropy
from medrlvr_jax.types import Array

BLOCK = 128  # words per block of the two-level inverse CDF


def noise(key: Array, ids: Array, groups: int, length: int) -> Array:
    """Return one uniform number per (question, sample, position): float32 [Q, G, R]."""
    each = jax.vmap(jax.random.fold_in, (None, 0))
    of_question = lambda key: jax.vmap(each, (0, None))(each(key, jnp.arange(groups)), jnp.arange(length))
    return jax.vmap(jax.vmap(jax.vmap(jax.random.uniform)))(jax.vmap(of_question)(each(key, ids)))


def is_stop(token: Array, stop_ids: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.array(stop_ids, jnp.int32))


def draw_token(
    scores: Array, uniforms: Array, t: Array, sample: SampleConfig, stop_ids: tuple[int, ...]
) -> tuple[Array, Array, Array, Array]:
    """Draw one token per row from float32 logits `scores` [Q, G, V] and uniforms [Q, G].

    Returns tokens, their log-probs under the distribution they were drawn from, those under the policy at
    the same temperature, and the policy's entropy in nats: each [Q, G].
    """
    policy = scores / (sample.temperature or 1.0)
    policy_total = jax.nn.logsumexp(policy, axis=-1)
    allowed = policy
    if sample.min_new_tokens:
        forbidden = jnp.zeros(scores.shape[-1], bool).at[jnp.array(stop_ids)].set(True)
        allowed = jnp.where(forbidden & (t < sample.min_new_tokens), -jnp.inf, allowed)
    if sample.temperature == 0:
        token = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
        drawn = jnp.zeros(token.shape, jnp.float32)
    else:
        weights = truncate(jnp.exp(allowed - allowed.max(-1, keepdims=True)), sample.top_k, sample.top_p)
        token = inverse_cdf(weights, uniforms)
        drawn = jnp.log(pick(weights, token)) - jnp.log(weights.sum(-1))
    chosen = pick(policy, token) - policy_total
    return token, (drawn if truncated(sample) else chosen), chosen, entropy(policy, policy_total)


def truncated(sample: SampleConfig) -> bool:
    """Return whether the sampling distribution differs from the policy at this temperature."""
    return bool(sample.top_k or sample.top_p < 1 or sample.min_new_tokens or sample.temperature == 0)


def pick(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def truncate(weights: Array, top_k: int, top_p: float) -> Array:
    """Keep the k largest weights, then of these the smallest set with a share of top_p; set the rest to 0.
    Weights equal to the smallest one kept stay.

    This is exact and needs no sort: positive floats have the order of their bit patterns, so 31 bisections
    find the smallest weight to keep.
    """
    if top_k and top_k < weights.shape[-1]:
        weights = _keep_heaviest(weights, lambda heaviest: heaviest.sum(-1, dtype=jnp.int32) >= top_k)
    if top_p < 1:
        wanted = top_p * weights.sum(-1)
        weights = _keep_heaviest(weights, lambda heaviest: jnp.where(heaviest, weights, 0).sum(-1) >= wanted)
    return weights


def _keep_heaviest(weights: Array, enough: Callable[[Array], Array]) -> Array:
    """Keep weights at or above the highest threshold for which `enough(heaviest)` holds."""
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # enough at low, not at high
        middle = low + (high - low) // 2
        holds = enough(bits >= middle[..., None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    start = jnp.zeros(weights.shape[:-1], jnp.int32), jnp.full(weights.shape[:-1], 0x7F800000, jnp.int32)
    border, _ = jax.lax.fori_loop(0, 31, halve, start)
    return jnp.where(bits >= border[..., None], weights, 0.0)


def inverse_cdf(weights: Array, uniforms: Array) -> Array:
    """Return the first index at which the cumulative weights [..., V] exceed `uniforms` [...] of their sum,
    never one of weight 0.

    This needs one uniform number per row, not one Gumbel number per word. Sums over blocks and then inside a
    block are short, so their rounding errors are small.
    """
    padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -weights.shape[-1] % BLOCK)])
    blocks = padded.reshape(*weights.shape[:-1], -1, BLOCK)
    sums = blocks.sum(-1)
    ends = jnp.cumsum(sums, -1)
    target = uniforms * ends[..., -1]
    block = _first_above(ends, sums, target)
    start = jnp.where(block > 0, pick(ends, jnp.maximum(block - 1, 0)), 0.0)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    offset = _first_above(jnp.cumsum(inside, -1), inside, target - start)
    return (block * BLOCK + offset).astype(jnp.int32)


def _first_above(ends: Array, parts: Array, target: Array) -> Array:
    """Return the first index with a positive part at or after the point where the running sum `ends` exceeds
    target, or the last such index if there is none.

    The running sums are rounded, so they may grow, or exceed the target, at an index whose part is 0.
    """
    index, first = jnp.arange(parts.shape[-1]), (ends <= target[..., None]).sum(-1, keepdims=True)
    last = jnp.where(parts > 0, index, 0).max(-1, keepdims=True)
    return jnp.where((parts > 0) & (index >= first), index, last).min(-1)
