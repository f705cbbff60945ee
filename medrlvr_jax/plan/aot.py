"""Compile the programs of a training step ahead of time for a machine that need not exist, and collect their
figures.

Each program is the same as in training (test_plan.py compares them). `plan.py` prints the figures.
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
from medrlvr_jax.data.patches import Grid, window_count
from medrlvr_jax.model import families, splash
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.plan import flops, hlo, machines
from medrlvr_jax.plan.machines import Machine
from medrlvr_jax.rl.ahead import step_programs
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.rollout import width

Mesh = jax.sharding.Mesh | AbstractMesh


class PlanTokenizer(NamedTuple):
    """Stands for the tokenizer. The compiled programs do not depend on the values of these ids."""

    stop_ids: tuple[int, ...] = (0,)
    pad_id: int = 0


class Figures(NamedTuple):
    """One compiled program. Bytes, FLOPs and seconds are per device and step."""

    name: str
    compile_s: float
    arguments: float
    outputs: float  # without those that reuse the memory of donated arguments
    temporaries: float
    others: float  # arrays in memory that are not arguments of this program
    usable: float
    flops: float  # with recomputation
    useful: float = math.nan  # without recomputation
    traffic: float = math.nan
    collectives: tuple[hlo.Collective, ...] = ()
    times: dict[str, float] = {}  # noqa: RUF012  # compute, memory, network
    # The compiler found no way to fit it. `temporaries` are then the compiler's sum, and times are unknown.
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


def make_parts(config: Config, machine: Machine) -> Parts:
    """Return what `build.build` returns, but over compile-only devices and from the model's config.json."""
    return lay_out(config, PlanTokenizer(), families.known(config.model.path), machines.devices(machine))


def training_programs(parts: Parts, steps: int) -> list[Program]:
    """List the programs of a training step. Their prompts have `prompt.max_tokens` tokens."""
    verifiers = {
        name: verifier_models.lay_out(
            settings, families.known(settings.model), PlanTokenizer(), parts.mesh, f"reward.components.{name}"
        )
        for name, settings in verifier_models.sections(parts.config.reward).items()
        if settings.url is None
    }
    programs, columns = make_programs(parts, steps), width(parts.config.prompt.max_tokens)
    recorded = step_programs(parts, programs, columns, windows=image_windows(parts), verifiers=verifiers)
    return [program for program in recorded if program.calls]


def image_windows(parts: Parts) -> int:
    """Return the number of windows of a prompt's images: those of one square image with as many tokens as the
    settings allow. Return 0 for a text model, and if `data.fields` leaves images out.
    """
    cfg, config = parts.cfg.vision, parts.config
    if cfg is None or None in [config.data.fields.get(name, "") for name in ("image", "images")]:
        return 0
    side = math.isqrt(min(cfg.max_pixels // cfg.factor**2, config.prompt.max_tokens))
    return window_count((Grid(side, side),), cfg)


def bytes_per_device(tree: Any) -> float:
    """Sum the bytes of a tree of shapes on each device. An array without a sharding is whole on each."""

    def size(array: jax.ShapeDtypeStruct) -> int:
        shard = array.sharding.shard_shape(array.shape) if array.sharding is not None else array.shape
        return math.prod(shard) * array.dtype.itemsize

    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return float(sum(map(size, arrays)))


def compile_program(
    program: Program,
    parts: Parts,
    machine: Machine,
    cache: dict[str, Figures],
    quick: bool = False,
    options: dict | None = None,
) -> Figures:
    """Compile one program for the machine and return its figures.

    `cache`: figures by a hash of the program's text and its calls per step. For a program in the cache only
    `others` is counted again. `quick`: with the compiler's lowest effort. `options`: compiler options that
    replace those for compile-only devices.
    """
    mesh, platform = parts.mesh, machine.chip.platform
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.args, **program.kwargs)
        lowered = traced.lower()
    key = hashlib.sha256(f"{program.calls} {lowered.as_text()}".encode()).hexdigest()
    others = bytes_per_device(program.others)
    if key in cache:
        return cache[key]._replace(others=others)
    executed = flops.traced_flops(traced.jaxpr, visited_share(program, parts))
    figures = Figures(
        name=program.name,
        compile_s=0.0,
        arguments=bytes_per_device((program.args, program.kwargs)),
        outputs=0.0,
        temporaries=0.0,
        others=others,
        usable=machine.chip.usable,
        flops=executed * program.calls / mesh.size,
        useful=flops.useful_flops(program, parts, executed) * program.calls / mesh.size,
    )
    if options is None:
        options = machines.COMPILE[platform] | (machines.QUICK[platform] if quick else {})
    start = time.monotonic()
    try:
        # The mesh is part of JAX's cache key. With it, a later call on these devices finds this compilation.
        with jax.set_mesh(mesh):
            compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as e:
        temporaries = refused_temporaries(str(e), figures.arguments)
        if temporaries is None:
            raise
        figures = figures._replace(temporaries=temporaries, refused=True)
    else:
        figures = add_compiled_figures(figures, compiled, program.calls, mesh, machine)
    cache[key] = figures._replace(compile_s=time.monotonic() - start)
    return cache[key]


def add_compiled_figures(
    figures: Figures, compiled: Any, calls: int, mesh: Mesh, machine: Machine
) -> Figures:
    """Return the figures with XLA's memory, traffic and collectives, and the resulting times."""
    memory, moved = compiled.memory_analysis(), hlo.read_traffic(compiled.as_text(), dict(mesh.shape), calls)
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


def visited_share(program: Program, parts: Parts) -> Mapping[str, float]:
    """Return the share of blocks that each of the TPU's attention kernels visits (`splash.visited`)."""
    prompts = flops.find_prompts(program)
    if not parts.cfg.execution.splash or prompts is None:
        return {}
    sample, columns = parts.config.sample, prompts.tokens.shape[1]
    prompts_only = program.name.startswith(("generate", "verify"))
    rows = (0, columns) if prompts_only else (sample.samples, sample.max_new_tokens)
    return splash.visited(columns, *rows)


def refused_temporaries(message: str, arguments: float) -> float | None:
    """Read the bytes of temporaries from the TPU compiler's out-of-memory error; None for another error.

    `Used 23.36G of 15.75G hbm` includes the arguments, `HLO temporaries (1.00T)` does not.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    match = used or re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message)
    if match is None:
        return None
    size = float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]]
    return size - arguments if used else size


def crosses_nodes(axis: str, mesh: Mesh, machine: Machine) -> bool:
    """Return whether neighbours along the mesh axes in `axis` (joined by +) are in different nodes."""
    node = np.arange(mesh.size).reshape(tuple(mesh.shape.values())) // (mesh.size // machine.nodes)
    along = [list(mesh.shape).index(a) for a in axis.split("+") if a in mesh.shape]
    return any((np.diff(node, axis=a) != 0).any() for a in along)
