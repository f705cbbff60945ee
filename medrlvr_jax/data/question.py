"""The Question type, options that bring their own letters, and hashes of questions."""

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
LABEL = re.compile(  # the label in "A. aspirin", "(b) x", "C:x", "d - x", "4) x"; "10 - 20 mg" has none
    r"\(?([A-Ja-j]|\d{1,2})(?:\)|[.:](?=\s)|(?<=[A-Ja-j]):|(?<=[A-Ja-j])\s+[-–](?=\s))\s*(?=\S)"
)


Key = tuple[tuple[str, ...], int | Reference]  # the options, and the index of the right one, or a value


class DataError(ConfigError):
    """Data that cannot be used. The message names the file, the line, the field, the value and the remedy."""


@dataclass(frozen=True)
class Question:
    """A question with 2 to 10 options of which one is right, or one whose right answer is a value.

    A value may be anything that data/values.py reads, or, beside options, the letters of all that are right.
    """

    id: str
    question: str
    options: tuple[str, ...] = ()  # none: the question is open
    answer: int = -1  # the index of the one right option; -1: `value` is the right answer
    subject: str = ""
    rationale: str | None = None
    order: str = ""  # after shuffling: the letter that each option has in the file
    value: Reference | None = None  # the right answer that is not one option
    # What a good thought states, each fact as the texts that state it: for a process reward.
    facts: tuple[tuple[str, ...], ...] = ()
    task: str = ""  # what is asked, beside the subject: anatomy, diagnosis, grading, …
    images: tuple[str | bytes, ...] = ()  # each the path of a file, or what such a file holds

    @property
    def kind(self) -> str:
        """`choice` of one option, `choices` of all that are right, or the kind of an open question."""
        if self.value is None:
            return "choice"
        return "choices" if self.options else self.value.kind

    @property
    def letters(self) -> str:
        """The letters of which one is the right answer; "" where the right answer is no single letter."""
        return LETTERS[: len(self.options)] if self.value is None else ""

    @property
    def offered(self) -> int:
        """From how many answers one is to be chosen: letters or labels; 0 where it is no such choice."""
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
        return "; ".join(self.options[i] for i in self.right) or self.value.text

    @property
    def right(self) -> tuple[int, ...]:
        """The indices of the right options; none of an open question."""
        if self.value is None:
            return (self.answer,)
        letters = self.value.value if self.options else ()
        return tuple(map(LETTERS.index, letters)) if isinstance(letters, tuple) else ()

    @property
    def lettered(self) -> list[str]:
        """The options as a prompt lists them: "A. aspirin"."""
        return [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]


@dataclass(frozen=True)
class Example:
    """A prompt, which may be empty, and the text that should follow it."""

    prompt: str
    response: str
    images: tuple[str | bytes, ...] = ()  # as a question's


def several(right: Iterable[int], options: int) -> Reference:
    """The right answer where all options with the indices `right` are right: exactly their letters."""
    letters = tuple(LETTERS[i] for i in sorted(right))
    return Reference("labels", ", ".join(letters), value=letters, allowed=tuple(LETTERS[:options]))


# ---- options that bring their own labels ----


def _labels(options: tuple[str, ...]) -> tuple[list[str], list[bool]]:
    """The label that each option begins with ("" for none), and whether it is that of the option's place."""
    labels = [match[1].upper() if (match := LABEL.match(option)) else "" for option in options]
    places = zip(LETTERS, map(str, range(1, len(LETTERS) + 1)), strict=True)
    return labels, [label in place for label, place in zip(labels, places, strict=False)]


def brings_letters(options: tuple[str, ...]) -> bool:
    """Whether two or more options begin with the letter of their own place, as "B. heparin" in place B."""
    labels, in_place = _labels(options)
    return sum(ok and label.isalpha() for ok, label in zip(in_place, labels, strict=False)) > 1


def unlabelled(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options without labels where every option brings the label of its place: prompts write the letters.

    `DataError` where the options bring all the letters in another order: the key could then mean either.
    """
    labels, in_place = _labels(options)
    if all(in_place):  # of at most 10: formats.py has checked that
        return tuple(LABEL.sub("", option, count=1) for option in options)
    if sorted(labels) == list(LETTERS[: len(options)]):
        problem = f"their own letters are {', '.join(labels)}: which does the key mean?"
        raise DataError(f"field options: {problem} Put them in order")
    return options


# ---- identity ----


@lru_cache(maxsize=2**20)
def image_digest(image: str | bytes) -> str:
    """16 hexadecimal digits of the file that an image is in."""
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]


def question_hash(question: Question) -> str:
    """16 hexadecimal digits of stem, options in the file's order, key and images; not of the id."""
    options, images = list(question.options), [[image_digest(image) for image in question.images]]
    images = images if question.images else []
    if not options:
        return fingerprint([[question.question, question.value, *images]])["sha256"][:16]
    right = list(question.right)
    if question.order:
        options = [options[question.order.index(letter)] for letter in LETTERS[: len(options)]]
        right = sorted(LETTERS.index(question.order[i]) for i in right)
    answer = right[0] if question.value is None else right
    text = json.dumps([question.question, options, answer, *images], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


LATER = ("value", "facts", "task", "images")  # fields that questions of older versions lack


def fingerprint(rows: Iterable[Any]) -> dict[str, Any]:
    """`{"n", "sha256"}` of rows in their order, which may be questions or anything that JSON can hold."""
    digest, n = hashlib.sha256(), 0
    for row in rows:
        if isinstance(row, Question) and row.images:
            row = dataclasses.replace(row, images=tuple(map(image_digest, row.images)))
        tree = to_jsonable_python(row, fallback=str)
        if isinstance(row, Question):  # fields of later versions count only where they are given
            tree = {name: x for name, x in tree.items() if x or name not in LATER}
        text = json.dumps(tree, ensure_ascii=False, sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        n += 1
    return {"n": n, "sha256": digest.hexdigest()}


def repeats(questions: list[Question]) -> dict[str, str]:
    """{id of a question that exactly repeats an earlier one: its id}. MMLU-Pro Health has 95."""
    first: dict[tuple, str] = {}
    keys = [(q.question, q.options, q.answer, q.value, q.images) for q in questions]
    firsts = [first.setdefault(key, q.id) for key, q in zip(keys, questions, strict=True)]
    return {q.id: earlier for q, earlier in zip(questions, firsts, strict=True) if earlier != q.id}
