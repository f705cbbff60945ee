"""Is it right on the accelerator that is here, and how fast: kernels, determinism, speed and memory, in at
most eight minutes.

    python tests/on_device.py --out DIR                      # one GPU or TPU; another chip of the host stays
                                                             idle
    python tests/on_device.py --out DIR --small              # the same sections on tiny shapes, also on a
    CPU: a minute python tests/on_device.py --out DIR --only step_3B profile

Needs the packages of setup.cfg and JAX for the accelerator ('.[cuda]', '.[cuda13]', '.[tpu]'); no network, no
data, no weights. Tokens are random with the frequencies of words, weights are random, so that no response
stops at once: all have their full length. What is timed is what a training runs: `train.train_step`, its
programs compiled as a training compiles them. DIR gets

    on_device.jsonl   a line for every figure as soon as it is measured
    on_device.md      the same as tables, and on_device.json as one tree: which sections are done, failed,
                      stopped or skipped
    on_device.log     what the sections printed, tracebacks among it

Sections run in order of value, each in a process of its own, so that memory, compiler flags or a crash of one
are no other's. One that would take longer than is left of --budget is skipped, one that does take longer is
stopped; both are named. Exit status: 0, or 1 where a section raised, crashed, was stopped or missed a bound.
JAX_COMPILATION_CACHE_DIR makes a second run on the same machine quicker.

Beside a program's seconds stand what it must do at least (`share_of_…`: of the machine's published peaks;
`of_…`: of what a large matmul or a copy reaches in the same process) and what `medrlvr plan` says of it
(`planned_…`). Peaks of memory are the device's own counter, which never falls: that of a program is the
largest so far.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
if find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin"):  # as launch/gpu_1x.sh
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ["XLA_FLAGS"] = "--xla_gpu_dot_merger_threshold_mb=0 " + os.environ.get("XLA_FLAGS", "")

import bench_parts as bench  # noqa: E402
import float64  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import show_profile  # noqa: E402
import yaml  # noqa: E402
from same_run import differences  # noqa: E402

from medrlvr_jax import build, cli  # noqa: E402
from medrlvr_jax.config import load as configs  # noqa: E402
from medrlvr_jax.data.question import Question  # noqa: E402
from medrlvr_jax.data.tokenizer import load_tokenizer  # noqa: E402
from medrlvr_jax.host import files  # noqa: E402
from medrlvr_jax.model import decoder, families, lora  # noqa: E402
from medrlvr_jax.model.architecture import DecoderConfig  # noqa: E402
from medrlvr_jax.plan import aot, machines  # noqa: E402
from medrlvr_jax.plan.machines import GIB, Chip, Machine  # noqa: E402
from medrlvr_jax.rl import train  # noqa: E402
from medrlvr_jax.rl.ahead import step_programs  # noqa: E402
from medrlvr_jax.rl.programs import make_programs  # noqa: E402
from medrlvr_jax.rl.step import Training  # noqa: E402
from medrlvr_jax.rollout.rollout import Encoded, width  # noqa: E402
from medrlvr_jax.runs.profile import Compiles  # noqa: E402
from medrlvr_jax.sharding import to_host  # noqa: E402

SHAPES = {size: families.known(f"Qwen/Qwen2.5-{size}") for size in ("0.5B", "1.5B", "3B")}
SHAPES["0.1B"] = DecoderConfig(151_936, 512, 12, 8, 2, 64, 2816, 1e6, 1e-6, True, qkv_bias=True)
SHAPES["tiny"] = DecoderConfig(2048, 64, 2, 4, 2, 16, 128, 1e6, 1e-6, True, qkv_bias=True)
FLAGS = {  # by what the determinism sections call them
    "as launched": "",
    "no nondeterministic operations": "--xla_gpu_exclude_nondeterministic_ops=true",
    "no nondeterministic operations, no tuning": "--xla_gpu_deterministic_ops=true",
}


class Sizes(NamedTuple):
    """Of a step: questions, prompt tokens, samples, response tokens; and how often each thing is timed."""

    questions: int = 16
    prompt: int = 256
    samples: int = 8
    new: int = 240  # below 256 the sampler is one loop, and compiles in half the time
    runs: int = 3


class Section(NamedTuple):
    name: str
    seconds: float  # about what it takes on one H200 with 16 cores; on a CPU with --small far less
    run: Callable[["Report", bool], None]


class Report(NamedTuple):
    """Where a section writes what it measures."""

    file: Path
    section: str

    def __call__(self, **figures: Any) -> None:
        files.append(self.file, [{"section": self.section} | tidy(figures)])


def tidy(x: Any) -> Any:
    """Numbers with four digits, as JSON has them."""
    if isinstance(x, dict):
        return {str(k): tidy(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [tidy(v) for v in x]
    if isinstance(x, (float, np.floating, jax.Array)):
        return float(f"{float(x):.4g}") if np.isfinite(float(x)) else None
    return x if x is None or isinstance(x, (bool, int, str)) else str(x)


def missed(report: Report, wrong: list[str]) -> None:
    """A bound that was missed fails the section, after everything has been written down."""
    if wrong:
        raise AssertionError(f"{report.section}: {len(wrong)} beyond the bound: " + "; ".join(wrong))


# --- what is here
# -----------------------------------------------------------------------------------------------------


def memory(name: str) -> float | None:
    """GiB by one of the device's counters; None where it has none (a CPU)."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats[name] / GIB if name in stats else None


