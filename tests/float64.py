"""Compare the kernels with NumPy implementations in float64 on the host. on_device.py runs these cases.

`cases` lists them by arithmetic and matmul precision. An error is the largest difference divided by the
largest entry. Inputs are rounded to the arithmetic first, so that the error is only that of the kernel. They
are chosen so that faults are visible: attention is far from uniform, prompts are padded, and one token occurs
in many rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_model import small

from medrlvr_jax.config.schema import LoRAConfig, OptimConfig, SampleConfig
from medrlvr_jax.model import attention, decoder, rope, scoring, spec, splash
from medrlvr_jax.rl import learn
from medrlvr_jax.rollout import draw

# (arithmetic, matmul precision) → bound. With default precision, float32 is TF32 on NVIDIA's cards and one
# bfloat16 pass on a TPU.
EXACT, ROUNDED, HALF = ("float32", "highest"), ("float32", "default"), ("bfloat16", "default")
BOUNDS = {EXACT: 2e-5, ROUNDED: 2e-2, HALF: 3e-2}


class Case(NamedTuple):
    kernel: str
    dtype: str
    precision: str
    bound: float
    error: Callable[[], float]


def cases(backend: str, small: bool) -> list[Case]:
    """List the cases of a backend. On a CPU default precision is exact, so it has no case of its own."""
    kernels = {
        "attention.plain": partial(attended, partial(attention.plain, segments=None)),
        "attention.decode": decoded,
        "scoring.token_logprobs": scored,
        "model.embed_lookup": looked_up,
        "project, int8 and LoRA": multiplied,
    }
    if backend == "tpu":
        kernels["attention.splash"] = partial(attended, splash.attend)
    kinds = [kind for kind in BOUNDS if kind != ROUNDED or backend != "cpu"]
    out = [
        Case(name, *kind, BOUNDS[kind], partial(f, kind[0], small))
        for kind in kinds
        for name, f in kernels.items()
    ]
    out += [
        Case("AdamW", *EXACT, 1e-4, partial(optimised, "float32")),
        Case("AdamW", *HALF, 1e-2, partial(optimised, "bfloat16")),
    ]
    out += [
        Case(f"sample.draw, {name}", *EXACT, 1e-4, partial(drawn, how, small)) for name, how in DRAWS.items()
    ]
    out += [
        Case("model.rotate", *kind, bound, partial(rotated, kind[0], small))
        for kind, bound in ((EXACT, 5e-4), (HALF, 3e-2))
    ]
    return [*out, Case("sample.noise", *EXACT, 0.0, noised)]


def max_error(found, expected) -> float:
    """Return the largest difference divided by the largest entry; of a tree, that of the worst leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()) for a, b in pairs)


