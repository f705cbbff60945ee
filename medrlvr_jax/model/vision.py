"""The vision towers of Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv
2511.21631): from pixels to image tokens.

An image is split into patches, and each square of merge × merge patches becomes one image token. The images
of a question are stored as *windows* of 8 × 8 patches, one after another, so that all shapes are static: Q
questions, W windows, S = 64 slots of a window. Slots beyond an image's edge are empty. Qwen2.5-VL attends
within a window in most layers and within the image in a few. The other towers attend within the image in all
layers. No patch attends to another image.

data/patches.py makes `Images` on the host; the decoder reads the features in place of its embedding.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import attention
from medrlvr_jax.model.architecture import DecoderConfig, VisionConfig
from medrlvr_jax.model.decoder import rms_norm
from medrlvr_jax.model.rope import rotate
from medrlvr_jax.model.spec import TOWER, VISION
from medrlvr_jax.sharding import batch_ways, constrain, gather, map_rows
from medrlvr_jax.types import Array, Images, Params

EPS = 1e-6  # of all norms of the towers
ACTIVATIONS = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}
# How images are scaled without a preprocessor_config.json, where it differs from `VisionConfig`'s defaults.
HALF = (0.5, 0.5, 0.5)
PIXELS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"mean": HALF, "std": HALF, "min_pixels": 2**16, "max_pixels": 2**24}
}
SCORES = 2**28  # the most attention scores of whole images that a device computes at a time: 1 GiB of float32


def read_config(config: Mapping[str, Any], folder: Path) -> VisionConfig:
    """Read the vision tower's settings. `config` is the content of `folder`/config.json."""
    file, kind, settings = folder / "config.json", config["model_type"], config.get("vision_config") or {}

    def need(key: str, where: Mapping[str, Any] = settings, section: str = "vision_config.") -> Any:
        if where.get(key) is None:
            raise ConfigError(f"{file}: {section}{key}: required, but not given")
        return where[key]

    first, windowed = kind == "qwen2_vl", kind == "qwen2_5_vl"
    layers, width = need("depth"), need("embed_dim" if first else "hidden_size")
    usual = {"hidden_act": ACTIVATIONS[kind], "in_channels": 3, "in_chans": 3}
    for key, value in usual.items():
        if settings.get(key, value) != value:
            raise ConfigError(
                f"{file}: vision_config.{key}: {settings[key]!r}: this tower computes only {value!r}"
            )
    patch, merge = (
        settings.get("patch_size", 16 if kind == "qwen3_vl" else 14),
        settings.get("spatial_merge_size", 2),
    )
    window = need("window_size") // patch if windowed else 8
    if window % merge:
        raise ConfigError(f"{file}: vision_config.window_size: {window} patches do not divide by {merge}")
    top = partial(need, where=config, section="")
    return VisionConfig(
        kind=kind,
        layers=layers,
        embed=width,
        heads=need("num_heads"),
        ffn=int(width * need("mlp_ratio")) if first else need("intermediate_size"),
        out=need("hidden_size" if first else "out_hidden_size"),
        image_token=top("image_token_id"),
        image_start=top("vision_start_token_id"),
        image_end=top("vision_end_token_id"),
        patch=patch,
        merge=merge,
        frames=settings.get("temporal_patch_size", 2),
        window=window,
        full_layers=tuple(need("fullatt_block_indexes")) if windowed else tuple(range(layers)),
        positions=math.isqrt(need("num_position_embeddings")) if kind == "qwen3_vl" else 0,
        deepstack=tuple(need("deepstack_visual_indexes")) if kind == "qwen3_vl" else (),
        **PIXELS.get(kind, {}) | _read_preprocessor(folder / "preprocessor_config.json", patch, merge),
    )


def _read_preprocessor(file: Path, patch: int, merge: int) -> dict[str, Any]:
    """Read how images are scaled. Without the file, return nothing."""
    if not file.is_file():
        return {}
    settings = json.loads(file.read_text(encoding="utf-8"))
    size = settings.get("size") or {}
    fixed = {"patch_size": patch, "merge_size": merge, "do_resize": True, "do_normalize": True, "resample": 3}
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise ConfigError(f"{file}: {key}: {settings[key]!r}: images are prepared only with {value!r}")
    scaling = {
        "mean": settings.get("image_mean"),
        "std": settings.get("image_std"),
        "min_pixels": settings.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": settings.get("max_pixels") or size.get("longest_edge"),
    }
    return {k: tuple(v) if isinstance(v, list) else v for k, v in scaling.items() if v}


# ---- the forward pass ----


