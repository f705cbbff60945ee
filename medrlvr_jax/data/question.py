"""The Question type, the checks of its fields, and its identity (hashes, repeats). Nothing here reads a file.

A check that fails raises `DataError` with the field, the value and the remedy; load.py adds the file and the line.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from pydantic_core import to_jsonable_python

from medrlvr_jax.host.errors import ConfigError

LETTERS = "ABCDEFGHIJ"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
EMPTY_THOUGHT = re.compile(
    r"\s*(?:<think>\s*)?</think>\s*"
)  # Qwen3's template begins a response so to switch thinking off
LABEL = re.compile(  # the label in "A. aspirin", "(b) x", "C: x", "d - x", "4) x"; "10 - 20 mg" has none
    r"\(?([A-Ja-j]|\d{1,2})(?:\)|[.:](?=\s)|(?<=[A-Ja-j])\s+[-–](?=\s))\s*(?=\S)"
)


class DataError(ConfigError):
    """Data that cannot be used. The message names the file, the line, the field, the value and the remedy."""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question with 2 to 10 options; `answer` is the index of the right option."""

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    subject: str = ""
    rationale: str | None = None
    order: str = ""  # after shuffling: the letter that each option has in the file

    @property
    def reference(self) -> str:
        """What an answer is graded against: the letter of the right option."""
        return LETTERS[self.answer]

    @property
    def lettered(self) -> list[str]:
        """The options as a prompt lists them: "A. aspirin"."""
        return [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]


@dataclass(frozen=True)
class Example:
    """A prompt, which may be empty, and the text that should follow it."""

    prompt: str
    response: str


# ---- options that bring their own labels ----


def _labels(options: tuple[str, ...]) -> tuple[list[str], list[bool]]:
    """The label that each option begins with ("" for none), and whether it is the label of the option's place."""
    labels = [match[1].upper() if (match := LABEL.match(option)) else "" for option in options]
    return labels, [
        label in (LETTERS[i : i + 1], str(i + 1)) and label != "" for i, label in enumerate(labels)
    ]


def brings_letters(options: tuple[str, ...]) -> bool:
    """Whether at least two options begin with the letter of their own place, as "B. heparin" in place B does."""
    labels, in_place = _labels(options)
    return sum(ok and label.isalpha() for ok, label in zip(in_place, labels, strict=True)) > 1


def unlabelled(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options without their own labels where every option has the label of its place: prompts write letters.

    `DataError` where the options bring all the letters in another order: the key could then mean either.
    """
    labels, in_place = _labels(options)
    if all(in_place):
        return tuple(LABEL.sub("", option, count=1) for option in options)
    if sorted(labels) == list(LETTERS[: len(options)]):
        order = ", ".join(labels)
        raise DataError(
            f"field options: their own letters are {order}: which does the key mean? Put them in order"
        )
    return options


# ---- checks of a record's fields ----


def field_names(row: dict[str, Any]) -> str:
    """The names of a record's fields for a message: all of them, for the one that matters may be the last."""
    names = [short(name) for name in row]
    return f"[{', '.join(names[:50])}{', …' if len(names) > 50 else ''}]"


def need(row: dict[str, Any], field: str) -> Any:
    if row.get(field) is None:
        raise DataError(f"field {field}: needed, and not there; the record has {field_names(row)}")
    return row[field]


def check_text(row: dict[str, Any], field: str, strip: bool = True, empty: bool = False) -> str:
    value = need(row, field)
    if not isinstance(value, str):
        raise DataError(f"field {field}: {short(value)} is not a string; put quotes around it")
    if not value.strip() and not empty:
        raise DataError(f"field {field}: {short(value)} is blank; give a text, or take the record out")
    if any("\ud800" <= c <= "\udfff" for c in value):
        remedy = "an unpaired \\ud8…, which is not text; write the character again"
        raise DataError(f"field {field}: {short(value)} holds half a surrogate pair ({remedy})")
    return value.strip() if strip else value


def check_options(row: dict[str, Any], field: str) -> tuple[str, ...]:
    """2 to 10 options from a list or from {"A": …}. Records of one set may differ in number."""
    value = need(row, field)
    if isinstance(value, dict):
        by_letter = {
            k: v for k, v in value.items() if v is not None
        }  # parquet fills missing letters with null
        if set(by_letter) != set(LETTERS[: len(by_letter)]):
            wrong = f"letters {short(list(by_letter))} are not A, B, C … without a gap"
            raise DataError(f"field {field}: {wrong}; {LETTERS[-1]} may be the last")
        value = [by_letter[letter] for letter in LETTERS[: len(by_letter)]]
    if not isinstance(value, list | tuple):
        remedy = "a list of options is needed, or an object by letter; in CSV, a column A, B, … for each"
        raise DataError(f"field {field}: {short(value)}: {remedy}")
    options = tuple(check_text({(name := f"{field} {i}"): option}, name) for i, option in enumerate(value, 1))
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"field options: {len(options)} of them; a question has 2 to {len(LETTERS)}")
    return options


