"""Floating-point operations, counted two ways: from a program's jaxpr, and from a model's formula.

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
from medrlvr_jax.config.reward import ConsistencyConfig, ProbabilityConfig
from medrlvr_jax.data.question import LETTERS
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model_rewards.probability import answer_columns
from medrlvr_jax.model_rewards.verifier_models import greedy_reply, yes_probability
from medrlvr_jax.rewards.components import components
from medrlvr_jax.rollout.loops import columns_of_loops, segment_ends
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.see import see
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


def useful(program: Program, parts: Parts) -> float:
    """FLOPs of a step's program over all devices, without recomputation; 0 if it multiplies no matrices."""
    sample, policy, critic = parts.config.sample, parts.cfg, parts.critic_cfg
    prompts = prompts_of(program)
    if program.function is see:
        return tower_flops(parts.cfg, program.args[1])
    images = prompts.vision and prompts.vision.images if prompts else None  # of a tower that is trained
    tower = tower_flops(policy, images) if images else 0.0
    if prompts is None:
        return 0.0
    questions, prompt = prompts.tokens.shape
    sizes = questions, prompt, sample.samples, sample.max_new_tokens
    if program.function is yes_probability:
        return forward_flops(program.args[1], questions, prompt, samples=0, new=0)
    if program.function is greedy_reply:
        drawn = program.args[2]
        return generate_flops(drawn.cfg, questions, prompt, 1, drawn.sample.max_new_tokens)
    if asked := next((t for t in components(parts.config.reward) if t.name == program.name), None):
        match asked.settings:
            case ProbabilityConfig() as section:
                return forward_flops(policy, *sizes[:3], answer_columns(section, sizes[3]))
            case ConsistencyConfig():
                return forward_flops(policy, *sizes, read=len(LETTERS))
        return forward_flops(policy, *sizes)
    if program.name == "generate":
        return generate_flops(parts.sampler_cfg, *sizes)
    if program.name == "assess":
        frozen, _, values = program.args[:3]
        passes = [policy] + [policy] * (frozen.reference is not None) + [critic] * (values is not None)
        own = tower if frozen.reference is not None else 0.0
        return sum(forward_flops(cfg, *sizes) for cfg in passes) + own
    if program.name in ("learn_policy", "learn_critic"):
        epochs = parts.config.learn.epochs
        if program.name == "learn_critic":
            return 3 * epochs * forward_flops(critic, *sizes)
        merger = tower_flops(policy, images, merger=True) if images else 0.0
        seen = 3 * tower if policy.execution.tower == "train" else tower + 2 * merger
        return epochs * (3 * forward_flops(policy, *sizes) + seen)
    return 0.0


def prompts_of(program: Program) -> Prompts | None:
    """The first prompts among a program's arguments."""
    is_prompts = lambda x: isinstance(x, Prompts)
    return next(filter(is_prompts, jax.tree.leaves(program.args, is_leaf=is_prompts)), None)


def forward_flops(
    cfg: DecoderConfig, questions: int, prompt: int, samples: int, new: int, read: int | None = None
) -> float:
    """One scoring pass over `prompt | response 1 | … `: matrices, attention as it is computed (squares, not
    triangles), and `read` logits of each response token (None: all; of a critic, one value).
    """
    tokens = questions * (prompt + samples * new)
    pairs = questions * (prompt * prompt + samples * new * (prompt + new))
    read = read or (1 if cfg.execution.value_head else cfg.vocab)
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
        whole = len(vision.full_layers)
        pairs = slots * (windows * whole + vision.layers - whole)  # with each patch, over all layers
        total += patches * (depth * embed + vision.layers * matrices + 2 * embed * pairs)
    return 2.0 * total


def generate_flops(cfg: DecoderConfig, questions: int, prompt: int, samples: int, new: int) -> float:
    """Prefill, then each column's attention to the prompt and to all columns that the cache has then."""
    rows, pair = questions * samples, 2 * cfg.heads * cfg.head_dim
    prefill = questions * prompt * (weights(cfg) + pair * prompt)
    loop_ends = zip(segment_ends(new), columns_of_loops(new), strict=True)
    pairs = sum((until - begin) * (prompt + room) for room, (begin, until) in loop_ends)
    steps = rows * ((new - 1) * weights(cfg) + pair * pairs)
    return 2.0 * (cfg.layers * (prefill + steps) + cfg.embed * cfg.vocab * rows * new)
