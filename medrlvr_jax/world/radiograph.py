"""The embedded radiographs: drawn chest films (films.py) and questions on them.

    film → finding, side, zone                                            kinds finding, side, count, drain
    … → condition → the first choice                                      kind management
    … → the first choice failed on that side before → the other choice    kind barred

As in real radiographs, the patient's right is on the left of the picture. `FINDINGS` is the table of
knowledge: a simplification for a toy world, not clinical advice.

No text contains its answer, by construction: questions come in blocks with the same text and the same options
in one order, and each option is right for exactly one film of the block. So an answer computed from the text
alone is right as often as chance.

The questions of train always list the same options in the same order. Out of distribution, films are
negative, noisier and have findings of other sizes, and questions have other words and six to eight options
in random order. Each of these `CAUSES` also has a set of its own. `leaking` is train with the right option
first, so that a policy can get the reward without the film. `blank` is train with uniformly grey films.
`text` is train with a report in words instead of each film.
"""

from dataclasses import replace
from functools import partial
from itertools import cycle
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from medrlvr_jax.data.question import LETTERS, Example, Question
from medrlvr_jax.world.chance import below, make_rng, pick, shuffled
from medrlvr_jax.world.corpus import FOREIGN, answered
from medrlvr_jax.world.films import SIDE, Film, as_bmp, draw, pixels

CAUSES = ("negative", "noise", "size", "options", "wording")
SIZES = {"train": 2000} | dict.fromkeys(("in_distribution", "out_of_distribution", *CAUSES), 400)
KINDS = ("finding", "management", "barred", "side", "count", "drain")
SIDES, ZONES, NONE = ("left", "right"), ("upper", "lower"), "none"
CORPUS = 32_000  # pre-training examples
CAPTIONS = 0.1  # the share of captions among them
# Styles of the other responses (see `corpus.STYLES`): the base model can read films, but mostly guesses.
STYLES = {"plain": 0.20, "bare": 0.06, "tagged": 0.25, "guess": 0.45, "malformed": 0.04}


class Finding(NamedTuple):
    condition: str
    first: str  # the first choice
    other: str = ""  # the choice if the first has failed; "" if the finding has no side
    zoned: bool = False  # whether it has a zone


FINDINGS = {
    "normal": Finding("health", "reassurance"),
    "consolidation": Finding("pneumonia", "amoxicillin", "bronchoscopy", True),
    "effusion": Finding("pleurisy", "thoracentesis", "pleurodesis"),
    "pneumothorax": Finding("collapse", "drainage", "thoracoscopy"),
    "nodule": Finding("tumour", "biopsy", "resection", True),
    "nodules": Finding("metastases", "staging", "chemotherapy"),
    "cavity": Finding("abscess", "clindamycin", "lobectomy", True),
    "cardiomegaly": Finding("failure", "furosemide"),
    "miliary": Finding("tuberculosis", "isoniazid"),
    "hyperinflation": Finding("emphysema", "tiotropium"),
}
SIDED = tuple(name for name, finding in FINDINGS.items() if finding.other)
LISTED = tuple(name for name in FINDINGS if name not in ("nodules", "cavity"))  # the options of train
DRAINED = ("effusion", "pneumothorax")
NODULES = {"nodule": "one", "nodules": "several"}
# The last wording of each is for the cause `wording`; the others are those of train.
STEMS = ("Film of a {sex} of {age}.", "A {sex} of {age} has this film.", "Seen on film: {sex}, {age} years.")
FAILED = (
    "The first choice failed on the {side} before.",
    "Before, the first choice failed on the {side}.",
    "Of note, no success of usual treatment, {side} lung.",
)
ASKS = {
    "finding": ("Which finding is it?", "What does it show?", "Name the pattern."),
    "side": ("Which side is it on?", "Where is it?", "Name the side."),
    "count": ("How many nodules?", "Count the nodules.", "Nodules seen here?"),
    "management": ("What is best next?", "Which step is best?", "What would you advise?"),
    "drain": ("Where would a tube go?", "Which side needs a tube?", "Tube, and where?"),
}


def make_film(rng: Random, finding: str, side: str = "") -> Film:
    """Return a film with the finding, on `side` or on a random side."""
    row = FINDINGS[finding]
    return Film(finding, row.other and (side or pick(rng, SIDES)), pick(rng, ZONES) if row.zoned else "")


# ---- questions ----


def questions(split: str) -> list[Question]:
    """Return the questions of a split or cause. `rationale` is the reasoning, `subject` the kind."""
    rng, out = make_rng(f"radiograph {split}"), []
    causes = CAUSES if split == "out_of_distribution" else (split,)
    for kind in cycle(KINDS):
        pairs = block(rng, kind, causes)
        if len(out) + len(pairs) > SIZES[split]:
            continue
        for q, film in pairs:
            name = f"radiograph-{split}-{len(out):04d}"
            out.append(replace(q, id=name, images=(draw(rng, film, causes),)))
        if len(out) == SIZES[split]:
            break
    return out


