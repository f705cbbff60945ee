"""What the cells of `medrlvr reproduce` came to: accuracies over seeds, each arm against answer-only SFT, and Med-RLVR's four claims.

Intervals resample the questions and the seeds (stats.crossed); p-values are of a sign-flip test over the questions, seeds as they are
(compare.py), adjusted by Holm over all arms and sets. The claims are sentences with the numbers in them: what is not told apart is
said to be so.
"""

import json
from typing import Any, NamedTuple

import numpy as np

from medrlvr_jax import answers, compare, files, report, stats
from medrlvr_jax.arms import Cell, Claims, Experiment
from medrlvr_jax.config import ConfigError
from medrlvr_jax.stages import HACKS, STAGES

SEEN = 0.10  # share of a step's completions from which on a stage counts as passed through


class Outcome(NamedTuple):
    """An arm on one set; its k finished seeds are the columns of `answers`."""

    seeds: list[int]
    answers: answers.Answers
    correct: np.ndarray  # float [n, k], the mean over the samples of a question
    rows: list[dict[str, Any]]  # of all seeds


def conclude(experiment: Experiment, finished: list[Cell], of: int) -> str:
    """Write table.json, table.md and curves.png into the experiment's folder; the text of table.md."""
    arms: dict[str, list[Cell]] = {}
    for cell in finished:
        arms.setdefault(cell.arm, []).append(cell)
    if not arms:
        return "no cell is finished: there is no table yet"
    found = {arm: {name: outcome(cells, name) for name in cells[0].config.eval.sets} for arm, cells in arms.items()}
    tests = against(found, experiment.claims.sft)
    said = claims(experiment, arms, found, tests)
    revisions = sorted({json.dumps(json.loads((c.path / "eval" / "eval.json").read_text("utf-8"))["versions"]["git"]) for c in finished})
    text = markdown(experiment.name, found, tests, said, f"{len(finished)} of {of} cells are finished.")
    if len(revisions) > 1:
        text += f"\nThe cells were evaluated by {len(revisions)} revisions of the program: table.json names them.\n"
    tree = {
        "name": experiment.name,
        "cells": {"finished": [c.path.name for c in finished], "of": of},
        "arms": {arm: {name: describe(o) for name, o in sets.items()} for arm, sets in found.items()},
        "against_sft": {arm: {name: t for (a, name), t in tests.items() if a == arm} for arm in found},
        "claims": said,
        "revisions": [json.loads(r) for r in revisions],
    }
    files.write_json(experiment.folder / "table.json", tree)
    files.write_text(experiment.folder / "table.md", text)
    trained = [cells[0].path for cells in arms.values() if cells[0].by == "train"]
    if trained:
        report.curves(trained, experiment.folder / "curves.png")
    return text


def outcome(cells: list[Cell], name: str) -> Outcome:
    """The answers of an arm's cells to one set, side by side."""
    paths = [cell.path / "eval" / f"{name}.jsonl" for cell in cells]
    each = [answers.read(path) for path in paths]
    if odd := [str(path) for path, a in zip(paths, each, strict=True) if not np.array_equal(a.ids, each[0].ids)]:
        raise ConfigError(f"{odd[0]}: other questions than in {paths[0]}; delete that cell's eval folder and run it again")
    by_sample = [field for field, column in each[0]._asdict().items() if column.ndim == 2]
    whole = each[0]._replace(**{field: np.concatenate([getattr(a, field) for a in each], axis=1) for field in by_sample})
    seeds = [cell.config.seed for cell in cells]
    return Outcome(seeds, whole, np.stack([a.correct.mean(1) for a in each], 1), [row for path in paths for row in files.read_jsonl(path)])


def describe(o: Outcome) -> dict[str, Any]:
    """For table.json."""
    return {
        "seeds": o.seeds,
        "n": len(o.correct),
        "accuracy": stats.crossed(o.correct)._asdict(),
        "by_seed": o.correct.mean(0).tolist(),
        "format_rate": share(o, "format_ok"),
        "response_length": share(o, "length"),
        "stages": {stage: float(np.mean([row["stage"] == stage for row in o.rows])) for stage in STAGES},
    }


def share(o: Outcome, field: str) -> float:
    return float(np.mean([row[field] for row in o.rows]))


