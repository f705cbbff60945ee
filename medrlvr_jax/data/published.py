"""Published sets: those with images as settings, those of texts as functions of a record.

`data: {format: slake, path: test.json}` names a set with images. Its entry in `SETS` holds settings of
`SetConfig`, below those that a config itself gives. All are read in the format `vqa`: by their options, else
between yes and no where the answer is one of them, else as a text. What their fields were checked against:

- omnimedvqa: OmniMedVQA's QA_information/*/*.json; names of fields in MedVLThinker's scripts (a3163b1). Chest
  CT Scan.json has `modality` where the others have `modality_type`: fields={subject: modality}.
- med_r1: Med-R1's Splits/*/*.json (88d76c7), which are OmniMedVQA with the options in the text. All 108,156
  records of the 25 files that could be read; the two largest, of training, could not.
- pmc_vqa: train.csv and test.csv; loaders of the authors (73bb633) and of MedVLThinker. In train_2.csv and
  test_2.csv the letter stands in Answer, by a third party's script: fields={answer: Answer}.
- vqa_rad: VQA_RAD Dataset Public.json; records quoted in others' loaders.
- slake: train.json, validate.json, test.json; all 14,028 records in PMC-VQA's repository (97358cd), of which
  the English half is used. One has a blank answer: on_bad=skip.
- medxpertqa: MM/*.jsonl, or the hub's subset MM; its card, and one record in a notebook.
- medvlthinker: the hub's med-vlrm/med-vlm-eval-v2 and kin; the script that writes them (a3163b1).

On the hub VQA-RAD and PathVQA have `image`, `question`, `answer`, and are recognised as `vqa`.

A set of texts is a format of its own (formats.py), which its fields tell: here are its options and key, and
the question where a record has it in parts.
"""

import dataclasses
import re
from reprlib import repr as short
from typing import Any

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data.question import LETTERS, DataError, Key, unlabelled
from medrlvr_jax.data.record import Row, integer, needed, one_of, options_of, place_of, text, value_of, wrong

# ---- sets with images ----

PARTS = ("fields", "constants", "where", "patterns")  # of `SetConfig`: how records are read

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
        },
    },
    "vqa_rad": {
        "fields": {
            "id": "qid",
            "image": "image_name",
            "subject": "image_organ",
            "task": "question_type",
        },
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


def resolved(spec: SetConfig) -> SetConfig:
    """The settings by which a published set is read, below those that `spec` itself gives."""
    if spec.format not in SETS:
        return spec
    known = SETS[spec.format]
    parts = {part: known.get(part, {}) | getattr(spec, part) for part in PARTS}
    return dataclasses.replace(spec, format="vqa", **parts)


# ---- sets of texts ----


def medqa(row: Row) -> Key:
    options = options_of(row, "options")
    key = place_of(needed(row, "answer_idx"), "answer_idx", options)
    if "answer" in row and text(row, "answer") not in (options[key], unlabelled(options)[key]):
        problem = f"is not option {LETTERS[key]}, {short(options[key])}; correct one of the two"
        raise wrong("answer", row["answer"], problem)
    return options, key


def mmlu_pro(row: Row) -> Key:
    options = options_of(row, "options")
    key = place_of(needed(row, "answer"), "answer", options)
    if integer(index := row.get("answer_index")) != key:
        problem = f"is not {key}, the index of answer {LETTERS[key]}; correct one of the two"
        raise wrong("answer_index", index, problem)
    return options, key


def mmlu(row: Row) -> Key:
    options, answer = options_of(row, "choices"), needed(row, "answer")
    return options, place_of(answer, "answer", options, "from_0" if type(answer) is int else "letter")


def medmcqa(row: Row) -> Key:
    if row.get("cop", "") in (None, -1):
        raise DataError("field cop: no key, as in the test split; take the train or validation split")
    options, cop = tuple(text(row, f"op{letter}") for letter in "abcd"), needed(row, "cop")
    return options, place_of(cop, "cop", options, "letter" if integer(cop) is None else "from_1")


def pubmedqa(row: Row) -> Key:
    options = ("yes", "no", "maybe")
    return options, one_of(row, "final_decision", options)


def with_abstract(row: Row) -> Row:
    """PubMedQA's question after its abstract without the conclusion; the conclusion is the rationale."""
    if "QUESTION" in row:
        context, conclusion = {"contexts": row.get("CONTEXTS")}, row.get("LONG_ANSWER")
        row = {"question": row["QUESTION"], "context": context, "long_answer": conclusion} | row
    paragraphs = row["context"].get("contexts") if isinstance(row.get("context"), dict) else None
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise DataError(f"field context: {short(paragraphs)}: a list of the abstract's paragraphs is needed")
    return {"id": row.get("pubid")} | row | {"question": "\n".join([*paragraphs, text(row, "question")])}


def medcalc(row: Row) -> Key:
    """Weeks and days are of the output type `integer` there, and dates are written month first."""
    kind = ("number", "integer", "date")[one_of(row, "Output Type", ("decimal", "integer", "date"))]
    truth, limits = text(row, "Ground Truth Answer"), {}
    if "week" in truth:
        kind = "duration"
    if kind == "number":
        limits = {"lower": text(row, "Lower Limit"), "upper": text(row, "Upper Limit")}
    return value_of({"kind": kind, "answer": truth, "order": "month_first"} | limits)


def with_note(row: Row) -> Row:
    """MedCalc-Bench's record with the patient's note before the question."""
    return row | {"question": f"{text(row, 'Patient Note')}\n\n{text(row, 'Question')}"}


# What TREC's labels 0, 1, 2 mean. EHRMIND's prompts say "Excluded" for 0 and "Irrelevant" for 1.
ELIGIBILITY = ("not relevant", "excluded", "eligible")
ASKED = (
    "Is the patient eligible for the clinical trial? Eligible: the patient meets the inclusion criteria, and "
    "no exclusion criterion applies. Excluded: an exclusion criterion applies to a patient who meets the "
    "inclusion criteria. Not relevant: the trial is not for such a patient, or the note does not tell."
)
# Where EHRMIND's prompts have the note and the trial.
PAIR = re.compile(r"patient note:\n(.*?)\n\nHere is the clin\w+ trial:\n(.*?)\n-{9,}", re.S)


def trec(row: Row) -> Key:
    label = integer(needed(row, "label"))
    if label not in (0, 1, 2):
        meaning = ", ".join(f"{i} {name}" for i, name in enumerate(ELIGIBILITY))
        raise wrong("label", row["label"], f"is none of TREC's labels: {meaning}; give one of these")
    return value_of({"kind": "label", "answer": ELIGIBILITY[label], "labels": ELIGIBILITY})


def with_trial(row: Row) -> Row:
    """Note, trial and question, from the record's own fields or out of EHRMIND's prompt."""
    if "input" in row:
        pair = PAIR.search(text(row, "input"))
        if not pair:
            raise wrong("input", row["input"], "has no note and trial as in EHRMIND's prompts; give them")
        row = row | {"note": pair[1], "trial": pair[2], "id": f"{row['query_id']} {row['corpus_id']}"}
    texts = f"Patient: {text(row, 'note')}\n\nTrial: {text(row, 'trial')}\n\n{ASKED}"
    return row | {"question": texts}
