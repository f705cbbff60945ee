"""Every format with a few invented records, every error message, hostile bytes; real counts if the data is
there.
"""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medrlvr_jax.config.data import PassCountConfig, SetConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.data import readers
from medrlvr_jax.data.batches import batch_at
from medrlvr_jax.data.formats import FORMATS
from medrlvr_jax.data.load import load, read_text
from medrlvr_jax.data.question import DataError, Example, Question, fingerprint, question_hash, repeats

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not in ../shared/data")

PLAIN = {
    "question": "Which vitamin is scarce in scurvy?",
    "options": {"A": "A", "B": "C", "C": "D"},
    "answer": "B",
}
MEDQA = {
    "question": "Which nerve?",
    "options": {"A": "Ulnar", "B": "Radial"},
    "answer_idx": "B",
    "answer": "Radial",
    "meta_info": "step1",
}
PRO = {
    "question_id": 70,
    "question": "Which?\n",
    "options": ["x", "y", "z"],
    "answer": "C",
    "answer_index": 2,
    "category": "health",
}
MCQA = {
    "id": "f00",
    "question": "Which?",
    "opa": "a",
    "opb": "b",
    "opc": "c",
    "opd": "d",
    "cop": 4,
    "exp": "Since.",
    "subject_name": "ENT",
}


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        if not isinstance(content, bytes):
            lines = content if isinstance(content, list) else [content]
            content = "\n".join(
                line if isinstance(line, str) else json.dumps(line) for line in lines
            ).encode()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def read(path, **fields):
    return load(SetConfig(path=path, **fields))


def load_python(rows):
    return data.read(SetConfig(path=readers.PYTHON), rows)[0]


def texts(config):
    return read_text(config)[0]


def error_of(path, **fields):
    with pytest.raises(DataError) as e:
        read(path, **fields)
    return str(e.value).replace(path, Path(path).name)


# ---- formats ----


def test_plain(file):
    listed = PLAIN | {
        "id": "s1",
        "options": ["A", "C"],
        "answer": " b ",
        "subject": "diet",
        "rationale": "No collagen.",
        "facts": ["vitamin C", ["no collagen", "collagen fails"]],
    }
    first, second = read(file("own.jsonl", [PLAIN, "", listed]))
    assert first == Question("own-1", "Which vitamin is scarce in scurvy?", ("A", "C", "D"), 1)
    facts = (("vitamin C",), ("no collagen", "collagen fails"))
    assert second == Question("s1", PLAIN["question"], ("A", "C"), 1, "diet", "No collagen.", facts=facts)
    assert load_python([second]) == [second]


def test_plain_as_json_csv_and_parquet(file, tmp_path):
    want = read(file("own.jsonl", [PLAIN, PLAIN | {"answer": "C"}]))
    assert [(q.options, q.answer) for q in want] == [(("A", "C", "D"), 1), (("A", "C", "D"), 2)]
    rows = [[PLAIN["question"], "A", "C", "D", key] for key in "BC"]
    assert read(file("own.json", json.dumps([PLAIN, PLAIN | {"answer": "C"}]))) == want
    csv = "\ufeffquestion,A,B,C,answer\r\n" + "".join(",".join(row) + "\r\n" for row in rows)
    # numbered by the lines of their file
    assert [q.id for q in read(file("own.csv", csv))] == ["own-2", "own-3"]
    assert [(q.question, q.options, q.answer) for q in read(file("own.csv", csv))] == [
        (q.question, q.options, q.answer) for q in want
    ]
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([PLAIN, PLAIN | {"answer": "C"}]).to_parquet(str(tmp_path / "own.parquet"))
    assert read(str(tmp_path / "own.parquet")) == want


def test_medqa_of_four_and_five_options(file):
    five = MEDQA | {
        "id": "q5",
        "options": dict(zip("EDCBA", "vwxyz", strict=True)),
        "answer_idx": "D",
        "answer": "w",
    }
    assert read(file("m.jsonl", [MEDQA, five])) == [
        Question("m-1", "Which nerve?", ("Ulnar", "Radial"), 1, "step1"),
        Question("q5", "Which nerve?", ("z", "y", "x", "w", "v"), 3, "step1"),
    ]
    wrong = file("m.jsonl", [MEDQA | {"answer_idx": "A"}])
    assert "field answer: 'Radial' is not option A, 'Ulnar'; correct one of the two" in error_of(wrong)


def test_mmlu_pro_keeps_health_of_several_categories(file):
    law = PRO | {"question_id": 71, "category": "law"}
    assert read(file("p.jsonl", [law, PRO])) == [Question("70", "Which?", ("x", "y", "z"), 2, "health")]
    # a set cut to one category on purpose
    assert len(read(file("p.jsonl", [law, law | {"question_id": 72}]))) == 2
    assert "answer_index: 1 is not 2, the index of answer C" in error_of(
        file("p.jsonl", [PRO | {"answer_index": 1}])
    )


