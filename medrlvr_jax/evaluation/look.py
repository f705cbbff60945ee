"""Does a model use the images? Accuracy with the right image, without it, and from the options' texts alone.

A model that answers from the text is as accurate without the image. On OmniMedVQA the options' texts alone,
counted on one half of Med-R1's test questions, answer 94 to 100 % of each modality's other half: an accuracy
there does not show that a model looks. `looks` is the accuracy with the right image minus the larger of the
accuracies with a blank image and with another question's image.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from medrlvr_jax.data.images import GREY, read_image
from medrlvr_jax.data.prompts import IMAGE
from medrlvr_jax.data.question import Question, image_digest, question_hash
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import percent
from medrlvr_jax.host import tables

GROUPS = {"subjects": "subject", "tasks": "task"}  # the figures are also given for each value of these fields
Shares = dict[str, float]  # by question id, the share of right answers


def conditions(questions: list[Question]) -> dict[str, list[Question]]:
    """Return the questions that have images under three conditions.

    `blank`: with grey images; `shuffled`: with another question's images (`_shuffled`); `none`: without.
    """
    seeing = [question for question in questions if question.images]
    with ThreadPoolExecutor() as pool:
        blank = list(pool.map(lambda q: tuple(_grey(read_image(x).size) for x in q.images), seeing))
    return {
        "blank": [replace(q, images=images) for q, images in zip(seeing, blank, strict=True)],
        "shuffled": _shuffled(seeing),
        "none": [replace(q, question=q.question.replace(IMAGE, " "), images=()) for q in seeing],
    }


@lru_cache(maxsize=4096)
def _grey(size: tuple[int, int]) -> bytes:
    out = BytesIO()
    Image.new("RGB", size, GREY).save(out, "PNG")
    return out.getvalue()


def _shuffled(questions: list[Question]) -> list[Question]:
    """Return each question with the images of another one of the same subject, task and number of images.

    Questions are left out if all questions of their subject, task and number have the same images.
    """
    keys = [((q.subject, q.task, len(q.images)), tuple(map(image_digest, q.images))) for q in questions]
    by_kind: dict[tuple, dict[tuple[str, ...], tuple]] = defaultdict(dict)
    for (kind, digests), question in sorted(zip(keys, questions, strict=True), key=lambda pair: pair[0][1]):
        by_kind[kind][digests] = question.images
    others = {}
    for kind, images in by_kind.items():
        if len(images) > 1:
            first, *rest = images.values()
            others |= {(kind, digests): x for digests, x in zip(images, [*rest, first], strict=True)}
    pairs = zip(questions, keys, strict=True)
    return [replace(question, images=others[key]) for question, key in pairs if key in others]


def prior(questions: list[Question]) -> Shares:
    """Return the probability to answer each question right when one knows only the options' texts.

    The guess is the option whose text is most often right in the other half of the set; ties are drawn. The
    halves are by the questions' hashes. Questions without exactly one right option are left out.
    """
    chosen = [q for q in questions if q.options and q.value is None]
    halves = [int(question_hash(q), 16) % 2 for q in chosen]
    offered, right = (Counter(), Counter()), (Counter(), Counter())
    for question, half in zip(chosen, halves, strict=True):
        offered[half].update(question.options)
        right[half][question.options[question.answer]] += 1
    out = {}
    for question, half in zip(chosen, halves, strict=True):
        times, chance = offered[1 - half], 1 / len(question.options)
        rates = [right[1 - half][text] / times[text] if times[text] else chance for text in question.options]
        best = np.isclose(rates, max(rates))
        out[question.id] = float(best[question.answer] / best.sum())
    return out


def by_question(rows: Iterable[dict[str, Any]]) -> Shares:
    answers = defaultdict(list)
    for row in rows:
        answers[row["id"]].append(row["correct"])
    return {name: float(np.mean(correct)) for name, correct in answers.items()}


def add_unseen(rows: list[dict[str, Any]], unseen: dict[str, Shares]) -> list[dict[str, Any]]:
    """Return the rows with a field `unseen`, which has the question's share under each of `conditions`."""
    of = lambda name: {condition: shares[name] for condition, shares in unseen.items() if name in shares}
    return [row | {"unseen": of(row["id"])} for row in rows]


