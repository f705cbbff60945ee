"""One evaluation, and two side by side, by hand."""

import io
import json
import os

import numpy as np
import pytest

from medrlvr_jax import cli
from medrlvr_jax.evaluation import answers, compare, stats
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.report import ending
from medrlvr_jax.runs import console


def write(folder, name, answers, key="A", hashes=str, **settings):
    """Write answers by question id, and an eval.json with `settings`. `hashes` gives the hash of an id."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, given in answers.items():
        for g in given:
            row = {
                "id": i,
                "answer": g or None,
                "key": key,
                "correct": g == key,
                "options": 4,
                "question_hash": hashes(i),
            }
            rows.append(row)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tree = {
        "prompt": {"chat": False, "prefill": ""},
        "reward": {"mode": "strict"},
        "sample": {"max_new_tokens": 8},
    }
    tree["eval"] = {
        "samples": 1,
        "temperature": 0.0,
        "max_new_tokens": None,
        "sets": {n: {"shuffle_options": False} for n in SETS},
    }
    for field, value in settings.items():
        tree["eval"][field] = value
    counts = {n: {"n": 1, "questions": 1, "dropped_prompts": 0, "truncated": 0} for n in SETS}
    log = {"config": tree, "template": "Question: {question}", "eval": counts}
    (folder / "eval.json").write_text(json.dumps(log))


SETS = ("dev", "same", "test")


def test_pairs_by_id_and_counts_by_hand(tmp_path, capsys):
    a = {f"q{i}": "A" if i < 8 else "B" for i in range(10)}
    b = {f"q{i}": ["A" if i in (0, 9) else ""] for i in reversed(range(12))}
    for folder, given in (("a", a), ("b", b)):
        write(tmp_path / folder, "dev", given)
        write(tmp_path / folder, "same", a)
    with pytest.raises(
        ConfigError,
        match=r"dev: .* differ in more than the model; .*--anyway:\n  0 questions .* A alone, 2 in B alone",
    ):
        compare.compare(tmp_path / "a", tmp_path / "b")
    found = compare.compare(tmp_path / "a", tmp_path / "b", anyway=True)
    dev = found["dev"]
    assert (dev["n"], dev["only_a"], dev["only_b"]) == (10, 7, 1)
    assert (
        dev["p"] == pytest.approx(2 * 9 / 2**8)
        and dev["p_holm"] == pytest.approx(2 * dev["p"])
        and found["same"]["p_holm"] == 1
    )
    assert dev["a"].value == 0.8 and dev["b"].value == 0.2 and dev["difference"].value == pytest.approx(-0.6)
    assert [dev["boundary"][k] for k in ("preserved", "gained", "lost", "never")] == [1, 1, 7, 1]
    # equal answers to 10 questions
    assert found["same"]["difference"].low < -0.19 and found["same"]["difference"].high > 0.19
    assert (
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
        and "B alone" in capsys.readouterr().err
    )
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--anyway", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dev"]["difference"]["value"] == pytest.approx(-0.6)
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--anyway"]) == 0
    shown = capsys.readouterr().out
    assert (
        "-60.0 %" in shown
        and "10 questions show" in shown
        and shown.endswith(
            "dev: b and a do not differ significantly.\nsame: b and a do not differ significantly.\n"
        )
        and "dev: not only the model differs: 0 questions were answered in A" in shown
    )


def test_samples_count_by_question(tmp_path):
    rng = np.random.default_rng(0)
    a = {str(i): ["A" if rng.random() < 0.3 else "B" for _ in range(4)] for i in range(60)}
    b = {str(i): ["A" if rng.random() < 0.8 else "" for _ in range(4)] for i in range(60)}
    write(tmp_path / "a", "dev", a)
    write(tmp_path / "b", "dev", b)
    dev = compare.compare(tmp_path / "a", tmp_path / "b")["dev"]
    assert dev["only_a"] is None and dev["p"] < 1e-9
    each = dev["each"]["b"]
    assert (
        each["samples"] == 4
        and each["pass_at_k"][1] == pytest.approx(dev["b"])
        and each["pass_at_k"][4].value > 0.9
    )
    assert each["pass_at_k_beyond_chance"][1] == pytest.approx(
        [(p - 0.25) / 0.75 for p in each["pass_at_k"][1]]
    )
    write(tmp_path / "c", "dev", a)
    assert compare.compare(tmp_path / "a", tmp_path / "c")["dev"]["p"] == 1


def test_evaluations_without_pairs_are_refused(tmp_path):
    write(tmp_path / "a", "dev", {"1": "A"})
    write(tmp_path / "b", "dev", {"2": "A"})
    write(tmp_path / "c", "test", {"2": "A"})
    with pytest.raises(ConfigError, match="dev: the two evaluations share no question"):
        compare.compare(tmp_path / "a", tmp_path / "b", anyway=True)
    with pytest.raises(ConfigError, match="no set of answers in all of them"):
        compare.compare(tmp_path / "a", tmp_path / "c")
    different = iter("xy")
    write(tmp_path / "d", "dev", {"1": "AB"}, hashes=lambda _: next(different))
    with pytest.raises(
        ConfigError,
        match="answers to different questions with the id '1'; give each question an id of its own",
    ):
        answers.read(tmp_path / "d" / "dev.jsonl")
    write(tmp_path / "d", "dev", {"1": "AB", "2": "A"})
    with pytest.raises(ConfigError, match=r"questions with \[1, 2\] samples"):
        answers.read(tmp_path / "d" / "dev.jsonl")


def test_one_evaluation_by_hand(tmp_path):
    rows = [
        {
            "id": "1",
            "subject": "heart",
            "answer": "A",
            "key": "A",
            "correct": True,
            "format_ok": True,
            "options": 2,
            "entropy": 0.5,
        },
        {
            "id": "1",
            "subject": "heart",
            "answer": None,
            "key": "A",
            "correct": False,
            "format_ok": False,
            "options": 2,
            "entropy": 1.5,
        },
        *2
        * [
            {
                "id": "2",
                "subject": "lung",
                "answer": "B",
                "key": "A",
                "correct": False,
                "format_ok": True,
                "options": 2,
                "entropy": 1.0,
            }
        ],
    ]
    rows += [row | {"id": "3", "repeats": "1"} for row in rows[:2]]
    found = answers.describe(answers.from_rows(rows, "set"))
    assert (found["n"], found["samples"], found["accuracy"].value) == (3, 2, pytest.approx(1 / 3))
    assert found["format_ok"].value == pytest.approx(4 / 6) and found["token_entropy"] == 1.0
    assert {k: p.value for k, p in found["pass_at_k"].items()} == {
        1: pytest.approx(1 / 3),
        2: pytest.approx(2 / 3),
    }
    beyond, (_, low, high) = found["pass_at_k_beyond_chance"][2], stats.mean_share(np.array([1, 0, 1]))
    assert beyond == pytest.approx([(p - 0.75) / 0.25 for p in (2 / 3, low, high)])
    assert found["majority"] == stats.mean_share(np.array([1, 0, 1])) and found[
        "answer_entropy"
    ] == pytest.approx(np.log(2) * 2 / 3)
    assert {name: (s["n"], s["accuracy"].value) for name, s in found["subjects"].items()} == {
        "heart": (2, 0.5),
        "lung": (1, 0.0),
    }
    assert found["letters"]["letters"] == {
        "A": {"answered": 0.5, "key": 1.0},
        "B": {"answered": 0.5, "key": 0.0},
    }
    assert (
        found["distinct"]["n"] == 2
        and found["distinct"]["accuracy"].value == 0.25
        and "distinct" not in found["distinct"]
    )
    shown = answers.show({"set": found})
    assert (
        "set, distinct" in shown
        and "66.7 % (20.8–93.9)" in shown
        and "-33.3 % (-216.9 to 75.4)" in shown
        and "ties are drawn with equal chances" in shown
    )


def test_repeats_of_a_question_are_not_counted_again(tmp_path):
    for folder, given in (("a", "A"), ("b", "B")):
        write(tmp_path / folder, "dev", {str(i): given for i in range(8)})
        path = tmp_path / folder / "dev.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps(r | ({"repeats": "0"} if int(r["id"]) > 4 else {})) + "\n" for r in rows)
        )
    dev = compare.compare(tmp_path / "a", tmp_path / "b")["dev"]
    assert (dev["only_a"], dev["distinct"]["only_a"], dev["distinct"]["p_holm"]) == (
        8,
        5,
        2 / 2**5,
    ) and "p_holm" not in dev
    assert "dev, distinct" in compare.show({"dev": dev})


def test_questions_are_paired_by_hash_and_not_by_id_alone(tmp_path):
    """The ids are line numbers of a file that was reordered, so equal ids belong to different questions."""
    given = {str(i): "A" if i < 50 else "B" for i in range(100)}
    write(tmp_path / "a", "dev", given)
    write(
        tmp_path / "b",
        "dev",
        dict(zip(given, reversed(given.values()), strict=True)),
        hashes=lambda i: str(99 - int(i)),
    )
    with pytest.raises(ConfigError, match="100 ids, the first is '0', are of other questions or keys in B"):
        compare.compare(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "b", "dev", given, hashes=lambda i: i if int(i) < 60 else "another")
    dev = compare.compare(tmp_path / "a", tmp_path / "b", anyway=True)["dev"]
    assert (dev["n"], dev["only_a"], dev["only_b"]) == (60, 0, 0)


def test_evaluations_with_other_settings_are_refused(tmp_path):
    write(tmp_path / "a", "dev", {"1": "A", "2": "B"})
    write(tmp_path / "b", "dev", {"1": "AB", "2": "BB"}, samples=2, temperature=1.0)
    with pytest.raises(
        ConfigError, match=r"eval.samples: 1 in A, 2 in B\n  eval.temperature: 0.0 in A, 1.0 in B$"
    ):
        compare.compare(tmp_path / "a", tmp_path / "b")
    dev = compare.compare(tmp_path / "a", tmp_path / "b", anyway=True)
    assert dev["dev"]["boundary"] is None and "solved:" not in compare.show(
        dev
    )  # two samples solve more than one does
    (tmp_path / "b" / "eval.json").write_text("{}")
    with pytest.raises(
        ConfigError,
        match=r"b/eval.json does not say how it was made, as an older version wrote it; evaluate again",
    ):
        compare.compare(tmp_path / "a", tmp_path / "b")


def test_the_newest_evaluation_of_a_run_is_used_or_made(tmp_path, monkeypatch):
    for i, step in enumerate((32, 4)):
        (tmp_path / "run").mkdir(exist_ok=True)
        write(tmp_path / "run" / f"eval-{step}", "dev", {"1": "A"})
        os.utime(tmp_path / "run" / f"eval-{step}" / "eval.json", (i, i))
    assert compare.evaluation(tmp_path / "run") == tmp_path / "run" / "eval-4"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "new" / "config.yaml").write_text("name: new\n")
    evaluated = []
    monkeypatch.setattr(
        compare,
        "evaluate_source",
        lambda source, *_: (evaluated.append(source), write(source / "eval-1", "dev", {"1": "A"})),
    )
    assert compare.evaluation(tmp_path / "new") == tmp_path / "new" / "eval-1" and len(evaluated) == 1
    compare.evaluation(tmp_path / "new")
    assert len(evaluated) == 1
    with pytest.raises(ConfigError, match=r"no eval\.json there; give a run's folder"):
        compare.evaluation(tmp_path)


def test_evaluations_have_the_names_of_their_runs(tmp_path):
    for name in ("ppo", "grpo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    ppo, grpo = tmp_path / "ppo" / "eval-32", tmp_path / "grpo" / "eval-32"
    pair = compare.names_of([ppo, grpo])
    assert pair == ["ppo", "grpo"] and compare.names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert compare.names_of([ppo, ppo.with_name("eval-8")]) == ["ppo/eval-32", "ppo/eval-8"]
    others = [tmp_path / folder / "ppo" / "eval-32" for folder in ("one", "two", "three")]
    for other in others:
        other.mkdir(parents=True)
        (other.parent / "config.yaml").touch()
    assert compare.names_of(others) == ["one/ppo", "two/ppo", "three/ppo"]
    better = {"difference": stats.Interval(-0.123, -0.2, -0.1), "p_holm": 0.01}
    said = "dev: ppo answers more questions right than grpo, by 12.3 points."
    assert compare.verdict("dev", better, pair) == said


def test_the_minimum_detectable_difference_follows_from_the_variance_of_differences():
    """One model is sampled twice, 16 answers to each question, so most differences are small but not 0."""
    rng = np.random.default_rng(0)
    easiness = rng.beta(0.7, 0.7, 1273)[:, None]
    a, b = (rng.random((1273, 16)) < easiness for _ in range(2))
    found = stats.paired_difference(a, b)
    assert (
        found.minimum_detectable
        == pytest.approx(2.8 * np.std(a.mean(1) - b.mean(1)) / np.sqrt(1273), rel=0.03)
        and found.minimum_detectable < 0.011
    )
    assert (found.high - found.low) / 2 < found.minimum_detectable


def test_dropped_questions_and_truncated_answers_are_reported(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, "dev", {"q": "A"})
    made = json.loads((tmp_path / "b" / "eval.json").read_text())
    counts = {"n": 1, "questions": 1, "dropped_prompts": 2, "truncated": 1}
    (tmp_path / "b" / "eval.json").write_text(json.dumps(made | {"eval": {"dev": counts}}))
    found = compare.compare(tmp_path / "a", tmp_path / "b")
    assert found["dev"]["remarks"] == answers.remarks("dev, B", counts) and len(found["dev"]["remarks"]) == 2
    assert "\n".join(found["dev"]["remarks"]) in compare.show(found)


def test_remarks_on_dropped_questions_and_truncated_answers():
    counts = {"n": 40, "questions": 20, "dropped_prompts": 5, "truncated": 10}
    assert answers.remarks("mine", counts) == [
        "mine: 5 of 25 questions dropped, not in these figures: longer than prompt.max_tokens; raise it",
        "mine: 10 of 40 answers (25.0 %) cut off before their end, so mostly unformatted; raise eval.max_new_tokens",
    ]
    assert answers.remarks("mine", counts | {"dropped_prompts": 0, "truncated": 0}) == []
    interval = {f"{key}_{end}": 0.5 for key in ("accuracy", "format") for end in ("low", "high")}
    after = counts | interval | {"correct": 1, "format_ok": 1, "accuracy": 0.025, "format_rate": 0.025}
    assert "\n".join(answers.remarks("mine", after)) in "\n".join(ending.changes("mine", None, after))
    text = io.StringIO()
    console.Console(2, text).step(2, {f"eval.mine.{key}": value for key, value in after.items()})
    assert text.getvalue() == "step 2/2  eval mine: correct 1/40, format 1/40, cut off 10/40\n"


def test_several_evaluations_in_one_table(tmp_path, capsys):
    """Three models on four questions of two subjects; the second gains one of each, the third loses one."""
    right = {"base": "q0 q1", "ct": "q0 q1 q2 q3", "mri": "q1"}
    for name, hits in right.items():
        write(tmp_path / name, "dev", {f"q{i}": ["A" if f"q{i}" in hits else "B"] for i in range(4)})
        file = tmp_path / name / "dev.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [row | {"subject": "CT" if i % 2 else "MRI"} for i, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = compare.matrix([tmp_path / name for name in right])
    values = {t: {n: (c["n"], c["accuracy"].value, c["gain"].value) for n, c in x.items()}
              for t, x in columns.items() if t != "mean"}  # fmt: skip
    assert values["dev"] == {"base": (4, 0.5, 0), "ct": (4, 1, 0.5), "mri": (4, 0.25, -0.25)}
    assert values["dev: CT"]["mri"] == (2, 0.5, 0) and values["dev: MRI"]["mri"] == (2, 0, -0.5)
    assert columns["mean"]["mri"] == {"accuracy": 0.25, "gain": -0.25}
    assert cli.main(["compare", *(str(tmp_path / name) for name in right)]) == 0
    table = capsys.readouterr().out
    assert "gain over base" in table and "-25.0 % (" in table and "dev: MRI" in table
    write(tmp_path / "mri", "dev", {"q0": ["A"]}, temperature=1.0)
    with pytest.raises(ConfigError, match=r"eval\.temperature: 0\.0 in A, 1\.0 in B"):
        compare.matrix([tmp_path / name for name in right])
