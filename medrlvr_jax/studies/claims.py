"""The results of `medrlvr reproduce`: accuracies, tests against SFT, and Med-RLVR's four claims.

Questions and seeds are both random. An interval, its p value and the sentence about it come from the same t
statistic (`stats.contrast`), whose false positives tests/size.py simulates. Every p value is given with and
without Holm's adjustment over all arms and sets. Two arms match only if two one-sided tests show that they
differ by less than `claims.margin`; without a significant difference alone they do not match. Exact repeats
of a question are left out.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Float64

from medrlvr_jax.evaluation import answers, look, stats
from medrlvr_jax.evaluation.answers import percent
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.report import pictures
from medrlvr_jax.rewards.stages import HACKS, STAGES
from medrlvr_jax.studies.arms import Cell, Claims, Experiment

REASONS = "reintegrated_reasoning"
REACHED = 0.10  # a stage is reached if this share of a step's completions is in it
CLAIMS = (
    "1. RLVR matches SFT in distribution",
    "2. It beats SFT out of distribution (by 8 points in the paper)",
    "3. Reasoning emerges without supervision",
    "4. Six stages",
)
NOTE = """Accuracies are means over seeds. Intervals (95 %) and p are over questions and seeds, both random;
for an arm with one run, over questions. Holm's adjustment is over all arms and sets. A hack states the answer
in place of reasoning, or reasons before the thought (stages.py; –: no thought is asked for). Format, hacks
and tokens are from the set"""


@dataclass(frozen=True)
class Outcome:
    """The results of an arm on one set of n questions, with its k finished seeds."""

    seeds: list[int]
    answers: answers.Answers  # of the first seed; all seeds have the same questions
    correct: Float64[np.ndarray, "n k"]  # mean over the samples of a question
    rows: list[dict[str, Any]]  # of all seeds, as `medrlvr eval` wrote them
    fixed: bool  # whether the arm is a model that is not trained, so that seeds do not change it

    def mean(self, field: str) -> float:
        return float(np.mean([row[field] for row in self.rows]))

    def in_stages(self, *stages: str) -> float:
        """Return the share of the answers that are in one of these stages."""
        return float(np.mean([row["stage"] in stages for row in self.rows]))

    @cached_property
    def looks(self) -> stats.Contrast | None:
        """By how much the right images raise the accuracy (`look.looks`); None for a set without images."""
        rows = [row.get("unseen", {}) for row in self.rows if row["sample"] == 0]
        shares = [[row.get(condition, np.nan) for row in rows] for condition in ("blank", "shuffled")]
        unseen = [np.array(column).reshape(len(self.seeds), -1).T for column in shares]
        return look.looks(self.correct, unseen, self.fixed)

    @property
    def has_stages(self) -> bool:
        """Whether the arm was asked for a thought; otherwise its answers have no stages."""
        return self.rows[0]["stage"] is not None


Outcomes = dict[str, dict[str, Outcome]]  # {arm: {set: …}}
Tests = dict[tuple[str, str], dict[str, Any]]  # {(arm, set): …}


def conclude(experiment: Experiment, finished: list[Cell], total: int) -> str:
    """Write table.json, table.md and curves.png into the experiment's folder. Returns the text of table.md.

    `total` is the number of all cells. Raises `ConfigError` if the seeds of an arm answered other questions.
    """
    arms: dict[str, list[Cell]] = {}
    for cell in finished:
        if cell.by != "difficulty":
            arms.setdefault(cell.arm, []).append(cell)
    if not arms:
        return "no cell is finished: there is no table yet"
    outcomes = {
        arm: {name: outcome(cells, name) for name in cells[0].config.eval.sets} for arm, cells in arms.items()
    }
    tests = against_sft(outcomes, experiment.claims)
    sentences = claims(experiment.claims, arms, outcomes, tests)
    evaluated = [cell.path / "eval" / "eval.json" for cells in arms.values() for cell in cells]
    logs = [json.loads(path.read_text("utf-8")) for path in evaluated]
    revisions = sorted({json.dumps(log["versions"]["git"]) for log in logs})
    counts = [(name, c | {"truncated": 0}) for log in logs for name, c in log.get("eval", {}).items()]
    notes = [line for name, c in counts for line in answers.remarks(name, c)]  # dropped questions alone
    if len(revisions) > 1:
        notes.append(f"{len(revisions)} revisions of the code evaluated the cells: table.json names them")
    state = f"{len(finished)} of {total} cells are finished."
    parts = [f"# {experiment.name}", state, table(outcomes, tests), "\n".join(sentences)]
    text = "\n\n".join([*parts, *(f"{line}." for line in dict.fromkeys(notes))]) + "\n"
    tree = {
        "name": experiment.name,
        "cells": {"finished": [cell.path.name for cell in finished], "of": total},
        "arms": {arm: {name: describe(o) for name, o in sets.items()} for arm, sets in outcomes.items()},
        "against_sft": {arm: {name: t for (a, name), t in tests.items() if a == arm} for arm in outcomes},
        "claims": sentences,
        "revisions": [json.loads(r) for r in revisions],
    }
    files.write_json(experiment.folder / "table.json", tree)
    files.write_text(experiment.folder / "table.md", text)
    if trained := [cells[0].path for cells in arms.values() if cells[0].by == "train"]:
        pictures.curves(trained, experiment.folder / "curves.png")
    return text


def outcome(cells: list[Cell], name: str) -> Outcome:
    """Read the answers of an arm's cells to one set."""
    paths = [cell.path / "eval" / f"{name}.jsonl" for cell in cells]
    rows = [files.read_jsonl(path) for path in paths]
    seeds = [answers.from_rows(r, str(path)) for r, path in zip(rows, paths, strict=True)]
    for path, a in zip(paths, seeds, strict=True):
        if not (np.array_equal(a.ids, seeds[0].ids) and np.array_equal(a.hashes, seeds[0].hashes)):
            remedy = "delete that cell's eval folder and run it again"
            raise ConfigError(f"{path}: other questions than in {paths[0]}; {remedy}")
    seeds = [a.select(~a.repeats) for a in seeds]
    return Outcome(
        seeds=[cell.config.seed for cell in cells],
        answers=seeds[0],
        correct=np.stack([a.correct.mean(1) for a in seeds], 1),
        rows=[row for row in chain.from_iterable(rows) if "repeats" not in row],
        fixed=len(cells) == 1 and cells[0].by == "eval",
    )


