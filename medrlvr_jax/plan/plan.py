"""`medrlvr plan`: would this config fit that machine, and how fast at best? Answered by the machine's own
compiler, without the machine.

Every program of the training step is lowered from shapes alone (no weights, no hub) and compiled by libtpu's
or CUDA's XLA for a topology of devices that need not exist. Whose numbers they are:

XLA's   seconds to compile (on this machine), arguments, outputs and temporaries; collectives and HBM traffic
        are read from its compiled program, loops multiplied by their trip counts (hlo.py).
ours    what else lives in memory while a program runs; FLOPs (flops.py); times: a program takes at least the
        longest of FLOPs ÷ peak, HBM traffic ÷ HBM speed, collectives ÷ link speed (machines.py). Every
        response has its full length; overheads, the host's share and evaluation are left out. So a time is a
        bound that a run may come near, not a forecast.

`--quick` asks the TPU's compiler for its least effort (a GPU's has no less): for full PPO of 3B on v5e:4x4 42
seconds, not 2 minutes. Peaks came out between 1.1 GiB less and 0.3 more there, traffic up to 2.5 times as
large. It is for trying settings, not for the last word.
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
from medrlvr_jax.plan.aot import Figures, bytes_of, compile_program, planned, prepare
from medrlvr_jax.plan.machines import GIB, QUICK, Machine, parse

STEPS = 1000  # of a run whose length is not known: only the schedule's constants depend on it
LEAST = "compiled with least effort (--quick): memory is approximate, traffic and times are too high"
UNITS = (
    "GiB, TFLOP and GB are per chip and step. From XLA: compile s, arguments, outputs, temporaries, HBM, "
    "net. Computed by this library: the rest."
)
PROGRAM = ("program", "compile s", "arguments", "outputs", "temporaries", "others", "peak", "may use", "fits")
WORK = ("TFLOP", "HBM GB", "net GB", "seconds ≥", "bound by")
SWEEP = ("fits", "peak GiB", "in", "seconds ≥", "tokens/s ≤")
# of the train split, where the set itself is not on this machine
QUESTIONS = {"GBaker/MedQA-USMLE-4-options": 10_178}


class Plan(NamedTuple):
    """All programs of a step on one machine."""

    config: Config
    machine: Machine
    mesh: dict[str, int]
    programs: list[Figures]
    advice: list[str]
    steps: int | None  # of the configured training, if that is known
    quick: bool = False  # compiled with the least effort

    @property
    def fits(self) -> bool:
        return all(f.fits for f in self.programs)

    @property
    def worst(self) -> Figures:
        """The program that leaves least memory free, or lacks most."""
        return max(self.programs, key=lambda f: f.peak - f.usable)

    @property
    def seconds(self) -> float:
        return sum(f.seconds for f in self.programs)

    @property
    def tokens_per_second(self) -> float:
        """Response tokens, at full length."""
        c = self.config.sample
        return c.questions * c.samples * c.max_new_tokens / self.seconds

    @property
    def mfu(self) -> float:
        """FLOPs without recomputation over what the chips could have done in the time."""
        return sum(f.useful for f in self.programs) / (self.seconds * self.machine.chip.flops)


def plan(
    config: Config,
    machine: Machine,
    only: tuple[str, ...] = (),
    steps: int | None = None,
    cache: dict[str, Figures] | None = None,
    quick: bool = False,
) -> Plan:
    """Compile the step's programs (or `only` those named) for the machine; `quick`: with least effort."""
    parts, figures = prepare(config, machine), []
    for program in planned(parts, steps or STEPS):
        if not only or program.name in only:
            print(f"compiling {program.name} for {machine.topology} …", file=sys.stderr, flush=True)
            figures.append(compile_program(program, parts, machine, {} if cache is None else cache, quick))
    quick = quick and bool(QUICK[machine.chip.platform])
    result = Plan(config, machine, dict(parts.mesh.shape), figures, [], steps, quick)
    return result if result.worst.fits else result._replace(advice=advise(config, machine, result.worst))


def run(config: Config, topology: str, sweep: int, as_json: bool, questions: int | None, quick: bool) -> int:
    """The command: prints, and returns 0 if all fits, 3 if not."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is left alone
    # programs for a machine that does not exist cannot be loaded from the cache
    jax.config.update("jax_enable_compilation_cache", False)
    machine, steps = parse(topology), length(config, questions)
    if not sweep:
        plans = [plan(config, machine, steps=steps, quick=quick)]
        trees: Any = as_tree(plans[0])
    else:
        plans = sorted(tried(config, machine, sweep, steps, quick), key=lambda p: (not p.fits, p.seconds))
        trees = [as_tree(p) for p in plans]
    print(json.dumps(trees, indent=1) if as_json else sweep_table(plans) if sweep else table(plans[0]))
    return 0 if plans and plans[0].fits else 3


def length(config: Config, questions: int | None) -> int | None:
    """Steps of the configured training, where the number of questions is known or not needed."""
    n = questions or QUESTIONS.get(config.data.path)
    return config.steps or (total_steps(config, n) if n else None)


# --- what to change ---


class Remedy(NamedTuple):
    """Settings that may lower a program's memory."""

    settings: tuple[str, ...]
    note: str = ""
    learning: float = 1.0  # the factor that we expect on the temporaries of learning's programs
    sampling: float = 1.0  # and on those of the others


