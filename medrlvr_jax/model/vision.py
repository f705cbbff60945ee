"""The vision towers of Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): pixels to image tokens.

An image is cut into patches, and each square of merge × merge patches becomes one image token. The images of
a question lie in *windows* of 8 × 8 patches, one after another, so that every shape is static: Q questions, W
windows, S = 64 slots of a window, of which those at an image's edge may be empty. Qwen2.5-VL attends within a
window in most layers and within the image in a few, Qwen2-VL within the image in all. No patch ever sees
another image.

data/images.py makes `Images` on the host; the decoder reads the features in place of its embedding.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt8

from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import attention
from medrlvr_jax.model.decoder import rms_norm, rotate
from medrlvr_jax.model.spec import Parameter, VisionConfig
from medrlvr_jax.sharding import constrain, gather
from medrlvr_jax.types import Array, Params, pytree

EPS = 1e-6  # of all norms of the towers


@pytree
class Images:
    """The images of each question, in windows one after another."""

    pixels: UInt8[Array, "Q W S D"]  # of each patch: channel, row, column, flattened
    # of each patch: the number of its image within the question, or -1 in an empty slot; its row and column
    slots: Int32[Array, "Q W S 3"]


def rope_axes(sections: Sequence[int]) -> tuple[int, ...]:
    """The axis that each rotary frequency of the decoder follows: the first `sections[0]` time, then rows."""
    return tuple(axis for axis, n in enumerate(sections) for _ in range(n))


def read_config(config: Mapping[str, Any], folder: Path) -> VisionConfig:
    """The tower of a directory whose config.json holds `config`."""
    file, kind, said = folder / "config.json", config["model_type"], config.get("vision_config") or {}

    def need(key: str, where: Mapping[str, Any] = said, section: str = "vision_config.") -> Any:
        if where.get(key) is None:
            raise ConfigError(f"{file}: {section}{key}: needed, and not given")
        return where[key]

    new = kind == "qwen2_5_vl"
    layers, width = need("depth"), need("hidden_size" if new else "embed_dim")
    usual = {"hidden_act": "silu" if new else "quick_gelu", "in_channels": 3, "in_chans": 3}
    for key, value in usual.items():
        if said.get(key, value) != value:
            raise ConfigError(
                f"{file}: vision_config.{key}: {said[key]!r}: this tower computes only {value!r}"
            )
    patch, merge = said.get("patch_size", 14), said.get("spatial_merge_size", 2)
    window = need("window_size") // patch if new else 8
    if window % merge:
        raise ConfigError(f"{file}: vision_config.window_size: {window} patches do not divide by {merge}")
    top = partial(need, where=config, section="")
    return VisionConfig(
        kind=kind,
        layers=layers,
        embed=width,
        heads=need("num_heads"),
        ffn=need("intermediate_size") if new else int(width * need("mlp_ratio")),
        out=need("out_hidden_size" if new else "hidden_size"),
        image_token=top("image_token_id"),
        image_start=top("vision_start_token_id"),
        image_end=top("vision_end_token_id"),
        patch=patch,
        merge=merge,
        frames=said.get("temporal_patch_size", 2),
        window=window,
        full_layers=tuple(need("fullatt_block_indexes")) if new else tuple(range(layers)),
        **_read_preprocessor(folder / "preprocessor_config.json", patch, merge),
    )


def _read_preprocessor(file: Path, patch: int, merge: int) -> dict[str, Any]:
    """How the model's images are scaled, by preprocessor_config.json; the published values without one."""
    if not file.is_file():
        return {}
    said = json.loads(file.read_text(encoding="utf-8"))
    size = said.get("size") or {}
    fixed = {"patch_size": patch, "merge_size": merge, "do_resize": True, "do_normalize": True, "resample": 3}
    for key, value in fixed.items():
        if said.get(key, value) != value:
            raise ConfigError(f"{file}: {key}: {said[key]!r}: images are prepared with {value!r} alone")
    given = {
        "mean": said.get("image_mean"),
        "std": said.get("image_std"),
        "min_pixels": said.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": said.get("max_pixels") or size.get("longest_edge"),
    }
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v}


# ---- parameters ----

_new = lambda cfg: cfg.kind == "qwen2_5_vl"
_old = lambda cfg: cfg.kind == "qwen2_vl"


def _matrix(axes: str, inputs: str, tensor: str, tensor_axes: str, **more: Any) -> Parameter:
    return Parameter("matrix", axes, inputs, "normal", tensor, tensor_axes, **more)


def _bias(axes: str, tensor: str, **more: Any) -> Parameter:
    return Parameter("bias", axes, "", "zeros", tensor, f"({axes})", **more)


def _norm(tensor: str, **more: Any) -> Parameter:
    return Parameter("norm", "width", "", "ones", tensor, "width", **more)


