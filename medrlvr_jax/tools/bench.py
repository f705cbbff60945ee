"""Benchmarks of the parts of a step on this machine: one JSON line a case.

    python -m medrlvr_jax.tools.bench sample MODEL --questions 8 --samples 8 --prompt 256 --new 128
    python -m medrlvr_jax.tools.bench learn MODEL --questions 2 --samples 8 --prompt 384 --new 128
    python -m medrlvr_jax.tools.bench step MODEL --questions 4 --samples 8 --prompt 64 --new 128
    python -m medrlvr_jax.tools.bench eval MODEL --questions 25 --samples 1 --prompt 256 --new 64
    python -m medrlvr_jax.tools.bench reward
    python -m medrlvr_jax.tools.bench compile MODEL --questions 4 --samples 8 --prompt 64 --new 128

MODEL is a Hugging Face directory or "embedded". `step` is the whole step of training: sample, assess, decode,
score, learn. Settings of the run may follow, such as model.remat=none learn.microbatch=1. Seconds are the
median of `--runs` after one that compiles. `tokens_per_s` counts response tokens up to their stop token;
`padded_tokens` is what a system that repeats the prompt for each sample and pads every row would have to
compute. `eval` is four batches of an evaluation, and its `overhead` what it takes beyond generating.
`copy_share` is of reading the weights once a column, all else left out. Shares are of what a float32 matmul
of 2,048² and a copy of 256 MB reach in this very run.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax.build import Parts, build, load_base, load_params
from medrlvr_jax.config.load import from_tree, override
from medrlvr_jax.config.schema import Config, RewardConfig, SampleConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.evaluation import answers
from medrlvr_jax.evaluation.evaluate import evaluate
from medrlvr_jax.model import lora
from medrlvr_jax.rewards import score
from medrlvr_jax.rl import records, train
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rollout.generate import DrawSettings, draw_settings, generate
from medrlvr_jax.rollout.rollout import Encoded, place_prompts, width
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.sharding import place_rows
from medrlvr_jax.types import Experience, Prompts

OPTIONS = ("Coronary angiography", "Chest X-ray", "Echocardiography", "Troponin measurement")


def settings(args: argparse.Namespace) -> Config:
    """GRPO as the peers run it: KL to a reference in the loss, one optimiser step a rollout."""
    tree: dict[str, Any] = {
        "name": "bench",
        "steps": 1,
        "model": {"path": args.model},
        "data": {"path": "none"},
        "prompt": {"max_tokens": args.prompt},
        "sample": {"questions": args.questions, "samples": args.samples, "max_new_tokens": args.new},
        "advantage": {"estimator": "group" if args.samples > 1 else "reinforce_pp"},
        "kl": {"coef": 0.01, "into": "loss", "estimator": "k3"},
        "learn": {"minibatch": args.questions, "policy": {"lr": 1e-6}},
        "eval": {"batch": args.questions, "samples": args.samples, "temperature": 1.0},
    }
    for item in args.settings:
        override(tree, item)
    return from_tree(tree, "bench")


def machine(size: int = 2048, dtype: str = "float32", copied: int = 2**28) -> dict[str, float]:
    """What this machine reaches: a matmul of `size`² in GFLOP/s; a copy's reading and writing of `copied`
    bytes in GB/s, in place, as new pages would cost more. Of random numbers: on zeros and ones a GPU draws
    less power, and is faster than it ever will be."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    y = jax.random.normal(jax.random.key(1), (copied // 4,))
    times, copies, count = clock(jax.jit(jnp.matmul), 5, x, x), [], jax.jit(lambda y: y + 1, donate_argnums=0)
    for _ in range(6):
        start = time.perf_counter()
        y = jax.block_until_ready(count(y))
        copies.append(time.perf_counter() - start)
    return {
        "matmul_gflops": round(2 * size**3 / min(times) / 1e9, 1),
        "copy_gbs": round(2 * y.nbytes / min(copies) / 1e9, 1),
    }


def clock(function: Callable, runs: int, *args: Any) -> list[float]:
    """Seconds of each of `runs` calls, after one that compiles."""
    return by_turns([partial(function, *args)], runs)[0]


def by_turns(functions: list[Callable], runs: int) -> list[list[float]]:
    """Seconds of each function's `runs` calls, one after another in turn, after one of each that compiles."""
    times = [[] for _ in functions]
    for run in range(runs + 1):
        for taken, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if run:
                taken.append(time.perf_counter() - start)
    return times


