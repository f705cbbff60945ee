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

A check that fails raises `DataError` with the field, the value and the remedy; load.py adds file and line.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from io import BytesIO
from reprlib import repr as short
from typing import Any, NamedTuple

from medrlvr_jax.data.question import LABEL, LETTERS, DataError, Example, Key, Question, several, unlabelled
from medrlvr_jax.data.values import Reference, Unreadable, read_reference

Row = dict[str, Any]


# ---- checks of single fields ----

HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair


def field_names(row: Row) -> str:
    """The names of a record's fields, for messages: all, since the one that matters may be the last."""
    names = [short(name) for name in row]
    return f"[{', '.join(names[:50])}{', …' if len(names) > 50 else ''}]"


def _wrong(field: str, value: Any, problem: str) -> DataError:
    return DataError(f"field {field}: {short(value)} {problem}")


def _needed(row: Row, field: str) -> Any:
    if row.get(field) is None:
        raise DataError(f"field {field}: needed, and not there; the record has {field_names(row)}")
    return row[field]


def _text(row: Row, field: str, strip: bool = True, empty: bool = False) -> str:
    value = _needed(row, field)
    if not isinstance(value, str):
        raise _wrong(field, value, "is not a string; put quotes around it")
    if not value.strip() and not empty:
        raise _wrong(field, value, "is blank; give a text, or take the record out")
    if not value.isascii() and HALF.search(value):
        raise _wrong(field, value, "holds half a surrogate pair (a lone \\ud8…); write the character again")
    return value.strip() if strip else value


def _options(row: Row, field: str) -> tuple[str, ...]:
    """2 to 10 options from a list or from {"A": …}. Records of one set may differ in number."""
    value = _needed(row, field)
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}  # parquet fills missing letters with null
        if set(value) != set(LETTERS[: len(value)]):
            problem = f"letters {short(list(value))} are not A, B, C … without a gap, up to {LETTERS[-1]}"
            raise DataError(f"field {field}: {problem}; name each option by its letter")
        value = [value[letter] for letter in LETTERS[: len(value)]]
    if not isinstance(value, list | tuple):
        remedy = "a list of options is needed, or an object by letter; in CSV, a column A, B, … for each"
        raise DataError(f"field {field}: {short(value)}: {remedy}")
    options = tuple(_text({(name := f"{field} {i}"): option}, name) for i, option in enumerate(value, 1))
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"field options: {len(options)} of them; a question has 2 to {len(LETTERS)}")
    return options


def _integer(value: Any) -> int | None:
    """An integer, or digits as CSV brings them; None for everything else."""
    if isinstance(value, str) and re.fullmatch(r" *-?[0-9]{1,9} *", value):
        return int(value)
    return value if type(value) is int else None


def _letter(row: Row, field: str, options: tuple[str, ...]) -> int:
    """The index of the option whose letter the field holds."""
    value = _needed(row, field)
    if _integer(value) is not None:
        remedy = 'give the letter, such as "B"; or set constants={answer_as: from_0}, or from_1'
        raise _wrong(field, value, f"is a number where a letter is needed; {remedy}")
    letter = _text(row, field).upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise _wrong(field, value, f"is not the letter of one of its {len(options)} options")
    return LETTERS.index(letter)


def facts_of(row: Row) -> tuple[tuple[str, ...], ...]:
    """What a good thought states: each fact a text, or the texts that state it."""
    facts = row.get("facts") or ()
    if not isinstance(facts, list | tuple):
        raise _wrong("facts", facts, "is not a list; give a list of texts, or of lists of texts")
    wordings = [fact if isinstance(fact, list | tuple) and fact else [fact] for fact in facts]
    return tuple(
        tuple(_text({(name := f"facts {i}"): text}, name) for text in fact)
        for i, fact in enumerate(wordings, 1)
    )


def _images(row: Row) -> tuple[str | bytes, ...]:
    """The field `image`, or the list `images`: paths, bytes of files, or images of datasets or Pillow."""
    if row.get("image") is not None and row.get("images") is not None:
        raise DataError("field images: given beside image; take one of the two out")
    given = row.get("images") if row.get("image") is None else row["image"]
    many = given if isinstance(given, list | tuple) else () if given is None else (given,)
    return tuple(_image(value) for value in many)


