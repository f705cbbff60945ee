"""Evaluation: the first half of a training step, over whole sets, with the training's own sampler and
reward.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from medrlvr_jax.build import Parts, abstract_params, build, check_positions, load_base, load_params
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.load import load
from medrlvr_jax.config.schema import Config, SampleConfig, SetConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.question import Question, fingerprint, question_hash
from medrlvr_jax.evaluation import answers, monitors, stats
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather
from medrlvr_jax.model import lora
from medrlvr_jax.rewards.parse import beginning_trap
from medrlvr_jax.rollout.program import Program, draw_program
from medrlvr_jax.rollout.rollout import Encoded, encode, reorder, sample_and_score
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs import inputs, log
from medrlvr_jax.runs.checkpoint import best_step, restore_params
from medrlvr_jax.runs.console import Console
from medrlvr_jax.types import Params

NOISE = 2**31 + 1  # folded into the seed: evaluation draws from a stream of its own, the same at every step


def load_sets(parts: Parts) -> dict[str, Encoded]:
    """Read and encode every evaluation set of the config."""
    sets = {}
    for name, spec in parts.config.eval.sets.items():
        questions, told = data.read(spec)
        encoded = encode(parts.tokenizer, questions, parts.config, spec.shuffle_options)
        if not encoded.questions:
            limit = parts.config.prompt.max_tokens
            raise ConfigError(
                f"eval.sets.{name}: no question of {spec.path} fits prompt.max_tokens = {limit}; raise it"
            )
        if encoded.dropped:
            told += f"\n  dropped: {encoded.dropped:,} questions, longer than prompt.max_tokens; raise it"
        sets[name] = dataclasses.replace(encoded, told=told)
        field = "sample.max_new_tokens" if parts.config.eval.max_new_tokens is None else "eval.max_new_tokens"
        check_positions(parts, sets[name].longest, how(parts.config, sets[name]).max_new_tokens, field)
    return sets


def evaluate(
    parts: Parts,
    decode_params: Params,
    encoded: Encoded,
    progress: Callable[[int, int], None] = lambda done, n: None,
    entropies: bool = False,
) -> tuple:
    """Answer every question of a set. Returns (counts for summary.json, rows for a JSONL file, with
    `entropies` those of the answers).
    """
    n, size, draws = (
        len(encoded.questions),
        parts.config.eval.batch,
        parts.config.eval.samples if encoded.shuffle else 1,
    )
    rows = []
    for draw in range(draws):
        for start in range(0, n, size):
            rows += ask(
                parts, decode_params, encoded, np.arange(start, min(start + size, n)), draw, entropies
            )
            progress((draw * n + min(start + size, n)) // draws, n)
    rows = [row for _, row in sorted(chain.from_iterable(gather(rows)), key=lambda r: r[0])]
    return summarise(rows, encoded.dropped), rows


def ask(
    parts: Parts,
    decode_params: Params,
    encoded: Encoded,
    index: np.ndarray,
    draw: int = 0,
    entropies: bool = False,
) -> list[tuple[int, dict[str, Any]]]:
    """`eval.samples` answers to each question at `index`, at most `eval.batch` of them: this process's, each
    after its place in the set.

    Where options are shuffled, one answer to each, in the order of `draw`.
    """
    c, n, k = parts.config, len(index), parts.config.eval.samples
    sample = how(c, encoded)
    alone = sample.samples
    key = jax.random.fold_in(jax.random.key(c.seed), np.uint32(NOISE))
    # the last batch is filled up with its first questions; they are not counted again
    index = np.resize(index, c.eval.batch)
    if encoded.shuffle:
        encoded, key = reorder(parts, encoded, index, draw), jax.random.fold_in(key, draw)
    scored = sample_and_score(decode_params, parts, encoded, index, key, sample, entropies)
    rows = []
    for row in np.flatnonzero(scored.places < n * alone).tolist():
        question, which = divmod(int(scored.places[row]), alone)
        asked = scored.questions[row]
        whose = {"subject": asked.subject, "sample": draw + which, "question_hash": question_hash(asked)}
        if asked.id in encoded.repeats:
            whose |= {"repeats": encoded.repeats[asked.id]}
        rows.append((int(index[question]) * k + draw + which, scored.record(row) | whose))
    return rows


def how(c: Config, encoded: Encoded) -> SampleConfig:
    """One batch of an evaluation as a rollout."""
    length, samples = (
        c.eval.max_new_tokens or c.sample.max_new_tokens,
        1 if encoded.shuffle else c.eval.samples,
    )
    return SampleConfig(
        questions=c.eval.batch, samples=samples, max_new_tokens=length, temperature=c.eval.temperature
    )


def programs(parts: Parts, sets: dict[str, Encoded]) -> list[Program]:
    """What `evaluate_sets` will call; sets of one shape share one."""
    shapes = {(how(parts.config, encoded), encoded.width): name for name, encoded in sets.items()}
    return [draw_program(parts, sample, width, f"eval {name}") for (sample, width), name in shapes.items()]


def summarise(rows: list[dict[str, Any]], dropped: int) -> dict[str, Any]:
    """Counts over completions (n, correct, format_ok), and their shares with 95 % intervals over questions
    (`stats.accuracy`).

    `rows` stand question by question, each with as many samples.
    """
    n, questions = len(rows), len({r["id"] for r in rows})
    right, formatted = (
        np.array([r[name] for r in rows]).reshape(questions, -1) for name in ("correct", "format_ok")
    )
    accuracy, form = stats.accuracy(right), stats.accuracy(formatted)
    return {
        "n": n,
        "questions": questions,
        "correct": int(right.sum()),
        "format_ok": int(formatted.sum()),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "format_rate": form.value,
        "format_low": form.low,
        "format_high": form.high,
        "response_length": sum(r["length"] for r in rows) / n,
        "truncated": sum(not r["stopped"] for r in rows),
        "dropped_prompts": dropped,
    }


def evaluate_sets(
    parts: Parts, decode_params: Params, sets: dict[str, Encoded], run: log.Run
) -> dict[str, Any]:
    """Every set of a run in training; flat `eval.<set>.<count>` metrics."""
    metrics = {}
    for name, encoded in sets.items():
        with jax.profiler.TraceAnnotation("evaluate"):
            counts, _ = evaluate(
                parts,
                decode_params,
                encoded,
                lambda done, n, name=name: run.progress(f"eval {name}", done, n),
            )
        metrics |= {f"eval.{name}.{k}": v for k, v in counts.items()}
        if counts["truncated"] > monitors.HIGH["truncated"][0] * counts["n"]:
            run.notify(answers.remarks(f"eval {name}", counts)[-1])
    return metrics


def open_source(
    source: Path,
    settings: Mapping[str, Any] | Sequence[str],
    step: int | Literal["best"] | None,
    command: str | None = None,
) -> tuple[Parts, Params, int]:
    """A run's policy (by default its newest) and its step, or the model that a config names and 0.

    The parameters are whole. `command`: which settings are needed and checked, see `config.load.load`.
    """
    if source.is_dir():
        if not (source / "config.yaml").is_file():
            raise ConfigError(
                f"{source}: no config.yaml in it; give a run's folder, such as runs/quickstart, or "
                "a config file"
            )
        parts = build(load(source / "config.yaml", settings, command))
        inputs.check_model(source, parts)
        with jax.set_mesh(parts.mesh):
            abstract = lora.trained(abstract_params(parts, parts.cfg), parts.cfg)
            params, step = restore_params(source / "checkpoints", abstract, step)
            return parts, lora.join(load_base(parts), params), step
    if step is not None:
        raise ConfigError(
            f"--step {step}: {source} is no run's folder, so there are no checkpoints; leave it out"
        )
    parts = build(load(source, settings, command))
    with jax.set_mesh(parts.mesh):
        return parts, lora.join(load_base(parts), load_params(parts, parts.cfg)), 0


def home(source: Path, parts: Parts) -> Path:
    """The folder of a run, or the one that a run of this config would have."""
    return source if source.is_dir() else Path(parts.config.runs) / parts.config.name


def new_folder(source: Path, parts: Parts, name: str, out: Path | None, holds: str) -> Path:
    """Where results go: `out`, or `name` in the run's folder; refused if it has the file `holds` already."""
    folder = out or home(source, parts) / name
    if jax.process_index() == 0:  # it decides for all: others may look when it has written already
        if (folder / holds).exists():
            raise ConfigError(f"{folder}: it holds {holds} already; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def chosen_on(source: Path, step: int, sets: dict[str, SetConfig]) -> list[str]:
    """Of the evaluated sets those by which this very checkpoint was chosen as the best: on them its accuracy
    is too high.
    """
    if not source.is_dir():
        return []
    own = load(source / "config.yaml")
    name = (own.checkpoint.best or "").removeprefix("eval.").rpartition(".")[0]
    if name not in own.eval.sets or best_step(source / "checkpoints") != step:
        return []
    same = dataclasses.replace(own.eval.sets[name], limit=None)
    return [n for n, spec in sets.items() if dataclasses.replace(spec, limit=None) == same]


def how_made(parts: Parts, sets: dict[str, Encoded]) -> dict[str, Any]:
    """What eval.json says so that the same could be asked again: the resolved settings, the prompt's wording,
    and of each set hashes of the questions and of the prompts' tokens as the model was given them (shuffled
    options: as the file has them).
    """
    asked = {
        name: {"data": fingerprint(encoded.questions), "prompts": fingerprint(encoded.tokens)}
        for name, encoded in sets.items()
    }
    blank = Question("", "{question}", ("{option A}", "{option B}"), 0)
    template = text.render(blank, parts.config.prompt.template)
    return {"config": configs.to_tree(parts.config), "template": template, "sets": asked}


def evaluate_source(
    source: Path, settings: list[str], step: int | Literal["best"] | None, out: Path | None
) -> int:
    """`medrlvr eval`: one JSONL of answers a set, eval.json with how they were made, counts and what they
    show, and tables.
    """
    parts, params, step = open_source(source, settings, step, "eval")
    sets = load_sets(parts)
    if not sets:
        raise ConfigError("eval.sets: none; name one, such as eval.sets.mine.path=questions.jsonl")
    folder = new_folder(source, parts, f"eval-{step}", out, "eval.json")
    writes, console, results, found = jax.process_index() == 0, Console(len(sets)), {}, {}
    with jax.set_mesh(parts.mesh):
        decode_params = make_weight_sync(parts, parts.cfg)(params)
        for name, encoded in sets.items():
            console.notify(f"eval.sets.{name}: {encoded.told}")
            progress = partial(console.progress, f"eval {name}")
            results[name], rows = evaluate(parts, decode_params, encoded, progress, entropies=True)
            found[name] = answers.describe(answers.of_rows(rows, name))
            if writes:
                files.write_text(
                    folder / f"{name}.jsonl",
                    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                )
    console.close()
    if not writes:
        return 0
    chosen = chosen_on(source, step, parts.config.eval.sets)
    warnings = [
        f"{name}: checkpoint {step} was chosen as the best on these questions: its accuracy here is too high"
        for name in chosen
    ]
    if trap := beginning_trap(text.begins(parts.tokenizer, parts.config.prompt), parts.config.reward.mode):
        warnings.append("; ".join(trap))
    about = {
        "source": str(source),
        "step": step,
        "versions": log.versions(),
        "warnings": warnings,
    } | how_made(parts, sets)
    files.write_json(folder / "eval.json", about | {"eval": results, "statistics": found})
    print(answers.show(found))
    said = chain.from_iterable(answers.remarks(name, counts) for name, counts in results.items())
    print("\n".join([*said, *(f"warning: {w}" for w in warnings), f"answers: {folder}"]))
    return 0
