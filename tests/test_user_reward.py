"""A user's reward function: its failures on completions fail their rows, not the run, and are logged."""

import asyncio
import math
import os
import re
import time

import jax
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from rewards_of_users import POISON
from test_learn import CFG
from test_train import NO_EVAL, folder, lines, main  # noqa: F401  (a fixture)

from medrlvr_jax import build, sharding
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.reward import FunctionConfig, RewardConfig
from medrlvr_jax.config.schema import AdvantageConfig, KLConfig, LossConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards import grade, user
from medrlvr_jax.rewards.training import components_from_callables, start_components
from medrlvr_jax.rewards.user import RewardError, WorkerFunction
from medrlvr_jax.rl import experience
from medrlvr_jax.rollout.rollout import encode, score_rollout
from medrlvr_jax.types import Assessment, Prompts, Rollout

ROW = ("fine", "A", ("a", "b"), "?")


def rows(n, *poisoned):
    return [(POISON, *ROW[1:]) if i in poisoned else ROW for i in range(n)]


@pytest.fixture(scope="module")
def worker():
    """One worker for all functions, since starting one takes a second. `use` restarts it with another name."""
    made = WorkerFunction(FunctionConfig(fn="rewards_of_users:length", deadline=2.0))
    yield made
    made.close()


def use(worker, name):
    worker.close()
    worker.name = f"rewards_of_users:{name}"
    return worker


def test_the_function_gets_its_arguments_and_fractions_are_kept(worker):
    got, failed = worker.score(
        [("abc", "B", ("x", "y"), "?"), ("", "A", ("x", "y", "z"), "why?"), ("\ud800", "A", ("x", "y"), "?")]
    )
    assert got == [3 / 8 + 1 + 2 / 16 + 1 / 64, 3 / 16, 1 / 8 + 2 / 16 + 1 / 64] and failed == {}
    assert worker.score([]) == ([], {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", r"ValueError: no such drug \(rewards_of_users.py, line \d+\)"),
        ("dies", "its process ended with status 7"),
        ("forgets", "it returned 0 values for 1 completions"),
        ("nan", "it returned nan"),
        ("words", "it returned 'good', which is not a number"),
        ("digits", "it returned '0.25', which is not a number"),
        ("absent", "it returned None, which is not a number"),
        ("boxed", r"it returned array\(\[0.25\]\), which is not a number"),
        ("huge", r"it returned 1e\+39"),
        ("silent", "it returned None, which is not one number for each completion"),
    ],
)
def test_a_completion_on_which_it_fails_fails_its_row(worker, name, said):
    got, failed = use(worker, name).score(rows(6, 4))
    assert [r for r in got if math.isfinite(r)] == [0.25] * 5 and math.isnan(got[4])
    assert list(failed) == [4]
    assert re.search(said, failed[4])


@pytest.mark.parametrize("name", ["array", "generator", "views", "booleans"])
def test_any_ordered_values_are_accepted(worker, name):
    assert use(worker, name).score(rows(3)) == ([1.0, 0.0, 1.0], {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "mean",
            "it returned 1 value for 8 completions, though it scores 2 of them one by one: it must return one number for each",
        ),
        ("distinct", "it returned 1 value for 8 completions, though it scores 2 of them one by one"),
        ("doubled", "failed on all 8 completions of a batch: it returned 2 values for 1 completions;"),
        (
            "mapping",
            r"failed on all 8 completions of a batch: it returned {0: 0.25}, which is not one number for each completion",
        ),
        (
            "columns",
            r"failed on all 8 completions of a batch: it returned array\(\[0.25\]\), which is not a number",
        ),
        ("lists", r"failed on all 8 completions of a batch: it returned \[0.25\], which is not a number"),
        (
            "scalar",
            "failed on all 8 completions of a batch: it returned 0.25, which is not one number for each completion",
        ),
    ],
)
def test_values_that_belong_to_no_row_end_the_run(worker, name, said):
    with pytest.raises(RewardError, match=f"reward.fn: rewards_of_users:{name}.*{said}"):
        use(worker, name).score(rows(8))