def test_mmlu_csv_without_header_and_the_hubs_form(file):
    path = file("anatomy_test.csv", '"Which,\nif any?",1,2,3,4,D\nHow ""many?,1,2,3,4,A\n')
    assert read(path) == [
        Question("anatomy_test-1", "Which,\nif any?", ("1", "2", "3", "4"), 3, "anatomy"),
        Question("anatomy_test-3", 'How ""many?', ("1", "2", "3", "4"), 0, "anatomy"),
    ]
    hub = {"question": "Which?", "choices": ["1", "2"], "answer": 1, "subject": "virology"}
    assert read(file("m.jsonl", [hub]))[0] == Question("m-1", "Which?", ("1", "2"), 1, "virology")
    assert "answer: 2 is not the number of one of its 2 options, counted from 0" in error_of(
        file("m.jsonl", [hub | {"answer": 2}])
    )


def test_medmcqa_counts_from_one_in_files_and_by_label_on_the_hub(file, tmp_path):
    assert read(file("d.jsonl", [MCQA])) == [
        Question("f00", "Which?", ("a", "b", "c", "d"), 3, "ENT", "Since.")
    ]
    for bad in (0, 5, -2):
        assert f"field cop: {bad} is not the number of one of its 4 options, counted from 1" in error_of(
            file("d.jsonl", [MCQA | {"cop": bad}])
        )
    assert "use the train or validation split" in error_of(file("d.jsonl", [MCQA | {"cop": -1}]))
    assert "True" in error_of(file("d.jsonl", [MCQA | {"cop": True}]))  # in Python True == 1
    import datasets

    features = datasets.Features(
        {k: datasets.Value("string") for k in MCQA} | {"cop": datasets.ClassLabel(names=list("abcd"))}
    )
    datasets.Dataset.from_list([MCQA | {"cop": 0}, MCQA | {"id": "f01", "cop": 3}], features).to_parquet(
        str(tmp_path / "d.parquet")
    )
    assert [q.answer for q in read(str(tmp_path / "d.parquet"))] == [0, 3]


def test_pubmedqa_by_pmid_and_the_hubs_form(file):
    local = {
        "QUESTION": "Does it?",
        "CONTEXTS": ["It may.", "It did."],
        "final_decision": "maybe",
        "LONG_ANSWER": "It depends.",
    }
    want = Question("123", "It may.\nIt did.\nDoes it?", ("yes", "no", "maybe"), 2, "", "It depends.")
    assert read(file("p.json", json.dumps({"123": local}))) == [want]
    hub = {
        "pubid": 123,
        "question": "Does it?",
        "context": {"contexts": ["It may.", "It did."]},
        "long_answer": "It depends.",
    }
    assert read(file("p.jsonl", [hub | {"final_decision": "maybe"}])) == [want]
    assert "is none of yes, no, maybe" in error_of(file("p.jsonl", [hub | {"final_decision": "perhaps"}]))


def test_text(file):
    path = file(
        "t.jsonl",
        [{"prompt": "", "response": " Hello\n"}, {"text": "Bare."}, {"prompt": "Q ", "response": "A"}],
    )
    assert texts(SetConfig(path=path)) == [Example("", " Hello\n"), Example("", "Bare."), Example("Q ", "A")]
    assert texts(SetConfig(path=path, format="text", limit=1)) == [Example("", " Hello\n")]
    assert "format text, where plain or open" in error_of(path)
    with pytest.raises(DataError, match="format plain, where text is needed"):
        texts(SetConfig(path=file("q.jsonl", [PLAIN])))


def test_limit_and_explicit_format(file):
    path = file("m.jsonl", [MEDQA] * 5)
    assert [q.id for q in read(path, limit=2)] == ["m-1", "m-2"]
    assert "line 1: field opa: it is required" in error_of(path, format="medmcqa")


def test_unknown_and_ambiguous_fields_list_the_formats(file):
    message = error_of(file("x.jsonl", [{"stem": "Which?", "key": "A"}]))
    assert all(form in message for form in FORMATS) and "['stem', 'key'] fit no format" in message
    assert "fit the formats medqa and medmcqa; set format" in error_of(file("x.jsonl", [MEDQA | MCQA]))


# ---- the report ----


def report_of(path, **fields):
    return data.read(SetConfig(path=path, **fields))[1]