def normalize(pixels: Array, cfg: VisionConfig, xp: Any = jnp) -> Float32[Array, "*N D"]:
    """Normalise patches [..., 3 · patch²] of values in [0, 255] to the mean and deviation of the model. With
    `xp` numpy, the result equals that of transformers' processor bit by bit.
    """
    repeat = lambda values: np.repeat(np.array(values, np.float32), cfg.patch**2)
    scaled = pixels.astype(xp.float32) / xp.float32(255)
    return (scaled - repeat(cfg.mean)) / repeat(cfg.std)


def _linear(x: Array, layer: Params, name: str, dtype: Any) -> Float32[Array, "*N out"]:
    """Return x·W + bias in float32. The input axes of W are flattened."""
    matrix: Array = gather(layer[name].astype(dtype), tuple(TOWER[name].axes.split()))
    y = jnp.matmul(x.astype(dtype), matrix.reshape(x.shape[-1], -1), preferred_element_type=jnp.float32)
    return y + layer[f"{name}_bias"].astype(jnp.float32).reshape(-1)


def _norm_of(x: Array, layer: Params, name: str, cfg: VisionConfig, dtype: Any) -> Array:
    """Apply RMSNorm (Qwen2.5-VL) or LayerNorm in float32."""
    if cfg.kind == "qwen2_5_vl":
        return rms_norm(x, layer[name], EPS, dtype)
    centred = x - x.mean(-1, keepdims=True)
    scaled = rms_norm(centred, layer[name], EPS, jnp.float32)
    return (scaled + layer[f"{name}_bias"].astype(jnp.float32)).astype(dtype)


def attend(
    q: Float[Array, "*B N H D"], k: Array, v: Array, owners: Int[Array, "*B N"]
) -> Float32[Array, "*B N H D"]:
    """Compute bidirectional attention between patches with the same owner: an image, or −1 (empty slots)."""
    q, k, v = (y.swapaxes(-2, -3) for y in (q, k, v))
    same = (owners[..., :, None] == owners[..., None, :])[..., None, :, :]
    (weights,), total = attention.exp_weights([(attention.products(q, k), same)])
    return (attention.weighted_sum(weights, v) / total).swapaxes(-2, -3)


def _block(
    layer: Params,
    cfg: VisionConfig,
    x: Float32[Array, "Q W S E"],
    rope: tuple[Array, Array],
    owners: Int[Array, "Q W S"],
    full: bool,
    dtype: Any,
) -> Float32[Array, "Q W S E"]:
    """Run one layer. With `full` it attends within the image, else within the window."""
    y = _linear(_norm_of(x, layer, "attn_norm", cfg, dtype), layer, "qkv", dtype)
    q, k, v = jnp.moveaxis(y.reshape(*y.shape[:-1], 3, cfg.heads, cfg.head_dim), -3, 0)
    q, k, v = (y.astype(dtype) for y in (rotate(q, rope) * cfg.head_dim**-0.5, rotate(k, rope), v))
    flat = lambda y: y.reshape(y.shape[0], -1, *y.shape[3:])
    y = attend(*map(flat, (q, k, v, owners))) if full else attend(q, k, v, owners)
    x = x + _linear(y.reshape(x.shape), layer, "o", dtype)
    y = _norm_of(x, layer, "mlp_norm", cfg, dtype)
    if cfg.kind == "qwen2_5_vl":
        y = jax.nn.silu(_linear(y, layer, "gate", dtype)) * _linear(y, layer, "up", dtype)
        return x + _linear(y, layer, "down", dtype)
    y = _linear(y, layer, "fc1", dtype)
    y = y * jax.nn.sigmoid(1.702 * y) if cfg.kind == "qwen2_vl" else jax.nn.gelu(y, approximate=True)
    return x + _linear(y, layer, "fc2", dtype)


def learned_positions(table: Array, slots: Int[Array, "*N 5"]) -> Float32[Array, "*N E"]:
    """Return Qwen3-VL's position embedding of each patch: its square table [side², E], interpolated
    bilinearly, with the corners of table and image aligned.
    """
    side = math.isqrt(len(table))
    at = slots[..., 1:3] * jnp.float32(side - 1) / jnp.maximum(slots[..., 3:] - 1, 1)
    low = jnp.floor(at).astype(jnp.int32)
    out = jnp.zeros((), jnp.float32)
    for step in np.ndindex(2, 2):
        place = jnp.minimum(low + np.array(step), side - 1)
        share = (1 - jnp.abs(at - low - np.array(step))).prod(-1)
        out += share[..., None] * table[place[..., 0] * side + place[..., 1]].astype(jnp.float32)
    return out


