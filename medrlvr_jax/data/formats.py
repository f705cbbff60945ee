"""The formats that records come in, and the checked Question that each makes of a record's fields.

| format     | fields                                                                                       |
|------------|----------------------------------------------------------------------------------------------|
| `plain`    | your own data: question, options (a list, or {"A": …}), answer (the letter, or as answer_as  |
|            | says: from_0, from_1, text; a list or "A, C" where all that apply are asked for);            |
|            | optional: id, subject, rationale, facts (what a good thought states: each a text, or a list  |
|            | of the texts that state it), task (what is asked: anatomy, diagnosis, …), image or images    |
|            | (see images.py)                                                                              |
| `open`     | your own data without options: question, kind, answer; optional: lower, upper, tolerance,    |
|            | unit, labels, aliases, order (values.py), id, subject, rationale, facts, image, images       |
| `medqa`    | question, options {"A": …}, answer_idx (the letter), answer (that option's text, checked)    |
| `mmlu_pro` | question, options (a list), answer (the letter), answer_index;                               |
|            | of several categories only `health` is used                                                  |
| `mmlu`     | question, choices, answer (from 0); or CSV without header: question, A, B, C, D, letter      |
| `medmcqa`  | question, opa … opd, exp, cop (from 1 in the authors' files, a class label on the hub)       |
| `pubmedqa` | QUESTION, CONTEXTS, final_decision (yes / no / maybe), by pmid;                              |
|            | or the hub's question, context, final_decision                                               |
| `medcalc`  | MedCalc-Bench: Patient Note, Question, Ground Truth Answer, Output Type,                     |
|            | Lower Limit, Upper Limit                                                                     |
| `trec`     | patient–trial matching: note, trial, label (0 not relevant, 1 excluded, 2 eligible, as in    |
|            | TREC Clinical Trials); or EHRMIND's input, query_id, corpus_id, label                        |
| `vqa`      | question and answer, with image or images: a choice where the answer is yes or no, else a    |
|            | text; with options (also as JSON text), answer as in `plain`. published.py has the names of  |
|            | published sets, whose fields are read in this format                                         |
| `text`     | prompt (may be empty) and response, or only text: for `sft.target: text`;                    |
|            | optional: image or images                                                                    |

Two options with the same text are accepted in the published sets (21 of MedMCQA's 4,183 dev questions have
them) and refused in `plain`, where they can be corrected. Letters that options bring ("A. aspirin",
"B. heparin", …) are removed, because prompts write the letters.
"""

import re
from collections.abc import Callable
from reprlib import repr as short
from typing import NamedTuple

from medrlvr_jax.data import published
from medrlvr_jax.data.question import LABEL, LETTERS, DataError, Example, Key, Question, several, unlabelled
from medrlvr_jax.data.record import (
    Row,
    facts_of,
    field_names,
    images_of,
    integer,
    needed,
    options_of,
    place_of,
    text,
    value_of,
    wrong,
)
from medrlvr_jax.data.values import Reference

# ---- which option is right ----


def _place_of_text(answer: str, options: tuple[str, ...]) -> int | None:
    """The index of the one option whose text the answer is, as "heparin" or "B. heparin"; None where it is a
    letter or a number, or no option's text.
    """
    words = answer.strip()
    if len(words) == 1 or integer(words) is not None:
        return None
    texts = unlabelled(options)
    if label := LABEL.match(words):
        place = LETTERS.find(label[1].upper())
        if 0 <= place < len(texts) and words[label.end() :] == texts[place]:
            return place
    return texts.index(words) if texts.count(words) == 1 else None