def _image(value: Any) -> str | bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if hasattr(value, "getbands"):  # Pillow's
        out = BytesIO()
        value.save(out, "PNG")
        value = out.getvalue()
    if not isinstance(value, str | bytes) or not value:
        raise _wrong("image", value, "is no image; give the path of a file, or its bytes")
    return value


def _value(row: Row) -> Key:
    """The value that the fields `kind`, `answer` and those beside them hold, and no options."""
    _needed(row, "answer")
    try:
        return (), read_reference(row)
    except Unreadable as e:
        raise DataError(str(e)) from None


# ---- the formats ----


def _own(row: Row) -> Key:
    """A question of one's own: by its options or, where it has none, by its value. A file may have both."""
    if "kind" in row and "options" not in row:
        return _value(row)
    options, key = _options_and_key(row)
    if len(set(unlabelled(options))) < len(options):
        problem = "has one text twice: a right answer could count as wrong; change one"
        raise _wrong("options", options, problem)
    return options, key


def _options_and_key(row: Row) -> Key:
    """`options`, and what `answer` says is right: one of them, or several in a list or between commas."""
    row = _lettered(row)
    options, answer = _options(row, "options"), _needed(row, "answer")
    if isinstance(answer, str) and (place := _place_of_text(answer, options)) is not None:
        return options, place
    if isinstance(answer, str) and row.get("answer_as") != "text" and re.search("[,;]", answer):
        answer = re.split("[,;]", answer)
    if not isinstance(answer, list | tuple):
        return options, _place(row, "answer", options)
    places = {_place(row | {"answer": each}, "answer", options) for each in answer}
    if not places or len(places) < len(answer):
        raise _wrong("answer", answer, "names no option, or one twice; give each right option once")
    return options, several(places, len(options))


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


def _place_of_text(answer: str, options: tuple[str, ...]) -> int | None:
    """The index of the one option whose text the answer is, as "heparin" or "B. heparin"; None where it is a
    letter or a number, or no option's text.
    """
    text = answer.strip()
    if len(text) == 1 or _integer(text) is not None:
        return None
    own = unlabelled(options)
    label = LABEL.match(text)
    if label and (i := LETTERS.find(label[1].upper())) in range(len(own)) and text[label.end() :] == own[i]:
        return i
    return own.index(text) if own.count(text) == 1 else None


def _asked_of_an_image(row: Row) -> Key:
    """A choice by its options, or between yes and no; else a text, whose order of words counts."""
    if row.get("options") is not None:
        return _options_and_key(row)
    answer, options = _text(row, "answer"), ("yes", "no")
    if "kind" not in row and answer.casefold() in options:
        return options, options.index(answer.casefold())
    return _value({"kind": "text"} | row)


def _place(row: Row, field: str, options: tuple[str, ...]) -> int:
    """The index of the right option, which the field gives as `answer_as` says: by default its letter."""
    how = row.get("answer_as") or "letter"
    if how == "letter":
        return _letter(row, field, options)
    if how == "text":
        text = _text(row, field)
        if text not in options:
            raise _wrong(field, text, f"is not the text of one of its {len(options)} options")
        return options.index(text)
    if how not in ("from_0", "from_1"):
        raise _wrong("answer_as", how, "is none of letter, from_0, from_1, text; give one of these")
    first, number = int(how[-1]), _integer(_needed(row, field))
    if number is None or not first <= number < len(options) + first:
        problem = f"is not the number of one of its {len(options)} options, counted from {first}"
        raise _wrong(field, row[field], problem)
    return number - first


def _medqa(row: Row) -> Key:
    options = _options(row, "options")
    key = _letter(row, "answer_idx", options)
    if "answer" in row and _text(row, "answer") not in (options[key], unlabelled(options)[key]):
        problem = f"is not option {LETTERS[key]}, {short(options[key])}; correct one of the two"
        raise _wrong("answer", row["answer"], problem)
    return options, key


