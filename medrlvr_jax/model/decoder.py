"""The decoder (Qwen2/2.5, Qwen3, Llama 3, SmolLM2) as pure functions of a parameter tree.

One layout serves scoring and learning: a prompt and its G responses side by side, `prompt | response 1 | … | response G`.
A response attends to its prompt and to itself, so the prompt is computed once for its group and the attention between
responses is never computed. Decoding is the same block with a cache. Column t of every result is about response token t.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from medrlvr_jax.config.schema import LoRAConfig
from medrlvr_jax.model import attention
from medrlvr_jax.sharding import constrain, gather
from medrlvr_jax.types import Array, Params, Prompts


class RopeScaling(NamedTuple):
    """Llama 3's stretching of the low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class DecoderConfig:
    """What config.json says, in our words."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float
    norm_eps: float
    tied: bool  # the output matrix is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = None  # the longest row that the model was made for; None: not known
    dtype: Any = jnp.float32
    remat: str = "full"
    splash: bool = False  # attention by the TPU's kernel: see attention.py
    unroll: bool = True  # decoding: see `decode_step`
    narrow: bool = True  # sampling: rows that have stopped make room, see generate.py
    value_head: bool = False  # a critic: one number per token in place of the vocabulary
    lora: LoRAConfig | None = None  # adapters beside the matrices: `<name>_a` and `<name>_b`
    int8: bool = False  # the matrices are int8, each output channel beside them scaled by `<name>_scale`: see `quantize`


class Cache(NamedTuple):
    """Keys and values of one layer, or of all with a leading layer axis."""

    prompt_k: Array  # [Q, KV, D, P]
    prompt_v: Array  # [Q, KV, P, D]
    own_k: Array  # [Q, G, KV, D, R]
    own_v: Array  # [Q, G, KV, R, D]


NO_TOKEN = jnp.iinfo(jnp.int32).max  # beyond every vocabulary: padding looks up no row of the embedding, and adds to no row's gradient
MATRICES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # of a layer: how many axes, from the left, are its input
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.custom_vjp
def linear(x: Array, w: Array) -> Array:
    """x [..., E] @ w [E, F]; the same gradient as autodiff's, with the weight's taken as xᵀ·g.

    Autodiff asks for gᵀ·x and a transpose, for which XLA:CPU recomputes g in a strided loop: an MLP's backward pass took twice as long.
    """
    return x @ w


def _linear_forward(x, w):
    return x @ w, (x, w)


def _linear_backward(saved, g):
    x, w = saved
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return (flat_g @ w.T).reshape(x.shape), jnp.einsum("ne,nf->ef", flat_x, flat_g)


linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(x: Array, scale: Array, eps: float, dtype: Any) -> Array:
    """x / √(mean(x²) + eps) · scale over the last axis, computed in float32 and rounded once, to `dtype`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(dtype)


