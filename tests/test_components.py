"""The reward as a sum of components: their values, their settings, and their weights in a step."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medrlvr_jax.config import load as configs
from medrlvr_jax.config.reward import PRESETS
from medrlvr_jax.config.schema import AdvantageConfig, Config, KLConfig, LossConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.data.values import read_reference
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards import grade
from medrlvr_jax.rewards.components import list_components
from medrlvr_jax.rewards.graders import TokenCounts
from medrlvr_jax.rewards.penalties import find_repetition
from medrlvr_jax.rl import experience
from medrlvr_jax.rl.experience import Column
from medrlvr_jax.types import Assessment, Prompts, Rollout

FIFTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
RIGHT, WRONG = (f"<think>Heparin acts at once.</think><answer>{letter}</answer>" for letter in "AB")
BARE = "A"
LEAKY = f"{FIFTEEN} sixteen <think>So the answer is A.</think><answer>A</answer>"


def config(reward, **more) -> Config:
    tree = {"name": "t", "steps": 1, "model": {"path": ""}, "data": {"path": ""}}
    tree |= {"learn": {"policy": {"lr": 1e-4}, "critic": {"lr": 1e-4}}, "reward": reward}
    return configs.from_tree(tree | more)


def verdicts_of(reward, *completions):
    questions = [Question("", "?", ("heparin", "aspirin"), 0)] * len(completions)
    return grade(completions, questions, config(reward).reward)


@pytest.mark.parametrize(
    ("preset", "rewards"),
    [  # of RIGHT, WRONG, BARE, and LEAKY under the mode `paper`
        ("med_rlvr", [1, 0, -1, 1]),
        ("composite", [1, 0, -1, 0.2]),
        ("ehrmind", [1.1, 0, -2, 1.1]),
        ("medvlthinker", [1, 0, 0, 0]),
        ("med_r1", [2, 1, 1, 1]),
        ("medvlm_r1", [2, 1, 0, 1]),
    ],
)
def test_a_preset_is_a_name_for_components(preset, rewards):
    assert verdicts_of(preset, RIGHT, WRONG, BARE).reward == pytest.approx(rewards[:3])
    lenient = PRESETS[preset] | {"mode": "paper"}
    assert verdicts_of(lenient, LEAKY).reward == pytest.approx(rewards[3:])


def test_short_forms_and_older_settings_are_the_same_reward():
    listed = config([{"kind": "rule"}, {"kind": "leak"}, {"kind": "before"}]).reward
    before = config({"leak_penalty": 0.5, "before_penalty": 0.3}).reward
    assert listed == config("composite").reward == config(configs.to_tree(listed)).reward
    assert list_components(listed) == list_components(before)
    base = {"name": "t", "steps": 1, "model": {"path": ""}, "data": {"path": ""}}
    base |= {"learn": {"policy": {"lr": 1}, "critic": {"lr": 1}}, "reward": [{"kind": "format"}]}
    assert configs.load(base, ["reward=composite", "reward.mode=paper"]).reward.mode == "paper"


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        ("composit", "reward: 'composit': no such preset; did you mean composite"),
        ([{"kind": "rul"}], r"reward.components.0.kind: 'rul': no such kind; there are rule, format"),
        ([{"weight": 1}], "reward.components.0.kind: required, but not given"),
        ([{"kind": "rule", "weigth": 1}], "rule.weigth: no such setting; did you mean weight"),
        ([{"kind": "leak", "weight": -1}], "reward.components.0.leak.weight: -1 must be greater"),
        ([{"kind": "rule", "weight": 0}, {"kind": "leak"}], "only penalties and weights of 0, .*; add a"),
        ([{"kind": "format", "kept": 0}], "reward.components.0: format: broken and kept are both 0"),
        (
            {"components": [{"kind": "rule"}], "correct": 1.1},
            r"reward.correct: 1.1 has no effect beside reward.components; add {kind: rule, correct: 1.1}",
        ),
        ({"components": [{"kind": "rule"}], "random": 0.5}, "reward.random: 0.5 .* remove one of the two"),
    ],
)
def test_rewards_that_are_constant_or_contradictory_are_refused(reward, complaint):
    with pytest.raises(ConfigError, match=complaint):
        config(reward)


def test_names_and_values_of_several():
    bare = {"kind": "answer", "where": "text"}
    reward = [{"kind": "format", "weight": 0.1}, {"kind": "answer"}, bare]
    verdicts = verdicts_of(reward, RIGHT, WRONG, BARE)
    assert {name: column.tolist() for name, column in verdicts.reported_components.items()} == {
        "format": [1, 1, 0],
        "answer": [1, 0, 0],
        "answer_2": [1, 0, 1],
    }
    np.testing.assert_allclose(verdicts.reward, [2.1, 0.1, 1.0], rtol=1e-6)


# Completions of a question whose right option is A, "Heparin", and what the code of MedVLThinker (a3163b16),
# Med-R1 (88d76c73, without math_verify) and MedVLM-R1 (2eee4210) pays for them, run on these texts.
PUBLISHED = [
    ("<think>x</think><answer>A</answer>", 1.0, 2.0, 2.0),
    ("<think>x</think><answer> a </answer>", 1.0, 1.0, 2.0),
    ("<think>x</think><answer>A. Heparin</answer>", 1.0, 1.0, 1.0),
    ("<think>x</think><answer>HEPARIN</answer>", 1.0, 1.0, 1.0),
    ("<think>x</think><answer>6 (A)</answer>", 0.0, 1.0, 1.5),
    ("<think></think>\n<answer>A</answer>", 1.0, 2.0, 2.0),
    ("<think>x</think><answer>A</answer><answer>B</answer>", 1.0, 2.0, 2.0),
    ("<think>x</think><answer>B</answer>", 0.0, 1.0, 1.0),
    ("<think>x</think>so <answer>A</answer>", 0.0, 1.0, 1.0),
    ("<answer>A</answer>", 0.0, 1.0, 1.0),
    ("A", 0.0, 1.0, 0.0),
    ("<think>x</think><answer>A</answer> done", 0.0, 1.0, 1.0),
]


@pytest.mark.parametrize(("column", "preset"), [(1, "medvlthinker"), (2, "med_r1"), (3, "medvlm_r1")])
def test_presets_pay_what_the_systems_own_code_pays(column, preset):
    questions = [Question("", "?", ("Heparin", "Aspirin"), 0)] * len(PUBLISHED)
    got = grade([row[0] for row in PUBLISHED], questions, config(preset).reward).reward
    assert got.tolist() == [row[column] for row in PUBLISHED]


def test_open_questions_are_graded_by_the_rule_whatever_a_component_accepts():
    question = Question("", "How many?", value=read_reference({"kind": "number", "answer": 12}))
    reward = config({"components": [{"kind": "answer", "accept": "mention"}]}).reward
    completions = [f"<think>x</think><answer>{answer}</answer>" for answer in ("12", "13")]
    assert grade(completions, [question] * 2, reward).reward.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("section", "lengths", "want"),
    [
        ({"kind": "overlong", "buffer": 20}, [80, 81, 90, 100], [0, -0.05, -0.5, -1]),
        ({"kind": "overlong", "buffer": 20, "weight": 0.5}, [90], [-0.25]),
        ({"kind": "length", "budget": 50}, [40, 50, 90], [-0.003, 0, -0.012]),
        ({"kind": "length", "budget": 50, "per_token": 0.01, "shorter": False}, [40, 50, 90], [0, 0, -0.4]),
    ],
)
def test_penalties_of_length(section, lengths, want):
    reward = config([{"kind": "rule"}, section]).reward
    questions, n = [Question("", "?", ("heparin", "aspirin"), 0)] * len(lengths), len(lengths)
    tokens = TokenCounts(np.array(lengths), np.ones(n, bool), 100)
    np.testing.assert_allclose(grade([WRONG] * n, questions, reward, tokens).reward, want, rtol=1e-6)
    with pytest.raises(ConfigError, match="a file of texts has no counts of tokens"):
        verdicts_of([{"kind": "rule"}, section], RIGHT)


def naive_repeats(text, window, times):
    words = text.replace("_", " ").split()
    runs = Counter(tuple(words[i : i + window]) for i in range(len(words) - window + 1))
    return max(runs.values(), default=0) >= times


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab _\n", max_size=60), max_size=4), st.integers(1, 5), st.integers(2, 5))
def test_repetition_by_its_definition(texts, window, times):
    assert find_repetition(texts, window, times).tolist() == [naive_repeats(t, window, times) for t in texts]


def test_repetition_of_ten_words_ten_times():
    nine = " ".join(["one two three four five six seven eight nine ten"] * 9)
    got = verdicts_of([{"kind": "rule"}, {"kind": "repetition"}], nine, f"{nine} and {nine[:49]}", "no " * 19)
    assert got.components["repetition"].tolist() == [0, 1, 1] and got.reward.tolist() == [-1, -2, -2]


def drawn_with(rewards, tokens=None, first=0):
    """Responses of two tokens with rewards [Q, G, K]; the questions' numbers begin with `first`."""
    q, g, _ = rewards.shape
    zeros, mask = np.zeros((q, g, 2), np.float32), np.ones((q, g, 2), bool)
    ids = np.arange(first, first + q)
    prompts = Prompts(np.ones((q, 1), np.int32), np.ones((q, 1), bool), ids.astype(np.uint32))
    rollout = Rollout(np.ones((q, g, 2), np.int32) if tokens is None else tokens, mask, zeros, None)
    return experience.Drawn(prompts, rollout, rewards, places=ids.astype(np.int32))