def encoded_questions(args: argparse.Namespace, parts: Parts) -> Encoded:
    """Questions whose prompts are exactly `--prompt` random letters of the vocabulary."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, min(200, parts.cfg.vocab), (args.questions, args.prompt)).tolist()
    questions = [Question(str(i), "?", OPTIONS, i % 4) for i in range(args.questions)]
    return Encoded(
        questions, tokens, np.arange(args.questions, dtype=np.uint32), 0, width(max(map(len, tokens)))
    )


def lengths(args: argparse.Namespace) -> np.ndarray | None:
    """Tokens each row may have: log-normal, median 40, one in fifty over the cap of 256; or None for all."""
    if args.lengths == "full":
        return None
    drawn = np.exp(np.random.default_rng(0).normal(np.log(40), 0.904, (args.questions, args.samples)))
    return np.clip(drawn, 1, args.new).astype(np.int32)


def sample_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    params = make_weight_sync(parts, parts.sampler_cfg)(
        lora.join(load_base(parts), load_params(parts, parts.cfg))
    )
    prompts = place_prompts(parts, encoded_questions(args, parts), np.arange(args.questions))
    limits = lengths(args)
    stops = (parts.cfg.vocab,)  # none that can be drawn: how long a row gets is the case's to say

    settings = DrawSettings(parts.sampler_cfg, parts.config.sample, stops, parts.tokenizer.pad_id)

    def run():
        return generate(params, prompts, jax.random.key(0), settings, limits)

    times = clock(run, args.runs)
    mask, weights = run().mask, sum(p.size for p in jax.tree.leaves(params))
    tokens, columns = int(mask.sum()), int(mask.any((0, 1)).sum())
    work = 2 * weights * (tokens + args.questions * args.prompt)
    read = sum(p.nbytes for p in jax.tree.leaves(params)) * columns
    out = {
        "tokens": tokens,
        "tokens_per_s": rate(tokens, times),
        "matmul_gflop": round(work / 1e9),
        "read_gb": round(read / 1e9),
    }
    return timing(times) | out


def learn_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    training, state = train.start(parts, make_programs(parts, 1))
    shape = (args.questions, args.samples, args.new)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    width, most = args.prompt, lengths(args)
    mask = np.ones(shape, bool) if most is None else np.arange(args.new) < most[..., None]
    rows = Experience(
        prompts=Prompts(
            rng.integers(5, 200, (args.questions, width)).astype(np.int32),
            np.ones((args.questions, width), bool),
            np.arange(args.questions, dtype=np.uint32),
        ),
        tokens=rng.integers(5, 200, shape).astype(np.int32),
        mask=mask,
        logprobs=normal(*shape) - 9,
        ref_logprobs=normal(*shape) - 9,
        advantages=normal(*shape),
        values=None,
        returns=None,
    )
    rows, times, learner, base = (
        place_rows(rows, args.questions, parts.mesh),
        [],
        state.policy,
        training.frozen.base,
    )
    for _ in range(args.runs + 1):
        start = time.perf_counter()
        learner, _ = jax.block_until_ready(
            training.programs.learn_policy(learner, base, rows, jax.random.key(0), jnp.float32(0.01))
        )
        times.append(time.perf_counter() - start)
    packed, padded = (
        args.questions * (width + args.samples * args.new),
        args.questions * args.samples * (width + args.new),
    )
    work = 6 * sum(p.size for p in jax.tree.leaves(learner.params)) * packed
    out = {
        "tokens": int(mask.sum()),
        "packed_tokens": packed,
        "padded_tokens": padded,
        "padded_tokens_per_s": rate(padded, times[1:]),
    }
    return timing(times[1:]) | out | {"matmul_gflop": round(work / 1e9), "first_s": round(times[0], 2)}


def step_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    training, state = train.start(parts, make_programs(parts, 1))
    encoded, times, tokens = encoded_questions(args, parts), [], 0
    for step in range(args.runs + 1):
        start = time.perf_counter()
        state, stats, scored, _ = train.train_step(training, encoded, state, step)
        jax.block_until_ready((state, records.summarise(stats, scored)))
        times.append(time.perf_counter() - start)
        tokens = int(scored.lengths.sum())
    prompts = args.questions * args.prompt
    packed, reading = (
        prompts + args.questions * args.samples * args.new,
        1 + (training.frozen.reference is not None),
    )
    work = sum(p.size for p in jax.tree.leaves(state.policy.params)) * (
        2 * (prompts + tokens) + (2 * reading + 6) * packed
    )
    out = {"tokens": tokens, "tokens_per_s": rate(tokens, times[1:]), "matmul_gflop": round(work / 1e9)}
    return timing(times[1:]) | out | {"first_s": round(times[0], 2)}


def eval_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """An evaluation to its statistics, and the same responses drawn alone, by turns."""
    size = args.questions
    encoded = encoded_questions(argparse.Namespace(**vars(args) | {"questions": 4 * size}), parts)
    params = make_weight_sync(parts, parts.cfg)(lora.join(load_base(parts), load_params(parts, parts.cfg)))
    e = parts.config.eval
    sample = SampleConfig(
        questions=size, samples=args.samples, max_new_tokens=args.new, temperature=e.temperature
    )

    def whole():
        return answers.describe(answers.of_rows(evaluate(parts, params, encoded)[1], "set"))

    def alone():
        batches = [place_prompts(parts, encoded, np.arange(i, i + size)) for i in range(0, 4 * size, size)]
        settings = draw_settings(parts, parts.cfg, sample)
        return [generate(params, prompts, jax.random.key(0), settings) for prompts in batches]

    pairs = list(zip(*by_turns([whole, alone], args.runs), strict=True))
    overhead = statistics.median(a / b - 1 for a, b in pairs)
    return timing([a for a, _ in pairs]) | {
        "generate_s": [round(b, 3) for _, b in pairs],
        "overhead": round(overhead, 4),
    }


def compile_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """Seconds from nothing to the end of the first step, and of the second: what differs is compilation."""
    jax.config.update("jax_enable_compilation_cache", False)
    done = step_case(argparse.Namespace(**vars(args) | {"runs": 1}), parts)
    return {"compile_s": round(done["first_s"] - done["seconds"], 2), "seconds": done["seconds"]}


def reward_case(rows: int = 100_000) -> dict[str, Any]:
    """`strict` and `paper` on completions of 200 to 2,000 characters; tests/bench_reward.py has the pairs
    with a loop."""
    rng = random.Random(0)
    words = "fever chest pain dyspnea troponin INR < 2.0 warfarin β-blocker hypertension option".split()
    think = lambda: " ".join(rng.choices(words, k=rng.randint(30, 250)))
    texts = [f"<think>{think()}</think>\n<answer>{rng.choice('ABCDX')}</answer>" for _ in range(rows)]
    keys, options, out = rng.choices("ABCD", k=rows), [OPTIONS] * rows, {}
    for mode in ("strict", "paper"):
        start = time.perf_counter()
        score(texts, keys, options, RewardConfig(mode=mode))
        out[f"{mode}_s"] = round(time.perf_counter() - start, 3)
    return {"rows": rows} | out


def timing(times: list[float]) -> dict[str, Any]:
    return {"seconds": round(statistics.median(times), 3), "runs": [round(t, 3) for t in times]}


def rate(count: int, times: list[float]) -> float:
    return round(count / statistics.median(times), 1)


CASES = {
    "sample": sample_case,
    "learn": learn_case,
    "step": step_case,
    "eval": eval_case,
    "compile": compile_case,
}


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m medrlvr_jax.tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cases = top.add_subparsers(dest="case", required=True, metavar="CASE")
    cases.add_parser("reward", help="100,000 completions scored in one call")
    for name in CASES:
        c = cases.add_parser(name)
        c.add_argument("model", metavar="MODEL")
        c.add_argument("settings", nargs="*", metavar="a.b=value")
        for size, default in (("questions", 4), ("samples", 8), ("prompt", 64), ("new", 128), ("runs", 3)):
            c.add_argument(f"--{size}", type=int, default=default)
        c.add_argument(
            "--lengths",
            choices=("full", "lognormal"),
            default="full",
            help="sample, learn: how long the responses are",
        )
    args, rest = top.parse_known_args(argv)
    if args.case == "reward":
        print(json.dumps({"case": "reward"} | reward_case()))
        return 0
    args.settings += rest
    parts = build(settings(args))
    with jax.set_mesh(parts.mesh):
        out = CASES[args.case](args, parts)
    peak, reached = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        machine(),
    )  # in this order: the copy's 256 MB are not the case's
    if "matmul_gflop" in out:
        out["matmul_share"] = round(out["matmul_gflop"] / out["seconds"] / reached["matmul_gflops"], 3)
    if "read_gb" in out:
        out["copy_share"] = round(out["read_gb"] / out["seconds"] / reached["copy_gbs"], 3)
    shapes = {k: getattr(args, k) for k in ("questions", "samples", "prompt", "new", "lengths")}
    out |= {"peak_gib": round(peak / 2**20, 2)}
    print(
        json.dumps(
            {"case": args.case, "model": args.model, "settings": args.settings} | shapes | out | reached
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
