"""The decoder (Qwen2/2.5, Qwen3, Llama 3, SmolLM2, Gemma 3) as pure functions of the parameter tree that
spec.py describes.

One layout serves scoring and learning: a prompt and its G responses in one row, `prompt | response 1 | … |
response G`. A response attends to its prompt and to itself, so the prompt is computed once for its group and
attention between responses is never computed. Decoding runs the same layer with a cache. Column t of every
result is about response token t.

`layer` is one layer's parameters by name. KV heads K, query heads H = K·h, head size D, states E.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8

from medrlvr_jax.model import attention, splash
from medrlvr_jax.model.architecture import DecoderConfig, RopeScaling
from medrlvr_jax.model.cpu import linear
from medrlvr_jax.model.spec import PARAMETERS
from medrlvr_jax.sharding import constrain, gather
from medrlvr_jax.types import Array, Params, Prompts, Vision

Layer = Mapping[str, Array]
# cosines and sines of the positions' angles
Rope = tuple[Float32[Array, "... D/2"], Float32[Array, "... D/2"]]


class KeysValues(NamedTuple):
    """A cache of one layer: of prompts [Q], or of samples [Q, G]. That of all layers has an axis L before.

    Keys lie with their positions last, so that a product with them runs along memory as one with the values
    does. The other order made decoding on CPU 1.18 times as slow.
    """

    keys: Float[Array, "... K D N"]
    values: Float[Array, "... K N D"]


class Column(NamedTuple):
    """What all layers read of the response column that is decoded."""

    t: Int[Array, ""]
    ropes: tuple[Rope, ...]  # `rope_tables` of the tokens' positions
    prompt_mask: Bool[Array, "Q P"]


class Row(NamedTuple):
    """What all layers read of whole rows, N = P + G·R (G = 0: prompts alone)."""

    ropes: tuple[Rope, ...]  # `rope_tables` of `positions`
    positions: Int[Array, "Q N *axes"]
    prompt_mask: Bool[Array, "Q P"]
    segments: Int[Array, "Q G R"] | None  # see `attention.plain`
    groups: int


FAR = jnp.iinfo(jnp.int32).max  # a window that no row leaves
# Padding has this token, which is beyond every vocabulary: it reads no row of the embedding and adds to no
# row's gradient.
NO_TOKEN = jnp.iinfo(jnp.int32).max
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True)}


def rms_norm(
    x: Float[Array, "*N D"], scale: Float[Array, " D"], eps: float, dtype: Any
) -> Float[Array, "*N D"]:
    """x / √(mean(x²) + eps) · scale over the last axis, computed in float32 and rounded once, to `dtype`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(dtype)


def norm(x: Float[Array, "*N D"], weight: Float[Array, " D"], cfg: DecoderConfig, dtype: Any) -> Array:
    """`rms_norm` with a parameter of the decoder as scale."""
    scale = weight.astype(jnp.float32) + cfg.norm_offset if cfg.norm_offset else weight
    return rms_norm(x, scale, cfg.norm_eps, dtype)


