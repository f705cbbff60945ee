"""`medrlvr plan`: predict whether a config fits a machine, and a lower bound on the time of its steps.

Every program of the training step is lowered from shapes alone (no weights, no hub) and compiled by libtpu's
or CUDA's XLA for devices that need not exist. Where the figures come from:

XLA:           seconds to compile (on this machine), arguments, outputs and temporaries. Collectives and HBM
               traffic are read from the compiled program; loops are multiplied by their trip counts (hlo.py).
This library:  other arrays in memory while a program runs; FLOPs (flops.py); times. A program takes at least
               the longest of FLOPs ÷ peak, HBM traffic ÷ HBM speed and collectives ÷ link speed
               (machines.py). Every response counts with its full length, and a step with one batch.
               Overheads, the host's work and evaluation are not counted. So a time is a lower bound, not a
               forecast.
"""

import json
import math
import sys
from collections.abc import Iterator
from itertools import islice, product
from typing import Any, NamedTuple

import jax

from medrlvr_jax.build import total_steps
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config, LoRAConfig
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.plan.aot import Figures, bytes_per_device, compile_program, make_parts, training_programs
from medrlvr_jax.plan.machines import GIB, QUICK, Machine, parse

STEPS = 1000  # stands for an unknown number of steps: only constants of the schedule depend on it
LOW_EFFORT = "compiled with least effort (--quick): memory is approximate, traffic and times are too high"
UNITS = (
    "GiB, TFLOP and GB are per chip and step. From XLA: compile s, arguments, outputs, temporaries, HBM, "
    "net. Computed by this library: the rest."
)
MEMORY = ("program", "compile s", "arguments", "outputs", "temporaries", "others", "peak", "may use", "fits")
TIMES = ("TFLOP", "HBM GB", "net GB", "seconds ≥", "bound by")
SWEEP = ("fits", "peak GiB", "in", "seconds ≥", "tokens/s ≤")
FITS = {True: "yes", False: "NO"}
# Sizes of train splits, for planning without the data set on this machine.
QUESTIONS = {"GBaker/MedQA-USMLE-4-options": 10_178}


class Plan(NamedTuple):
    """The compiled programs of a training step on one machine."""

    config: Config
    machine: Machine
    mesh: dict[str, int]
    programs: list[Figures]
    advice: list[str]
    steps: int | None  # of the whole training; None if the number of questions is unknown
    quick: bool = False  # compiled with the lowest effort

    @property
    def fits(self) -> bool:
        return all(f.fits for f in self.programs)

    @property
    def tightest(self) -> Figures:
        """The program with the least memory left, or the most memory missing."""
        return max(self.programs, key=lambda f: (not f.fits, f.peak - f.usable))

    @property
    def seconds(self) -> float:
        return sum(f.seconds for f in self.programs)

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second, all responses at full length."""
        c = self.config.sample
        return c.questions * c.samples * c.max_new_tokens / self.seconds

    @property
    def mfu(self) -> float:
        """FLOPs without recomputation, divided by the chips' peak FLOPs in the time."""
        return sum(f.useful for f in self.programs) / (self.seconds * self.machine.chip.flops)


def plan(
    config: Config,
    machine: Machine,
    only: tuple[str, ...] = (),
    steps: int | None = None,
    cache: dict[str, Figures] | None = None,
    quick: bool = False,
) -> Plan:
    """Compile the step's programs (or those named in `only`) for the machine. `quick`: with lowest effort."""
    parts, figures = make_parts(config, machine), []
    for program in training_programs(parts, steps or STEPS):
        if not only or program.name in only:
            print(f"compiling {program.name} for {machine.topology} …", file=sys.stderr, flush=True)
            figures.append(compile_program(program, parts, machine, {} if cache is None else cache, quick))
    quick = quick and bool(QUICK[machine.chip.platform])
    result = Plan(config, machine, dict(parts.mesh.shape), figures, [], steps, quick)
    return result if result.fits else result._replace(advice=advise(config, machine, result.tightest))


def run(config: Config, topology: str, sweep: int, as_json: bool, questions: int | None, quick: bool) -> int:
    """Run the command: print the plan, or the table of `sweep` plans. Return 0 if (the best) fits, else 3."""
    jax.config.update("jax_platforms", "cpu")  # does not occupy an accelerator of this machine
    # programs for a machine that does not exist cannot be loaded from the cache
    jax.config.update("jax_enable_compilation_cache", False)
    machine, n = parse(topology), questions or QUESTIONS.get(config.data.path)
    steps = config.steps or (total_steps(config, n) if n else None)
    if not sweep:
        plans = [plan(config, machine, steps=steps, quick=quick)]
    else:
        cache: dict[str, Figures] = {}
        variants = islice(sweep_variants(config, machine), sweep)
        plans = [plan(variant, machine, steps=steps, cache=cache, quick=quick) for variant in variants]
        plans.sort(key=lambda p: (not p.fits, p.seconds))
    if as_json:
        trees = [as_tree(p) for p in plans]
        print(json.dumps(trees if sweep else trees[0], indent=1))
    else:
        print(sweep_table(plans) if sweep else table(plans[0]))
    return 0 if plans and plans[0].fits else 3


