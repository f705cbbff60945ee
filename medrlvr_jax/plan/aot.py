"""The programs of a training step as shapes, compiled for a machine that need not be here, and what the
compiler says of them.

Each is the very program that a training runs (test_plan.py holds them to be equal); `plan.py` prints what is
found.
"""

import hashlib
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from medrlvr_jax.build import Parts, lay_out
from medrlvr_jax.config.schema import Config
from medrlvr_jax.model import attention, families
from medrlvr_jax.plan import flops, hlo, machines
from medrlvr_jax.plan.machines import Machine
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rl.train import step_programs
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.rollout import width
from medrlvr_jax.types import Prompts


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
    # the compiler found no way to fit it alone; `temporaries` are then its own sum, and no times are known
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
    """As `build.build`, over devices that need not exist, from the model's config.json alone."""
    return lay_out(config, Stops(), families.known(config.model.path), machines.devices(machine))


def planned(parts: Parts, steps: int) -> list[Program]:
    """The programs of a training step whose longest prompt has all the tokens that it may have."""
    return step_programs(parts, make_programs(parts, steps), width(parts.config.prompt.max_tokens))


def bytes_of(tree: Any) -> float:
    """Per device; arrays without a sharding are whole everywhere."""
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
    """Compile one program for the machine and read its figures; one that is in the cache already only changes
    its surroundings.

    `options`: the compiler's, in place of those for a machine that is not here.
    """
    chip, mesh, n = machine.chip, parts.mesh, parts.mesh.size
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.args, **program.kwargs)
        lowered = traced.lower()
    done = flops.traced_flops(traced.jaxpr, visited(program, parts)) / n
    arguments, others = bytes_of((program.args, program.kwargs)), bytes_of(program.others)
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    if text in cache:
        return cache[text]._replace(others=others)
    if options is None:
        options = machines.COMPILE[chip.platform] | (machines.QUICK[chip.platform] if quick else {})
    began = time.monotonic()
    try:
        # of a call's cache key as well: on a machine that is here, it finds what is compiled now
        with jax.set_mesh(mesh):
            compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as e:
        lacked = refusal(str(e), arguments)
        if lacked is None:
            raise
        empty = Figures(
            program.name, time.monotonic() - began, arguments, 0.0, lacked, others, chip.usable, done
        )
        cache[text] = empty._replace(useful=flops.useful(program, parts) / n, refused=True)
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
        useful=flops.useful(program, parts) / n,
        traffic=moved.bytes,
        collectives=tuple(moved.collectives),
        times={
            "compute": done / chip.flops,
            "memory": moved.bytes / chip.hbm_speed,
            "network": sum(
                machine.seconds(x.bytes, x.group, crosses_nodes(x.axis, mesh, machine))
                for x in moved.collectives
            ),
        },
    )
    return cache[text]


def visited(program: Program, parts: Parts) -> Mapping[str, float]:
    """The share of its blocks that the TPU's attention kernel visits, by a part of its name; see
    `attention.visited`.
    """
    if not parts.cfg.execution.splash:
        return {}
    sample = parts.config.sample
    if program.name == "generate":
        width = program.args[2].tokens.shape[1]
        return attention.visited(width, 0, width)
    if program.name.startswith(("assess", "learn")):
        prompts = next(arg for arg in jax.tree.leaves(program.args, is_leaf=_is_prompts) if _is_prompts(arg))
        return attention.visited(prompts.tokens.shape[1], sample.samples, sample.max_new_tokens)
    return {}


def _is_prompts(x: Any) -> bool:
    return isinstance(x, Prompts)


def refusal(message: str, arguments: float) -> float | None:
    """Bytes of temporaries that a program wants, from the TPU compiler's refusal; None where the message is
    another.

    `Used 23.36G of 15.75G hbm` counts the arguments in, `HLO temporaries (1.00T)` does not.
    """
    for pattern, counted in (
        (r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", arguments),
        (r"HLO temporaries \(([\d.]+)([KMGT])\)", 0.0),
    ):
        if found := re.search(pattern, message):
            return float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] - counted
    return None


def crosses_nodes(axis: str, mesh: Any, machine: Machine) -> bool:
    """Whether neighbours along these mesh axes sit in different nodes."""
    node = np.arange(mesh.size).reshape(tuple(mesh.shape.values())) // (mesh.size // machine.nodes)
    along = [list(mesh.shape).index(a) for a in axis.split("+") if a in mesh.shape]
    return any((np.diff(node, axis=a) != 0).any() for a in along)