def rope_tables(positions: Int[Array, "*N"], cfg: DecoderConfig, by_axis: bool = False) -> tuple[Rope, ...]:
    """Cosines and sines [*N, D/2] of the rotary angles at `positions` (Su et al. 2021, arXiv 2104.09864).
    A model with `window` has a second pair of tables, for the layers of the window.

    `by_axis`: the positions are [*N, 3], and each frequency follows one axis (M-RoPE, arXiv 2409.12191).
    """
    each = positions[..., np.array(cfg.rope_axes)] if by_axis else positions[..., None]

    def tables(theta: float, scaling: RopeScaling | None) -> Rope:
        freqs = theta ** (-jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
        angles = each.astype(jnp.float32) * (scale_frequencies(freqs, scaling) if scaling else freqs)
        return jnp.cos(angles), jnp.sin(angles)

    of_all = tables(cfg.rope_theta, cfg.rope_scaling)
    return (of_all, tables(cfg.window.rope_theta, None)) if cfg.window else (of_all,)


def scale_frequencies(freqs: Float32[Array, " D/2"], scaling: RopeScaling) -> Float32[Array, " D/2"]:
    """Rotary frequencies after `RopeScaling`."""
    factor, low, high, length = scaling
    if low is None or high is None or length is None:
        return freqs / factor
    turns = length * freqs / (2 * jnp.pi)
    blend = jnp.clip((turns - low) / (high - low), 0, 1)
    return blend * freqs + (1 - blend) * freqs / factor


def rope_and_window(
    cfg: DecoderConfig, ropes: tuple[Rope, ...], layer: Int[Array, ""] | int, length: int
) -> tuple[Rope, Int[Array, ""] | None]:
    """The rotary tables of the layer with number `layer`, and the number of tokens to which a token attends
    there, itself included (`FAR`: all). None if a window changes nothing in rows of `length` positions.
    """
    if cfg.window is None:
        return ropes[0], None
    windowed = jnp.isin(layer, np.array(cfg.window.layers))
    rope = jax.tree.map(partial(jnp.where, windowed), ropes[1], ropes[0])
    return rope, jnp.where(windowed, cfg.window.size, FAR) if length > cfg.window.size else None


def rotate(x: Float[Array, "*N H D"], rope: Rope) -> Float32[Array, "*N H D"]:
    """Rotary embedding, in float32, of x in Hugging Face's half-split order."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (table[..., None, :] for table in rope)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def for_products(layer: Layer, cfg: DecoderConfig) -> Layer:
    """The layer with its matrices and adapters in the arithmetic's dtype and gathered along `fsdp`."""

    def ready(name: str, p: Array) -> Array:
        row = PARAMETERS[name]
        return p if row.keeps_dtype else gather(p.astype(cfg.execution.dtype), tuple(row.axes.split()))

    return {name: ready(name, p) for name, p in layer.items()}


def project(layer: Layer, cfg: DecoderConfig, x: Float[Array, "*N in"], name: str) -> Float[Array, "*N out"]:
    """x by a matrix with flattened input and output axes; where it is adapted, x·W + x·A·B·alpha/rank."""
    y = linear(x, layer[name].reshape(x.shape[-1], -1))
    if cfg.execution.int8:
        y = (y * layer[f"{name}_scale"].reshape(-1)).astype(y.dtype)
    lora = cfg.execution.lora
    if lora and name in lora.targets:
        low = linear(x, layer[f"{name}_a"].reshape(-1, lora.rank))
        y += linear(low, layer[f"{name}_b"].reshape(lora.rank, -1)) * (lora.alpha / lora.rank)
    return y


def queries_keys_values(
    layer: Layer, cfg: DecoderConfig, x: Float[Array, "Q N E"], rope: Rope
) -> tuple[Float[Array, "Q N K h D"], Float[Array, "Q N K D"], Float[Array, "Q N K D"]]:
    """The attention's inputs; queries come scaled by `query_size`^-½.

    Everything between the products is float32 and is rounded once, at the end: the gradient of a bias or of a
    norm's scale is a sum over all tokens, and a bfloat16 sum stops growing once it is 256 times as large as
    what is added.
    """
    dtype = cfg.execution.dtype
    x = norm(x, layer["attn_norm"], cfg, dtype)

    def heads(name: str) -> Array:
        y = project(layer, cfg, x, name).reshape(*x.shape[:2], -1, cfg.head_dim).astype(jnp.float32)
        if cfg.qkv_bias:
            y += layer[f"{name}_bias"].astype(jnp.float32)
        if cfg.qk_norm and name != "v":
            y = norm(y, layer[f"{name}_norm"], cfg, jnp.float32)
        return y

    q, k, v = heads("q"), heads("k"), heads("v")
    scale = (cfg.query_size or cfg.head_dim) ** -0.5
    q, k, v = (y.astype(dtype) for y in (rotate(q, rope) * scale, rotate(k, rope), v))
    q = constrain(q, "batch", None, "heads", None)
    k, v = constrain(k, "batch", None, "kv_heads", None), constrain(v, "batch", None, "kv_heads", None)
    return q.reshape(*q.shape[:2], cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_dim), k, v


def after_attention(
    layer: Layer, cfg: DecoderConfig, x: Float[Array, "Q N E"], attended: Float[Array, "Q N K h D"]
) -> Float[Array, "Q N E"]:
    """The output projection and the gated MLP, each added to the states."""

    def add(x: Array, y: Array, post_norm: str) -> Array:
        y = norm(y, layer[post_norm], cfg, jnp.float32) if cfg.post_norms else y
        return constrain(x + y, "batch", None, None)

    y = project(layer, cfg, attended.reshape(*attended.shape[:2], cfg.heads * cfg.head_dim), "o")
    x = add(x, y, "attn_post_norm")
    y = norm(x, layer["mlp_norm"], cfg, cfg.execution.dtype)
    y = ACTIVATIONS[cfg.activation](project(layer, cfg, y, "gate")) * project(layer, cfg, y, "up")
    return add(x, project(layer, cfg, constrain(y, "batch", None, "ffn"), "down"), "mlp_post_norm")


def run_layer(
    layer: Layer,
    cfg: DecoderConfig,
    x: Float[Array, "Q N E"],
    row: Row,
    number: Int[Array, ""],
) -> tuple[Float[Array, "Q N E"], KeysValues]:
    """The layer with this number over whole rows: states, and the cache of the prompts."""
    layer, width = for_products(layer, cfg), row.prompt_mask.shape[1]
    length = width + (x.shape[1] - width) // max(row.groups, 1)
    rope, window = rope_and_window(cfg, row.ropes, number, length)
    q, k, v = queries_keys_values(layer, cfg, x, rope)
    if not cfg.execution.splash:
        limit = None if window is None else attention.Window(row.positions, window)
        attended = attention.plain(q, k, v, row.prompt_mask, row.segments, row.groups, limit)
    else:
        attend = partial(splash.attend, q, k, v, row.prompt_mask, row.groups)
        within = partial(attend, window=cfg.window.size if cfg.window else None)
        attended = attend() if window is None else jax.lax.cond(window < FAR, within, attend)
    cache = KeysValues(k[:, :width].transpose(0, 2, 3, 1), v[:, :width].swapaxes(1, 2))
    return after_attention(layer, cfg, x, attended), cache


def step_layer(
    layer: Layer,
    cfg: DecoderConfig,
    x: Float[Array, "Q G E"],
    column: Column,
    prompt_cache: KeysValues,
    sample_cache: KeysValues,
    number: Int[Array, ""] | int,
) -> tuple[Float[Array, "Q G E"], KeysValues]:
    """The layer with this number over one token of each sample, whose keys and values go to column t of the
    samples' cache. Without `Execution.unroll`, that is the cache of all layers.
    """
    layer, stacked = for_products(layer, cfg), not cfg.execution.unroll
    length = column.prompt_mask.shape[1] + sample_cache.values.shape[-2]
    rope, window = rope_and_window(cfg, column.ropes, number, length)
    q, k, v = queries_keys_values(layer, cfg, x, rope)

    def put(cache: Array, new: Array, start: tuple) -> Array:
        new = new.astype(cache.dtype)
        if stacked:
            return jax.lax.dynamic_update_slice(cache, new[None], (number, *start))
        return jax.lax.dynamic_update_slice(cache, new, start)

    keys = put(sample_cache.keys, k[..., None], (0, 0, 0, 0, column.t))
    values = put(sample_cache.values, v[:, :, :, None], (0, 0, 0, column.t, 0))
    grown = of_layer = KeysValues(keys, values)
    if stacked:
        of_layer = KeysValues(*(jax.lax.dynamic_index_in_dim(y, number, keepdims=False) for y in grown))
    attended = attention.decode(q, prompt_cache, of_layer, column.prompt_mask, column.t, window)
    return after_attention(layer, cfg, x, attended), grown


def forward(
    params: Params,
    cfg: DecoderConfig,
    prompts: Prompts,
    tokens: Int[Array, "Q G R"] | None = None,
    segments: Int[Array, "Q G R"] | None = None,
    columns: Int[Array, "Q G R"] | None = None,
    keep_cache: bool = False,
) -> tuple[Float[Array, "Q N E"], KeysValues | None]:
    """Tokens to states after the last norm, N = P + G·R; with `keep_cache`, also all layers' cache of the
    prompts.

    Padding among `tokens` may be `NO_TOKEN`. `segments`: see `attention.plain`; `columns`: see `pack`.
    """
    packed, positions, groups = pack(prompts, tokens, columns)
    x = constrain(embed_lookup(params["embed"], packed, cfg), "batch", None, None)
    vision, deep = prompts.vision, 0
    if vision is not None:
        assert vision.features is not None
        x, deep = put_images(x, vision, 0), vision.features.shape[-1] // cfg.embed - 1
    ropes = rope_tables(positions, cfg, vision is not None)
    row = Row(ropes, positions, prompts.mask, segments, groups)

    @partial(jax.checkpoint, policy=REMAT[cfg.execution.remat], prevent_cse=False)
    def step(x: Array, inputs: tuple[Layer, Array]):
        layer, number = inputs
        x, cache = run_layer(layer, cfg, x, row, number)
        if vision is not None and deep:
            added = partial(put_images, x, vision, number + 1)
            x = jax.lax.cond(number < deep, added, lambda: x)
        return x, cache if keep_cache else None

    x, cache = jax.lax.scan(step, x, (params["layers"], jnp.arange(cfg.layers)))
    return norm(x, params["norm"], cfg, cfg.execution.dtype), cache


def put_images(
    x: Float32[Array, "Q N E"], vision: Vision, part: Int[Array, ""] | int
) -> Float32[Array, "Q N E"]:
    """The states plus the vision tower's features in the columns of images: 0 before the layers, where those
    states are zero, and part 1, 2, … after the first layers (DeepStack, arXiv 2406.04334).
    """
    slots, width = vision.slots[..., None], x.shape[-1]
    features = vision.features
    assert features is not None
    if features.shape[-1] > width:
        features = jax.lax.dynamic_slice_in_dim(features, part * width, width, axis=-1)
    seen = jnp.take_along_axis(features, jnp.maximum(slots, 0), axis=1).astype(x.dtype)
    seen = jnp.where(slots >= 0, seen, 0)
    return x + jnp.pad(seen, ((0, 0), (0, x.shape[1] - seen.shape[1]), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed_lookup(
    embed: Float[Array, "V E"], tokens: Int[Array, "Q N"], cfg: DecoderConfig
) -> Float32[Array, "Q N E"]:
    """States of tokens: rows rounded to the arithmetic's dtype, as float32; zero for `NO_TOKEN`.

    The states that layers add to (the residual stream) stay float32 from here to the last norm. If each layer
    rounded them to bfloat16, that alone would move the sampler's and the trainer's log-probs further apart
    than all products do together (measured in docs/pages/numbers/exactness.md).

    Each `fsdp` shard looks up its part of every state: the table and its gradient stay in shards. A row's
    gradient is summed in float32, whatever the dtypes of the states and of the table: a bfloat16 sum of ones
    ends at 256, and frequent tokens have thousands.
    """
    table, tokens = constrain(embed, "vocab", "embed_shard"), constrain(tokens, "replica", None)
    rows = table.at[tokens].get(mode="fill", fill_value=0)
    return constrain(to_states(rows, cfg), "replica", None, "embed_shard")


def to_states(rows: Float[Array, "*N E"], cfg: DecoderConfig) -> Float32[Array, "*N E"]:
    """Rows of the embedding as states, rounded to the arithmetic's dtype; so is the factor √E, as in
    transformers.
    """
    rows = rows.astype(cfg.execution.dtype)
    if cfg.scaled_embedding:
        rows = rows * jnp.asarray(cfg.embed**0.5, rows.dtype)
    return rows.astype(jnp.float32)


def _lookup_forward(embed, tokens, cfg):
    return embed_lookup(embed, tokens, cfg), (embed, tokens)


def _lookup_backward(cfg, saved, g):
    embed, tokens = saved
    if cfg.scaled_embedding:
        g = g * jnp.asarray(cfg.embed**0.5, cfg.execution.dtype).astype(g.dtype)
    g, tokens = constrain(g, "replica", None, "embed_shard"), constrain(tokens, "replica", None)
    total = constrain(jnp.zeros(embed.shape, jnp.float32), "vocab", "embed_shard")
    total = total.at[tokens].add(g.astype(jnp.float32), mode="drop")
    return constrain(total, "vocab", "embed_shard").astype(embed.dtype), None


embed_lookup.defvjp(_lookup_forward, _lookup_backward)


def pack(
    prompts: Prompts, tokens: Int[Array, "Q G R"] | None, columns: Int[Array, "Q G R"] | None
) -> tuple[Int[Array, "Q N"], Int[Array, "Q N *axes"], int]:
    """`prompt | response 1 | … | response G` as one row, N = P + G·R: its tokens, their positions, and G.

    Padding and images of the prompt become `NO_TOKEN`. `columns`: the column of each of `tokens` in its
    response; None: 0 … R − 1.
    """
    text = prompts.mask if prompts.vision is None else prompts.mask & (prompts.vision.slots < 0)
    known = jnp.where(text, prompts.tokens, NO_TOKEN)
    if tokens is None:
        return known, prompts.positions, 0
    rows, groups, length = tokens.shape
    after = prompts.next_position[:, None, None] + (jnp.arange(length) if columns is None else columns)
    after = jnp.broadcast_to(after, tokens.shape).reshape(rows, -1)
    if prompts.vision is not None:
        after = jnp.broadcast_to(after[..., None], (*after.shape, 3))
    packed = jnp.concatenate([known, tokens.reshape(rows, -1)], 1)
    return packed, jnp.concatenate([prompts.positions, after], 1), groups


def logits(params: Params, cfg: DecoderConfig, hidden: Float[Array, "*N E"]) -> Float32[Array, "*N V"]:
    """Scores of the vocabulary, not yet divided by a temperature."""
    name, axes = ("embed", "...e,ve->...v") if cfg.tied else ("head", "...e,ev->...v")
    table = params[name].astype(cfg.execution.dtype)
    return jnp.einsum(axes, hidden, table, preferred_element_type=jnp.float32)


def quantize(w: Float[Array, "..."], inputs: int) -> tuple[Int8[Array, "..."], Float32[Array, "*out"]]:
    """A matrix [in…, out…] as int8, and for each output channel a scale, its largest entry / 127."""
    axes = tuple(range(inputs))
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w).max(axes), 1e-30) / 127
    return jnp.round(w / scale).astype(jnp.int8), scale