def test_a_miscount_differs_from_rows_that_fail(worker):
    """Two rows are left out of the values, each alone too: they fail. A batch with other faults beside a
    miscount is refused as well.
    """
    got, failed = use(worker, "forgets").score(rows(8, 1, 6))
    assert sorted(failed) == [1, 6] and [r for r in got if math.isfinite(r)] == [0.25] * 6
    with pytest.raises(RewardError, match="it returned 1 value for 2 completions"):
        use(worker, "mean_raises").score(rows(4, 3))


def test_an_edited_module_is_imported_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (0.25, 0.125):
        (tmp_path / "edited_reward.py").write_text(
            f"def f(completions, *_):\n    return [{value}] * len(completions)\n"
        )
        with start_components(RewardConfig(fn="edited_reward:f")) as [component]:
            assert component.function.score(rows(2)) == ([value] * 2, {})
        assert not component.function._process.is_alive()


def test_a_completion_on_which_it_hangs_fails_its_row_within_the_deadlines(worker):
    began = time.monotonic()
    got, failed = use(worker, "hangs").score(rows(4, 0))
    assert math.isnan(got[0]) and got[1:] == [0.25] * 3 and "took longer than 0.5 s" in failed[0]
    assert (
        time.monotonic() - began < user.MAX_DEADLINES * 2.0 + 60
    )  # and workers that start on a busy machine
    before = worker._process.pid
    # the worker of the last good part goes on
    assert worker.score(rows(2)) == ([0.25] * 2, {}) and worker._process.pid == before


def test_several_callables_are_weighted_and_have_distinct_names():
    def f(completions):
        return [1.0 if c == "fine" else math.nan for c in completions]

    def f_2(keys):
        return [2.0] * len(keys)

    def paid(rewards, completions):
        questions = [Question("", "?", ("a", "b"), 0)] * len(completions)
        return grade(completions, questions, components=components_from_callables(rewards))

    got = paid([f, (f, 0.5), (f_2, -1)], ["fine", POISON])
    assert list(got.components) == list(got.reported_components) == ["f", "f_2", "f_2_2"]
    assert got.reward[0] == -0.5 and math.isnan(got.reward[1])
    assert got.components["f_2_2"].tolist() == [2.0, 2.0] and got.failed == {1: "f: it returned nan"}
    got = paid((f,), ["fine"])
    assert got.reward.tolist() == [1.0] and got.failed == got.reported_components == {}


def test_a_coroutine_is_called_for_each_completion_and_fails_rows_alone(worker):
    completions = ["abcd", POISON, "raises", "absent", "ab"]
    rows = [(c, *ROW[1:]) for c in completions]
    began = time.monotonic()
    got, failed = use(worker, "asks").score(rows)
    assert [got[0], got[4]] == [1.5, 1.25] and sorted(failed) == [1, 2, 3]
    assert failed[1] == "it took longer than 2 s" and "no such drug" in failed[2]
    assert "not a number" in failed[3] and time.monotonic() - began < 2 + user.GRACE_SECONDS + 60
    with pytest.raises(ConfigError, match="needs needs an argument 'reference', which it never gets"):
        WorkerFunction(FunctionConfig(fn="rewards_of_users:needs"))


def test_calls_of_a_coroutine_wait_together_but_not_too_many():
    now, most = 0, 0

    async def judge(completion):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return float(len(completion))

    async def in_a_notebook():
        questions = [Question("", "?", ("a", "b"), 0)] * 40
        return grade(["ab"] * 40, questions, components=components_from_callables(judge)).reward

    assert asyncio.run(in_a_notebook()).tolist() == [2.0] * 40 and most == user.CONCURRENCY


def test_a_function_that_fails_on_all_rows_ends_the_run(worker):
    with pytest.raises(
        RewardError,
        match=r"rewards_of_users:always failed on all 3 completions .* the service is down .*'fine'",
    ):
        use(worker, "always").score(rows(3))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rewards_of_users:none", "AttributeError"),
        ("no_such_module:f", "No module"),
        ("rewards_of_users:number", "int, not"),
    ],
)
def test_functions_that_cannot_be_imported_are_refused(name, said):
    with pytest.raises(ConfigError, match=rf"reward.fn: {name}: .*{said}"):
        WorkerFunction(FunctionConfig(fn=name))