# --- advice on what to change ---


class Remedy(NamedTuple):
    """Settings that may lower a program's memory."""

    settings: tuple[str, ...]
    note: str = ""
    learning: float = 1.0  # expected factor on the temporaries of the learning programs
    sampling: float = 1.0  # expected factor on the temporaries of the other programs


def remedies(config: Config, machine: Machine) -> list[Remedy]:
    """List all remedies. Some are not legal settings of this config, or change nothing in it."""
    c, m = config, config.mesh
    data = machine.count // (m.fsdp * m.tensor) if m.data == -1 else m.data
    learners = ("policy", "critic") if c.learn.critic else ("policy",)
    microbatch = (c.learn.microbatch or c.learn.minibatch) // 2
    out = [
        Remedy((f"mesh.fsdp={m.fsdp * 2}", f"mesh.data={data // 2}")),
        Remedy((f"mesh.tensor={m.tensor * 2}", f"mesh.fsdp={m.fsdp // 2}")),
        Remedy((f"learn.microbatch={microbatch}",), learning=0.5),
        Remedy((f"sample.questions={c.sample.questions // 2}",), sampling=0.5),
        Remedy(("sample.layout=sharded",), "sampling is then many times slower"),
        Remedy(("model.remat=full",), learning=0.5 if c.model.remat != "full" else 1.0),
        Remedy(tuple(f"learn.{learner}.moments=bfloat16" for learner in learners)),
        Remedy(("learn.offload=true",), "the host's memory must hold the offloaded states"),
        Remedy(("model.vision=freeze",), "the vision tower is then not trained"),
    ]
    if c.model.lora:
        return out
    lora = ("model.param_dtype=bfloat16", f"model.lora={{rank: {LoRAConfig().rank}}}")
    return [
        *out,
        Remedy(lora, "only adapters are then trained; their learning rates are some hundred times higher"),
    ]


def advise(config: Config, machine: Machine, tightest: Figures) -> list[str]:
    """Describe the two remedies that lower the memory of the tightest program most.

    Arguments and other arrays are counted exactly. Temporaries are estimated by the remedy's factor.
    """
    gains = []
    for remedy in remedies(config, machine):
        try:
            states = state_bytes(change(config, *remedy.settings), machine)
        except ConfigError:  # not a legal setting of this config
            continue
        factor = remedy.learning if tightest.name.startswith("learn") else remedy.sampling
        peak = 0.0  # sync_weights does not exist if there is nothing to copy
        if tightest.name in states:
            peak = states[tightest.name] + tightest.outputs + tightest.temporaries * factor
        gains.append((tightest.peak - peak, remedy))
    lines = []
    for gain, remedy in sorted((g for g in gains if g[0] > 0.01 * GIB), reverse=True)[:2]:
        text = " ".join(remedy.settings) + (f" ({remedy.note})" if remedy.note else "")
        enough = ", enough there" if gain >= tightest.peak - tightest.usable else ""
        lines.append(f"{text}: about {gain / GIB:.1f} GiB less in {tightest.name}{enough}")
    return lines


def change(config: Config, *settings: str) -> Config:
    """Return the config with some settings replaced. Raise `ConfigError` if they are not legal in it."""
    return configs.load(configs.to_tree(config), settings, "plan")


def state_bytes(config: Config, machine: Machine) -> dict[str, float]:
    """Return the bytes in each device's memory when a program begins, arguments included, for each program.
    Nothing is compiled.
    """
    programs = training_programs(make_parts(config, machine), STEPS)
    return {p.name: bytes_per_device((p.args, p.kwargs, p.others)) for p in programs}


# --- sweep ---


def sweep_variants(config: Config, machine: Machine) -> Iterator[Config]:
    """Return the combinations of mesh, micro-batch and remat policy whose states alone fit the machine.

    Each of the three is ranked by its likely speed. Combinations are sorted by the sum of their ranks, so
    that a short sweep tries several values of each.
    """
    sizes = [2**i for i in range(machine.count.bit_length())]
    meshes = [(t, f) for t, f in product(sizes, sizes) if machine.count % (f * t) == 0]
    legal = [of_mesh for t, f in meshes if (of_mesh := mesh_variants(config, machine, f, t))]
    ranked = [(place, rank, variant) for place, of_mesh in enumerate(legal) for rank, variant in of_mesh]
    return (variant for _, _, variant in sorted(ranked, key=lambda r: (r[0] + r[1], r[1])))


def mesh_variants(config: Config, machine: Machine, fsdp: int, tensor: int) -> list[tuple[int, Config]]:
    """Return (rank, config) of the legal micro-batches and remat policies on one mesh; rank 0 is likely to be
    the fastest. Return none if the states alone do not fit.
    """
    mesh = ("mesh.data=-1", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}")
    sizes = [m for m in range(config.learn.minibatch, 0, -1) if config.learn.minibatch % m == 0]
    out: list[tuple[int, Config]] = []
    for (rank, size), (slower, remat) in product(enumerate(sizes), enumerate(("dots", "full"))):
        try:
            variant = change(config, *mesh, f"learn.microbatch={size}", f"model.remat={remat}")
            # the states are the same for each micro-batch and policy
            if not out and max(state_bytes(variant, machine).values()) >= machine.chip.usable:
                return []
        except ConfigError:  # sizes that do not divide
            continue
        out.append((rank + slower, variant))
    return out


