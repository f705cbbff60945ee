"""Check this machine's accelerator: correctness of the kernels, determinism, speed and memory, in at most
eight minutes.

    python tests/on_device.py --out DIR                        # one GPU or TPU; other chips stay idle
    python tests/on_device.py --out DIR --small                # tiny shapes, also on a CPU: a minute
    python tests/on_device.py --out DIR --only step_3B resume  # some sections, in this order

It needs the packages of setup.cfg and JAX for the accelerator ('.[cuda]', '.[cuda13]', '.[tpu]'), but no
network, data or weights. Tokens are random with the frequencies of words. Weights are random, so that all
responses have their full length. The timed code is that of a training: `train.train_step` with its programs,
compiled as in a training. The output in DIR is

    on_device.jsonl   one line per figure, written when it is measured
    on_device.md      the figures as tables, and the state of each section: done, failed, stopped or skipped
    on_device.json    the same as one tree
    on_device.log     the printed output of the sections, with tracebacks

Sections run in order of importance, each in its own process, so that memory, compiler flags and crashes do
not affect the others. A section that would take longer than the rest of --budget is skipped, and one that
does take longer is stopped. Exit status: 1 if a section raised, crashed, was stopped or exceeded a bound,
else 0. JAX_COMPILATION_CACHE_DIR makes a second run on the same machine faster.

With a program's seconds there are shares of the machine's published peaks (`share_of_…`), shares of the speed
of a large matmul or a copy in the same process (`of_…`), and the figures of `medrlvr plan` (`planned_…`).
Peaks of memory come from the device's counter, which never decreases: a program's peak is the largest so far.
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
FLAGS = {  # XLA flags by their names in the determinism sections
    "as launched": "",
    "no nondeterministic operations": "--xla_gpu_exclude_nondeterministic_ops=true",
    "no nondeterministic operations, no tuning": "--xla_gpu_deterministic_ops=true",
}


class Sizes(NamedTuple):
    """The sizes of a step, and the number of timed runs."""

    questions: int = 16
    prompt: int = 256
    samples: int = 8
    new: int = 240  # below 256 the sampler is one loop, which compiles in half the time
    runs: int = 3


class Section(NamedTuple):
    name: str
    seconds: float  # approximate time on one H200 with 16 cores
    run: Callable[["Report", bool], None]


class Report(NamedTuple):
    """Writes a section's figures to a file."""

    file: Path
    section: str

    def __call__(self, **figures: Any) -> None:
        files.append(self.file, [{"section": self.section} | tidy(figures)])