def describe(o: Outcome) -> dict[str, Any]:
    """Return the figures of an outcome for table.json."""
    return {
        "seeds": o.seeds,
        "n": len(o.correct),
        "accuracy": stats.mean_share(o.correct),
        "by_seed": o.correct.mean(0).tolist(),
        "format_rate": o.mean("format_ok"),
        "response_length": o.mean("length"),
        "looks": o.looks and o.looks.interval,
        "stages": {stage: o.in_stages(stage) for stage in STAGES} if o.has_stages else None,
    }


# --- tests ---


def difference(o: Outcome, other: Outcome) -> tuple[int, stats.Contrast] | None:
    """Return how many questions both answered, and o's accuracy minus the other's; None if there are none."""
    i, j, _ = answers.pair(o.answers, other.answers)
    if not len(i):
        return None
    return len(i), stats.contrast(o.correct[i], other.correct[j], (o.fixed, other.fixed))


def against_sft(outcomes: Outcomes, named: Claims) -> Tests:
    """Test the difference of every other arm to SFT on every set that both have; {} if SFT is unfinished."""
    tests: Tests = {}
    for arm, sets in outcomes.items():
        for name, o in sets.items():
            sft = outcomes.get(named.sft, {}).get(name)
            if arm == named.sft or not sft or not (both := difference(o, sft)):
                continue
            n, c = both
            single = o.correct.shape[1] == sft.correct.shape[1] == 1 and not (o.fixed and sft.fixed)
            tests[arm, name] = {
                "n": n,
                "difference": c.interval,
                "p": c.p,
                "p_margin": c.within(named.margin),
                "over": "questions" if single else "questions and seeds",
            }
    for test, p in zip(tests.values(), stats.holm([t["p"] for t in tests.values()]), strict=True):
        test["p_holm"] = p
    return tests


# --- table.md ---


def table(outcomes: Outcomes, tests: Tests) -> str:
    """Return a table with a row for each arm, and a note on its columns."""
    sets = list(dict.fromkeys(name for of_arm in outcomes.values() for name in of_arm))
    seen = {name for of_arm in outcomes.values() for name, o in of_arm.items() if o.looks}
    titles = lambda name: ("accuracy", "by seed", "− SFT", "p", "p (Holm)", *["looks"] * (name in seen))
    columns = [f"{name}: {title}" for name in sets for title in titles(name)]
    head = ["arm", "seeds", *columns, "in the format", "hacks", "tokens"]
    rows = []
    for arm, of_arm in outcomes.items():
        row = [arm, str(len(next(iter(of_arm.values())).seeds))]
        for name in sets:
            o, test = of_arm.get(name), tests.get((arm, name))
            by_seed = ", ".join(f"{100 * x:.1f}" for x in o.correct.mean(0)) if o else ""
            row += [percent(stats.mean_share(o.correct)) if o else "", by_seed]
            ps = [f"{test[p]:.2g}" for p in ("p", "p_holm")] if test else ["", ""]
            row += [points(test["difference"]) if test else "", *ps]
            row += [points(o.looks.interval) if o and o.looks else ""] * (name in seen)
        if o := of_arm.get(sets[0]):
            hacks = percent(o.in_stages(*HACKS)) if o.has_stages else "–"
            row += [percent(o.mean("format_ok")), hacks, f"{o.mean('length'):.1f}"]
        rows.append(row + [""] * (len(head) - len(row)))
    fewer = []
    for (arm, name), t in tests.items():
        if t["n"] < (n := len(outcomes[arm][name].correct)):
            shared = f"{t['n']:,} of its {n:,} questions that SFT answered, too"
            fewer.append(f"{arm} on {name}: compared on the {shared}.")
    return "\n".join([tables.markdown(head, rows), "", f"{NOTE} {sets[0]}.", *fewer])