# As spec.PARAMETERS, of the tower. A tensor's name follows "visual." or, of a layer, "visual.blocks.{i}.".
PARAMETERS = {
    "patch": _matrix(
        "channels frames rows columns embed",
        "channels frames rows columns",
        "patch_embed.proj.weight",
        "embed channels frames rows columns",
        stacked=False,
    ),
    "merge_norm": _norm("merger.ln_q.weight", stacked=False),
    "merge_norm_bias": _bias("width", "merger.ln_q.bias", stacked=False, exists=_old),
    "merge_in": _matrix(
        "square embed merged", "square embed", "merger.mlp.0.weight", "merged (square embed)", stacked=False
    ),
    "merge_in_bias": _bias("merged", "merger.mlp.0.bias", stacked=False),
    "merge_out": _matrix("merged out", "merged", "merger.mlp.2.weight", "out merged", stacked=False),
    "merge_out_bias": _bias("out", "merger.mlp.2.bias", stacked=False),
    "attn_norm": _norm("norm1.weight"),
    "attn_norm_bias": _bias("width", "norm1.bias", exists=_old),
    "qkv": _matrix("embed three heads head_dim", "embed", "attn.qkv.weight", "(three heads head_dim) embed"),
    "qkv_bias": _bias("three heads head_dim", "attn.qkv.bias"),
    "o": _matrix("heads head_dim embed", "heads head_dim", "attn.proj.weight", "embed (heads head_dim)"),
    "o_bias": _bias("width", "attn.proj.bias"),
    "mlp_norm": _norm("norm2.weight"),
    "mlp_norm_bias": _bias("width", "norm2.bias", exists=_old),
    "gate": _matrix("embed ffn", "embed", "mlp.gate_proj.weight", "ffn embed", exists=_new),
    "gate_bias": _bias("ffn", "mlp.gate_proj.bias", exists=_new),
    "up": _matrix("embed ffn", "embed", "mlp.up_proj.weight", "ffn embed", exists=_new),
    "up_bias": _bias("ffn", "mlp.up_proj.bias", exists=_new),
    "down": _matrix("ffn embed", "ffn", "mlp.down_proj.weight", "embed ffn", exists=_new),
    "down_bias": _bias("width", "mlp.down_proj.bias", exists=_new),
    "fc1": _matrix("embed ffn", "embed", "mlp.fc1.weight", "ffn embed", exists=_old),
    "fc1_bias": _bias("ffn", "mlp.fc1.bias", exists=_old),
    "fc2": _matrix("ffn embed", "ffn", "mlp.fc2.weight", "embed ffn", exists=_old),
    "fc2_bias": _bias("width", "mlp.fc2.bias", exists=_old),
}


def sizes(cfg: VisionConfig) -> dict[str, int]:
    """Logical axis → size."""
    of_patch = {"channels": 3, "frames": cfg.frames, "rows": cfg.patch, "columns": cfg.patch}
    square = cfg.merge**2
    of_layer = {"embed": cfg.embed, "width": cfg.embed, "three": 3, "heads": cfg.heads, "ffn": cfg.ffn}
    merger = {"square": square, "merged": square * cfg.embed, "out": cfg.out}
    return of_patch | of_layer | merger | {"head_dim": cfg.head_dim}


def path_of(name: str) -> tuple[str, ...]:
    """Where the parameter of a row lies in the tower's tree."""
    return ("layers", name) if PARAMETERS[name].stacked else (name,)


def abstract(cfg: VisionConfig) -> Params:
    """The tower's tree with shapes and logical axes in place of arrays, as `spec.abstract`."""
    size = sizes(cfg)

    def box(row: Parameter) -> nn.Partitioned:
        axes = tuple(row.axes.split())
        shape = tuple(size[axis] for axis in axes)
        if row.stacked:
            shape, axes = (cfg.layers, *shape), ("layers", *axes)
        return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)

    return unflatten_dict({path_of(name): box(row) for name, row in PARAMETERS.items() if row.exists(cfg)})


# ---- the forward pass ----


def normalize(pixels: Array, cfg: VisionConfig, xp: Any = jnp) -> Float32[Array, "*N D"]:
    """Patches [..., 3 · patch²] of 0 to 255 as float32 with the mean and deviation that the model was made
    for. With `xp` numpy it equals transformers' processor bit for bit.
    """
    repeat = lambda values: np.repeat(np.array(values, np.float32), cfg.patch**2)
    scaled = pixels.astype(xp.float32) / xp.float32(255)
    return (scaled - repeat(cfg.mean)) / repeat(cfg.std)


