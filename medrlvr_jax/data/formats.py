"""The formats of records, and how a record of each format becomes a checked `Question`.

`FORMATS` has an entry for each format: the fields by which it is recognised, further fields that are read,
and a function that adapts its records to the formats `plain` and `open`, which are then read in one way. The
page *Your own data* describes the fields.

Published sets may have two options with the same text (21 of MedMCQA's 4,183 dev questions do). `plain`
refuses them, since a user can correct them.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from medrlvr_jax.data import published, record
from medrlvr_jax.data.question import (
    LETTERS,
    DataError,
    Example,
    Key,
    Question,
    choices_reference,
    split_label,
    strip_labels,
)
from medrlvr_jax.data.record import Row
from medrlvr_jax.data.values import Reference

# ---- options and right answer of a user's own record ----


def key_of(row: Row) -> Key:
    """Return options and right answer: a choice if the record has `options`, else a value of its `kind`."""
    is_open = row.get("options") is None and row.get("kind") is not None
    return record.open_key(row) if is_open else _choice_key(row)


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
    key = right if isinstance(answer, list | tuple) else right[0]
    return row | {"options": list(options.values()), "answer": key}


def _index_of_text(answer: str, options: tuple[str, ...]) -> int | None:
    """Return the index of the one option with this text, as "heparin" or "B. heparin".

    Returns None for a letter, a number, or any text that is not exactly one option's.
    """
    answer = answer.strip()
    if len(answer) == 1 or record.as_integer(answer) is not None:
        return None
    texts = strip_labels(options)
    label, text = split_label(answer)
    index = LETTERS.find(label or " ")
    if 0 <= index < len(texts) and text == texts[index]:
        return index
    return texts.index(answer) if texts.count(answer) == 1 else None


# ---- the formats ----


def _vqa(row: Row) -> Row:
    """Without options, an answer of yes or no is a choice, and any other a text, compared word for word."""
    if row.get("options") is not None or row.get("kind") is not None:
        return row
    answer, options = record.text_of(row, "answer").casefold(), ("yes", "no")
    if answer in options:
        right = LETTERS[options.index(answer)]
        return row | {"options": options, "answer": right, "answer_as": "letter"}
    return row | {"kind": "text"}


class Format(NamedTuple):
    """How one format is recognised and read."""

    required: list[str]  # fields by which it is recognised, for each of its variants
    optional: str = ""  # further fields that are read
    adapt: Callable[[Row], Row] = lambda row: row  # to a record of `plain` or `open`

    @property
    def fields(self) -> set[str]:
        """All fields that are read."""
        return {*", ".join([self.optional, *self.required]).split(", ")} - {""}


OPTIONAL = (
    "id, options, answer_as, kind, lower, upper, tolerance, unit, labels, aliases, order, "
    "subject, task, rationale, facts, image, images"
)
FORMATS = {
    # A user's own questions, with and without options.
    "plain": Format(["question, options, answer"], OPTIONAL),
    "open": Format(["question, kind, answer"], OPTIONAL),
    "medqa": Format(["question, options, answer_idx"], "id, answer, meta_info", published.medqa),
    "mmlu_pro": Format(
        ["question, options, answer, answer_index"], "question_id, category", published.mmlu_pro
    ),
    # Also CSV without a header: readers.py gives the cells these names.
    "mmlu": Format(["question, choices, answer"], "id, subject", published.mmlu),
    "medmcqa": Format(["question, opa, opb, opc, opd, cop"], "id, subject_name, exp", published.medmcqa),
    # The authors' file, whose record ids are pmids, and the hub's form.
    "pubmedqa": Format(
        ["QUESTION, CONTEXTS, final_decision", "question, context, final_decision"],
        "id, pubid, subject, long_answer, LONG_ANSWER",
        published.pubmedqa,
    ),
    "medcalc": Format(
        ["Patient Note, Question, Ground Truth Answer, Output Type, Lower Limit, Upper Limit"],
        "Row Number, Calculator Name, Ground Truth Explanation",
        published.medcalc,
    ),
    # Patient–trial matching, as EHRMIND's prompts or as plain fields.
    "trec": Format(
        ["input, query_id, corpus_id, label", "note, trial, label"], "id, subject", published.trec
    ),
    # Questions about images. Published sets with images are read in this format, too.
    "vqa": Format(["image, question, answer", "images, question, answer"], OPTIONAL, _vqa),
    # Prompts and responses, or texts alone, for `sft.target: text`.
    "text": Format(["response", "text"], "prompt, image, images"),
}


# ---- from a record to a question ----


def parse(row: Row, name: str, default_id: str) -> Question | Example:
    """Return the checked question of a record in format `name`, or the example in format `text`."""
    if name == "text":
        return parse_example(row)
    row = FORMATS[name].adapt(row)
    options, key = key_of(row)
    if name in ("plain", "open") and len(set(strip_labels(options))) < len(options):
        problem = "has the same text twice, so a right answer could count as wrong; change one"
        raise record.bad_field("options", options, problem)
    return _question(row, default_id, options, key)


def parse_example(row: Row) -> Example:
    if "text" in row and "response" not in row:
        return Example("", record.text_of(row, "text", strip=False), record.images_of(row))
    prompt = record.text_of(row, "prompt", strip=False, empty=True) if row.get("prompt") else ""
    return Example(prompt, record.text_of(row, "response", strip=False), record.images_of(row))


def check_question(question: Question, default_id: str) -> Question:
    """Check a `Question` that was made in Python by the rules for records."""
    options, answer, value = (), question.answer, question.value
    if question.options or value is None:
        options = record.options_of(vars(question), "options")
    if value is None:
        if type(answer) is not int or not 0 <= answer < len(options):
            problem = f"is not the index of one of its {len(options)} options, counted from 0"
            raise record.bad_field("answer", answer, problem)
        return _question(vars(question), default_id, options, answer)
    if answer != -1 or (options and value != choices_reference(question.right_indices, len(options))):
        raise DataError("field value: the question also has another answer or options; remove one of the two")
    return _question(vars(question), default_id, options, value)


def _question(row: Row, default_id: str, options: tuple[str, ...], key: int | Reference) -> Question:
    return Question(
        id=record.id_of(row, "id") or default_id,
        question=record.text_of(row, "question"),
        options=options,
        answer=key if isinstance(key, int) else -1,
        subject=record.optional_text(row, "subject"),
        rationale=record.optional_text(row, "rationale") or None,
        value=None if isinstance(key, int) else key,
        task=record.optional_text(row, "task"),
        facts=record.facts_of(row),
        images=record.images_of(row),
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
