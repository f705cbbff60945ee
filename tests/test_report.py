"""Intervals against published values; pictures that draw what there is and do not touch pyplot."""

import sys
from pathlib import Path

import numpy as np
import pytest

from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.report import ending, explore, pictures


def test_smooth_is_a_running_mean_with_fewer_values_at_the_ends():
    assert pictures.smooth(np.array([1.0, 2.0, 6.0]), 3) == pytest.approx([1.5, 3.0, 4.0])
    assert pictures.smooth(np.array([3.0]), 1) == pytest.approx([3.0])
    values = np.arange(40.0)
    assert pictures.smooth(values, 5)[2:-2] == pytest.approx(values[2:-2])


def test_steps_that_only_some_runs_recorded():
    runs = [
        explore.columns([{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}]),
        explore.columns([{"step": 2, "kl": 1.5}, {"step": 3, "reward": 1.0}]),
    ]
    steps, values = explore.over_steps(runs, "kl", 150)
    assert steps.tolist() == [1, 2]
    assert np.array_equal(values, [[0.5, np.nan], [np.nan, 1.5]], equal_nan=True)
    assert explore.over_steps(runs, "entropy", 150)[0].tolist() == []
    steps, values = explore.over_steps(runs, "kl", 1)
    assert steps.tolist() == [2] and values.tolist() == [[0.5], [1.5]]


def test_the_last_message_has_changes_folder_and_next_commands():
    before, after = (
        {"n": 1273, "correct": 400, "format_ok": 0},
        {"n": 1273, "correct": 700, "format_ok": 1273},
    )
    sets = {"medqa": {"before": before, "after": after}, "late_only": {"after": after}}
    sets["same"] = {"before": after, "after": after | {"correct": 710}}
    text = ending.ending({"steps": 32, "seconds": 65, "eval": sets}, Path("runs/mine"))
    lines = [line for line in text.splitlines() if "file://" not in line]
    assert "runs/mine: 32 steps in 0:01:05" in text and max(map(len, lines)) <= 80
    medqa, late, same = text.split("\n\n")[1:4]
    assert "31.4 % (28.9–34.0)  →  55.0 % (52.2–57.7)" in medqa and "→  100.0 % (99.7–100.0)" in medqa
    assert (
        "1,273" in medqa
        and medqa.endswith("Significantly more answers are right than before: +23.6 points.")
        and "–  →" in late
    )
    assert same.endswith("No clear change: +0.8 points, and the intervals overlap.")
    assert f"file://{Path.cwd()}/runs/mine/report.html" in text.split("\n\n")[4]


@pytest.fixture
def runs(tmp_path):
    random = np.random.default_rng(0)
    for name, n in (("long", 120), ("short", 1)):
        counts = {
            "eval.dev.n": 50,
            "eval.dev.correct": 10,
            "eval.dev.format_ok": 50,
        }
        records = [{"step": 0, **counts}] + [
            {
                "step": k,
                "reward": random.normal(),
                "accuracy": 0.3,
                "format_ok": 1.0,
                "response_length": 80,
                "kl": None,
            }
            for k in range(1, n)
        ]
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "metrics.jsonl", records)
    return tmp_path


@pytest.mark.parametrize("names", [["short"], ["long"] * 9])
def test_curves_draw_short_and_long_runs(runs, names):
    pictures.curves([runs / name for name in names], runs / "curves.png")
    data = (runs / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG") and 1200 < int.from_bytes(data[16:20]) < 2000
    assert "matplotlib.pyplot" not in sys.modules


def test_evaluations_above_the_curve_are_within_the_axis(tmp_path, monkeypatch):
    counts = {"eval.dev.n": 50, "eval.dev.correct": 40, "eval.dev.format_ok": 50}
    files.append(
        tmp_path / "metrics.jsonl", [{"step": 1, "accuracy": 0.3}, {"step": 2, "accuracy": 0.3} | counts]
    )
    figures = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    pictures.curves([tmp_path], tmp_path / "curves.png")
    bottom, top = figures[0].axes[1].get_ylim()
    assert bottom == 0 and top > 0.88  # the upper end of the interval of 40 of 50


def test_curves_name_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl there"):
        pictures.curves([tmp_path], tmp_path / "curves.png")


def test_short_names_are_distinct(tmp_path):
    folders = [tmp_path / x for x in ("a/ppo", "b/ppo", "b/grpo", "b/deep/ppo")]
    assert files.short_names(folders) == ["a/ppo", "b/ppo", "grpo", "deep/ppo"]
    assert files.short_names([folders[0], folders[0]]) == ["ppo", "ppo"]
