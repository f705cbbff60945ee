"""Does a model look at its images? The same questions with a blank image, with another question's and with
none, and what the options' texts give away by themselves.

A model that answers from the text scores as high without the image. On OmniMedVQA, the options' texts alone,
counted on the training questions, reach 83 to 100 % of the test questions of each modality: an accuracy there
says nothing of looking. `looks` is the accuracy with the right image less the larger of those with a blank
image and with another question's.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from medrlvr_jax.data.images import read_image
from medrlvr_jax.data.prompts import IMAGE
from medrlvr_jax.data.question import Question, image_digest, question_hash
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import percent
from medrlvr_jax.host import tables

GREY = (122, 116, 104)  # the mean of the images that the towers were made for: 0 once normalised


def conditions(questions: list[Question]) -> dict[str, list[Question]]:
    """The questions that have images, under each condition."""
    seeing = [question for question in questions if question.images]
    return {
        "blank": [replace(q, images=tuple(map(_blank, q.images))) for q in seeing],
        "shuffled": _shuffled(seeing),
        "none": [replace(q, question=q.question.replace(IMAGE, " "), images=()) for q in seeing],
    }


def _blank(image: str | bytes) -> bytes:
    """A grey image of the same size."""
    out = BytesIO()
    Image.new("RGB", read_image(image).size, GREY).save(out, "PNG")
    return out.getvalue()


def _shuffled(questions: list[Question]) -> list[Question]:
    """Each question with the images of another one of its subject that has as many. Left out where all
    questions of the kind have the same images.
    """
    kinds: dict[tuple, dict[tuple[str, ...], tuple]] = defaultdict(dict)
    kind_of = lambda q: (q.subject, len(q.images))
    digests = [tuple(map(image_digest, question.images)) for question in questions]
    for question, digest in sorted(zip(questions, digests, strict=True), key=lambda x: x[1]):
        kinds[kind_of(question)][digest] = question.images
    after = {}
    for kind, sets in kinds.items():
        first, *others = sets
        after[kind] = dict(zip(sets, [*others, first], strict=True))
    return [
        replace(q, images=kinds[kind_of(q)][after[kind_of(q)][digest]])
        for q, digest in zip(questions, digests, strict=True)
        if len(kinds[kind_of(q)]) > 1
    ]


def prior(questions: list[Question]) -> Float[np.ndarray, " n"]:
    """For each question with one right option, the chance to name it by how often its options' texts are
    right in the other half of the set; halves are by the questions' hashes, ties are drawn.
    """
    chosen = [q for q in questions if q.options and q.value is None]
    halves = [int(question_hash(q), 16) % 2 for q in chosen]
    offered, right = (Counter(), Counter()), (Counter(), Counter())
    for question, half in zip(chosen, halves, strict=True):
        offered[half].update(question.options)
        right[half][question.options[question.answer]] += 1
    out = []
    for question, half in zip(chosen, halves, strict=True):
        seen, rate = offered[1 - half], 1 / len(question.options)
        shares = [right[1 - half][text] / seen[text] if seen[text] else rate for text in question.options]
        best = np.isclose(shares, max(shares))
        out.append(best[question.answer] / best.sum())
    return np.array(out)


def describe(
    questions: list[Question], rows: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Accuracies under each condition and `looks`, with 95 % intervals. `rows` are the answers with the right
    images, `found` those under `conditions`.
    """
    seeing = [question for question in questions if question.images]
    usual, out = _by_question(rows), {}
    out["image"] = stats.accuracy(np.array([usual[question.id] for question in seeing]))._asdict()
    differences = []
    for name, answers in found.items():
        if not answers:
            continue
        other = _by_question(answers)
        both = [np.array([x[i] for i in other]) for x in (other, usual)]
        out[name] = stats.accuracy(both[0])._asdict()
        if name != "none":
            differences.append((both[0].mean(), stats.paired_difference(*both)))
    if len(guesses := prior(seeing)):
        out["option_texts"] = stats.mean_share(guesses)._asdict()
    if differences:
        _, looks = max(differences, key=lambda pair: pair[0])
        out["looks"] = {"value": looks.value, "low": looks.low, "high": looks.high}
    return out


def _by_question(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Share of right answers by the question's id."""
    answers = defaultdict(list)
    for row in rows:
        answers[row["id"]].append(row["correct"])
    return {name: float(np.mean(correct)) for name, correct in answers.items()}


def show(found: dict[str, dict[str, Any]]) -> str:
    """What `describe` found of each set, as a table."""
    columns = ("image", "blank", "shuffled", "none", "option_texts", "looks")
    rows = [[name, *(percent(d[c]) if c in d else "–" for c in columns)] for name, d in found.items()]
    titles = ("right image", "blank", "another's", "none", "option texts alone", "looks")
    return tables.plain(("accuracy with", *titles), rows)