def test_the_report_of_a_set(file):
    rows = [
        PLAIN | {"rationale": "r", "rater": i, "answer": "AB"[i % 2 and j]}
        for j in range(2)
        for i in range(3)
    ]
    rows[3:] = [row | {"question": "Which nerve " + "runs " * 40} for row in rows[3:]]
    lines = report_of(file("own.jsonl", rows)).split("\n")
    assert lines == [
        "questions: 6, of 3 options",
        "  keys A 83 %, B 17 %, C 0 %",
        "  repeats of an earlier question: 4; questions with more than one key: 1",
        "  format plain; not read: rater",
        "  first: Which vitamin is scarce in scurvy?",
        "    A. A  B. C  C. D",
        "    its key: A",
        "  rationales: 6, the first: r",
    ]
    long = report_of(file("own.jsonl", [row | {"options": ["x y " * 30, "yes"]} for row in rows[3:]])).split(
        "\n"
    )
    assert max(map(len, long)) <= 80 and re.fullmatch("  first: Which nerve runs.* … .*runs", long[4]), long
    assert long[5].startswith("    A. x y x y") and long[5].endswith("…  B. yes")
    drugs = [f"drug number {i}" for i in range(10)]
    ten = report_of(file("own.jsonl", [row | {"options": drugs} for row in rows[3:]])).split("\n")
    assert all(f". {drug}" in "\n".join(ten) for drug in drugs) and max(map(len, ten)) <= 80


def test_a_column_without_a_name_is_ignored(file):
    path = file("m.csv", ",question,A,B,answer_idx\n17,Which?,x,y,B\n18,Where?,x,y,A\n")
    assert [(q.answer, q.rationale) for q in read(path)] == [(1, None), (0, None)]
    assert read(file("m.jsonl", [MEDQA | {"": 17}]))[0].rationale is None
    assert "not read" not in report_of(path) and "rationales: 0" in report_of(path)


def test_the_report_names_unread_fields(file):
    renamed = {
        "question": "Does it?",
        "context": {"contexts": ["It may."]},
        "options": ["yes", "no"],
        "answer": "A",
        "long_answer": "So.",
    }
    assert "format plain; not read: context, long_answer" in report_of(file("p.jsonl", [renamed]))
    many = dict.fromkeys("stem one two three four five six key".split(), "x")
    assert "'six', 'key'] fit no format" in error_of(file("x.jsonl", [many]))


def test_letters_inside_options_are_removed(file):
    for options in (
        ["A. x", "B. y", "C. z"],
        ["(a) x", "(b) y", "c) z"],
        ["1. x", "2) y", "3: z"],
        ["A - x", "B - y", "C – z"],
    ):
        path = file("own.jsonl", [PLAIN | {"options": options}])
        assert read(path)[0].options == (
            "x",
            "y",
            "z",
        ) and 'have their own letters ("A. …"): 1, removed' in report_of(path)
    row = MEDQA | {"options": {"A": "A. Ulnar", "B": "B. Radial"}}
    for answer in ("Radial", "B. Radial"):
        assert read(file("m.jsonl", [row | {"answer": answer}]))[0].options == ("Ulnar", "Radial")
    for options in (
        ["E. coli", "S. aureus", "C. difficile"],
        ["10 - 20 mg", "20 - 30 mg", "1: 2"],
        ["A.", "B.", "C."],
    ):
        assert read(file("own.jsonl", [PLAIN | {"options": options}]))[0].options == tuple(options)
    some = file("own.jsonl", [PLAIN | {"options": ["A. x", "B. y", "None"]}])
    assert read(some)[0].options == ("A. x", "B. y", "None") and "kept, and never shuffled" in report_of(some)


def test_the_report_counts_ambiguous_keys(file):
    assert "also the text of another option: 1, taken as letters" in report_of(
        file("own.jsonl", [PLAIN | {"answer": "C"}, PLAIN])
    )