def reached() -> dict[str, float]:
    """What this device reaches: bfloat16 matmuls of 8,192² and copies of 4 GiB; on a CPU float32, and less of
    both.
    """
    return (
        bench.machine(512, "float32", 2**24)
        if jax.default_backend() == "cpu"
        else bench.machine(8192, "bfloat16", 2**32)
    )


def the_chip() -> Chip:
    """By its published figures where they are in machines.py, else by measured ones; with the memory that
    programs have here.
    """
    device = jax.devices()[0]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = host if (limit := memory("bytes_limit")) is None else limit * GIB
    for chip in machines.CHIPS.values():
        if chip.kind == device.device_kind:
            return dataclasses.replace(chip, usable=usable)
    rates = reached()
    return Chip(
        device.platform,
        rates["matmul_gflops"] * 1e9,
        usable,
        rates["copy_gbs"] * 1e9,
        1.0,
        kind=device.device_kind,
    )


def machine(report: Report, small: bool) -> None:
    device, chip = jax.devices()[0], the_chip()
    known = next(
        (name for name, c in machines.CHIPS.items() if c.kind == device.device_kind),
        "no: its peaks are those measured here",
    )
    report(
        device=device.device_kind,
        platform=device.platform,
        devices=len(jax.devices()),
        cores=os.cpu_count(),
        in_machines=known,
    )
    versions = {
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "xla": device.client.platform_version,
    }
    report(**versions, xla_flags=os.environ.get("XLA_FLAGS", ""), usable_gib=chip.usable / GIB)
    report(
        matmul="as most of a step is",
        peak_gflops=chip.flops / 1e9,
        peak_gbs=chip.hbm_speed / 1e9,
        **reached(),
    )
    if not small:
        for precision in ("default", "highest"):
            with jax.default_matmul_precision(precision):
                report(matmul=f"float32, precision {precision}", **bench.machine(4096, "float32", 2**30))


# --- parity
# -----------------------------------------------------------------------------------------------------------


def parity(report: Report, small: bool) -> None:
    """Every kernel against float64 on the host (float64.py)."""
    wrong = []

    def one(case: float64.Case) -> None:
        with jax.default_matmul_precision(case.precision):
            error = case.error()
        report(
            kernel=case.kernel, arithmetic=case.dtype, precision=case.precision, error=error, bound=case.bound
        )
        if not error <= case.bound:  # a NaN is beyond any
            wrong.append(
                f"{case.kernel} in {case.dtype}, precision {case.precision}: {error:.2e} of {case.bound:.0e}"
            )

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:  # compiling is most of it
        for future in [pool.submit(one, case) for case in float64.cases(jax.default_backend(), small)]:
            future.result()
    missed(report, wrong)


# --- a training step
# --------------------------------------------------------------------------------------------------


