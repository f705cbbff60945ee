"""Compare log-probs and entropies in slabs of logits with all logits at once: seconds and XLA's temporaries of
forward and backward pass.

    python tests/bench_slab.py [vocabulary] [width] [tokens] [runs]

The default is the head of Qwen2.5-0.5B (151,936 × 896) over 2,048 tokens, with 1.2 GB of logits. `dense` is a
plain log-softmax. Each slab size is `scoring.token_logprobs` with that `model.logit_slab`. The cases run
alternately, and seconds are medians. `difference` is the largest difference between a gradient and that of
the dense case, relative to the gradient's largest entry. The output is one JSON line per case.
"""

import json
import statistics
import sys
from functools import partial

import jax
import jax.numpy as jnp
from bench_parts import by_turns

from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.scoring import token_logprobs


def dense(params, hidden, tokens):
    logprobs = jax.nn.log_softmax(jnp.einsum("qgre,ve->qgrv", hidden, params["embed"]))
    entropies = -(jnp.exp(logprobs) * logprobs).sum(-1)
    return jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0], entropies


def main(vocab: int = 151_936, width: int = 896, tokens: int = 2048, runs: int = 3) -> list[dict]:
    cfg = DecoderConfig(
        vocab=vocab,
        embed=width,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=2,
        ffn=1,
        rope_theta=1e4,
        norm_eps=1e-6,
        tied=True,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"embed": jax.random.normal(keys[0], (vocab, width)) / width**0.5}
    hidden = jax.random.normal(keys[1], (1, 1, tokens, width))
    chosen = jax.random.randint(keys[2], (1, 1, tokens), 0, vocab)

    def program(read):
        def total(params, hidden):
            logprobs, entropies = read(params, hidden, chosen)
            return (logprobs + 0.1 * entropies).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1))).lower(params, hidden).compile()

    slabs = [tokens // share for share in (1, 2, 4, 8, 16, 32)]
    slabbed = lambda slab: (
        lambda params, hidden, chosen: token_logprobs(params, cfg, hidden, chosen, 1.0, slab)
    )
    programs = {"dense": program(dense)} | {str(slab): program(slabbed(slab)) for slab in slabs}
    times = by_turns([partial(p, params, hidden) for p in programs.values()], runs)
    expected, lines = programs["dense"](params, hidden), []
    for (name, compiled), (_, *seconds) in zip(programs.items(), times, strict=True):
        differences = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), compiled(params, hidden), expected
        )
        size = compiled.memory_analysis().temp_size_in_bytes
        lines.append(
            {
                "slab": name,
                "seconds": round(statistics.median(seconds), 3),
                "temporaries_mib": round(size / 2**20, 1),
            }
        )
        lines[-1]["difference"] = float(f"{max(jax.tree.leaves(differences)):.1e}")
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
