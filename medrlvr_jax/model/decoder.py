"""The decoder (Qwen2/2.5, Qwen3, Llama 3, SmolLM2, Gemma 3) as pure functions of the parameter tree that
spec.py describes.

Scoring and learning use one layout: a row holds a prompt and its G responses, `prompt | response 1 | … |
response G`. A response attends to its prompt and to itself. So the prompt is computed once for its group, and
attention between responses is not computed. Decoding runs the same layers with a cache. Column t of every
result belongs to response token t.

`layer` maps the names of one layer's parameters to arrays. Sizes: K KV heads, H = K·h query heads, head size
D, hidden size E.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Int8

from medrlvr_jax.model import attention, splash
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.cpu import linear
from medrlvr_jax.model.rope import UNLIMITED, Rope, rope_and_window, rope_tables, rotate
from medrlvr_jax.model.spec import PARAMETERS
from medrlvr_jax.sharding import constrain, gather
from medrlvr_jax.types import Array, Params, Prompts, Vision

Layer = Mapping[str, Array]


class KeysValues(NamedTuple):
    """The cache of one layer, for prompts [Q] or samples [Q, G]. A cache of all layers has a leading axis L.

    The position is the last axis of the keys, so that products with keys read memory in order. With the other
    order, decoding on CPU takes 1.18 times as long.
    """

    keys: Float[Array, "... K D N"]
    values: Float[Array, "... K N D"]


class Column(NamedTuple):
    """The inputs that all layers share while response column t is decoded."""

    t: Int[Array, ""]
    ropes: tuple[Rope, ...]  # `rope_tables` of the tokens' positions
    prompt_mask: Bool[Array, "Q P"]


class Row(NamedTuple):
    """The inputs that all layers share for whole rows of N = P + G·R tokens; G = 0 for prompts alone."""

    ropes: tuple[Rope, ...]  # `rope_tables` of `positions`
    positions: Int[Array, "Q N *axes"]
    prompt_mask: Bool[Array, "Q P"]
    segments: Int[Array, "Q G R"] | None  # see `attention.plain`
    groups: int


# The token of padding. It is beyond every vocabulary, so it has no row in the embedding and no gradient.
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
    """Return x / √(mean(x²) + eps) · scale over the last axis, computed in float32, as `dtype`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(dtype)


def norm(x: Float[Array, "*N D"], weight: Float[Array, " D"], cfg: DecoderConfig, dtype: Any) -> Array:
    """Apply `rms_norm` with a norm's weight as the model's family uses it."""
    scale = weight.astype(jnp.float32) + cfg.norm_offset if cfg.norm_offset else weight
    return rms_norm(x, scale, cfg.norm_eps, dtype)


def cast_and_gather(layer: Layer, cfg: DecoderConfig) -> Layer:
    """Cast a layer's matrices and adapters to the compute dtype and gather them along `fsdp`."""

    def ready(name: str, p: Array) -> Array:
        row = PARAMETERS[name]
        return p if row.keeps_dtype else gather(p.astype(cfg.execution.dtype), tuple(row.axes.split()))

    return {name: ready(name, p) for name, p in layer.items()}


