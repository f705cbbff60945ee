"""The reward as a sum of components: what each is worth, how they are spelled, and how a step weighs them."""

import numpy as np
import pytest

from medrlvr_jax.config import load as configs
from medrlvr_jax.config.reward import PRESETS
from medrlvr_jax.config.schema import AdvantageConfig, Config
from medrlvr_jax.data.question import Question
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards import grade
from medrlvr_jax.rewards.components import components
from medrlvr_jax.rl import experience
from medrlvr_jax.rl.experience import Column

FIFTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
RIGHT, WRONG = (f"<think>Heparin acts at once.</think><answer>{letter}</answer>" for letter in "AB")
BARE = "A"
LEAKY = f"{FIFTEEN} sixteen <think>So the answer is A.</think><answer>A</answer>"


def config(reward, **more) -> Config:
    tree = {"name": "t", "steps": 1, "model": {"path": ""}, "data": {"path": ""}}
    tree |= {"learn": {"policy": {"lr": 1e-4}, "critic": {"lr": 1e-4}}, "reward": reward}
    return configs.from_tree(tree | more)


def paid(reward, *completions):
    questions = [Question("", "?", ("heparin", "aspirin"), 0)] * len(completions)
    return grade(completions, questions, config(reward).reward)


@pytest.mark.parametrize(
    ("preset", "rewards"),
    [  # of RIGHT, WRONG, BARE, and LEAKY under the mode `paper`
        ("med_rlvr", [1, 0, -1, 1]),
        ("composite", [1, 0, -1, 0.2]),
        ("ehrmind", [1.1, 0, -2, 1.1]),
        ("medvlthinker", [1, 0, 0, 1]),
        ("med_r1", [2, 1, 1, 2]),
    ],
)
def test_a_preset_is_a_name_for_components(preset, rewards):
    assert paid(preset, RIGHT, WRONG, BARE).reward == pytest.approx(rewards[:3])
    lenient = PRESETS[preset] | {"mode": "paper"}
    assert paid(lenient, LEAKY).reward == pytest.approx(rewards[3:])


def test_short_forms_and_the_settings_of_before_are_the_same_reward():
    listed = config([{"kind": "rule"}, {"kind": "leak"}, {"kind": "before"}]).reward
    before = config({"leak_penalty": 0.5, "before_penalty": 0.3}).reward
    assert listed == config("composite").reward == config(configs.to_tree(listed)).reward
    assert components(listed) == components(before)
    base = {"name": "t", "steps": 1, "model": {"path": ""}, "data": {"path": ""}}
    base |= {"learn": {"policy": {"lr": 1}, "critic": {"lr": 1}}, "reward": [{"kind": "format"}]}
    assert configs.load(base, ["reward=composite", "reward.mode=paper"]).reward.mode == "paper"


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        ("composit", "reward: 'composit': no such preset; did you mean composite"),
        ([{"kind": "rul"}], r"reward.components.0.kind: 'rul': no such kind; there are rule, format"),
        ([{"weight": 1}], "reward.components.0.kind: needed, and not given"),
        ([{"kind": "rule", "weigth": 1}], "rule.weigth: no such setting; did you mean weight"),
        ([{"kind": "leak", "weight": -1}], "reward.components.0.leak.weight: -1: input should be greater"),
        ([{"kind": "rule", "weight": 0}, {"kind": "leak"}], "penalties alone pay nothing; add one"),
        ([{"kind": "format", "kept": 0}], "reward.components.0: format: broken and kept are both 0"),
        (
            {"components": [{"kind": "rule"}], "correct": 1.1},
            r"reward.correct: 1.1: reward.components say what is paid; write {kind: rule, correct: 1.1}",
        ),
        ({"components": [{"kind": "rule"}], "random": 0.5}, "reward.random: 0.5: .* take one of the two out"),
    ],
)
def test_what_cannot_be_paid_is_refused(reward, complaint):
    with pytest.raises(ConfigError, match=complaint):
        config(reward)


def test_names_and_values_of_several():
    reward = [{"kind": "format", "weight": 0.1}, {"kind": "answer"}, {"kind": "answer", "lenient": True}]
    verdicts = paid(reward, RIGHT, WRONG, BARE)
    assert {name: column.tolist() for name, column in verdicts.several.items()} == {
        "format": [1, 1, 0],
        "answer": [1, 0, 0],
        "answer_2": [1, 0, 1],
    }
    np.testing.assert_allclose(verdicts.reward, [2.1, 0.1, 1.0], rtol=1e-6)


def test_the_device_gets_one_column_for_what_pays_and_one_for_penalties_or_each_component():
    terms = components(config("composite").reward)
    verdicts = paid({"components": PRESETS["composite"]["components"], "mode": "paper"}, RIGHT, LEAKY)
    total, each = AdvantageConfig(estimator="group"), AdvantageConfig(estimator="gdpo")
    weights = experience.columns(terms, total)
    assert weights == ((1.0, False), (-1.0, True))
    columns = experience.host_columns(verdicts, terms, total)
    np.testing.assert_array_equal(columns, np.float32([[1, 0], [1, 0.8]]))
    rewards, unshaped = experience.weigh(columns, weights)
    np.testing.assert_array_equal(rewards, verdicts.reward)
    np.testing.assert_array_equal(unshaped, np.float32([1, 1]))
    assert experience.columns(terms, each) == (Column(1.0), Column(-0.5, True), Column(-0.3, True))
    np.testing.assert_array_equal(experience.host_columns(verdicts, terms, each), [[1, 0, 0], [1, 1, 1]])