def rope_tables(positions: Array, cfg: DecoderConfig) -> tuple[Array, Array]:
    """cos and sin [..., D/2] in float32 of positions [...]."""
    freqs = cfg.rope_theta ** (-jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
    if s := cfg.rope_scaling:
        turns = s.original_length * freqs / (2 * jnp.pi)
        blend = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        freqs = blend * freqs + (1 - blend) * freqs / s.factor
    angles = positions[..., None].astype(jnp.float32) * freqs
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding, in float32, of x [..., heads, D] in Hugging Face's half-split order."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nn.Module):
    """Attention and MLP of one layer; KV heads K, query heads H = K·h, head size D."""

    cfg: DecoderConfig
    keep_cache: bool = False

    def setup(self):
        c = self.cfg

        def weight(name, shape, axes, init) -> Any:
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        def whole(name, shape, axes, init) -> Any:
            return gather(weight(name, shape, axes, init).astype(c.dtype), axes)

        def matrix(name, shape, axes, init):
            """One of `MATRICES`; and where it is adapted, A (Gaussian, so that x·A is about as large as x) and B (zero), its factors."""
            setattr(self, name, whole(name, shape, axes, init))
            if c.int8:
                n = MATRICES[name]
                setattr(self, f"{name}_scale", weight(f"{name}_scale", shape[n:], axes[n:], ones))
            if c.lora and name in c.lora.targets:
                n, rank = MATRICES[name], c.lora.rank
                a = whole(f"{name}_a", (*shape[:n], rank), (*axes[:n], None), normal(prod(shape[:n]) ** -0.5))
                b = whole(f"{name}_b", (rank, *shape[n:]), (None, *axes[n:]), zeros)
                setattr(self, f"{name}_ab", (a, b))

        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        normal = nn.initializers.normal
        width, less = normal(c.embed**-0.5), (2 * c.layers) ** -0.5  # GPT-2: the residual branches start small
        self.attn_norm = weight("attn_norm", (c.embed,), (None,), ones)
        matrix("q", (c.embed, c.heads, c.head_dim), ("embed", "heads", "head_dim"), width)
        matrix("k", (c.embed, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), width)
        matrix("v", (c.embed, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), width)
        matrix("o", (c.heads, c.head_dim, c.embed), ("heads", "head_dim", "embed"), normal(less * (c.heads * c.head_dim) ** -0.5))
        if c.qkv_bias:
            self.q_bias = weight("q_bias", (c.heads, c.head_dim), ("heads", "head_dim"), zeros)
            self.k_bias = weight("k_bias", (c.kv_heads, c.head_dim), ("kv_heads", "head_dim"), zeros)
            self.v_bias = weight("v_bias", (c.kv_heads, c.head_dim), ("kv_heads", "head_dim"), zeros)
        if c.qk_norm:
            self.q_norm = weight("q_norm", (c.head_dim,), (None,), ones)
            self.k_norm = weight("k_norm", (c.head_dim,), (None,), ones)
        self.mlp_norm = weight("mlp_norm", (c.embed,), (None,), ones)
        matrix("gate", (c.embed, c.ffn), ("embed", "ffn"), width)
        matrix("up", (c.embed, c.ffn), ("embed", "ffn"), width)
        matrix("down", (c.ffn, c.embed), ("ffn", "embed"), normal(less * c.ffn**-0.5))

    def times(self, x, name):
        """x [..., in] by a matrix, flat: [..., out]; where it is adapted, x·W + x·A·B·alpha/rank."""
        c = self.cfg
        y = linear(x, getattr(self, name).reshape(x.shape[-1], -1))
        if c.int8:
            y = (y * getattr(self, f"{name}_scale").reshape(-1)).astype(y.dtype)
        if c.lora and name in c.lora.targets:
            a, b = getattr(self, f"{name}_ab")
            low = linear(x, a.reshape(-1, c.lora.rank))
            y += linear(low, b.reshape(c.lora.rank, -1)) * (c.lora.alpha / c.lora.rank)
        return y

    def project(self, x, cos, sin):
        """x [Q, N, E] -> q [Q, N, K, h, D], scaled; k and v [Q, N, K, D].

        Between the products everything is float32 and rounded once, at the end: the gradient of a bias or of a norm's scale is a sum
        over all tokens, which bfloat16 would stop adding to once it is 256 times as large as what is added.
        """
        c = self.cfg
        x = rms_norm(x, self.attn_norm, c.norm_eps, c.dtype)
        q, k, v = (self.times(x, name).reshape(*x.shape[:2], -1, c.head_dim).astype(jnp.float32) for name in ("q", "k", "v"))
        if c.qkv_bias:
            q, k, v = (y + bias.astype(jnp.float32) for y, bias in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        if c.qk_norm:
            q, k = (rms_norm(y, scale, c.norm_eps, jnp.float32) for y, scale in ((q, self.q_norm), (k, self.k_norm)))
        q, k, v = (y.astype(c.dtype) for y in (rotate(q, cos, sin) * c.head_dim**-0.5, rotate(k, cos, sin), v))
        q = constrain(q, "batch", None, "heads", None)
        k, v = constrain(k, "batch", None, "kv_heads", None), constrain(v, "batch", None, "kv_heads", None)
        return q.reshape(*q.shape[:2], c.kv_heads, c.heads // c.kv_heads, c.head_dim), k, v

    def finish(self, x, attended):
        """The output projection and the MLP, each with its residual; attended [Q, N, K, h, D]."""
        c = self.cfg
        x = x + self.times(attended.reshape(*attended.shape[:2], c.heads * c.head_dim), "o")
        x = constrain(x, "batch", None, None)
        y = rms_norm(x, self.mlp_norm, c.norm_eps, c.dtype)
        y = nn.silu(self.times(y, "gate")) * self.times(y, "up")
        x = x + self.times(constrain(y, "batch", None, "ffn"), "down")
        return constrain(x, "batch", None, None)

    def __call__(self, x, cos, sin, prompt_mask, segments, groups: int):
        """x [Q, P + G·R, E], prompt first; G = 0 where there are no responses. The prompt's part of a `Cache` if `keep_cache`.

        `segments`: see `attention.plain`.
        """
        width = prompt_mask.shape[1]
        q, k, v = self.project(x, cos, sin)
        if self.cfg.splash:
            attended = attention.splash(q, k, v, prompt_mask, groups)
        else:
            attended = attention.plain(q, k, v, prompt_mask, segments, groups)
        cache = (k[:, :width].transpose(0, 2, 3, 1), v[:, :width].swapaxes(1, 2)) if self.keep_cache else None
        return self.finish(x, attended), cache

    def step(self, x, cos, sin, prompt_mask, cache: Cache, t, layer=None):
        """One token of each sample: x [Q, G, E], written to column t of the cache; with `layer`, own_k and own_v are of all layers."""
        q, k, v = self.project(x, cos, sin)
        own_k, own_v = _put(cache.own_k, k[..., None], (0, 0, 0, 0, t), layer), _put(cache.own_v, v[:, :, :, None], (0, 0, 0, t, 0), layer)
        grown = Cache(cache.prompt_k, cache.prompt_v, own_k, own_v)
        if layer is not None:
            own_k, own_v = (jax.lax.dynamic_index_in_dim(y, layer, keepdims=False) for y in (own_k, own_v))
        attended = attention.decode(q, cache.prompt_k, cache.prompt_v, own_k, own_v, prompt_mask, t)
        return self.finish(x, attended), grown


def _put(cache: Array, new: Array, start: tuple, layer) -> Array:
    """`new` into one column of a layer's own keys or values, or of that layer's of all."""
    new = new.astype(cache.dtype)
    return (
        jax.lax.dynamic_update_slice(cache, new, start)
        if layer is None
        else jax.lax.dynamic_update_slice(cache, new[None], (layer, *start))
    )


def quantize(w: Array, inputs: int) -> tuple[Array, Array]:
    """One layer's matrix [in…, out…] with `inputs` input axes as int8 and its float32 scale [out…]; by the largest of each channel."""
    axes = tuple(range(inputs))
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w).max(axes), 1e-30) / 127
    return jnp.round(w / scale).astype(jnp.int8), scale


class Decoder(nn.Module):
    """The whole decoder without its output matrix: tokens in, hidden states out."""

    cfg: DecoderConfig
    keep_cache: bool = False

    @nn.compact
    def __call__(self, prompts: Prompts, tokens: Array | None, segments: Array | None = None, columns: Array | None = None):
        """tokens [Q, G, R] (padding may be `NO_TOKEN`) or None; for the others see `Block` and `pack`."""
        c = self.cfg
        normal = nn.initializers.normal(c.embed**-0.5)
        embed = self.param("embed", nn.with_logical_partitioning(normal, ("vocab", "embed")), (c.vocab, c.embed), jnp.float32)
        if c.value_head:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
            self.param("value", zeros, (c.embed + 1,), jnp.float32)
        elif not c.tied:
            self.param("head", nn.with_logical_partitioning(normal, ("embed", "vocab")), (c.embed, c.vocab), jnp.float32)
        packed, positions, groups = pack(prompts, tokens, columns)
        x = constrain(embed_lookup(embed, packed, c), "batch", None, None)
        cos, sin = rope_tables(positions, c)
        block = nn.remat(Block, policy=REMAT[c.remat], prevent_cse=False, static_argnums=(6,))
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # flax types the plain form only
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, cache = stack(c, self.keep_cache, name="layers")(x, cos, sin, prompts.mask, segments, groups)
        norm = self.param("norm", nn.with_logical_partitioning(nn.initializers.ones_init(), (None,)), (c.embed,), jnp.float32)
        return rms_norm(x, norm, c.norm_eps, c.dtype), cache


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed_lookup(embed: Array, tokens: Array, cfg: DecoderConfig) -> Array:
    """States [Q, N, E] of tokens [Q, N]: rows rounded to the arithmetic's dtype, as float32; zero for `NO_TOKEN`.

    The states that layers add to (the residual stream) stay float32 from here to the last norm. Rounded to bfloat16 at each layer,
    they alone put the sampler's and the trainer's log-probs further apart than all products do together
    (measured in docs/pages/numbers/exactness.md).

    Each `fsdp` shard looks up its part of every state: the table and its gradient stay in shards. A row's gradient is summed in
    float32, whatever the dtypes of the states and of the table: in bfloat16 a sum of ones ends at 256, and frequent tokens have thousands.
    """
    rows = constrain(embed, "vocab", "embed_shard").at[constrain(tokens, "replica", None)].get(mode="fill", fill_value=0)
    return constrain(rows.astype(cfg.dtype).astype(jnp.float32), "replica", None, "embed_shard")


def _lookup_forward(embed, tokens, cfg):
    return embed_lookup(embed, tokens, cfg), (embed, tokens)


def _lookup_backward(_, saved, g):
    embed, tokens = saved
    g, tokens = constrain(g, "replica", None, "embed_shard"), constrain(tokens, "replica", None)
    total = constrain(jnp.zeros(embed.shape, jnp.float32), "vocab", "embed_shard").at[tokens].add(g.astype(jnp.float32), mode="drop")
    return constrain(total, "vocab", "embed_shard").astype(embed.dtype), None


embed_lookup.defvjp(_lookup_forward, _lookup_backward)


def pack(prompts: Prompts, tokens: Array | None, columns: Array | None) -> tuple[Array, Array, int]:
    """`prompt | response 1 | … | response G`: tokens and positions [Q, P + G·R], and G. Padding of the prompt is `NO_TOKEN`.

    `columns` [Q, G, R] are 0 … R − 1 if not given.
    """
    known = jnp.where(prompts.mask, prompts.tokens, NO_TOKEN)
    if tokens is None:
        return known, prompts.positions, 0
    rows, groups, length = tokens.shape
    own = prompts.next_position[:, None, None] + (jnp.arange(length) if columns is None else columns)
    own = jnp.broadcast_to(own, tokens.shape).reshape(rows, -1)
    return jnp.concatenate([known, tokens.reshape(rows, -1)], 1), jnp.concatenate([prompts.positions, own], 1), groups


def init(cfg: DecoderConfig, key: Array) -> Params:
    """Random parameters with their logical axes (`nn.Partitioned`); `jax.eval_shape` it for shapes alone."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    prompts = Prompts(tokens, jnp.ones((1, 1), bool), jnp.zeros(1, jnp.uint32))
    return Decoder(cfg).init(key, prompts, tokens[:, None])["params"]


def logits(params: Params, cfg: DecoderConfig, hidden: Array) -> Array:
    """float32 [..., V] from states [..., E]."""
    if cfg.tied:
        return jnp.einsum("...e,ve->...v", hidden, params["embed"].astype(cfg.dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("...e,ev->...v", hidden, params["head"].astype(cfg.dtype), preferred_element_type=jnp.float32)
