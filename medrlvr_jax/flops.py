"""Floating-point operations: of a traced program, by walking its jaxpr; and of a model, by formula.

Matrix products alone are counted, 2·M·N·K each, as peaks are quoted. XLA's own count has the body of a loop once: for 36 layers under
`scan` it is off by twenty times.
"""

from math import prod
from typing import Any

import jax
from jax.extend import core

from medrlvr_jax.model import DecoderConfig


def traced_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr, while_trips: int = 1) -> float:
    """Over all devices, recomputation included. Loops whose end depends on data count as `while_trips` rounds (sampling: every column).

    A Pallas kernel counts as its body in each block of its grid: a little too much where it skips some.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (over, _), _ = p["dimension_numbers"]
            out, left = (_shape(v) for v in (eqn.outvars[0], eqn.invars[0]))
            total += 2.0 * prod(out) * prod(left[i] for i in over)
        elif name == "cond":
            total += max(traced_flops(branch, while_trips) for branch in p["branches"])
        elif name == "while":
            total += while_trips * traced_flops(p["body_jaxpr"], while_trips)
        else:
            inner = sum(traced_flops(j, while_trips) for j in jax.tree.leaves(list(p.values()), is_leaf=_is_jaxpr) if _is_jaxpr(j))
            rounds = p["length"] if name == "scan" else prod(p["grid_mapping"].grid) if name == "pallas_call" else 1
            total += inner * (p["mesh"].size if name == "shard_map" else rounds)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def weights(cfg: DecoderConfig) -> int:
    """Numbers in one layer's matrices."""
    return cfg.embed * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads) + 3 * cfg.embed * cfg.ffn


def forward_flops(cfg: DecoderConfig, questions: int, prompt: int, samples: int, new: int) -> float:
    """One scoring pass over `prompt | response 1 | … `: matrices, attention as it is computed (squares, not triangles), and the words'
    scores of each response token (a critic has none but its head's dot product)."""
    tokens = questions * (prompt + samples * new)
    pairs = questions * (prompt * prompt + samples * new * (prompt + new))
    words = cfg.embed * (1 if cfg.value_head else cfg.vocab) * questions * samples * new
    return 2.0 * (cfg.layers * (weights(cfg) * tokens + 2 * cfg.heads * cfg.head_dim * pairs) + words)


def generate_flops(cfg: DecoderConfig, questions: int, prompt: int, samples: int, new: int) -> float:
    """Prefill, then `new` columns: each attends to the prompt and to the whole of its own cache, as it is computed."""
    rows, column = questions * samples, prompt + new
    prefill = cfg.layers * (weights(cfg) * questions * prompt + 2 * cfg.heads * cfg.head_dim * questions * prompt * prompt)
    step = cfg.layers * rows * (weights(cfg) + 2 * cfg.heads * cfg.head_dim * column)
    return 2.0 * (prefill + cfg.embed * cfg.vocab * rows * new + (new - 1) * step)
