"""Does a model look at its images? The same questions with a blank image, with another question's and with
none, and what the options' texts give away by themselves.

A model that answers from the text scores as high without the image. On OmniMedVQA, the options' texts alone,
counted on one half of Med-R1's test questions, reach 94 to 100 % of each modality's other half: an accuracy
there says nothing of looking. `looks` is the accuracy with the right image less the larger of those with a
blank image and with another question's.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from medrlvr_jax.data.images import GREY, read_image
from medrlvr_jax.data.prompts import IMAGE
from medrlvr_jax.data.question import Question, image_digest, question_hash
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import percent
from medrlvr_jax.host import tables


def conditions(questions: list[Question]) -> dict[str, list[Question]]:
    """The questions that have images, under each condition."""
    seeing = [question for question in questions if question.images]
    with ThreadPoolExecutor() as pool:
        blank = list(pool.map(lambda question: tuple(map(_blank, question.images)), seeing))
    return {
        "blank": [replace(q, images=images) for q, images in zip(seeing, blank, strict=True)],
        "shuffled": _shuffled(seeing),
        "none": [replace(q, question=q.question.replace(IMAGE, " "), images=()) for q in seeing],
    }


def _blank(image: str | bytes) -> bytes:
    """A grey image of the same size."""
    return _grey(read_image(image).size)


@lru_cache(maxsize=4096)
def _grey(size: tuple[int, int]) -> bytes:
    out = BytesIO()
    Image.new("RGB", size, GREY).save(out, "PNG")
    return out.getvalue()


def _shuffled(questions: list[Question]) -> list[Question]:
    """Each question with the images of another one of its subject and task that has as many. Left out where
    all questions of the kind have the same images.
    """
    kinds: dict[tuple, dict[tuple[str, ...], tuple]] = defaultdict(dict)
    kind_of = lambda q: (q.subject, q.task, len(q.images))
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


def prior(questions: list[Question]) -> dict[str, float]:
    """By id of each question with one right option, the chance to name it by how often its options' texts are
    right in the other half of the set; halves are by the questions' hashes, ties are drawn.
    """
    chosen = [q for q in questions if q.options and q.value is None]
    halves = [int(question_hash(q), 16) % 2 for q in chosen]
    offered, right = (Counter(), Counter()), (Counter(), Counter())
    for question, half in zip(chosen, halves, strict=True):
        offered[half].update(question.options)
        right[half][question.options[question.answer]] += 1
    out = {}
    for question, half in zip(chosen, halves, strict=True):
        seen, rate = offered[1 - half], 1 / len(question.options)
        rates = [right[1 - half][text] / seen[text] if seen[text] else rate for text in question.options]
        best = np.isclose(rates, max(rates))
        out[question.id] = float(best[question.answer] / best.sum())
    return out


def beside(rows: list[dict[str, Any]], answered: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The answers with the right images, each with the share of right ones to its question under each of the
    `conditions`, as `unseen`. `answered` are the answers under these.
    """
    shares = {name: _by_question(answers) for name, answers in answered.items()}
    unseen = lambda name: {condition: of[name] for condition, of in shares.items() if name in of}
    return [row | {"unseen": unseen(row["id"])} for row in rows]


GROUPS = {"subjects": "subject", "tasks": "task"}  # by which the figures are given beside all questions'


def describe(questions: list[Question], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies under each condition and `looks`, with 95 % intervals, of the questions with images; the
    same by subject and by task, and their means over these groups. `rows` are as `beside` gives them.
    """
    seeing = [question for question in questions if question.images]
    shares = {"image": _by_question(rows)}
    for row in rows:
        for condition, share in row["unseen"].items():
            shares.setdefault(condition, {})[row["id"]] = share
    shares["option_texts"] = prior(seeing)
    out = _figures(seeing, shares)
    for name, field in GROUPS.items():
        groups: dict[str, list[Question]] = defaultdict(list)
        for question in seeing:
            groups[getattr(question, field)].append(question)
        if len(groups) > 1:
            out[name] = {group: _figures(groups[group], shares) for group in sorted(groups)}
            out[f"mean_over_{name}"] = _means(seeing, shares, field)
    return out


def _asked(questions: list[Question], answered: Mapping[str, float]) -> list[Question]:
    return [question for question in questions if question.id in answered]


def _figures(questions: list[Question], shares: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Of some questions: n, what each condition reaches, chance, `looks`. `shares`: right answers by id."""
    out: dict[str, Any] = {"n": len(questions)}
    differences = []
    for name, answered in shares.items():
        if not (asked := _asked(questions, answered)):
            continue
        values = np.array([answered[question.id] for question in asked])
        guessed = name == "option_texts"
        out[name] = (stats.mean_share if guessed else stats.accuracy)(values)._asdict()
        if name in ("blank", "shuffled"):
            usual = np.array([shares["image"][question.id] for question in asked])
            differences.append((values.mean(), stats.paired_difference(values, usual)))
    out["chance"] = float(np.mean([1 / q.choice_count if q.choice_count else 0.0 for q in questions]))
    if differences:
        _, looks = max(differences, key=lambda pair: pair[0])
        out["looks"] = looks.interval._asdict()
    return out


def _means(
    questions: list[Question], shares: Mapping[str, Mapping[str, float]], field: str
) -> dict[str, dict[str, float]]:
    """What each condition reaches as the mean over groups, which count alike however large they are."""
    out = {}
    for name, answered in shares.items():
        if asked := _asked(questions, answered):
            values = np.array([answered[question.id] for question in asked])
            groups = np.array([getattr(question, field) for question in asked])
            out[name] = stats.balanced(values, groups)._asdict()
    return out


def _by_question(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Share of right answers by the question's id."""
    answers = defaultdict(list)
    for row in rows:
        answers[row["id"]].append(row["correct"])
    return {name: float(np.mean(correct)) for name, correct in answers.items()}


def warnings(found: dict[str, dict[str, Any]]) -> list[str]:
    """What to say of each set whose answers are not better with the right images than without them."""
    out = []
    for name, figures in found.items():
        looks = figures.get("looks")
        if looks and looks["low"] <= 0:
            blind = f"{name}: the answers do not depend on the images: looks is {percent(looks)}"
            remedy = (
                "a reward that rose rose by the texts alone. Train on questions whose texts do not give the "
                "answers away (option texts alone against chance; data.shuffle_options=true against an order)"
            )
            out.append(f"{blind}; {remedy}")
    return out


def show(found: dict[str, dict[str, Any]]) -> str:
    """What `describe` found of each set, as a table: all questions, then each subject and each task."""
    columns = ("image", "blank", "shuffled", "none", "option_texts", "chance", "looks")
    titles = ("right image", "blank", "another's", "none", "option texts alone", "chance", "looks")
    rows = []
    for name, d in found.items():
        lines = {name: d}
        for group in GROUPS:
            lines |= {f"  {kind or '(none)'}": figures for kind, figures in d.get(group, {}).items()}
            lines |= {f"  mean over {group}": d[f"mean_over_{group}"]} if group in d else {}
        for line, figures in lines.items():
            n = f"{figures['n']:,}" if "n" in figures else ""
            rows.append([line, n, *(percent(figures[c]) if c in figures else "–" for c in columns)])
    return tables.plain(("accuracy with", "questions", *titles), rows)