def make(rewards, columns, advantage, loss=None, tokens=None, stop_ids=()):
    """`make_experience` of rewards [Q, G, K], responses of two tokens, and nothing else."""
    drawn = drawn_with(np.float32(rewards), tokens)
    kinds = experience.ExperienceConfig(
        advantage, KLConfig(coef=0.0), loss or LossConfig(), columns, stop_ids
    )
    zeros = drawn.rollout.logprobs
    assessment = Assessment(zeros, zeros, None, None)
    return experience.make_experience(drawn, assessment, None, np.float32(0), config=kinds)


def test_gdpo_normalises_each_component_and_ignores_those_without_variance():
    right, form = [1.0, 0, 0, 0], [1.0, 1, 0, 0]
    rewards = np.stack([np.float32([right, right]), np.float32([form, [1] * 4]), np.ones((2, 4))], -1)
    columns = (Column(1.0), Column(0.5), Column(-0.3, True))
    plain = AdvantageConfig(estimator="gdpo", whiten=False, std_eps=0.0)
    made, stats = make(rewards, columns, plain)
    # (1 − ¼) / ½ = 1.5 and −0.5; (1 − ½) / √⅓ = 0.866; the third component is equal in both groups
    want = [[1.5 + 0.433, -0.5 + 0.433, -0.5 - 0.433, -0.5 - 0.433], [1.5, -0.5, -0.5, -0.5]]
    np.testing.assert_allclose(made.advantages[..., 0], want, atol=1e-3)
    made, _ = make(rewards, columns, dataclasses.replace(plain, whiten=True))
    assert float(made.advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(made.advantages.std(ddof=1)) == pytest.approx(1, abs=1e-4)
    # +1 and −1 add up to the same for all samples, and yet differ
    opposed = np.stack([np.float32([[1, 0]]), np.float32([[0, 1]])], -1)
    made, stats = make(opposed, (Column(1.0), Column(0.5)), plain)
    assert float(stats["no_contrast"]) == float(stats["equal_groups"]) == 0
    np.testing.assert_allclose(made.advantages[0, :, 0], [0.3536, -0.3536], atol=1e-3)


def test_groups_that_are_equal_but_for_penalties_are_dropped():
    rewards = np.float32([[[1, 0.5], [1, 0]], [[1, 0], [0, 0]]])
    columns, plain = (Column(1.0), Column(-1.0, True)), AdvantageConfig(estimator="group_mean")
    made, stats = make(rewards, columns, dataclasses.replace(plain, drop_equal_groups=True))
    assert made.mask.any((1, 2)).tolist() == [False, True] and float(stats["dropped_groups"]) == 0.5
    np.testing.assert_array_equal(made.advantages[..., 0], [[0, 0], [0.5, -0.5]])
    made, stats = make(rewards, columns, plain)
    assert made.mask.all() and "dropped_groups" not in stats
    np.testing.assert_array_equal(made.advantages[0, :, 0], [-0.25, 0.25])


def test_questions_whose_samples_differ_are_selected_in_the_order_in_which_they_were_drawn():
    """A question differs by what pays, not by a penalty; where some reward failed, it is not learned from."""
    columns, advantage = (Column(1.0), Column(-1.0, True)), AdvantageConfig(drop_equal_groups=True)
    advantage = dataclasses.replace(advantage, estimator="group")
    settings = experience.ExperienceConfig(advantage, KLConfig(coef=0.0), LossConfig(), columns)
    equal, differ = [[1, 0.5], [1, 0]], [[1, 0], [0, 0]]
    failed = [[np.nan, 0], [0, 0]]
    first, second = np.float32([equal, failed, differ]), np.float32([differ, equal, differ])
    one, kept = experience.select((drawn_with(first),), config=settings)
    assert one.prompts.ids.tolist() == [2, 0, 1] and int(kept) == 1
    both, kept = experience.select((one, drawn_with(second, first=3)), config=settings)
    assert both.prompts.ids.tolist() == both.places.tolist() == [2, 3, 5] and int(kept) == 3
    np.testing.assert_array_equal(both.graded, np.float32([differ] * 3))


def test_truncated_responses_count_in_means_and_are_not_learned_from():
    tokens = np.int32([[[3, 7], [3, 3]]])  # 7 ends a response
    rewards, columns = np.float32([[[1], [0]]]), (Column(1.0),)
    advantage, loss = AdvantageConfig(estimator="group_mean"), LossConfig(mask_truncated=True)
    made, stats = make(rewards, columns, advantage, loss, tokens, (7,))
    assert made.mask[..., 0].tolist() == [[True, False]] and float(stats["unlearned"]) == 0.5
    np.testing.assert_array_equal(made.advantages[0, :, 0], [0.5, 0])


def test_the_device_gets_the_sum_and_the_penalties_or_each_component():
    components = list_components(config("composite").reward)
    verdicts = verdicts_of({"components": PRESETS["composite"]["components"], "mode": "paper"}, RIGHT, LEAKY)
    total, each = AdvantageConfig(estimator="group"), AdvantageConfig(estimator="gdpo")
    weights = experience.columns(components, total)
    assert weights == ((1.0, False), (-1.0, True))
    columns = experience.host_columns(verdicts, components, total)
    np.testing.assert_array_equal(columns, np.float32([[1, 0], [1, 0.8]]))
    rewards, unshaped = experience.weigh(columns, weights)
    np.testing.assert_array_equal(rewards, verdicts.reward)
    np.testing.assert_array_equal(unshaped, np.float32([1, 1]))
    assert experience.columns(components, each) == (Column(1.0), Column(-0.5, True), Column(-0.3, True))
    np.testing.assert_array_equal(experience.host_columns(verdicts, components, each), [[1, 0, 0], [1, 1, 1]])
