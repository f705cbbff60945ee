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

import dataclasses
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
from medrlvr_jax.host import tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.plan.aot import Figures, bytes_of, compile_program, planned, prepare
from medrlvr_jax.plan.machines import GIB, QUICK, Machine, parse

STEPS = 1000  # of a run whose length is not known: only the schedule's constants depend on it
LEAST = (
    "compiled with the least effort (--quick): memory is roughly what it will be, traffic and "
    "times are too high"
)
# of the train split, where the set itself is not at hand
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
    def seconds(self) -> float:
        return sum(f.seconds for f in self.programs)

    @property
    def tokens(self) -> int:
        """Response tokens of a step, at full length."""
        c = self.config.sample
        return c.questions * c.samples * c.max_new_tokens

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
    """Compile the step's programs (or `only` those named) for the machine; `quick`: with the compiler's least
    effort.
    """
    parts = prepare(config, machine)
    figures = []
    for program in planned(parts, steps or STEPS):
        if not only or program.name in only:
            print(f"compiling {program.name} for {machine.topology} …", file=sys.stderr, flush=True)
            figures.append(compile_program(program, parts, machine, {} if cache is None else cache, quick))
    worst = max(figures, key=lambda f: f.peak - f.usable)
    advice = [] if worst.fits else advise(config, machine, worst)
    return Plan(
        config,
        machine,
        dict(parts.mesh.shape),
        figures,
        advice,
        steps,
        quick and bool(QUICK[machine.chip.platform]),
    )


def run(config: Config, topology: str, sweep: int, as_json: bool, questions: int | None, quick: bool) -> int:
    """The command: prints, and returns 0 if all fits, 3 if not."""
    jax.config.update("jax_platforms", "cpu")  # whatever accelerator is here is left alone
    machine, steps = parse(topology), length(config, questions)
    if sweep:
        found = sorted(tried(config, machine, sweep, steps, quick), key=lambda p: (not p.fits, p.seconds))
        print(json.dumps([as_tree(p) for p in found], indent=1) if as_json else sweep_table(found))
        return 0 if found and found[0].fits else 3
    made = plan(config, machine, steps=steps, quick=quick)
    print(json.dumps(as_tree(made), indent=1) if as_json else table(made))
    return 0 if made.fits else 3


def length(config: Config, questions: int | None) -> int | None:
    """Steps of the configured training, where the number of questions is known or not needed."""
    if config.steps:
        return config.steps
    n = questions or QUESTIONS.get(config.data.path)
    return total_steps(config, n) if n else None


# --- what to change
# --------------------------------------------------------------------------------------------------


