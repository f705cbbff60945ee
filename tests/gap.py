"""Measure the largest difference between the log-probs of sampler and trainer for the same tokens.

    python tests/gap.py              # a two-layer model with random weights, float32; several paddings,
                                     # packings, slabs and meshes
    python tests/gap.py MODEL_DIR    # a real model, float32 and bfloat16, a few tokens

The output is the table of docs/pages/numbers/exactness.md.
"""

import math
import os
import sys
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from small_model import small

from medrlvr_jax import sharding
from medrlvr_jax.config.schema import MeshConfig, SampleConfig
from medrlvr_jax.model import families, scoring, spec, weights
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.rollout import generate
from medrlvr_jax.types import Prompts

CFG = small(vocab=512, embed=64, heads=8, kv_heads=4, ffn=128, qkv_bias=True)
STOPS, PAD = tuple(range(1, 21)), 0  # many, so that responses have all lengths
BASE = {
    "pad": 0,
    "samples": 8,
    "length": 48,
    "slab": 8192,
    "packed": False,
    "mesh": {},
    "temperature": 1.0,
    "narrow": False,
    "unroll": True,
}
CASES = [
    {},
    *({"pad": pad} for pad in (3, 40, 500)),
    *({"samples": samples} for samples in (1, 32)),
    *({"length": length} for length in (8, 256)),
    *({"slab": slab} for slab in (1, 100, 1000)),
    {"packed": True},  # responses concatenated without padding: learn.row_sizes
    {"narrow": True},
    {"unroll": False},
    *({"temperature": t} for t in (0.3, 2.0)),
    *(
        {"mesh": mesh}
        for mesh in ({"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2})
    ),
    {"pad": 40, "slab": 100, "narrow": True, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
]


def gap(
    params, cfg: DecoderConfig, prompts: np.ndarray, lengths: np.ndarray, case: dict
) -> tuple[float, float, int]:
    """Return (max |Δ|, share of tokens with a ratio outside 0.9–1.1, tokens) of one rollout."""
    c = BASE | case
    cfg = cfg.run_with(narrow=c["narrow"], unroll=c["unroll"])
    mask = np.arange(prompts.shape[1]) >= prompts.shape[1] - lengths[:, None]
    tokens, mask = (np.pad(x, ((0, 0), (c["pad"], 0))) for x in (prompts, mask))
    batch = Prompts(tokens, mask, np.arange(len(tokens), dtype=np.uint32))
    sample = SampleConfig(
        questions=len(tokens), samples=c["samples"], max_new_tokens=c["length"], temperature=c["temperature"]
    )
    mesh = sharding.make_mesh(MeshConfig(**c["mesh"]), jax.devices()[: math.prod(c["mesh"].values())])

    @partial(jax.jit, static_argnames="size")
    def score(rollout, size):
        rows = scoring.Rows(batch, rollout.tokens, rollout.mask)

        def read(hidden, tokens):
            return scoring.token_logprobs(params, cfg, hidden, tokens, c["temperature"], c["slab"])

        return scoring.at_responses(params, cfg, rows, size, read)[0]

    with jax.set_mesh(mesh):
        settings = generate.DrawSettings(cfg, sample, STOPS, PAD)
        rollout = generate.generate(params, batch, jax.random.key(0), settings)
        whole = c["samples"] * c["length"]
        size = int(rollout.mask.sum((1, 2)).max()) if c["packed"] else whole
        assert not c["packed"] or size < whole, "nothing to pack"
        logprobs = np.asarray(score(rollout, size))
    mask = np.asarray(rollout.mask)
    difference = np.abs(logprobs - np.asarray(rollout.logprobs))[mask]
    return float(difference.max()), float((np.abs(np.expm1(difference)) > 0.1).mean()), int(mask.sum())


def two_layers():
    """Return the parameters of the model, prompts and their lengths."""
    rng = np.random.default_rng(0)
    return spec.init(CFG, jax.random.key(0)), rng.integers(3, CFG.vocab, (8, 24)), rng.integers(4, 25, 8)


def main() -> None:
    print(
        "| case | tokens | max absolute difference of a log-prob | ratios outside 0.9–1.1 |\n|---|---|---|---|"
    )
    if len(sys.argv) > 1:
        path = sys.argv[1]
        rng = np.random.default_rng(0)
        for dtype in (jnp.float32, jnp.bfloat16):
            cfg = families.read_config(path).run_with(dtype=dtype, remat="none")
            mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
            shapes = spec.abstract(cfg)
            params = weights.load_params(
                path, cfg, sharding.shardings(shapes, mesh, sharding.TRAIN), jnp.dtype("float32")
            )
            furthest, far, n = gap(
                params,
                cfg,
                rng.integers(300, 20_000, (2, 16)),
                np.array([16, 9]),
                {"samples": 8, "length": 32, "unroll": False},
            )
            print(f"| {Path(path).name}, {dtype.__name__} | {n} | {furthest:.1e} | {far:.1%} |", flush=True)
        return
    params, prompts, lengths = two_layers()
    for case in CASES:
        furthest, far, n = gap(params, CFG, prompts, lengths, case)
        print(
            f"| {', '.join(f'{k} {v}' for k, v in case.items()) or 'plain'} | {n} | {furthest:.1e} | {far:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
