"""How hard each training question is for a model: `medrlvr difficulty RUN|CONFIG` counts right samples of k.

It writes a line for each question in the order of the set, `{"id", "right", "format_ok", "samples",
"model"}`, which `data.pass_count` reads (MedVLThinker, arXiv 2508.02669: 16 samples at temperature 1 from the
model that training starts from). Sampling uses `sample.temperature` and `sample.max_new_tokens`, with
evaluation's noise. The lines are in FILE.part until all questions are counted. After an interruption, the
same command continues.

`medrlvr difficulty RUN --history` samples nothing. It reads from the run's questions.jsonl each question's
shares of right answers x_1 … x_K in K passes over the data, and computes

    variance    the variance of x, by which 1-shot RLVR (arXiv 2504.20571) ranks examples
    impact      1 − Σ_k (x_k − m_k)² / Σ_k (1 − m_k)², where m_k is the mean over all questions in their k-th
                pass: how closely x follows the mean curve of the run (LIMR, arXiv 2502.11886, which has
                rewards where this has accuracies)
"""

import dataclasses
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medrlvr_jax.build import check_positions
from medrlvr_jax.config.load import load
from medrlvr_jax.data import load as data
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import fine_tune_first, from_rows
from medrlvr_jax.evaluation.evaluate import answer_batch, open_policy, run_folder
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import from_leader, gather_rows
from medrlvr_jax.rollout.rollout import encode
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs.checkpoint import Which
from medrlvr_jax.runs.console import Console


def difficulty_source(source: Path, settings: list[str], step: Which, samples: int, out: Path | None) -> int:
    """Run `medrlvr difficulty`: count for every question of `data`, whatever its `pass_count`."""
    parts, params, step = open_policy(source, settings, step, "difficulty")
    c, length = parts.config, parts.config.sample.max_new_tokens
    sampling = {"samples": samples, "temperature": c.sample.temperature, "max_new_tokens": length}
    eval_config = dataclasses.replace(c.eval, **sampling)
    parts = dataclasses.replace(parts, config=dataclasses.replace(c, eval=eval_config))
    questions = data.load(dataclasses.replace(c.data, pass_count=None))
    encoded = encode(parts.tokenizer, questions, c, vision=parts.cfg.vision)
    check_positions(parts, encoded.longest, length, "sample.max_new_tokens")
    path = out or run_folder(source, parts) / f"difficulty-{step}.jsonl"
    partial_path = path.with_name(f"{path.name}.partial_path")
    about = {"samples": samples, "model": f"{c.model.path}, {source}, step {step}"}
    ids, size = [q.id for q in encoded.questions], c.eval.batch
    counts = from_leader(lambda: earlier_counts(path if path.exists() else partial_path, ids, about))
    leads, console = jax.process_index() == 0, Console()
    if leads:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(partial_path, files.jsonl(counts))  # drops a last line that a crash cut
    with jax.set_mesh(parts.mesh):
        decode_params = make_weight_sync(parts, parts.cfg)(params)
        for start in range(len(counts), len(ids), size):
            index = np.arange(start, min(start + size, len(ids)))
            batch = count(gather_rows(answer_batch(parts, decode_params, encoded, index)), about)
            if leads:
                files.append(partial_path, batch)
            counts += batch
            console.progress("difficulty", len(counts), len(ids))
    console.close()
    if leads:
        counted = set(ids)
        dropped = [{"id": q.id, "right": None} | about for q in questions if q.id not in counted]
        files.append(partial_path, dropped)
        partial_path.replace(path)
        print(show(counts, samples, len(dropped)))
        passed = stats.mean_share(np.array([line["right"] > 0 for line in counts], float))
        if advice := fine_tune_first(samples, passed):
            print(advice)
        choice = f"{{file: {path}, keep: [1, {samples - 1}]}}"
        print(f"counts: {path}; train on some with data.pass_count='{choice}'")
    return 0


