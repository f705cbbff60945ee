"""Jitted generation: prefill each prompt once, then a short chain of `while_loop`s until every row has
stopped.

Noise is counter-based: the uniform behind a token is a function of (seed, step, question, sample, position)
alone, so a sample is the same whatever the batch, the padding or the mesh.

Attention reads what is filled, about: the rows' own keys and values begin with room for an eighth (or so) of
the budget, and grow from loop to loop (`segment_ends`).

Rows that have stopped make room: when half of them have, the others move together into a loop of half the
width, and so on down a short ladder; where the room grows they come back. A row that moves takes along its
own copy of its prompt's keys and values, which its group shares before. Only on CPU, where a step costs what
its rows cost: on TPU and GPU it costs reading the weights, and each loop is one more to compile.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medrlvr_jax.config.schema import SampleConfig
from medrlvr_jax.model import decoder
from medrlvr_jax.model.decoder import Cache
from medrlvr_jax.model.scoring import entropy
from medrlvr_jax.model.spec import DecoderConfig
from medrlvr_jax.rollout import decode
from medrlvr_jax.sharding import batch_ways, by_rows, constrain
from medrlvr_jax.types import Array, Params, Prompts, Rollout

BLOCK = 128  # words per block of the two-level inverse CDF
SEGMENT = 128  # tokens: a budget below twice this has room for all from the start
NARROWEST = 4  # rows a device: below, reading the weights is all there is to a step
HALVINGS = 3  # each is another loop to compile


class State(NamedTuple):
    """Loop state before column t is drawn; columns below t are final. After the first narrowing Q counts
    rows, and G is 1.
    """

    t: Array  # int32 []
    drawn: Rollout
    running: Array  # bool [Q, G], no stop token yet
    uniforms: Array  # [Q, G, R], the noise behind each token
    limits: Array  # int32 [Q, G], tokens that a row may have
    prompts: Prompts
    caches: list[Cache] | Cache  # see `decode.start_caches`


@partial(jax.jit, static_argnames=("cfg", "sample", "stop_ids", "pad_id", "entropies"))
def generate(
    params: Params,
    cfg: DecoderConfig,
    prompts: Prompts,
    key: Array,
    sample: SampleConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
    limits: Array | None = None,
    entropies: bool = False,
) -> Rollout:
    """Draw `sample.samples` responses to each prompt; `key` is the step's, `fold_in(key(seed), step)`.

    The stop token is part of the response. Log-probs are recorded where a token is drawn: under the
    distribution it was drawn from, and, where top-k, top-p, greedy choice or a minimum length make that
    another one, under the policy itself. `limits` int32 [Q, G] ends single rows before `max_new_tokens`. With
    `entropies`, the policy's at each token is recorded too.
    """
    rows, groups, length = prompts.tokens.shape[0], sample.samples, sample.max_new_tokens
    truncated = bool(sample.top_k or sample.top_p < 1 or sample.min_new_tokens or sample.temperature == 0)
    with jax.named_scope("prefill"):
        last, prompt_cache = decode.prefill(params, cfg, prompts)
    layers, ends = decode.split_layers(params, cfg), segment_ends(length)
    rope = decoder.rope_tables(jnp.arange(prompts.tokens.shape[1] + length), cfg)
    zeros = jnp.zeros((rows, groups, length), jnp.float32)
    tokens = jnp.full((rows, groups, length), pad_id, jnp.int32)
    state = State(
        t=jnp.int32(0),
        drawn=Rollout(
            tokens,
            jnp.zeros(tokens.shape, bool),
            zeros,
            zeros if truncated else None,
            zeros if entropies else None,
        ),
        running=jnp.ones((rows, groups), bool),
        uniforms=noise(key, prompts.ids, groups, length),
        limits=jnp.full((rows, groups), length) if limits is None else jnp.minimum(limits, length),
        prompts=prompts,
        caches=decode.start_caches(cfg, prompt_cache, groups, ends[0]),
    )

    def record(state: State, hidden: Array) -> State:
        """Draw column t from the states [Q, G, E] before it."""
        scores = constrain(decoder.logits(params, cfg, hidden), "batch", None, "vocab")
        uniforms = jax.lax.dynamic_index_in_dim(state.uniforms, state.t, axis=2, keepdims=False)
        token, drawn, policy, spread = draw(scores, uniforms, state.t, sample, stop_ids)
        own = lambda x: jnp.where(state.running, x, 0.0)
        put = lambda x, column: jax.lax.dynamic_update_slice_in_dim(x, column[:, :, None], state.t, axis=2)
        d = state.drawn
        columns = Rollout(
            tokens=put(d.tokens, jnp.where(state.running, token, pad_id)),
            mask=put(d.mask, state.running),
            logprobs=put(d.logprobs, own(drawn)),
            policy_logprobs=put(d.policy_logprobs, own(policy)) if truncated else None,
            entropy=put(d.entropy, own(spread)) if entropies else None,
        )
        running = state.running & ~is_stop(token, stop_ids) & (state.t + 1 < state.limits)
        return state._replace(t=state.t + 1, drawn=columns, running=running)

    def body(state: State) -> State:
        token = jax.lax.dynamic_index_in_dim(state.drawn.tokens, state.t - 1, axis=2, keepdims=False)
        hidden, caches = decode.decode_step(
            params, cfg, layers, rope, token, state.prompts, state.caches, state.t - 1
        )
        return record(state._replace(caches=caches), hidden)

    shards = batch_ways(rows)

    def finish(state: State, halvings: int, begin: int, until: int) -> State:
        """Draw the columns from `begin` (some may be there) to below `until`, or until no row runs."""
        width = state.running.size // shards
        narrower = width // 2 if halvings and width % 2 == 0 and width // 2 >= NARROWEST else 0
        busy = lambda s: s.running.reshape(shards, -1).sum(1).max()
        # so written because it is what a plan may read from the condition: see flops.py and hlo.py
        rounds = until - begin
        state = jax.lax.while_loop(lambda s: (s.t - begin < rounds) & (busy(s) > narrower), body, state)
        if not narrower:
            return state
        place = jnp.argsort(~state.running.reshape(shards, -1), axis=1, stable=True)[:, :narrower]
        return put_rows(state, place, finish(take_rows(state, place), halvings - 1, begin, until))

    with jax.named_scope("decode"):
        state = record(state, jnp.broadcast_to(last[:, None], (rows, groups, cfg.embed)))
        for end, (begin, until) in zip(ends, loops(length), strict=True):
            state = state._replace(caches=decode.grow_caches(state.caches, end))
            state = finish(state, HALVINGS if cfg.execution.narrow else 0, begin, until)
    return by_rows(state.drawn)


def segment_ends(length: int) -> list[int]:
    """How many tokens the rows' own caches have room for, loop by loop: the budget, its half, … down to less
    than 2 · SEGMENT.
    """
    ends = [length]
    while ends[0] >= 2 * SEGMENT:
        ends.insert(0, -(-ends[0] // 2))
    return ends


def loops(length: int) -> list[tuple[int, int]]:
    """The columns that each loop draws, from and to; the first of all is drawn before them.

    A token's keys are stored when the one after it is drawn: with room for `end`, column `end` can still be.
    """
    ends = [1, *(min(end + 1, length) for end in segment_ends(length))]
    return list(pairwise(ends))


def take_rows(state: State, place: Array) -> State:
    """The rows at `place` [shards, n], places among a shard's rows: [shards·n, 1, …] of what is a row's,
    [shards·n, …] of a question's.
    """
    groups = state.running.shape[1]

    def take(x, place):
        split = constrain(x.reshape(place.shape[0], -1, *x.shape[1:]), "batch", *[None] * x.ndim)
        return jax.vmap(lambda x, i: x[i])(split, place).reshape(-1, *x.shape[1:])

    def of_question(x):
        return take(x, place // groups)

    def of_row(x):
        return take(x.reshape(-1, *x.shape[2:]), place)[:, None]

    caches = [
        Cache(of_question(c.prompt_k), of_question(c.prompt_v), of_row(c.own_k), of_row(c.own_v))
        for c in state.caches
    ]
    return state._replace(
        drawn=jax.tree.map(of_row, state.drawn),
        running=of_row(state.running),
        uniforms=of_row(state.uniforms),
        limits=of_row(state.limits),
        prompts=jax.tree.map(of_question, state.prompts),
        caches=caches,
    )


def put_rows(state: State, place: Array, rows: State) -> State:
    """`state` after its rows at `place` [shards, n] went on as `rows` [shards·n, 1, …]."""

    def put(x, new):
        split = constrain(x.reshape(place.shape[0], -1, *x.shape[2:]), "batch", *[None] * (x.ndim - 1))
        new = new.reshape(*place.shape, *x.shape[2:])
        return jax.vmap(lambda x, i, new: x.at[i].set(new))(split, place, new).reshape(x.shape)

    caches = [
        c._replace(own_k=put(c.own_k, n.own_k), own_v=put(c.own_v, n.own_v))
        for c, n in zip(state.caches, rows.caches, strict=True)
    ]
    drawn, running = jax.tree.map(put, (state.drawn, state.running), (rows.drawn, rows.running))
    return state._replace(t=rows.t, drawn=drawn, running=running, caches=caches)


def noise(key: Array, ids: Array, groups: int, length: int) -> Array:
    """One uniform per (question, sample, position): [Q, G, R]."""
    each = jax.vmap(jax.random.fold_in, (None, 0))
    of_question = lambda key: jax.vmap(each, (0, None))(each(key, jnp.arange(groups)), jnp.arange(length))
    return jax.vmap(jax.vmap(jax.vmap(jax.random.uniform)))(jax.vmap(of_question)(each(key, ids)))


def is_stop(token: Array, stop_ids: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.array(stop_ids, jnp.int32))


def draw(
    scores: Array, uniforms: Array, t: Array, sample: SampleConfig, stop_ids: tuple[int, ...]
) -> tuple[Array, Array, Array, Array]:
    """One token per row from float32 scores [Q, G, V] and uniforms [Q, G]; its log-prob as drawn, and under
    the policy (at the same temperature); the policy's entropy.
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
    truncated = sample.top_k or sample.top_p < 1 or sample.min_new_tokens or sample.temperature == 0
    return token, (drawn if truncated else chosen), chosen, entropy(policy, policy_total)