def test_failed_rows_are_not_learned_from():
    """With a critic the row is left out; if samples are compared, its question is. The other rows have the
    advantages of a batch without it.
    """
    q, g, r = 3, 4, 2
    rewards = np.tile(np.arange(g, dtype=np.float32) * 0.25, (q, 1))
    rewards[2, 1] = np.nan
    zeros, mask = np.zeros((q, g, r), np.float32), np.ones((q, g, r), bool)
    prompts = Prompts(np.ones((q, 1), np.int32), np.ones((q, 1), bool), np.arange(q, dtype=np.uint32))
    rollout = Rollout(np.ones((q, g, r), np.int32), mask, zeros, None)
    for estimator, left in (("gae", 1), ("group_mean", g)):
        assessment = Assessment(zeros, zeros, None, zeros if estimator == "gae" else None)
        kinds = AdvantageConfig(estimator=estimator, whiten=False), KLConfig(coef=0.0), LossConfig()
        made, stats = experience.make_experience(
            *(experience.Drawn(prompts, rollout, rewards[..., None]), assessment, None, np.float32(0)),
            config=experience.ExperienceConfig(*kinds),
        )
        want = np.ones((q, g), bool)
        want[2, 1 if left == 1 else slice(None)] = False
        np.testing.assert_array_equal(made.mask, np.broadcast_to(want[..., None], mask.shape))
        assert float(stats["unlearned"]) == pytest.approx(left / (q * g))
        base = 0 if estimator == "gae" else 0.375
        np.testing.assert_allclose(
            made.advantages[..., 0], np.where(want, np.arange(g) * 0.25 - base, 0), atol=1e-6
        )


def test_evaluation_uses_the_rule_alone():
    """An evaluation does not import the function."""
    tree = {
        "name": "t",
        "steps": 1,
        "model": {"path": ""},
        "data": {"path": ""},
        "learn": {"policy": {"lr": 1e-3}},
    }
    shape = {
        "sample": {"questions": 1},
        "learn": {"policy": {"lr": 1e-3}, "critic": {"lr": 1e-3}, "minibatch": 1},
        "eval": {"batch": 1},
    }
    c = configs.from_tree(
        tree | shape | {"prompt": {"template": "none"}, "reward": {"fn": "no_such_module:f"}}
    )
    tok = byte_tokenizer()
    parts = build.lay_out(c, tok, CFG, jax.devices()[:1])
    encoded = encode(tok, [Question("0", "Which?", ("a", "b"), 0)], c)
    tokens = np.array([[tok.encode_targets(["<think>x</think><answer>A</answer>"])[0]]], np.int32)
    rollout = sharding.place_rows(
        Rollout(tokens, tokens >= 0, np.zeros(tokens.shape, np.float32), None), 1, parts.mesh
    )
    scored = score_rollout(parts, encoded, np.arange(1), rollout)
    assert scored.verdicts.reward.tolist() == [1.0] and scored.verdicts.failed == {}


def test_a_run_with_a_function_that_fails_now_and_then(folder, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(os.path.dirname(__file__))
    components = "{kind: function, fn: rewards_of_users:odd}, {kind: format}, {kind: overlong, buffer: 4}"
    args = [
        "name=own",
        f"reward=[{components}]",
        *NO_EVAL,
        "steps=1",
        "learn.critic=null",
        "advantage.estimator=gdpo",
    ]
    assert main("train", folder / "config.yaml", *args, "kl.coef=0") == 0
    [metrics] = lines(folder / "runs/own/metrics.jsonl")
    samples = lines(folder / "runs/own/samples.jsonl")
    failed = [s for s in samples if s["reward"] is None]
    assert 0 < metrics["reward_failed"] == len(failed) / 16 < metrics["unlearned"]
    assert all(s["reward_error"] == "odd: it returned inf" and len(s["completion"]) % 2 for s in failed)
    assert all(s["components"]["odd"] is None and "format" in s["components"] for s in failed)
    parts = [metrics[f"reward/{name}"] for name in ("odd", "format", "overlong")]
    assert metrics["reward"] == pytest.approx(parts[0] + parts[1] - parts[2], abs=1e-6)
    assert (
        f"the reward failed on {metrics['reward_failed']:.1%} of the completions" in capsys.readouterr().err
    )
    assert main("train", folder / "config.yaml", "name=none", "reward.fn=rewards_of_users:gone") == 2
    assert (
        "reward.fn: rewards_of_users:gone" in capsys.readouterr().err
        and not (folder / "runs" / "none").exists()
    )
