"""Monitors on rows and records made by hand: what they count, when they speak, which rows they name."""

import dataclasses
import math

import numpy as np
import pytest
import yaml
from test_train import folder, lines, main  # noqa: F401  (a fixture)

from medrlvr_jax.config.load import from_tree
from medrlvr_jax.data.question import Question
from medrlvr_jax.evaluation import monitors
from medrlvr_jax.rewards import score, stages
from medrlvr_jax.rl import records
from medrlvr_jax.rl.advantages import compute
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.runs.metrics import is_due
from medrlvr_jax.types import Assessment

TREE = {
    "name": "run",
    "steps": 3,
    "model": {"path": "embedded"},
    "data": {"path": "embedded:train"},
    "learn": {"policy": {"lr": 1e-4}, "critic": {"lr": 1e-3}},
}
WELL = "<think>A swollen calf after a flight suggests a clot. Heparin acts at once.</think><answer>A</answer>"
LEAK = "<think>The answer is A. The calf is swollen and warm after a flight.</think><answer>A</answer>"
HACK = "<think>A</think><answer>B</answer>"
HEDGE = (
    "<think>Perhaps it is a clot, or maybe not. It might be a cyst, I am not sure.</think><answer>B</answer>"
)
LOOP = "<think>" + "the calf is warm and red " * 12 + "</think><answer>B</answer>"


def settings(**changes):
    return from_tree(TREE | changes)


def scored(completions, keys, samples):
    """Score `samples` completions of each question with two options."""
    n, config = len(completions), settings()
    questions = [
        Question(str(i), "?", ["heparin", "aspirin"], "AB".index(key), None, None)
        for i, key in enumerate(keys)
        for _ in range(samples)
    ]
    verdicts = score(
        completions, [k for k in keys for _ in range(samples)], [q.options for q in questions], config.reward
    )
    shown = [
        stages.stage(c, bool(ok), ["heparin", "aspirin"])
        for c, ok in zip(completions, verdicts.format_ok, strict=True)
    ]
    lengths = np.array([len(c.split()) for c in completions])
    tokens = np.zeros((n, lengths.max()), np.int32)
    stopped = np.ones(n, bool)
    return Scored(questions, [[]] * n, np.arange(n), completions, tokens, verdicts, lengths, stopped, shown)


def test_flags_of_each_completion():
    told = monitors.flag_completions(
        scored([WELL, LEAK, HACK, HEDGE, LOOP, "The answer is A, and so on and on and on"], "AAAAAA", 1)
    )
    assert {name: np.flatnonzero(column).tolist() for name, column in told.items()} == {
        "hacks": [2],
        "leak": [1],
        "hedging": [3],
        "repetition": [4],
    }
    at_its_end, outside = (
        "<think>The calf is swollen after a flight, so the answer is A.</think>",
        "The answer is A, as all of this shows. ",
    )
    assert monitors.leak_early([at_its_end, outside + "<think>A clot.</think>", LEAK]) == [False, False, True]


def test_letters_are_compared_with_the_keys_by_one_answer_to_each_question():
    a, b = (f"<think>clot</think><answer>{letter}</answer>" for letter in "AB")
    # The first samples are A in all 40 questions, of which half have the key A; the second samples are not
    # looked at.
    metrics = monitors.letter_metrics(scored([a, b] * 40, "AB" * 20, 2), 2)
    assert metrics["monitor/letter_shift"] == pytest.approx(0.5)
    # χ² = (20² + 20²) / 20 = 40, 1 degree
    assert metrics["monitor/letter_p"] == pytest.approx(math.erfc(math.sqrt(40 / 2)), rel=1e-6)
    [alarm] = monitors.find_alarms(metrics, [], settings())
    assert alarm.name == "monitor/letter_shift" and "50 %" in alarm.text
    rows = monitors.example_rows(alarm, scored([a, b] * 40, "AB" * 20, 2), metrics, 2)
    assert rows == [2, 6]  # wrong answers of the letter that is wrong most often; of two, the first
    # four questions show nothing
    assert (
        monitors.find_alarms(monitors.letter_metrics(scored([a, b] * 4, "AB" * 2, 2), 2), [], settings())
        == []
    )
    rare = monitors.letter_metrics(
        scored([a] * 40 + [b] * 4, "A" * 42 + "BB", 1), 1
    )  # two keys are no expectation
    assert rare["monitor/letter_p"] == 1.0 and rare["monitor/letter_shift"] == pytest.approx(2 / 44)


