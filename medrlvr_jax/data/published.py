"""Published sets of questions with images, as settings: `data: {format: slake, path: test.json}`.

Each entry holds settings of `SetConfig`, below those that a config itself gives. All are read in the format
`vqa`: by their options, else between yes and no where the answer is one of them, else as a text. What their
fields were checked against:

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
"""

import dataclasses
from typing import Any

from medrlvr_jax.config.schema import SetConfig

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
