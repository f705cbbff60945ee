"""Two evaluations side by side, by hand."""

import json

import numpy as np
import pytest

from medrlvr_jax import __main__, compare
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
    for folder, answers in (("a", a), ("b", b)):
        write(tmp_path / folder, "dev", answers)
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
        compare.read_answers(tmp_path / "d" / "dev.jsonl")