def _mmlu_pro(row: Row) -> Key:
    options = _options(row, "options")
    key = _letter(row, "answer", options)
    if _integer(index := row.get("answer_index")) != key:
        problem = f"is not {key}, the index of answer {LETTERS[key]}; correct one of the two"
        raise _wrong("answer_index", index, problem)
    return options, key


def _mmlu(row: Row) -> Key:
    options, index = _options(row, "choices"), row.get("answer")
    if type(index) is not int:
        return options, _letter(row, "answer", options)
    if not 0 <= index < len(options):
        problem = f"is not the index of one of the {len(options)} choices, counted from 0"
        raise _wrong("answer", index, problem)
    return options, index


def _medmcqa(row: Row) -> Key:
    options, cop = tuple(_text(row, "op" + letter) for letter in "abcd"), row.get("cop")
    if "cop" in row and cop in (None, -1):
        raise DataError("field cop: no key, as in the test split; take the train or validation split")
    if (index := _integer(cop)) is None:
        return options, _letter(row, "cop", options)
    if not 1 <= index <= 4:  # a file that counts from 0 almost surely has a 0, so the whole file is refused
        raise _wrong("cop", cop, "is not 1 to 4; files count from 1, so add 1 to all if yours counts from 0")
    return options, index - 1


def _pubmedqa(row: Row) -> Key:
    options, decision = ("yes", "no", "maybe"), _text(row, "final_decision")
    if decision not in options:
        raise _wrong("final_decision", decision, "is none of yes, no, maybe; give one of these")
    return options, options.index(decision)


def _medcalc(row: Row) -> Key:
    """Weeks and days are of the output type `integer` there, and dates are written month first."""
    output, truth = _text(row, "Output Type"), _text(row, "Ground Truth Answer")
    kinds = {"decimal": "number", "integer": "integer", "date": "date"}
    if output not in kinds:
        raise _wrong("Output Type", output, f"is none of {', '.join(kinds)}; give one of these")
    kind = "duration" if "week" in truth else kinds[output]
    limits = {}
    if kind == "number":
        limits = {"lower": _text(row, "Lower Limit"), "upper": _text(row, "Upper Limit")}
    return _value({"kind": kind, "answer": truth, "order": "month_first"} | limits)


def _with_note(row: Row) -> Row:
    """MedCalc-Bench's record with the patient's note before the question."""
    return row | {"question": f"{_text(row, 'Patient Note')}\n\n{_text(row, 'Question')}"}


def _with_abstract(row: Row) -> Row:
    """PubMedQA's question after its abstract without the conclusion; the conclusion is the rationale."""
    if "QUESTION" in row:
        context, conclusion = {"contexts": row.get("CONTEXTS")}, row.get("LONG_ANSWER")
        row = {"question": row["QUESTION"], "context": context, "long_answer": conclusion} | row
    paragraphs = row["context"].get("contexts") if isinstance(row.get("context"), dict) else None
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise DataError(f"field context: {short(paragraphs)}: a list of the abstract's paragraphs is needed")
    return {"id": row.get("pubid")} | row | {"question": "\n".join([*paragraphs, _text(row, "question")])}


# What TREC's labels 0, 1, 2 mean. EHRMIND's prompts say "Excluded" for 0 and "Irrelevant" for 1.
ELIGIBILITY = ("not relevant", "excluded", "eligible")
ASKED = (
    "Is the patient eligible for the clinical trial? Eligible: the patient meets the inclusion criteria, and "
    "no exclusion criterion applies. Excluded: an exclusion criterion applies to a patient who meets the "
    "inclusion criteria. Not relevant: the trial is not for such a patient, or the note does not tell."
)
# Where EHRMIND's prompts have the note and the trial.
PAIR = re.compile(r"patient note:\n(.*?)\n\nHere is the clin\w+ trial:\n(.*?)\n-{9,}", re.S)