def lay_out(size: str, sizes: Sizes, **changes: Any) -> build.Parts:
    """GRPO with a reference on the first device; the tokenizer is the embedded one, whose words are fewer
    than the model's.
    """
    tree: dict[str, Any] = {
        "name": "on_device",
        "steps": 1000,
        "model": {"path": size, "init": "random", "dtype": "float32" if size == "tiny" else "bfloat16"},
        "data": {"path": "none"},
        "prompt": {"max_tokens": sizes.prompt},
        "sample": {"questions": sizes.questions, "samples": sizes.samples, "max_new_tokens": sizes.new},
        "advantage": {"estimator": "group"},
        "kl": {"coef": 0.001, "into": "loss", "estimator": "k3"},
        "learn": {"minibatch": sizes.questions, "policy": {"lr": 1e-6}},
        "eval": {"batch": sizes.questions},
    }
    for name, fields in changes.items():
        tree[name] = tree.get(name, {}) | fields
    config = configs.from_tree(tree, "on_device")
    return build.lay_out(config, load_tokenizer("embedded"), SHAPES[size], jax.devices()[:1])


def words(rng: np.random.Generator, vocab: int, *shape: int) -> np.ndarray:
    """Tokens as frequent as words are (Zipf), spread over the vocabulary."""
    ranks = np.minimum(rng.zipf(1.2, shape), vocab - 1)
    return (ranks * 7919 % (vocab - 2) + 2).astype(np.int32)


def questions(parts: build.Parts, sizes: Sizes) -> Encoded:
    """Prompts that fill their columns but for a few on the left."""
    rng, n = np.random.default_rng(0), sizes.questions
    tokens = [words(rng, parts.cfg.vocab, sizes.prompt - i % 8).tolist() for i in range(n)]
    asked = [Question(str(i), "?", bench.OPTIONS, i % 4) for i in range(n)]
    return Encoded(asked, tokens, np.arange(n, dtype=np.uint32), 0, width(sizes.prompt))


@partial(jax.jit, donate_argnums=0)
def lively(params: Any) -> Any:
    """Norms and biases away from 1 and 0, and scores four times as far apart: an entropy of a few nats, as a
    trained model's.
    """

    def one(path, p):
        name, where = path[-1].key, jax.tree_util.keystr(path)
        noise = jax.random.normal(jax.random.key(sum(map(ord, where))), p.shape, p.dtype)
        moved = 1 + 0.2 * noise if name.endswith("norm") else 0.5 * noise if name.endswith("bias") else p
        return 4 * moved if len(path) == 1 and name == "norm" else moved

    return jax.tree_util.tree_map_with_path(one, params)


class Clock:
    """Wraps programs: seconds of each call, from when its arguments are there to when its results are; and
    the memory's peak so far.
    """

    def __init__(self):
        self.times, self.peaks = defaultdict(list), {}

    def __call__(self, name: str, program: Callable) -> Callable:
        def call(*args, **kwargs):
            jax.block_until_ready((args, kwargs))
            began = time.perf_counter()
            out = jax.block_until_ready(program(*args, **kwargs))
            self.times[name].append(time.perf_counter() - began)
            self.peaks[name] = memory("peak_bytes_in_use")
            return out

        return call


def timed(clock: Clock, training: Training) -> Training:
    """The training with the clock around each of its programs."""
    return dataclasses.replace(training, programs=training.programs.wrapped(clock))


def compiled(parts: build.Parts, programs: Any, encoded: Encoded, chip: Chip) -> dict[str, aot.Figures]:
    """The step's programs, compiled at once as `compile_ahead` does (the calls find them), with what `medrlvr
    plan` says of each.
    """
    alone, ahead = Machine(chip.kind, chip, (1,), 1), step_programs(parts, programs, encoded.width)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        figures = pool.map(lambda program: aot.compile_program(program, parts, alone, {}, options={}), ahead)
        return {f.name: f for f in figures}


def decode_bytes(cfg: DecoderConfig, weights: float, sizes: Sizes, columns: int) -> float:
    """What sampling must read at least: at each column all weights once, each question's prompt once, and
    each row's own tokens.
    """
    token = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * jnp.dtype(cfg.execution.dtype).itemsize
    own = sizes.questions * sizes.samples * columns * (columns - 1) / 2
    return columns * (weights + sizes.questions * sizes.prompt * token) + own * token