def variants(config: Config, machine: Machine) -> Iterator[tuple[str, Config, float]]:
    """Settings that lower a program's memory: their text, the changed config, and the factor we expect on
    temporaries.
    """
    c, m = config, config.mesh
    data = machine.count // (m.fsdp * m.tensor) if m.data == -1 else m.data

    def changed(**sections: dict[str, Any]) -> Config:
        tree = configs.to_tree(c)
        for name, fields in sections.items():
            tree[name] |= fields
        return configs.from_tree(tree)

    half_micro, half_step = (c.learn.microbatch or c.learn.minibatch) // 2, c.sample.questions // 2
    candidates: list[tuple[str, dict[str, Any], float]] = [
        (
            f"mesh.fsdp={m.fsdp * 2} (and mesh.data={data // 2})",
            {"mesh": {"fsdp": m.fsdp * 2, "data": data // 2}},
            1.0,
        ),
        (
            f"mesh.tensor={m.tensor * 2} (and mesh.fsdp={m.fsdp // 2})",
            {"mesh": {"tensor": m.tensor * 2, "fsdp": m.fsdp // 2}},
            1.0,
        ),
        (f"learn.microbatch={half_micro}", {"learn": {"microbatch": half_micro}}, 0.5),
        (f"sample.questions={half_step}", {"sample": {"questions": half_step}}, 0.5),
        (
            "sample.layout=sharded (sampling is then many times slower)",
            {"sample": {"layout": "sharded"}},
            1.0,
        ),
        ("model.remat=full", {"model": {"remat": "full"}}, 0.5 if c.model.remat != "full" else 1.0),
        ("learn.policy.moments=bfloat16", {"learn": {"policy": _moments(c.learn.policy)}}, 1.0),
    ]
    if c.learn.critic:
        both = {"learn": {"policy": _moments(c.learn.policy), "critic": _moments(c.learn.critic)}}
        candidates.append(("learn.policy.moments=bfloat16 and learn.critic.moments=bfloat16", both, 1.0))
    if not c.learn.offload:
        candidates.append(
            ("learn.offload=true (the host's memory must hold it)", {"learn": {"offload": True}}, 1.0)
        )
    if not c.model.lora:
        adapters = LoRAConfig()
        text = (
            f"model.param_dtype=bfloat16 model.lora={{rank: {adapters.rank}}} (adapters alone "
            "learn, at rates some hundred times higher)"
        )
        candidates.append(
            (text, {"model": {"lora": dataclasses.asdict(adapters), "param_dtype": "bfloat16"}}, 1.0)
        )
    for text, sections, factor in candidates:
        try:
            yield text, changed(**sections), factor
        except ConfigError:  # not a legal setting here, so nothing to advise
            continue


def _moments(optimizer: Any) -> dict[str, Any]:
    return dataclasses.asdict(optimizer) | {"moments": "bfloat16"}


def advise(config: Config, machine: Machine, worst: Figures) -> list[str]:
    """The two settings that lower the worst program's memory most: by our count of what it holds, temporaries
    taken in proportion.
    """
    saved = []
    for text, changed, factor in variants(config, machine):
        try:
            held = resident(changed, machine)
        except ConfigError:
            continue
        learns = worst.name.startswith("learn")
        applies = {"learn.microbatch": learns, "model.remat": learns, "sample.questions": not learns}.get(
            text.partition("=")[0], True
        )
        own = worst.outputs + worst.temporaries * (factor if applies else 1.0)
        # a sync with nothing left to copy is no program
        peak = held[worst.name] + own if worst.name in held else 0.0
        saved.append((worst.peak - peak, text))
    best = sorted((s for s in saved if s[0] > 0.01 * GIB), reverse=True)[:2]
    enough = worst.peak - worst.usable
    return [
        f"{text}: about {gain / GIB:.1f} GiB less in {worst.name}{', enough there' * (gain >= enough)}"
        for gain, text in best
    ]


def resident(config: Config, machine: Machine) -> dict[str, float]:
    """Bytes per device that each program finds in memory, its arguments included, without compiling
    anything.
    """
    return {p.name: bytes_of((p.args, p.kwargs, p.others)) for p in planned(prepare(config, machine), STEPS)}


def to_try(config: Config, machine: Machine) -> Iterator[Config]:
    """Meshes whose states alone fit × micro-batches × remat: each begins with what is likely to be quick, and
    what is near the beginning of all three comes first, so that few tries see several of each.
    """
    ways = [2**i for i in range(machine.count.bit_length()) if machine.count % 2**i == 0]
    micro = [m for m in range(config.learn.minibatch, 0, -1) if config.learn.minibatch % m == 0]
    kinds = [(size, remat) for size in micro for remat in ("dots", "full")]

    def legal(fsdp: int, tensor: int) -> list[tuple[int, Config]]:
        found = []
        for size, remat in kinds:
            tree = configs.to_tree(config)
            tree["mesh"] |= {"data": -1, "fsdp": fsdp, "tensor": tensor}
            tree["learn"]["microbatch"], tree["model"]["remat"] = size, remat
            try:
                changed = configs.from_tree(tree)
                # neither size nor remat moves it
                held = max(resident(changed, machine).values()) if not found else 0.0
            except ConfigError:  # sizes that do not divide
                continue
            if held >= machine.chip.usable:
                return []
            found.append((micro.index(size) + (remat == "full"), changed))
        return found

    meshes = [
        found for t, f in product(ways, ways) if machine.count % (f * t) == 0 and (found := legal(f, t))
    ]
    ranked = [
        ((place + rank, rank), changed) for place, found in enumerate(meshes) for rank, changed in found
    ]
    return (changed for _, changed in sorted(ranked, key=lambda pair: pair[0]))


def tried(config: Config, machine: Machine, limit: int, steps: int | None, quick: bool) -> Iterator[Plan]:
    """Plans of the first `limit` of `to_try`."""
    cache: dict[str, Figures] = {}
    for changed in islice(to_try(config, machine), limit):
        yield plan(changed, machine, steps=steps, cache=cache, quick=quick)


# --- printing
# --------------------------------------------------------------------------------------------------------


def table(p: Plan) -> str:
    """The plan for people."""
    mesh = " × ".join(f"{k} {n}" for k, n in p.mesh.items())
    lines = [f"{p.config.name} on {p.machine.topology} ({p.machine.count} chips), mesh {mesh}", ""]
    head = (
        "program",
        "compile s",
        "arguments",
        "outputs",
        "temporaries",
        "others",
        "peak",
        "may use",
        "fits",
        "TFLOP",
        "HBM GB",
    )
    rows = []
    for f in p.programs:
        memory = (f.arguments, f.outputs, f.temporaries, f.others, f.peak, f.usable)
        work = (f.flops / 1e12, f.traffic / 1e9, sum(c.bytes for c in f.collectives) / 1e9, f.seconds)
        sizes = (f"{x / GIB:.2f}" for x in memory)
        rows.append(
            (f.name, f"{f.compile_s:.0f}", *sizes, "yes" if f.fits else "NO", *map(_figure, work), f.bound)
        )
    lines.append(tables.plain((*head, "net GB", "seconds ≥", "bound by"), rows))
    lines += [
        "",
        "GiB, TFLOP and GB per chip and step. XLA's: compile s, arguments, outputs, temporaries, "
        "HBM, net. Ours: the rest.",
        "",
    ]
    lines.append(tables.plain(("collectives", "kind", "axis", "chips", "GB"), _collectives(p)))
    return "\n".join([*lines, "", *verdict(p), *([LEAST] if p.quick else [])])


def _collectives(p: Plan) -> list[tuple]:
    return [
        (f.name, c.kind, c.axis, str(c.group), _figure(c.bytes / 1e9))
        for f in p.programs
        for c in f.collectives
        if c.bytes > 1e6
    ]


def verdict(p: Plan) -> list[str]:
    """What the figures come to: the step and the training, or what does not fit and what to do."""
    if not p.fits:
        out = []
        for f in p.programs:
            if not f.fits:
                need = (
                    f"{f.name} needs {f.peak / GIB:.2f} GiB of {f.usable / GIB:.2f}: "
                    f"{(f.peak - f.usable) / GIB:.2f} too much"
                )
                out.append(
                    f"does not fit: {need}" + (" (the compiler refuses it even alone)" if f.refused else "")
                )
        return out + [f"would help: {line}" for line in p.advice]
    share = ", ".join(
        f"{f.name} {100 * f.seconds / p.seconds:.0f} %" for f in p.programs if f.seconds > 0.005 * p.seconds
    )
    tightest = max(p.programs, key=lambda f: f.peak / f.usable)
    out = [
        f"fits: at most {tightest.peak / GIB:.2f} of {tightest.usable / GIB:.2f} GiB, in {tightest.name}",
        f"step: at least {_figure(p.seconds)} s; {share}",
        f"at best {p.tokens / p.seconds:,.0f} response tokens/s, model-FLOP utilisation {100 * p.mfu:.0f} %",
    ]
    if p.steps is None:
        return [
            *out,
            f"training: the number of questions of {p.config.data.path} is not known here; give "
            "--questions N",
        ]
    return [
        *out,
        f"training: {p.steps:,} steps, at least {_figure(p.steps * p.seconds / 3600)} h, evaluation apart",
    ]


def sweep_table(plans: list[Plan]) -> str:
    head = (
        "slice",
        "data",
        "fsdp",
        "tensor",
        "microbatch",
        "remat",
        "fits",
        "peak GiB",
        "in",
        "seconds ≥",
        "tokens/s ≤",
    )
    rows = []
    for p in plans:
        c, worst = p.config, max(p.programs, key=lambda f: f.peak - f.usable)
        sizes = (
            *map(str, p.mesh.values()),
            str(c.learn.microbatch),
            c.model.remat,
            "yes" if p.fits else "NO",
        )
        rows.append(
            (*sizes, f"{worst.peak / GIB:.2f}", worst.name, _figure(p.seconds), _figure(p.tokens / p.seconds))
        )
    if not rows:
        return "no mesh of this machine holds the training states, or none divides the sizes of this config"
    c = plans[0].config
    mesh, learn = (
        f"mesh={{data: -1, fsdp: {c.mesh.fsdp}, tensor: {c.mesh.tensor}}}",
        f"learn.microbatch={c.learn.microbatch}",
    )
    best = (
        f"cheapest that fits: {mesh} {learn} model.remat={c.model.remat}"
        if plans[0].fits
        else "none of these fits"
    )
    return "\n".join([tables.plain(head, rows), "", best, *([LEAST] if plans[0].quick else [])])


def _figure(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def as_tree(p: Plan) -> dict[str, Any]:
    """The plan for machines; numbers that are not known are null."""
    programs = []
    for f in p.programs:
        more = {"collectives": [c._asdict() for c in f.collectives], "peak": f.peak, "fits": f.fits}
        programs.append(f._asdict() | more | {"bound": f.bound, "seconds": f.seconds})
    out = {
        "topology": p.machine.topology,
        "mesh": p.mesh,
        "fits": p.fits,
        "seconds": p.seconds,
        "tokens_per_second": p.tokens / p.seconds,
    }
    out |= {"mfu": p.mfu, "steps": p.steps, "quick": p.quick}
    out |= {"programs": programs, "advice": p.advice, "config": configs.to_tree(p.config)}
    return json.loads(json.dumps(out), parse_constant=lambda _: None)
