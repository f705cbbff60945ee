"""What the cells of `medrlvr reproduce` came to: accuracies over seeds, each arm against answer-only SFT, and Med-RLVR's four claims.

Questions and seeds are both random: an interval, its p and the sentence about it are of one t statistic (`stats.contrast`), whose size
tests/size.py simulates. Every p is given with and without Holm's adjustment over all arms and sets. What is not told apart is said to
be so, and called a match only where two one-sided tests show that it differs by less than `claims.margin`. Exact repeats of a question
are left out.
"""

import json
from typing import Any, NamedTuple

import numpy as np

from medrlvr_jax.evaluation import answers, stats
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.report import pictures
from medrlvr_jax.rewards.stages import HACKS, STAGES
from medrlvr_jax.studies.arms import Cell, Claims, Experiment

SEEN = 0.10  # share of a step's completions from which on a stage counts as passed through


class Outcome(NamedTuple):
    """An arm on one set; its k finished seeds are the columns of `answers`."""

    seeds: list[int]
    answers: answers.Answers
    correct: np.ndarray  # float [n, k], the mean over the samples of a question
    rows: list[dict[str, Any]]  # of all seeds
    fixed: bool  # one model, asked as it is: it has no seeds


def conclude(experiment: Experiment, finished: list[Cell], of: int) -> str:
    """Write table.json, table.md and curves.png into the experiment's folder; the text of table.md."""
    arms: dict[str, list[Cell]] = {}
    for cell in finished:
        arms.setdefault(cell.arm, []).append(cell)
    if not arms:
        return "no cell is finished: there is no table yet"
    found = {arm: {name: outcome(cells, name) for name in cells[0].config.eval.sets} for arm, cells in arms.items()}
    tests = against(found, experiment.claims)
    said = claims(experiment, arms, found, tests)
    made = [json.loads((c.path / "eval" / "eval.json").read_text("utf-8")) for c in finished]
    revisions = sorted({json.dumps(m["versions"]["git"]) for m in made})
    counts = [(name, counts | {"truncated": 0}) for m in made for name, counts in m.get("eval", {}).items()]  # "tokens" tells of lengths
    dropped = list(dict.fromkeys(line for name, asked in counts for line in answers.remarks(name, asked)))
    text = markdown(experiment.name, found, tests, said, f"{len(finished)} of {of} cells are finished.")
    text += "".join(f"\n{line}.\n" for line in dropped)
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
        pictures.curves(trained, experiment.folder / "curves.png")
    return text


def outcome(cells: list[Cell], name: str) -> Outcome:
    """The answers of an arm's cells to one set, side by side."""
    paths = [cell.path / "eval" / f"{name}.jsonl" for cell in cells]
    each = [answers.read(path) for path in paths]
    for path, a in zip(paths, each, strict=True):
        if not (np.array_equal(a.ids, each[0].ids) and np.array_equal(a.hashes, each[0].hashes)):
            raise ConfigError(f"{path}: other questions than in {paths[0]}; delete that cell's eval folder and run it again")
    rows = [row for path in paths for row in files.read_jsonl(path) if "repeats" not in row]
    each = [a.only(~a.repeats) for a in each]
    by_sample = [field for field, column in each[0]._asdict().items() if column.ndim == 2]
    whole = each[0]._replace(**{field: np.concatenate([getattr(a, field) for a in each], axis=1) for field in by_sample})
    fixed = len(cells) == 1 and cells[0].by == "eval"
    return Outcome([cell.config.seed for cell in cells], whole, np.stack([a.correct.mean(1) for a in each], 1), rows, fixed)


def describe(o: Outcome) -> dict[str, Any]:
    """For table.json."""
    return {
        "seeds": o.seeds,
        "n": len(o.correct),
        "accuracy": stats.mean_share(o.correct)._asdict(),
        "by_seed": o.correct.mean(0).tolist(),
        "format_rate": share(o, "format_ok"),
        "response_length": share(o, "length"),
        "stages": {stage: float(np.mean([row["stage"] == stage for row in o.rows])) for stage in STAGES} if staged(o) else None,
    }


def share(o: Outcome, field: str) -> float:
    return float(np.mean([row[field] for row in o.rows]))


def staged(o: Outcome) -> bool:
    """Whether a thought was asked for, so that answers have stages."""
    return o.rows[0]["stage"] is not None


def less(o: Outcome, other: Outcome) -> tuple[int, stats.Contrast] | None:
    """On how many questions both answered, and there an arm's accuracy less the other's; None if there are none."""
    i, j, _ = answers.pair(o.answers, other.answers)
    return (len(i), stats.contrast(o.correct[i], other.correct[j], (o.fixed, other.fixed))) if len(i) else None


