"""Evaluations of the same questions, side by side: `medrlvr compare EVAL_A EVAL_B`, or several in a table.

Reads what `medrlvr eval` wrote (a JSONL of answers for each set, and eval.json); of a run, its newest
evaluation. Questions are paired by their id and must be the same by their hash. With several samples a
question is the unit, not the sample. Two evaluations that differ in more than the model are refused, unless
`--anyway` is given: then questions that are not the same are left out.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medrlvr_jax.config import load as configs
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import Answers, describe, pair, percent, read, remarks
from medrlvr_jax.evaluation.evaluate import evaluate_source
from medrlvr_jax.host import tables
from medrlvr_jax.host.errors import ConfigError

SAME = ("prompt.chat", "prompt.prefill", "reward.mode", "eval.samples", "eval.temperature")  # in both
SIGNIFICANT = 0.05  # the p value, adjusted over the sets, below which a difference is stated


def evaluation(folder: Path) -> Path:
    """The folder of an evaluation: the given one, or a run's newest. A run that has none is evaluated now."""
    if (folder / "eval.json").is_file():
        return folder
    if inside := sorted(folder.glob("*/eval.json"), key=lambda path: path.stat().st_mtime_ns):
        return inside[-1].parent
    if not (folder / "config.yaml").is_file():
        remedy = "give a run's folder, or one that `medrlvr eval` wrote to its end"
        raise ConfigError(f"{folder}: no eval.json there; {remedy}")
    print(f"{folder}: not evaluated yet, so that comes first", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        evaluate_source(folder, [], None, None)
    return evaluation(folder)


def how_asked(log: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """From eval.json, what must be the same for two evaluations of a set to differ by their model alone."""
    if "config" not in log:
        why = "does not say how it was made, as an older version wrote it"
        raise ConfigError(f"{folder}/eval.json {why}; evaluate again")
    config = configs.flat(log["config"])
    length = config["eval.max_new_tokens"] or config["sample.max_new_tokens"]
    asked = {field: config[field] for field in SAME}
    asked |= {"max_new_tokens": length, "prompt.template": log["template"]}
    return asked | {"shuffle_options": config[f"eval.sets.{name}.shuffle_options"]}


def differences(a: Path, b: Path, name: str, x: Answers, y: Answers) -> list[str]:
    """How the two evaluations of a set differ, beside the model."""
    try:
        first, second = (how_asked(read_log(folder), folder, name) for folder in (a, b))
        out = configs.differences(first, second, ("in A", "in B"))
    except ConfigError as e:
        out = [str(e)]
    i, j, odd = pair(x, y)
    if odd:
        what = f"{len(odd):,} ids, the first is {odd[0]!r}, are of other questions or keys in B"
        out.append(f"{what}; evaluate both on one file")
    only_a, only_b = len(x.ids) - len(i) - len(odd), len(y.ids) - len(j) - len(odd)
    if only_a or only_b:
        remedy = "evaluate both on one file, with a prompt.max_tokens that drops none"
        out.append(f"{only_a:,} questions were answered in A alone, {only_b:,} in B alone; {remedy}")
    if not out and not all(s.hashes.all() for s in (x, y)):
        out.append("the answers of an older version have no hashes of their questions; evaluate again")
    return out


def read_alike(folders: Sequence[Path], anyway: bool) -> dict[str, tuple[list[Answers], list[str]]]:
    """Each set that all evaluations hold: its answers by each, and the `differences` from the first one,
    which are refused unless `anyway`.
    """
    names = [{path.stem for path in folder.glob("*.jsonl")} for folder in folders]
    if not (shared := sorted(set.intersection(*names))):
        remedy = "give folders of `medrlvr eval` on the same sets"
        raise ConfigError(f"{', '.join(map(str, folders))}: no set of answers in all of them; {remedy}")
    out = {}
    for name in shared:
        out[name] = answers, every = [read(folder / f"{name}.jsonl") for folder in folders], []
        for folder, other in zip(folders[1:], answers[1:], strict=True):
            if (odd := differences(folders[0], folder, name, answers[0], other)) and not anyway:
                why = "differ in more than the model; if that is meant, give --anyway"
                lines = "".join(f"\n  {line}" for line in odd)
                raise ConfigError(f"{name}: {folders[0]} (A) and {folder} (B) {why}:{lines}")
            every += odd
    return out


def read_log(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval.json").read_text(encoding="utf-8"))


def compare_sets(a: Answers, b: Answers) -> dict[str, Any]:
    """b against a on the questions that both answered."""
    i, j, _ = pair(a, b)
    if not len(i):
        raise ConfigError("the two evaluations share no question")
    x, y = a.correct[i], b.correct[j]
    difference, alike = stats.paired_difference(x, y), x.shape[1] == y.shape[1]
    only_a, only_b, p = None, None, difference.p
    if x.shape[1] == y.shape[1] == 1:
        only_a, only_b, p = stats.mcnemar(x[:, 0], y[:, 0])
    return {
        "n": len(i),
        "a": stats.accuracy(x)._asdict(),
        "b": stats.accuracy(y)._asdict(),
        "difference": difference.interval._asdict(),
        "only_a": only_a,
        "only_b": only_b,
        "p": p,
        "minimum_detectable": difference.minimum_detectable,
        "boundary": stats.boundary(x, y) if alike else None,  # more samples solve more
    }


def compare(a: Path, b: Path, anyway: bool = False) -> dict[str, Any]:
    """Every set that both folders hold; p-values are adjusted by Holm over them.

    Where a set holds exact repeats, those of the distinct questions are adjusted. Raises ConfigError where
    the two were not asked the same in the same way; `anyway`: what was asked in both is compared
    nevertheless.
    """
    a, b = evaluation(a), evaluation(b)
    logs, out = {"A": read_log(a), "B": read_log(b)}, {}
    for name, ((x, y), odd) in read_alike([a, b], anyway).items():
        counts = {f"{name}, {which}": log.get("eval", {}).get(name) for which, log in logs.items()}
        notes = [line for which, c in counts.items() if c for line in remarks(which, c)]
        try:
            out[name] = compare_sets(x, y) | {"each": {"a": describe(x), "b": describe(y)}}
            out[name] |= {"differences": odd, "remarks": notes}
            if x.repeats.any():
                out[name]["distinct"] = compare_sets(x.only(~x.repeats), y)
        except ConfigError as e:
            raise ConfigError(f"{name}: {e}") from None
    tested = [c.get("distinct", c) for c in out.values()]
    for c, p in zip(tested, stats.holm([c["p"] for c in tested]), strict=True):
        c["p_holm"] = p
    return out


def show(comparison: dict[str, Any], names: Sequence[str] = ("A", "B")) -> str:
    """The comparison for a terminal: each set's numbers, the remarks, and at the end one sentence a set."""
    sets, lines, verdicts = {}, [], []
    for name, c in comparison.items():
        sets |= {name: c} | ({f"{name}, distinct": c["distinct"]} if "distinct" in c else {})
        verdicts.append(verdict(name, c.get("distinct", c), names))
    width = max(map(len, [*names, "difference"]))
    for name, c in sets.items():
        lines.append(f"{name}, {c['n']:,} questions (95 % intervals)")
        lines += [f"  {which:{width}}  {percent(c[k])}" for which, k in zip(names, "ab", strict=True)]
        adjusted = f", by Holm over the sets {c['p_holm']:.2g}" if "p_holm" in c else ""
        lines.append(f"  {'difference':{width}}  {percent(c['difference'])}, p = {c['p']:.2g}{adjusted}")
        if edge := c["boundary"]:
            lines.append("  solved: {preserved:,} by both, {gained:,} gained, {lost:,} lost".format(**edge))
        least = f"a difference of {100 * c['minimum_detectable']:.1f} points or more with 80 % power"
        lines += [f"  {c['n']:,} questions show {least}", ""]
    for name, c in comparison.items():
        lines += [f"{name}: not asked alike: {line}" for line in c["differences"]]
    lines += [line for c in comparison.values() for line in c["remarks"]]
    return "\n".join([*lines, *verdicts])


def verdict(name: str, c: dict[str, Any], names: Sequence[str]) -> str:
    """One set's comparison as a sentence. `c`: of `compare_sets`, with `p_holm`."""
    if c["p_holm"] >= SIGNIFICANT:
        return f"{name}: {names[1]} and {names[0]} do not differ significantly."
    better, worse = names[::-1] if c["difference"]["value"] > 0 else names
    points = 100 * abs(c["difference"]["value"])
    return f"{name}: {better} answers more questions right than {worse}, by {points:.1f} points."


def names_of(*folders: Path) -> tuple[str, ...]:
    """What to call evaluations: each by its run, or by its folder where it lies in none; by two folders where
    that does not tell them apart.
    """
    places = [folder.resolve() for folder in folders]
    names = [f.parent.name if (f.parent / "config.yaml").is_file() else f.name for f in places]
    return tuple(names if len(set(names)) == len(names) else ("/".join(f.parts[-2:]) for f in places))


# ---- several evaluations ----


def matrix(folders: Sequence[Path], anyway: bool = False) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy of each evaluation on each set that all hold, on each subject of a set that has several, and
    the gains over the first evaluation on the same questions.

    `{column: {name: {"n", "accuracy", "gain"}}}`, and the column `mean` with the means over sets or, where
    there is one set, over subjects. Raises `ConfigError` as `compare`. Intervals are not adjusted for their
    number.
    """
    folders = [evaluation(folder) for folder in folders]
    names = names_of(*folders)
    sets, columns = read_alike(folders, anyway), {}
    for name, (asked, _) in sets.items():
        columns[name] = _column(names, asked)
        subjects = sorted(set(asked[0].subjects.tolist()))
        for subject in subjects if len(subjects) > 1 else []:
            title = f"{name}: {subject or '(none)'}"
            columns[title] = _column(names, [each.only(each.subjects == subject) for each in asked])
    if averaged := list(sets) if len(sets) > 1 else list(columns)[1:]:
        columns["mean"] = {
            n: {
                key: float(np.mean([columns[title][n][key]["value"] for title in averaged]))
                for key in ("accuracy", "gain")
            }
            for n in names
        }
    return columns


def _column(names: Sequence[str], asked: Sequence[Answers]) -> dict[str, dict[str, Any]]:
    return {name: _gain(asked[0], each) for name, each in zip(names, asked, strict=True)}


def _gain(first: Answers, answered: Answers) -> dict[str, Any]:
    i, j, _ = pair(first, answered)
    gain = stats.paired_difference(first.correct[i], answered.correct[j]).interval._asdict()
    return {"n": len(answered.ids), "accuracy": stats.accuracy(answered.correct)._asdict(), "gain": gain}


def show_matrix(columns: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Two tables: accuracies with 95 % intervals, and gains over the first row."""
    names = list(next(iter(columns.values())))
    counts = [f"{column[names[0]]['n']:,}" if "n" in column[names[0]] else "" for column in columns.values()]
    rows = [["questions", *counts]]
    rows += [[name, *(percent(column[name]["accuracy"]) for column in columns.values())] for name in names]
    gains = [[name, *(percent(column[name]["gain"]) for column in columns.values())] for name in names[1:]]
    head = f"gain over {names[0]}"
    return f"{tables.plain(('accuracy', *columns), rows)}\n\n{tables.plain((head, *columns), gains)}"
