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
where they can be mended. Options that bring their own letters ("A. aspirin", "B. heparin", …) are kept without them: prompts write letters.
"""

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from medrlvr_jax.host.errors import ConfigError

LETTERS = "ABCDEFGHIJ"
EMPTY_THOUGHT = re.compile(r"\s*(?:<think>\s*)?</think>\s*")  # as a prompt may begin a response: Qwen3's way not to think
LABEL = re.compile(  # "A. ", "(b) ", "C: ", "d - ", "4) "; not "10 - 20 mg"
    r"\(?([A-Ja-j]|\d{1,2})(?:\)|[.:](?=\s)|(?<=[A-Ja-j])\s+[-–](?=\s))\s*(?=\S)"
)


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


def _labels(options: tuple[str, ...]) -> tuple[list[str], list[bool]]:
    """The letter or number that each option begins with, "" for none; and whether it is that of the option's own place."""
    begins = [match[1].upper() if (match := LABEL.match(option)) else "" for option in options]
    return begins, [label in (LETTERS[i], str(i + 1)) for i, label in enumerate(begins[: len(LETTERS)])]


def brings_letters(options: tuple[str, ...]) -> bool:
    """Whether two options or more begin with the letter of their own place, as "B. heparin" in the place of B does."""
    begins, right = _labels(options)
    return sum(r and label.isalpha() for r, label in zip(right, begins, strict=False)) > 1


def unlabelled(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options without the letters or numbers that they bring, where all bring that of their own place: prompts write letters.

    `DataError` where all bring letters in another order, since the key could then mean either.
    """
    begins, right = _labels(options)
    if all(right) and len(options) == len(right):
        return tuple(LABEL.sub("", option, count=1) for option in options)
    if sorted(begins) == list(LETTERS[: len(options)]):
        order = ", ".join(begins)
        raise DataError(f"field options: they bring letters of their own, as {order}: which does the key mean? Put them in order")
    return options


def _plain(row: dict, default: str) -> Question:
    options = _options(row, "options")
    if len(set(unlabelled(options))) < len(options):
        raise DataError(f"field options: {reprlib.repr(options)} has one text twice: a right answer could count as wrong; mend it")
    return _question(row, default, options, _letter(row, "answer", options), rationale="rationale")


def _medqa(row: dict, default: str) -> Question:
    options = _options(row, "options")
    key = _letter(row, "answer_idx", options)
    if "answer" in row and (answer := _text(row, "answer")) not in (options[key], unlabelled(options)[key]):
        raise DataError(f"field answer: {reprlib.repr(answer)} is not option {LETTERS[key]}, {reprlib.repr(options[key])}; mend either")
    return _question(row, default, options, key, subject="meta_info")


def _mmlu_pro(row: dict, default: str) -> Question:
    options = _options(row, "options")
    key = _letter(row, "answer", options)
    if _whole(index := row.get("answer_index")) != key:
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
    index = _whole(cop)
    if index is not None and not 1 <= index <= 4:
        # A file that counts from 0 is bound to hold a 0 somewhere, so it is refused as a whole.
        raise DataError(f"field cop: {reprlib.repr(cop)} is not 1 to 4; files count from 1, so add 1 to all if yours counts from 0")
    key = index - 1 if index is not None else _letter(row, "cop", options)
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


class Format(NamedTuple):
    """How one format is read."""

    parse: Callable[[dict, str], Any]
    ways: tuple[set[str], ...]  # the fields that it is told by, in each of its forms
    also: set[str]  # fields that it reads where they are there
    counted: tuple[str, int] | None = None  # the field that may hold the key as a number, and which number is the first option's


FORMATS = {
    "medqa": Format(_medqa, ({"question", "options", "answer_idx"},), {"id", "answer", "meta_info"}),
    "mmlu_pro": Format(_mmlu_pro, ({"question", "options", "answer", "answer_index"},), {"question_id", "category"}),
    "mmlu": Format(_mmlu, ({"question", "choices", "answer"},), {"id", "subject"}, ("answer", 0)),
    "medmcqa": Format(_medmcqa, ({"question", "opa", "opb", "opc", "opd", "cop"},), {"id", "subject_name", "exp"}, ("cop", 1)),
    "pubmedqa": Format(
        _pubmedqa,
        ({"QUESTION", "CONTEXTS", "final_decision"}, {"question", "context", "final_decision"}),
        {"id", "pubid", "subject", "LONG_ANSWER", "long_answer"},
    ),
    "plain": Format(_plain, ({"question", "options", "answer"},), {"id", "subject", "rationale"}),
    "text": Format(_example, ({"response"}, {"text"}), {"prompt"}),
}


def detect(row: dict, where: str) -> str:
    """The one format whose fields the record has; plain and text only where no published format fits."""
    fits = [name for name, form in FORMATS.items() if any(fields <= row.keys() for fields in form.ways)]
    known = [name for name in fits if name not in ("plain", "text")] or fits[:1]
    if len(known) == 1:
        return known[0]
    what = f"fit {' and '.join(known)} alike; set format" if known else "fit no format; rename them, or set format"
    table = "; ".join(f"{name}: {' or '.join(', '.join(sorted(fields)) for fields in form.ways)}" for name, form in FORMATS.items())
    raise DataError(f"{where}: fields {listed(row)} {what}. The formats and their fields are {table}")


def listed(row: dict) -> str:
    """All of a record's fields: the one that matters may be the last."""
    names = [reprlib.repr(name) for name in row]
    return f"[{', '.join(names[:50])}{', …' if len(names) > 50 else ''}]"


def _whole(value: Any) -> int | None:
    """A whole number, or digits, as CSV brings them; None for all else."""
    if isinstance(value, str) and re.fullmatch(r" *-?[0-9]{1,9} *", value):
        return int(value)
    return value if type(value) is int else None


def _question(row: dict, default: str, options: tuple[str, ...], key: int, id: str = "id", subject: str = "subject", rationale: str = ""):
    """The checked Question, given which fields hold its id, subject and rationale."""
    own = row.get(id)
    if own is not None and (isinstance(own, bool) or not isinstance(own, int | str)):
        raise DataError(f"field {id}: {reprlib.repr(own)} is neither a string nor a whole number")
    _few(options)
    why = _text(row, rationale, empty=True) if rationale and row.get(rationale) is not None else None
    group = _text(row, subject, empty=True) if row.get(subject) is not None else ""
    return Question(default if own in (None, "") else str(own), _text(row, "question"), options, key, group, why or None)


def _missing(row: dict, field: str) -> DataError:
    return DataError(f"field {field}: needed, and not there; the record has {listed(row)}")


def _text(row: dict, field: str, strip: bool = True, empty: bool = False) -> str:
    value = row.get(field)
    if value is None:
        raise _missing(row, field)
    if not isinstance(value, str):
        raise DataError(f"field {field}: {reprlib.repr(value)} is not a string")
    if not value.strip() and not empty:
        raise DataError(f"field {field}: {reprlib.repr(value)} is blank")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"field {field}: {reprlib.repr(value)} holds half a surrogate pair (an unpaired \\ud8…), which is no text")
    return value.strip() if strip else value


