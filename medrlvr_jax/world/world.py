"""The embedded world's questions: vignettes that need two steps of reasoning over a table of textbook
medicine.

    findings → condition → first-line drug                             kind `drug`
    … → the patient's history rules it out → the alternative           kind `alternative`
    … → the class of the drug                                          kind `class`
    findings → condition → the usual drug that the history rules out   kind `avoid`

`embedded/knowledge.yaml` holds the table (knowledge.py reads it). A `Case` is a condition, a set of findings
and a history. Each case belongs to one of `train`, `in_distribution`, `out_of_distribution` and `corpus`, so
no two sets share a case, and neither does the pre-training text. In train most cases have typical findings.
Out of distribution has combinations of findings that occur nowhere else, harmless histories that train never
has with that condition, other wordings, other shares of the kinds, and up to ten options. So memorised cases
do not help there, and learned reasoning does.

`leaking` is train with half of its rationales replaced by the bare answer. A policy that is fine-tuned on it
skips the reasoning in half of its responses.

corpus.py makes the text on which the base model was pre-trained.

    python -m medrlvr_jax.world show [SET] [N]      print the first N (8) of a set (train), or of corpus
    python -m medrlvr_jax.world films FILE          draw examples of radiograph.py's films
    python -m medrlvr_jax.world tokenizer           rewrite the models' tokenizers (words.py)
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import NamedTuple

from medrlvr_jax.data.question import LETTERS, Question
from medrlvr_jax.world.chance import below, make_rng, pick, pick_weighted, shuffled
from medrlvr_jax.world.knowledge import Condition, finding_sets, histories, table, wrong_options

SIZES = {"train": 2000, "in_distribution": 400, "out_of_distribution": 400}
KINDS = {  # share of each kind of question
    "train": {"drug": 0.45, "alternative": 0.30, "class": 0.15, "avoid": 0.10},
    "out_of_distribution": {"drug": 0.20, "alternative": 0.40, "class": 0.25, "avoid": 0.15},
    "corpus": {"drug": 0.35, "alternative": 0.35, "class": 0.18, "avoid": 0.12},
}
STATUS = {  # for each kind, the shares of cases with no history, a harmless one, one that bars the first line
    "drug": {"none": 0.25, "clear": 0.75},
    "alternative": {"barred": 1.0},
    "class": {"none": 0.15, "clear": 0.40, "barred": 0.45},
    "avoid": {"barred": 1.0},
}
RARE = {"train": 0.15, "out_of_distribution": 1.0, "corpus": 0.35}  # share of cases with a rare finding
OPTIONS = {"train": (4, 5), "out_of_distribution": (6, 7, 8, 9, 10, 10)}  # numbers of options, equally likely

STEMS = {  # the sentence without the history, and the sentence on the history
    "train": (
        ("A {age}-year-old {sex} has {findings}.", " Note: {history}."),
        ("A {sex} of {age} presents with {findings}.", " Known {history}."),
        ("A {age}-year-old {sex} comes in with {findings}.", " Relevant now: {history}."),
    ),
    "out_of_distribution": (
        ("Seen today in clinic: {findings}, in a {sex} aged {age}.", " The chart mentions {history}."),
        ("Referral letter: {sex}, {age}, found to have {findings}.", " Also of note is {history}."),
        ("Workup of this {sex}, who is {age}, reveals {findings}.", " Background: {history}."),
    ),
}
ASKS = {
    "train": {
        "drug": ("What is the best drug?", "Which drug is best?"),
        "class": ("What is the best drug class?", "Which drug class is best?"),
        "avoid": ("Which usual drug is ruled out?", "What usual drug is to be avoided?"),
    },
    "out_of_distribution": {
        "drug": ("Which medicine suits this patient?", "What would you prescribe?"),
        "class": ("Which class of medicine suits this patient?", "From which class would you prescribe?"),
        "avoid": (
            "Which standard medicine is unsafe here?",
            "What would you normally prescribe, but not here?",
        ),
    },
}


class Case(NamedTuple):
    """A patient's condition, findings and history. No two splits share a case."""

    condition: str
    findings: tuple[str, ...]  # sorted
    history: str | None


class Vignette(NamedTuple):
    """A case in words."""

    stem: str  # the text before the last sentence, which asks
    question: Question  # `rationale` is the reasoning and ends in "… C."; `subject` is the kind


def questions(split: str) -> list[Question]:
    """Return the questions of a split. They are always the same."""
    return [replace(v.question, id=f"{split}-{i:04d}") for i, v in enumerate(vignettes(split))]


def vignettes(split: str) -> Iterator[Vignette]:
    """Yield the questions of a split with their stems."""
    rng = make_rng((split,))
    wording = "out_of_distribution" if split == "out_of_distribution" else "train"
    decks: dict[tuple, Iterator[Case]] = {}
    for _ in range(SIZES[split]):
        kind = pick_weighted(rng, KINDS[wording])
        status = pick_weighted(rng, STATUS[kind])
        rare = rng.random() < RARE[wording]
        deck = kind, status, rare
        if deck not in decks:
            cases = [case for case in pools()[split][status, rare] if kind != "class" or asks_class(case)]
            decks[deck] = _deal(rng, cases)
        yield vignette(rng, next(decks[deck]), kind, wording)