def step(size: str, adapters: bool, traced: bool, report: Report, small: bool) -> None:
    """Seconds, shares of the machine's bounds and memory of a whole step and of each of its programs; a trace
    of one step.
    """
    sizes = Sizes(2, 16, 2, 8, 1) if small else Sizes()
    changes = (
        {"model": {"param_dtype": "bfloat16", "lora": {"rank": 16}}, "learn": {"policy": {"lr": 1e-4}}}
        if adapters
        else {}
    )
    parts = lay_out(size, sizes, **changes)
    encoded, chip, began = questions(parts, sizes), the_chip(), time.monotonic()
    with jax.set_mesh(parts.mesh):
        made = make_programs(parts, 1000)
        figures = compiled(parts, made, encoded, chip)
        report(compile_s={name: f.compile_s for name, f in figures.items()}, all_s=time.monotonic() - began)
        training, state = train.start(parts, made)
        clock = Clock()
        report(memory_gib_before_the_first_step=memory("bytes_in_use"))
        whole = []
        watched = timed(clock, training)
        with Compiles() as heard:
            for n in range(1 + sizes.runs):
                state, stats, scored, _ = jax.block_until_ready(train.train_step(watched, encoded, state, n))
                # in the first, what `step_programs` does not name
                report(step=n + 1, compiled_meanwhile=dict(heard.drain()))
        for n in range(sizes.runs):
            start = time.perf_counter()
            state, *_ = jax.block_until_ready(train.train_step(training, encoded, state, n))
            whole.append(time.perf_counter() - start)
        sampler = lora.join(training.frozen.base, state.policy.params)
        weights = (
            sum(p.size for p in jax.tree.leaves(sampler)) * jnp.dtype(parts.cfg.execution.dtype).itemsize
        )
    seconds = {name: statistics.median(times[1:]) for name, times in clock.times.items()}
    tokens, columns = int(scored.lengths.sum()), int(scored.lengths.max())
    least = decode_bytes(parts.cfg, weights, sizes, columns)
    peak, rates = memory("peak_bytes_in_use"), reached()  # in this order: what is copied is not the step's
    for name, taken in seconds.items():
        f = figures[name]
        row = {"program": name, "seconds": taken, "first_call_s": clock.times[name][0]}
        row |= {
            "share_of_peak_flops": f.useful / taken / chip.flops,
            "of_matmul": f.useful / taken / (rates["matmul_gflops"] * 1e9),
        }
        row |= {"planned_seconds": f.seconds, "planned_traffic_gb": f.traffic / 1e9}
        row |= {"planned_peak_gib": f.peak / GIB, "peak_gib_until_here": clock.peaks[name]}
        if name == "generate":
            row |= {
                "tokens_per_s": tokens / taken,
                "least_gb": least / 1e9,
                "share_of_bandwidth": least / taken / chip.hbm_speed,
            }
            row |= {"of_copy": least / taken / (rates["copy_gbs"] * 1e9)}
        report(**row)
    busy = sum(seconds.values())
    wanted = {
        k: float(np.asarray(v))
        for k, v in to_host(stats).items()
        if k in ("entropy", "sampler_gap", "sampler_ratio_far")
    }
    report(
        step_s=statistics.median(whole),
        programs_s=busy,
        tokens_per_s=tokens / statistics.median(whole),
        **sizes._asdict(),
        **wanted,
    )
    report(
        mean_length=scored.lengths.mean(),
        peak_gib=peak,
        planned_gib=max(f.peak for f in figures.values()) / GIB,
    )
    if traced:
        with tempfile.TemporaryDirectory() as folder, jax.set_mesh(parts.mesh):
            with jax.profiler.trace(str(Path(folder, "profile"))):
                jax.block_until_ready(train.train_step(training, encoded, state, 1))
            for row in show_profile.summary(folder):
                report(**row)


