"""Published sets: those with images as settings, those with text as functions of a record.

A set with images is named by `format`, as in `data: {format: slake, path: test.json}`. Its entry in `SETS`
holds settings of `SetConfig`; the config's own settings take precedence. Its records are read in the format
`vqa`. The page *Questions with images* lists the source against which each set's fields were checked.

A set with text is a format of its own in formats.py. Here is a function for each: it checks a record, and
returns it in the format `plain` or `open`.
"""

import dataclasses
import re
from reprlib import repr as short
from typing import Any

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data import record
from medrlvr_jax.data.question import LETTERS, DataError, strip_labels
from medrlvr_jax.data.record import Row

# ---- sets with images ----

FIELD_SETTINGS = ("fields", "constants", "where", "patterns")  # of `SetConfig`: see fields.py

# "Which organ is it? A)liver, B)lung", two to four options
INLINE = r"(?P<question>.*?)\s*A\)(?P<A>.*?),\s*B\)(?P<B>.*?)(?:,\s*C\)(?P<C>.*?))?(?:,\s*D\)(?P<D>.*?))?"

SETS: dict[str, dict[str, dict[str, Any]]] = {
    "omnimedvqa": {
        "fields": {
            "id": "question_id",
            "options": ["option_A", "option_B", "option_C", "option_D"],
            "answer": "gt_answer",
            "image": "image_path",
            "subject": "modality_type",
            "task": "question_type",
        },
        "constants": {"answer_as": "text"},
    },
    "med_r1": {
        "patterns": {"problem": INLINE, "solution": r"<answer>\s*(?P<answer>[A-D])\s*</answer>"},
        "fields": {"options": ["A", "B", "C", "D"]},
    },
    "pmc_vqa": {
        "fields": {
            "question": "Question",
            "options": ["Choice A", "Choice B", "Choice C", "Choice D"],
            "answer": "Answer_label",
            "image": "Figure_path",
        }
    },
    "vqa_rad": {
        "fields": {"id": "qid", "image": "image_name", "subject": "image_organ", "task": "question_type"}
    },
    "slake": {
        "fields": {"id": "qid", "image": "img_name", "subject": "modality", "task": "content_type"},
        "where": {"q_lang": "en"},
    },
    "medxpertqa": {
        "patterns": {"question": r"(?P<question>.*?)(?:\nAnswer Choices:.*)?"},
        "fields": {"answer": "label", "subject": "body_system", "task": "medical_task"},
    },
    "medvlthinker": {"fields": {"answer": "answer_label", "subject": "dataset_name"}},
}


def resolve(spec: SetConfig) -> SetConfig:
    """Add the settings of the published set that `spec.format` names; those of `spec` take precedence."""
    if spec.format not in SETS:
        return spec
    known = SETS[spec.format]
    merged = {name: known.get(name, {}) | getattr(spec, name) for name in FIELD_SETTINGS}
    return dataclasses.replace(spec, format="vqa", **merged)


# ---- sets with text: from their records to those of `plain` and `open` ----


def _plain(row: Row, id: str = "id", subject: str = "subject", rationale: str = "", **key: Any) -> Row:
    """Return a record in the format `plain` or `open`; `key` has its options and answer."""
    texts = {"subject": record.optional_text(row, subject), "rationale": record.optional_text(row, rationale)}
    return {"id": record.id_of(row, id), "question": record.text_of(row, "question")} | texts | key


def medqa(row: Row) -> Row:
    options = record.options_of(row, "options")
    right = record.option_index(record.required(row, "answer_idx"), "answer_idx", options)
    texts = (options[right], strip_labels(options)[right])
    if "answer" in row and record.text_of(row, "answer") not in texts:
        problem = f"is not option {LETTERS[right]}, {short(options[right])}; correct one of the two"
        raise record.bad_field("answer", row["answer"], problem)
    return _plain(row, subject="meta_info", options=options, answer=LETTERS[right])


def mmlu_pro(row: Row) -> Row:
    options = record.options_of(row, "options")
    right = record.option_index(record.required(row, "answer"), "answer", options)
    if record.as_integer(index := row.get("answer_index")) != right:
        problem = f"is not {right}, the index of answer {LETTERS[right]}; correct one of the two"
        raise record.bad_field("answer_index", index, problem)
    return _plain(row, "question_id", "category", options=options, answer=LETTERS[right])


