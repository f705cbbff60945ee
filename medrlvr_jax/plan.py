"""`medrlvr plan`: would this config fit that machine, and how fast at best? Answered by the machine's own compiler, without the machine.

Every program of the training step is the very one that a training runs (test_plan.py holds them to be equal), lowered from shapes
alone and compiled by libtpu's or CUDA's XLA for a topology of devices that need not exist. Whose numbers they are:

XLA's     seconds to compile (here), arguments, outputs and temporaries; the collectives and the HBM traffic are read from its
          compiled program, loops multiplied by their trip counts (hlo.py).
ours      what else lives in memory while a program runs, FLOPs (flops.py), and times: a program takes at least the longest of
          FLOPs ÷ peak, HBM traffic ÷ HBM speed, collectives ÷ link speed (machines.py). No overhead, no waiting, every response at
          its full length: a bound that a run may approach, not a forecast. The host's share and evaluation are left out.
"""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax import experience, flops, hf, hlo, machines, sharding
from medrlvr_jax.build import Parts, abstract_learner, abstract_params, lay_out
from medrlvr_jax.config import Config, ConfigError
from medrlvr_jax.experience import assess, assess_settings, make_experience
from medrlvr_jax.machines import GIB, Machine
from medrlvr_jax.sample import generate
from medrlvr_jax.train import Programs, make_programs
from medrlvr_jax.types import Assessment, Experience, Prompts, Rollout


class Program(NamedTuple):
    """A jitted function of the step, its arguments as shapes, and what else is in memory meanwhile."""

    name: str
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    others: tuple  # trees of shapes that live on while it runs and are not among its arguments
    useful: float  # FLOPs without recomputation, over all devices


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
    flops: float
    useful: float
    traffic: float
    collectives: list[hlo.Collective]
    times: dict[str, float]  # compute, memory, network
    refused: str = ""  # the compiler's reason; then `temporaries` is what it says it lacked, and no times are known

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
    return lay_out(config, Stops(), hf.planned_config(config.model.path), machines.devices(machine))


def step_programs(parts: Parts, programs: Programs) -> list[Program]:
    """All programs of one training step in their order, with arguments as the step gives them."""
    c, mesh = parts.config, parts.mesh
    q, g, r, p = c.sample.questions, c.sample.samples, c.sample.max_new_tokens, experience.width(c.prompt.max_tokens)
    rows = sharding.rows(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def column(dtype=jnp.float32):
        return array(dtype, q, g, r)

    policy = abstract_learner(parts, parts.cfg, programs.policy_tx)
    reference = abstract_params(parts, parts.cfg) if c.kl.coef > 0 else None
    critic = abstract_learner(parts, parts.critic_cfg, programs.critic_tx) if programs.critic_tx else None
    values = critic and column()
    prompts = Prompts(array(jnp.int32, q, p), array(jnp.bool_, q, p), array(jnp.uint32, q))
    truncated = c.sample.top_k or c.sample.top_p < 1 or c.sample.min_new_tokens
    rollout = Rollout(column(jnp.int32), column(jnp.bool_), column(), column() if truncated else None)
    assessment = Assessment(column(), column(), reference and column(), values)
    rewards, coef = array(jnp.float32, q, g), jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    made = Experience(
        prompts.tokens, prompts.mask, rollout.tokens, rollout.mask, column(), assessment.ref_logprobs, column(), values, values
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    decode = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), *programs.relay_shapes(parts)
    )
    one = flops.forward_flops(parts.cfg, q, p, g, r)
    of_critic = flops.forward_flops(parts.critic_cfg, q, p, g, r) if critic else 0.0
    out = [
        Program("relay", programs.relay, (policy.params,), {}, (policy.opt_state, critic, reference), 0.0),
        Program(
            "generate",
            generate,
            (decode, parts.cfg, prompts, key, c.sample, parts.tokenizer.stop_ids, parts.tokenizer.pad_id),
            {},
            (policy, critic, reference),
            flops.generate_flops(parts.cfg, q, p, g, r),
        ),
        Program(
            "assess",
            assess,
            (policy.params, reference, critic and critic.params, prompts, rollout.tokens),
            assess_settings(parts),
            (policy.opt_state, critic and critic.opt_state, rollout),
            one * (2 if reference else 1) + of_critic,
        ),
        Program(
            "make_experience",
            make_experience,
            (prompts, rollout, assessment, rewards, coef),
            {"config": (c.advantage, c.kl)},
            (policy, critic, reference),
            0.0,
        ),
        Program("learn_policy", programs.learn_policy, (policy, made, key, coef), {}, (critic, reference), 3 * c.learn.epochs * one),
    ]
    if critic:
        args = (critic, made, key, None)
        out.append(Program("learn_critic", programs.learn_critic, args, {}, (policy, reference), 3 * c.learn.epochs * of_critic))
    return out


