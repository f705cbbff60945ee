"""A question, and the formats that records of questions come in; each parser takes a record's fields and an id for when it has none.

| format     | fields                                                                                                         |
|------------|----------------------------------------------------------------------------------------------------------------|
| `plain`    | question, options (a list, or {"A": …}), answer (the letter); optional id, subject, rationale: your own data    |
| `medqa`    | question, options {"A": …}, answer_idx (the letter), answer (the option's text, checked against the letter)      |
| `mmlu_pro` | question, options (a list), answer (the letter), answer_index; of several categories, `health` is kept           |
| `mmlu`     | question, choices, answer (0-based); or CSV without header: question, A, B, C, D, letter                         |
| `medmcqa`  | question, opa … opd, cop, exp: cop is 1-based as the authors' files have it, or a class label as the hub has it  |
| `pubmedqa` | QUESTION, CONTEXTS, final_decision, by pmid; or the hub's question, context, final_decision: yes / no / maybe    |
| `text`     | prompt (may be empty) and response, or just text: for `load_text`                                                |

Two options with one text are kept in the published sets (21 of MedMCQA's 4,183 dev items: upstream's property) and refused in `plain`,
where they can be mended.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from medrlvr_jax.config import ConfigError

LETTERS = "ABCDEFGHIJ"


class DataError(ConfigError):
    """Data that cannot be used: the message names the file, the line, the field, the value and the remedy."""


@dataclass(frozen=True)
class Question:
    """One question; `answer` is the index of the right one of its 2 to 10 options."""

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    subject: str = ""
    rationale: str | None = None
    order: str = ""  # of shuffled options: the letter that each has in the file


@dataclass(frozen=True)
class Example:
    """A prompt, which may be empty, and the text that should follow it."""

    prompt: str
    response: str


def _plain(row: dict, default: str) -> Question:
    options = _options(row, "options")
    if len(set(options)) < len(options):
        raise DataError(f"field options: {reprlib.repr(options)} has one text twice: a right answer could count as wrong; mend it")
    return _question(row, default, options, _letter(row, "answer", options), rationale="rationale")


def _medqa(row: dict, default: str) -> Question:
    options = _options(row, "options")
    key = _letter(row, "answer_idx", options)
    if "answer" in row and (answer := _text(row, "answer")) != options[key]:
        raise DataError(f"field answer: {reprlib.repr(answer)} is not option {LETTERS[key]}, {reprlib.repr(options[key])}; mend either")
    return _question(row, default, options, key, subject="meta_info")


def _mmlu_pro(row: dict, default: str) -> Question:
    options = _options(row, "options")
    key = _letter(row, "answer", options)
    if (index := row.get("answer_index")) != key:
        raise DataError(f"field answer_index: {reprlib.repr(index)} is not {key}, that of answer {LETTERS[key]}; mend either")
    return _question(row, default, options, key, id="question_id", subject="category")


def _mmlu(row: dict, default: str) -> Question:
    options = _options(row, "choices")
    index = row.get("answer")
    if type(index) is not int:
        index = _letter(row, "answer", options)
    if not 0 <= index < len(options):
        raise DataError(f"field answer: {index} is not the index of one of the {len(options)} choices, the first being 0")
    return _question(row, default, options, index)


def _medmcqa(row: dict, default: str) -> Question:
    options = tuple(_text(row, "op" + letter) for letter in "abcd")
    cop = row.get("cop")
    if "cop" in row and cop in (None, -1):
        raise DataError("field cop: there is no key, as in the published test split; take the train or validation split")
    if type(cop) is int and not 1 <= cop <= 4:
        # A file that counts from 0 is bound to hold a 0 somewhere, so it is refused as a whole.
        raise DataError(f"field cop: {reprlib.repr(cop)} is not 1 to 4; files count from 1, so add 1 to all if yours counts from 0")
    digits = {"1": 0, "2": 1, "3": 2, "4": 3}  # CSV brings numbers as text
    key = cop - 1 if type(cop) is int else digits[cop] if isinstance(cop, str) and cop in digits else _letter(row, "cop", options)
    return _question(row, default, options, key, subject="subject_name", rationale="exp")


def _pubmedqa(row: dict, default: str) -> Question:
    """The abstract without its conclusion stands before the question; the conclusion (the long answer) is the rationale."""
    if "QUESTION" in row:
        row = {"question": row["QUESTION"], "context": {"contexts": row.get("CONTEXTS")}, "long_answer": row.get("LONG_ANSWER")} | row
    contexts = row["context"].get("contexts") if isinstance(row.get("context"), dict) else None
    if not isinstance(contexts, list) or not all(isinstance(c, str) for c in contexts):
        raise DataError(f"field context: {reprlib.repr(contexts)}: a list of the abstract's paragraphs is needed")
    options, decision = ("yes", "no", "maybe"), _text(row, "final_decision")
    if decision not in options:
        raise DataError(f"field final_decision: {reprlib.repr(decision)} is none of yes, no, maybe")
    row = row | {"question": "\n".join([*contexts, _text(row, "question")])}
    return _question(row, default, options, options.index(decision), id="id" if "id" in row else "pubid", rationale="long_answer")


def _example(row: dict, default: str) -> Example:
    if "text" in row and "response" not in row:
        return Example("", _text(row, "text", strip=False))
    return Example(_text(row, "prompt", strip=False, empty=True) if row.get("prompt") else "", _text(row, "response", strip=False))


FORMATS: dict[str, tuple[Callable[[dict, str], Any], tuple[set[str], ...]]] = {  # the parser, and the fields it is told by
    "medqa": (_medqa, ({"question", "options", "answer_idx"},)),
    "mmlu_pro": (_mmlu_pro, ({"question", "options", "answer", "answer_index"},)),
    "mmlu": (_mmlu, ({"question", "choices", "answer"},)),
    "medmcqa": (_medmcqa, ({"question", "opa", "opb", "opc", "opd", "cop"},)),
    "pubmedqa": (_pubmedqa, ({"QUESTION", "CONTEXTS", "final_decision"}, {"question", "context", "final_decision"})),
    "plain": (_plain, ({"question", "options", "answer"},)),
    "text": (_example, ({"response"}, {"text"})),
}


def detect(row: dict, where: str) -> str:
    """The one format whose fields the record has; plain and text only where no published format fits."""
    fits = [form for form, (_, ways) in FORMATS.items() if any(fields <= row.keys() for fields in ways)]
    known = [form for form in fits if form not in ("plain", "text")] or fits[:1]
    if len(known) == 1:
        return known[0]
    what = f"fit {' and '.join(known)} alike; set format" if known else "fit no format; rename them, or set format"
    table = "; ".join(f"{form}: {' or '.join(', '.join(sorted(fields)) for fields in ways)}" for form, (_, ways) in FORMATS.items())
    raise DataError(f"{where}: fields {reprlib.repr(list(row))} {what}. The formats and their fields are {table}")


def _question(row: dict, default: str, options: tuple[str, ...], key: int, id: str = "id", subject: str = "subject", rationale: str = ""):
    """The checked Question, given which fields hold its id, subject and rationale."""
    own = row.get(id)
    if own is not None and (isinstance(own, bool) or not isinstance(own, int | str)):
        raise DataError(f"field {id}: {reprlib.repr(own)} is neither a string nor a whole number")
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"field options: {len(options)} of them; a question has 2 to {len(LETTERS)}")
    why = _text(row, rationale, empty=True) if row.get(rationale) is not None else None
    group = _text(row, subject, empty=True) if row.get(subject) is not None else ""
    return Question(default if own in (None, "") else str(own), _text(row, "question"), options, key, group, why or None)


def _text(row: dict, field: str, strip: bool = True, empty: bool = False) -> str:
    value = row.get(field)
    if value is None:
        raise DataError(f"field {field}: needed, and not there; the record has {reprlib.repr(list(row))}")
    if not isinstance(value, str):
        raise DataError(f"field {field}: {reprlib.repr(value)} is not a string")
    if not value.strip() and not empty:
        raise DataError(f"field {field}: {reprlib.repr(value)} is blank")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"field {field}: {reprlib.repr(value)} holds half a surrogate pair (an unpaired \\ud8…), which is no text")
    return value.strip() if strip else value


def _options(row: dict, field: str) -> tuple[str, ...]:
    """Options from a list or from {"A": …}; records of one set may differ in number."""
    value = row.get(field)
    if isinstance(value, dict):
        given = {k: v for k, v in value.items() if v is not None}  # parquet fills up with nulls
        if set(given) != set(LETTERS[: len(given)]):
            raise DataError(f"field {field}: letters {reprlib.repr(list(given))} are not A, B, C … without a gap, {LETTERS[-1]} the last")
        value = [given[letter] for letter in LETTERS[: len(given)]]
    if not isinstance(value, list):
        raise DataError(f"field {field}: {reprlib.repr(value)}: a list of options is needed, or one by letter")
    return tuple(_text({f"{field} {i + 1}": option}, f"{field} {i + 1}") for i, option in enumerate(value))


def _letter(row: dict, field: str, options: tuple[str, ...]) -> int:
    letter = _text(row, field).upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise DataError(f"field {field}: {reprlib.repr(row[field])} is not the letter of one of its {len(options)} options")
    return LETTERS.index(letter)
