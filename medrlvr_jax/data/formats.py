"""The formats that records come in, and the Question that each makes of a record's fields.

| format     | fields                                                                                       |
|------------|----------------------------------------------------------------------------------------------|
| `plain`    | your own data: question, options (a list, or {"A": …}), answer (the letter);                  |
|            | optional: id, subject, rationale                                                              |
| `medqa`    | question, options {"A": …}, answer_idx (the letter), answer (that option's text, checked)     |
| `mmlu_pro` | question, options (a list), answer (the letter), answer_index; of several categories only     |
|            | `health` is used                                                                              |
| `mmlu`     | question, choices, answer (counted from 0); or CSV without header: question, A, B, C, D, letter |
| `medmcqa`  | question, opa … opd, cop, exp. cop counts from 1 in the authors' files; on the hub it is a    |
|            | class label                                                                                   |
| `pubmedqa` | QUESTION, CONTEXTS, final_decision (yes / no / maybe), by pmid; or the hub's question,        |
|            | context, final_decision                                                                       |
| `text`     | prompt (may be empty) and response, or only text: for `sft.target: text`                      |

Two options with the same text are accepted in the published sets (21 of MedMCQA's 4,183 dev questions have them) and
refused in `plain`, where they can be corrected. If options bring their own letters ("A. aspirin", "B. heparin", …), these are
removed: prompts write the letters.
"""

from collections.abc import Callable
from reprlib import repr as short
from typing import Any, NamedTuple

from medrlvr_jax.data.question import (
    LETTERS,
    DataError,
    Example,
    Question,
    as_integer,
    check_letter,
    check_options,
    check_text,
    field_names,
    make_question,
    unlabelled,
)

Row = dict[str, Any]
Choice = tuple[tuple[str, ...], int]  # the options, the index of the right one


def _plain(row: Row) -> Choice:
    options = check_options(row, "options")
    if len(set(unlabelled(options))) < len(options):
        raise DataError(
            f"field options: {short(options)} has one text twice: a right answer could count as wrong; change one"
        )
    return options, check_letter(row, "answer", options)


def _medqa(row: Row) -> Choice:
    options = check_options(row, "options")
    key = check_letter(row, "answer_idx", options)
    if "answer" in row and (answer := check_text(row, "answer")) not in (
        options[key],
        unlabelled(options)[key],
    ):
        raise DataError(
            f"field answer: {short(answer)} is not option {LETTERS[key]}, {short(options[key])}; correct one of the two"
        )
    return options, key


def _mmlu_pro(row: Row) -> Choice:
    options = check_options(row, "options")
    key = check_letter(row, "answer", options)
    if as_integer(index := row.get("answer_index")) != key:
        wrong = f"{short(index)} is not {key}, the index of answer {LETTERS[key]}"
        raise DataError(f"field answer_index: {wrong}; correct one of the two")
    return options, key


def _mmlu(row: Row) -> Choice:
    options, index = check_options(row, "choices"), row.get("answer")
    if type(index) is not int:
        index = check_letter(row, "answer", options)
    if not 0 <= index < len(options):
        raise DataError(
            f"field answer: {index} is not the index of one of the {len(options)} choices, counted from 0"
        )
    return options, index


def _medmcqa(row: Row) -> Choice:
    options, cop = tuple(check_text(row, "op" + letter) for letter in "abcd"), row.get("cop")
    if "cop" in row and cop in (None, -1):
        raise DataError(
            "field cop: no key, as in the published test split; take the train or validation split"
        )
    index = as_integer(cop)
    if index is None:
        return options, check_letter(row, "cop", options)
    if not 1 <= index <= 4:  # a file that counts from 0 almost surely has a 0, so the whole file is refused
        remedy = "files count from 1, so add 1 to all if yours counts from 0"
        raise DataError(f"field cop: {short(cop)} is not 1 to 4; {remedy}")
    return options, index - 1


def _pubmedqa(row: Row) -> Choice:
    options, decision = ("yes", "no", "maybe"), check_text(row, "final_decision")
    if decision not in options:
        raise DataError(
            f"field final_decision: {short(decision)} is none of yes, no, maybe; give one of these"
        )
    return options, options.index(decision)