def bytes_of(tree: Any) -> float:
    """Per device; arrays without a sharding are whole everywhere."""
    return float(sum(math.prod(_shard(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")))


def _shard(leaf: Any) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape


def compile_program(program: Program, parts: Parts, machine: Machine) -> Figures:
    """Compile one program for the machine and read its figures."""
    chip, mesh, n = machine.chip, parts.mesh, parts.mesh.size
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.args, **program.kwargs)
        lowered = traced.lower()
    done = flops.traced_flops(traced.jaxpr, parts.config.sample.max_new_tokens - 1) / n
    arguments, others = bytes_of((program.args, program.kwargs)), bytes_of(program.others)
    began = time.monotonic()
    try:
        compiled = lowered.compile({"xla_gpu_autotune_level": 0} if chip.platform == "cuda" else None)
    except jax.errors.JaxRuntimeError as e:
        lack = re.search(r"Used ([\d.]+)([MGT]) of ([\d.]+)([MGT]) hbm", str(e))
        if lack is None:
            raise
        wanted, had = (float(lack[i]) * {"M": 2**20, "G": GIB, "T": 2**40}[lack[i + 1]] for i in (1, 3))
        # The compiler's sum holds arguments and temporaries; what it may use comes from it as well.
        seconds = time.monotonic() - began
        return Figures(
            program.name, seconds, arguments, 0.0, wanted - arguments, others, had, done, program.useful / n, math.nan, [], {}, lack[0]
        )
    seconds, memory = time.monotonic() - began, compiled.memory_analysis()
    moved = hlo.read(compiled.as_text(), dict(mesh.shape))
    return Figures(
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
        collectives=moved.collectives,
        times={
            "compute": done / chip.flops,
            "memory": moved.bytes / chip.hbm_speed,
            "network": sum(machine.seconds(x.bytes, x.group, crosses_nodes(x.axis, mesh, machine)) for x in moved.collectives),
        },
    )


def crosses_nodes(axis: str, mesh: Any, machine: Machine) -> bool:
    """Whether neighbours along these mesh axes sit in different nodes."""
    node = np.arange(mesh.size).reshape(tuple(mesh.shape.values())) // (mesh.size // machine.nodes)
    along = [list(mesh.shape).index(a) for a in axis.split("+") if a in mesh.shape]
    return any((np.diff(node, axis=a) != 0).any() for a in along)


class Plan(NamedTuple):
    """All programs of a step on one machine."""

    config: Config
    machine: Machine
    mesh: dict[str, int]
    programs: list[Figures]
    advice: list[str]

    @property
    def fits(self) -> bool:
        return all(f.fits for f in self.programs)

    @property
    def seconds(self) -> float:
        return sum(f.seconds for f in self.programs)

    @property
    def tokens(self) -> int:
        c = self.config.sample
        return c.questions * c.samples * c.max_new_tokens

    @property
    def mfu(self) -> float:
        """FLOPs without recomputation over what the chips could have done in the time."""
        return sum(f.useful for f in self.programs) / (self.seconds * self.machine.chip.flops)


def plan(config: Config, machine: Machine, only: tuple[str, ...] = (), say=lambda name: None) -> Plan:
    """Compile the step's programs (or `only` those named) for the machine; `say` hears each name before its compilation."""
    parts = prepare(config, machine)
    programs = step_programs(parts, make_programs(parts, config.steps or 1000))
    figures = []
    for program in programs:
        if not only or program.name in only:
            say(program.name)
            figures.append(compile_program(program, parts, machine))
    worst = max(figures, key=lambda f: f.peak - f.usable)
    advice = [] if worst.fits else advise(config, machine, worst)
    return Plan(config, machine, dict(parts.mesh.shape), figures, advice)


__all__ = ["ConfigError"]