def test_shares_over_their_limits():
    metrics = {
        "monitor/hacks": 0.11,
        "truncated": 0.25,
        "equal_groups": 0.9,
        "sampler_ratio_far": 0.2,
        "kl": math.nan,
    }
    assert [a.name for a in monitors.find_alarms(metrics, [], settings())] == [
        "monitor/hacks",
        "equal_groups",
        "sampler_ratio_far",
    ]
    rounded = settings(model={"path": "unused", "dtype": "bfloat16"}, loss={"sampler_cap": 2.0})
    limits = {
        share: [a.name for a in monitors.find_alarms({"sampler_ratio_far": share}, [], rounded)]
        for share in (0.04, 0.2)
    }
    # bfloat16 rounds; a cap corrects for that, and hides no fault
    assert limits == {0.04: [], 0.2: ["sampler_ratio_far"]}
    corrected = settings(sample={"weights": "int8"}, loss={"sampler_cap": 2.0})
    assert [a.name for a in monitors.find_alarms(metrics, [], corrected)] == ["monitor/hacks", "equal_groups"]


@pytest.mark.parametrize(
    ("name", "usual", "value", "high"),
    [
        ("response_length", 100.0, 49.0, False),
        ("response_length", 100.0, 201.0, True),
        ("response_length", 100.0, 199.0, None),
        ("entropy", 0.9, 0.2, False),
        ("entropy", 0.005, 0.019, None),  # little, and still little
        ("kl", 0.02, 0.09, True),
        ("kl", 0.001, 0.04, None),
        ("kl", 0.0, 0.06, True),
    ],
)
def test_sudden_changes_of_metrics(name, usual, value, high):
    past = [{name: usual}] * 4 + [{name: None}, {}]
    assert monitors.find_alarms({name: value}, past, settings()) == []  # four values are not enough
    found = monitors.find_alarms(
        {name: value}, [{name: 1e6}] * 30 + [{name: usual}] * monitors.WINDOW, settings()
    )
    assert [(a.name, a.high) for a in found] == ([] if high is None else [(name, high)])


def test_example_rows_are_the_worst_of_this_process():
    # row 1 is another's
    rows = dataclasses.replace(scored([WELL, HACK, WELL], "ABB", 1), places=np.array([0, 2, 3]))
    assert monitors.example_rows(monitors.Alarm("response_length", "", high=True), rows, {}, 1) == [0, 2]
    assert monitors.example_rows(monitors.Alarm("response_length", "", high=False), rows, {}, 1)[0] == 1
    assert monitors.example_rows(monitors.Alarm("kl", ""), rows, {"row/kl_high": 3}, 1) == [2]
    assert monitors.example_rows(monitors.Alarm("kl", ""), rows, {"row/kl_high": 1}, 1) == []
    assert monitors.example_rows(monitors.Alarm("monitor/hacks", ""), rows, {}, 1) == [1]
    assert monitors.example_rows(
        monitors.Alarm("equal_groups", ""), scored([WELL, HACK, WELL, WELL], "AA", 2), {}, 2
    ) == [2]


def test_an_alarm_that_lasts_is_reported_at_intervals():
    found, history, said = [monitors.Alarm("monitor/hacks", "")], [], []
    for step in range(25):
        lasted, news = monitors.count_durations([] if step == 3 else found, history)
        history.append(lasted)
        said += [step] * len(news)
    assert [n for n in range(1, 14) if is_due("reward_clipped", n)] == [1, 11]
    assert said == [9, 19] and history[2] == {"alarm/hacks": 3} and history[4] == {"alarm/hacks": 1}


def test_constant_rewards_are_counted_and_stop_a_run(folder, capsys):  # noqa: F811
    changes = {
        "eval": {"batch": 8},
        "name": "constant",
        "steps": 9,
        "checkpoint": {"every": 0},
        "log": {"stop_constant": 2},
    }
    path = folder / "constant.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()) | changes))
    assert main("train", path) == 1  # a model of random weights never finds the form
    told = capsys.readouterr().err
    assert "nothing was learned from the rewards in 2 steps in a row; all rewards were -1: look at" in told
    assert "log.stop_constant=0 never stops" in told and "Step 2 is saved" in told
    assert told.count("NOTHING IS LEARNED FROM THE REWARDS, for 1 step now: all rewards were -1;") == 1
    assert "for 2 steps now" not in told and "row 0: " in told
    metrics = lines(folder / "runs/constant/metrics.jsonl")
    assert (
        [m["monitor/constant_reward"] for m in metrics]
        == [1, 2]
        == [m["alarm/constant_reward"] for m in metrics]
    )


