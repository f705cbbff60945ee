"""Comparison of evaluations on the same questions: `medrlvr compare EVAL_A EVAL_B`, or several in a table.

It reads what `medrlvr eval` wrote: eval.json and a JSONL of answers for each set. Questions are paired by id,
and must have the same hash. With several samples, the unit is the question, not the sample. Evaluations that
differ in more than the model are refused; `--anyway` compares the questions that all have in common.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medrlvr_jax.config import load as configs
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import (
    Answers,
    describe,
    newest_evaluation,
    pair,
    percent,
    read,
    remarks,
    with_distinct,
)
from medrlvr_jax.evaluation.evaluate import evaluate_source
from medrlvr_jax.host import tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import read_json, short_names

# settings that must be the same in both evaluations
SAME = ("prompt.chat", "prompt.prefill", "reward.mode", "eval.samples", "eval.temperature")
SIGNIFICANT = 0.05  # the p value, adjusted over the sets, below which a difference is reported


def evaluation(folder: Path) -> Path:
    """Return the folder itself if it is an evaluation, or a run's newest; evaluate a run that has none."""
    if newest := newest_evaluation(folder):
        return newest
    if not (folder / "config.yaml").is_file():
        remedy = "give a run's folder, or the folder of a finished `medrlvr eval`"
        raise ConfigError(f"{folder}: no eval.json there; {remedy}")
    print(f"{folder}: not evaluated yet, so that comes first", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        evaluate_source(folder, [], None, None)
    return evaluation(folder)


def comparable_settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the settings that must be equal if two evaluations of a set shall differ by the model alone."""
    tree = read_json(folder / "eval.json")
    if "config" not in tree:
        why = "does not say how it was made, as an older version wrote it"
        raise ConfigError(f"{folder}/eval.json {why}; evaluate again")
    config = configs.flat(tree["config"])
    length = config["eval.max_new_tokens"] or config["sample.max_new_tokens"]
    settings = {field: config[field] for field in SAME}
    settings |= {"max_new_tokens": length, "prompt.template": tree["template"]}
    return settings | {"shuffle_options": config[f"eval.sets.{name}.shuffle_options"]}


def differences(a: Path, b: Path, name: str, x: Answers, y: Answers) -> list[str]:
    """Return how two evaluations of a set differ, apart from the model; x and y are their answers."""
    first, second = comparable_settings(a, name), comparable_settings(b, name)
    out = configs.differences(first, second, ("in A", "in B"))
    i, j, others = pair(x, y)
    if others:
        ids = f"{len(others):,} ids, the first is {others[0]!r}, are of other questions or keys in B"
        out.append(f"{ids}; evaluate both on one file")
    only_a, only_b = len(x.ids) - len(i) - len(others), len(y.ids) - len(j) - len(others)
    if only_a or only_b:
        remedy = "evaluate both on one file, with a prompt.max_tokens that drops none"
        out.append(f"{only_a:,} questions were answered in A alone, {only_b:,} in B alone; {remedy}")
    return out


def read_sets(folders: Sequence[Path], anyway: bool) -> dict[str, tuple[list[Answers], list[str]]]:
    """Return the sets that all evaluations hold: the answers of each, and the `differences` to the first.

    Raises `ConfigError` if there is no such set, or, unless `anyway`, if there are differences.
    """
    names = [{path.stem for path in folder.glob("*.jsonl")} for folder in folders]
    if not (shared := sorted(set.intersection(*names))):
        remedy = "give folders of `medrlvr eval` on the same sets"
        raise ConfigError(f"{', '.join(map(str, folders))}: no set of answers in all of them; {remedy}")
    out = {}
    for name in shared:
        out[name] = answers, changes = [read(folder / f"{name}.jsonl") for folder in folders], []
        for folder, other in zip(folders[1:], answers[1:], strict=True):
            lines = differences(folders[0], folder, name, answers[0], other)
            if lines and not anyway:
                why = "differ in more than the model; if that is meant, give --anyway"
                head = f"{name}: {folders[0]} (A) and {folder} (B) {why}:"
                raise ConfigError("\n  ".join([head, *lines]))
            changes += lines
    return out


def compare_sets(name: str, a: Answers, b: Answers) -> dict[str, Any]:
    """Compare b with a on the questions of a set that both answered. Raises `ConfigError` without any."""
    i, j, _ = pair(a, b)
    if not len(i):
        raise ConfigError(f"{name}: the two evaluations share no question")
    x, y = a.correct[i], b.correct[j]
    difference, as_many = stats.paired_difference(x, y), x.shape[1] == y.shape[1]
    only_a, only_b, p = None, None, difference.p
    if x.shape[1] == y.shape[1] == 1:
        only_a, only_b, p = stats.mcnemar(x[:, 0], y[:, 0])
    return {
        "n": len(i),
        "a": stats.accuracy(x),
        "b": stats.accuracy(y),
        "difference": difference.interval,
        "only_a": only_a,
        "only_b": only_b,
        "p": p,
        "minimum_detectable": difference.minimum_detectable,
        "boundary": stats.boundary(x, y) if as_many else None,  # more samples solve more questions
    }


def compare(a: Path, b: Path, anyway: bool = False) -> dict[str, Any]:
    """Compare the evaluations in two folders on every set that both hold.

    p values are adjusted by Holm's method over the sets, on the distinct questions of a set with exact
    repeats. `anyway`: compare what both were asked, although more than the model differs. Otherwise that
    raises `ConfigError`.
    """
    logs, out = {"A": read_json(a / "eval.json"), "B": read_json(b / "eval.json")}, {}
    for name, ((x, y), changes) in read_sets([a, b], anyway).items():
        notes = [
            line for which, log in logs.items() for line in remarks(f"{name}, {which}", log["eval"][name])
        ]
        out[name] = compare_sets(name, x, y) | {"each": {"a": describe(x), "b": describe(y)}}
        out[name] |= {"differences": changes, "remarks": notes}
        if x.repeats.any():
            out[name]["distinct"] = compare_sets(name, x.select(~x.repeats), y)
    tested = [c.get("distinct", c) for c in out.values()]
    for c, p in zip(tested, stats.holm([c["p"] for c in tested]), strict=True):
        c["p_holm"] = p
    return out


def show(comparison: dict[str, Any], names: Sequence[str] = ("A", "B")) -> str:
    """Return the comparison as text: the figures of each set, remarks, and a sentence for each set."""
    lines, width = [], max(map(len, [*names, "difference"]))
    for name, c in with_distinct(comparison).items():
        lines.append(f"{name}, {c['n']:,} questions (95 % intervals)")
        lines += [f"  {which:{width}}  {percent(c[k])}" for which, k in zip(names, "ab", strict=True)]
        adjusted = f", by Holm over the sets {c['p_holm']:.2g}" if "p_holm" in c else ""
        lines.append(f"  {'difference':{width}}  {percent(c['difference'])}, p = {c['p']:.2g}{adjusted}")
        if solved := c["boundary"]:
            lines.append("  solved: {preserved:,} by both, {gained:,} gained, {lost:,} lost".format(**solved))
        detectable = f"a difference of {100 * c['minimum_detectable']:.1f} points or more with 80 % power"
        lines += [f"  {c['n']:,} questions show {detectable}", ""]
    for name, c in comparison.items():
        lines += [f"{name}: not only the model differs: {line}" for line in c["differences"]]
    lines += [line for c in comparison.values() for line in c["remarks"]]
    lines += [verdict(name, c.get("distinct", c), names) for name, c in comparison.items()]
    return "\n".join(lines)


def verdict(name: str, c: dict[str, Any], names: Sequence[str]) -> str:
    """Return one set's comparison as a sentence. `c` is the result of `compare_sets`, with `p_holm`."""
    if c["p_holm"] >= SIGNIFICANT:
        return f"{name}: {names[1]} and {names[0]} do not differ significantly."
    value = c["difference"].value
    better, worse = names[::-1] if value > 0 else names
    return f"{name}: {better} answers more questions right than {worse}, by {100 * abs(value):.1f} points."


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return short, distinct names: those of the runs, or of the folders if a run has several evaluations."""
    places = [folder.resolve() for folder in folders]
    runs = [place.parent if (place.parent / "config.yaml").is_file() else place for place in places]
    return short_names(runs) if len(set(runs)) == len(set(places)) else short_names(places, 2)


# ---- several evaluations ----


def matrix(folders: Sequence[Path], anyway: bool = False) -> dict[str, dict[str, dict[str, Any]]]:
    """Return each evaluation's accuracy on each set that all hold, and on each subject of a set with several,
    and its gains over the first evaluation on the same questions.

    `{column: {name: {"n", "accuracy", "gain"}}}`. The column `mean` has the means over sets or, of a single
    set, over its subjects. Intervals are not adjusted for their number. Raises `ConfigError` as `compare`
    does.
    """
    names, sets, columns = names_of(folders), read_sets(folders, anyway), {}
    for name, (answers, _) in sets.items():
        parts = {name: answers}
        subjects = sorted(set(answers[0].subjects.tolist()))
        for subject in subjects if len(subjects) > 1 else []:
            title = f"{name}: {subject or '(none)'}"
            parts[title] = [a.select(a.subjects == subject) for a in answers]
        for title, part in parts.items():
            pairs = {n: compare_sets(title, part[0], a) for n, a in zip(names, part, strict=True)}
            columns[title] = {
                n: {"n": c["n"], "accuracy": c["b"], "gain": c["difference"]} for n, c in pairs.items()
            }
    if averaged := list(sets) if len(sets) > 1 else list(columns)[1:]:
        mean = lambda n, key: float(np.mean([columns[title][n][key].value for title in averaged]))
        columns["mean"] = {n: {key: mean(n, key) for key in ("accuracy", "gain")} for n in names}
    return columns


def show_matrix(columns: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return two tables: accuracies, and gains over the evaluation of the first row."""
    names = list(next(iter(columns.values())))
    counts = [f"{column[names[0]]['n']:,}" if "n" in column[names[0]] else "" for column in columns.values()]
    cells = lambda name, key: [name, *(percent(column[name][key]) for column in columns.values())]
    accuracies = [["questions", *counts], *(cells(name, "accuracy") for name in names)]
    gains = [cells(name, "gain") for name in names[1:]]
    head = f"gain over {names[0]}"
    return f"{tables.plain(('accuracy', *columns), accuracies)}\n\n{tables.plain((head, *columns), gains)}"