def points(x: stats.Interval | stats.Contrast) -> str:
    """Return a difference with its interval, in percentage points."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * end for end in x[:3]))


# --- the four claims ---


def claims(named: Claims, arms: dict[str, list[Cell]], outcomes: Outcomes, tests: Tests) -> list[str]:
    """Return a sentence for each of `CLAIMS` and each RL arm that is finished."""
    out = []
    for arm in (a for a in named.rl if a in outcomes):
        for i, name in enumerate(outcomes[arm]):
            if test := tests.get((arm, name)):
                ps = f"p {test['p']:.2g}, with Holm's adjustment {test['p_holm']:.2g}"
                figures = f"{arm} − {named.sft} on {name}: {points(test['difference'])} points, {ps}"
                out.append(f"{CLAIMS[min(i, 1)]}. {figures}: {verdict(arm, test, len(tests), named.margin)}.")
        out.append(f"{CLAIMS[2]}. {arm}: {reasoning(named, outcomes, arm)}")
        out.append(f"{CLAIMS[3]}. {arm}: {stages_reached(arms[arm])}")
    return sorted(out)


def verdict(arm: str, test: dict[str, Any], tests: int, margin: float) -> str:
    """Return what a test shows: a difference, none as large as the margin, both, or neither."""
    higher = "higher" if test["difference"].value > 0 else "lower"
    limit, p_margin = f"a difference of {100 * margin:g} points", f"p {test['p_margin']:.2g}"
    text = "no significant difference"
    if test["p_holm"] < 0.05:
        text = f"{arm} is {higher}"
    elif test["p"] < 0.05:
        text = f"{arm} is {higher} if this is the only test, but not among the {tests} of the table"
    if test["p_margin"] < 0.05:
        text += f"; the two match: {limit} or more is ruled out ({p_margin})"
    elif test["p"] >= 0.05:
        text += f", and no match shown: {limit} is not ruled out ({p_margin})"
    return text + (" (one run each: other seeds may differ)" if test["over"] == "questions" else "")


def reasoning(named: Claims, outcomes: Outcomes, arm: str) -> str:
    """Return which share of answers infers in the thought, before and after training, and by how much the arm
    is better than RL without a thought and than the base model.
    """
    base, shares = outcomes.get(named.base or "", {}), []
    for name, o in outcomes[arm].items():
        if o.has_stages:
            before = base[name].in_stages(REASONS) if name in base and base[name].has_stages else None
            of_base = "" if before is None else f" ({percent(before)} of {named.base}'s)"
            shares.append(f"{percent(o.in_stages(REASONS))} of answers on {name}{of_base}")
    text = f"thoughts show inference in {', '.join(shares)}" if shares else "no thought is asked for"
    for other in (named.no_think, named.base):
        sets = outcomes.get(other or "", {})
        both = {name: difference(o, sets[name]) for name, o in outcomes[arm].items() if name in sets}
        if above := [f"{points(pair[1])} on {name}" for name, pair in both.items() if pair]:
            text += f". Points above {other}: {', '.join(above)}"
    return text + "."


def stages_reached(cells: list[Cell]) -> str:
    """Return which stages the completions of training reached, by the peaks of the mean over seeds."""
    logs = [files.read_jsonl(cell.path / "metrics.jsonl") for cell in cells]
    logs = [[r for r in records if f"stage/{STAGES[0]}" in r] for records in logs]
    if not all(logs):
        return "its logs have no stages."
    steps, reached, rest = min(map(len, logs)), [], []
    for stage in STAGES:
        shares = np.mean([[r[f"stage/{stage}"] for r in records[:steps]] for records in logs], 0)
        if (peak := shares.max()) >= REACHED:
            reached.append(f"{stage} (at most {100 * peak:.0f} %, step {shares.argmax() + 1})")
        else:
            rest.append(f"{stage} ({percent(peak)})")
    text = f"{len(reached)} of {len(STAGES)} reached {100 * REACHED:.0f} % of a step's completions"
    return f"{text}: {', '.join(reached)}" + (f"; less than that: {', '.join(rest)}." if rest else ".")