def test_rewards_made_equal_by_clipping_raise_an_alarm_at_once_and_stop_the_run():
    """Rewards from 100 to 200 are cut to ±10, so they differ before and not after clipping."""
    config = settings(
        advantage={"estimator": "group"}, learn={"policy": {"lr": 1e-4}}, log={"stop_constant": 2}
    )
    rewards, zeros = np.float32([[100, 150], [120, 200]]), np.zeros((2, 2, 3), np.float32)
    assessment, mask = Assessment(zeros, zeros, None, None), np.ones((2, 2, 3), bool)
    advantages, _, stats = compute(config.advantage, config.kl, rewards, assessment, mask, np.float32(0))
    metrics = {name: float(value) for name, value in stats.items()}
    assert (
        not advantages.any()
        and metrics["equal_groups"] == metrics["no_contrast"] == metrics["reward_clipped"] == 1
    )
    first = metrics | monitors.count_idle(metrics, [])
    [alarm] = monitors.find_alarms(first, [], config)
    assert alarm.name == "monitor/constant_reward" and not monitors.has_stalled(first, config)
    assert "100 % of the rewards, 142.5 on average, were cut to ±10 (advantage.reward_clip)" in alarm.text
    assert monitors.has_stalled(metrics | monitors.count_idle(metrics, [first]), config)
    some = metrics | {"equal_groups": 0.5, "no_contrast": 0.0, "reward_clipped": 0.5}
    some |= monitors.count_idle(some, [first])
    assert [a.name for a in monitors.find_alarms(some, [], config)] == ["reward_clipped"] and some[
        "monitor/constant_reward"
    ] == 0


@pytest.mark.parametrize(
    ("changes", "steps", "reason"),
    [
        ({}, 0, None),
        # the metrics of a skipped update are 0, and it has its own alarm
        ({"policy/skipped": 1.0, "policy/grad_norm": 0.0}, 0, None),
        ({"policy/grad_norm": 0.0}, 4, "the policy's gradient was exactly 0"),
        ({"no_contrast": 1.0}, 4, "not between samples of one"),
        ({"no_contrast": 1.0, "reward_std": 0.0}, 4, "all rewards were 0.5"),
        ({"no_contrast": 1.0, "unlearned": 1.0}, 4, "the user's reward failed on samples of each"),
    ],
)
def test_steps_without_learning_are_counted(changes, steps, reason):
    metrics = {
        "no_contrast": 0.0,
        "policy/grad_norm": 0.1,
        "policy/skipped": 0.0,
        "reward": 0.5,
        "reward_std": 0.5,
    } | changes
    metrics |= monitors.count_idle(metrics, [{"monitor/constant_reward": 3}])
    assert metrics["monitor/constant_reward"] == steps
    assert reason is None or reason in monitors.find_alarms(metrics, [], settings())[-1].text


def test_a_control_run_with_constant_rewards_continues():
    metrics = {"monitor/constant_reward": 20, "reward": 0.0}
    for changes, stops in (
        ({}, True),
        ({"log": {"stop_constant": 0}}, False),
        ({"log": {"stop_constant": 21}}, False),
    ):
        assert monitors.has_stalled(metrics, settings(**changes)) == stops and monitors.find_alarms(
            metrics, [], settings(**changes)
        )
    control = settings(reward={"unformatted": 0.0, "correct": 0.0})
    assert not monitors.has_stalled(metrics, control) and not monitors.find_alarms(metrics, [], control)


def test_there_are_no_stages_without_thoughts():
    rows = scored([WELL, HACK], ["A", "A"], 1)
    assert records.summarise({}, rows)["stage/reintegrated_reasoning"] == 0.5
    assert not any(
        k.startswith("stage/") for k in records.summarise({}, dataclasses.replace(rows, stages=[None, None]))
    )
