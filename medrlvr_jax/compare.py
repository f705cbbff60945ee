"""Two evaluations of the same questions, side by side: `medrlvr compare EVAL_A EVAL_B`.

Reads what `medrlvr eval` wrote (one JSONL of answers a set). Questions are paired by their id; with several samples a question is
the unit, not the sample.
"""

from pathlib import Path
from typing import Any

import numpy as np

from medrlvr_jax import stats
from medrlvr_jax.answers import Answers, describe, draw, percent, read
from medrlvr_jax.config import ConfigError


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
    """Every set that both folders hold; p-values adjusted by Holm over them, of the distinct questions where a set holds exact repeats."""
    names = sorted({p.stem for p in a.glob("*.jsonl")} & {p.stem for p in b.glob("*.jsonl")})
    if not names:
        raise ConfigError(f"{a} and {b}: no set of answers in both; give two folders that `medrlvr eval` wrote")
    out = {}
    for name in names:
        one, other = (read(folder / f"{name}.jsonl") for folder in (a, b))
        try:
            out[name] = compare_sets(one, other) | {"each": {"a": describe(one), "b": describe(other)}}
            if one.repeats.any():
                out[name]["distinct"] = compare_sets(one.only(~one.repeats), other)
        except ConfigError as e:
            raise ConfigError(f"{name}: {e}") from None
    tested = [out[name].get("distinct", out[name]) for name in names]
    for c, p in zip(tested, stats.holm([c["p"] for c in tested]), strict=True):
        c["p_holm"] = p
    return out


def show(found: dict[str, Any]) -> str:
    """The comparison as a table, and what it could have shown."""
    rows, sets = [], {}
    for name, c in found.items():
        sets |= {name: c} | ({f"{name}, distinct": c["distinct"]} if "distinct" in c else {})
    for name, c in sets.items():
        edge = [str(c["boundary"][k]) for k in ("preserved", "gained", "lost", "never")]
        accuracies = [percent(c[k]) for k in ("a", "b", "difference")]
        adjusted = f"{c['p_holm']:.2g}" if "p_holm" in c else "–"
        rows.append([name, f"{c['n']:,}", *accuracies, f"{c['p']:.2g}", adjusted, *edge])
    notes = [
        f"{name}: {c['n']:,} questions show a difference of {100 * c['detectable']:.1f} points or more with 80 % power"
        for name, c in sets.items()
        if c["detectable"]
    ]
    columns = ("set", "n", "accuracy A", "accuracy B", "B − A", "p", "p (Holm)", "kept", "gained", "lost", "never")
    return "\n".join([draw(columns, rows), *notes])