# --- printing ---


def table(p: Plan) -> str:
    """Return the plan as text."""
    mesh = " × ".join(f"{k} {n}" for k, n in p.mesh.items())
    rows = []
    for f in p.programs:
        memory = (f.arguments, f.outputs, f.temporaries, f.others, f.peak, f.usable)
        work = (f.flops / 1e12, f.traffic / 1e9, sum(c.bytes for c in f.collectives) / 1e9, f.seconds)
        sizes = (f"{x / GIB:.2f}" for x in memory)
        rows.append((f.name, f"{f.compile_s:.0f}", *sizes, FITS[f.fits], *map(_number, work), f.bound))
    moved = [(f.name, c) for f in p.programs for c in f.collectives if c.bytes > 1e6]
    collectives = [(name, c.kind, c.axis, str(c.group), _number(c.bytes / 1e9)) for name, c in moved]
    lines = [f"{p.config.name} on {p.machine.topology} ({p.machine.count} chips), mesh {mesh}", ""]
    lines += [tables.plain((*MEMORY, *TIMES), rows), "", UNITS, ""]
    lines += [tables.plain(("collectives", "kind", "axis", "chips", "GB"), collectives), "", *conclude(p)]
    return "\n".join(lines + [LOW_EFFORT] * p.quick)


def conclude(p: Plan) -> list[str]:
    """Summarise the figures in lines: the time of a step and of the training, or what does not fit and what
    to change.
    """
    if not p.fits:
        out = []
        for f in (f for f in p.programs if not f.fits):
            need = f"{f.name} needs {f.peak / GIB:.2f} GiB of {f.usable / GIB:.2f}"
            refused = " (the compiler refuses it even alone)" if f.refused else ""
            out.append(f"does not fit: {need}: {(f.peak - f.usable) / GIB:.2f} too much{refused}")
        return out + [f"would help: {line}" for line in p.advice]
    shares = [(f.name, 100 * f.seconds / p.seconds) for f in p.programs]
    parts = [f"{name} {share:.0f} %" for name, share in shares if share > 0.5]
    largest = max(p.programs, key=lambda f: f.peak / f.usable)
    rate = f"at best {p.tokens_per_second:,.0f} response tokens/s"
    path, hours = p.config.data.path, (p.steps or 0) * p.seconds / 3600
    training = f"the number of questions of {path} is not known here; give --questions N"
    if p.steps is not None:
        training = f"{p.steps:,} steps, at least {_number(hours)} h without evaluation"
    batches = p.config.sample.max_batches
    drawn = f" if it draws one batch of at most {batches}" if batches > 1 else ""
    return [
        f"fits: at most {largest.peak / GIB:.2f} of {largest.usable / GIB:.2f} GiB, in {largest.name}",
        f"step: at least {_number(p.seconds)} s{drawn}; {', '.join(parts)}",
        f"{rate}, model-FLOP utilisation {100 * p.mfu:.0f} %",
        f"training: {training}",
    ]


def sweep_table(plans: list[Plan]) -> str:
    """Return the plans of one config, sorted with the best first, as text."""
    if not plans:
        return "no mesh of this machine holds the training states, or none divides the sizes of this config"
    rows = []
    for p in plans:
        settings = (*map(str, p.mesh.values()), str(p.config.learn.microbatch), p.config.model.remat)
        peak, rates = f"{p.tightest.peak / GIB:.2f}", map(_number, (p.seconds, p.tokens_per_second))
        rows.append((*settings, FITS[p.fits], peak, p.tightest.name, *rates))
    c = plans[0].config
    mesh = f"mesh={{data: -1, fsdp: {c.mesh.fsdp}, tensor: {c.mesh.tensor}}}"
    settings = f"{mesh} learn.microbatch={c.learn.microbatch} model.remat={c.model.remat}"
    best = f"fastest that fits: {settings}" if plans[0].fits else "none of these fits"
    head = (*plans[0].mesh, "microbatch", "remat", *SWEEP)
    return "\n".join([tables.plain(head, rows), "", best, *[LOW_EFFORT] * plans[0].quick])


def _number(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def as_tree(p: Plan) -> dict[str, Any]:
    """Return the plan for JSON. Unknown numbers are null."""
    out = {name: getattr(p, name) for name in ("mesh", "fits", "seconds", "tokens_per_second", "mfu")}
    out |= {"steps": p.steps, "quick": p.quick, "advice": p.advice, "config": configs.to_tree(p.config)}
    out["programs"] = [
        f._asdict()
        | {name: getattr(f, name) for name in ("peak", "fits", "bound", "seconds")}
        | {"collectives": [c._asdict() for c in f.collectives]}
        for f in p.programs
    ]
    return files.json_tree({"topology": p.machine.topology} | out)