def _options(row: dict, field: str) -> tuple[str, ...]:
    """Options from a list or from {"A": …}; records of one set may differ in number."""
    if (value := row.get(field)) is None:
        raise _missing(row, field)
    if isinstance(value, dict):
        given = {k: v for k, v in value.items() if v is not None}  # parquet fills up with nulls
        if set(given) != set(LETTERS[: len(given)]):
            raise DataError(f"field {field}: letters {reprlib.repr(list(given))} are not A, B, C … without a gap, {LETTERS[-1]} the last")
        value = [given[letter] for letter in LETTERS[: len(given)]]
    if not isinstance(value, list):
        remedy = "a list of options is needed, or one by letter; in CSV, a column A, B, … for each"
        raise DataError(f"field {field}: {reprlib.repr(value)}: {remedy}")
    return tuple(_text({f"{field} {i + 1}": option}, f"{field} {i + 1}") for i, option in enumerate(value))


def options_and_key(row: dict) -> tuple[tuple[str, ...], int]:
    """The options and the place of the right one in a record with `options` and the letter `answer`, by the rules of `plain`."""
    options = _few(unlabelled(_options(row, "options")))
    return options, _letter(row, "answer", options)


def checked(item: Question | Example, default: str, kind: type) -> Question | Example:
    """A `Question` or an `Example` that was made in Python, by the rules of records; `default` is for a question without an id."""
    if not isinstance(item, kind):
        raise DataError(f"{reprlib.repr(item)}: the rows before it are of the kind {kind.__name__}; give one kind alone")
    row = vars(item)
    if isinstance(item, Example):
        return _example(row, default)
    options = _few(_options({"options": list(item.options)}, "options"))
    if type(item.answer) is not int or not 0 <= item.answer < len(options):
        remedy = f"give the place of the right one of its {len(options)} options, the first being 0"
        raise DataError(f"field answer: {reprlib.repr(item.answer)}: {remedy}")
    return _question(row, default, options, item.answer, rationale="rationale")


def _few(options: tuple[str, ...]) -> tuple[str, ...]:
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"field options: {len(options)} of them; a question has 2 to {len(LETTERS)}")
    return options


def _letter(row: dict, field: str, options: tuple[str, ...]) -> int:
    if _whole(row.get(field)) is not None:
        remedy = 'give the letter, such as "B", since a number may count from 0 or from 1'
        raise DataError(f"field {field}: {reprlib.repr(row[field])} is a number where a letter is needed; {remedy}")
    letter = _text(row, field).upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        same = [LETTERS[i] for i, option in enumerate(options[: len(LETTERS)]) if option == row[field].strip()]
        remedy = f"; it is the text of option {same[0]}: give the letter" if same else ""
        raise DataError(f"field {field}: {reprlib.repr(row[field])} is not the letter of one of its {len(options)} options{remedy}")
    return LETTERS.index(letter)
