"""Two evaluations of the same questions, side by side: `medrlvr compare EVAL_A EVAL_B`.

Reads what `medrlvr eval` wrote (one JSONL of answers a set). Questions are paired by their id; with several samples a question is
the unit, not the sample.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from medrlvr_jax import stats
from medrlvr_jax.config import ConfigError
from medrlvr_jax.log import read_jsonl


class Answers(NamedTuple):
    """One set as arrays over its n questions, k samples each."""

    ids: list[str]
    correct: np.ndarray  # bool [n, k]
    answers: np.ndarray  # str [n, k], "" where none was found
    key: np.ndarray  # str [n]
    options: np.ndarray  # int [n]


def read_answers(path: Path) -> Answers:
    """The answers of one set; questions in the order of the file."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(path):
        rows.setdefault(str(row["id"]), []).append(row)
    if not rows:
        raise ConfigError(f"{path}: no answers in it")
    k = {len(r) for r in rows.values()}
    if len(k) > 1:
        raise ConfigError(f"{path}: questions with {sorted(k)} samples; ids must be unique and each question answered as often")
    column = lambda name, empty: np.array([[r[name] or empty for r in group] for group in rows.values()])  # noqa: E731
    first = [group[0] for group in rows.values()]
    return Answers(
        list(rows),
        column("correct", False),
        column("answer", ""),
        np.array([r["key"] for r in first]),
        np.array([r["options"] for r in first]),
    )


def describe(a: Answers) -> dict[str, Any]:
    """One evaluation by itself: accuracy with its interval, pass@k with chance taken out, majority, entropy, letters."""
    k = a.correct.shape[1]
    out: dict[str, Any] = {"n": len(a.ids), "samples": k, "accuracy": stats.accuracy(a.correct)._asdict()}
    out["letters"] = stats.letter_bias(a.answers.ravel(), a.key)
    if k > 1:
        passed = {j: stats.pass_at_k(a.correct, j) for j in range(1, k + 1)}
        out["pass_at_k"] = {j: float(p.mean()) for j, p in passed.items()}
        out["pass_at_k_beyond_chance"] = {j: stats.beyond_chance(p, a.options, j) for j, p in passed.items()}
        out["majority"] = float(stats.majority(a.answers, a.key).mean())
        out["answer_entropy"] = float(stats.answer_entropy(a.answers).mean())
    return out


def compare_sets(a: Answers, b: Answers) -> dict[str, Any]:
    """b against a on the questions that both answered."""
    places = [{name: i for i, name in enumerate(s.ids)} for s in (a, b)]
    shared = [name for name in a.ids if name in places[1]]
    if not shared:
        raise ConfigError("the two evaluations share no question id")
    rows = [[place[name] for name in shared] for place in places]
    one, other = a.correct[rows[0]], b.correct[rows[1]]
    single = one.shape[1] == other.shape[1] == 1
    difference = stats.paired_difference(one, other)
    only_a, only_b, p = stats.mcnemar(one[:, 0], other[:, 0]) if single else (None, None, _sign_flip(other.mean(1) - one.mean(1)))
    discordant = float((one.mean(1) != other.mean(1)).mean())
    return {
        "n": len(shared),
        "a": stats.accuracy(one)._asdict(),
        "b": stats.accuracy(other)._asdict(),
        "difference": difference._asdict(),
        "only_a": only_a,
        "only_b": only_b,
        "p": p,
        "detectable": stats.detectable(len(shared), discordant) if discordant else None,
        "boundary": stats.boundary(one, other),
    }


def _sign_flip(differences: np.ndarray, draws: int = stats.DRAWS, seed: int = 0) -> float:
    """Two-sided p of a mean difference under random signs of the questions' differences (Fisher's randomisation test)."""
    signs = np.random.default_rng(seed).integers(0, 2, (draws, len(differences)), dtype=np.int8) * 2 - 1
    means = np.abs(signs @ differences)
    return float((1 + (means >= abs(differences.sum()) - 1e-12).sum()) / (1 + draws))


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Every set that both folders hold; p-values adjusted by Holm over them."""
    names = sorted({p.stem for p in a.glob("*.jsonl")} & {p.stem for p in b.glob("*.jsonl")})
    if not names:
        raise ConfigError(f"{a} and {b}: no set of answers in both; give two folders that `medrlvr eval` wrote")
    out = {}
    for name in names:
        one, other = (read_answers(folder / f"{name}.jsonl") for folder in (a, b))
        try:
            out[name] = compare_sets(one, other) | {"each": {"a": describe(one), "b": describe(other)}}
        except ConfigError as e:
            raise ConfigError(f"{name}: {e}") from None
    for name, p in zip(names, stats.holm([out[n]["p"] for n in names]), strict=True):
        out[name]["p_holm"] = p
    return out


def show(found: dict[str, Any]) -> str:
    """The comparison as a table, and what it could have shown."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("set", "n", "accuracy A", "accuracy B", "B − A", "p", "p (Holm)", "kept", "gained", "lost", "never"):
        table.add_column(column, justify="left" if column == "set" else "right", no_wrap=True)
    for name, c in found.items():
        edge = [str(c["boundary"][k]) for k in ("preserved", "gained", "lost", "never")]
        accuracies = [_percent(c[k]) for k in ("a", "b", "difference")]
        table.add_row(name, f"{c['n']:,}", *accuracies, f"{c['p']:.2g}", f"{c['p_holm']:.2g}", *edge)
    text = io.StringIO()
    rich.console.Console(file=text, width=180).print(table)
    notes = [
        f"{name}: {c['n']:,} questions show a difference of {100 * c['detectable']:.1f} points or more with 80 % power"
        for name, c in found.items()
        if c["detectable"]
    ]
    return "\n".join([*(row.rstrip() for row in text.getvalue().strip("\n").split("\n")), *notes])


def _percent(x: dict[str, float]) -> str:
    return f"{100 * x['value']:.1f} % ({100 * x['low']:.1f}–{100 * x['high']:.1f})"
