"""Jitted generation: prefill each prompt once, then draw column after column until every row has stopped."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from medrlvr_jax.build import Parts
from medrlvr_jax.config.schema import SampleConfig
from medrlvr_jax.model import decoder
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.rollout import decode
from medrlvr_jax.rollout.draw import draw_token, is_stop, noise, truncated
from medrlvr_jax.rollout.loops import HALVINGS, Rows, State, columns_of_loops, run_loop, segment_ends
from medrlvr_jax.sharding import batch_ways, by_rows, constrain
from medrlvr_jax.types import Array, Params, Prompts, Rollout


@dataclass(frozen=True)
class DrawSettings:
    """The static arguments of `generate`."""

    cfg: DecoderConfig
    sample: SampleConfig
    stop_ids: tuple[int, ...]
    pad_id: int
    entropies: bool = False  # whether the policy's entropy at each token is recorded


def draw_settings(
    parts: Parts, cfg: DecoderConfig, sample: SampleConfig, entropies: bool = False
) -> DrawSettings:
    """Return the settings to draw from the decoder `cfg`."""
    return DrawSettings(cfg, sample, parts.tokenizer.stop_ids, parts.tokenizer.pad_id, entropies)


@partial(jax.jit, static_argnames="settings")
def generate(
    params: Params,
    prompts: Prompts,
    key: Array,
    settings: DrawSettings,
    limits: Int[Array, "Q G"] | None = None,
) -> Rollout:
    """Draw `sample.samples` responses to each prompt. `key`: the batch's (`step.batch_key`).

    The stop token is part of the response. Log-probs are those of the distribution that a token was drawn
    from. If top-k, top-p, greedy choice or a minimum length make it differ from the policy, the policy's are
    recorded, too. `limits`: the largest length of single rows, if below `max_new_tokens`.
    """
    cfg, groups, length = settings.cfg, settings.sample.samples, settings.sample.max_new_tokens
    n, width = prompts.tokens.shape
    with jax.named_scope("prefill"):
        last, prompt_caches = decode.prefill(params, cfg, prompts)
    prompts = prompts.with_vision(features=None, blank=None, images=None)  # their caches hold all of it
    weights, ends = decode.prepare(params, cfg, width + length), segment_ends(length)
    # rows can move between loops only if each layer has its own cache
    halvings = HALVINGS if cfg.execution.narrow and cfg.execution.unroll else 0
    caches = decode.empty_caches(cfg, n, groups, ends[0])
    rows = Rows(_blank(settings, (n, groups, length)), jnp.ones((n, groups), bool), caches)
    uniforms = noise(key, prompts.ids, groups, length)
    limits = jnp.full((n, groups), length) if limits is None else jnp.minimum(limits, length)
    state = State(jnp.int32(0), rows, uniforms, limits, prompts, prompt_caches)
    with jax.named_scope("decode"):
        state = _record(params, settings, state, jnp.broadcast_to(last[:, None], (n, groups, cfg.embed)))
        for end, columns in zip(ends, columns_of_loops(length), strict=True):
            rows = state.rows._replace(caches=decode.grow_caches(state.rows.caches, end))
            body = partial(_next_column, weights, settings)
            state = run_loop(body, state._replace(rows=rows), columns, batch_ways(n), halvings)
    return by_rows(state.rows.drawn)


def _blank(settings: DrawSettings, shape: tuple[int, ...]) -> Rollout:
    """Return a rollout without any token."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Rollout(
        tokens=jnp.full(shape, settings.pad_id, jnp.int32),
        mask=jnp.zeros(shape, bool),
        logprobs=zeros,
        policy_logprobs=zeros if truncated(settings.sample) else None,
        entropy=zeros if settings.entropies else None,
    )


def _next_column(weights: decode.Weights, settings: DrawSettings, state: State) -> State:
    """Read the tokens of column t − 1 and draw column t."""
    rows, before = state.rows, state.t - 1
    tokens = jax.lax.dynamic_index_in_dim(rows.drawn.tokens, before, axis=2, keepdims=False)
    prompts = state.prompts, state.prompt_caches
    hidden, caches = decode.decode_step(weights, settings.cfg, tokens, *prompts, rows.caches, before)
    state = state._replace(rows=rows._replace(caches=caches))
    return _record(weights.params, settings, state, hidden)


def _record(params: Params, settings: DrawSettings, state: State, hidden: Float[Array, "Q G E"]) -> State:
    """Draw column t from the states that predict it."""
    (drawn, running, caches), t = state.rows, state.t
    scores = constrain(decoder.logits(params, settings.cfg, hidden), "batch", None, "vocab")
    uniforms = jax.lax.dynamic_index_in_dim(state.uniforms, t, axis=2, keepdims=False)
    token, logprobs, policy_logprobs, entropy = draw_token(
        scores, uniforms, t, settings.sample, settings.stop_ids
    )
    under_policy = policy_logprobs if truncated(settings.sample) else None
    column = Rollout(token, running, logprobs, under_policy, entropy if settings.entropies else None)

    def put(x: Array, new: Array, blank: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(running, new, blank)[:, :, None], t, axis=2)

    drawn = jax.tree.map(put, drawn, column, _blank(settings, running.shape))
    running = running & ~is_stop(token, settings.stop_ids) & (t + 1 < state.limits)
    return state._replace(t=t + 1, rows=Rows(drawn, running, caches))