def against(found: dict[str, dict[str, Outcome]], sft: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Every other arm minus SFT on every set, paired by question; {} where SFT is not finished."""
    out = {}
    for arm, sets in found.items():
        for name, o in sets.items():
            if arm != sft and name in found.get(sft, {}):
                base = found[sft][name]
                tested = compare.compare_sets(base.answers, o.answers)
                difference = (
                    stats.crossed(o.correct, base.correct)._asdict()
                    if np.array_equal(base.answers.ids, o.answers.ids)
                    else tested["difference"]
                )
                out[arm, name] = {"difference": difference, "p": tested["p"], "detectable": tested["detectable"]}
    for test, p in zip(out.values(), stats.holm([t["p"] for t in out.values()]), strict=True):
        test["p_holm"] = p
    return out


def markdown(name: str, found: dict[str, dict[str, Outcome]], tests: dict, said: list[str], state: str) -> str:
    """The table, a row an arm, and the claims under it."""
    sets = list(next(iter(found.values())))
    head = [
        "arm",
        "seeds",
        *(f"{s}: {what}" for s in sets for what in ("accuracy", "by seed", "− SFT", "p (Holm)")),
        "in the form",
        "hacks",
        "tokens",
    ]
    lines = [f"# {name}", "", state, "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for arm, outcomes in found.items():
        row = [arm, str(len(outcomes[sets[0]].seeds))]
        for s in sets:
            o, test = outcomes[s], tests.get((arm, s))
            row += [percent(stats.crossed(o.correct)._asdict()) + " %", ", ".join(f"{100 * x:.1f}" for x in o.correct.mean(0))]
            row += [percent(test["difference"], "+"), f"{test['p_holm']:.2g}"] if test else ["", ""]
        first = outcomes[sets[0]]
        row += [f"{100 * share(first, 'format_ok'):.1f} %", f"{hacks(first):.1f} %", f"{share(first, 'length'):.1f}"]
        lines.append(f"| {' | '.join(row)} |")
    note = "Accuracies: means over seeds, 95 % intervals over resampled questions and seeds. p: by question, Holm over all arms and sets."
    return "\n".join(
        [
            *lines,
            "",
            f"{note} Form, tokens, and hacks (answers handed over in\nthe thought, or reasoned before it: stages.py) are of {sets[0]}.",
            "",
            *said,
            "",
        ]
    )


def claims(experiment: Experiment, arms: dict[str, list[Cell]], found: dict[str, dict[str, Outcome]], tests: dict) -> list[str]:
    """A paragraph for each of the paper's four claims and each RL arm, as far as their arms are finished."""
    named, out = experiment.claims, []
    for arm in (a for a in named.rl if a in found):
        sets = list(found[arm])
        titles = [
            "1. RLVR matches SFT in distribution",
            *["2. It beats SFT out of distribution (by 8 points in the paper)"] * len(sets[1:]),
        ]
        for title, name in zip(titles, sets, strict=True):
            if test := tests.get((arm, name)):
                low, high = test["difference"]["low"], test["difference"]["high"]
                verdict = f"{arm} is higher" if low > 0 else f"{arm} is lower" if high < 0 else "the two are not told apart"
                out.append(f"{title}. {arm} − {named.sft} on {name}: {percent(test['difference'], '+')} points: {verdict}.")
        out.append(f"3. Reasoning without its supervision. {arm}: {reasoning(named, found, arm)}")
        out.append(f"4. Six stages. {arm}: {passed(arms[arm])}")
    return sorted(out)


def reasoning(named: Claims, found: dict[str, dict[str, Outcome]], arm: str) -> str:
    """How many answers show inference in their thought, before and after; what the thought is worth against RL that does without, and
    what RL adds to a base whose thought is begun for it."""
    shown = [f"{infers(o):.1f} % of answers on {s}" + before(named.base, found, s) for s, o in found[arm].items()]
    text = f"thoughts show inference in {', '.join(shown)}"
    for other in (named.no_think, named.base):
        if other in found:
            worth = {s: stats.crossed(o.correct, found[other][s].correct)._asdict() for s, o in found[arm].items()}
            text += f". Points above {other}: " + ", ".join(f"{percent(w, '+')} on {s}" for s, w in worth.items())
    return text + "."


def before(base: str | None, found: dict[str, dict[str, Outcome]], name: str) -> str:
    return f" ({infers(found[base][name]):.1f} % of {base}'s)" if base in found else ""


def hacks(o: Outcome) -> float:
    return 100 * float(np.mean([row["stage"] in HACKS for row in o.rows]))


def infers(o: Outcome) -> float:
    return 100 * float(np.mean([row["stage"] == "reintegrated_reasoning" for row in o.rows]))


def passed(cells: list[Cell]) -> str:
    """Which stages training's own completions were in, from the runs' logs: peaks of the mean over seeds."""
    logs = [[r for r in files.read_jsonl(cell.path / "metrics.jsonl") if f"stage/{STAGES[0]}" in r] for cell in cells]
    if not all(logs):
        return "its logs tell no stages."
    steps = min(map(len, logs))
    shares = {s: np.mean([[r[f"stage/{s}"] for r in records[:steps]] for records in logs], 0) for s in STAGES}
    seen = [f"{s} (at most {100 * v.max():.0f} %, step {v.argmax() + 1})" for s, v in shares.items() if v.max() >= SEEN]
    rest = [f"{s} ({100 * v.max():.1f} %)" for s, v in shares.items() if v.max() < SEEN]
    text = f"{len(seen)} of {len(STAGES)} reached {SEEN:.0%} of a step's completions: {', '.join(seen)}"
    return text + (f"; never so many: {', '.join(rest)}." if rest else ".")


def percent(x: dict[str, float], sign: str = "") -> str:
    value, low, high = (100 * x[k] for k in ("value", "low", "high"))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"