def as_integer(value: Any) -> int | None:
    """An integer, or digits as CSV brings them; None for everything else."""
    if isinstance(value, str) and re.fullmatch(r" *-?[0-9]{1,9} *", value):
        return int(value)
    return value if type(value) is int else None


def check_letter(row: dict[str, Any], field: str, options: tuple[str, ...]) -> int:
    """The index of the option whose letter the field holds."""
    value = need(row, field)
    if as_integer(value) is not None:
        remedy = 'give the letter, such as "B", since a number may count from 0 or from 1'
        raise DataError(f"field {field}: {short(value)} is a number where a letter is needed; {remedy}")
    letter = check_text(row, field).upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        same = next((LETTERS[i] for i, option in enumerate(options) if option == value.strip()), None)
        remedy = (
            f"it is the text of option {same}: give the letter"
            if same
            else f"give one of {LETTERS[: len(options)]}"
        )
        wrong = f"{short(value)} is not the letter of one of its {len(options)} options"
        raise DataError(f"field {field}: {wrong}; {remedy}")
    return LETTERS.index(letter)


def make_question(
    row: dict[str, Any],
    default_id: str,
    options: tuple[str, ...],
    answer: int,
    id: str = "id",
    subject: str = "subject",
    rationale: str | None = None,
) -> Question:
    """The Question of a record. `id`, `subject` and `rationale` name the fields that hold these, if the record has them."""

    def optional(field: str | None) -> str:
        return check_text(row, field, empty=True) if field and row.get(field) is not None else ""

    name = row.get(id)
    if name is not None and (isinstance(name, bool) or not isinstance(name, int | str)):
        raise DataError(f"field {id}: {short(name)} is neither a string nor an integer; give one of these")
    name = default_id if name in (None, "") else str(name)
    return Question(
        name, check_text(row, "question"), options, answer, optional(subject), optional(rationale) or None
    )


def check_question(question: Question, default_id: str) -> Question:
    """A `Question` that was made in Python, by the rules for records."""
    options = check_options(vars(question), "options")
    if type(question.answer) is not int or not 0 <= question.answer < len(options):
        remedy = f"give the index of the right one of its {len(options)} options, counted from 0"
        raise DataError(f"field answer: {short(question.answer)}: {remedy}")
    return make_question(vars(question), default_id, options, question.answer, rationale="rationale")


# ---- identity ----


def question_hash(question: Question) -> str:
    """16 hexadecimal digits of the stem, the options in the file's order and the key; id and shuffling do not count."""
    options, answer = list(question.options), question.answer
    if question.order:
        options = [options[question.order.index(letter)] for letter in LETTERS[: len(options)]]
        answer = LETTERS.index(question.order[answer])
    text = json.dumps([question.question, options, answer], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fingerprint(rows: Iterable[Any]) -> dict[str, Any]:
    """`{"n", "sha256"}` of rows in their order, which may be questions or anything that JSON can hold."""
    digest, n = hashlib.sha256(), 0
    for row in rows:
        text = json.dumps(to_jsonable_python(row), ensure_ascii=False, sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        n += 1
    return {"n": n, "sha256": digest.hexdigest()}


def repeats(questions: list[Question]) -> dict[str, str]:
    """{id of a question that exactly repeats an earlier one: that one's id}. MMLU-Pro Health's 818 hold 95 repeats."""
    first: dict[tuple, str] = {}
    keys = [(q.question, q.options, q.answer) for q in questions]
    return {
        q.id: first[key]
        for q, key in zip(questions, keys, strict=True)
        if first.setdefault(key, q.id) != q.id
    }
