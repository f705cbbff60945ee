"""Published sets with images: an invented record of each, and the question that it becomes."""

import json

import pytest

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data import load, published
from medrlvr_jax.data.question import DataError
from medrlvr_jax.data.values import Reference

FOUR = {"option_A": "liver", "option_B": "lung", "option_C": "heart", "option_D": "brain"}
OMNI = FOUR | {"dataset": "X", "question_id": "X_1", "question": "Which organ?", "gt_answer": "lung"}
OMNI |= {"image_path": "Images/1.png", "modality_type": "CT", "question_type": "Anatomy Identification"}
PMC = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
PMC += "a.jpg,Which plane? , Axial, A:Axial , B:Coronal , C:Sagittal , D:Oblique ,A\n"
SLAKE = {"img_name": "x/s.jpg", "question": "Is it a lung?", "answer": "Yes", "q_lang": "en", "qid": 3}
SLAKE |= {"modality": "CT", "content_type": "Organ", "answer_type": "CLOSED"}
RAD = {"qid": "7", "image_name": "s.jpg", "image_organ": "HEAD", "question_type": "PRES", "answer": "No "}
XPERT = {"id": "MM-0", "question": "Which?\nAnswer Choices: (A) x (B) y", "options": {"A": "x", "B": "y"}}
XPERT |= {
    "label": "B",
    "images": ["a.jpeg", "b.jpeg"],
    "medical_task": "Treatment",
    "body_system": "Skeletal",
}
THINKER = {"images": ["a.png"], "question": "Which?", "options": '{"A": "x", "B": "y"}', "answer": "y"}
CASES = {
    "omnimedvqa": ([OMNI], "Which organ?", ("liver", "lung", "heart", "brain"), "B", "CT"),
    "med_r1": (
        [
            {
                "image": "Images/1.png",
                "problem": "Which stain, (a) or (b)? A)H (E), B)PAS, C)Giemsa",
                "solution": "<answer> C </answer>",
            }
        ],
        "Which stain, (a) or (b)?",
        ("H (E)", "PAS", "Giemsa"),
        "C",
        "",
    ),
    "pmc_vqa": (PMC, "Which plane?", ("Axial", "Coronal", "Sagittal", "Oblique"), "A", ""),
    "vqa_rad": ([RAD | {"question": "Is it infarcted?"}], "Is it infarcted?", ("yes", "no"), "B", "HEAD"),
    "slake": ([SLAKE | {"q_lang": "zh"}, SLAKE], "Is it a lung?", ("yes", "no"), "A", "CT"),
    "medxpertqa": ([XPERT], "Which?", ("x", "y"), "B", "Skeletal"),
    "medvlthinker": ([THINKER | {"answer_label": "B", "dataset_name": "s"}], "Which?", ("x", "y"), "B", "s"),
}


def read(tmp_path, name, records, **settings):
    file = tmp_path / ("set.csv" if isinstance(records, str) else "set.json")
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    return load.read(SetConfig(path=str(file), format=name, **settings))


@pytest.mark.parametrize("name", published.SETS)
def test_a_record_becomes_a_question(tmp_path, name):
    records, *want = CASES[name]
    [question], report = read(tmp_path, name, records, image_folder="films")
    assert [question.question, question.options, question.reference, question.subject] == want
    assert all(image.startswith(f"{tmp_path}/films/") for image in question.images) and question.images
    assert f"published set {name}" in report


def test_tasks_and_settings_of_the_config_itself(tmp_path):
    assert read(tmp_path, "omnimedvqa", [OMNI])[0][0].task == "Anatomy Identification"
    odd = OMNI | {"modality": "CT scan"}
    assert read(tmp_path, "omnimedvqa", [odd], fields={"subject": "modality"})[0][0].subject == "CT scan"


def test_open_and_closed_questions_of_the_hub(tmp_path):
    """VQA-RAD and PathVQA on the hub: yes or no is a choice, any other answer a text."""
    rows = [{"image": b"x", "question": "Is it?", "answer": "yes"}]
    rows += [rows[0] | {"question": "Where is it?", "answer": "in the spleen"}]
    closed, text = load.read(SetConfig(path="python:data"), rows)[0]
    assert (closed.options, closed.answer) == (("yes", "no"), 0)
    assert text.value == Reference("text", "in the spleen")
    nulls = [row | {"kind": None, "options": None} for row in rows]  # as parquet fills absent fields
    spec = SetConfig(path="python:data", format="vqa", constants={"answer_as": "text"})
    assert load.read(spec, nulls)[0] == [closed, text]
    films = [rows[0] | {"image": bytes([n])} for n in range(2)]
    assert "repeats" not in load.read(SetConfig(path="python:data"), films)[1]


def test_patterns_are_refused_by_name(tmp_path):
    row = {"problem": "Which? x, y", "solution": "<answer> A </answer>"}
    with pytest.raises(DataError, match=r"field problem: 'Which\? x, y' does not match patterns.problem"):
        read(tmp_path, "med_r1", [row])
    with pytest.raises(DataError, match=r"patterns\.a: '\.\*' names no part"):
        read(tmp_path, "plain", [row], patterns={"a": ".*"})
    with pytest.raises(DataError, match=r"patterns.a: '\(' is not a regular expression"):
        read(tmp_path, "plain", [row], patterns={"a": "("})
