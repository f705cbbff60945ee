"""The programs of a training step as shapes, compiled for a machine that need not be here, and what the compiler says of them.

Each is the very program that a training runs (test_plan.py holds them to be equal); `plan.py` prints what is found.
"""

import hashlib
import math
import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax import architectures, attention, experience, flops, hlo, lora, machines, sharding
from medrlvr_jax.build import Parts, abstract_base, abstract_decode, abstract_learner, abstract_params, lay_out, relay_program
from medrlvr_jax.config import Config
from medrlvr_jax.experience import assess, assess_settings, experience_settings, make_experience
from medrlvr_jax.machines import Machine
from medrlvr_jax.sample import generate
from medrlvr_jax.train import Programs
from medrlvr_jax.types import Assessment, Experience, Frozen, Prompts, Rollout


class Program(NamedTuple):
    """A jitted function of the step, its arguments as shapes, and what else is in memory meanwhile."""

    name: str
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    others: tuple  # trees of shapes that live on while it runs and are not among its arguments
    useful: float  # FLOPs without recomputation, over all devices
    visited: Mapping[str, float] = MappingProxyType({})  # see `attention.visited`


class Stops(NamedTuple):
    """In place of a tokenizer; the programs do not depend on which words these are."""

    stop_ids: tuple[int, ...] = (0,)
    pad_id: int = 0


class Figures(NamedTuple):
    """What is known of one compiled program. Bytes, FLOPs and seconds are per device and step."""

    name: str
    compile_s: float
    arguments: float
    outputs: float  # beyond what they take over from donated arguments
    temporaries: float
    others: float
    usable: float
    flops: float  # as executed
    useful: float = math.nan  # without recomputation
    traffic: float = math.nan
    collectives: tuple[hlo.Collective, ...] = ()
    times: dict[str, float] = {}  # noqa: RUF012  # compute, memory, network
    refused: bool = False  # the compiler found no way to fit it alone; `temporaries` are then its own sum, and no times are known

    @property
    def peak(self) -> float:
        return self.arguments + self.outputs + self.temporaries + self.others

    @property
    def fits(self) -> bool:
        return not self.refused and self.peak <= self.usable

    @property
    def bound(self) -> str:
        return max(self.times, key=lambda k: self.times[k]) if self.times else "unknown"

    @property
    def seconds(self) -> float:
        return max(self.times.values()) if self.times else math.nan


def prepare(config: Config, machine: Machine) -> Parts:
    """As `build.build`, over devices that need not exist, from the model's config.json alone."""
    return lay_out(config, Stops(), architectures.known(config.model.path), machines.devices(machine))


def step_programs(parts: Parts, programs: Programs) -> list[Program]:
    """All programs of one training step in their order, with arguments as the step gives them."""
    c, mesh = parts.config, parts.mesh
    q, g, r, p = c.sample.questions, c.sample.samples, c.sample.max_new_tokens, experience.width(c.prompt.max_tokens)
    rows = sharding.rows(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def column(dtype=jnp.float32):
        return array(dtype, q, g, r)

    policy, base = abstract_learner(parts, parts.cfg, programs.policy_tx), abstract_base(parts)
    reference = None
    if c.kl.coef > 0:
        reference = {} if parts.cfg.lora else abstract_params(parts, parts.cfg)
    frozen = Frozen(base, reference)
    critic = abstract_learner(parts, parts.critic_cfg, programs.critic_tx) if programs.critic_tx else None
    values = critic and column()
    prompts = Prompts(array(jnp.int32, q, p), array(jnp.bool_, q, p), array(jnp.uint32, q))
    truncated = c.sample.top_k or c.sample.top_p < 1 or c.sample.min_new_tokens
    rollout = Rollout(column(jnp.int32), column(jnp.bool_), column(), column() if truncated else None)
    assessment = Assessment(column(), column(), None if reference is None else column(), values)
    rewards, whole = array(jnp.float32, q, g), sharding.replicated(mesh)
    coef = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    of_sampler = None if c.loss.sampler_cap is None else column()
    made = Experience(
        prompts.tokens, prompts.mask, rollout.tokens, rollout.mask, column(), assessment.ref_logprobs, column(), values, values, of_sampler
    )
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=whole)
    sampler, stops = parts.sampler_cfg, (parts.tokenizer.stop_ids, parts.tokenizer.pad_id)
    relay, moved = relay_program(parts, sampler)
    of_prompts, of_rows = (attention.visited(p, 0, p), attention.visited(p, g, r)) if parts.cfg.splash else ({}, {})
    one = flops.forward_flops(parts.cfg, q, p, g, r)
    of_critic = flops.forward_flops(parts.critic_cfg, q, p, g, r) if critic else 0.0
    idle = (lambda *trees: ()) if c.learn.offload else (lambda *trees: trees)  # what waits in the host's memory meanwhile
    states = idle(policy.opt_state, critic and critic.opt_state)
    weights = (base, policy.params, critic and critic.params)
    out = [
        Program(
            "generate",
            generate,
            (abstract_decode(parts, sampler), sampler, prompts, key, c.sample, *stops),
            {},
            (moved, critic and critic.params, idle(reference), states),  # what is not moved is the sampler's own
            flops.generate_flops(parts.cfg, q, p, g, r),
            of_prompts,
        ),
        Program(
            "assess",
            assess,
            (frozen, policy.params, critic and critic.params, prompts, rollout),
            assess_settings(parts),
            (states,),
            one * (1 if reference is None else 2) + of_critic,
            of_rows,
        ),
        Program(
            "make_experience",
            make_experience,
            (prompts, rollout, assessment, rewards, coef),
            experience_settings(parts),
            (weights, idle(reference), states),
            0.0,
        ),
        Program(
            "learn_policy",
            programs.learn_policy,
            (policy, base, made, key, coef),
            {},
            (critic and critic.params, idle(reference, critic and critic.opt_state)),
            3 * c.learn.epochs * one,
            of_rows,
        ),
    ]
    if moved:
        others = tuple(leaf for key, leaf in lora.flat(abstract_params(parts, parts.cfg)).items() if key not in moved)
        out.insert(0, Program("relay", relay, (moved,), {}, (others, critic and critic.params, idle(reference), states), 0.0))
    if critic:
        args, others = (critic, base, made, key, None), (policy.params, idle(reference, policy.opt_state))
        out.append(Program("learn_critic", programs.learn_critic, args, {}, others, 3 * c.learn.epochs * of_critic, of_rows))
    return out