def tidy(x: Any) -> Any:
    """Return the figures for JSON, with numbers of four digits."""
    if isinstance(x, dict):
        return {str(k): tidy(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [tidy(v) for v in x]
    if isinstance(x, (float, np.floating, jax.Array)):
        return float(f"{float(x):.4g}") if np.isfinite(float(x)) else None
    return x if x is None or isinstance(x, (bool, int, str)) else str(x)


def require_bounds(report: Report, wrong: list[str]) -> None:
    """Fail the section if figures exceeded their bounds. It is called after all figures are written."""
    if wrong:
        raise AssertionError(f"{report.section}: {len(wrong)} beyond the bound: " + "; ".join(wrong))


# --- the machine
# -----------------------------------------------------------------------------------------------------


def memory(name: str) -> float | None:
    """Return one of the device's memory counters in GiB, or None on a device without counters (a CPU)."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats[name] / GIB if name in stats else None


def measure_speeds() -> dict[str, float]:
    """Measure bfloat16 matmuls of 8,192² and copies of 4 GiB; on a CPU float32 and smaller sizes."""
    return (
        bench.machine(512, "float32", 2**24)
        if jax.default_backend() == "cpu"
        else bench.machine(8192, "bfloat16", 2**32)
    )


def find_chip() -> Chip:
    """Return the chip with its published figures if machines.py has them, else with measured ones, and with
    the memory that programs can use here.
    """
    device = jax.devices()[0]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = host if (limit := memory("bytes_limit")) is None else limit * GIB
    for chip in machines.CHIPS.values():
        if chip.kind == device.device_kind:
            return dataclasses.replace(chip, usable=usable)
    speeds = measure_speeds()
    return Chip(
        device.platform,
        speeds["matmul_gflops"] * 1e9,
        usable,
        speeds["copy_gbs"] * 1e9,
        1.0,
        kind=device.device_kind,
    )


def machine(report: Report, small: bool) -> None:
    device, chip = jax.devices()[0], find_chip()
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
        **measure_speeds(),
    )
    if not small:
        for precision in ("default", "highest"):
            with jax.default_matmul_precision(precision):
                report(matmul=f"float32, precision {precision}", **bench.machine(4096, "float32", 2**30))


# --- parity
# -----------------------------------------------------------------------------------------------------------


def parity(report: Report, small: bool) -> None:
    """Compare every kernel with float64 on the host (float64.py)."""
    wrong = []

    def one(case: float64.Case) -> None:
        with jax.default_matmul_precision(case.precision):
            error = case.error()
        report(
            kernel=case.kernel, arithmetic=case.dtype, precision=case.precision, error=error, bound=case.bound
        )
        if not error <= case.bound:  # also true for a NaN
            wrong.append(
                f"{case.kernel} in {case.dtype}, precision {case.precision}: {error:.2e} of {case.bound:.0e}"
            )

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:  # compilation takes most of the time
        for future in [pool.submit(one, case) for case in float64.cases(jax.default_backend(), small)]:
            future.result()
    require_bounds(report, wrong)


# --- a training step
# --------------------------------------------------------------------------------------------------


def lay_out(size: str, sizes: Sizes, **changes: Any) -> build.Parts:
    """Lay out GRPO with a reference on the first device. The tokenizer is the embedded one, whose vocabulary
    is smaller than the model's.
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
    """Return tokens with the frequencies of words (Zipf), spread over the vocabulary."""
    ranks = np.minimum(rng.zipf(1.2, shape), vocab - 1)
    return (ranks * 7919 % (vocab - 2) + 2).astype(np.int32)


def questions(parts: build.Parts, sizes: Sizes) -> Encoded:
    """Return questions with prompts that fill almost all columns."""
    rng, n = np.random.default_rng(0), sizes.questions
    tokens = [words(rng, parts.cfg.vocab, sizes.prompt - i % 8).tolist() for i in range(n)]
    rows = [Question(str(i), "?", bench.OPTIONS, i % 4) for i in range(n)]
    return Encoded(rows, tokens, np.arange(n, dtype=np.uint32), 0, width(sizes.prompt))


@partial(jax.jit, donate_argnums=0)
def perturb(params: Any) -> Any:
    """Move norms away from 1 and biases away from 0, and scale the logits by four. The entropy is then a few
    nats, as in a trained model.
    """

    def one(path, p):
        name, where = path[-1].key, jax.tree_util.keystr(path)
        noise = jax.random.normal(jax.random.key(sum(map(ord, where))), p.shape, p.dtype)
        moved = 1 + 0.2 * noise if name.endswith("norm") else 0.5 * noise if name.endswith("bias") else p
        return 4 * moved if len(path) == 1 and name == "norm" else moved

    return jax.tree_util.tree_map_with_path(one, params)


class Clock:
    """Measures wrapped programs: the seconds of each call, from available arguments to available results, and
    the memory's peak so far.
    """

    def __init__(self):
        self.times, self.peaks = defaultdict(list), {}

    def __call__(self, name: str, program: Callable) -> Callable:
        def call(*args, **kwargs):
            jax.block_until_ready((args, kwargs))
            start = time.perf_counter()
            out = jax.block_until_ready(program(*args, **kwargs))
            self.times[name].append(time.perf_counter() - start)
            self.peaks[name] = memory("peak_bytes_in_use")
            return out

        return call


def timed(clock: Clock, training: Training) -> Training:
    """Return the training with the clock around each of its programs."""
    return dataclasses.replace(training, programs=training.programs.wrapped(clock))


def compiled(parts: build.Parts, programs: Any, encoded: Encoded, chip: Chip) -> dict[str, aot.Figures]:
    """Compile the step's programs together, as `compile_ahead` does, so that later calls find them. Return
    the figures of `medrlvr plan` for each.
    """
    alone, ahead = Machine(chip.kind, chip, (1,), 1), step_programs(parts, programs, encoded.width)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        figures = pool.map(lambda program: aot.compile_program(program, parts, alone, {}, options={}), ahead)
        return {f.name: f for f in figures}


def decode_bytes(cfg: DecoderConfig, weights: float, sizes: Sizes, columns: int) -> float:
    """Return the bytes that sampling must read at least: for each column all weights once, each question's
    prompt once, and each row's own tokens.
    """
    token = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * jnp.dtype(cfg.execution.dtype).itemsize
    own = sizes.questions * sizes.samples * columns * (columns - 1) / 2
    return columns * (weights + sizes.questions * sizes.prompt * token) + own * token


def step(size: str, adapters: bool, traced: bool, report: Report, small: bool) -> None:
    """Measure the seconds, shares of the machine's bounds and memory of a step and of each of its programs.
    `traced`: also trace one step.
    """
    sizes = Sizes(2, 16, 2, 8, 1) if small else Sizes()
    changes = (
        {"model": {"param_dtype": "bfloat16", "lora": {"rank": 16}}, "learn": {"policy": {"lr": 1e-4}}}
        if adapters
        else {}
    )
    parts = lay_out(size, sizes, **changes)
    encoded, chip, start = questions(parts, sizes), find_chip(), time.monotonic()
    with jax.set_mesh(parts.mesh):
        made = make_programs(parts, 1000)
        figures = compiled(parts, made, encoded, chip)
        report(compile_s={name: f.compile_s for name, f in figures.items()}, all_s=time.monotonic() - start)
        training, state = train.init_training(parts, made)
        clock = Clock()
        report(memory_gib_before_the_first_step=memory("bytes_in_use"))
        whole = []
        watched = timed(clock, training)
        with Compiles() as heard:
            for n in range(1 + sizes.runs):
                state, stats, scored, _ = jax.block_until_ready(train.train_step(watched, encoded, state, n))
                # in the first step, the programs that `step_programs` does not list
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
    peak, speeds = memory("peak_bytes_in_use"), measure_speeds()  # in this order: the copy also takes memory
    for name, taken in seconds.items():
        f = figures[name]
        row = {"program": name, "seconds": taken, "first_call_s": clock.times[name][0]}
        row |= {
            "share_of_peak_flops": f.useful / taken / chip.flops,
            "of_matmul": f.useful / taken / (speeds["matmul_gflops"] * 1e9),
        }
        row |= {"planned_seconds": f.seconds, "planned_traffic_gb": f.traffic / 1e9}
        row |= {"planned_peak_gib": f.peak / GIB, "peak_gib_until_here": clock.peaks[name]}
        if name == "generate":
            row |= {
                "tokens_per_s": tokens / taken,
                "least_gb": least / 1e9,
                "share_of_bandwidth": least / taken / chip.hbm_speed,
            }
            row |= {"of_copy": least / taken / (speeds["copy_gbs"] * 1e9)}
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
    """Measure the largest difference between the log-probs of sampler and trainer in `train_step`, for each
    arithmetic.
    """
    sizes, wrong = (Sizes(2, 16, 2, 8) if small else Sizes(8, 128, 4, 128)), []

    def one(dtype: str, precision: str, weights: str, bound: float) -> None:
        parts = lay_out(
            size, sizes, model={"dtype": dtype}, sample={"weights": weights}, loss={"sampler_cap": 2.0}
        )
        with jax.set_mesh(parts.mesh), jax.default_matmul_precision(precision):
            training, state = train.init_training(parts, make_programs(parts, 1000))
            policy = dataclasses.replace(state.policy, params=perturb(state.policy.params))
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
    require_bounds(report, wrong)


def embedding(report: Report, small: bool) -> None:
    """Compare the time of the embedding's gradient with that of the bytes it must move. It is a scatter-add,
    which is slow in some versions of XLA for CUDA (openxla/xla 46225).

    `sorted` is an alternative: it sorts the rows by their tokens and sums those of each token.
    """
    vocab, width, n = (2048, 64, 512) if small else (151_936, 2048, 16 * (256 + 8 * 240))
    chip, rng = find_chip(), np.random.default_rng(0)
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
    """Run the call in a fork with these XLA flags and this compilation cache. Return its exit status."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
            if is_gpu():  # on other platforms each process compiles the same program
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
    """Compare a run of four steps with the same run resumed from its second step in a new process: with which
    flags are they equal bit by bit?

    Without a compilation cache each process tunes its programs by timing them, and may choose others.
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
            start = time.monotonic()
            run(whole, flags, cache)
            first = time.monotonic() - start
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
    if not is_gpu() and results["as launched"]:  # CPU and TPU are deterministic by default
        require_bounds(report, results["as launched"])


def determinism(size: str, report: Report, small: bool) -> None:
    """Assess and learn twice from one state in one process, with different XLA flags: are the results equal,
    and how many seconds do the programs take?
    """
    sizes = Sizes(2, 16, 2, 8, 1) if small else Sizes()

    def twice(name: str) -> None:
        parts = lay_out(size, sizes)
        with jax.set_mesh(parts.mesh):
            training, state = train.init_training(parts, make_programs(parts, 1000))
            clock, ends = Clock(), []
            watched = timed(clock, training)
            encoded, fresh = questions(parts, sizes), jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
            for _ in range(3):
                # learning donates the memory of its state
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
    """List the sections in order of importance."""
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
    """Run a section in its own process group for at most `limit` seconds. Return its state."""
    start, report = time.monotonic(), Report(out / "on_device.jsonl", section.name)
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
        if time.monotonic() - start > limit:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"state": "stopped", "seconds": limit, "why": "it took longer than the rest of the budget"}
        time.sleep(0.05)
    status, seconds = os.waitstatus_to_exitcode(ended[1]), round(time.monotonic() - start, 1)
    if status < 0:
        return {"state": "failed", "seconds": seconds, "why": f"signal {signal.Signals(-status).name}"}
    return (
        {"state": "failed", "seconds": seconds, "why": "it raised"}
        if status
        else {"state": "done", "seconds": seconds}
    )


def table(tree: dict[str, Any]) -> str:
    """Return Markdown: the states of the sections, then the figures of each. Consecutive figures with the
    same columns share a table.
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
    start, tree = time.monotonic(), {"sections": {name: {"state": "to do"} for name in args.only or chosen}}
    args.out.mkdir(parents=True, exist_ok=True)
    lines = args.out / "on_device.jsonl"
    lines.unlink(missing_ok=True)
    warnings.filterwarnings("ignore", message=".*fork.*")  # JAX is not started in this process
    for name in tree["sections"]:
        left = args.budget - (time.monotonic() - start)
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
