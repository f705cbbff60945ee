"""The decoder as the sampler uses it: prompts first, then one token of every sample at a time, with keys and
values cached.

Q questions, P prompt columns, G samples of each, R response columns, E states; L layers, K KV heads, head
size D.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from medrlvr_jax.model import decoder
from medrlvr_jax.model.decoder import Cache, Layer, Rope
from medrlvr_jax.model.spec import PARAMETERS, DecoderConfig
from medrlvr_jax.sharding import DECODE, constrain
from medrlvr_jax.types import Array, Params, Prompts

Caches = list[Cache] | Cache  # one per layer, or one of all layers: see `decode_step`
Layers = list[Layer] | Layer  # one parameter tree per layer, or one of all layers
PromptCache = tuple[Float[Array, "L Q K D P"], Float[Array, "L Q K P D"]]  # keys and values


def prefill(params: Params, cfg: DecoderConfig, prompts: Prompts) -> tuple[Float[Array, "Q E"], PromptCache]:
    """The state after each prompt, and the prompts' keys and values."""
    states, cache = decoder.forward(params, cfg, prompts, keep_cache=True)
    assert cache is not None
    return states[:, -1], cache


def start_caches(cfg: DecoderConfig, prompt: PromptCache, groups: int, length: int) -> Caches:
    """Caches with room for `length` tokens of each sample beside the prompts' part."""
    unroll, dtype = cfg.execution.unroll, cfg.execution.dtype
    layers = () if unroll else (cfg.layers,)
    rows = *layers, prompt[0].shape[1], groups, cfg.kv_heads
    axes = *(None for _ in layers), "batch", None, "kv_heads", None, None
    own_k = constrain(jnp.zeros((*rows, cfg.head_dim, length), dtype), *axes)
    own_v = constrain(jnp.zeros((*rows, length, cfg.head_dim), dtype), *axes)
    if unroll:
        return [Cache(prompt[0][i], prompt[1][i], own_k, own_v) for i in range(cfg.layers)]
    return Cache(*prompt, own_k, own_v)


def grow_caches(caches: Caches, length: int) -> Caches:
    """The same caches with room for `length` tokens of each sample."""

    def grow(cache: Cache) -> Cache:
        more = length - cache.own_v.shape[-2]
        before = [(0, 0)] * (cache.own_k.ndim - 2)
        own_k = jnp.pad(cache.own_k, [*before, (0, 0), (0, more)])
        return cache._replace(own_k=own_k, own_v=jnp.pad(cache.own_v, [*before, (0, more), (0, 0)]))

    return grow(caches) if isinstance(caches, Cache) else [grow(cache) for cache in caches]


def decode_step(
    params: Params,
    cfg: DecoderConfig,
    layers: Layers,
    rope: Rope,
    tokens: Int[Array, "Q G"],
    prompts: Prompts,
    caches: Caches,
    t: Int[Array, ""] | int,
) -> tuple[Float[Array, "Q G E"], Caches]:
    """The tokens of column t → the states that predict column t + 1, and the caches with column t filled.

    `rope`: tables of the positions 0 … P + R − 1, made before the loop: inside it XLA:CPU computes sines in
    each layer.

    With `unroll`, `layers` holds one parameter tree per layer (`split_layers`), cut out once before the loop:
    on CPU and GPU a scan copies every layer's weights and cache out of the stack at each token (twice the
    traffic in XLA's program for an H100). On TPU they are read in place, and a scan compiles in a fraction of
    the time.
    """
    dtype = cfg.execution.dtype
    x = constrain(params["embed"].astype(dtype)[tokens].astype(jnp.float32), "batch", None, None)
    cos, sin = (table[prompts.next_position + t][:, None] for table in rope)

    def step(x: Array, layer: Layer, cache: Cache, place: Array | None = None) -> tuple[Array, Cache]:
        return decoder.step_layer(layer, cfg, x, (cos, sin), prompts.mask, cache, t, place)

    if not isinstance(caches, Cache):
        grown = []
        for layer, cache in zip(cast(list[Layer], layers), caches, strict=True):
            x, cache = step(x, layer, cache)
            grown.append(cache)
        return decoder.rms_norm(x, params["norm"], cfg.norm_eps, dtype), grown

    def one_layer(carry, inputs):
        x, own_k, own_v = carry
        place, layer, prompt_k, prompt_v = inputs
        x, cache = step(x, layer, Cache(prompt_k, prompt_v, own_k, own_v), place)
        return (x, cache.own_k, cache.own_v), None

    stack = jnp.arange(cfg.layers), layers, caches.prompt_k, caches.prompt_v
    (x, own_k, own_v), _ = jax.lax.scan(one_layer, (x, caches.own_k, caches.own_v), stack)
    return decoder.rms_norm(x, params["norm"], cfg.norm_eps, dtype), caches._replace(own_k=own_k, own_v=own_v)


def split_layers(params: Params, cfg: DecoderConfig) -> Layers:
    """The layers' parameters as `decode_step` takes them.

    With `unroll`, each is cut out, cast and gathered along `fsdp` before the loop over tokens, and no copy of
    the whole stack exists beside them.
    """
    if not cfg.execution.unroll:
        return params["layers"]

    def cut(name: str, p: Array, i: int) -> Array:
        row = PARAMETERS[name]
        keep = row.keeps_dtype or p.dtype == jnp.int8
        return constrain(p[i] if keep else p[i].astype(cfg.execution.dtype), *row.axes.split(), table=DECODE)

    return [{name: cut(name, p, i) for name, p in params["layers"].items()} for i in range(cfg.layers)]
