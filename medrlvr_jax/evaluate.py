"""Evaluation: the first half of a training step, over whole sets, with the training's own sampler and reward."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medrlvr_jax import data, hf, log, lora
from medrlvr_jax.build import Parts, abstract_params, build, load_base, load_params, make_relay
from medrlvr_jax.checkpoint import restore_params
from medrlvr_jax.config import ConfigError, SampleConfig, load
from medrlvr_jax.experience import Encoded, encode, sample_and_score
from medrlvr_jax.processes import gather
from medrlvr_jax.report import table
from medrlvr_jax.types import Params

NOISE = 2**31 + 1  # folded into the seed: evaluation draws from a stream of its own, the same at every step


def load_sets(parts: Parts) -> dict[str, Encoded]:
    """Read and encode every evaluation set of the config."""
    sets = {}
    for name, spec in parts.config.eval.sets.items():
        sets[name] = encode(parts.tokenizer, data.load(spec), parts.config)
        if not sets[name].questions:
            limit = parts.config.prompt.max_tokens
            raise ConfigError(f"eval.sets.{name}: no question of {spec.path} fits prompt.max_tokens = {limit}; raise it")
    return sets


def evaluate(parts: Parts, decode_params: Params, encoded: Encoded, progress: Callable[[int, int], None] = lambda done, n: None) -> tuple:
    """Answer every question of a set. Returns (counts for summary.json, rows for a JSONL file)."""
    c = parts.config
    sample = SampleConfig(
        questions=c.eval.batch,
        samples=c.eval.samples,
        max_new_tokens=c.eval.max_new_tokens or c.sample.max_new_tokens,
        temperature=c.eval.temperature,
    )
    key = jax.random.fold_in(jax.random.key(c.seed), np.uint32(NOISE))
    n, rows = len(encoded.questions), []
    for start in range(0, n, c.eval.batch):
        index = np.arange(start, start + c.eval.batch) % n  # the last batch is filled up; its surplus is not counted
        scored = sample_and_score(decode_params, parts, encoded, index, key, sample)
        for row in np.flatnonzero(scored.counted & (scored.places < (n - start) * c.eval.samples)).tolist():
            place = int(scored.places[row])
            whose = {"subject": scored.questions[row].subject, "sample": place % c.eval.samples}
            rows.append((start * c.eval.samples + place, scored.record(row) | whose))
        progress(min(start + c.eval.batch, n), n)
    rows = [row for _, row in sorted(chain.from_iterable(gather(rows)), key=lambda r: r[0])]
    return summarise(rows, encoded.dropped), rows


def summarise(rows: list[dict[str, Any]], dropped: int) -> dict[str, Any]:
    """Counts over completions: n, correct, format_ok; and their shares, for reading."""
    n = len(rows)
    correct, formatted = sum(r["correct"] for r in rows), sum(r["format_ok"] for r in rows)
    return {
        "n": n,
        "correct": correct,
        "format_ok": formatted,
        "accuracy": correct / n,
        "format_rate": formatted / n,
        "response_length": sum(r["length"] for r in rows) / n,
        "truncated": sum(not r["stopped"] for r in rows),
        "dropped_prompts": dropped,
    }


def evaluate_sets(parts: Parts, decode_params: Params, sets: dict[str, Encoded], run: log.Run) -> dict[str, Any]:
    """Every set of a run in training; flat `eval.<set>.<count>` metrics."""
    metrics = {}
    for name, encoded in sets.items():
        counts, _ = evaluate(parts, decode_params, encoded, lambda done, n, name=name: run.progress(f"eval {name}", done, n))
        metrics |= {f"eval.{name}.{k}": v for k, v in counts.items()}
    return metrics


def open_source(source: Path, settings: list[str], step: int | None) -> tuple[Parts, Params, Path]:
    """A run's policy (by default its newest), or the model that a config names, whole; and a folder to write to."""
    if source.is_dir():
        if not (source / "config.yaml").is_file():
            raise ConfigError(f"{source}: no config.yaml in it; give a run's folder, such as runs/quickstart, or a config file")
        parts = build(load(source / "config.yaml", settings))
        with jax.set_mesh(parts.mesh):
            abstract = lora.trained(abstract_params(parts, parts.cfg), parts.cfg)
            params, step = restore_params(source / "checkpoints", abstract, step)
            return parts, lora.join(load_base(parts), params), source / f"eval-{step}"
    parts = build(load(source, settings))
    with jax.set_mesh(parts.mesh):
        params = lora.join(load_base(parts), load_params(parts, parts.cfg))
        return parts, params, Path(parts.config.runs) / parts.config.name / "eval-0"


def evaluate_source(source: Path, settings: list[str], step: int | None, out: Path | None) -> int:
    """`medrlvr eval`: one JSONL of answers a set, eval.json with the counts, and a table."""
    parts, params, folder = open_source(source, settings, step)
    folder = out or folder
    if (folder / "eval.json").exists():
        raise ConfigError(f"{folder}: it holds an evaluation already; give another --out")
    sets = load_sets(parts)
    if not sets:
        raise ConfigError("eval.sets: none; name one, such as eval.sets.mine.path=questions.jsonl")
    writes, console, results = jax.process_index() == 0, log.Console(len(sets)), {}
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(parts.mesh):
        decode_params = make_relay(parts, parts.cfg)(params)
        for name, encoded in sets.items():
            counts, rows = evaluate(parts, decode_params, encoded, lambda done, n, name=name: console.progress(f"eval {name}", done, n))
            results[name] = counts
            if writes:
                log.write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    console.close()
    if not writes:
        return 0
    log.write_json(folder / "eval.json", {"source": str(source), "eval": results, "versions": log.versions()})
    print(table({"eval": {name: {"after": counts} for name, counts in results.items()}}))
    print(f"answers: {folder}")
    return 0


def export(run: Path, out: Path, step: int | None, dtype: str | None) -> None:
    """`medrlvr export`: a run's policy, adapters merged, as a Hugging Face directory; on whatever devices are here."""
    n = len(jax.devices())
    batches = [f"{name}={n}" for name in ("sample.questions", "learn.minibatch", "learn.microbatch", "eval.batch")]  # of no use here
    parts, params, _ = open_source(run, [f"mesh={{data: 1, fsdp: {n}}}", *batches], step)
    with jax.set_mesh(parts.mesh):
        hf.save_params(lora.merge(params, parts.cfg), lora.off(parts.cfg), parts.config.model.path, out, dtype)
    if jax.process_index() == 0:
        print(out)