def _trec(row: Row) -> Key:
    label = _integer(_needed(row, "label"))
    if label not in (0, 1, 2):
        meaning = ", ".join(f"{i} {name}" for i, name in enumerate(ELIGIBILITY))
        raise _wrong("label", row["label"], f"is none of TREC's labels: {meaning}; give one of these")
    return _value({"kind": "label", "answer": ELIGIBILITY[label], "labels": ELIGIBILITY})


def _with_trial(row: Row) -> Row:
    """Note, trial and question, from the record's own fields or out of EHRMIND's prompt."""
    if "input" in row:
        pair = PAIR.search(_text(row, "input"))
        if not pair:
            raise _wrong("input", row["input"], "has no note and trial as in EHRMIND's prompts; give them")
        row = row | {"note": pair[1], "trial": pair[2], "id": f"{row['query_id']} {row['corpus_id']}"}
    texts = f"Patient: {_text(row, 'note')}\n\nTrial: {_text(row, 'trial')}\n\n{ASKED}"
    return row | {"question": texts}


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
    "medqa": Format(_medqa, ["question, options, answer_idx"], subject="meta_info", also="answer"),
    "mmlu_pro": Format(_mmlu_pro, ["question, options, answer, answer_index"], "question_id", "category"),
    "mmlu": Format(_mmlu, ["question, choices, answer"], number=("answer", 0)),
    "medmcqa": Format(
        _medmcqa, ["question, opa, opb, opc, opd, cop"], "id", "subject_name", "exp", number=("cop", 1)
    ),
    "pubmedqa": Format(
        _pubmedqa, PUBMEDQA, rationale="long_answer", also="pubid, LONG_ANSWER", reword=_with_abstract
    ),
    "medcalc": Format(
        _medcalc,
        [MEDCALC],
        "Row Number",
        "Calculator Name",
        "Ground Truth Explanation",
        reword=_with_note,
    ),
    "trec": Format(_trec, TREC, also="query_id, corpus_id", reword=_with_trial),
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
        return Example("", _text(row, "text", strip=False), _images(row))
    prompt = _text(row, "prompt", strip=False, empty=True) if row.get("prompt") else ""
    return Example(prompt, _text(row, "response", strip=False), _images(row))


def check_question(question: Question, default_id: str) -> Question:
    """A `Question` that was made in Python, by the rules for records."""
    row, options, answer, value = vars(question), (), question.answer, question.value
    if question.options or value is None:
        options = _options(row, "options")
    if value is not None and (answer != -1 or (options and value != several(question.right, len(options)))):
        raise DataError("field value: given beside another answer or options; take one of the two out")
    if value is None and (type(answer) is not int or not 0 <= answer < len(options)):
        remedy = f"give the index of the right one of its {len(options)} options, counted from 0"
        raise DataError(f"field answer: {short(answer)}: {remedy}")
    key = options, answer if value is None else value
    return _question(row, default_id, key, FORMATS["plain"])


def _question(row: Row, default_id: str, key: Key, form: Format) -> Question:
    def optional(field: str) -> str:
        return _text(row, field, empty=True) if field and row.get(field) is not None else ""

    name, (options, answer) = row.get(form.id), key
    if name is not None and (isinstance(name, bool) or not isinstance(name, int | str)):
        raise _wrong(form.id, name, "is neither a string nor an integer; give one of these")
    value = answer if isinstance(answer, Reference) else None
    return Question(
        id=default_id if name in (None, "") else str(name),
        question=_text(row, "question"),
        options=options,
        answer=-1 if isinstance(answer, Reference) else answer,
        subject=optional(form.subject),
        rationale=optional(form.rationale) or None,
        value=value,
        task=optional("task") if "task" in form.also else "",
        facts=facts_of(row) if "facts" in form.also else (),
        images=_images(row) if "images" in form.also else (),
    )


def key_of(row: Row) -> Key:
    """The options and the key of a record with `options` and `answer`, or with `kind` and `answer`."""
    if "kind" in row and "options" not in row:
        return _value(row)
    options, key = _options_and_key(row)
    return unlabelled(options), key


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


def unread(fields: Iterable[str], name: str) -> list[str]:
    """Those of a set's fields that format `name` does not read."""
    return [field for field in fields if field not in FORMATS[name].fields]