def describe(questions: list[Question], image: Shares, unseen: dict[str, Shares]) -> dict[str, Any]:
    """Return the accuracy under each condition and `looks`, with intervals, of the questions with images.

    With several subjects or tasks, also the figures of each, and the means over them. `image` are the shares
    with the right images, `unseen` those under each of `conditions`.
    """
    seeing = [question for question in questions if question.images]
    by_id = {"image": image, **unseen, "option_texts": prior(seeing)}
    # [n] each; NaN for a question that was not asked under the condition
    shares = {name: np.array([of.get(q.id, np.nan) for q in seeing]) for name, of in by_id.items()}
    chance = np.array([1 / q.choice_count if q.choice_count else 0.0 for q in seeing])
    out = _figures(shares, chance)
    for name, field in GROUPS.items():
        groups = np.array([getattr(question, field) for question in seeing])
        members = {group: groups == group for group in np.unique(groups).tolist()}
        if len(members) > 1:
            out[name] = {
                group: _figures({c: values[use] for c, values in shares.items()}, chance[use])
                for group, use in members.items()
            }
            out[f"mean_over_{name}"] = {
                c: stats.balanced(values[asked], groups[asked])
                for c, values in shares.items()
                if (asked := ~np.isnan(values)).any()
            }
    return out


def _figures(shares: dict[str, Float[np.ndarray, " n"]], chance: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """Return n, the accuracy under each condition, chance and `looks` of n questions."""
    out: dict[str, Any] = {"n": len(chance)}
    for condition, values in shares.items():
        if len(asked := values[~np.isnan(values)]):
            out[condition] = stats.mean_share(asked)
    out["chance"] = float(chance.mean())
    unseen = [shares[condition][:, None] for condition in ("blank", "shuffled")]
    if gain := looks(shares["image"][:, None], unseen):
        out["looks"] = gain.interval
    return out


def looks(
    correct: Float[np.ndarray, "n k"], unseen: Iterable[Float[np.ndarray, "n k"]], fixed: bool = True
) -> stats.Contrast | None:
    """Return by how much k runs are more accurate with the right images than without, or None.

    `unseen` are the shares of right answers under several conditions, NaN for a question that was not asked.
    The smallest difference counts. `fixed`: see `stats.contrast`. The result is None without such answers.
    """
    gains = [correct - shares for shares in unseen]
    gains = [gain[~np.isnan(gain).any(1)] for gain in gains]
    contrasts = [stats.contrast(gain, np.zeros(len(gain)), (fixed, True)) for gain in gains if len(gain)]
    return min(contrasts, key=lambda contrast: contrast.value, default=None)


def warnings(described: dict[str, dict[str, Any]]) -> list[str]:
    """Return a warning for each set whose accuracy is not significantly higher with the right images."""
    out = []
    for name, figures in described.items():
        gain = figures.get("looks")
        if gain and gain.low <= 0:
            problem = f"{name}: the answers do not depend on the images: looks is {percent(gain)}"
            texts = "whose texts do not give the answers away (compare `option texts alone` with chance)"
            out.append(f"{problem}; train on questions {texts}, or set data.shuffle_options=true")
    return out


def show(described: dict[str, dict[str, Any]]) -> str:
    """Return the figures of `describe` as a table: for each set all questions, each subject and each task."""
    columns = ("image", "blank", "shuffled", "none", "option_texts", "chance", "looks")
    titles = ("right image", "blank", "another's", "none", "option texts alone", "chance", "looks")
    rows = []
    for name, d in described.items():
        lines = {name: d}
        for group in GROUPS:
            lines |= {f"  {kind or '(none)'}": figures for kind, figures in d.get(group, {}).items()}
            lines |= {f"  mean over {group}": d[f"mean_over_{group}"]} if group in d else {}
        for line, figures in lines.items():
            n = f"{figures['n']:,}" if "n" in figures else ""
            rows.append([line, n, *(percent(figures[c]) if c in figures else "–" for c in columns)])
    return tables.plain(("accuracy with", "questions", *titles), rows)
