"""The programs of a training step, as shapes, compiled for a machine that need not exist, and their figures.

Each is the same program as in training (test_plan.py compares them); `plan.py` prints the figures.
"""

import hashlib
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from medrlvr_jax.build import Parts, lay_out
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data.images import Grid, windows_of
from medrlvr_jax.model import families, splash
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.plan import flops, hlo, machines
from medrlvr_jax.plan.machines import Machine
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rl.step import step_programs
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.rollout import width

Mesh = jax.sharding.Mesh | AbstractMesh


class Stops(NamedTuple):
    """Stands in for a tokenizer; the programs do not depend on which tokens these are."""

    stop_ids: tuple[int, ...] = (0,)
    pad_id: int = 0


class Figures(NamedTuple):
    """One compiled program. Bytes, FLOPs and seconds are per device and step."""

    name: str
    compile_s: float
    arguments: float
    outputs: float  # beyond what they take over from donated arguments
    temporaries: float
    others: float  # what else is in memory
    usable: float
    flops: float  # as executed
    useful: float = math.nan  # without recomputation
    traffic: float = math.nan
    collectives: tuple[hlo.Collective, ...] = ()
    times: dict[str, float] = {}  # noqa: RUF012  # compute, memory, network
    # the compiler cannot fit it even alone; `temporaries` are then the compiler's sum, and no times are known
    refused: bool = False

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
    """Like `build.build`, but over devices that need not exist, and from the model's config.json alone."""
    return lay_out(config, Stops(), families.known(config.model.path), machines.devices(machine))


def planned(parts: Parts, steps: int) -> list[Program]:
    """The programs of a training step whose longest prompt has all the tokens that it may have."""
    verifiers = {
        name: verifier_models.lay_out(
            asked, families.known(asked.model), Stops(), parts.mesh, f"reward.components.{name}"
        )
        for name, asked in verifier_models.sections(parts.config.reward).items()
        if asked.url is None
    }
    programs, columns = make_programs(parts, steps), width(parts.config.prompt.max_tokens)
    called = step_programs(parts, programs, columns, windows=image_windows(parts), verifiers=verifiers)
    return [program for program in called if program.calls]


def image_windows(parts: Parts) -> int:
    """Windows of a prompt's images: of a square one with all the tokens that the settings allow. 0 for a text
    model, and where `data.fields` leaves images out.
    """
    cfg, config = parts.cfg.vision, parts.config
    if cfg is None or None in [config.data.fields.get(name, "") for name in ("image", "images")]:
        return 0
    side = math.isqrt(min(cfg.max_pixels // cfg.factor**2, config.prompt.max_tokens))
    return windows_of((Grid(side, side),), cfg)


def bytes_of(tree: Any) -> float:
    """Bytes on each device; an array without a sharding is on each in full."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return float(sum(math.prod(_shard(a)) * a.dtype.itemsize for a in arrays))


def _shard(leaf: Any) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape


def compile_program(
    program: Program,
    parts: Parts,
    machine: Machine,
    cache: dict[str, Figures],
    quick: bool = False,
    options: dict | None = None,
) -> Figures:
    """Compile one program for the machine and read its figures.

    `cache`: figures by the program's text; of a program that is in it, only `others` is counted anew.
    `quick`: with the compiler's least effort. `options`: the compiler's, in place of those for a machine that
    is compiled for and not run on.
    """
    mesh, platform = parts.mesh, machine.chip.platform
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.args, **program.kwargs)
        lowered = traced.lower()
    text, others = hashlib.sha256(lowered.as_text().encode()).hexdigest(), bytes_of(program.others)
    if text in cache:
        return repeated(cache[text]._replace(others=others), program.calls)
    executed = flops.traced_flops(traced.jaxpr, visited(program, parts))
    figures = Figures(
        name=program.name,
        compile_s=0.0,
        arguments=bytes_of((program.args, program.kwargs)),
        outputs=0.0,
        temporaries=0.0,
        others=others,
        usable=machine.chip.usable,
        flops=executed / mesh.size,
        useful=flops.useful(program, parts, executed) / mesh.size,
    )
    if options is None:
        options = machines.COMPILE[platform] | (machines.QUICK[platform] if quick else {})
    began = time.monotonic()
    try:
        # the mesh is part of a call's cache key: on the machine itself, the call finds what is compiled now
        with jax.set_mesh(mesh):
            compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as e:
        temporaries = refusal(str(e), figures.arguments)
        if temporaries is None:
            raise
        figures = figures._replace(temporaries=temporaries, refused=True)
    else:
        figures = read(figures, compiled, mesh, machine)
    cache[text] = figures._replace(compile_s=time.monotonic() - began)
    return repeated(cache[text], program.calls)


def repeated(figures: Figures, calls: int) -> Figures:
    """The figures of a program that a step calls so often; of one call where that is 1."""
    return figures._replace(
        flops=figures.flops * calls,
        useful=figures.useful * calls,
        traffic=figures.traffic * calls,
        collectives=tuple(moved._replace(bytes=moved.bytes * calls) for moved in figures.collectives),
        times={name: seconds * calls for name, seconds in figures.times.items()},
    )


def read(figures: Figures, compiled: Any, mesh: Mesh, machine: Machine) -> Figures:
    """The figures with XLA's memory, traffic and collectives, and the times that follow."""
    memory, moved = compiled.memory_analysis(), hlo.read(compiled.as_text(), dict(mesh.shape))
    crosses = lambda c: crosses_nodes(c.axis, mesh, machine)
    times = {
        "compute": figures.flops / machine.chip.flops,
        "memory": moved.bytes / machine.chip.hbm_speed,
        "network": sum(machine.seconds(c.bytes, c.group, crosses(c)) for c in moved.collectives),
    }
    return figures._replace(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        traffic=moved.bytes,
        collectives=tuple(moved.collectives),
        times=times,
    )


def visited(program: Program, parts: Parts) -> Mapping[str, float]:
    """The share of its blocks that each of the TPU's attention kernels visits: see `splash.visited`."""
    prompts = flops.prompts_of(program)
    if not parts.cfg.execution.splash or prompts is None:
        return {}
    sample, columns = parts.config.sample, prompts.tokens.shape[1]
    prompts_only = program.name.startswith(("generate", "verify"))
    rows = (0, columns) if prompts_only else (sample.samples, sample.max_new_tokens)
    return splash.visited(columns, *rows)


def refusal(message: str, arguments: float) -> float | None:
    """Bytes of temporaries that a program needs, from the TPU compiler's refusal; None for another message.

    `Used 23.36G of 15.75G hbm` includes the arguments, `HLO temporaries (1.00T)` does not.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    match = used or re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message)
    if match is None:
        return None
    size = float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]]
    return size - arguments if used else size


def crosses_nodes(axis: str, mesh: Mesh, machine: Machine) -> bool:
    """Whether neighbours along these mesh axes sit in different nodes."""
    node = np.arange(mesh.size).reshape(tuple(mesh.shape.values())) // (mesh.size // machine.nodes)
    along = [list(mesh.shape).index(a) for a in axis.split("+") if a in mesh.shape]
    return any((np.diff(node, axis=a) != 0).any() for a in along)