def leaking() -> list[Question]:
    """Return `train` with the right option first."""
    first = lambda q: (q.right_text, *(option for option in q.options if option != q.right_text))
    moved = (replace(q, options=first(q), answer=0) for q in questions("train"))
    return [replace(q, rationale=(q.rationale or "")[:-2] + "A.") for q in moved]


def blank() -> list[Question]:
    """Return `train` with uniformly grey films: a control that shows what can be learned without films."""
    grey = as_bmp(np.full((SIDE, SIDE), 0.47))
    return [replace(q, images=(grey,)) for q in questions("train")]


def text() -> list[Question]:
    """Return `train` with a report in words instead of each film."""
    report = lambda q: (q.rationale or "").split(".")[0]
    return [replace(q, question=f"{report(q)}. {q.question}", images=()) for q in questions("train")]


def block(rng: Random, kind: str, causes: tuple[str, ...]) -> list[tuple[Question, Film]]:
    """Return questions with the same text, one for each option, with the film that makes the option right."""
    sex, age, side = pick(rng, ("man", "woman")), 20 + below(rng, 60), pick(rng, SIDES)
    word = lambda texts: texts[-1] if "wording" in causes else pick(rng, texts[:-1])
    texts = [word(STEMS), *[word(FAILED)] * (kind == "barred"), word(ASKS.get(kind, ASKS["management"]))]
    text = " ".join(texts).format(sex=sex, age=age, side=side)
    n = pick(rng, (6, 7, 8)) if "options" in causes else None
    films, out = films_by_option(rng, kind, side, n), []
    options = tuple(shuffled(rng, list(films)) if n else films)
    for answer, right in enumerate(options):
        steps = reasons(films[right], kind, side)
        why = " ".join(f"{step}." for step in [*steps, f"{right} {LETTERS[answer]}"])
        facts = tuple((step.removeprefix("here ").removeprefix("suggests "),) for step in steps)
        out.append((Question("", text, options, answer, kind, why, facts=facts), films[right]))
    return out


def films_by_option(rng: Random, kind: str, failed: str, n: int | None) -> dict[str, Film]:
    """Return the options, each with a film for which it is right: those of train, or `n` random ones if the
    kind has that many. `failed`: in a `barred` question, the side on which the first choice failed.
    """
    make = partial(make_film, rng)
    if kind == "side":
        return {side: make(pick(rng, SIDED), side) for side in SIDES}
    if kind == "drain":
        dry = [name for name in FINDINGS if name not in DRAINED]
        return {side: make(pick(rng, DRAINED), side) for side in SIDES} | {NONE: make(pick(rng, dry))}
    if kind == "count":
        others = [name for name in FINDINGS if name not in NODULES]
        return {NONE: make(pick(rng, others))} | {count: make(name) for name, count in NODULES.items()}
    if kind == "barred":
        (other_side,) = set(SIDES) - {failed}
        names = shuffled(rng, SIDED, n // 2) if n else SIDED[:4]
        return {FINDINGS[name].first: make(name, other_side) for name in names} | {
            FINDINGS[name].other: make(name, failed) for name in names
        }
    names = shuffled(rng, list(FINDINGS), n) if n else LISTED
    return {FINDINGS[name].first if kind == "management" else name: make(name) for name in names}


def reasons(film: Film, kind: str, failed: str) -> list[str]:
    """Return the sentences of the reasoning before the answer, without full stops."""
    row, steps = FINDINGS[film.finding], [f"here {film}"]
    if kind in ("management", "barred"):
        steps += [f"suggests {row.condition}", f"first {row.first}"]
    if kind == "barred" and film.side == failed:
        steps += [f"{failed} failed", f"use {row.other}"]
    elif kind == "barred":
        steps += [f"{film.side} is new"]
    return steps


def corpus(share: float = CAPTIONS, seed: str = "corpus", n: int = CORPUS) -> list[Example]:
    """Return captions, and questions answered in the `STYLES`. A quarter of both is out of distribution."""
    rng, out = make_rng(f"radiograph {seed}"), []
    while len(out) < n:
        causes = CAUSES if rng.random() < FOREIGN else ()
        if rng.random() < share:
            film = make_film(rng, pick(rng, list(FINDINGS)))
            out.append(Example("Report:\n", f"here {film}.", (draw(rng, film, causes),)))
        else:
            q, film = pick(rng, block(rng, pick(rng, KINDS), causes))
            out.append(answered(rng, replace(q, images=(draw(rng, film, causes),)), STYLES, ["guess."]))
    return out


def captions() -> list[Example]:
    """Return only captions, for the start of pre-training."""
    return corpus(1.0, "captions")


def draw_examples(file: str) -> None:
    """Write a picture with two rows of all findings as in train, and one row with all causes."""
    rng, rows = make_rng("radiograph examples"), []
    for causes in ((), (), CAUSES):
        films = (draw(rng, make_film(rng, name), causes) for name in FINDINGS)
        rows.append(np.hstack([np.pad(pixels(bmp), 2, constant_values=255) for bmp in films]))
    Image.fromarray(np.vstack(rows)).resize((1800, 540), Image.Resampling.NEAREST).save(file)
