"""The embedded radiographs: drawn chest films of 56 × 56 grey pixels, and questions on them.

    film → finding, side, zone                                            kinds finding, side, count, drain
    … → condition → the first choice                                      kind management
    … → the first choice failed on that side before → the other choice    kind barred

As in any radiograph, the patient's right is on the picture's left. `FINDINGS` is the table: a simplification
for a toy world, not clinical advice.

No text gives an answer away, by construction: questions come in blocks that share their text and their
options in one order, and each option is right for exactly one film of the block. So whatever is computed
from the text alone is right as often as chance.

The trained questions list the same options in the same order each time. Out of distribution, films are
negatives, noisier and have findings of other sizes, and questions have other words, and six to eight options
in any order. Each of these `CAUSES` also comes alone. `leaking` is train with the right option first: reward
can be had without looking. `blank` is train with grey films: nothing can be seen. `text` is train with a
report in words in place of each film.

films.py draws the films.
"""

from dataclasses import replace
from functools import partial
from itertools import cycle
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from medrlvr_jax.data.question import LETTERS, Example, Question
from medrlvr_jax.world.chance import generator, pick, shuffled
from medrlvr_jax.world.corpus import FOREIGN, worked
from medrlvr_jax.world.films import SIDE, Film, as_bmp, draw, pixels

CAUSES = ("negative", "noise", "size", "options", "wording")
SIZES = {"train": 2000} | dict.fromkeys(("in_distribution", "out_of_distribution", *CAUSES), 400)
KINDS = ("finding", "management", "barred", "side", "count", "drain")
SIDES, ZONES, NONE = ("left", "right"), ("upper", "lower"), "none"
CORPUS = 32_000  # examples to pre-train on
CAPTIONS = 0.1  # their share of captions
# How the others are answered: the base can look, and seldom does; see `corpus.STYLES`.
STYLES = {"plain": 0.20, "bare": 0.06, "tagged": 0.25, "guess": 0.45, "malformed": 0.04}
GUESS = "guess."


class Finding(NamedTuple):
    condition: str
    first: str  # the first choice
    other: str = ""  # the choice where that has failed; "": the finding has no side
    zoned: bool = False  # whether it is in the upper or the lower zone


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
LISTED = tuple(name for name in FINDINGS if name not in ("nodules", "cavity"))  # in the trained questions
DRAINED = ("effusion", "pneumothorax")
NODULES = {"nodule": "one", "nodules": "several"}
# The trained wordings, and last the one of another wording.
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


def film(rng: Random, finding: str, side: str = "") -> Film:
    """A film with the finding, on a side that is drawn if none is given."""
    about = FINDINGS[finding]
    return Film(finding, about.other and (side or pick(rng, SIDES)), pick(rng, ZONES) if about.zoned else "")


# ---- questions ----


def questions(split: str) -> list[Question]:
    """The questions of a split or cause, always the same; `rationale` the reasoning, `subject` the kind."""
    rng, out = generator(f"radiograph {split}"), []
    causes = CAUSES if split == "out_of_distribution" else (split,)
    for kind in cycle(KINDS):
        made = block(rng, kind, causes)
        if len(out) + len(made) > SIZES[split]:
            continue
        for q, of in made:
            name = f"radiograph-{split}-{len(out):04d}"
            out.append(replace(q, id=name, images=(draw(rng, of, causes),)))
        if len(out) == SIZES[split]:
            break
    return out


def leaking() -> list[Question]:
    """`train` with the right option first."""
    first = lambda q: (q.right_text, *(option for option in q.options if option != q.right_text))
    asked = (replace(q, options=first(q), answer=0) for q in questions("train"))
    return [replace(q, rationale=(q.rationale or "")[:-2] + "A.") for q in asked]


def blank() -> list[Question]:
    """`train` with a grey film each: the control of learning from the text alone."""
    grey = as_bmp(np.full((SIDE, SIDE), 0.47))
    return [replace(q, images=(grey,)) for q in questions("train")]


def text() -> list[Question]:
    """`train` with what each film shows in words, and no film: learning from text alone."""
    report = lambda q: (q.rationale or "").split(".")[0]
    return [replace(q, question=f"{report(q)}. {q.question}", images=()) for q in questions("train")]