def against(found: dict[str, dict[str, Outcome]], named: Claims) -> dict[tuple[str, str], dict[str, Any]]:
    """Every other arm less SFT on every set that both have; {} where SFT is not finished. `p_margin` is of `Contrast.within`."""
    out = {}
    for arm, sets in found.items():
        for name, o in sets.items():
            sft = found.get(named.sft, {}).get(name)
            if arm != named.sft and sft and (both := less(o, sft)):
                n, c = both
                alone = o.correct.shape[1] == sft.correct.shape[1] == 1 and not (o.fixed and sft.fixed)
                out[arm, name] = {
                    "n": n,
                    "difference": {"value": c.value, "low": c.low, "high": c.high},
                    "p": c.p,
                    "p_margin": c.within(named.margin),
                    "standard_error": c.error,
                    "degrees_of_freedom": c.freedom,
                    "detectable": c.detectable,
                    "over": "questions" if alone else "questions and seeds",
                }
    for test, p in zip(out.values(), stats.holm([t["p"] for t in out.values()]), strict=True):
        test["p_holm"] = p
    return out


def markdown(name: str, found: dict[str, dict[str, Outcome]], tests: dict, said: list[str], state: str) -> str:
    """The table, a row an arm, and the claims under it."""
    sets = list(dict.fromkeys(s for outcomes in found.values() for s in outcomes))
    head = [
        "arm",
        "seeds",
        *(f"{s}: {what}" for s in sets for what in ("accuracy", "by seed", "− SFT", "p", "p (Holm)")),
        "in the form",
        "hacks",
        "tokens",
    ]
    rows = []
    for arm, outcomes in found.items():
        row = [arm, str(len(next(iter(outcomes.values())).seeds))]
        for s in sets:
            o, test = outcomes.get(s), tests.get((arm, s))
            shares = ", ".join(f"{100 * x:.1f}" for x in o.correct.mean(0)) if o else ""
            row += [percent(stats.mean_share(o.correct)._asdict()) + " %" if o else "", shares]
            row += [percent(test["difference"], "+"), f"{test['p']:.2g}", f"{test['p_holm']:.2g}"] if test else ["", "", ""]
        first = outcomes.get(sets[0])
        if first:
            hacked = f"{hacks(first):.1f} %" if staged(first) else "–"
            row += [f"{100 * share(first, 'format_ok'):.1f} %", hacked, f"{share(first, 'length'):.1f}"]
        else:
            row += ["", "", ""]
        rows.append(row)
    note = """Accuracies are means over seeds. Intervals (95 %) and p are over questions and seeds, both random, of an arm with one run over
questions; Holm's adjustment is over all arms and sets. Form, tokens, and hacks (answers handed over in the thought, or reasoned before
it: stages.py; –: no thought is asked for)"""
    few = [
        f"{arm} on {s}: compared on the {t['n']:,} of its {len(found[arm][s].correct):,} questions that SFT was asked too."
        for (arm, s), t in tests.items()
        if t["n"] < len(found[arm][s].correct)
    ]
    return "\n".join([f"# {name}", "", state, "", tables.markdown(head, rows), "", f"{note} are of {sets[0]}.", *few, "", *said, ""])


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
                ps = f"p {test['p']:.2g}, by Holm's adjustment {test['p_holm']:.2g}"
                what = f"{arm} − {named.sft} on {name}: {percent(test['difference'], '+')} points, {ps}"
                out.append(f"{title}. {what}: {verdict(arm, test, len(tests), named.margin)}.")
        out.append(f"3. Reasoning without its supervision. {arm}: {reasoning(named, found, arm)}")
        out.append(f"4. Six stages. {arm}: {passed(arms[arm])}")
    return sorted(out)


def verdict(arm: str, test: dict[str, Any], tests: int, margin: float) -> str:
    """What a test shows: a difference, the absence of one as large as the margin, both, or neither."""
    higher, points = "higher" if test["difference"]["value"] > 0 else "lower", f"{100 * margin:g} points"
    if test["p_holm"] < 0.05:
        text = f"{arm} is {higher}"
    elif test["p"] < 0.05:
        text = f"{arm} is {higher} if this were the only comparison, but not among the {tests} of the table"
    else:
        text = "the two are not told apart"
    if test["p_margin"] < 0.05:
        text += f", and match: a difference of {points} or more is ruled out (p {test['p_margin']:.2g})"
    elif test["p"] >= 0.05:
        text += f", nor shown to match: a difference of {points} is not ruled out (p {test['p_margin']:.2g})"
    return text + (" (one run each: of other seeds nothing is known)" if test["over"] == "questions" else "")


def reasoning(named: Claims, found: dict[str, dict[str, Outcome]], arm: str) -> str:
    """How many answers show inference in their thought, before and after; what the thought is worth against RL that does without, and
    what RL adds to a base whose thought is begun for it."""
    shown = [f"{infers(o):.1f} % of answers on {s}" + before(named.base, found, s) for s, o in found[arm].items() if staged(o)]
    text = f"thoughts show inference in {', '.join(shown)}" if shown else "no thought is asked for"
    for other in (named.no_think, named.base):
        sets = found.get(other or "", {})
        worth = {s: both[1]._asdict() for s, o in found[arm].items() if s in sets and (both := less(o, sets[s]))}
        if worth:
            text += f". Points above {other}: " + ", ".join(f"{percent(c, '+')} on {s}" for s, c in worth.items())
    return text + "."


def before(base: str | None, found: dict[str, dict[str, Outcome]], name: str) -> str:
    o = found.get(base or "", {}).get(name)
    return f" ({infers(o):.1f} % of {base}'s)" if o and staged(o) else ""


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
