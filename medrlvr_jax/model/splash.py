"""`attention.plain` by the TPU's block-sparse kernel (jax.experimental.pallas.ops.tpu.splash_attention, after
Dao 2023, arXiv 2307.08691).

The kernel computes scores block by block in both passes, and skips blocks that are masked completely. There
is none for GPU: cuDNN's kernel takes this mask only as a bias, an array as large as all scores.
"""

from dataclasses import dataclass
from functools import partial
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from medrlvr_jax.sharding import axis_ways, map_shards
from medrlvr_jax.types import Array

# Numbers of queries and of keys in a block. The first that divides prompt and response is used, so that few
# blocks are partly masked.
BLOCKS = (512, 256, 128)


@dataclass(frozen=True)
class Shared(kernels.Mask):
    """The mask of `attention.plain` without padding. It is made block by block: it may have gigabytes."""

    size: int  # of the row, filled up to whole blocks
    width: int  # of the prompt
    length: int  # of a response
    window: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size

    def __getitem__(self, index) -> np.ndarray:
        query, key = (np.arange(self.size)[part] for part in index)
        of_query, of_key = ((x - self.width) // self.length for x in (query, key))
        key_in_prompt = key[None, :] < self.width
        mask = (key[None, :] <= query[:, None]) & ((of_query[:, None] == of_key[None, :]) | key_in_prompt)
        if self.window is None:
            return mask
        position, key_position = (
            np.minimum(x, self.width + (x - self.width) % self.length) for x in (query, key)
        )
        return mask & (position[:, None] - key_position[None, :] < self.window)


def tiles(width: int, groups: int, length: int) -> tuple[int, int]:
    """Return the block size, and the length of the row rounded up to whole blocks."""
    block = next((b for b in BLOCKS if width % b == length % b == 0), BLOCKS[-1])
    return block, -(-(width + groups * length) // block) * block


def visited(width: int, groups: int, length: int) -> dict[str, float]:
    """Return the share of blocks that the forward and the two backward kernels compute, for
    `flops.traced_flops`.
    """
    block, size = tiles(width, groups, length)
    mask, starts = Shared(size, width, length), range(0, size, block)
    live = np.array([mask[i : i + block, :].reshape(block, -1, block).any((0, 2)) for i in starts])
    # The last axis of a grid is as long as its fullest row, or column, of blocks.
    by_queries, by_keys = (float(live.sum() / (len(live) * live.sum(axis).max())) for axis in (1, 0))
    return {"_fwd": by_queries, "_dq": by_queries, "_dkv": by_keys}


def attend(
    q: Array,
    k: Array,
    v: Array,
    prompt_mask: Array,
    groups: int,
    interpret: bool = False,
    window: int | None = None,
) -> Array:
    """Compute `attention.plain` up to rounding. Each device computes its own questions and heads.

    `window` is the number of tokens that a token attends to. `interpret` runs the kernel on any device,
    slowly.
    """
    n, width, heads = q.shape[1], prompt_mask.shape[1], q.shape[2]
    length = (n - width) // groups if groups else width
    block, size = tiles(width, groups, length)
    copies = axis_ways("tensor") // gcd(axis_ways("tensor"), heads)
    if copies > 1:  # fewer KV heads than devices along `tensor`
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        q = q.reshape(*q.shape[:2], heads * copies, -1, q.shape[-1])
    mask = kernels.MultiHeadMask([Shared(size, width, length, window)] * q.shape[3])
    blocks = kernels.BlockSizes(block, block, block, block, block, block, block, block)
    # Padding attends only to padding.
    real = jnp.pad(prompt_mask, ((0, 0), (0, size - width)), constant_values=True).astype(jnp.int32)

    def of_device(q, k, v, real):
        kernel = kernels.make_splash_mqa_single_device(mask, block_sizes=blocks, interpret=interpret)

        def one_row(q, k, v, real):
            return jax.vmap(partial(kernel, segment_ids=kernels.SegmentIds(real, real)))(q, k, v)

        return jax.vmap(one_row)(q, k, v, real)

    pad = lambda x: jnp.pad(x, [(0, 0), (0, size - n)] + [(0, 0)] * (x.ndim - 2))
    args = pad(q).transpose(0, 2, 3, 1, 4), pad(k).swapaxes(1, 2), pad(v).swapaxes(1, 2), real
    key_axes = ("batch", "kv_heads", None, None)
    axes = (("batch", "kv_heads", None, None, None), key_axes, key_axes, ("batch", None))
    out = map_shards(of_device, axes, 0)(*args)
    return out[:, :, :, :n].transpose(0, 3, 1, 2, 4).reshape(q.shape[0], n, heads, -1, q.shape[-1])