def _merge(x: Float[Array, "Q W S E"], params: Params, name: str, cfg: VisionConfig, dtype: Any) -> Array:
    """Merge each square of patches to one image token [Q, T, out]. The norm is applied to patches, or, in
    Qwen3-VL's further mergers (`deep`), to squares.
    """
    squares = lambda y: y.reshape(len(y), -1, cfg.merge**2 * cfg.embed)
    x = squares(x) if name == "deep" else x
    y = squares(_norm_of(x, params, f"{name}_norm", cfg, dtype))
    y = jax.nn.gelu(_linear(y, params, f"{name}_in", dtype), approximate=False)
    return _linear(y, params, f"{name}_out", dtype).astype(dtype)


def _index(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda p: p[index], tree)


def _scan_layers(
    block: Callable[[Array, Params, bool], Array], x: Array, layers: Params, full: Bool[np.ndarray, " L"]
) -> Array:
    """Apply `block` to stacked layers. `full` marks those that attend within the image.

    If the pattern of layers has a period, the periods are scanned, and within them each run of equal layers.
    So for 4 times 7 windowed layers and 1 full layer, two layers are compiled.
    """

    def scan(x: Array, layers: Params, flag: bool) -> Array:
        step = lambda x, layer: (block(x, layer, flag), None)
        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), x, layers)[0]

    n = len(full)
    period = next(p for p in range(1, n + 1) if n % p == 0 and (full.reshape(-1, p) == full[:p]).all())
    if period == 1:
        return scan(x, layers, bool(full[0]))
    ends = [0, *(np.flatnonzero(np.diff(full[:period])) + 1).tolist(), period]

    def repeat(x: Array, layers: Params) -> tuple[Array, None]:
        for begin, end in pairwise(ends):
            x = scan(x, _index(layers, slice(begin, end)), bool(full[begin]))
        return x, None

    return jax.lax.scan(repeat, x, jax.tree.map(lambda p: p.reshape(-1, period, *p.shape[1:]), layers))[0]


def see(params: Params, cfg: DecoderConfig, images: Images) -> Float[Array, "Q T F"]:
    """Compute the image tokens of a batch by the tower in `params`, some questions at a time."""
    vision, (n, windows) = cfg.vision, images.pixels.shape[:2]
    assert vision is not None
    ways = batch_ways(n)
    rows = n // ways
    fit = max(1, SCORES // (vision.heads * (windows * vision.window**2) ** 2))
    at_once = ways * max(size for size in range(1, rows + 1) if rows % size == 0 and size <= fit)
    see_rows = partial(tower, params[VISION], vision, dtype=cfg.execution.dtype)
    return map_rows(see_rows, images, at_once)


def tower(params: Params, cfg: VisionConfig, images: Images, dtype: Any) -> Float[Array, "Q T F"]:
    """Compute the image tokens of all windows, T = W · S / merge², in the order of the slots, as `dtype`.
    F is `cfg.features`. Tokens of empty slots are finite and have no meaning.
    """
    owners, places = images.slots[..., 0], images.slots[..., 1:3]
    weight = params["patch"].sum(1).reshape(-1, cfg.embed)  # over the frames, which are equal
    x = jnp.matmul(
        normalize(images.pixels, cfg).astype(dtype), weight.astype(dtype), preferred_element_type=jnp.float32
    )
    if cfg.positions:
        x += params["patch_bias"].astype(jnp.float32) + learned_positions(params["positions"], images.slots)
    half = cfg.head_dim // 2
    freqs = 10000.0 ** (-jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    angles = (places[..., None].astype(jnp.float32) * freqs).reshape(*owners.shape, half)
    rope = jnp.cos(angles), jnp.sin(angles)
    full = np.isin(np.arange(cfg.layers), cfg.full_layers)

    def block(x: Array, layer: Params, full: bool) -> Array:
        return _block(layer, cfg, x, rope, owners, full, dtype)

    x, features = constrain(x, "batch", None, None, None), []
    ends = [0, *(layer + 1 for layer in cfg.deepstack), cfg.layers]
    for number, (begin, end) in enumerate(pairwise(ends)):
        x = _scan_layers(block, x, _index(params["layers"], slice(begin, end)), full[begin:end])
        if number < len(cfg.deepstack):
            features.append(_merge(x, _index(params["deepstack"], number), "deep", cfg, dtype))
    return jnp.concatenate([_merge(x, params, "merge", cfg, dtype), *features], axis=-1)