def pick(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def truncate(weights: Array, top_k: int, top_p: float) -> Array:
    """Zero all but the top k, then all but the smallest set that holds top_p of the rest; ties at the border
    stay.

    Exact and without a sort: positive floats order as their bit patterns do, so 31 halvings find the border
    itself.
    """
    if top_k and top_k < weights.shape[-1]:
        weights = _keep_heaviest(weights, lambda kept: kept.sum(-1, dtype=jnp.int32) >= top_k)
    if top_p < 1:
        wanted = top_p * weights.sum(-1)
        weights = _keep_heaviest(weights, lambda kept: jnp.where(kept, weights, 0).sum(-1) >= wanted)
    return weights


def _keep_heaviest(weights: Array, enough) -> Array:
    """Keep weights at or above the highest border at which `enough(kept)` still holds."""
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
    """The index whose share of the cumulative weights [..., V] holds `uniforms` [...] of the total; never one
    of weight 0.

    One uniform per row in place of a Gumbel per word. Two levels (blocks, then inside one) keep the sums
    short and exact.
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
    """The first index that weighs anything from where the running end exceeds target on; past the end, the
    last one that does.

    Running ends are rounded, each in its own order: they may grow, or pass the target, at an index of weight
    0.
    """
    index, first = jnp.arange(parts.shape[-1]), (ends <= target[..., None]).sum(-1, keepdims=True)
    last = jnp.where(parts > 0, index, 0).max(-1, keepdims=True)
    return jnp.where((parts > 0) & (index >= first), index, last).min(-1)