def gap(size: str, report: Report, small: bool) -> None:
    """The largest difference between the log-probs of sampler and trainer, by arithmetic, through
    `train_step` as it is.
    """
    sizes, wrong = (Sizes(2, 16, 2, 8) if small else Sizes(8, 128, 4, 128)), []

    def one(dtype: str, precision: str, weights: str, bound: float) -> None:
        parts = lay_out(
            size, sizes, model={"dtype": dtype}, sample={"weights": weights}, loss={"sampler_cap": 2.0}
        )
        with jax.set_mesh(parts.mesh), jax.default_matmul_precision(precision):
            training, state = train.start(parts, make_programs(parts, 1000))
            policy = dataclasses.replace(state.policy, params=lively(state.policy.params))
            state = dataclasses.replace(state, policy=policy)
            _, stats, scored, _ = train.train_step(training, questions(parts, sizes), state, 0)
            stats = {k: float(np.asarray(stats[k])) for k in ("sampler_gap", "sampler_ratio_far", "entropy")}
        report(
            arithmetic=dtype,
            precision=precision,
            weights=weights,
            **stats,
            bound=bound,
            tokens=int(scored.lengths.sum()),
        )
        if not stats["sampler_gap"] <= bound:
            wrong.append(f"{dtype}, precision {precision}: {stats['sampler_gap']:.1e} of {bound:.0e}")

    one("float32", "highest", "same", 1e-3)
    one("bfloat16", "default", "same", float("inf"))
    if not small:
        one("float32", "default", "same", float("inf"))
        one("bfloat16", "default", "int8", float("inf"))
    missed(report, wrong)


def embedding(report: Report, small: bool) -> None:
    """The embedding's gradient against the bytes it must move: a scatter-add, slow on some versions of XLA's
    CUDA (openxla/xla 46225).

    `sorted` is what could stand in its place: the rows put in the order of their tokens, and their sums
    taken.
    """
    vocab, width, n = (2048, 64, 512) if small else (151_936, 2048, 16 * (256 + 8 * 240))
    chip, rng = the_chip(), np.random.default_rng(0)
    cases = {"as words are": words(rng, vocab, 1, n), "all one token": np.full((1, n), 7, np.int32)}
    cases["no token twice"] = (
        rng.permutation(vocab)[:n][None].astype(np.int32) if n <= vocab else cases["as words are"]
    )
    for dtype in ("float32", "bfloat16"):
        cfg = dataclasses.replace(SHAPES["tiny"], vocab=vocab, embed=width).run_with(
            dtype=jnp.dtype(dtype).type
        )
        table = jax.random.normal(jax.random.key(0), (vocab, width))
        g = jax.random.normal(jax.random.key(1), (1, n, width), cfg.execution.dtype)

        def ours(table, tokens, g, cfg=cfg):
            return jax.vjp(lambda table: decoder.embed_lookup(table, tokens, cfg), table)[1](
                g.astype(jnp.float32)
            )[0]

        def by_order(table, tokens, g):
            order = jnp.argsort(tokens[0])
            rows = g[0, order].astype(jnp.float32)
            return jax.ops.segment_sum(
                rows, tokens[0, order], num_segments=table.shape[0], indices_are_sorted=True
            )

        least = (table.nbytes + g.nbytes) / chip.hbm_speed
        for how, f in (("embed_lookup", jax.jit(ours)), ("sorted", jax.jit(by_order))):
            for name, tokens in cases.items():
                [times] = bench.by_turns([partial(f, table, tokens, g)], 5)
                taken = statistics.median(times[1:])
                report(
                    how=how,
                    arithmetic=dtype,
                    tokens=name,
                    count=n,
                    milliseconds=1e3 * taken,
                    times_the_least=taken / least,
                )


# --- the same bits again
# ----------------------------------------------------------------------------------------------