def project(layer: Layer, cfg: DecoderConfig, x: Float[Array, "*N in"], name: str) -> Float[Array, "*N out"]:
    """Multiply x by a matrix: x·W, or with an adapter x·W + x·A·B·alpha/rank. Axes of W are flattened."""
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
    """Return the scaled queries, the keys and the values of attention.

    Biases, norms and rotation are float32, and their result is rounded once. The gradient of a bias or of a
    norm is a sum over all tokens, and a bfloat16 sum stops growing at 256 times the size of its terms.
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
    """Add the attention's output projection, then the output of the gated MLP, to the states."""

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
    """Run layer `number` over whole rows. Return the states and the cache of the prompts."""
    layer, width = cast_and_gather(layer, cfg), row.prompt_mask.shape[1]
    length = width + (x.shape[1] - width) // max(row.groups, 1)
    rope, window = rope_and_window(cfg, row.ropes, number, length)
    q, k, v = queries_keys_values(layer, cfg, x, rope)
    if not cfg.execution.splash:
        limit = None if window is None else attention.Window(row.positions, window)
        attended = attention.plain(q, k, v, row.prompt_mask, row.segments, row.groups, limit)
    else:
        attend = partial(splash.attend, q, k, v, row.prompt_mask, row.groups)
        within = partial(attend, window=cfg.window.size if cfg.window else None)
        attended = attend() if window is None else jax.lax.cond(window < UNLIMITED, within, attend)
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
    """Run layer `number` over one token of each sample. Return the states, and `sample_cache` with the keys
    and values of the token in column t.

    With `Execution.unroll`, `sample_cache` belongs to this layer, else to all layers.
    """
    layer, stacked = cast_and_gather(layer, cfg), not cfg.execution.unroll
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
    """Compute the states after the last norm, N = P + G·R. With `keep_cache`, also return the prompts' cache
    of all layers.

    Padding in `tokens` may be `NO_TOKEN`. `segments` is explained in `attention.plain`, `columns` in `pack`.
    """
    packed, positions, groups = pack(prompts, tokens, columns)
    x = constrain(embed_lookup(params["embed"], packed, cfg), "batch", None, None)
    vision, deep = prompts.vision, 0
    if vision is not None:
        assert vision.features is not None
        x, deep = add_image_features(x, vision, 0), vision.features.shape[-1] // cfg.embed - 1
    ropes = rope_tables(positions, cfg, vision is not None)
    row = Row(ropes, positions, prompts.mask, segments, groups)

    @partial(jax.checkpoint, policy=REMAT[cfg.execution.remat], prevent_cse=False)
    def step(x: Array, inputs: tuple[Layer, Array]):
        layer, number = inputs
        x, cache = run_layer(layer, cfg, x, row, number)
        if vision is not None and deep:
            added = partial(add_image_features, x, vision, number + 1)
            x = jax.lax.cond(number < deep, added, lambda: x)
        return x, cache if keep_cache else None

    x, cache = jax.lax.scan(step, x, (params["layers"], jnp.arange(cfg.layers)))
    return norm(x, params["norm"], cfg, cfg.execution.dtype), cache


def add_image_features(
    x: Float32[Array, "Q N E"], vision: Vision, part: Int[Array, ""] | int
) -> Float32[Array, "Q N E"]:
    """Add part `part` of the vision tower's features to the states in the columns of images.

    Part 0 is added before the layers, to states that are zero. Parts 1, 2, … are added after the first layers
    (DeepStack, arXiv 2406.04334).
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
    """Look up the first states of tokens. `NO_TOKEN` gives zeros.

    The residual stream is float32 from here to the last norm. Rounding it to bfloat16 in each layer would
    separate the log-probs of sampler and trainer more than all matrix products do together (measured in
    docs/pages/numbers/exactness.md).

    Each `fsdp` shard looks up its part of every state, so the table and its gradient stay sharded. The
    gradient of a row is summed in float32, since frequent tokens occur thousands of times and a bfloat16 sum
    of ones stops at 256.
    """
    table, tokens = constrain(embed, "vocab", "embed_shard"), constrain(tokens, "replica", None)
    rows = table.at[tokens].get(mode="fill", fill_value=0)
    return constrain(to_states(rows, cfg), "replica", None, "embed_shard")


def to_states(rows: Float[Array, "*N E"], cfg: DecoderConfig) -> Float32[Array, "*N E"]:
    """Round rows of the embedding to the compute dtype and return them as float32. A scaled embedding
    multiplies by √E in the compute dtype, as transformers does.
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
    """Join prompts and responses to rows of N = P + G·R tokens. Return the tokens, their positions, and G.

    Padding and images of the prompt become `NO_TOKEN`. `columns` holds the column of each token within its
    response; None stands for 0 … R − 1.
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
    """Return the logits of the vocabulary, before the temperature."""
    name, axes = ("embed", "...e,ve->...v") if cfg.tied else ("head", "...e,ev->...v")
    table = params[name].astype(cfg.execution.dtype)
    return jnp.einsum(axes, hidden, table, preferred_element_type=jnp.float32)


def quantize(w: Float[Array, "..."], inputs: int) -> tuple[Int8[Array, "..."], Float32[Array, "*out"]]:
    """Quantise a matrix [in…, out…] to int8. Each output channel's scale is its largest magnitude / 127."""
    axes = tuple(range(inputs))
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w).max(axes), 1e-30) / 127
    return jnp.round(w / scale).astype(jnp.int8), scale
