"""Overlaps by hand, and those that are known of the real sets."""

import json
from pathlib import Path

import pytest

from medrlvr_jax import cli
from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.data.question import Question
from medrlvr_jax.evaluation import contamination

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not in ../shared/data")


def ask(id, stem):
    return Question(id, stem, ("yes", "no"), 0)


def said(numbers):
    return " ".join(f"w{i}" for i in numbers)


def test_words_are_lower_case_without_punctuation_and_accents():
    assert contamination.words("Crohn’s, naïve 12-year-old: Ménière's_β") == [
        "crohns",
        "naive",
        "12",
        "year",
        "old",
        "menieres",
        "β",
    ]
    assert len(contamination.grams(["w"] * 20)) == 1 and contamination.grams(["w"] * 7) == set()


def test_containment_is_of_the_shorter_stem():
    train = [ask("long", said(range(30))), ask("short", said(range(100, 112)))]  # 23 and 5 grams
    tests = [
        ask("a", said([*range(19), *range(50, 60)])),  # 12 of 22
        ask("b", said([*range(18), *range(50, 60)])),  # 11 of 21
        ask("c", said([*range(17), *range(50, 61)])),  # 10 of 21: less than half
        ask("d", said([*range(200, 240), *range(100, 110)])),  # 3 of the short one's 5
        ask("e", said(range(100, 112)).upper() + "?"),
        ask("f", "What now?"),
    ]
    found = contamination.overlaps(train, {"test": tests})
    assert [(o.id, o.train_id, round(o.containment * 105), o.same_stem) for o in found["test"]] == [
        ("a", "long", round(12 / 22 * 105), False),
        ("b", "long", round(11 / 21 * 105), False),
        ("d", "short", 63, False),
        ("e", "short", 105, True),
    ]
    within = contamination.overlaps(
        [ask("1", "What now?"), ask("2", "what NOW"), ask("3", "What then?")], {}
    )["(train)"]
    assert within == [contamination.Overlap("2", "1", 1.0, True, 2)]


def test_boilerplate_is_ignored():
    """20 different vignettes end in the same sentence, which is also a whole stem."""
    closing = "Which of the following is the most likely diagnosis?"
    vignettes = [
        Question(f"v{i}", f"{said(range(40 * i, 40 * i + 30))} {closing}", (f"a{i}", "b"), 0)
        for i in range(20)
    ]
    bare, alike = Question("bare", closing, ("c", "d"), 0), Question("alike", closing, ("B", "e"), 0)
    assert contamination.overlaps([bare], {"test": vignettes})["test"] == []
    assert [o.id for o in contamination.overlaps(vignettes[:10], {"test": vignettes})["test"]] == [
        f"v{i}" for i in range(10)
    ]
    assert contamination.overlaps([bare], {"test": [alike, bare]})["test"] == [
        contamination.Overlap("bare", "bare", 1.0, True, 2)
    ]
    found = contamination.overlaps([bare, Question("2", closing, ("b", "f"), 0)], {"test": [alike]})["test"]
    # of two with the same stem, that with the option
    assert found == [contamination.Overlap("alike", "2", 1.0, True, 1)]
    # a question asked often is no boilerplate
    many = [Question(f"{i}", vignettes[0].question, ("x", "y"), 0) for i in range(300)]
    assert len(contamination.overlaps(many, {"test": vignettes[:1]})["test"]) == 1


def test_the_command_and_scores_without_contaminated_questions(tmp_path, capsys):
    def write(name, stems):
        rows = [
            {"id": f"{name}-{i}", "question": stem, "options": ["a", "b"], "answer": "A"}
            for i, stem in enumerate(stems)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return tmp_path / f"{name}.jsonl"

    train, test, other = (
        write("train", ["One?", "Two?"]),
        write("test", ["one", "Four?", "Three?"]),
        write("other", ["Five?"]),
    )
    (tmp_path / "eval").mkdir()
    rows = [
        {"id": f"test-{i}", "answer": "A", "key": "A" if i == 0 else "B", "correct": i == 0, "options": 2}
        for i in range(3)
    ]
    (tmp_path / "eval" / "my_set.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = [
        "contamination",
        str(train),
        str(test),
        str(other),
        "--eval",
        str(tmp_path / "eval"),
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert cli.main(args) == 0
    assert "33.3 %" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["sets"]["test"]["found"] == [
        {"id": "test-0", "train_id": "train-0", "containment": 1.0, "same_stem": True, "options_in_common": 2}
    ]
    assert found["sets"]["other"] == {"n": 1, "found": []}
    scores = found["scores"]["my_set"]
    assert (scores["n"], scores["all"]["value"], scores["n_clean"], scores["clean"]["value"]) == (
        3,
        1 / 3,
        2,
        0.0,
    )
    assert cli.main(["contamination", str(train), str(other), "--eval", str(tmp_path / "eval")]) == 2
    assert "no set of answers there is of other" in capsys.readouterr().err
    assert cli.main(["contamination", str(train)]) == 0
    (tmp_path / "run").mkdir()
    sets = {"sets": {"mine": {"path": str(test)}}}
    config = {
        "name": "run",
        "steps": 1,
        "model": {"path": "embedded"},
        "data": {"path": str(train)},
        "eval": sets,
    }
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config | {"learn": {"policy": {"lr": 0.1}}}))
    capsys.readouterr()
    for source in (tmp_path / "run", tmp_path / "run" / "config.yaml"):
        assert cli.main(["contamination", str(source)]) == 0
        assert "mine" in capsys.readouterr().out


@real
def test_known_overlaps_of_the_real_sets():
    def read(path):
        return data.load(SetConfig(path=str(SHARED / path)))

    train, test, dev = (
        read(f"medqa/{name}.jsonl") for name in ("train_partial_3503", "test_4opt", "dev_4opt")
    )
    found = contamination.overlaps(train, {"test": test, "dev": dev})
    near = {name: {o.train_id[-5:] for o in found[name]} for name in ("test", "dev")}
    assert near["test"] == set("00123 01719 00771 02087 00060 02670 03274 02580 01974".split())
    # 00123 is short, and its words stand in several
    assert near["dev"] - {"00123"} == {"00378", "02359", "01703"}
    mmlu = [q for path in sorted((SHARED / "mmlu").glob("*_test.csv")) for q in read(f"mmlu/{path.name}")]
    pro = read("mmlu_pro/health_test.jsonl")
    same = {o.id for o in contamination.overlaps(mmlu, {"pro": pro})["pro"] if o.same_stem}
    assert len(same) == 507 and len({q.question for q in pro if q.id in same}) == 416
