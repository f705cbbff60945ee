"""Benchmark the parts of a step on this machine. The output is one JSON line per case.

    python tests/bench_parts.py sample MODEL --questions 8 --samples 8 --prompt 256 --new 128
    python tests/bench_parts.py learn MODEL --questions 2 --samples 8 --prompt 384 --new 128
    python tests/bench_parts.py step MODEL --questions 4 --samples 8 --prompt 64 --new 128
    python tests/bench_parts.py eval MODEL --questions 25 --samples 1 --prompt 256 --new 64
    python tests/bench_parts.py ask MODEL --questions 4 --samples 8 --prompt 64 --new 128
    python tests/bench_parts.py verify MODEL --questions 8 --samples 4 --prompt 256
    python tests/bench_parts.py compile MODEL --questions 4 --samples 8 --prompt 64 --new 128
    python tests/bench_parts.py see MODEL --questions 64 prompt.max_pixels=200704

MODEL is a Hugging Face directory or "embedded". Settings of the run may follow, such as model.remat=none
learn.microbatch=1.

step     a whole training step: sample, assess, decode, score, learn
eval     four batches of an evaluation; `overhead`: additional time, as a share of that of generating only
ask      the pass of the probability reward; `ratio`: its time ÷ that of the reference's pass over the same
         responses
verify   a soft verifier on questions × samples texts of about `--prompt` tokens; `overhead`: additional time,
         as a share of that of its model's prefills
see      the vision tower on one square image of `prompt.max_pixels` per question

`seconds` is the median of `--runs` calls after the first, which compiles (`first_s`). `tokens_per_s` counts
response tokens up to the stop token. `padded_tokens` are the tokens of a system that repeats the prompt for
each sample and pads every row. `matmul_share` and `copy_share` are shares of the speed of a float32 matmul of
2,048² and of a copy of 256 MB in the same run; `copy_share` counts only the weights, read once per column.
"""

import argparse
import itertools
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from medrlvr_jax.build import Parts, build, load_base, load_params
from medrlvr_jax.config.load import from_tree, override
from medrlvr_jax.config.reward import ProbabilityConfig, RewardConfig, VerifierConfig
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data.patches import arrange_windows, cut_patches, window_count
from medrlvr_jax.data.question import Question
from medrlvr_jax.evaluation import answers
from medrlvr_jax.evaluation.evaluate import evaluate
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import lora
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.scoring import Rows
from medrlvr_jax.model.spec import VISION
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.model_rewards.answer_scores import AnswerRows, EndingBatch, score_answers
from medrlvr_jax.model_rewards.policy import make_policy_rewards
from medrlvr_jax.model_rewards.probability import LEAD, ProbabilityRequest
from medrlvr_jax.plan.flops import tower_flops
from medrlvr_jax.rl import records, train
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rollout import decode
from medrlvr_jax.rollout.assess import assess_settings
from medrlvr_jax.rollout.generate import DrawSettings, draw_settings, generate
from medrlvr_jax.rollout.rollout import Encoded, place_prompts, width
from medrlvr_jax.rollout.see import see
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.sharding import place_rows
from medrlvr_jax.types import Experience, Params, Prompts, Rollout

OPTIONS = ("Coronary angiography", "Chest X-ray", "Echocardiography", "Troponin measurement")
SHAPES = ("questions", "samples", "prompt", "new", "lengths")