def mmlu(row: Row) -> Row:
    options, answer = record.options_of(row, "choices"), record.required(row, "answer")
    answer_as = "from_0" if type(answer) is int else "letter"
    right = record.option_index(answer, "answer", options, answer_as)
    return _plain(row, options=options, answer=LETTERS[right])


def medmcqa(row: Row) -> Row:
    if row.get("cop", "") in (None, -1):
        raise DataError("field cop: there is no key, as in the test split; use the train or validation split")
    options, cop = tuple(record.text_of(row, f"op{letter}") for letter in "abcd"), record.required(row, "cop")
    answer_as = "letter" if record.as_integer(cop) is None else "from_1"
    right = record.option_index(cop, "cop", options, answer_as)
    return _plain(row, subject="subject_name", rationale="exp", options=options, answer=LETTERS[right])


def pubmedqa(row: Row) -> Row:
    """Put the abstract without its conclusion before the question. The conclusion is the rationale."""
    options = ("yes", "no", "maybe")
    right = record.index_in(options, row, "final_decision")
    if "QUESTION" in row:
        context, conclusion = {"contexts": row.get("CONTEXTS")}, row.get("LONG_ANSWER")
        row = {"question": row["QUESTION"], "context": context, "long_answer": conclusion} | row
    paragraphs = row["context"].get("contexts") if isinstance(row.get("context"), dict) else None
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise record.bad_field("context", paragraphs, "is not a list of the abstract's paragraphs; give one")
    question = "\n".join([*paragraphs, record.text_of(row, "question")])
    row = {"id": row.get("pubid")} | row | {"question": question}
    return _plain(row, rationale="long_answer", options=options, answer=LETTERS[right])


def medcalc(row: Row) -> Row:
    """MedCalc-Bench gives weeks and days the output type `integer`, and writes dates month first."""
    types = {"decimal": "number", "integer": "integer", "date": "date"}
    kind = [*types.values()][record.index_in(tuple(types), row, "Output Type")]
    answer, limits = record.text_of(row, "Ground Truth Answer"), {}
    if "week" in answer:
        kind = "duration"
    if kind == "number":
        limits = {name: record.text_of(row, f"{name.title()} Limit") for name in ("lower", "upper")}
    note, question = record.text_of(row, "Patient Note"), record.text_of(row, "Question")
    row = row | {"question": f"{note}\n\n{question}"}
    names = ("Row Number", "Calculator Name", "Ground Truth Explanation")
    return _plain(row, *names, kind=kind, answer=answer, order="month_first", **limits)


# What TREC's labels 0, 1, 2 mean. EHRMIND's prompts say "Excluded" for 0 and "Irrelevant" for 1.
ELIGIBILITY = ("not relevant", "excluded", "eligible")
ELIGIBILITY_QUESTION = (
    "Is the patient eligible for the clinical trial? Eligible: the patient meets the inclusion criteria, and "
    "no exclusion criterion applies. Excluded: an exclusion criterion applies to a patient who meets the "
    "inclusion criteria. Not relevant: the trial is not for such a patient, or the note does not tell."
)
# Matches the note and the trial in EHRMIND's prompts.
NOTE_AND_TRIAL = re.compile(r"patient note:\n(.*?)\n\nHere is the clin\w+ trial:\n(.*?)\n-{9,}", re.S)


def trec(row: Row) -> Row:
    """Note and trial are fields, or parts of EHRMIND's prompt."""
    label = record.as_integer(record.required(row, "label"))
    if label not in (0, 1, 2):
        meaning = ", ".join(f"{i} {name}" for i, name in enumerate(ELIGIBILITY))
        problem = f"is none of TREC's labels: {meaning}; give one of these"
        raise record.bad_field("label", row["label"], problem)
    if "input" in row:
        pair = NOTE_AND_TRIAL.search(record.text_of(row, "input"))
        if not pair:
            problem = "has no note and trial as EHRMIND's prompts do; give both"
            raise record.bad_field("input", row["input"], problem)
        name = " ".join(str(record.required(row, field)) for field in ("query_id", "corpus_id"))
        row = row | {"note": pair[1], "trial": pair[2], "id": name}
    note, trial = record.text_of(row, "note"), record.text_of(row, "trial")
    row = row | {"question": f"Patient: {note}\n\nTrial: {trial}\n\n{ELIGIBILITY_QUESTION}"}
    return _plain(row, kind="label", answer=ELIGIBILITY[label], labels=ELIGIBILITY)