def block(rng: Random, kind: str, causes: tuple[str, ...]) -> list[tuple[Question, Film]]:
    """Questions of one text, one for each option, and the film for which that option is right."""
    sex, age, side = pick(rng, ("man", "woman")), 20 + int(rng.random() * 60), pick(rng, SIDES)
    word = lambda texts: texts[-1] if "wording" in causes else pick(rng, texts[:-1])
    texts = [word(STEMS), *[word(FAILED)] * (kind == "barred"), word(ASKS.get(kind, ASKS["management"]))]
    text = " ".join(texts).format(sex=sex, age=age, side=side)
    n = pick(rng, (6, 7, 8)) if "options" in causes else None
    films, out = films_of(rng, kind, side, n), []
    options = tuple(shuffled(rng, list(films)) if n else films)
    for answer, right in enumerate(options):
        steps = reasons(films[right], kind, side)
        why = " ".join(f"{step}." for step in [*steps, f"{right} {LETTERS[answer]}"])
        facts = tuple((step.removeprefix("here ").removeprefix("suggests "),) for step in steps)
        out.append((Question("", text, options, answer, kind, why, facts=facts), films[right]))
    return out


def films_of(rng: Random, kind: str, failed: str, n: int | None) -> dict[str, Film]:
    """Option → a film for which it is right: of the options that are always listed, or of `n` where the kind
    has so many. `failed`: the side on which the first choice failed, of a `barred` question.
    """
    one = partial(film, rng)
    if kind == "side":
        return {side: one(pick(rng, SIDED), side) for side in SIDES}
    if kind == "drain":
        dry = [name for name in FINDINGS if name not in DRAINED]
        return {side: one(pick(rng, DRAINED), side) for side in SIDES} | {NONE: one(pick(rng, dry))}
    if kind == "count":
        others = [name for name in FINDINGS if name not in NODULES]
        return {NONE: one(pick(rng, others))} | {count: one(name) for name, count in NODULES.items()}
    if kind == "barred":
        (well,) = set(SIDES) - {failed}
        names = shuffled(rng, SIDED, n // 2) if n else SIDED[:4]
        return {FINDINGS[name].first: one(name, well) for name in names} | {
            FINDINGS[name].other: one(name, failed) for name in names
        }
    names = shuffled(rng, list(FINDINGS), n) if n else LISTED
    return {FINDINGS[name].first if kind == "management" else name: one(name) for name in names}


def reasons(of: Film, kind: str, failed: str) -> list[str]:
    """The steps of the reasoning before the answer, without their points."""
    about, steps = FINDINGS[of.finding], [f"here {of}"]
    if kind in ("management", "barred"):
        steps += [f"suggests {about.condition}", f"first {about.first}"]
    if kind == "barred":
        steps += [f"{of.side} failed", f"use {about.other}"] if of.side == failed else [f"{of.side} is new"]
    return steps


def corpus(share: float = CAPTIONS, seed: str = "corpus", n: int = CORPUS) -> list[Example]:
    """Captions, and questions answered in the `STYLES`, a quarter of them out of distribution."""
    rng, out = generator(f"radiograph {seed}"), []
    while len(out) < n:
        causes = CAUSES if rng.random() < FOREIGN else ()
        if rng.random() < share:
            shown = film(rng, pick(rng, list(FINDINGS)))
            out.append(Example("Report:\n", f"here {shown}.", (draw(rng, shown, causes),)))
        else:
            q, of = pick(rng, block(rng, pick(rng, KINDS), causes))
            out.append(worked(rng, replace(q, images=(draw(rng, of, causes),)), STYLES, [GUESS]))
    return out


def captions() -> list[Example]:
    """Captions alone, for the start of pre-training."""
    return corpus(1.0, "captions")


def show(file: str) -> None:
    """Draw each finding in a row as in train, and below with all causes."""
    rng, rows = generator("radiograph examples"), []
    for causes in ((), (), CAUSES):
        drawn = (draw(rng, film(rng, name), causes) for name in FINDINGS)
        rows.append(np.hstack([np.pad(pixels(bmp), 2, constant_values=255) for bmp in drawn]))
    Image.fromarray(np.vstack(rows)).resize((1800, 540), Image.Resampling.NEAREST).save(file)