def test_the_content_of_a_json_file_decides_how_it_is_read(file):
    two = [PLAIN, PLAIN | {"answer": "C"}]
    want = read(file("own.jsonl", two))
    for name, content in (
        ("own.json", two),
        ("own.jsonl", json.dumps(two)),
        ("own.jsonl", json.dumps(two, indent=1)),
        ("own.json", "\ufeff\n" + json.dumps(two[0]) + "\n\n" + json.dumps(two[1]) + "\n"),
    ):
        assert [(q.options, q.answer) for q in read(file(name, content))] == [
            (q.options, q.answer) for q in want
        ]
    assert "own.json, record 3: not JSON" in error_of(file("own.json", [*two, "{"]))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_by_commas_semicolons_or_tabs(file, mark):
    table = [
        ["question", " A", "B ", "answer"],
        ['"Which; of, these?"', "x", "y", "b"],
        ["Where?", "x", "y", "A"],
    ]
    for name in ("own.csv", "own.tsv"):
        questions = read(file(name, "\n".join(mark.join(row) for row in table)))
        assert [(q.question, q.options, q.answer) for q in questions] == [
            ("Which; of, these?", ("x", "y"), 1),
            ("Where?", ("x", "y"), 0),
        ]
    assert read(file("virology_test.csv", mark.join(["Which?", "1", "2", "3", "4", "D"])))[0].answer == 3
    row = mark.join(["7", "Which?", "x", "y", "z", "C", "2", "health"])
    path = file(
        "p.csv", mark.join("question_id question A B C answer answer_index category".split()) + "\n" + row
    )
    assert read(path) == [
        Question("7", "Which?", ("x", "y", "z"), 2, "health")
    ] and "not read" not in report_of(path)
    assert "the header has the column 'A' twice" in error_of(
        file("own.csv", mark.join("question A A answer".split()) + "\n")
    )


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"options": ["aspirin", "heparin, then warfarin"], "answer": "heparin, then warfarin"}, 1),
        ({"options": ["aspirin", "heparin"], "answer": "b. heparin"}, 1),
        ({"options": ["A. aspirin", "B. heparin"], "answer": "aspirin"}, 0),
        ({"options": {"1": "aspirin", "2": "heparin"}, "answer": 2}, 1),
        ({"options": {"p": "aspirin", "q": "heparin"}, "answer": "p"}, 0),
        ({"options": ["B", "A"], "answer": "B"}, 1),  # a letter, whatever the texts
    ],
)
def test_other_forms_of_unambiguous_keys(file, fields, key):
    [question] = read(file("own.jsonl", {"question": "Which?"} | fields))
    assert question.answer == key and len(question.options) == 2


