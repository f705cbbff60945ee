"""Open questions in every part: reading, prompts, grading, training, evaluation, scoring of a file; and refused
where a letter is needed.
"""

import json
from dataclasses import replace

import pytest
from test_train import folder, lines, main  # noqa: F401  (folder is a fixture)

from medrlvr_jax import rewards
from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data import prompts
from medrlvr_jax.data.load import load, read
from medrlvr_jax.data.options import shuffle_options
from medrlvr_jax.data.question import DataError, Question, choices_reference, fingerprint, question_hash
from medrlvr_jax.data.values import read_reference
from medrlvr_jax.evaluation import answers

ROWS = [
    {
        "question": "Sodium?",
        "kind": "number",
        "answer": 140,
        "tolerance": 0.05,
        "unit": "mmol/L",
        "subject": "lab",
    },
    {"question": "Apgar?", "kind": "integer", "answer": 7},
    {"question": "Due?", "kind": "date", "answer": "2024-03-04"},
    {"question": "How long?", "kind": "duration", "answer": "2 weeks 1 day"},
    {"question": "Trial?", "kind": "labels", "answer": ["eligible"], "labels": ["eligible", "excluded"]},
    {"question": "Which drug?", "kind": "text", "answer": "aspirin", "aliases": ["ASA"]},
    {"question": "Seen?", "kind": "label", "answer": "yes", "labels": ["yes", "no"]},
    {"question": "Which are statins?", "options": ["w", "x", "y"], "answer": "C, a"},
]
RIGHT = ["141 mmol/L", "7", "4 March 2024", "15 days", "Eligible", "asa", "Yes", "a;C"]
WRONG = ["0.2 mol/L", "8", "5 March 2024", "14 days", "excluded", "heparin", "no", "A"]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "open.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_all_that_apply(path):
    question = load(SetConfig(path=str(path), format="plain", where={"question": "Which are statins?"}))[0]
    assert (question.kind, question.reference, question.right_text) == ("choices", "A, C", "w; y")
    assert (question.right_indices, question.letters, question.choice_count) == ((0, 2), "", 0)
    given = ["C,A", "a; c", "A, B, C", "A", "A, A", "A, D", "AC"]
    verdicts = rewards.grade([f"<think>x</think><answer>{g}</answer>" for g in given], [question] * 7)
    assert verdicts.reason.tolist() == ["correct"] * 2 + ["wrong"] * 2 + [
        "repeated_label",
        "unknown_label",
        "unknown_label",
    ]
    assert verdicts.answer.tolist()[:3] == ["A, C", "A, C", "A, B, C"]
    orders = [shuffle_options(question, 0, draw) for draw in range(20)]
    assert {q.order for q in orders} == {"ABC", "ACB", "BAC", "BCA", "CAB", "CBA"}
    for q in orders:
        assert {q.options[i] for i in q.right_indices} == {"w", "y"} and q.reference == q.value.text
        assert question_hash(q) == question_hash(question)
    assert question_hash(question) != question_hash(replace(question, value=choices_reference([0], 3)))
    rows = [
        {
            "id": "1",
            "kind": "choices",
            "options": 0,
            "key": q.reference,
            "answer": q.reference,
            "order": q.order,
        }
        | {"subject": "", "correct": True, "format_ok": True}
        for q in orders
    ]
    found = answers.from_rows(rows, "here")
    assert set(found.answers.ravel()) == {"A, C"} and "letters" not in answers.describe(found)


def test_accuracy_by_kind_and_label_and_advice_to_fine_tune():
    def row(i, kind, key, correct, options=0):
        given = {"answer": key if correct else "", "correct": correct, "format_ok": True, "subject": kind[:1]}
        return {"id": str(i), "kind": kind, "options": options, "key": key, "sample": 0} | given

    rows = [row(i, "label", "eligible" if i < 6 else "excluded", i < 6, 2) for i in range(8)]
    found = answers.describe(
        answers.from_rows([*rows, *(row(i, "number", "4", False) for i in (8, 9))], "here")
    )
    assert {name: group["n"] for name, group in found["kinds"].items()} == {"label": 8, "number": 2}
    assert found["labels"]["excluded"]["accuracy"].value == 0 and found["subjects"].keys() == {"l", "n"}
    assert found["accuracy"].value == 0.6 and found["balanced_accuracy"].value == 0.5
    assert "balanced accuracy" in answers.show({"set": found})
    few = [row(i, "number", "4", i == 0) for i in range(100) for _ in range(4)]
    described = answers.describe(answers.from_rows(few, "here"))
    assert "pass@4 is 1.0 %" in answers.show({"set": described})
    assert "set: pass@4" in answers.show({"set": described}) and "fine-tune first" in answers.show(
        {"set": described}
    )
    many = answers.describe(
        answers.from_rows([row(i, "number", "4", True) for i in range(9) for _ in "12"], "here")
    )
    assert "fine-tune first" not in answers.show({"set": many})
    # a right guess is paid as well: of choices among three, 60 of 100 have one among four samples
    guessed = [row(i, "choice", "A", i < 60 and j == 0, 3) for i in range(100) for j in range(4)]
    described = answers.describe(answers.from_rows(guessed, "here"))
    assert described["pass_at_k_beyond_chance"][4].high < 0
    assert "fine-tune first" not in answers.show({"set": described})


