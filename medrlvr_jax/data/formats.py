"""The formats of records, and how a record of each format becomes a checked `Question`.

`FORMATS` has an entry for each format: the fields by which it is recognised, further fields that are read,
and the function that finds options and right answer. The page *Your own data* describes the fields.

Published sets may have two options with the same text (21 of MedMCQA's 4,183 dev questions do). `plain`
refuses them, since a user can correct them.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from medrlvr_jax.data import published, record
from medrlvr_jax.data.question import (
    LABEL,
    LETTERS,
    DataError,
    Example,
    Key,
    Question,
    choices_reference,
    strip_labels,
)
from medrlvr_jax.data.record import Row
from medrlvr_jax.data.values import Reference

# ---- options and right answer of a user's own record ----


def key_of(row: Row) -> Key:
    """Return options and right answer: a choice if the record has `options`, else a value of its `kind`."""
    return record.open_key(row) if "kind" in row and "options" not in row else _choice_key(row)


def _choice_key(row: Row) -> Key:
    """Read `options` and `answer`: one right option, or several in a list or between commas."""
    row = _name_by_letters(row)
    options, answer = record.options_of(row, "options"), record.required(row, "answer")
    if isinstance(answer, str) and (index := _index_of_text(answer, options)) is not None:
        return options, index
    if (answer_as := row.get("answer_as") or "letter") not in ("letter", "from_0", "from_1", "text"):
        problem = "is none of letter, from_0, from_1, text; give one of these"
        raise record.bad_field("answer_as", answer_as, problem)
    if isinstance(answer, str) and answer_as != "text" and re.search("[,;]", answer):
        answer = re.split("[,;]", answer)
    if not isinstance(answer, list | tuple):
        return options, record.option_index(answer, "answer", options, answer_as)
    right = {record.option_index(each, "answer", options, answer_as) for each in answer}
    if not right or len(right) < len(answer):
        problem = "names no option, or the same option twice; give each right option once"
        raise record.bad_field("answer", answer, problem)
    return options, choices_reference(right, len(options))


def _name_by_letters(row: Row) -> Row:
    """Replace other option names, as in {"1": …, "2": …}, by letters, in `options` and in `answer`."""
    options, answer = row.get("options"), row.get("answer")
    if not isinstance(options, dict) or set(options) <= set(LETTERS) or "answer_as" in row:
        return row
    letters = dict(zip(map(str, options), LETTERS, strict=False))
    names = [str(name).strip() for name in (answer if isinstance(answer, list | tuple) else (answer,))]
    if len(options) > len(LETTERS) or not letters.keys() >= set(names):
        return row
    right = [letters[name] for name in names]
    return row | {"options": list(options.values()), "answer": right if len(right) > 1 else right[0]}


def _index_of_text(answer: str, options: tuple[str, ...]) -> int | None:
    """Return the index of the one option with this text, as "heparin" or "B. heparin".

    Returns None for a letter, a number, or any text that is not exactly one option's.
    """
    answer = answer.strip()
    if len(answer) == 1 or record.as_integer(answer) is not None:
        return None
    texts = strip_labels(options)
    if label := LABEL.match(answer):
        index = LETTERS.find(label[1].upper())
        if 0 <= index < len(texts) and answer[label.end() :] == texts[index]:
            return index
    return texts.index(answer) if texts.count(answer) == 1 else None


def _own_key(row: Row) -> Key:
    options, key = key_of(row)
    if len(set(strip_labels(options))) < len(options):
        problem = "has the same text twice, so a right answer could count as wrong; change one"
        raise record.bad_field("options", options, problem)
    return options, key


def _vqa_key(row: Row) -> Key:
    """A choice if the record has options or the answer is yes or no, else a text, compared word for word."""
    if row.get("options") is not None:
        return _choice_key(row)
    answer, options = record.text_of(row, "answer").casefold(), ("yes", "no")
    if "kind" not in row and answer in options:
        return options, options.index(answer)
    return record.open_key({"kind": "text"} | row)


# ---- the formats ----


class Format(NamedTuple):
    """How one format is recognised and read."""

    key: Callable[[Row], Key] | None  # options and right answer; None: `text`, which has no questions
    required: list[str]  # fields by which it is recognised, for each of its variants
    id: str = "id"
    subject: str = "subject"
    rationale: str = ""  # "": records of this format have none
    optional: str = ""  # further fields that are read
    add_question: Callable[[Row], Row] = lambda row: row  # adds `question` if it is spread over fields

    @property
    def fields(self) -> set[str]:
        """All fields that are read."""
        listed = ", ".join([self.optional, *self.required]).split(", ")
        return {self.id, self.subject, self.rationale, *listed} - {""}


OPTIONAL = (
    "options, answer_as, kind, lower, upper, tolerance, unit, labels, aliases, order, "
    "facts, task, image, images"
)
FORMATS = {
    # A user's own questions, with and without options.
    "plain": Format(_own_key, ["question, options, answer"], rationale="rationale", optional=OPTIONAL),
    "open": Format(_own_key, ["question, kind, answer"], rationale="rationale", optional=OPTIONAL),
    "medqa": Format(
        published.medqa, ["question, options, answer_idx"], subject="meta_info", optional="answer"
    ),
    "mmlu_pro": Format(
        published.mmlu_pro, ["question, options, answer, answer_index"], "question_id", "category"
    ),
    # Also CSV without a header: readers.py gives the cells these names.
    "mmlu": Format(published.mmlu, ["question, choices, answer"]),
    "medmcqa": Format(
        published.medmcqa,
        ["question, opa, opb, opc, opd, cop"],
        subject="subject_name",
        rationale="exp",
    ),
    # The authors' file, whose record ids are pmids, and the hub's form.
    "pubmedqa": Format(
        published.pubmedqa,
        ["QUESTION, CONTEXTS, final_decision", "question, context, final_decision"],
        rationale="long_answer",
        optional="pubid, LONG_ANSWER",
        add_question=published.with_abstract,
    ),
    "medcalc": Format(
        published.medcalc,
        ["Patient Note, Question, Ground Truth Answer, Output Type, Lower Limit, Upper Limit"],
        "Row Number",
        "Calculator Name",
        "Ground Truth Explanation",
        add_question=published.with_note,
    ),
    # Patient–trial matching, as EHRMIND's prompts or as plain fields.
    "trec": Format(
        published.trec,
        ["input, query_id, corpus_id, label", "note, trial, label"],
        add_question=published.with_trial,
    ),
    # Questions about images. Published sets with images are read in this format, too.
    "vqa": Format(_vqa_key, ["image, question, answer", "images, question, answer"], optional=OPTIONAL),
    # Prompts and responses, or texts alone, for `sft.target: text`.
    "text": Format(None, ["response", "text"], optional="prompt, image, images"),
}


# ---- from a record to a question ----


def parse(row: Row, name: str, default_id: str) -> Question | Example:
    """Return the checked question of a record in format `name`, or the example in format `text`."""
    form = FORMATS[name]
    if form.key is None:
        return parse_example(row)
    key = form.key(row)
    return _question(form.add_question(row), default_id, key, form)


def parse_example(row: Row) -> Example:
    if "text" in row and "response" not in row:
        return Example("", record.text_of(row, "text", strip=False), record.images_of(row))
    prompt = record.text_of(row, "prompt", strip=False, empty=True) if row.get("prompt") else ""
    return Example(prompt, record.text_of(row, "response", strip=False), record.images_of(row))


def check_question(question: Question, default_id: str) -> Question:
    """Check a `Question` that was made in Python by the rules for records."""
    row, options, answer, value = vars(question), (), question.answer, question.value
    if question.options or value is None:
        options = record.options_of(row, "options")
    if value is not None and (
        answer != -1 or (options and value != choices_reference(question.right_indices, len(options)))
    ):
        raise DataError("field value: the question also has another answer or options; remove one of the two")
    if value is None and (type(answer) is not int or not 0 <= answer < len(options)):
        problem = f"is not the index of one of its {len(options)} options, counted from 0"
        raise record.bad_field("answer", answer, problem)
    key = options, answer if value is None else value
    return _question(row, default_id, key, FORMATS["plain"])


def _question(row: Row, default_id: str, key: Key, form: Format) -> Question:
    def optional_text(field: str) -> str:
        return record.text_of(row, field, empty=True) if field and row.get(field) is not None else ""

    name, (options, answer) = row.get(form.id), key
    if name is not None and (isinstance(name, bool) or not isinstance(name, int | str)):
        raise record.bad_field(form.id, name, "is neither a string nor an integer; give one of these")
    return Question(
        id=default_id if name in (None, "") else str(name),
        question=record.text_of(row, "question"),
        options=options,
        answer=-1 if isinstance(answer, Reference) else answer,
        subject=optional_text(form.subject),
        rationale=optional_text(form.rationale) or None,
        value=answer if isinstance(answer, Reference) else None,
        task=optional_text("task") if "task" in form.optional else "",
        facts=record.facts_of(row) if "facts" in form.optional else (),
        images=record.images_of(row) if "images" in form.optional else (),
    )


# ---- recognising the format of a record ----

GENERAL = ("plain", "open", "vqa", "text")  # formats that no published set defines


def has_fields(row: Row, name: str) -> bool:
    """Whether the record has the fields by which format `name` is recognised."""
    return any(row.keys() >= set(fields.split(", ")) for fields in FORMATS[name].required)


def detect(row: Row, where: str) -> str:
    """Return the format whose fields the record has: a published set's if one fits, else a general one."""
    names = [name for name in FORMATS if has_fields(row, name)]
    names = [name for name in names if name not in GENERAL] or names[:1]
    if len(names) == 1:
        return names[0]
    fit = f"fit the formats {' and '.join(names)}; " if names else "fit no format; rename them, or "
    known = "; ".join(f"{name}: {' or '.join(form.required)}" for name, form in FORMATS.items())
    problem = f"{where}: fields {record.field_names(row)} {fit}set format"
    raise DataError(f"{problem}. The formats and their fields are {known}")