def from_history(run: Path, out: Path | None) -> int:
    """Run `medrlvr difficulty RUN --history`."""
    if not (run / "questions.jsonl").is_file():
        remedy = "--history is for the folder of a run of `medrlvr train`"
        raise ConfigError(f"{run}: no questions.jsonl in it; {remedy}")
    steps = files.read_jsonl(run / "questions.jsonl")
    rows, last = scores(steps), steps[-1]["step"] if steps else 0
    if not any(row["passes"] > 1 for row in rows):
        why = "a history needs at least two passes over the data"
        raise ConfigError(f"{run}: no question was used twice in its {last} steps: {why}")
    path, model, used = out or run / "history.jsonl", f"{run}, steps 1 to {last}", {row["id"] for row in rows}
    rest = [{"id": q.id, "right": None} for q in data.load(load(run).data) if q.id not in used]
    files.write_text(path, files.jsonl(row | {"model": model} for row in rows + rest))
    ranked = sorted(rows, key=lambda row: -row["variance"])[:10]
    figures = ("accuracy", "variance", "impact")
    table = [[r["id"], str(r["passes"]), *(f"{r[name]:.4f}" for name in figures)] for r in ranked]
    print(tables.plain(("highest variance", "passes", *figures), table))
    choice = f"{{file: {path}, order: variance, top: {min(16, len(rows))}}}"
    unused = f", and {len(rest):,} that the run did not use" if rest else ""
    print(f"{len(rows):,} questions{unused}: {path}; train on the first ones with data.pass_count='{choice}'")
    return 0


def scores(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each question of questions.jsonl, in order of first use.

    `right` and `samples` are those of the question's last pass.
    """
    shares: dict[str, list[float]] = {}
    last: dict[str, tuple[int, int]] = {}
    for step in steps:
        for name, right in step["right"].items():
            shares.setdefault(name, []).append(right / step["samples"])
            last[name] = right, step["samples"]
    columns = zip_longest(*shares.values())
    means = np.array([np.mean([x for x in column if x is not None]) for column in columns])
    out = []
    for name, curve in shares.items():
        x, m = np.array(curve), means[: len(curve)]
        scale = float(((1 - m) ** 2).sum())
        impact = 1 - float(((x - m) ** 2).sum()) / scale if scale else 1.0
        right, samples = last[name]
        moments = {"accuracy": float(x.mean()), "variance": float(x.var()), "impact": impact}
        out.append({"id": name, "right": right, "samples": samples, "passes": len(x)} | moments)
    return out


def count(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each question from the rows of its answers."""
    a = from_rows(rows, "difficulty")
    counts = zip(a.ids.tolist(), a.correct.sum(1).tolist(), a.format_ok.sum(1).tolist(), strict=True)
    return [{"id": name, "right": right, "format_ok": formatted} | about for name, right, formatted in counts]


def earlier_counts(path: Path, ids: list[str], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that an interrupted or finished count has written; [] if there is no file.

    Raises `ConfigError` if they are of other questions, of another number of samples or of another model.
    """
    if not path.exists():
        return []
    lines = [line for line in files.read_jsonl(path) if line["right"] is not None]
    same = [line["id"] for line in lines] == ids[: len(lines)]
    if not same or any(line | about != line for line in lines):
        why = "it holds counts of other questions, of another number of samples or of another model"
        raise ConfigError(f"{path}: {why}; give another --out, or remove it")
    return lines


def show(counts: list[dict[str, Any]], samples: int, dropped: int) -> str:
    """Return a table of how many questions have each number of right samples."""
    questions = Counter(line["right"] for line in counts)
    share = lambda right: f"{100 * questions[right] / len(counts):.1f} %"
    rows = [[f"{i} of {samples}", f"{questions[i]:,}", share(i)] for i in range(samples + 1)]
    note = f"\n{dropped:,} questions were not asked: longer than prompt.max_tokens" if dropped else ""
    return tables.plain(("right samples", "questions", "share"), rows) + note
