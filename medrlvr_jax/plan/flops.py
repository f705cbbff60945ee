"""Count floating-point operations: of a program from its jaxpr, and of learning without recomputation by
formula.

Only matrix products are counted, 2·M·N·K each, as in published peaks. XLA's own count includes the body of a
loop once, so for 36 layers under `scan` it is twenty times too low.
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
    """Count the FLOPs over all devices, with recomputation. A `while` loop counts with the largest number of
    iterations that its condition allows, a `cond` with its largest branch.

    A Pallas kernel counts as its body times the blocks of its grid. If it skips blocks, `visited` maps a part
    of the kernel's name to the share of visited blocks (`splash.visited`).
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, p = eqn.primitive.name, eqn.params
        leaves = jax.tree.leaves(list(p.values()), is_leaf=_is_jaxpr)
        inner = [traced_flops(body, visited) for body in leaves if _is_jaxpr(body)]
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            out, left = _shape(eqn.outvars[0]), _shape(eqn.invars[0])
            total += 2.0 * prod(out) * prod(left[i] for i in contracted)
        elif name == "cond":
            total += max(inner)
        elif name == "while":
            total += _max_iterations(p["cond_jaxpr"]) * sum(inner)
        elif name == "pallas_call":
            share = next((share for part, share in visited.items() if part in p["name"]), 1.0)
            total += sum(inner) * prod(p["grid_mapping"].grid) * share
        else:
            times = {"scan": p.get("length", 1), "shard_map": getattr(p.get("mesh"), "size", 1)}
            total += sum(inner) * times.get(name, 1)
    return total


def _max_iterations(condition: core.ClosedJaxpr) -> int:
    """Return the bound in a loop condition such as `t - 129 < 128 and …`."""
    limits = [e.invars[1] for e in condition.jaxpr.eqns if e.primitive.name == "lt"]
    bounds = [x.val for x in limits if isinstance(x, core.Literal)]
    if len(bounds) != 1:
        raise ValueError(f"the loop condition must have one bound, but has {len(bounds)}: {condition}")
    return int(bounds[0])


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def layer_weights(cfg: DecoderConfig) -> int:
    """Return the number of parameters in the matrices of one layer."""
    return cfg.embed * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads) + 3 * cfg.embed * cfg.ffn


def useful_flops(program: Program, parts: Parts, executed: float) -> float:
    """Return a program's FLOPs over all devices without recomputation. `executed`: the FLOPs with it.

    Only learning recomputes. It needs the FLOPs of one forward pass, and twice those for the backward pass.
    """
    prompts, sample, epochs = find_prompts(program), parts.config.sample, parts.config.learn.epochs
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


def find_prompts(program: Program) -> Prompts | None:
    """Return the first `Prompts` among a program's arguments."""
    is_prompts = lambda x: isinstance(x, Prompts)
    return next(filter(is_prompts, jax.tree.leaves(program.args, is_leaf=is_prompts)), None)


def forward_flops(cfg: DecoderConfig, questions: int, prompt: int, samples: int, new: int) -> float:
    """Count one scoring pass over rows `prompt | response 1 | …`: the matrices, attention as it is computed
    (all pairs, not only the causal half), and the logits of each response token (a critic: one value).
    """
    tokens = questions * (prompt + samples * new)
    pairs = questions * (prompt * prompt + samples * new * (prompt + new))
    outputs = 1 if cfg.execution.value_head else cfg.vocab
    head = cfg.embed * outputs * questions * samples * new
    return 2.0 * (cfg.layers * (layer_weights(cfg) * tokens + 2 * cfg.heads * cfg.head_dim * pairs) + head)


def tower_flops(cfg: DecoderConfig, images: Images, merger: bool = False) -> float:
    """Count one forward pass of the vision tower over all slots of images; `merger`: of its mergers only."""
    vision, (questions, windows, slots, depth) = cfg.vision, images.pixels.shape
    assert vision is not None
    patches, embed, merged = questions * windows * slots, vision.embed, vision.merge**2 * vision.embed
    tokens = patches // vision.merge**2
    total = tokens * merged * (merged + vision.out) * (1 + len(vision.deepstack))
    if not merger:
        matrices = 4 * embed**2 + (3 if vision.kind == "qwen2_5_vl" else 2) * embed * vision.ffn
        full = len(vision.full_layers)
        pairs = slots * (windows * full + vision.layers - full)  # per patch, summed over the layers
        total += patches * (depth * embed + vision.layers * matrices + 2 * embed * pairs)
    return 2.0 * total