def _linear(x: Array, layer: Params, name: str, dtype: Any) -> Float32[Array, "*N out"]:
    """x by a matrix whose input axes are flattened, plus its bias; the sum is float32."""
    matrix: Array = gather(layer[name].astype(dtype), tuple(PARAMETERS[name].axes.split()))
    y = jnp.matmul(x.astype(dtype), matrix.reshape(x.shape[-1], -1), preferred_element_type=jnp.float32)
    return y + layer[f"{name}_bias"].astype(jnp.float32).reshape(-1)


def _norm_of(x: Array, layer: Params, name: str, cfg: VisionConfig, dtype: Any) -> Array:
    """RMSNorm (Qwen2.5-VL) or LayerNorm (Qwen2-VL), in float32."""
    if cfg.kind == "qwen2_5_vl":
        return rms_norm(x, layer[name], EPS, dtype)
    centred = x - x.mean(-1, keepdims=True)
    scaled = rms_norm(centred, layer[name], EPS, jnp.float32)
    return (scaled + layer[f"{name}_bias"].astype(jnp.float32)).astype(dtype)


def attend(
    q: Float[Array, "*B N H D"], k: Array, v: Array, owners: Int[Array, "*B N"]
) -> Float32[Array, "*B N H D"]:
    """Attention in both directions among the patches of one image; empty slots see one another alone."""
    q, k, v = (y.swapaxes(-2, -3) for y in (q, k, v))
    same = (owners[..., :, None] == owners[..., None, :])[..., None, :, :]
    (weights,), total = attention.weigh([(attention.products(q, k), same)])
    return (attention.weighted_sum(weights, v) / total).swapaxes(-2, -3)


def _block(
    layer: Params,
    cfg: VisionConfig,
    x: Float32[Array, "Q W S E"],
    rope: tuple[Array, Array],
    owners: Int[Array, "Q W S"],
    whole: Bool[Array, ""] | bool,
    dtype: Any,
) -> Float32[Array, "Q W S E"]:
    """One layer; `whole`: it attends within the image, not within the window."""
    y = _linear(_norm_of(x, layer, "attn_norm", cfg, dtype), layer, "qkv", dtype)
    q, k, v = jnp.moveaxis(y.reshape(*y.shape[:-1], 3, cfg.heads, cfg.head_dim), -3, 0)
    q, k, v = (y.astype(dtype) for y in (rotate(q, rope) * cfg.head_dim**-0.5, rotate(k, rope), v))
    flat = lambda y: y.reshape(y.shape[0], -1, *y.shape[3:])
    in_images = lambda: attend(flat(q), flat(k), flat(v), flat(owners)).reshape(v.shape)
    in_windows = lambda: attend(q, k, v, owners)
    y: Array = in_images() if whole is True else jax.lax.cond(whole, in_images, in_windows)
    x = x + _linear(y.reshape(x.shape), layer, "o", dtype)
    y = _norm_of(x, layer, "mlp_norm", cfg, dtype)
    if cfg.kind == "qwen2_5_vl":
        y = jax.nn.silu(_linear(y, layer, "gate", dtype)) * _linear(y, layer, "up", dtype)
        return x + _linear(y, layer, "down", dtype)
    y = _linear(y, layer, "fc1", dtype)
    return x + _linear(y * jax.nn.sigmoid(1.702 * y), layer, "fc2", dtype)


def tower(params: Params, cfg: VisionConfig, images: Images, dtype: Any) -> Float[Array, "Q T out"]:
    """Image tokens of all windows, T = W · S / merge², in the order of the slots, as `dtype`.

    Those of empty slots are finite and mean nothing.
    """
    owners, places = images.slots[..., 0], images.slots[..., 1:]
    weight = params["patch"].sum(1).reshape(-1, cfg.embed)  # over frames: a still image's are equal
    x = jnp.matmul(
        normalize(images.pixels, cfg).astype(dtype), weight.astype(dtype), preferred_element_type=jnp.float32
    )
    half = cfg.head_dim // 2
    freqs = 10000.0 ** (-jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    angles = (places[..., None].astype(jnp.float32) * freqs).reshape(*owners.shape, half)
    rope = jnp.cos(angles), jnp.sin(angles)
    flags = np.isin(np.arange(cfg.layers), cfg.full_layers)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    def step(x: Array, inputs: Any):
        layer, whole = inputs
        return _block(layer, cfg, x, rope, owners, True if flags.all() else whole, dtype), None

    x, _ = jax.lax.scan(step, constrain(x, "batch", None, None, None), (params["layers"], jnp.array(flags)))
    x = _norm_of(x, params, "merge_norm", cfg, dtype).reshape(len(x), -1, cfg.merge**2 * cfg.embed)
    x = jax.nn.gelu(_linear(x, params, "merge_in", dtype), approximate=False)
    return _linear(x, params, "merge_out", dtype).astype(dtype)