def test_open_questions_are_read_rendered_and_graded(path):
    questions, report = read(SetConfig(path=str(path)))
    assert report.startswith("questions: 8, of 0 to 3 options\n  keys, %: choices 12, number")
    asked = [prompts.render(q, "think").splitlines()[-1] for q in questions]
    assert (
        "then give the number in mmol/L inside <answer>" in asked[0] and "<answer>number</answer>" in asked[0]
    )
    assert "one or more of these labels, separated by commas: eligible, excluded, inside" in asked[4]
    assert "one of these labels: yes, no, inside" in asked[6]
    assert "the letters of all options that apply, separated by commas, inside" in asked[7]
    for given, correct in ((RIGHT, True), (WRONG, False)):
        completions = [f"<think>x</think><answer> {answer} </answer>" for answer in given]
        verdicts = rewards.grade(completions, questions)
        assert (
            verdicts.format_ok.all()
            and (verdicts.correct == correct).all()
            and (verdicts.reward == correct).all()
        )
    verdicts = rewards.grade(
        [f"<think>x</think><answer>{text}</answer>" for text in ("140/1", "140 bananas")], questions[:1] * 2
    )
    assert verdicts.reward.tolist() == [-1, -1] and verdicts.reason.tolist() == [
        "not_a_number",
        "unknown_unit",
    ]
    assert prompts.sft_target(questions[3], "answer") == "<answer>2 weeks 1 day</answer>"


def test_hashes_of_open_questions_depend_on_the_value():
    choice = Question("a", "Which?", ("x", "y"), 1, "s")
    assert question_hash(choice) == "05b8343af59de167"  # as older runs recorded it
    assert fingerprint([choice])["sha256"][:16] == "e2221dab9fcc84ed"
    values = [q.value for q in map(open_question, (140, 141, 140.0))]
    first, other, same = (Question("a", "Sodium?", value=value) for value in values)
    assert question_hash(first) != question_hash(other) and fingerprint([first]) != fingerprint([other])
    assert first.value.value == same.value.value


def open_question(answer):
    return Question("a", "Sodium?", value=read_reference(ROWS[0] | {"answer": answer}))


def test_bad_answers_name_file_line_field_and_remedy(path):
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | {"answer": "1,234"}) + "\n")
    with pytest.raises(
        DataError, match=r"open.jsonl, line 2: field answer: '1,234' cannot .*comma; write it in another form"
    ):
        load(SetConfig(path=str(path)))


def test_a_file_of_completions_is_scored(path, tmp_path, capsys):
    rows = [
        row | {"completion": f"<think>x</think><answer>{answer}</answer>"}
        for row, answer in zip(ROWS, RIGHT, strict=True)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main("score", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl") == 0
    assert [row["reward"] for row in lines(tmp_path / "out.jsonl")] == [1.0] * 8
    process = [
        "score",
        tmp_path / "in.jsonl",
        "--reward",
        "[{kind: process}]",
        "--out",
        tmp_path / "facts.jsonl",
    ]
    assert main(*process) == 2 and "process: no line has facts" in capsys.readouterr().err
    facts = [[], ["x"], ["x", ["y", "z"]], ["y"]]
    rows = [row | {"facts": named} for row, named in zip(rows, facts, strict=False)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(*process) == 0
    assert [row["reward"] for row in lines(tmp_path / "facts.jsonl")] == [0.0, 0.5, 0.25, 0.0]


def test_training_and_evaluation(folder, capsys):  # noqa: F811
    path = folder / "open.jsonl"
    path.write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i, row in enumerate(ROWS * 3)))
    config = [
        "train",
        folder / "config.yaml",
        "name=open",
        "steps=1",
        "checkpoint.every=0",
        "prompt.max_tokens=256",
    ]
    config += [f"data={{path: {path}}}", f"eval.sets={{in_distribution: {{path: {path}}}}}"]
    assert main(*config) == 0
    [*_, metrics] = lines(folder / "runs/open/metrics.jsonl")
    assert "monitor/letter_p" not in metrics and "stage/format_failure" not in metrics
    assert metrics["format_ok"] < 1 and "eval.in_distribution.accuracy" in metrics
    capsys.readouterr()
    assert main("eval", folder / "runs/open") == 0
    assert "letters" not in capsys.readouterr().out
    answered = lines(folder / "runs/open/eval-1/in_distribution.jsonl")
    assert [row["key"] for row in answered] == [q.reference for q in load(SetConfig(path=str(path)))]
    assert main(*config, "name=paper", "reward.mode=paper") == 2
    assert "question 0 is not answered by one; set reward.mode=strict or direct" in capsys.readouterr().err