def leaking() -> list[Question]:
    """Return `train` with every second rationale replaced by the bare answer."""
    bare = lambda q: replace(q, rationale=f"the answer is {LETTERS[q.answer]}.")
    return [q if i % 2 else bare(q) for i, q in enumerate(questions("train"))]


def vignette(rng: Random, case: Case, kind: str, wording: str) -> Vignette:
    """Return a question of `kind` about the case, with the words and number of options of `wording`."""
    condition, drugs, history = table().conditions[case.condition], table().drugs, case.history or ""
    barred = history in condition.unless
    other = condition.unless[history] if barred else pick(rng, list(condition.unless.values()))
    drug = other if barred and kind != "avoid" else condition.first
    sex, age = _person(rng, condition, history)
    findings = shuffled(rng, case.findings)
    stem, history_stem = pick(rng, STEMS[wording])
    ask = pick(rng, ASKS[wording]["drug" if kind == "alternative" else kind])
    listed = ", ".join(findings[:-1]) + " and " + findings[-1]
    stem = stem.format(age=age, sex=sex, findings=listed)
    stem += history_stem.format(history=history) if history else ""

    # The lure is the result of one step too few or too many: always the first line if it is barred; often
    # the alternative if the first line is right and no clinician would start with the alternative.
    right, lure, defended = drug, other if drug == condition.first else condition.first, set(condition.also)
    others = wrong_options(condition.name, right, kind == "class")
    if kind == "class":
        right, lure = drugs[right].group, drugs[lure].group
        defended = {drugs[name].group for name in defended}
    lured = lure != right and (drug != condition.first or (lure not in defended and rng.random() < 0.6))
    n = pick(rng, OPTIONS[wording]) - 1
    wrong = [lure] * lured + shuffled(rng, others, n)
    options = tuple(shuffled(rng, [right, *wrong[:n]]))
    answer = options.index(right)

    steps = [f"first line {condition.first}"]
    if history:
        steps.append(f"{history} rules it out" if barred else f"{history} allows it")
    if barred and kind != "avoid":
        steps.append(f"use {drug}")
    if kind == "class":
        steps.append(f"class {right}")
    suggest = f"here {', '.join(findings)} suggest {condition.name}"
    why = " ".join(f"{step}." for step in (suggest, *steps, f"{right} {LETTERS[answer]}"))
    first_line = (steps[0], f"{condition.first} is the first line")  # both wordings of `corpus.facts`
    facts = ((condition.name,), first_line, *((step,) for step in steps[1:]))
    return Vignette(stem, Question("", f"{stem} {ask}", options, answer, kind, why, facts=facts))


@cache
def pools() -> dict[str, dict[tuple[str, bool], list[Case]]]:
    """Return the cases of each split, by the history's status and by whether a finding is rare.

    Sets of typical findings are in all splits except out_of_distribution. Of a condition's sets with a rare
    finding five are only in out_of_distribution, four are shared by the other splits, and the rest are only
    in the corpus. A third of its harmless histories, and its last contraindication if it has several, never
    occur with it in train and in_distribution.
    """
    out: dict[str, dict[tuple[str, bool], list[Case]]] = {
        split: {(s, r): [] for s in ("none", "clear", "barred") for r in (False, True)}
        for split in (*SIZES, "corpus")
    }
    for condition in table().conditions.values():
        rng = make_rng(("pools", condition.name))
        clear, barred = histories(condition)
        hidden = {*shuffled(rng, clear, len(clear) // 3), *barred[1:][-1:]}
        sets = finding_sets(condition)
        rare_sets = shuffled(rng, [s for s in sets if not set(s) <= set(condition.typical)])
        foreign, shared = rare_sets[:5], rare_sets[5:9]
        for findings in sets:
            rare = not set(findings) <= set(condition.typical)
            for history in (None, *clear, *barred):
                status = "none" if history is None else "clear" if history in clear else "barred"
                u = rng.random()
                if findings in foreign:
                    split = "out_of_distribution" if status != "clear" or history in hidden else None
                elif history in hidden or (rare and findings not in shared):
                    split = "corpus"
                else:
                    split = "train" if u < 0.4 else "in_distribution" if u < 0.55 else "corpus"
                if split:
                    out[split][status, rare].append(Case(condition.name, findings, history))
    return out


def asks_class(case: Case) -> bool:
    """Return whether the case can ask for the class: not if the alternative has the barred drug's class."""
    condition, drugs = table().conditions[case.condition], table().drugs
    other = condition.unless.get(case.history or "")
    return other is None or drugs[other].group != drugs[condition.first].group


def _person(rng: Random, condition: Condition, history: str) -> tuple[str, int]:
    sex, low, high = condition.who
    if history == "pregnancy":
        sex, low, high = "woman", max(low, 20), min(high, 40)
    if history == "breast cancer":
        sex, low = "woman", min(max(low, 35), high)
    if sex == "any":
        sex = "woman" if rng.random() < 0.5 else "man"
    return sex, low + below(rng, high - low + 1)


def by_condition(cases: Sequence[Case]) -> list[list[Case]]:
    return [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.condition)]


def _deal(rng: Random, cases: Sequence[Case]) -> Iterator[Case]:
    """Yield all cases again and again, in rounds with at most one case of each condition. So all conditions
    are about equally frequent.
    """
    while True:
        for taken in itertools.zip_longest(*(shuffled(rng, group) for group in by_condition(cases))):
            yield from shuffled(rng, [case for case in taken if case])
