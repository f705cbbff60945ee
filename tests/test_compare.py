"""One evaluation, and two side by side, by hand."""

import json

import numpy as np
import pytest

from medrlvr_jax import __main__, answers, compare
from medrlvr_jax.config import ConfigError


def write(folder, name, answers, key="A", samples=1):
    """Answers by question; ids are their places, from the back in the second folder, so that pairing has to look at them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, given in answers.items():
        for g in given:
            rows.append({"id": i, "answer": g or None, "key": key, "correct": g == key, "options": 4})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_pairs_by_id_and_counts_by_hand(tmp_path, capsys):
    a = {f"q{i}": "A" if i < 8 else "B" for i in range(10)}
    b = {f"q{i}": ["A" if i in (0, 9) else ""] for i in reversed(range(12))}
    for folder, given in (("a", a), ("b", b)):
        write(tmp_path / folder, "dev", given)
        write(tmp_path / folder, "same", a)
    found = compare.compare(tmp_path / "a", tmp_path / "b")
    dev = found["dev"]
    assert (dev["n"], dev["only_a"], dev["only_b"]) == (10, 7, 1)
    assert dev["p"] == pytest.approx(2 * 9 / 2**8) and dev["p_holm"] == pytest.approx(2 * dev["p"]) and found["same"]["p_holm"] == 1
    assert dev["a"]["value"] == 0.8 and dev["b"]["value"] == 0.2 and dev["difference"]["value"] == pytest.approx(-0.6)
    assert [dev["boundary"][k] for k in ("preserved", "gained", "lost", "never")] == [1, 1, 7, 1]
    assert found["same"]["detectable"] is None
    assert __main__.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "-60.0 %" in shown and "dev: 10 questions show" in shown


def test_samples_count_by_question(tmp_path):
    rng = np.random.default_rng(0)
    a = {str(i): ["A" if rng.random() < 0.3 else "B" for _ in range(4)] for i in range(60)}
    b = {str(i): ["A" if rng.random() < 0.8 else "" for _ in range(4)] for i in range(60)}
    write(tmp_path / "a", "dev", a)
    write(tmp_path / "b", "dev", b)
    dev = compare.compare(tmp_path / "a", tmp_path / "b")["dev"]
    assert dev["only_a"] is None and dev["p"] == pytest.approx(1 / 10_001)
    each = dev["each"]["b"]
    assert each["samples"] == 4 and each["pass_at_k"][1] == pytest.approx(dev["b"]["value"]) and each["pass_at_k"][4] > 0.9
    assert each["pass_at_k_beyond_chance"][1] == pytest.approx((each["pass_at_k"][1] - 0.25) / 0.75)
    write(tmp_path / "c", "dev", a)
    assert compare.compare(tmp_path / "a", tmp_path / "c")["dev"]["p"] == 1


def test_what_cannot_be_paired_is_refused(tmp_path):
    write(tmp_path / "a", "dev", {"1": "A"})
    write(tmp_path / "b", "dev", {"2": "A"})
    write(tmp_path / "c", "test", {"2": "A"})
    with pytest.raises(ConfigError, match="dev: the two evaluations share no question id"):
        compare.compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match="no set of answers in both"):
        compare.compare(tmp_path / "a", tmp_path / "c")
    write(tmp_path / "d", "dev", {"1": "AB", "2": "A"})
    with pytest.raises(ConfigError, match=r"questions with \[1, 2\] samples"):
        answers.read(tmp_path / "d" / "dev.jsonl")


def test_one_evaluation_by_hand(tmp_path):
    rows = [
        {"id": "1", "subject": "heart", "answer": "A", "key": "A", "correct": True, "format_ok": True, "options": 2, "entropy": 0.5},
        {"id": "1", "subject": "heart", "answer": None, "key": "A", "correct": False, "format_ok": False, "options": 2, "entropy": 1.5},
        {"id": "2", "subject": "lung", "answer": "B", "key": "A", "correct": False, "format_ok": True, "options": 2, "entropy": 1.0},
        {"id": "2", "subject": "lung", "answer": "B", "key": "A", "correct": False, "format_ok": True, "options": 2, "entropy": 1.0},
    ]
    rows += [row | {"id": "3", "repeats": "1"} for row in rows[:2]]
    found = answers.describe(answers.of_rows(rows, "set"))
    assert (found["n"], found["samples"], found["accuracy"]["value"]) == (3, 2, pytest.approx(1 / 3))
    assert found["format_ok"]["value"] == pytest.approx(4 / 6) and found["token_entropy"] == 1.0
    assert found["pass_at_k"] == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    assert found["pass_at_k_beyond_chance"][2] == pytest.approx((2 / 3 - 0.75) / 0.25)
    assert found["majority"] == pytest.approx(2 / 3) and found["answer_entropy"] == pytest.approx(np.log(2) * 2 / 3)
    assert {name: (s["n"], s["accuracy"]["value"]) for name, s in found["subjects"].items()} == {"heart": (2, 0.5), "lung": (1, 0.0)}
    assert found["letters"]["letters"] == {"A": {"answered": 0.5, "key": 1.0}, "B": {"answered": 0.5, "key": 0.0}}
    assert found["distinct"]["n"] == 2 and found["distinct"]["accuracy"]["value"] == 0.25 and "distinct" not in found["distinct"]
    shown = answers.show({"set": found})
    assert "set, distinct" in shown and "66.7 % (-33.3)" in shown and "ties are drawn with equal chances" in shown


def test_a_repeat_is_no_new_evidence(tmp_path):
    for folder, given in (("a", "A"), ("b", "B")):
        write(tmp_path / folder, "dev", {str(i): given for i in range(8)})
        path = tmp_path / folder / "dev.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(r | ({"repeats": "0"} if int(r["id"]) > 4 else {})) + "\n" for r in rows))
    dev = compare.compare(tmp_path / "a", tmp_path / "b")["dev"]
    assert (dev["only_a"], dev["distinct"]["only_a"], dev["distinct"]["p_holm"]) == (8, 5, 2 / 2**5) and "p_holm" not in dev
    assert "dev, distinct" in compare.show({"dev": dev})
