"""The embedded world: a table of textbook medicine, vignettes that need two steps through it, a tiny model's
corpus.

    findings → condition → first-line drug                             kind `drug`
    … → the patient's history rules it out → the alternative           kind `alternative`
    … → the class of the drug                                          kind `class`
    … → which usual drug is it that the history rules out              kind `avoid`

`embedded/knowledge.yaml` is the table (knowledge.py reads it). A case is a `Key`: condition, set of findings,
history. Each key is in one of `train`, `in_distribution`, `out_of_distribution` and `corpus`, so no two sets
share a case, the text of pre-training included. In train most cases have typical findings. Out of
distribution has findings that are never together elsewhere, harmless histories never seen with that condition
in train, other wordings, other shares of the kinds, and up to ten options: memorised cases are worth nothing
there, learned reasoning is.

`leaking` is train with half of its rationales replaced by the bare answer: a policy fine-tuned on it hacks
half the time.

corpus.py is the text that the base model has read of it.

    python -m medrlvr_jax.world show [SET] [n]      print some of train, … or corpus
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
from medrlvr_jax.world.chance import below, generator, pick, shuffled, weighted
from medrlvr_jax.world.knowledge import Condition, finding_sets, histories, table, wrong_options

SIZES = {"train": 2000, "in_distribution": 400, "out_of_distribution": 400}
KINDS = {  # shares of the kinds of question
    "train": {"drug": 0.45, "alternative": 0.30, "class": 0.15, "avoid": 0.10},
    "out_of_distribution": {"drug": 0.20, "alternative": 0.40, "class": 0.25, "avoid": 0.15},
    "corpus": {"drug": 0.35, "alternative": 0.35, "class": 0.18, "avoid": 0.12},
}
STATUS = {  # what the history does, by kind: there is none, it changes nothing, it bars the first line
    "drug": {"none": 0.25, "clear": 0.75},
    "alternative": {"barred": 1.0},
    "class": {"none": 0.15, "clear": 0.40, "barred": 0.45},
    "avoid": {"barred": 1.0},
}
RARE = {"train": 0.15, "out_of_distribution": 1.0, "corpus": 0.35}  # share of cases with a rare finding
OPTIONS = {"train": (4, 5), "out_of_distribution": (6, 7, 8, 9, 10, 10)}  # how many options, drawn evenly

STEMS = {  # without a history, and with
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


class Key(NamedTuple):
    """A case: what must not be seen before it is asked."""

    condition: str
    findings: tuple[str, ...]  # sorted
    history: str | None


class Vignette(NamedTuple):
    """A case as it is asked."""

    stem: str  # the question without what is asked
    question: Question  # `rationale` is the reasoning, which ends in "… C."; `subject` the kind


def questions(split: str) -> list[Question]:
    """The questions of a split, always the same."""
    return [replace(v.question, id=f"{split}-{i:04d}") for i, v in enumerate(vignettes(split))]


def vignettes(split: str) -> Iterator[Vignette]:
    """The cases of a split, as they are asked."""
    rng = generator((split,))
    wording = "out_of_distribution" if split == "out_of_distribution" else "train"
    decks: dict[tuple, Iterator[Key]] = {}
    for _ in range(SIZES[split]):
        kind = weighted(rng, KINDS[wording])
        status = weighted(rng, STATUS[kind])
        rare = rng.random() < RARE[wording]
        case = kind, status, rare
        if case not in decks:  # each kind goes through its cases, and they come back only after all
            keys = [key for key in pools()[split][status, rare] if kind != "class" or has_class(key)]
            decks[case] = _dealt(rng, keys)
        yield vignette(rng, next(decks[case]), kind, wording)


def leaking() -> list[Question]:
    """`train`, where every second rationale states the answer in place of reasons."""
    bare = lambda q: replace(q, rationale=f"the answer is {LETTERS[q.answer]}.")
    return [q if i % 2 else bare(q) for i, q in enumerate(questions("train"))]


def vignette(rng: Random, key: Key, kind: str, wording: str) -> Vignette:
    """A question of `kind` about the case, in words and with as many options as `wording` has them."""
    condition, drugs, history = table().conditions[key.condition], table().drugs, key.history or ""
    barred = history in condition.unless
    other = condition.unless[history] if barred else pick(rng, list(condition.unless.values()))
    drug = other if barred and kind != "avoid" else condition.first
    sex, age = _person(rng, condition, history)
    findings = shuffled(rng, key.findings)
    stem, more = pick(rng, STEMS[wording])
    ask = pick(rng, ASKS[wording]["drug" if kind == "alternative" else kind])
    listed = ", ".join(findings[:-1]) + " and " + findings[-1]
    stem = stem.format(age=age, sex=sex, findings=listed)
    stem += more.format(history=history) if history else ""

    # The lure is the drug one step short: always the first line where it is barred; or, often, the
    # alternative where the first line is right, if no clinician would start with it.
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
    first_line = (steps[0], f"{condition.first} is the first line")  # as `facts` words it
    facts = ((condition.name,), first_line, *((step,) for step in steps[1:]))
    return Vignette(stem, Question("", f"{stem} {ask}", options, answer, kind, why, facts=facts))


@cache
def pools() -> dict[str, dict[tuple[str, bool], list[Key]]]:
    """The cases of each split, each in one, by what the history does and whether a finding is rare.

    Sets of findings: typical ones are in all splits but OOD; of those with a rare finding some are only in
    OOD, some are shared by train and its held-out set. Histories: a third of a condition's harmless ones, and
    the last of several contraindications, are never with it in train. The corpus has the rest.
    """
    out: dict[str, dict[tuple[str, bool], list[Key]]] = {
        split: {(s, r): [] for s in ("none", "clear", "barred") for r in (False, True)}
        for split in (*SIZES, "corpus")
    }
    for condition in table().conditions.values():
        rng = generator(("pools", condition.name))
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
                    out[split][status, rare].append(Key(condition.name, findings, history))
    return out


def has_class(key: Key) -> bool:
    """Whether the class can be asked for: not where the alternative has the class that is barred."""
    condition, drugs = table().conditions[key.condition], table().drugs
    other = condition.unless.get(key.history or "")
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


def by_condition(keys: Sequence[Key]) -> list[list[Key]]:
    return [list(group) for _, group in itertools.groupby(keys, key=lambda key: key.condition)]


def _dealt(rng: Random, keys: Sequence[Key]) -> Iterator[Key]:
    """The keys, endlessly, in rounds with one of each condition: none is asked about much more often."""
    while True:
        for taken in itertools.zip_longest(*(shuffled(rng, row) for row in by_condition(keys))):
            yield from shuffled(rng, [key for key in taken if key])
