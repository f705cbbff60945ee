"""The TPU's block-sparse kernel, interpreted, against the attention that is written out: values, gradients,
meshes, whole decoders.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small

from medrlvr_jax import sharding
from medrlvr_jax.config.schema import MeshConfig
from medrlvr_jax.model import attention, decoder, scoring, spec, splash
from medrlvr_jax.model.architecture import Window
from medrlvr_jax.plan import flops
from medrlvr_jax.rollout import decode
from medrlvr_jax.types import Prompts

attend = partial(splash.attend, interpret=True)
CFG = small(vocab=50, ffn=48)


def arrays(questions, prompt, groups, length, kv_heads, heads, size):
    """q, k, v; a mask whose later prompts are padded to the left; and weights that leave out what padding
    attends to.
    """
    keys, n = jax.random.split(jax.random.key(0), 4), prompt + groups * length
    q = jax.random.normal(keys[0], (questions, n, kv_heads, heads, size)) * size**-0.5
    k, v = (jax.random.normal(key, (questions, n, kv_heads, size)) for key in keys[1:3])
    mask = jnp.arange(prompt) >= (jnp.arange(questions) * prompt // questions)[:, None]
    real = jnp.pad(mask, ((0, 0), (0, n - prompt)), constant_values=True)
    return q, k, v, mask, jax.random.normal(keys[3], q.shape) * real[:, :, None, None, None]


def both(args, groups, kernel, size=None):
    """Value and gradients of a weighted sum, by `plain` and by the kernel, with a window of `size` tokens."""
    q, k, v, mask, weights = args
    columns = jnp.zeros((len(q), groups, (q.shape[1] - mask.shape[1]) // max(groups, 1)), jnp.int32)
    prompts = Prompts(jnp.zeros(mask.shape, jnp.int32), mask, jnp.zeros(len(q), jnp.uint32))
    _, positions, _ = decoder.pack(prompts, columns if groups else None, None)
    window = attention.Window(positions, jnp.int32(size)) if size else None

    def of(attend):
        return jax.jit(
            jax.value_and_grad(
                lambda q, k, v: (attend(q, k, v, mask, groups=groups) * weights).sum(), (0, 1, 2)
            )
        )(q, k, v)

    return of(partial(attention.plain, segments=None, window=window)), of(partial(kernel, window=size))


@pytest.mark.parametrize(
    ("prompt", "groups", "length", "window"),
    [
        (48, 3, 40, None),
        (128, 2, 256, None),
        (160, 0, 0, None),
        (48, 3, 40, 20),
        (128, 2, 256, 150),
        (160, 0, 0, 9),
    ],
)
def test_the_kernel_is_what_is_written_out(prompt, groups, length, window):
    """Sizes that are padded to a block, that are whole blocks, and a prompt alone."""
    (a, grads), (b, others) = both(arrays(2, prompt, groups, length, 2, 2, 16), groups, attend, window)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)  # a sum of many terms of both signs
    for x, y in zip(grads, others, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * float(jnp.abs(x).max()))


@pytest.mark.parametrize("tensor", [2, 4])
def test_each_device_has_its_own_heads(tensor):
    """With two KV heads over four devices, each head is on two of them, with half of its queries."""
    args = arrays(4, 32, 2, 16, 2, 2, 8)
    want = attention.plain(*args[:4], segments=None, groups=2)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=tensor), jax.devices()[: 2 * tensor])
    with jax.set_mesh(mesh):
        place = [jax.device_put(x, sharding.rows(mesh)) for x in args[:4]]
        found = jax.jit(partial(attend, groups=2))(*place)
        assert found.sharding.shard_shape(found.shape)[0] == 2
    real = np.pad(np.asarray(args[3]), ((0, 0), (0, 32)), constant_values=True)
    np.testing.assert_allclose(np.asarray(want)[real], np.asarray(found)[real], atol=1e-6)


@pytest.mark.parametrize("window", [None, Window(9, (1,), 50.0)], ids=str)
def test_a_decoder_with_it(window, monkeypatch):
    """Log-probs, and the state after a prompt that sampling starts from."""
    of_window = dataclasses.replace(CFG, window=window)
    monkeypatch.setattr(splash, "attend", attend)
    params = spec.init(CFG, jax.random.key(1))
    words, tokens = (
        jax.random.randint(jax.random.key(i), shape, 0, 50) for i, shape in ((2, (2, 20)), (3, (2, 3, 12)))
    )
    prompts = Prompts(words, jnp.arange(20) >= jnp.array([0, 9])[:, None], jnp.arange(2, dtype=jnp.uint32))

    def read(cfg):
        hidden = scoring.hidden_states(params, cfg, prompts, tokens)
        return scoring.token_logprobs(params, cfg, hidden, tokens, 1.0, 10_000)[0], decode.prefill(
            params, cfg, prompts
        )[0]

    for a, b in zip(read(of_window), read(of_window.run_with(splash=True)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_flops_are_of_the_blocks_that_the_mask_leaves():
    """256 + 2 · 512 tokens in blocks of 256: 1 of keys for the prompt's of queries, then 2 and 3 for each
    response's two; 11 of 15.

    Two products in the forward pass, three for the queries' gradient, four for the keys' and values', whose
    grid has every block.
    """
    q, k, v, mask, _ = arrays(4, 256, 2, 512, 2, 2, 64)
    visited = splash.visited(256, 2, 512)
    assert visited == {"_fwd": 11 / 15, "_dq": 11 / 15, "_dkv": 11 / 25}

    def count(f):
        return flops.traced_flops(jax.make_jaxpr(f)(q, k, v, mask), visited=visited)

    forward = partial(splash.attend, groups=2)
    product = 11 * (2 * 256 * 256 * 64) * 2 * 2 * 4
    assert count(forward) == pytest.approx(2 * product)
    assert count(jax.grad(lambda *args: forward(*args).sum(), (0, 1, 2))) == pytest.approx(
        (2 + 3 + 4) * product, rel=1e-3
    )


def test_the_mask_in_parts_is_the_mask():
    """Every pair by the definition: the prompt's and one's own, what stands before."""
    n, position = 10, [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]

    def sees(i, j, window):
        return j <= i and (j < 4 or (j - 4) // 3 == (i - 4) // 3) and position[i] - position[j] < window

    for window in (None, 1, 2, 5):
        mask = splash.Shared(n, 4, 3, window)
        want = np.array([[sees(i, j, window or n) for j in range(n)] for i in range(n)])
        np.testing.assert_array_equal(mask[:, :], want)
        np.testing.assert_array_equal(mask[2:7, 5:10], want[2:7, 5:10])
