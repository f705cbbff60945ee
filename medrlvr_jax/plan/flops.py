"""Floating-point operations: those of a program from its jaxpr, and by formula those that learning needs.

Matrix products alone are counted, 2·M·N·K each, as peaks are quoted. XLA's own count has the body of a loop
once: for 36 layers under `scan` it is off by twenty times.
"""

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import jax
from jax.extend import core

from medrlvr_jax.build import Parts
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.types import Images, Prompts


def traced_flops(
    jaxpr: core.ClosedJaxpr | core.Jaxpr, visited: Mapping[str, float] = MappingProxyType({})
) -> float:
    """FLOPs over all devices, recomputation included. A loop whose end depends on data counts with all rounds
    that its condition allows.

    A Pallas kernel counts as its body in each block of its grid. Where it skips blocks, `visited` has the
    share that it visits, by a part of the kernel's name (`splash.visited`).
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, p = eqn.primitive.name, eqn.params
        bodies = [j for j in jax.tree.leaves(list(p.values()), is_leaf=_is_jaxpr) if _is_jaxpr(j)]
        inner = [traced_flops(j, visited) for j in bodies]
        if name == "dot_general":
            (over, _), _ = p["dimension_numbers"]
            out, left = (_shape(v) for v in (eqn.outvars[0], eqn.invars[0]))
            total += 2.0 * prod(out) * prod(left[i] for i in over)
        elif name == "cond":
            total += max(inner)
        elif name == "while":
            total += _rounds(p["cond_jaxpr"]) * sum(inner)
        elif name == "pallas_call":
            share = next((share for part, share in visited.items() if part in p["name"]), 1.0)
            total += sum(inner) * prod(p["grid_mapping"].grid) * share
        else:
            times = {"scan": p.get("length", 1), "shard_map": getattr(p.get("mesh"), "size", 1)}
            total += sum(inner) * times.get(name, 1)
    return total


def _rounds(condition: core.ClosedJaxpr) -> int:
    """The bound in a loop condition such as `t - 129 < 128 and …`."""
    limits = [e.invars[1] for e in condition.jaxpr.eqns if e.primitive.name == "lt"]
    bounds = [x.val for x in limits if isinstance(x, core.Literal)]
    if len(bounds) != 1:
        raise ValueError(f"a loop whose condition has {len(bounds)} bounds, and not one: {condition}")
    return int(bounds[0])


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def weights(cfg: DecoderConfig) -> int:
    """Parameters in one layer's matrices."""
    return cfg.embed * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads) + 3 * cfg.embed * cfg.ffn


def useful(program: Program, parts: Parts, executed: float) -> float:
    """Of the FLOPs that a step's program executes over all devices, those without recomputation: all, but in
    learning, where they are those of a pass forward and two backward.
    """
    prompts, sample, epochs = prompts_of(program), parts.config.sample, parts.config.learn.epochs
    if prompts is None or program.name not in ("learn_policy", "learn_critic"):
        return executed
    cfg = parts.cfg if program.name == "learn_policy" else parts.critic_cfg
    questions, columns = prompts.tokens.shape
    needed = 3 * forward_flops(cfg, questions, columns, sample.samples, sample.max_new_tokens)
    trained, images = cfg.execution.tower, prompts.vision and prompts.vision.images
    if images and trained == "train":
        needed += 3 * tower_flops(cfg, images)
    elif images and trained == "merger":
        needed += tower_flops(cfg, images) + 2 * tower_flops(cfg, images, merger=True)
    return epochs * needed


def prompts_of(program: Program) -> Prompts | None:
    """The first prompts among a program's arguments."""
    is_prompts = lambda x: isinstance(x, Prompts)
    return next(filter(is_prompts, jax.tree.leaves(program.args, is_leaf=is_prompts)), None)


def forward_flops(cfg: DecoderConfig, questions: int, prompt: int, samples: int, new: int) -> float:
    """One scoring pass over `prompt | response 1 | … `: matrices, attention as it is computed (squares, not
    triangles), and the logits of each response token (of a critic, one value).
    """
    tokens = questions * (prompt + samples * new)
    pairs = questions * (prompt * prompt + samples * new * (prompt + new))
    read = 1 if cfg.execution.value_head else cfg.vocab
    words = cfg.embed * read * questions * samples * new
    return 2.0 * (cfg.layers * (weights(cfg) * tokens + 2 * cfg.heads * cfg.head_dim * pairs) + words)


def tower_flops(cfg: DecoderConfig, images: Images, merger: bool = False) -> float:
    """One pass of the vision tower over all slots of the images, or of its mergers alone."""
    vision, (questions, windows, slots, depth) = cfg.vision, images.pixels.shape
    assert vision is not None
    patches, embed, merged = questions * windows * slots, vision.embed, vision.merge**2 * vision.embed
    tokens = patches // vision.merge**2
    total = tokens * merged * (merged + vision.out) * (1 + len(vision.deepstack))
    if not merger:
        matrices = 4 * embed**2 + (3 if vision.kind == "qwen2_5_vl" else 2) * embed * vision.ffn
        full = len(vision.full_layers)
        pairs = slots * (windows * full + vision.layers - full)  # with each patch, over all layers
        total += patches * (depth * embed + vision.layers * matrices + 2 * embed * pairs)
    return 2.0 * total
