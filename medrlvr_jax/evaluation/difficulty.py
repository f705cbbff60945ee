"""How hard each training question is for a model: `medrlvr difficulty RUN|CONFIG` right samples of k.

One line a question, `{"id", "right", "format_ok", "samples", "model"}`, in the order of the set.
`data.pass_count` reads it (MedVLThinker, arXiv 2508.02669: 16 samples at temperature 1 from the model that
training starts from). Sampling uses `sample.temperature` and `sample.max_new_tokens`, with evaluation's
noise. After an interruption, the same command continues.

`medrlvr difficulty RUN --history` samples nothing: from the run's questions.jsonl it reads the share of right
answers to each question in each pass over the data, x_1 … x_K, and computes

    variance    of x (1-shot RLVR, arXiv 2504.20571, ranks its one example by it)
    impact      1 − Σ_k (x_k − m_k)² / Σ_k (1 − m_k)², where m_k is the mean over all questions in their k-th
                pass: how closely its curve follows the run's (LIMR, arXiv 2502.11886, with rewards; here
                accuracies)
"""

import dataclasses
import json
from collections import Counter
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from medrlvr_jax.build import check_positions
from medrlvr_jax.config.load import load
from medrlvr_jax.data import load as data
from medrlvr_jax.evaluation.evaluate import ask, home, open_source
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import from_leader, gather
from medrlvr_jax.rollout.rollout import encode
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs.console import Console


def difficulty_source(
    source: Path, settings: list[str], step: int | Literal["best"] | None, samples: int, out: Path | None
) -> int:
    """Count for every question of the config's `data`, without its `pass_count`; print a table of the
    counts.
    """
    parts, params, step = open_source(source, settings, step, "difficulty")
    c = parts.config
    sampled = dataclasses.replace(
        c.eval, samples=samples, temperature=c.sample.temperature, max_new_tokens=c.sample.max_new_tokens
    )
    parts = dataclasses.replace(parts, config=dataclasses.replace(c, eval=sampled))
    questions = data.load(dataclasses.replace(c.data, pass_count=None))
    encoded = encode(parts.tokenizer, questions, c)
    check_positions(parts, encoded.longest, c.sample.max_new_tokens, "sample.max_new_tokens")
    path, model = (
        out or home(source, parts) / f"difficulty-{step}.jsonl",
        f"{c.model.path}, {source}, step {step}",
    )
    ids, n, size = [q.id for q in encoded.questions], len(encoded.questions), c.eval.batch
    found = from_leader(lambda: done_before(path, ids, samples, model))
    writes, console = jax.process_index() == 0, Console(1)
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        files.append(path, found)  # without a last line that was torn
    with jax.set_mesh(parts.mesh):
        decode_params = make_weight_sync(parts, parts.cfg)(params)
        for start in range(len(found), n, size):
            rows = ask(parts, decode_params, encoded, np.arange(start, min(start + size, n)))
            new = count(
                [row for _, row in sorted(chain.from_iterable(gather(rows)), key=lambda r: r[0])],
                samples,
                model,
            )
            if writes:
                files.append(path, new)
            found += new
            console.progress("difficulty", len(found), n)
    console.close()
    if writes:
        kept = set(ids)
        files.append(
            path,
            [
                {"id": q.id, "right": None, "samples": samples, "model": model}
                for q in questions
                if q.id not in kept
            ],
        )
        print(show(found, samples, len(questions) - n))
        print(
            f"counts: {path}; train on some with data.pass_count='{{file: {path}, keep: [1, {samples - 1}]}}'"
        )
    return 0


def from_history(run: Path, out: Path | None) -> int:
    """`medrlvr difficulty RUN --history`."""
    if not (run / "questions.jsonl").is_file():
        raise ConfigError(
            f"{run}: no questions.jsonl in it; --history is for the folder of a run of `medrlvr train`"
        )
    steps = files.read_jsonl(run / "questions.jsonl")
    found = scores(steps)
    path, last = out or run / "history.jsonl", steps[-1]["step"] if steps else 0
    if not any(row["passes"] > 1 for row in found):
        raise ConfigError(
            f"{run}: no question came twice in its {last} steps: a history needs two passes over "
            "the data or more"
        )
    came, model = {row["id"] for row in found}, f"{run}, steps 1 to {last}"
    rest = [
        {"id": q.id, "right": None} for q in data.load(load(run / "config.yaml").data) if q.id not in came
    ]
    files.write_text(
        path, "".join(json.dumps(row | {"model": model}, ensure_ascii=False) + "\n" for row in found + rest)
    )
    ranked = sorted(found, key=lambda row: -row["variance"])
    shown = (
        (r["id"], r["passes"], f"{r['accuracy']:.3f}", f"{r['variance']:.4f}", f"{r['impact']:.3f}")
        for r in ranked[:10]
    )
    columns = ("highest variance", "passes", "accuracy", "variance", "impact")
    print(tables.plain(columns, [list(map(str, row)) for row in shown]))
    use = f"{{file: {path}, order: variance, top: {min(16, len(found))}}}"
    never = f", and {len(rest):,} that never came" if rest else ""
    print(f"{len(found):,} questions{never}: {path}; train on the first of them with data.pass_count='{use}'")
    return 0


def scores(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each question of a run's questions.jsonl, in order of first use; `right` is of its last
    pass.
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
        room = float(((1 - m) ** 2).sum())
        impact = 1 - float(((x - m) ** 2).sum()) / room if room else 1.0
        said = {"passes": len(x), "accuracy": float(x.mean()), "variance": float(x.var()), "impact": impact}
        out.append({"id": name, "right": last[name][0], "samples": last[name][1]} | said)
    return out


def count(rows: list[dict[str, Any]], samples: int, model: str) -> list[dict[str, Any]]:
    """Rows of answers, question by question, as one line each."""
    out = []
    for name, group in groupby(rows, key=lambda r: r["id"]):
        mine = list(group)
        right, formatted = sum(r["correct"] for r in mine), sum(r["format_ok"] for r in mine)
        out.append({"id": name, "right": right, "format_ok": formatted, "samples": samples, "model": model})
    return out


def done_before(path: Path, ids: list[str], samples: int, model: str) -> list[dict[str, Any]]:
    """The lines of a count that was cut off: of the same questions, samples and model, or it is refused."""
    if not path.exists():
        return []
    lines = [line for line in files.read_jsonl(path) if line["right"] is not None]
    same = [line["id"] for line in lines] == ids[: len(lines)]
    if not same or any((line["samples"], line["model"]) != (samples, model) for line in lines):
        raise ConfigError(
            f"{path}: it holds counts of other questions, samples or of another model; give "
            "another --out, or remove it"
        )
    return lines


def show(found: list[dict[str, Any]], samples: int, dropped: int) -> str:
    """How many questions have each count."""
    times = Counter(line["right"] for line in found)
    rows = [
        [f"{right} of {samples}", f"{times[right]:,}", f"{100 * times[right] / len(found):.1f} %"]
        for right in range(samples + 1)
    ]
    table = tables.plain(("right samples", "questions", "share"), rows)
    return table + (
        f"\n{dropped:,} questions were not asked: longer than prompt.max_tokens" if dropped else ""
    )