def test_excel(tmp_path, monkeypatch):
    openpyxl = pytest.importorskip("openpyxl")
    book, path = openpyxl.Workbook(), tmp_path / "own.xlsx"
    rows = [
        ["question", "A", "B", "C", "answer", None],
        ["Which?", 3.0, 2.5, None, "b"],
        [None],
        ["Where?", "x", "y", "z", "A"],
    ]
    for row in rows:
        book.active.append(row)
    book.create_sheet("notes").append(["no question"])
    book.save(path)
    assert [(q.id, q.options, q.answer) for q in read(str(path))] == [
        ("own-2", ("3", "2.5"), 1),
        ("own-4", ("x", "y", "z"), 0),
    ]
    book.active.insert_rows(1)
    book.save(path)
    assert [q.id for q in read(str(path))] == ["own-3", "own-5"]
    book.active.delete_rows(1)
    book.active.append(["Why?", "x", "y", "z", "A", "by Ann"])
    book.save(path)
    assert "row 5: 6 cells under a header of 5" in error_of(str(path))
    path.write_bytes(b"PK")
    assert "it is not an .xlsx file, or it is damaged" in error_of(str(path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'medrlvr-jax[excel]'" in error_of(str(path))


def test_trials_have_trecs_labels_whatever_their_prompt_says(file):
    row = {"note": "A woman of 50.", "trial": "Statins.", "label": 1, "id": "t"}
    prompt = "0) Excluded; 1) Irrelevant\nHere is the patient note:\nA man.\n\nHere is the clinial trial:\nTitle: x\n"
    pair = {"input": prompt + "-" * 17 + "\n", "query_id": "q1", "corpus_id": "N1", "label": 0}
    first, second = (read(file("t.jsonl", r), format="trec")[0] for r in (row, pair))
    assert first.question.startswith("Patient: A woman of 50.\n\nTrial: Statins.\n\nIs the patient eligible")
    assert (first.reference, second.reference, second.id) == ("excluded", "not relevant", "q1 N1")
    assert second.question.startswith("Patient: A man.\n\nTrial: Title: x\n\nIs ") and second.kind == "label"
    assert "field label: 3 is none of TREC's labels: 0 not relevant" in error_of(
        file("t.jsonl", row | {"label": 3})
    )
    assert "has no note and trial" in error_of(file("t.jsonl", pair | {"input": "?"}))
    del pair["query_id"]
    assert "field query_id: it is required and missing" in error_of(file("t.jsonl", pair), format="trec")


@real
def test_real_pairs_of_ehrmind_have_the_labels_of_trecs_qrels():
    qrels = (SHARED / f"trec/trec_{year}_qrels.tsv" for year in (2021, 2022))
    labels = dict(line.rsplit("\t", 1) for file in qrels for line in file.read_text().splitlines()[1:])
    names = {"0": "not relevant", "1": "excluded", "2": "eligible"}
    questions = read(str(SHARED / "ehrmind/matching_sft_val_100.parquet"))
    assert Counter(q.reference for q in questions) == {"not relevant": 38, "excluded": 32, "eligible": 30}
    assert all(names[labels[q.id.replace(" ", "\t")]] == q.reference for q in questions)
    assert not any("Excluded (" in q.question for q in questions)


# ---- the fields of other files ----

CASE = {
    "case": {"text": "Chest pain.", "truth": 2},
    "op1": "angina",
    "op2": "reflux",
    "op3": "",
    "kind": "case",
    "tags": ["heart"],
}
FIELDS_OF = {"question": "case.text", "answer": "case.truth", "options": ["op1", "op2", "op3"], "kind": None}


def test_fields_are_renamed_and_records_are_selected(file):
    rows = [CASE, CASE | {"tags": ["lung", "heart"], "op3": "cough"}, CASE | {"tags": ["skin"]}]
    choice = {
        "where": {"tags": ["heart", "nerve"]},
        "constants": {"answer_as": "from_1"},
        "fields": FIELDS_OF,
    }
    path = file("cases.jsonl", rows)
    assert read(path, **choice) == [
        Question("cases-1", "Chest pain.", ("angina", "reflux"), 1),
        Question("cases-2", "Chest pain.", ("angina", "reflux", "cough"), 1),
    ]
    report = report_of(path, **choice)
    assert "format plain\n" in report and "records that where leaves out: 1" in report
    assert (
        read(path, where={"op3": "cough"}, fields=FIELDS_OF, constants={"answer_as": "from_0"})[0].answer == 2
    )
    open_one = {"fields": {"question": "case.text", "answer": "case.truth"}, "constants": {"kind": "number"}}
    assert read(path, **open_one)[2].value.value == 2
    refused = [
        ({"fields": {"qestion": "q"}}, "fields.qestion: no format reads a field of this name; did you mean question?"),
        ({"fields": {"id": "a"}, "constants": {"id": 1}}, "constants.id: fields names it, too"),
        ({"fields": {"question": "case.txt"}}, "line 1: field case.txt, read as question: it is required and missing"),
        ({"where": {"tags": "bone"}}, "where {'tags': 'bone'} selects no record; in them, tags is ['heart'], ["),
        ({"where": {"tag": "bone"}}, "in them, tag is absent"),
    ]  # fmt: skip
    for spec, message in refused:
        assert message in error_of(path, **spec)
    assert "where: embedded:train has no records" in error_of("embedded:train", where={"a": 1})


def test_answer_as_number_or_text(file):
    rows = [PLAIN | {"answer": 1}, PLAIN | {"answer": "2"}]
    assert [q.answer for q in read(file("own.jsonl", rows), constants={"answer_as": "from_1"})] == [0, 1]
    assert [q.answer for q in read(file("own.jsonl", rows), constants={"answer_as": "from_0"})] == [1, 2]
    assert read(file("own.jsonl", [PLAIN | {"answer": "C "}]), constants={"answer_as": "text"})[0].answer == 1
    for how, message in (
        ("from_1", "'B' is not the number of one of its 3 options, counted from 1"),
        ("text", "'B' is not the text of one of its 3 options"),
        ("index", "field answer_as: 'index' is none of letter, from_0, from_1, text"),
    ):
        assert message in error_of(file("own.jsonl", PLAIN), constants={"answer_as": how})


def test_on_bad_skip_counts_bad_records(file):
    path = file("own.jsonl", [PLAIN | {"id": "a"}, "{", PLAIN | {"id": "a"}, *[PLAIN | {"answer": "X"}] * 20])
    assert len(read(path, on_bad="skip")) == 1
    report = report_of(path, on_bad="skip")
    assert "cannot be read: 22\n  the first skipped: line 2: not JSON: " in report
    assert error_of(file("own.jsonl", ["{", "{"]), on_bad="skip").count("not JSON") == 2


# ---- errors ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (PLAIN | {"answer": "D"}, "field answer: 'D' is not the letter of one of its 3 options"),
        (PLAIN | {"answer": "ABC"}, "field answer: 'ABC' is not the letter"),
        (PLAIN | {"answer": "Ｂ"}, "is not the letter"),  # a full-width look-alike
        (PLAIN | {"answer": 1}, "field answer: 1 is a number where a letter is needed; give the letter"),
        (PLAIN | {"answer": "2"}, "field answer: '2' is a number where a letter is needed"),
        (PLAIN | {"options": ["A. x", "A. x"]}, "field options: ('A. x', 'A. x') has the same text twice"),
        (PLAIN | {"options": ["A. x", "B) x"]}, "has the same text twice"),
        (
            PLAIN | {"options": ["B. x", "C. y", "A. z"]},
            "their own letters are B, C, A, so the key is ambiguous; put them in order",
        ),
        (
            {"question": "q", "choices": ["x", "y"], "answer": 0},
            "it is required and missing; the record has ['question', 'choices', 'answer']",
        ),
        (
            {"question": "q", "choices": ["x", "y"], "answer": 0},
            "the format plain was detected from the first record only",
        ),
        (PLAIN | {"question": " "}, "field question: ' ' is blank"),
        (
            PLAIN | {"question": None},
            "field question: it is required and missing; the record has ['question', 'options', 'answer']",
        ),
        (PLAIN | {"question": "\ud800"}, "half a surrogate pair"),
        (PLAIN | {"options": ["x"], "answer": "A"}, "field options: there are 1; a question has 2 to 10"),
        (PLAIN | {"options": list("abcdefghijk")}, "field options: there are 11"),
        (PLAIN | {"options": {"A": "x", "C": "y"}}, "letters ['A', 'C'] are not A, B, C … without a gap"),
        (PLAIN | {"options": "A or B"}, "field options: 'A or B' is neither a list nor an object"),
        (PLAIN | {"options": ["x", 2]}, "field options 2: 2 is not a string"),
        (PLAIN | {"options": ["x", "x "]}, "field options: ('x', 'x') has the same text twice"),
        (PLAIN | {"options": {"1": "x", "2": "y"}, "answer": []}, "field answer: [] names no option"),
        (PLAIN | {"id": [1]}, "field id: [1] is neither a string nor an integer"),
        (PLAIN | {"rationale": 3}, "field rationale: 3 is not a string"),
        (PLAIN | {"facts": "x"}, "field facts: 'x' is not a list"),
        (PLAIN | {"facts": ["x", ["y", 1]]}, "field facts 2: 1 is not a string"),
        ('{"question": "a", "question": "b"}', "field 'question' is given twice"),
        ('{"question": ', "not JSON: Expecting value"),
        ('["question"]', "is not an object with fields"),
        ("9" * 5000, "not JSON: "),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_an_error_names_line_field_value_and_remedy(file, line, message):
    errors = error_of(file("own.jsonl", [PLAIN, "", line]))
    assert errors.startswith("own.jsonl, line 3: ") and message in errors and "\n" not in errors


def test_bytes_that_are_not_utf8_name_their_line(file):
    assert "own.jsonl, line 2: byte 15 is not UTF-8" in error_of(
        file("own.jsonl", json.dumps(PLAIN).encode() + b'\n{"question": "\xe9"}')
    )


def test_ten_errors_at_once(file):
    errors = error_of(file("own.jsonl", [PLAIN] + [PLAIN | {"answer": "?"}] * 30)).split("\n")
    assert (
        len(errors) == 11
        and [int(re.search(r"line (\d+)", s)[1]) for s in errors[:10]] == list(range(2, 12))
        and "may be more" in errors[10]
    )


def test_ids_must_differ(file):
    assert "line 2: id '7' is already that of line 1; give each record its own, or none" in error_of(
        file("own.jsonl", [PLAIN | {"id": 7}] * 2)
    )


def test_a_huge_line_is_refused_without_reading_all_of_it(file, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 2**20)
    assert "line 2: the line is longer than 1 MiB" in error_of(file("own.jsonl", [PLAIN, "x" * 2**21]))


def test_empty_lines_before_a_header(file):
    [question] = read(file("own.csv", "\n\nquestion;A;B;answer\n\nWhich?;x;y;B\n"))
    assert question == Question("own-5", "Which?", ("x", "y"), 1)


def test_csv_errors(file):
    assert "line 3: 3 cells under a header of 4" in error_of(
        file("x.csv", "question,A,B,answer\nq,1,2,A\nq,1,A\n")
    )
    assert "line 2: 5 cells; without a header six are needed" in error_of(
        file("x_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n")
    )
    assert "line 2: not CSV in UTF-8" in error_of(file("x.csv", 'question,A,B,answer\nq,1,2,"A\nq,1,2,B\n'))
    assert "not CSV in UTF-8" in error_of(file("x.csv", b"question,A,B,answer\nq\xff,1,2,A\n"))


def test_paths(file, tmp_path):
    for path, message in (
        ("nowhere.jsonl", "no such file"),
        (str(tmp_path / "gone"), "no such file"),
        (str(tmp_path), "a folder"),
        (file("x.txt", ""), "a file of unknown type"),
        (file("x.parquet", "no"), "it is not a parquet file, or it is damaged; write it again"),
        (file("y.parquet", "version https://git-lfs.github.com/spec/v1\noid 1"), "git-LFS pointer"),
        (file("y.jsonl", "version https://git-lfs.github.com/spec/v1\noid 1"), "git-LFS pointer"),
        (file("empty.jsonl", ""), "it has no record"),
        (file("ids.json", '{"1": "yes"}'), "fit no format"),
        (
            "embedded:corpus",
            "use embedded:train or embedded:in_distribution or embedded:out_of_distribution",
        ),
    ):
        assert message in error_of(path)


def test_hub_sets_go_through_datasets_and_name_their_splits_and_commit(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([MEDQA])
    calls = []

    class Builder:
        hash, download_and_prepare = "1f2e3d", lambda self: None

        def __init__(self, path, subset, revision):
            calls.append((path, subset, revision))

        def as_dataset(self, split):
            return rows if split else datasets.DatasetDict(train=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    questions, report = data.read(SetConfig(path="org/medqa", subset="en", split="test", revision="v1"))
    assert questions == [Question("medqa-en-test-1", "Which nerve?", ("Ulnar", "Radial"), 1, "step1")]
    assert "\n  revision 1f2e3d\n" in report
    assert "split None, revision None: set split to one of train, test" in error_of("org/medqa")
    assert calls == [("org/medqa", "en", "v1"), ("org/medqa", None, None)]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=4)
    | st.dictionaries(st.sampled_from("ABCDE") | st.text(max_size=3), SCALARS, max_size=4)
)
READ = {field for form in FORMATS.values() for variant in form.required for field in variant.split()}
FIELDS = sorted(READ | {"id", "subject", "rationale"})


def only_data_errors(path, form):
    try:
        for q in read(str(path), format=form):
            assert (
                2 <= len(q.options) <= 10 and 0 <= q.answer < len(q.options) and q.question and all(q.options)
            )
            f"{q}".encode()
    except DataError:
        pass


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(["auto", *FORMATS]),
    rows=st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES), max_size=3),
    damage=st.data(),
)
def test_hostile_records_raise_nothing_but_data_errors(tmp_path_factory, form, rows, damage):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    kind = {"medqa": MEDQA, "mmlu_pro": PRO, "medmcqa": MCQA, "plain": PLAIN}.get(form, {})
    path.write_text("\n".join(json.dumps(kind | row) for row in rows))
    only_data_errors(path, form)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(["auto", "plain", "medmcqa"]),
    suffix=st.sampled_from([".jsonl", ".json", ".csv"]),
    content=st.binary(),
)
def test_hostile_bytes_raise_nothing_but_data_errors(tmp_path_factory, form, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    only_data_errors(path, form)


# ---- sets ----


def test_repeats_have_the_same_text_and_key():
    q = Question("1", "Which?", ("a", "b"), 0)
    others = [
        Question("2", "Which?", ("a", "b"), 1),
        Question("3", "Which?", ("b", "a"), 0),
        Question("4", "Which?", ("a", "b"), 0, "s"),
    ]
    assert repeats([q, *others, Question("5", "Which?", ("a", "b"), 1)]) == {"4": "1", "5": "2"}


def test_questions_are_selected_by_pass_count(file):
    path = file("set.jsonl", [PLAIN | {"id": str(i)} for i in range(5)])
    counts = file(
        "counts.jsonl", [{"id": str(i), "right": right} for i, right in enumerate([0, 3, 8, 7, None])]
    )

    def ids(**fields):
        return [q.id for q in read(path, pass_count=PassCountConfig(file=counts, **fields))]

    assert (
        ids(keep=(1, 7)) == ["1", "3"]
        and ids(keep=(0, 3)) == ["0", "1"]
        and ids(keep=(7, 8), order="easy_first") == ["2", "3"]
    )
    # the fifth was too long to be sampled
    assert ids(order="easy_first") == ["2", "3", "1", "0"] == ids(order="hard_first")[::-1]
    assert "no question has 4 to 6 right samples" in error_of(
        path, pass_count=PassCountConfig(file=counts, keep=(4, 6))
    )
    history = file(
        "history.jsonl",
        [{"id": str(i), "right": 1, "variance": v} for i, v in enumerate([0.1, 0.2, 0, 0.25, 0.2])],
    )
    ranked = PassCountConfig(file=history, order="variance", top=3)
    assert [q.id for q in read(path, pass_count=ranked)] == ["3", "1", "4"]
    assert "counts.jsonl, line 1: it lacks 'impact'" in error_of(
        path, pass_count=PassCountConfig(file=counts, order="impact")
    )
    few = file("few.jsonl", [{"id": "0", "right": 1}])
    assert "4 of 5 questions have no count there, such as '1'" in error_of(
        path, pass_count=PassCountConfig(file=few, keep=(1, 7))
    )
    assert [q.id for q in read(path, limit=1, pass_count=PassCountConfig(file=few, keep=(1, 7)))] == ["0"]
    bad = file("bad.jsonl", [{"id": "0", "right": "1"}])
    assert "bad.jsonl, line 1: it is not a line of" in error_of(
        path, pass_count=PassCountConfig(file=bad, keep=(1, 7))
    )
    assert "no such file" in error_of(path, pass_count=PassCountConfig(file=path + ".no", keep=(1, 7)))


# ---- batches ----


@given(
    n=st.integers(1, 200), size=st.integers(1, 200), epoch=st.integers(0, 50), seed=st.integers(0, 2**32 - 1)
)
def test_an_epoch_holds_no_question_twice(n, size, epoch, seed):
    size = min(n, size)
    steps = range(epoch * (n // size), (epoch + 1) * (n // size))
    batches = [batch_at(n, step, size, seed) for step in steps]
    seen = np.concatenate(batches)
    assert all(b.shape == (size,) and b.dtype == np.int64 for b in batches)
    assert len(set(seen.tolist())) == len(seen) == n // size * size and 0 <= seen.min() and seen.max() < n
    assert np.array_equal(batches[-1], batch_at(n, steps[-1], size, seed))


def test_batches_in_order_follow_the_set_and_leave_out_varying_questions():
    epochs = [
        np.concatenate([batch_at(7, 3 * e + i, 2, 0, in_order=True) for i in range(3)]) for e in range(40)
    ]
    assert all((np.diff(e) > 0).all() for e in epochs)
    assert {*range(7)} == {i for e in epochs for i in {*range(7)} - {*e.tolist()}}
    for step in (0, 3, 6):
        assert set(np.concatenate([batch_at(7, step + i, 2, 0) for i in range(3)])) == set(epochs[step // 3])


def test_batches_are_pinned():
    """A run that is resumed with another version of NumPy must get the same batches."""
    assert [batch_at(7, step, 3, 0).tolist() for step in range(4)] == [
        [0, 3, 5],
        [1, 2, 6],
        [3, 4, 2],
        [1, 6, 5],
    ]
    assert batch_at(7, 0, 3, 1).tolist() != [0, 3, 5]


def test_the_questions_left_out_differ_between_epochs():
    left = [
        frozenset(range(10))
        - set(np.concatenate([batch_at(10, 3 * epoch + i, 3, 5) for i in range(3)]).tolist())
        for epoch in range(60)
    ]
    assert all(len(tail) == 1 for tail in left) and len(set(left)) == 10


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(
        DataError, match=r"a batch of 8 questions cannot be drawn from 7 .* set sample.questions to 7 or less"
    ):
        batch_at(7, 0, 8, 0)


# ---- the real sets ----


@real
@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("medqa/dev_4opt.jsonl", {4: 1272}),
        ("medqa/dev_5opt.jsonl", {5: 1272}),
        ("medqa/test_4opt.jsonl", {4: 1273}),
        ("medqa/test_5opt.jsonl", {5: 1273}),
        ("medqa/train_partial_3503.jsonl", {4: 2608, 5: 895}),
        ("mmlu_pro/health_test.jsonl", {3: 3, 4: 72, 5: 8, 6: 8, 7: 20, 8: 42, 9: 67, 10: 598}),
        ("medmcqa/dev.jsonl", {4: 4183}),
        ("pubmedqa/ori_pqal.json", {3: 1000}),
    ],
)
def test_real_counts(path, options):
    questions = read(str(SHARED / path))
    assert Counter(len(q.options) for q in questions) == options
    assert len({q.id for q in questions}) == len(questions)


@real
def test_real_keys_repeats_and_mmlu():
    assert len(repeats(read(str(SHARED / "mmlu_pro/health_test.jsonl")))) == 818 - 723
    assert Counter(q.answer for q in read(str(SHARED / "medmcqa/dev.jsonl"))) == {
        0: 1348,
        1: 1085,
        2: 925,
        3: 825,
    }
    files = sorted((SHARED / "mmlu").glob("*_test.csv"))
    assert len(files) == 6 and sum(len(read(str(path))) for path in files) == 1089


def test_fingerprints_of_different_rows_differ():
    plain, other = Question("1", "?", ("a", "b"), 0), Question("1", "?", ("a", "b"), 0, facts=(("x",),))
    assert fingerprint([plain]) != fingerprint([other])
    first, second = Question("1", "?", ("a", "b"), 0), Question("1", "?", ("a", "b"), 1)
    assert fingerprint([first, second]) == fingerprint([first, second]) != fingerprint([second, first])
    assert fingerprint([([1, 2], [3])]) == {
        "n": 1,
        "sha256": "46d75cebab5a28687e02ac4f0090e7ea9c0f12b51e3a50dfa313390a21776049",
    }


def test_a_questions_hash_ignores_id_subject_and_order():
    question = Question("7", "Which?", ("x", "y", "z"), 2)
    shuffled = Question("other id", "Which?", ("z", "x", "y"), 0, subject="lung", order="CAB")
    assert question_hash(question) == question_hash(shuffled) and re.fullmatch(
        "[0-9a-f]{16}", question_hash(question)
    )
    others = [
        Question("7", "Who?", ("x", "y", "z"), 2),
        Question("7", "Which?", ("x", "z", "y"), 2),
        Question("7", "Which?", ("x", "y", "z"), 1),
    ]
    assert len({question_hash(q) for q in [question, *others]}) == 4