def remedies(config: Config, machine: Machine) -> list[Remedy]:
    """Some are not legal settings of this config, or change nothing in it."""
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
        Remedy(("learn.offload=true",), "the host's memory must hold it"),
        Remedy(("model.vision=freeze",), "the vision tower then learns nothing"),
    ]
    if c.model.lora:
        return out
    lora = ("model.param_dtype=bfloat16", f"model.lora={{rank: {LoRAConfig().rank}}}")
    return [*out, Remedy(lora, "adapters alone learn, at rates some hundred times higher")]


def advise(config: Config, machine: Machine, worst: Figures) -> list[str]:
    """The two remedies that lower the worst program's memory most.

    What it holds is counted exactly; its temporaries are taken in proportion.
    """
    gains = []
    for remedy in remedies(config, machine):
        try:
            held = resident(changed(config, *remedy.settings), machine)
        except ConfigError:  # not a legal setting of this config
            continue
        factor = remedy.learning if worst.name.startswith("learn") else remedy.sampling
        # a sync with nothing left to copy is no program
        peak = held[worst.name] + worst.outputs + worst.temporaries * factor if worst.name in held else 0.0
        gains.append((worst.peak - peak, remedy))
    lines = []
    for gain, remedy in sorted((g for g in gains if g[0] > 0.01 * GIB), reverse=True)[:2]:
        text = " ".join(remedy.settings) + (f" ({remedy.note})" if remedy.note else "")
        enough = ", enough there" if gain >= worst.peak - worst.usable else ""
        lines.append(f"{text}: about {gain / GIB:.1f} GiB less in {worst.name}{enough}")
    return lines


def changed(config: Config, *settings: str) -> Config:
    """The config with some settings replaced; raises ConfigError where they are not legal in it."""
    return configs.load(configs.to_tree(config), settings, "plan")


def resident(config: Config, machine: Machine) -> dict[str, float]:
    """Bytes per device in memory when each program begins, its arguments included. Compiles nothing."""
    return {p.name: bytes_of((p.args, p.kwargs, p.others)) for p in planned(prepare(config, machine), STEPS)}


def to_try(config: Config, machine: Machine) -> Iterator[Config]:
    """Meshes whose states alone fit × micro-batches × remat. Each of the three begins with what is likely to
    be quick; what is near the beginning of all three comes first, so that few tries see several of each.
    """
    sizes = [2**i for i in range(machine.count.bit_length())]
    meshes = [(t, f) for t, f in product(sizes, sizes) if machine.count % (f * t) == 0]
    legal = [of_mesh for t, f in meshes if (of_mesh := variants(config, machine, f, t))]
    ranked = [(place, rank, variant) for place, of_mesh in enumerate(legal) for rank, variant in of_mesh]
    return (variant for _, _, variant in sorted(ranked, key=lambda r: (r[0] + r[1], r[1])))


def variants(config: Config, machine: Machine, fsdp: int, tensor: int) -> list[tuple[int, Config]]:
    """On one mesh, the legal micro-batches and remat policies, each after its rank: 0 for the quickest. None
    where the states alone do not fit.
    """
    mesh = ("mesh.data=-1", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}")
    sizes = [m for m in range(config.learn.minibatch, 0, -1) if config.learn.minibatch % m == 0]
    out: list[tuple[int, Config]] = []
    for (rank, size), (slower, remat) in product(enumerate(sizes), enumerate(("dots", "full"))):
        try:
            variant = changed(config, *mesh, f"learn.microbatch={size}", f"model.remat={remat}")
            # the states are the same at each size and policy
            if not out and max(resident(variant, machine).values()) >= machine.chip.usable:
                return []
        except ConfigError:  # sizes that do not divide
            continue
        out.append((rank + slower, variant))
    return out


def tried(config: Config, machine: Machine, limit: int, steps: int | None, quick: bool) -> Iterator[Plan]:
    """Plans of the first `limit` of `to_try`."""
    cache: dict[str, Figures] = {}
    for variant in islice(to_try(config, machine), limit):
        yield plan(variant, machine, steps=steps, cache=cache, quick=quick)


