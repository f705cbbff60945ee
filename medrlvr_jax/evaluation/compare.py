"""Two evaluations of the same questions, side by side: `medrlvr compare EVAL_A EVAL_B`.

Reads what `medrlvr eval` wrote (one JSONL of answers a set, eval.json), of a run its newest evaluation. Questions are paired by their id
and must be the same by their hash; with several samples a question is the unit, not the sample. What differs in more than the model is
refused unless it is meant (`--anyway`), and then questions that are not the same are left out.
"""

import json
from pathlib import Path
from typing import Any

from medrlvr_jax.config import load as configs
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import Answers, describe, pair, percent, read, remarks
from medrlvr_jax.host import tables
from medrlvr_jax.host.errors import ConfigError

ASKED = ("prompt.chat", "prompt.prefill", "reward.mode", "eval.samples", "eval.temperature")  # settings that two evaluations must share


def evaluation(folder: Path) -> Path:
    """The folder of an evaluation: the one that is given, or the newest in that of a run."""
    if (folder / "eval.json").is_file():
        return folder
    there = sorted(folder.glob("*/eval.json"), key=lambda path: path.stat().st_mtime_ns)
    if there:
        return there[-1].parent
    if (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: a run that was not evaluated by itself yet; first: medrlvr eval {folder}")
    raise ConfigError(f"{folder}: no eval.json there; give a folder that `medrlvr eval` wrote to its end, or a run's that holds one")


def how_asked(folder: Path, name: str) -> dict[str, Any]:
    """From eval.json what must be the same for two evaluations of a set to differ by their model alone."""
    made = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    if "config" not in made:
        raise ConfigError(f"{folder}/eval.json does not say how it was made, as an older version wrote it; evaluate again")
    config = configs.flat(made["config"])
    length = config["eval.max_new_tokens"] or config["sample.max_new_tokens"]
    asked = {field: config[field] for field in ASKED} | {"max_new_tokens": length, "prompt.template": made["template"]}
    return asked | {"shuffle_options": config[f"eval.sets.{name}.shuffle_options"]}


def aside(folder: Path, name: str, which: str) -> list[str]:
    """Which questions an evaluation dropped, and how many of its answers were cut off."""
    counts = json.loads((folder / "eval.json").read_text(encoding="utf-8")).get("eval", {}).get(name)
    return remarks(f"{name}, {which}", counts) if counts else []


def differences(a: Path, b: Path, name: str, one: Answers, other: Answers) -> list[str]:
    """In what, beside the model, the two evaluations of a set differ."""
    try:
        first, second = how_asked(a, name), how_asked(b, name)
        out = [f"{field}: {value!r} in A, {second[field]!r} in B" for field, value in first.items() if value != second[field]]
    except ConfigError as e:
        out = [str(e)]
    i, j, odd = pair(one, other)
    if odd:
        out.append(f"{len(odd):,} ids, the first is {odd[0]!r}, are of other questions or keys in B; evaluate both on one file")
    alone = [len(s.ids) - len(pairs) - len(odd) for s, pairs in ((one, i), (other, j))]
    if any(alone):
        remedy = "evaluate both on one file, with a prompt.max_tokens that drops none"
        out.append(f"{alone[0]:,} questions were answered in A alone, {alone[1]:,} in B alone; {remedy}")
    if not all(s.hashes.all() for s in (one, other)) and not out:
        out.append("the answers have no hashes of their questions, as an older version wrote them; evaluate again")
    return out


def compare_sets(a: Answers, b: Answers) -> dict[str, Any]:
    """b against a on the questions that both answered."""
    i, j, _ = pair(a, b)
    if not len(i):
        raise ConfigError("the two evaluations share no question")
    one, other = a.correct[i], b.correct[j]
    difference, alike = stats.paired_difference(one, other), one.shape[1] == other.shape[1]
    single = alike and one.shape[1] == 1
    only_a, only_b, p = stats.mcnemar(one[:, 0], other[:, 0]) if single else (None, None, difference.p)
    return {
        "n": len(i),
        "a": stats.accuracy(one)._asdict(),
        "b": stats.accuracy(other)._asdict(),
        "difference": {"value": difference.value, "low": difference.low, "high": difference.high},
        "only_a": only_a,
        "only_b": only_b,
        "p": p,
        "detectable": difference.detectable,
        "boundary": stats.boundary(one, other) if alike else None,  # more samples solve more
    }


def compare(a: Path, b: Path, anyway: bool = False) -> dict[str, Any]:
    """Every set that both folders hold; p-values adjusted by Holm over them, of the distinct questions where a set holds exact repeats.

    Refused where the two were not asked the same in the same way; `anyway`: what was asked in both is compared nevertheless.
    """
    a, b = evaluation(a), evaluation(b)
    names = sorted({p.stem for p in a.glob("*.jsonl")} & {p.stem for p in b.glob("*.jsonl")})
    if not names:
        raise ConfigError(f"{a} and {b}: no set of answers in both; give two folders that `medrlvr eval` wrote")
    out = {}
    for name in names:
        one, other = (read(folder / f"{name}.jsonl") for folder in (a, b))
        if (odd := differences(a, b, name, one, other)) and not anyway:
            lines = "".join(f"\n  {line}" for line in odd)
            raise ConfigError(f"{name}: the two differ in more than the model; if that is meant, give --anyway:{lines}")
        try:
            out[name] = compare_sets(one, other) | {"each": {"a": describe(one), "b": describe(other)}, "differences": odd}
            out[name]["remarks"] = [line for which, folder in (("A", a), ("B", b)) for line in aside(folder, name, which)]
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
        edge = [str(c["boundary"][k]) if c["boundary"] else "–" for k in ("preserved", "gained", "lost", "never")]
        accuracies = [percent(c[k]) for k in ("a", "b", "difference")]
        adjusted = f"{c['p_holm']:.2g}" if "p_holm" in c else "–"
        rows.append([name, f"{c['n']:,}", *accuracies, f"{c['p']:.2g}", adjusted, *edge])
    notes = [
        f"{name}: {c['n']:,} questions show a difference of {100 * c['detectable']:.1f} points or more with 80 % power"
        for name, c in sets.items()
    ]
    notes += [f"{name}: not asked alike: {line}" for name, c in found.items() for line in c["differences"]]
    notes += [line for c in found.values() for line in c["remarks"]]
    columns = ("set", "n", "accuracy A", "accuracy B", "B − A", "p", "p (Holm)", "kept", "gained", "lost", "never")
    return "\n".join([tables.plain(columns, rows), *notes])