def _lettered(row: Row) -> Row:
    """The record with letters in place of names of its own that its options have, as {"1": …, "2": …}."""
    options, answer = row.get("options"), row.get("answer")
    if not isinstance(options, dict) or set(options) <= set(LETTERS) or "answer_as" in row:
        return row
    letters = dict(zip(map(str, options), LETTERS, strict=False))
    keys = [str(each).strip() for each in (answer if isinstance(answer, list | tuple) else (answer,))]
    if len(options) > len(LETTERS) or not letters.keys() >= set(keys):
        return row
    named = [letters[key] for key in keys]
    return row | {"options": list(options.values()), "answer": named if len(named) > 1 else named[0]}


def _choice(row: Row) -> Key:
    """`options`, and what `answer` says is right: one of them, or several in a list or between commas."""
    row = _lettered(row)
    options, answer, how = options_of(row, "options"), needed(row, "answer"), row.get("answer_as") or "letter"
    if isinstance(answer, str) and (place := _place_of_text(answer, options)) is not None:
        return options, place
    if how not in ("letter", "from_0", "from_1", "text"):
        raise wrong("answer_as", how, "is none of letter, from_0, from_1, text; give one of these")
    if isinstance(answer, str) and how != "text" and re.search("[,;]", answer):
        answer = re.split("[,;]", answer)
    if not isinstance(answer, list | tuple):
        return options, place_of(answer, "answer", options, how)
    places = {place_of(each, "answer", options, how) for each in answer}
    if not places or len(places) < len(answer):
        raise wrong("answer", answer, "names no option, or one twice; give each right option once")
    return options, several(places, len(options))


# ---- the key of a record, by its format ----


def key_of(row: Row) -> Key:
    """By its options or, where it has none, by its value. A file may have both."""
    if "kind" in row and "options" not in row:
        return value_of(row)
    return _choice(row)


def _own(row: Row) -> Key:
    options, key = key_of(row)
    if len(set(unlabelled(options))) < len(options):
        problem = "has one text twice: a right answer could count as wrong; change one"
        raise wrong("options", options, problem)
    return options, key


def _asked_of_an_image(row: Row) -> Key:
    """A choice by its options, or between yes and no; else a text, whose order of words counts."""
    if row.get("options") is not None:
        return _choice(row)
    answer, options = text(row, "answer").casefold(), ("yes", "no")
    if "kind" not in row and answer in options:
        return options, options.index(answer)
    return value_of({"kind": "text"} | row)


TREC = ["input, query_id, corpus_id, label", "note, trial, label"]


class Format(NamedTuple):
    """How one format is recognised and read."""

    key: Callable[[Row], Key] | None  # None: format `text`, whose records are no questions
    required: list[str]  # the fields of a record, in each of the format's variants
    id: str = "id"
    subject: str = "subject"
    rationale: str = ""  # "": records of this format have none
    also: str = ""  # further fields that are read
    number: tuple[str, int] | None = None  # the field where the key may be a number; the first's number
    reword: Callable[[Row], Row] = lambda row: row  # makes the field `question`

    @property
    def fields(self) -> set[str]:
        """All fields that are read."""
        names = {self.id, self.subject, self.rationale, *", ".join([self.also, *self.required]).split(", ")}
        return names - {""}


PUBMEDQA = ["QUESTION, CONTEXTS, final_decision", "question, context, final_decision"]
MEDCALC = "Patient Note, Question, Ground Truth Answer, Output Type, Lower Limit, Upper Limit"
VALUE = "kind, lower, upper, tolerance, unit, labels, aliases, order"
OWN = f"options, answer_as, {VALUE}, facts, task, image, images"
FORMATS = {
    "plain": Format(_own, ["question, options, answer"], rationale="rationale", also=OWN),
    "open": Format(_own, ["question, kind, answer"], rationale="rationale", also=OWN),
    "medqa": Format(published.medqa, ["question, options, answer_idx"], subject="meta_info", also="answer"),
    "mmlu_pro": Format(
        published.mmlu_pro, ["question, options, answer, answer_index"], "question_id", "category"
    ),
    "mmlu": Format(published.mmlu, ["question, choices, answer"], number=("answer", 0)),
    "medmcqa": Format(
        published.medmcqa,
        ["question, opa, opb, opc, opd, cop"],
        "id",
        "subject_name",
        "exp",
        number=("cop", 1),
    ),
    "pubmedqa": Format(
        published.pubmedqa,
        PUBMEDQA,
        rationale="long_answer",
        also="pubid, LONG_ANSWER",
        reword=published.with_abstract,
    ),
    "medcalc": Format(
        published.medcalc,
        [MEDCALC],
        "Row Number",
        "Calculator Name",
        "Ground Truth Explanation",
        reword=published.with_note,
    ),
    "trec": Format(published.trec, TREC, also="query_id, corpus_id", reword=published.with_trial),
    "vqa": Format(_asked_of_an_image, ["image, question, answer", "images, question, answer"], also=OWN),
    "text": Format(None, ["response", "text"], also="prompt, image, images"),
}