def bytes_of(tree: Any) -> float:
    """Per device; arrays without a sharding are whole everywhere."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return float(sum(math.prod(_shard(a)) * a.dtype.itemsize for a in arrays))


def _shard(leaf: Any) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape


def compile_program(program: Program, parts: Parts, machine: Machine, cache: dict[str, Figures], quick: bool = False) -> Figures:
    """Compile one program for the machine and read its figures; one that is in the cache already only changes its surroundings."""
    chip, mesh, n = machine.chip, parts.mesh, parts.mesh.size
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.args, **program.kwargs)
        lowered = traced.lower()
    done = flops.traced_flops(traced.jaxpr, program.visited) / n
    arguments, others = bytes_of((program.args, program.kwargs)), bytes_of(program.others)
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    if text in cache:
        return cache[text]._replace(others=others)
    began = time.monotonic()
    try:
        compiled = lowered.compile(machines.COMPILE[chip.platform] | (machines.QUICK[chip.platform] if quick else {}))
    except jax.errors.JaxRuntimeError as e:
        lacked = refusal(str(e), arguments)
        if lacked is None:
            raise
        empty = Figures(program.name, time.monotonic() - began, arguments, 0.0, lacked, others, chip.usable, done)
        cache[text] = empty._replace(useful=program.useful / n, refused=True)
        return cache[text]
    seconds, memory = time.monotonic() - began, compiled.memory_analysis()
    moved = hlo.read(compiled.as_text(), dict(mesh.shape))
    cache[text] = Figures(
        name=program.name,
        compile_s=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        others=others,
        usable=chip.usable,
        flops=done,
        useful=program.useful / n,
        traffic=moved.bytes,
        collectives=tuple(moved.collectives),
        times={
            "compute": done / chip.flops,
            "memory": moved.bytes / chip.hbm_speed,
            "network": sum(machine.seconds(x.bytes, x.group, crosses_nodes(x.axis, mesh, machine)) for x in moved.collectives),
        },
    )
    return cache[text]


def refusal(message: str, arguments: float) -> float | None:
    """Bytes of temporaries that a program wants, from the TPU compiler's refusal; None where the message is another.

    `Used 23.36G of 15.75G hbm` counts the arguments in, `HLO temporaries (1.00T)` does not.
    """
    for pattern, counted in ((r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", arguments), (r"HLO temporaries \(([\d.]+)([KMGT])\)", 0.0)):
        if found := re.search(pattern, message):
            return float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] - counted
    return None


def crosses_nodes(axis: str, mesh: Any, machine: Machine) -> bool:
    """Whether neighbours along these mesh axes sit in different nodes."""
    node = np.arange(mesh.size).reshape(tuple(mesh.shape.values())) // (mesh.size // machine.nodes)
    along = [list(mesh.shape).index(a) for a in axis.split("+") if a in mesh.shape]
    return any((np.diff(node, axis=a) != 0).any() for a in along)