def forked(report: Report, call: Callable[[], None], flags: str = "", cache: str | None = None) -> int:
    """The call in a process of its own with these flags of XLA's and this compilation cache; its exit status."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
            if is_gpu():  # elsewhere a program is the same whoever compiles it
                jax.config.update("jax_compilation_cache_dir", cache)
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            status = call() or 0
        except BaseException:
            report(error=traceback.format_exc())
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_gpu() -> bool:
    return (
        bool(find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin"))
        and os.environ.get("JAX_PLATFORMS") != "cpu"
    )


def resume(report: Report, small: bool) -> None:
    """A run of four steps, and the same resumed in a new process from its second: which flags make them equal
    to the bit.

    Without a compilation cache each process tunes its own programs, by the clock, and may choose others.
    """
    tree = {
        "steps": 4,
        "model": {"path": "embedded"},
        "data": {"path": "embedded:train", "limit": 32},
        "prompt": {"template": "none", "max_tokens": 96},
        "sample": {"questions": 8, "samples": 2 if small else 8, "max_new_tokens": 12 if small else 48},
        "advantage": {"estimator": "group"},
        "kl": {"coef": 0.01, "into": "loss", "estimator": "k3"},
        "learn": {"minibatch": 8, "policy": {"lr": 1e-3}},
        "eval": {"batch": 8},
        "checkpoint": {"every": 1, "keep": 9},
    }
    names, results = list(FLAGS) if is_gpu() else ["as launched"], {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def run(name: str, flags: str, cache: str | None) -> None:
            path = root / f"{name}.yaml"
            path.write_text(yaml.safe_dump(tree | {"name": name, "runs": folder}))
            if status := forked(report, lambda: cli.main(["train", str(path)]), flags, cache):
                raise RuntimeError(f"medrlvr train ended with status {status}; the log says why")

        def compare(label: str, flags: str, cache: str | None) -> None:
            whole, again = f"whole-{len(results)}", f"again-{len(results)}"
            began = time.monotonic()
            run(whole, flags, cache)
            first = time.monotonic() - began
            shutil.copytree(root / whole, root / again)
            for step in (3, 4):
                shutil.rmtree(root / again / "checkpoints" / str(step))
            settings = root / again / "config.yaml"
            settings.write_text(settings.read_text().replace(f"name: {whole}", f"name: {again}"))
            run(again, flags, cache)
            answer = root / "answer.json"
            forked(
                report,
                lambda: answer.write_text(json.dumps(differences(root / whole, root / again, 4))) and None,
            )
            results[label] = json.loads(answer.read_text())
            seconds = [
                json.loads(line)["seconds"]
                for line in (root / whole / "metrics.jsonl").read_text().splitlines()
            ][2:]
            equal, some = not results[label], results[label][:3]
            report(
                flags=label,
                xla_flags=flags,
                equal_to_the_bit=equal,
                differences=some,
                step_s=seconds,
                process_s=first,
            )

        compare("as launched", "", None)
        if results["as launched"]:
            compare("as launched, with a compilation cache", "", str(root / "cache"))
        for name in names[1:]:
            compare(name, FLAGS[name], None)
    if not is_gpu() and results["as launched"]:  # CPU and TPU are deterministic as they are
        missed(report, results["as launched"])


def determinism(size: str, report: Report, small: bool) -> None:
    """Assessing and learning twice from one state in one process: equal or not, and seconds, by XLA's flags.
    What the flags cost.
    """
    sizes = Sizes(2, 16, 2, 8, 1) if small else Sizes()

    def twice(name: str) -> None:
        parts = lay_out(size, sizes)
        with jax.set_mesh(parts.mesh):
            training, state = train.start(parts, make_programs(parts, 1000))
            clock, ends = Clock(), []
            watched = timed(clock, training)
            encoded, fresh = questions(parts, sizes), jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
            for _ in range(3):
                # learning takes its state's memory over
                start = dataclasses.replace(state, policy=fresh(state.policy))
                after, _, _, rows = train.train_step(watched, encoded, start, 0)
                ends.append(to_host({"experience": rows, "policy": after.policy.params}))
        leaves = [jax.tree_util.tree_flatten_with_path(end)[0] for end in ends]
        pairs = zip(*leaves[1:], strict=True)
        differ = [
            jax.tree_util.keystr(path)
            for (path, a), (_, b) in pairs
            if np.asarray(a).tobytes() != np.asarray(b).tobytes()
        ]
        times = {program: statistics.median(taken[1:]) for program, taken in clock.times.items()}
        report(
            flags=name, xla_flags=FLAGS[name], equal_to_the_bit=not differ, differ=differ[:4], seconds=times
        )

    for name in FLAGS if is_gpu() else ["as launched"]:
        if status := forked(report, partial(twice, name), FLAGS[name]):
            raise RuntimeError(f"{name}: the process ended with status {status}; the log says why")


# --- sections
# ---------------------------------------------------------------------------------------------------------


def sections(small: bool) -> list[Section]:
    """In order of value."""
    if small:
        runs: dict[str, Any] = {
            "machine": machine,
            "parity": parity,
            "gap": partial(gap, "tiny"),
            "embedding": embedding,
        }
        runs |= {
            "step_tiny": partial(step, "tiny", False, True),
            "step_tiny_lora": partial(step, "tiny", True, False),
        }
        runs |= {"resume": resume, "determinism": partial(determinism, "tiny")}
        return [Section(name, 0, run) for name, run in runs.items()]

    def of(size: str, seconds: float, adapters: bool = False, traced: bool = False) -> Section:
        return Section(f"step_{size}" + "_lora" * adapters, seconds, partial(step, size, adapters, traced))

    return [
        Section("machine", 15, machine),
        Section("parity", 40, parity),
        of("3B", 75),
        Section("gap", 60, partial(gap, "0.1B")),
        Section("embedding", 15, embedding),
        of("0.5B", 50, traced=True),
        Section("resume", 90, resume),
        of("3B", 60, adapters=True),
        Section("determinism", 90, partial(determinism, "0.1B")),
        of("1.5B", 50),
        of("0.1B", 30),
        of("1.5B", 50, adapters=True),
        of("0.5B", 40, adapters=True),
        of("0.1B", 30, adapters=True),
    ]


def in_process(section: Section, out: Path, small: bool, limit: float) -> dict[str, Any]:
    """Run a section in a process of its own, with all that it starts, for at most `limit` seconds."""
    began, report = time.monotonic(), Report(out / "on_device.jsonl", section.name)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setsid()
            with open(out / "on_device.log", "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            print(f"---- {section.name}", flush=True)
            section.run(report, small)
            status = 0
        except BaseException:
            report(error=traceback.format_exc())
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > limit:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"state": "stopped", "seconds": limit, "why": "it took longer than was left"}
        time.sleep(0.05)
    status, seconds = os.waitstatus_to_exitcode(ended[1]), round(time.monotonic() - began, 1)
    if status < 0:
        return {"state": "failed", "seconds": seconds, "why": f"signal {signal.Signals(-status).name}"}
    return (
        {"state": "failed", "seconds": seconds, "why": "it raised"}
        if status
        else {"state": "done", "seconds": seconds}
    )


def table(tree: dict[str, Any]) -> str:
    """All of it as Markdown: the sections, then the figures of each, those with the same columns in one
    table.
    """

    def cell(x):
        if isinstance(x, dict):
            return ", ".join(f"{k} {cell(v)}" for k, v in x.items())
        return "" if x is None else str(x).replace("|", "/").replace("\n", " ")[-300:]

    lines = ["| section | state | seconds | why |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {s['state']} | {s.get('seconds', '')} | {s.get('why', '')} |"
        for name, s in tree["sections"].items()
    ]
    for name, s in tree["sections"].items():
        columns: list[str] = []
        for row in s.get("figures", []):
            if list(row) != columns:
                columns = list(row)
                lines += ["", f"{name}:", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines.append(f"| {' | '.join(cell(row[c]) for c in columns)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, given: list[Section] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument(
        "--budget", type=float, default=450.0, metavar="SECONDS", help="for all sections; default 450"
    )
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections, in this order")
    args = parser.parse_args(argv)
    chosen = {s.name: s for s in (given or sections(args.small))}
    if unknown := [name for name in args.only or () if name not in chosen]:
        parser.error(f"--only: {', '.join(unknown)}: no such section; there are {', '.join(chosen)}")
    began, tree = time.monotonic(), {"sections": {name: {"state": "to do"} for name in args.only or chosen}}
    args.out.mkdir(parents=True, exist_ok=True)
    lines = args.out / "on_device.jsonl"
    lines.unlink(missing_ok=True)
    warnings.filterwarnings("ignore", message=".*fork.*")  # nothing of JAX's has been started here
    for name in tree["sections"]:
        left = args.budget - (time.monotonic() - began)
        if left <= max(chosen[name].seconds, 0):
            about = f"it takes about {chosen[name].seconds:.0f} s, and {max(left, 0):.0f} s are left"
            tree["sections"][name] = {"state": "skipped", "why": about}
        else:
            tree["sections"][name] = in_process(chosen[name], args.out, args.small, left)
        figures = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        tree["sections"][name]["figures"] = [
            {k: v for k, v in row.items() if k != "section"} for row in figures if row["section"] == name
        ]
        print(
            f"{name}: " + ", ".join(str(v) for k, v in tree["sections"][name].items() if k != "figures"),
            flush=True,
        )
        files.write_text(args.out / "on_device.json", json.dumps(tree, indent=1))
        files.write_text(args.out / "on_device.md", table(tree))
    return int(any(s["state"] in ("failed", "stopped") for s in tree["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