def normal(rng, dtype: str, *shape: int, scale: float = 1.0):
    """Return random numbers on the device in its arithmetic, and the same numbers in float64."""
    x = jnp.asarray(scale * rng.standard_normal(shape), dtype)
    return x, np.asarray(x, np.float64)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attended(attend: Callable, dtype: str, small: bool) -> float:
    """Compare attention's output and gradients over rows `prompt | responses`; later prompts are padded."""
    rng = np.random.default_rng(0)
    rows, prompt, groups, length, kv, heads, size = (
        (2, 24, 2, 16, 2, 2, 16) if small else (2, 160, 4, 96, 2, 4, 64)
    )
    n = prompt + groups * length
    (q, q64), (k, k64), (v, v64) = (
        normal(rng, dtype, rows, n, kv, heads, size, scale=2 * size**-0.5),
        *(normal(rng, dtype, rows, n, kv, size) for _ in "kv"),
    )
    mask = np.arange(prompt) >= (np.arange(rows) * prompt // 2 // rows)[:, None]
    real = np.pad(mask, ((0, 0), (0, n - prompt)), constant_values=True)
    g, g64 = normal(rng, dtype, *q.shape)
    g, g64 = g * real[:, :, None, None, None], g64 * real[:, :, None, None, None]

    def ours(q, k, v):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, jnp.asarray(mask), groups=groups), q, k, v)
        return jnp.where(real[:, :, None, None, None], out, 0), *back(g.astype(out.dtype))

    at, of = np.arange(n)[:, None], np.arange(n)[None]
    sees = (of <= at) & ((of < prompt) | ((at - prompt) // length == (of - prompt) // length))
    # [rows, n, n]; a padded query sees all columns, and nothing depends on it
    sees = (sees & real[:, None]) | ~real[:, :, None]
    p = softmax(np.where(sees[:, None, None], np.einsum("qnkhd,qmkd->qkhnm", q64, k64), -np.inf))
    out = np.einsum("qkhnm,qmkd->qnkhd", p, v64) * real[:, :, None, None, None]
    dp = np.einsum("qnkhd,qmkd->qkhnm", g64, v64)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    expected = (
        out,
        np.einsum("qkhnm,qmkd->qnkhd", ds, k64),
        np.einsum("qkhnm,qnkhd->qmkd", ds, q64),
        np.einsum("qkhnm,qnkhd->qmkd", p, g64),
    )
    return max_error(jax.jit(ours)(q, k, v), expected)


def decoded(dtype: str, small: bool) -> float:
    rng, t = np.random.default_rng(1), 9
    rows, prompt, groups, length, kv, heads, size = (
        (2, 24, 2, 16, 2, 2, 16) if small else (4, 256, 8, 128, 2, 8, 128)
    )
    (q, q64), (pk, pk64), (pv, pv64), (ok, ok64), (ov, ov64) = (
        normal(rng, dtype, rows, groups, kv, heads, size, scale=2 * size**-0.5),
        normal(rng, dtype, rows, kv, size, prompt),
        normal(rng, dtype, rows, kv, prompt, size),
        normal(rng, dtype, rows, groups, kv, size, length),
        normal(rng, dtype, rows, groups, kv, length, size),
    )
    mask = np.arange(prompt) >= np.arange(rows)[:, None] * 3
    scores = np.concatenate(
        [np.einsum("qgkhd,qkdp->qgkhp", q64, pk64), np.einsum("qgkhd,qgkdr->qgkhr", q64, ok64)], -1
    )
    sees = np.concatenate([mask, np.broadcast_to(np.arange(length) <= t, (rows, length))], -1)
    p = softmax(np.where(sees[:, None, None, None], scores, -np.inf))
    expected = np.einsum("qgkhp,qkpd->qgkhd", p[..., :prompt], pv64) + np.einsum(
        "qgkhr,qgkrd->qgkhd", p[..., prompt:], ov64
    )
    return max_error(
        jax.jit(attention.decode)(q, (pk, pv), (ok, ov), jnp.asarray(mask), jnp.int32(t)), expected
    )


CFG = small(vocab=64, layers=1, ffn=48, rope_theta=1e6)


def scored(dtype: str, small: bool) -> float:
    """Compare log-probs, entropies and their gradients by hidden states and table, in two slabs and with a
    temperature.
    """
    rng, temperature = np.random.default_rng(2), 0.7
    vocab, width, shape = (1009, 32, (2, 2, 6)) if small else (151_936, 256, (2, 2, 24))
    cfg = replace(CFG, vocab=vocab, embed=width).run_with(dtype=jnp.dtype(dtype).type)
    hidden, hidden64 = normal(rng, dtype, *shape, width)
    table, table64 = normal(rng, dtype, vocab, width, scale=3 * width**-0.5)
    tokens = rng.integers(0, vocab, shape)
    (a, a64), (b, b64) = normal(rng, "float32", *shape), normal(rng, "float32", *shape)
    slab = tokens.size // 2

    def ours(hidden, table):
        read = lambda hidden, table: scoring.token_logprobs(
            {"embed": table}, cfg, hidden, jnp.asarray(tokens), temperature, slab
        )
        out, back = jax.vjp(read, hidden, table)
        return *out, *back((a, b))

    scores = hidden64 @ table64.T / temperature
    top = scores.max(-1, keepdims=True)
    logs = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    p, chosen = np.exp(logs), tokens[..., None]
    logprobs, entropy = np.take_along_axis(logs, chosen, -1)[..., 0], -(p * logs).sum(-1)
    g = -p * (a64[..., None] + b64[..., None] * (logs + entropy[..., None]))
    np.put_along_axis(g, chosen, np.take_along_axis(g, chosen, -1) + a64[..., None], -1)
    g = g.reshape(-1, vocab) / temperature
    expected = logprobs, entropy, (g @ table64).reshape(hidden64.shape), g.T @ hidden64.reshape(-1, width)
    return max_error(jax.jit(ours)(hidden, table), expected)


def looked_up(dtype: str, small: bool) -> float:
    """Compare the embedding's gradient. Half of all tokens are the same."""
    rng = np.random.default_rng(3)
    vocab, width, n = (500, 16, 256) if small else (151_936, 128, 8192)
    cfg = replace(CFG, vocab=vocab, embed=width).run_with(dtype=jnp.dtype(dtype).type)
    tokens = rng.integers(0, vocab, (2, n // 2))
    tokens[0] = 7
    g, g64 = normal(rng, dtype, 2, n // 2, width)
    expected = np.zeros((vocab, width))
    np.add.at(expected, tokens, g64)

    def ours(table, g):
        return jax.vjp(lambda table: decoder.embed_lookup(table, jnp.asarray(tokens), cfg), table)[1](
            g.astype(jnp.float32)
        )[0]

    return max_error(jax.jit(ours)(jnp.zeros((vocab, width)), g), expected)


def rotated(dtype: str, small: bool) -> float:
    """Compare rotary embeddings at positions up to 4,095. There float32 angles have errors up to 1e-4 on every
    machine.
    """
    rng, n = np.random.default_rng(4), 64 if small else 4096
    cfg = replace(CFG, head_dim=64)
    x, x64 = normal(rng, dtype, 1, n, 2, 64)
    angles = np.arange(n)[:, None] * cfg.rope_theta ** (-np.arange(0, 64, 2) / 64)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = np.split(x64, 2, -1)
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return max_error(
        jax.jit(lambda x: rope.rotate(x, rope.rope_tables(jnp.arange(n)[None], cfg)[0]))(x), expected
    )


def multiplied(dtype: str, small: bool) -> float:
    """Compare x · W + x · A · B · alpha / rank with W in int8 by output channel: the quantisation, and the
    product.
    """
    rng = np.random.default_rng(5)
    width, ffn = (32, 48) if small else (2048, 1024)
    adapters = LoRAConfig(rank=4, targets=("gate",))
    cfg = replace(CFG, embed=width, ffn=ffn).run_with(dtype=jnp.dtype(dtype).type, int8=True, lora=adapters)
    x, x64 = normal(rng, dtype, 2, 64, width)
    w, w64 = normal(rng, "float32", width, ffn, scale=width**-0.5)
    a, a64 = normal(rng, dtype, width, 4, scale=width**-0.5)
    b, b64 = normal(rng, dtype, 4, ffn, scale=0.1)
    q, scale = jax.jit(partial(decoder.quantize, inputs=1))(w)
    expected_scale = np.abs(w64).max(0) / 127
    # rounding may leave half a step
    off = np.abs(np.asarray(q, np.float64) - w64 / expected_scale).max() - 0.5
    shapes = jax.eval_shape(lambda: spec.init(cfg, jax.random.key(0)))["layers"]
    layer = jax.tree.map(lambda p: jnp.zeros(p.shape[1:]), shapes) | {
        "gate": q,
        "gate_scale": scale,
        "gate_a": a,
        "gate_b": b,
    }
    found = jax.jit(lambda layer, x: decoder.project(decoder.cast_and_gather(layer, cfg), cfg, x, "gate"))(
        layer, x
    )
    expected = x64 @ (np.asarray(q, np.float64) * expected_scale) + x64 @ a64 @ b64 * (
        adapters.alpha / adapters.rank
    )
    return max(max_error(found, expected), max_error(scale, expected_scale), off / 100)


def optimised(moments: str) -> float:
    """Compare three steps of AdamW with clipping by the global norm, which clips in two of them. `moments`: the
    dtype of the first moments.
    """
    rng, c = (
        np.random.default_rng(6),
        OptimConfig(lr=1e-3, warmup=0.0, weight_decay=0.1, clip_norm=1.0, moments=moments),
    )
    tx = learn.make_optimizer(c, 3)
    params = {
        "layers": {
            "q": jnp.asarray(0.01 * rng.standard_normal((64, 32)), jnp.float32),
            "attn_norm": jnp.ones(32),
        }
    }
    p64 = {"q": np.asarray(params["layers"]["q"], np.float64), "attn_norm": np.ones(32)}
    state, initial = tx.init(params), {k: p.copy() for k, p in p64.items()}
    m, v = ({k: np.zeros_like(p) for k, p in p64.items()} for _ in "mv")

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for n in (1, 2, 3):
        g64 = {
            k: rng.standard_normal(p.shape).astype(np.float32).astype(np.float64) * (1e-3 if n == 2 else 1)
            for k, p in p64.items()
        }
        params, state = step(
            params, state, {"layers": {k: jnp.asarray(g, jnp.float32) for k, g in g64.items()}}
        )
        norm = np.sqrt(sum((g**2).sum() for g in g64.values()))
        for k, g in g64.items():
            g = g / max(norm, 1.0)
            m[k], v[k] = c.b1 * m[k] + (1 - c.b1) * g, c.b2 * v[k] + (1 - c.b2) * g * g
            step64 = m[k] / (1 - c.b1**n) / (np.sqrt(v[k] / (1 - c.b2**n)) + c.eps) + (
                c.weight_decay * p64[k] if k == "q" else 0
            )
            p64[k] = p64[k] - c.lr * step64
    moved = {k: np.asarray(params["layers"][k], np.float64) - initial[k] for k in p64}
    # the norms are 1, so float32 has a relative error of 4e-5 in their changes
    return max_error(moved, {k: p64[k] - initial[k] for k in p64})


DRAWS = {
    "plain": {},
    "temperature 0.5": {"temperature": 0.5},
    "top_k 40": {"top_k": 40},
    "top_p 0.9": {"top_p": 0.9},
}


def drawn(how: dict, small: bool) -> float:
    """Return how far a uniform number lies outside its token's interval of the cumulative weights, or the error
    of the log-probs, of sampler and policy, if that is larger.
    """
    rng, settings = np.random.default_rng(7), SampleConfig(**how)
    vocab, rows = (1009, 32) if small else (151_936, 64)
    scores = (3 * rng.standard_normal((rows, 1, vocab))).astype(np.float32)
    uniforms = rng.random((rows, 1), np.float32)
    token, drawn_at, policy_at, entropy = (
        np.asarray(x)
        for x in jax.jit(partial(draw.draw_token, t=0, sample=settings, stop_ids=(1,)))(scores, uniforms)
    )
    p = softmax(scores.astype(np.float64) / settings.temperature)
    kept = p.copy()
    if settings.top_k:
        kept[kept < np.sort(kept, -1)[..., [-settings.top_k]]] = 0
    if settings.top_p < 1:
        ranked = -np.sort(-kept, -1)
        border = np.take_along_axis(ranked, (ranked.cumsum(-1) < settings.top_p).sum(-1, keepdims=True), -1)
        kept[kept < border] = 0
    ends = kept.cumsum(-1) / kept.sum(-1, keepdims=True)
    pick = lambda x: np.take_along_axis(x, token[..., None].astype(int), -1)[..., 0]
    end, begin = pick(ends), pick(ends) - pick(kept) / kept.sum(-1)
    outside = max(0.0, float((begin - uniforms).max()), float((uniforms - end).max()))
    logs = np.log(pick(kept)) - np.log(kept.sum(-1)), np.log(pick(p)), -(p * np.log(p)).sum(-1)
    return max(outside, max_error((drawn_at, policy_at, entropy), logs))


def noised() -> float:
    """Compare the sampler's uniform numbers with those of the CPU. They are equal bit by bit."""
    make = lambda: jax.jit(draw.noise, static_argnums=(2, 3))(
        jax.random.key(5), jnp.arange(4, dtype=jnp.uint32), 3, 50
    )
    found = np.asarray(make())
    with jax.default_device(jax.devices("cpu")[0]):
        return float(np.abs(found - np.asarray(make())).max())
