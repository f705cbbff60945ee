"""The decoder as the sampler uses it: prompts once, then one token of every sample at a time, with keys and values kept."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from medrlvr_jax.model.decoder import Block, Cache, Decoder, DecoderConfig, init, rms_norm
from medrlvr_jax.sharding import DECODE, constrain
from medrlvr_jax.types import Array, Params, Prompts


def prefill(params: Params, cfg: DecoderConfig, prompts: Prompts) -> tuple[Array, tuple[Array, Array]]:
    """The state after each prompt [Q, E], and the prompts' keys [L, Q, K, D, P] and values [L, Q, K, P, D]."""
    packed, cache = cast(tuple, Decoder(cfg, keep_cache=True).apply({"params": params}, prompts, None))
    return packed[:, -1], cache


def start_caches(cfg: DecoderConfig, prompt: tuple[Array, Array], groups: int, length: int) -> list[Cache] | Cache:
    """Room for `length` tokens of each sample beside what `prefill` keeps of the prompts: a cache per layer, or one of all."""
    layers = () if cfg.unroll else (cfg.layers,)
    rows = *layers, prompt[0].shape[1], groups, cfg.kv_heads
    axes = *(None for _ in layers), "batch", None, "kv_heads", None, None
    own_k = constrain(jnp.zeros((*rows, cfg.head_dim, length), cfg.dtype), *axes)
    own_v = constrain(jnp.zeros((*rows, length, cfg.head_dim), cfg.dtype), *axes)
    if cfg.unroll:
        return [Cache(prompt[0][i], prompt[1][i], own_k, own_v) for i in range(cfg.layers)]
    return Cache(*prompt, own_k, own_v)


def grow_caches(caches: Any, length: int) -> Any:
    """The same with room for `length` tokens of each sample."""

    def grow(own, axis):
        return jnp.pad(own, [(0, length - own.shape[i] if i == axis % own.ndim else 0) for i in range(own.ndim)])

    grown = [c._replace(own_k=grow(c.own_k, -1), own_v=grow(c.own_v, -2)) for c in (caches if isinstance(caches, list) else [caches])]
    return grown if isinstance(caches, list) else grown[0]


def decode_step(
    params: Params, cfg: DecoderConfig, layers: Any, rope: tuple[Array, Array], tokens: Array, prompts: Prompts, caches: Any, t
) -> tuple[Array, Any]:
    """Tokens [Q, G] drawn at column t -> the state [Q, G, E] that predicts column t + 1, and the grown caches.

    `rope` is `rope_tables` of the positions 0 … P + R − 1, made before the loop: inside it XLA:CPU takes sines again in each layer.

    With `unroll`, `layers` holds one parameter tree per layer (`split_layers`), sliced once outside the loop: on CPU and GPU a
    scan copies every layer's weights and cache out of the stack at each token (by XLA's own program for an H100: twice the traffic).
    On TPU they are read where they lie, and a scan compiles in a fraction of the time.
    """
    x = constrain(params["embed"].astype(cfg.dtype)[tokens].astype(jnp.float32), "batch", None, None)
    cos, sin = (table[prompts.next_position + t][:, None] for table in rope)

    def step(x, layer, cache, place=None):
        return Block(cfg).apply({"params": layer}, x, cos, sin, prompts.mask, cache, t, place, method="step")

    if cfg.unroll:
        grown = []
        for layer, cache in zip(layers, caches, strict=True):
            x, cache = step(x, layer, cache)
            grown.append(cache)
        return rms_norm(x, params["norm"], cfg.norm_eps, cfg.dtype), grown

    def one(carry, layer):
        x, own_k, own_v = carry
        place, weights, prompt_k, prompt_v = layer
        x, cache = cast(tuple[Array, Cache], step(x, weights, Cache(prompt_k, prompt_v, own_k, own_v), place))
        return (x, cache.own_k, cache.own_v), None

    stack = jnp.arange(cfg.layers), layers, caches.prompt_k, caches.prompt_v
    (x, own_k, own_v), _ = jax.lax.scan(one, (x, caches.own_k, caches.own_v), stack)
    return rms_norm(x, params["norm"], cfg.norm_eps, cfg.dtype), caches._replace(own_k=own_k, own_v=own_v)


def split_layers(params: Params, cfg: DecoderConfig) -> Any:
    """The layers' parameters as `decode_step` takes them. With `unroll`, each is cut out, cast and gathered along `fsdp` here, before the
    loop over tokens: no copy of all of them stands beside."""
    if not cfg.unroll:
        return params["layers"]
    axes = {name: box.names[1:] for name, box in jax.eval_shape(lambda: init(cfg, jax.random.key(0)))["layers"].items()}

    def cut(name: str, p: Array, i: int) -> Array:
        keep = name.endswith(("norm", "bias", "_scale")) or p.dtype == jnp.int8
        return constrain(p[i] if keep else p[i].astype(cfg.dtype), *axes[name], table=DECODE)

    return [{name: cut(name, p, i) for name, p in params["layers"].items()} for i in range(cfg.layers)]
