"""Rotary position embedding (RoPE, Su et al. 2021, arXiv 2104.09864), and windows of attention."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from medrlvr_jax.model.architecture import DecoderConfig, RopeScaling
from medrlvr_jax.types import Array

# Cosines and sines of the rotary angles of positions.
Rope = tuple[Float32[Array, "... D/2"], Float32[Array, "... D/2"]]
UNLIMITED = jnp.iinfo(jnp.int32).max  # the window of a layer without one


def rope_tables(positions: Int[Array, "*N"], cfg: DecoderConfig, by_axis: bool = False) -> tuple[Rope, ...]:
    """Return the rotary tables [*N, D/2] at `positions`. A model with `cfg.window` has a second pair, for the
    windowed layers.

    With `by_axis`, positions are [*N, 3] and each frequency uses one axis (M-RoPE, arXiv 2409.12191).
    """
    selected = positions[..., np.array(cfg.rope_axes)] if by_axis else positions[..., None]

    def tables(theta: float, scaling: RopeScaling | None) -> Rope:
        freqs = theta ** (-jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
        angles = selected.astype(jnp.float32) * (_scaled(freqs, scaling) if scaling else freqs)
        return jnp.cos(angles), jnp.sin(angles)

    full = tables(cfg.rope_theta, cfg.rope_scaling)
    return (full, tables(cfg.window.rope_theta, None)) if cfg.window else (full,)


def _scaled(freqs: Float32[Array, " D/2"], scaling: RopeScaling) -> Float32[Array, " D/2"]:
    factor, low, high, length = scaling
    if low is None or high is None or length is None:
        return freqs / factor
    turns = length * freqs / (2 * jnp.pi)
    blend = jnp.clip((turns - low) / (high - low), 0, 1)
    return blend * freqs + (1 - blend) * freqs / factor


def rope_and_window(
    cfg: DecoderConfig, ropes: tuple[Rope, ...], layer: Int[Array, ""] | int, length: int
) -> tuple[Rope, Int[Array, ""] | None]:
    """Select the rotary tables and the window of layer number `layer`.

    The window is the number of tokens that a token attends to, itself included; `UNLIMITED` in a layer
    without a window. It is None if no window can matter in rows of `length` positions.
    """
    if cfg.window is None:
        return ropes[0], None
    windowed = jnp.isin(layer, np.array(cfg.window.layers))
    rope = jax.tree.map(partial(jnp.where, windowed), ropes[1], ropes[0])
    return rope, jnp.where(windowed, cfg.window.size, UNLIMITED) if length > cfg.window.size else None


def rotate(x: Float[Array, "*N H D"], rope: Rope) -> Float32[Array, "*N H D"]:
    """Rotate x in float32. Rotated pairs are entries i and i + D/2, as in Hugging Face's weights."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (table[..., None, :] for table in rope)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rope_axes(sections: Sequence[int], interleaved: bool = False) -> tuple[int, ...]:
    """Return the axis that each rotary frequency uses: 0 time, 1 row, 2 column.

    The first `sections[0]` frequencies use time, the next `sections[1]` rows, the others columns. With
    `interleaved` (Qwen3-VL) the three axes alternate, and time replaces an axis whose section has ended.
    """
    if not interleaved:
        return tuple(axis for axis, n in enumerate(sections) for _ in range(n))
    return tuple(j % 3 if j < 3 * sections[j % 3] else 0 for j in range(sum(sections)))
