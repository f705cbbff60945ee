"""How hard each training question is for a model: `medrlvr difficulty RUN|CONFIG` counts how many of k samples are right.

One line a question, `{"id", "right", "format_ok", "samples", "model"}`, in the order of the set; `data.pass_count` reads it (MedVLThinker,
arXiv 2508.02669: 16 samples at temperature 1 of the model that training starts from). Sampling is a rollout's, `sample.temperature` and
`sample.max_new_tokens`; the noise is evaluation's. The same command again goes on where it was cut off.
"""

import dataclasses
from collections import Counter
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from medrlvr_jax import data, log
from medrlvr_jax.answers import draw
from medrlvr_jax.build import make_relay
from medrlvr_jax.config import ConfigError
from medrlvr_jax.evaluate import ask, home, open_source
from medrlvr_jax.experience import encode
from medrlvr_jax.processes import gather


def difficulty_source(source: Path, settings: list[str], step: int | Literal["best"] | None, samples: int, out: Path | None) -> int:
    """Counts for every question of the config's `data`, whatever its own `pass_count` says; prints how many have each count."""
    parts, params, step = open_source(source, settings, step)
    c = parts.config
    sampled = dataclasses.replace(c.eval, samples=samples, temperature=c.sample.temperature, max_new_tokens=c.sample.max_new_tokens)
    parts = dataclasses.replace(parts, config=dataclasses.replace(c, eval=sampled))
    questions = data.load(dataclasses.replace(c.data, pass_count=None))
    encoded = encode(parts.tokenizer, questions, c)
    path, model = out or home(source, parts) / f"difficulty-{step}.jsonl", f"{c.model.path}, {source}, step {step}"
    ids, n, size = [q.id for q in encoded.questions], len(encoded.questions), c.eval.batch
    found = done_before(path, ids, samples, model)
    found = gather(found)[0]  # process 0's look: others may look when it has written already
    writes, console = jax.process_index() == 0, log.Console(1)
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        log.append(path, found)  # without a last line that was torn
    with jax.set_mesh(parts.mesh):
        decode_params = make_relay(parts, parts.cfg)(params)
        for start in range(len(found), n, size):
            rows = ask(parts, decode_params, encoded, np.arange(start, min(start + size, n)))
            new = count([row for _, row in sorted(chain.from_iterable(gather(rows)), key=lambda r: r[0])], samples, model)
            if writes:
                log.append(path, new)
            found += new
            console.progress("difficulty", len(found), n)
    console.close()
    if writes:
        kept = set(ids)
        log.append(path, [{"id": q.id, "right": None, "samples": samples, "model": model} for q in questions if q.id not in kept])
        print(show(found, samples, len(questions) - n))
        print(f"counts: {path}; train on some with data.pass_count='{{file: {path}, keep: [1, {samples - 1}]}}'")
    return 0


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
    lines = [line for line in log.read_jsonl(path) if line["right"] is not None]
    same = [line["id"] for line in lines] == ids[: len(lines)]
    if not same or any((line["samples"], line["model"]) != (samples, model) for line in lines):
        raise ConfigError(f"{path}: it holds counts of other questions, samples or of another model; give another --out, or remove it")
    return lines


def show(found: list[dict[str, Any]], samples: int, dropped: int) -> str:
    """How many questions have each count."""
    times = Counter(line["right"] for line in found)
    rows = [[f"{right} of {samples}", f"{times[right]:,}", f"{100 * times[right] / len(found):.1f} %"] for right in range(samples + 1)]
    table = draw(("right samples", "questions", "share"), rows)
    return table + (f"\n{dropped:,} questions were not asked: longer than prompt.max_tokens" if dropped else "")