# --- printing ---


def table(p: Plan) -> str:
    """The plan as text."""
    mesh = " × ".join(f"{k} {n}" for k, n in p.mesh.items())
    rows = []
    for f in p.programs:
        memory = (f.arguments, f.outputs, f.temporaries, f.others, f.peak, f.usable)
        work = (f.flops / 1e12, f.traffic / 1e9, sum(c.bytes for c in f.collectives) / 1e9, f.seconds)
        sizes = (f"{x / GIB:.2f}" for x in memory)
        rows.append((f.name, f"{f.compile_s:.0f}", *sizes, yes(f.fits), *map(_figure, work), f.bound))
    moved = [(f.name, c) for f in p.programs for c in f.collectives if c.bytes > 1e6]
    collectives = [(name, c.kind, c.axis, str(c.group), _figure(c.bytes / 1e9)) for name, c in moved]
    lines = [f"{p.config.name} on {p.machine.topology} ({p.machine.count} chips), mesh {mesh}", ""]
    lines += [tables.plain((*PROGRAM, *WORK), rows), "", UNITS, ""]
    lines += [tables.plain(("collectives", "kind", "axis", "chips", "GB"), collectives), "", *verdict(p)]
    return "\n".join(lines + [LEAST] * p.quick)


def verdict(p: Plan) -> list[str]:
    """What the figures come to: the step and the training, or what does not fit and what to do."""
    if not p.fits:
        out = []
        for f in (f for f in p.programs if not f.fits):
            need = f"{f.name} needs {f.peak / GIB:.2f} GiB of {f.usable / GIB:.2f}"
            refused = " (the compiler refuses it even alone)" if f.refused else ""
            out.append(f"does not fit: {need}: {(f.peak - f.usable) / GIB:.2f} too much{refused}")
        return out + [f"would help: {line}" for line in p.advice]
    shares = [(f.name, 100 * f.seconds / p.seconds) for f in p.programs]
    parts = [f"{name} {share:.0f} %" for name, share in shares if share > 0.5]
    tightest = max(p.programs, key=lambda f: f.peak / f.usable)
    rate = f"at best {p.tokens_per_second:,.0f} response tokens/s"
    path, hours = p.config.data.path, (p.steps or 0) * p.seconds / 3600
    training = f"the number of questions of {path} is not known here; give --questions N"
    if p.steps is not None:
        training = f"{p.steps:,} steps, at least {_figure(hours)} h, evaluation apart"
    return [
        f"fits: at most {tightest.peak / GIB:.2f} of {tightest.usable / GIB:.2f} GiB, in {tightest.name}",
        f"step: at least {_figure(p.seconds)} s; {', '.join(parts)}",
        f"{rate}, model-FLOP utilisation {100 * p.mfu:.0f} %",
        f"training: {training}",
    ]


def sweep_table(plans: list[Plan]) -> str:
    """Plans of one config, the best first."""
    if not plans:
        return "no mesh of this machine holds the training states, or none divides the sizes of this config"
    rows = []
    for p in plans:
        settings = (*map(str, p.mesh.values()), str(p.config.learn.microbatch), p.config.model.remat)
        peak, rates = f"{p.worst.peak / GIB:.2f}", map(_figure, (p.seconds, p.tokens_per_second))
        rows.append((*settings, yes(p.fits), peak, p.worst.name, *rates))
    c = plans[0].config
    mesh = f"mesh={{data: -1, fsdp: {c.mesh.fsdp}, tensor: {c.mesh.tensor}}}"
    settings = f"{mesh} learn.microbatch={c.learn.microbatch} model.remat={c.model.remat}"
    best = f"cheapest that fits: {settings}" if plans[0].fits else "none of these fits"
    head = (*plans[0].mesh, "microbatch", "remat", *SWEEP)
    return "\n".join([tables.plain(head, rows), "", best, *[LEAST] * plans[0].quick])


def yes(fits: bool) -> str:
    return "yes" if fits else "NO"


def _figure(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def as_tree(p: Plan) -> dict[str, Any]:
    """The plan for JSON; numbers that are not known are null."""
    out = {name: getattr(p, name) for name in ("mesh", "fits", "seconds", "tokens_per_second", "mfu")}
    out |= {"steps": p.steps, "quick": p.quick, "advice": p.advice, "config": configs.to_tree(p.config)}
    out["programs"] = [
        f._asdict()
        | {name: getattr(f, name) for name in ("peak", "fits", "bound", "seconds")}
        | {"collectives": [c._asdict() for c in f.collectives]}
        for f in p.programs
    ]
    return files.plain({"topology": p.machine.topology} | out)