def _with_abstract(row: Row) -> Row:
    """PubMedQA's record with the abstract, without its conclusion, before the question; the conclusion is the rationale."""
    if "QUESTION" in row:
        context, conclusion = {"contexts": row.get("CONTEXTS")}, row.get("LONG_ANSWER")
        row = {"question": row["QUESTION"], "context": context, "long_answer": conclusion} | row
    paragraphs = row["context"].get("contexts") if isinstance(row.get("context"), dict) else None
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise DataError(f"field context: {short(paragraphs)}: a list of the abstract's paragraphs is needed")
    return (
        {"id": row.get("pubid")} | row | {"question": "\n".join([*paragraphs, check_text(row, "question")])}
    )


class Format(NamedTuple):
    """How one format is recognised and read."""

    required: tuple[set[str], ...]  # the fields of a record, in each of the format's variants
    choice: Callable[[Row], Choice] | None  # None: format `text`, whose records are no questions
    id: str = "id"
    subject: str = "subject"
    rationale: str | None = None
    optional: frozenset[str] = frozenset()  # further fields that are read
    number: tuple[str, int] | None = (
        None  # the field where the key may be a number, and the first option's number
    )


FORMATS = {
    "plain": Format(({"question", "options", "answer"},), _plain, rationale="rationale"),
    "medqa": Format(
        ({"question", "options", "answer_idx"},), _medqa, subject="meta_info", optional=frozenset({"answer"})
    ),
    "mmlu_pro": Format(
        ({"question", "options", "answer", "answer_index"},), _mmlu_pro, "question_id", "category"
    ),
    "mmlu": Format(({"question", "choices", "answer"},), _mmlu, number=("answer", 0)),
    "medmcqa": Format(
        ({"question", "opa", "opb", "opc", "opd", "cop"},),
        _medmcqa,
        "id",
        "subject_name",
        "exp",
        number=("cop", 1),
    ),
    "pubmedqa": Format(
        ({"QUESTION", "CONTEXTS", "final_decision"}, {"question", "context", "final_decision"}),
        _pubmedqa,
        rationale="long_answer",
        optional=frozenset({"pubid", "LONG_ANSWER"}),
    ),
    "text": Format(({"response"}, {"text"}), None, optional=frozenset({"prompt"})),
}


def parse(row: Row, name: str, default_id: str) -> Question | Example:
    """The checked question, or in format `text` the example, of a record in format `name`."""
    form = FORMATS[name]
    if form.choice is None:
        return make_example(row)
    options, answer = form.choice(row)
    row = _with_abstract(row) if name == "pubmedqa" else row
    return make_question(row, default_id, options, answer, form.id, form.subject, form.rationale)


def make_example(row: Row) -> Example:
    if "text" in row and "response" not in row:
        return Example("", check_text(row, "text", strip=False))
    prompt = check_text(row, "prompt", strip=False, empty=True) if row.get("prompt") else ""
    return Example(prompt, check_text(row, "response", strip=False))


def fits(row: Row, name: str) -> bool:
    return any(fields <= row.keys() for fields in FORMATS[name].required)


def unread_fields(fields: list[str], name: str) -> list[str]:
    form = FORMATS[name]
    read = {form.id, form.subject, form.rationale, *form.optional}.union(*form.required)
    return [field for field in fields if field not in read]


def detect(row: Row, where: str) -> str:
    """The format whose fields the record has; `plain` or `text` only where no published format fits."""
    names = [name for name in FORMATS if fits(row, name)]
    names = [name for name in names if name not in ("plain", "text")] or names[:1]
    if len(names) == 1:
        return names[0]
    problem = (
        f"fit {' and '.join(names)} alike; set format"
        if names
        else "fit no format; rename them, or set format"
    )
    table = [
        f"{name}: {' or '.join(', '.join(sorted(v)) for v in form.required)}"
        for name, form in FORMATS.items()
    ]
    raise DataError(
        f"{where}: fields {field_names(row)} {problem}. The formats and their fields are {'; '.join(table)}"
    )


def options_and_key(row: Row) -> tuple[tuple[str, ...], int]:
    """The options, and the index of the right one, of a record with `options` and the letter `answer`, as in `plain`."""
    options = unlabelled(check_options(row, "options"))
    return options, check_letter(row, "answer", options)
