"""The decoder with cached keys and values, for the sampler: first the prompts, then one token of every sample
at a time.

Q questions, P prompt columns, G samples of each, R response columns, E states; L layers, K KV heads, head
size D.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from medrlvr_jax.model import decoder
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.decoder import Column, KeysValues, Layer
from medrlvr_jax.model.rope import Rope, rope_tables
from medrlvr_jax.model.spec import PARAMETERS
from medrlvr_jax.sharding import DECODE, constrain
from medrlvr_jax.types import Array, Params, Prompts

# With `Execution.unroll` a list with an item for each layer, else stacked along a leading axis.
Caches = list[KeysValues] | KeysValues
Layers = Sequence[Layer] | Layer


class Weights(NamedTuple):
    """What every step reads. It is made once, before the loop over tokens.

    With `unroll`, the stack is split into layers. On CPU and GPU a scan would copy each layer's weights and
    cache out of the stack at every token, which doubles the traffic of XLA's program for an H100 and takes
    1.3 times as long on CPU. On TPU they are read in place, and a scan compiles in a fraction of the time.
    """

    params: Params
    layers: Layers
    # `rope_tables` of all positions: inside the loop XLA:CPU would compute sines in each layer
    ropes: tuple[Rope, ...]


def prepare(params: Params, cfg: DecoderConfig, positions: int) -> Weights:
    """Return the weights for positions 0 … `positions` − 1. With `unroll`, layers are cast and gathered along
    `fsdp` one by one, so that there is never a second copy of the whole stack.
    """

    def cut(name: str, p: Array, i: int) -> Array:
        row = PARAMETERS[name]
        keep = row.keeps_dtype or p.dtype == jnp.int8
        return constrain(p[i] if keep else p[i].astype(cfg.execution.dtype), *row.axes.split(), table=DECODE)

    layers = params["layers"]
    if cfg.execution.unroll:
        layers = [{name: cut(name, p, i) for name, p in layers.items()} for i in range(cfg.layers)]
    return Weights(params, layers, rope_tables(jnp.arange(positions), cfg))


def prefill(params: Params, cfg: DecoderConfig, prompts: Prompts) -> tuple[Float[Array, "Q E"], Caches]:
    """Return the state at each prompt's last token, and the prompts' caches."""
    states, cache = decoder.forward(params, cfg, prompts, keep_cache=True)
    assert cache is not None
    if cfg.execution.unroll:
        return states[:, -1], [KeysValues(cache.keys[i], cache.values[i]) for i in range(cfg.layers)]
    return states[:, -1], cache


def empty_caches(cfg: DecoderConfig, rows: int, groups: int, length: int) -> Caches:
    """Return empty caches for `length` tokens of each sample."""
    unroll, dtype = cfg.execution.unroll, cfg.execution.dtype
    stack, axes = ((), ()) if unroll else ((cfg.layers,), (None,))
    shape, axes = (*stack, rows, groups, cfg.kv_heads), (*axes, "batch", None, "kv_heads", None, None)
    keys = constrain(jnp.zeros((*shape, cfg.head_dim, length), dtype), *axes)
    values = constrain(jnp.zeros((*shape, length, cfg.head_dim), dtype), *axes)
    return [KeysValues(keys, values)] * cfg.layers if unroll else KeysValues(keys, values)


def grow_caches(caches: Caches, length: int) -> Caches:
    """Return the same caches, extended to `length` tokens of each sample."""

    def grow(cache: KeysValues) -> KeysValues:
        more = length - cache.values.shape[-2]
        before = [(0, 0)] * (cache.keys.ndim - 2)
        keys = jnp.pad(cache.keys, [*before, (0, 0), (0, more)])
        return KeysValues(keys, jnp.pad(cache.values, [*before, (0, more), (0, 0)]))

    return grow(caches) if isinstance(caches, KeysValues) else [grow(cache) for cache in caches]


def decode_step(
    weights: Weights,
    cfg: DecoderConfig,
    tokens: Int[Array, "Q G"],
    prompts: Prompts,
    prompt_caches: Caches,
    caches: Caches,
    t: Int[Array, ""] | int,
) -> tuple[Float[Array, "Q G E"], Caches]:
    """Read the tokens of column t. Return the states that predict column t + 1, and the extended `caches`."""
    params, dtype = weights.params, cfg.execution.dtype
    x = constrain(decoder.to_states(params["embed"].astype(dtype)[tokens], cfg), "batch", None, None)
    ropes = jax.tree.map(lambda table: table[prompts.next_position + t][:, None], weights.ropes)
    column = Column(jnp.int32(t), ropes, prompts.mask)
    if cfg.execution.unroll:
        grown = []
        stacks = (cast(list, stack) for stack in (weights.layers, prompt_caches, caches))
        for number, (layer, prompt, cache) in enumerate(zip(*stacks, strict=True)):
            x, cache = decoder.step_layer(layer, cfg, x, column, prompt, cache, number)
            grown.append(cache)
    else:

        def step(carry, inputs):
            number, layer, prompt = inputs
            return decoder.step_layer(layer, cfg, carry[0], column, prompt, carry[1], number), None

        stack = jnp.arange(cfg.layers), weights.layers, prompt_caches
        (x, grown), _ = jax.lax.scan(step, (x, caches), stack)
    return decoder.norm(x, params["norm"], cfg, dtype), grown
