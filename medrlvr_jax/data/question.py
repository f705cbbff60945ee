"""The types `Question` and `Example`, labels inside options, and hashes of questions."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from medrlvr_jax.data.values import Reference
from medrlvr_jax.host.errors import ConfigError

LETTERS = "ABCDEFGHIJ"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
EMPTY_THOUGHT = re.compile(r"\s*(?:<think>\s*)?</think>\s*")  # how Qwen3's template switches thinking off
LABEL = re.compile(  # the label in "A. aspirin", "(B) x", "C:x", "d - x", "4) x"; "10 - 20 mg" has none
    r"\(?([A-Ja-j]|\d{1,2})(?:\)|[.:](?=\s)|(?<=[A-Ja-j]):|(?<=[A-Ja-j])\s+[-–](?=\s))\s*(?=\S)"
)

Key = tuple[tuple[str, ...], int | Reference]  # the options; the index of the right option, or a value


class DataError(ConfigError):
    """Unusable data. The message names the file, the line, the field, the value and the remedy."""


@dataclass(frozen=True)
class Question:
    """A question and its right answer, which is one of 2 to 10 options (`answer`) or a value (`value`).

    A value is anything that data/values.py reads. Beside options, it is the letters of all right options.
    """

    id: str
    question: str
    options: tuple[str, ...] = ()  # empty: the question is open
    answer: int = -1  # the index of the right option; -1: the right answer is `value`
    subject: str = ""
    rationale: str | None = None
    order: str = ""  # after shuffling: the letter that each option has in the file
    value: Reference | None = None
    # Facts that a good thought states, each as its accepted wordings: for a process reward.
    facts: tuple[tuple[str, ...], ...] = ()
    task: str = ""  # the type of question, beside its subject: anatomy, diagnosis, grading, …
    images: tuple[str | bytes, ...] = ()  # each is the path of an image file, or the content of one

    @property
    def kind(self) -> str:
        """`choice` (one right option), `choices` (all that apply), or the kind of an open question."""
        if self.value is None:
            return "choice"
        return "choices" if self.options else self.value.kind

    @property
    def letters(self) -> str:
        """The options' letters; "" if the right answer is not a single letter."""
        return LETTERS[: len(self.options)] if self.value is None else ""

    @property
    def choice_count(self) -> int:
        """The number of options, or of labels, of which exactly one is right; 0 for other questions."""
        if self.value is None:
            return len(self.options)
        return len(self.value.allowed) if self.value.kind == "label" else 0

    @property
    def reference(self) -> str:
        """The right answer as a response gives it: the letter of the right option, or the value."""
        return LETTERS[self.answer] if self.value is None else self.value.text

    @property
    def right_text(self) -> str:
        """The right answer in words: the text of the right option or options, or the value."""
        if self.value is None:
            return self.options[self.answer]
        return "; ".join(self.options[i] for i in self.right_indices) or self.value.text

    @property
    def right_indices(self) -> tuple[int, ...]:
        """The indices of the right options; empty for an open question."""
        if self.value is None:
            return (self.answer,)
        letters = self.value.value if self.options else ()
        return tuple(map(LETTERS.index, letters)) if isinstance(letters, tuple) else ()

    @property
    def lettered_options(self) -> list[str]:
        """The options as a prompt lists them: "A. aspirin"."""
        return [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]


@dataclass(frozen=True)
class Example:
    """A prompt, which may be empty, and the response to learn."""

    prompt: str
    response: str
    images: tuple[str | bytes, ...] = ()  # as in `Question`


def choices_reference(right: Iterable[int], n_options: int) -> Reference:
    """The right answer if all options with the indices `right` are right: exactly their letters."""
    letters = tuple(LETTERS[i] for i in sorted(right))
    return Reference("labels", ", ".join(letters), value=letters, allowed=tuple(LETTERS[:n_options]))


# ---- labels inside options: "A. aspirin" ----


def split_label(option: str) -> tuple[str, str]:
    """Split "B. heparin" into "B" and "heparin"; the label is "" if there is none."""
    match = LABEL.match(option)
    return (match[1].upper(), option[match.end() :]) if match else ("", option)


def _find_labels(options: tuple[str, ...]) -> tuple[list[str], list[bool]]:
    """Return the label of each option, and whether it fits the option's place."""
    labels = [split_label(option)[0] for option in options]
    expected = zip(LETTERS, map(str, range(1, len(LETTERS) + 1)), strict=True)
    return labels, [label in pair for label, pair in zip(labels, expected, strict=False)]


def have_letters(options: tuple[str, ...]) -> bool:
    """Whether two or more options begin with the letter of their place, as "B. heparin" in place B."""
    labels, in_place = _find_labels(options)
    return sum(ok and label.isalpha() for ok, label in zip(in_place, labels, strict=False)) > 1


def strip_labels(options: tuple[str, ...]) -> tuple[str, ...]:
    """Remove the options' labels if every option begins with that of its place: prompts write the letters.

    Raises `DataError` if the options begin with all the letters in another order. The key is then ambiguous.
    """
    labels, in_place = _find_labels(options)
    if all(in_place):  # record.py has checked that there are at most 10
        return tuple(split_label(option)[1] for option in options)
    if sorted(labels) == list(LETTERS[: len(options)]):
        problem = f"their own letters are {', '.join(labels)}, so the key is ambiguous"
        raise DataError(f"field options: {problem}; put them in order")
    return options


# ---- identity ----


@lru_cache(maxsize=2**20)
def image_digest(image: str | bytes) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of an image file's content."""
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]


def question_hash(question: Question) -> str:
    """Hash stem, options in the file's order, key and images, but not the id, to 16 hexadecimal digits."""
    options, right = list(question.options), list(question.right_indices)
    images = [[*map(image_digest, question.images)]] if question.images else []
    if not options:
        return fingerprint([[question.question, question.value, *images]])["sha256"][:16]
    if question.order:
        options = [options[question.order.index(letter)] for letter in LETTERS[: len(options)]]
        right = sorted(LETTERS.index(question.order[i]) for i in right)
    answer = right[0] if question.value is None else right
    text = json.dumps([question.question, options, answer, *images], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


NEWER_FIELDS = ("value", "facts", "task", "images")  # fields that runs of older versions did not hash


def fingerprint(rows: Iterable[Any]) -> dict[str, Any]:
    """Return `{"n", "sha256"}` of rows in their order: questions, or anything that JSON can represent."""
    digest, n = hashlib.sha256(), 0
    for row in rows:
        if isinstance(row, Question) and row.images:
            row = dataclasses.replace(row, images=tuple(map(image_digest, row.images)))
        tree = to_jsonable_python(row, fallback=str)
        if isinstance(row, Question):  # newer fields count only if they are set, so that old hashes hold
            tree = {name: x for name, x in tree.items() if x or name not in NEWER_FIELDS}
        text = json.dumps(tree, ensure_ascii=False, sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        n += 1
    return {"n": n, "sha256": digest.hexdigest()}


def repeats(questions: list[Question]) -> dict[str, str]:
    """Map each exact repeat's id to the id of the first such question. MMLU-Pro Health has 95 repeats."""
    first: dict[tuple, str] = {}
    keys = [(q.question, q.options, q.answer, q.value, q.images) for q in questions]
    firsts = [first.setdefault(key, q.id) for key, q in zip(keys, questions, strict=True)]
    return {q.id: earlier for q, earlier in zip(questions, firsts, strict=True) if earlier != q.id}