def parse(row: Row, name: str, default_id: str) -> Question | Example:
    """The checked question, or in format `text` the example, of a record in format `name`."""
    form = FORMATS[name]
    if form.key is None:
        return parse_example(row)
    key = form.key(row)
    return _question(form.reword(row), default_id, key, form)


def parse_example(row: Row) -> Example:
    if "text" in row and "response" not in row:
        return Example("", text(row, "text", strip=False), images_of(row))
    prompt = text(row, "prompt", strip=False, empty=True) if row.get("prompt") else ""
    return Example(prompt, text(row, "response", strip=False), images_of(row))


def check_question(question: Question, default_id: str) -> Question:
    """A `Question` that was made in Python, by the rules for records."""
    row, options, answer, value = vars(question), (), question.answer, question.value
    if question.options or value is None:
        options = options_of(row, "options")
    if value is not None and (answer != -1 or (options and value != several(question.right, len(options)))):
        raise DataError("field value: given beside another answer or options; take one of the two out")
    if value is None and (type(answer) is not int or not 0 <= answer < len(options)):
        remedy = f"give the index of the right one of its {len(options)} options, counted from 0"
        raise DataError(f"field answer: {short(answer)}: {remedy}")
    key = options, answer if value is None else value
    return _question(row, default_id, key, FORMATS["plain"])


def _question(row: Row, default_id: str, key: Key, form: Format) -> Question:
    def optional(field: str) -> str:
        return text(row, field, empty=True) if field and row.get(field) is not None else ""

    name, (options, answer) = row.get(form.id), key
    if name is not None and (isinstance(name, bool) or not isinstance(name, int | str)):
        raise wrong(form.id, name, "is neither a string nor an integer; give one of these")
    return Question(
        id=default_id if name in (None, "") else str(name),
        question=text(row, "question"),
        options=options,
        answer=-1 if isinstance(answer, Reference) else answer,
        subject=optional(form.subject),
        rationale=optional(form.rationale) or None,
        value=answer if isinstance(answer, Reference) else None,
        task=optional("task") if "task" in form.also else "",
        facts=facts_of(row) if "facts" in form.also else (),
        images=images_of(row) if "images" in form.also else (),
    )


# ---- which format a record has ----

GENERAL = ("plain", "open", "vqa", "text")  # formats of no published set


def fits(row: Row, name: str) -> bool:
    return any(row.keys() >= set(fields.split(", ")) for fields in FORMATS[name].required)


def detect(row: Row, where: str) -> str:
    """The format whose fields the record has; a general one only where no published format fits."""
    names = [name for name in FORMATS if fits(row, name)]
    names = [name for name in names if name not in GENERAL] or names[:1]
    if len(names) == 1:
        return names[0]
    problem = f"fit {' and '.join(names)} alike; " if names else "fit no format; rename them, or "
    known = "; ".join(f"{name}: {' or '.join(form.required)}" for name, form in FORMATS.items())
    problem = f"{where}: fields {field_names(row)} {problem}set format"
    raise DataError(f"{problem}. The formats and their fields are {known}")