def settings(args: argparse.Namespace) -> Config:
    """Return the settings: GRPO as in peer systems, with KL in the loss and one optimiser step per rollout."""
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
    """Measure this machine: a matmul of `size`² in GFLOP/s, and reading and writing `copied` bytes in GB/s.

    The copy is in place, because new memory pages take more time. The numbers are random, because with zeros
    and ones a GPU uses less power and is faster than in practice.
    """
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    y = jax.random.normal(jax.random.key(1), (copied // 4,))
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda y: y + 1, donate_argnums=0)

    def copy() -> Any:
        nonlocal y
        y = add(y)
        return y

    matmul, copies = by_turns([lambda: multiply(x, x), copy], 5)
    return {
        "matmul_gflops": round(2 * size**3 / min(matmul[1:]) / 1e9, 1),
        "copy_gbs": round(2 * y.nbytes / min(copies[1:]) / 1e9, 1),
    }


def by_turns(functions: list[Callable[[], Any]], runs: int) -> list[list[float]]:
    """Call the functions alternately. Return for each the seconds of a first call and of `runs` more."""
    times = [[] for _ in functions]
    for _ in range(runs + 1):
        for seconds, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds.append(time.perf_counter() - start)
    return times


def timing(times: list[float]) -> dict[str, Any]:
    runs = [round(t, 3) for t in times[1:]]
    return {"seconds": round(statistics.median(times[1:]), 3), "runs": runs, "first_s": round(times[0], 2)}


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median ratio of times of alternate calls."""
    return statistics.median(a / b for a, b in zip(times[1:], others[1:], strict=True))


def rate(count: int, times: list[float]) -> float:
    return round(count / statistics.median(times[1:]), 1)


def encoded_questions(args: argparse.Namespace, parts: Parts, n: int) -> Encoded:
    """Return n questions with prompts of exactly `--prompt` random tokens."""
    tokens = np.random.default_rng(0).integers(5, min(200, parts.cfg.vocab), (n, args.prompt)).tolist()
    questions = [Question(str(i), "?", OPTIONS, i % 4) for i in range(n)]
    return Encoded(questions, tokens, np.arange(n, dtype=np.uint32), 0, width(args.prompt))


def lengths(args: argparse.Namespace) -> np.ndarray:
    """Return the length of each row: `--new`, or log-normal with median 40, of which 2 % exceed 256."""
    shape = args.questions, args.samples
    if args.lengths == "full":
        return np.full(shape, args.new, np.int32)
    drawn = np.exp(np.random.default_rng(0).normal(np.log(40), 0.904, shape))
    return np.clip(drawn, 1, args.new).astype(np.int32)


def random_rows(args: argparse.Namespace, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return random tokens [Q, G, R] and their mask."""
    tokens = rng.integers(5, 200, (args.questions, args.samples, args.new)).astype(np.int32)
    return tokens, np.arange(args.new) < lengths(args)[..., None]


def sampled_params(parts: Parts, cfg: DecoderConfig) -> Params:
    """Return the model's weights in the sampler's layout."""
    return make_weight_sync(parts, cfg)(lora.join(load_base(parts), load_params(parts, parts.cfg)))


def count(params: Params) -> int:
    return sum(p.size for p in jax.tree.leaves(params))


def sample_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    params, cfg, limits = sampled_params(parts, parts.sampler_cfg), parts.sampler_cfg, lengths(args)
    encoded = encoded_questions(args, parts, args.questions)
    prompts, key = place_prompts(params, parts, encoded, np.arange(args.questions)), jax.random.key(0)
    stops = (parts.cfg.vocab,)  # cannot be sampled: only `limits` end a row
    settings = DrawSettings(cfg, parts.config.sample, stops, parts.tokenizer.pad_id)

    def run():
        return generate(params, prompts, key, settings, limits)

    [times], mask = by_turns([run], args.runs), run().mask
    tokens, columns = int(mask.sum()), int(mask.any((0, 1)).sum())
    work = 2 * count(params) * (tokens + args.questions * args.prompt)
    read = sum(p.nbytes for p in jax.tree.leaves(params)) * columns
    work = {"matmul_gflop": round(work / 1e9), "read_gb": round(read / 1e9)}
    return timing(times) | {"tokens": tokens, "tokens_per_s": rate(tokens, times)} | work


def see_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    cfg = parts.cfg.vision
    if cfg is None or parts.tower is None:
        raise ConfigError(f"{args.model}: the model has no vision tower; use a vision-language model")
    side = math.isqrt(cfg.max_pixels) // cfg.factor * cfg.factor
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    cut = cut_patches(Image.fromarray(pixels), cfg)
    images = arrange_windows([[cut]] * args.questions, window_count((cut[1],), cfg), cfg)
    images = place_rows(images, args.questions, parts.mesh)
    tower = load_params(parts, parts.cfg).get(VISION) or parts.tower()
    [times] = by_turns([lambda: see(tower, images, cfg=parts.cfg)], args.runs)
    work = {"matmul_gflop": round(tower_flops(parts.cfg, images) / 1e9, 1)}
    return timing(times) | {"tokens": cut[1].tokens, "images_per_s": rate(args.questions, times)} | work


def learn_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    training, state = train.init_training(parts, make_programs(parts, 1))
    learner, questions, rng = state.policy, args.questions, np.random.default_rng(0)
    drawn, mask = random_rows(args, rng)
    prompts = rng.integers(5, 200, (questions, args.prompt)).astype(np.int32)
    prompts = Prompts(prompts, np.ones_like(prompts, bool), np.arange(questions, dtype=np.uint32))
    logprobs, reference, advantages = rng.standard_normal((3, *mask.shape)).astype(np.float32)
    rows = Experience(
        prompts, drawn, mask, logprobs - 9, reference - 9, advantages, values=None, returns=None
    )
    tokens, rows = int(mask.sum()), place_rows(rows, questions, parts.mesh)
    fixed = training.frozen.base, rows, jax.random.key(0), jnp.float32(0.01)

    def run():
        nonlocal learner
        learner, metrics = training.programs.learn_policy(learner, *fixed)
        return learner, metrics

    [times] = by_turns([run], args.runs)
    packed = questions * (args.prompt + args.samples * args.new)
    padded = questions * args.samples * (args.prompt + args.new)
    out = {"tokens": tokens, "packed_tokens": packed, "padded_tokens": padded}
    out |= {"padded_tokens_per_s": rate(padded, times)}
    return timing(times) | out | {"matmul_gflop": round(6 * count(learner.params) * packed / 1e9)}


def step_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    training, state = train.init_training(parts, make_programs(parts, 1))
    encoded, steps, tokens = encoded_questions(args, parts, args.questions), itertools.count(), 0

    def run():
        nonlocal state, tokens
        state, stats, scored, _ = train.train_step(training, encoded, state, next(steps))
        tokens = int(scored.lengths.sum())
        return state, records.summarise(stats, scored)

    [times] = by_turns([run], args.runs)
    prompts, passes = args.questions * args.prompt, 1 + (training.frozen.reference is not None)
    packed = prompts + args.questions * args.samples * args.new
    work = count(state.policy.params) * (2 * (prompts + tokens) + (2 * passes + 6) * packed)
    out = {"tokens": tokens, "tokens_per_s": rate(tokens, times), "matmul_gflop": round(work / 1e9)}
    return timing(times) | out


def eval_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """Time an evaluation with its statistics, and generating the same responses only, alternately."""
    size, params = args.questions, sampled_params(parts, parts.cfg)
    encoded, temperature = encoded_questions(args, parts, 4 * size), parts.config.eval.temperature
    sample = replace(parts.config.sample, temperature=temperature)

    def evaluation():
        return answers.describe(answers.from_rows(evaluate(parts, params, encoded)[1], "set"))

    def generation():
        batches = [
            place_prompts(params, parts, encoded, np.arange(i, i + size)) for i in range(0, 4 * size, size)
        ]
        settings = draw_settings(parts, parts.cfg, sample)
        return [generate(params, prompts, jax.random.key(0), settings) for prompts in batches]

    times, others = by_turns([evaluation, generation], args.runs)
    overhead = round(ratio(times, others) - 1, 4)
    return timing(times) | {"generate_s": timing(others)["runs"], "overhead": overhead}


def verify_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """Time a soft verifier, from texts to probabilities, and its model's prefills only, alternately."""
    longest = max(map(len, parts.tokenizer.encode_untrusted([f" {option}" for option in OPTIONS])))
    words = " ".join(itertools.islice(itertools.cycle(OPTIONS), max(1, (args.prompt - 24) // longest)))
    texts = [f"{i} {words}" for i in range(args.questions * args.samples)]
    tokens = verifier_models.encode(parts.tokenizer, texts, chat=False, soft=True)
    section = VerifierConfig(
        model=args.model,
        verdicts=("1", "0"),
        batch=args.questions,
        dtype=parts.config.model.dtype,
        max_tokens=max(map(len, tokens)),
    )
    verifier = verifier_models.read(section, parts.mesh, "bench").load()
    prefill, columns = jax.jit(decode.prefill, static_argnames="cfg"), verifier.widths[-1]
    batches = [tokens[i : i + verifier.size] for i in range(0, len(tokens), verifier.size)]
    placed = [verifier.place([tuple(row) for row in batch], columns) for batch in batches]

    def prefills():
        return [prefill(verifier.params, verifier.cfg, prompts) for prompts in placed]

    times, others = by_turns([lambda: verifier.ask(texts), prefills], args.runs)
    overhead = round(ratio(times, others) - 1, 4)
    return timing(times) | {"columns": columns, "prefill_s": timing(others)["runs"], "overhead": overhead}


def compile_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """Measure compilation: the seconds of the first step minus those of the second."""
    jax.config.update("jax_enable_compilation_cache", False)
    out = step_case(argparse.Namespace(**vars(args) | {"runs": 1}), parts)
    return {"compile_s": round(out["first_s"] - out["seconds"], 2), "seconds": out["seconds"]}


def ask_case(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """Time the probability reward's pass with answers of 8 tokens, and the reference's pass over responses."""
    section = ProbabilityConfig(max_tokens=8)
    reward = RewardConfig(components=(section,))
    with_reward = replace(parts, config=replace(parts.config, reward=reward))
    program = make_policy_rewards(with_reward)["probability"].program
    how, params = assess_settings(parts), lora.join(load_base(parts), load_params(parts, parts.cfg))
    n, shape, rng = args.questions, (args.questions, args.samples), np.random.default_rng(0)
    tokens, mask = random_rows(args, rng)
    ending = EndingBatch(
        prefix=np.maximum(lengths(args) - 6, 0),
        ids=rng.integers(5, 200, (*shape, section.max_tokens + LEAD)).astype(np.int32),
        start=np.zeros(shape, np.int32),
        size=np.full(shape, 8, np.int32),
    )
    request = ProbabilityRequest(ending, np.zeros(shape, np.float32), np.ones(shape, bool))
    request, tokens, mask = place_rows((request, tokens, mask), n, parts.mesh)
    prompts = place_prompts(params, parts, encoded_questions(args, parts, n), np.arange(n))
    rollout = Rollout(tokens, mask, logprobs=tokens, policy_logprobs=None)

    @jax.jit
    def reference(params: Params, prompts: Prompts, rollout: Rollout) -> Any:
        rows = Rows(prompts, rollout.tokens, rollout.mask)
        return score_answers(params, AnswerRows(rows, rollout.mask), "logmean", how)

    ask = lambda: program({}, params, prompts, rollout, request)
    asked, scored = by_turns([ask, lambda: reference(params, prompts, rollout)], args.runs)
    return timing(asked) | {"reference_s": timing(scored)["runs"], "ratio": round(ratio(asked, scored), 3)}


CASES = {
    "ask": ask_case,
    "sample": sample_case,
    "see": see_case,
    "learn": learn_case,
    "step": step_case,
    "eval": eval_case,
    "verify": verify_case,
    "compile": compile_case,
}


def main(argv: list[str] | None = None) -> int:
    name, raw = "python tests/bench_parts.py", argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog=name, description=__doc__, formatter_class=raw)
    top.add_argument("case", choices=CASES)
    top.add_argument("model", metavar="MODEL")
    top.add_argument("settings", nargs="*", metavar="a.b=value")
    for size, default in (("questions", 4), ("samples", 8), ("prompt", 64), ("new", 128), ("runs", 3)):
        top.add_argument(f"--{size}", type=int, default=default)
    top.add_argument("--lengths", choices=("full", "lognormal"), default="full", help="of the responses")
    args, rest = top.parse_known_args(argv)
    args.settings += rest
    parts = build(settings(args))
    with jax.set_mesh(parts.mesh):
        out = CASES[args.case](args, parts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before `machine` allocates 256 MB
    speeds = machine()
    if "matmul_gflop" in out:
        out["matmul_share"] = round(out["matmul_gflop"] / out["seconds"] / speeds["matmul_gflops"], 3)
    if "read_gb" in out:
        out["copy_share"] = round(out["read_gb"] / out["seconds"] / speeds["copy_gbs"], 3)
    case = {name: getattr(args, name) for name in ("case", "model", "settings", *SHAPES)}
    print(json.dumps(case | out | {"peak_gib": round(peak / 2**20, 2)} | speeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
