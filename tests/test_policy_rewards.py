"""Rewards by what the policy itself says: by hand against the model, and in a training that stops and resumes."""

import json
from fractions import Fraction

import jax
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

from medrlvr_jax import build
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.reward import ConsistencyConfig, RewardConfig
from medrlvr_jax.config.schema import AdvantageConfig, SpreadConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.question import LETTERS, Question, question_hash
from medrlvr_jax.data.values import Reference
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import decoder
from medrlvr_jax.model_rewards import consistency, policy, probability
from medrlvr_jax.rewards.training import start_components
from medrlvr_jax.rl.experience import learnable_responses, mean_spread, place_scored
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rl.step import train_step
from medrlvr_jax.rl.train import init_training, train
from medrlvr_jax.rollout.rollout import encode, place_prompts, score_rollout
from medrlvr_jax.sharding import place_rows
from medrlvr_jax.types import Rollout

REWARD = [
    {"kind": "rule"},
    {"kind": "probability", "max_tokens": 6},
    {"kind": "probability", "name": "product", "score": "product", "baseline": False, "format": 0, "max_tokens": 6},
    {"kind": "consistency", "weight": 0.5},
    {"kind": "process"},
]  # fmt: skip
TREE = {
    "name": "asked",
    "steps": 3,
    "model": {"path": "embedded", "remat": "none"},
    "data": {"path": "embedded:train", "limit": 8},
    "prompt": {"template": "none", "max_tokens": 96},
    "sample": {"questions": 8, "samples": 2, "max_new_tokens": 48},
    "reward": {"components": REWARD},
    "advantage": {"estimator": "group", "spread": {"start": 2, "beta": 1.0}},
    "kl": {"coef": 0.0},
    "learn": {"minibatch": 8, "policy": {"lr": 3e-4}},
    "checkpoint": {"every": 1},
    "log": {"samples_every": 1, "samples": 8},
}


@pytest.fixture(scope="module")
def setting():
    """8 questions, each with its own reasoning and with a completion that has no format."""
    parts = build.build(configs.from_tree(TREE))
    questions = data.load(parts.config.data)
    encoded = encode(parts.tokenizer, questions, parts.config)
    completions = []
    for i, q in enumerate(questions):
        letter = LETTERS[(q.answer + i % 2) % len(q.options)]  # every second one is wrong
        completions += [f"<think>{q.rationale}</think>\n<answer>{letter}</answer>", f"no tags. {letter}"]
    rows = parts.tokenizer.encode_targets(completions)
    tokens = np.full((16, 48), parts.tokenizer.pad_id, np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    mask = np.arange(48) < np.array(list(map(len, rows)))[:, None]
    tokens, mask = tokens.reshape(8, 2, 48), mask.reshape(8, 2, 48)
    with jax.set_mesh(parts.mesh):
        params = build.load_params(parts, parts.cfg)
        placed = place_rows((tokens, mask), 8, parts.mesh)
        rollout = Rollout(*placed, logprobs=placed[0], policy_logprobs=None)
        yield parts, encoded, params, rollout, score_rollout(parts, encoded, np.arange(8), rollout)


def logprobs_after(parts, params, rows):
    """Of each (prompt, text before, text): the model's log-probs of the text's tokens, given the rest."""
    tok = parts.tokenizer
    wholes = [prompt + tok.encode_untrusted([before + new])[0] for prompt, before, new in rows]
    sizes = [len(tok.encode_untrusted([new])[0]) for _, _, new in rows]
    padded = text.pad_prompts(wholes, np.zeros(len(rows), np.uint32), max(map(len, wholes)), tok.pad_id)

    @jax.jit
    def log_softmax(params, padded):
        states, _ = decoder.forward(params, parts.cfg, padded)
        return jax.nn.log_softmax(decoder.logits(params, parts.cfg, states))

    scores = np.asarray(log_softmax(params, padded))
    return [
        [float(scores[i, -n + t - 1, ids[len(ids) - n + t]]) for t in range(n)]
        for i, (ids, n) in enumerate(zip(wholes, sizes, strict=True))
    ]


def components_of(parts, encoded):
    with start_components(parts.config.reward, questions=encoded.questions) as components:
        return components


def answered(setting, name):
    parts, encoded, params, rollout, scored = setting
    reward = policy.make_policy_rewards(parts)[name]
    if reward.baseline is not None:
        start = ({}, params)
        section = next(c for c in parts.config.reward.components if (c.name or c.kind) == name)
        scores = probability.start_scores(parts, section, start, encoded, lambda done, n: None)
        reward.baseline.update(scores)
    request = place_scored(reward.make_request(scored), scored, 8, parts)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), request) == jax.tree.map(
        lambda x: (x.shape, x.dtype), reward.shapes
    )
    prompts = place_prompts(params, parts, encoded, np.arange(8))
    return np.asarray(reward.program({}, params, prompts, rollout, request)), reward.baseline


def test_probabilities_are_the_models(setting):
    parts, encoded, params, _, scored = setting
    values, baseline = answered(setting, "probability")
    products, none = answered(setting, "product")
    assert none is None
    thoughts = [c.partition("<answer>")[0] + "<answer>" for c in scored.completions[::2]]
    rows = list(zip(encoded.tokens, encoded.questions, thoughts, strict=True))
    after = logprobs_after(parts, params, [(p, t, f" {q.right_text}") for p, q, t in rows])
    alone = logprobs_after(parts, params, [(p, "", f" {q.right_text}") for p, q, _ in rows])
    mean = lambda logprobs: np.mean(np.exp(logprobs))
    gains = np.array([mean(a) - mean(b) for a, b in zip(after, alone, strict=True)])
    np.testing.assert_allclose(
        [baseline[question_hash(q)] for q in encoded.questions], list(map(mean, alone)), atol=1e-5
    )
    np.testing.assert_allclose(values[:, 0], 0.9 * np.maximum(gains, 0) + 0.1, atol=1e-5)
    np.testing.assert_allclose(products[:, 0], [np.exp(np.sum(a)) for a in after], atol=1e-5)
    assert (values[:, 1] == 0).all() and (products[:, 1] == 0).all() and gains.max() > 0.05


def test_consistency_is_the_models(setting):
    parts, encoded, params, _, scored = setting
    values, _ = answered(setting, "consistency")
    expected = []
    for prompt, q, completion in zip(encoded.tokens, encoded.questions, scored.completions[::2], strict=True):
        thought = completion.removeprefix("<think>").partition("</think>")[0]
        first = f"<think>{thought.rpartition('. ')[0]}.</think>\n<answer>"
        letters = LETTERS[: len(q.options)]
        scores = logprobs_after(parts, params, [(prompt, first, letter) for letter in letters])
        expected.append(letters[int(np.argmax([s[0] for s in scores]))] != completion[-10])
    np.testing.assert_array_equal(values[:, 0], np.array(expected, np.float32))
    assert (values[:, 1] == 0).all() and 0 < sum(expected) < 8
    request = consistency.consistency_request(parts, ConsistencyConfig(of="right"), scored)
    right = scored.verdicts.correct
    assert right.any() and ((request.endings.size > 0) == right).all() and not right[::2].all()


def test_a_run_resumes_with_its_baseline(tmp_path):
    whole = configs.from_tree(TREE | {"runs": str(tmp_path / "whole")})
    train(whole)
    cut = configs.from_tree(TREE | {"runs": str(tmp_path / "cut")})
    train(cut, callbacks=lambda step, metrics: step == 2)
    saved = tmp_path / "cut" / "asked" / "baseline.json"
    content = saved.read_text()
    saved.unlink()
    with pytest.raises(ConfigError, match=r"baseline.json: it lacks scores of probability, and after step 2"):
        train(cut)
    saved.write_text(content)
    train(cut)

    def lines(name, file):
        rows = [json.loads(line) for line in (tmp_path / name / "asked" / file).read_text().splitlines()]
        timing = ("seconds", "tokens_per_second")
        return [{k: v for k, v in row.items() if k not in timing} for row in rows]

    metrics, samples = lines("whole", "metrics.jsonl"), lines("whole", "samples.jsonl")
    assert metrics == lines("cut", "metrics.jsonl") and samples == lines("cut", "samples.jsonl")
    values = samples[0]["components"]
    total = values["rule"] + values["probability"] + values["product"] + 0.5 * values["process"]
    assert samples[0]["reward"] == pytest.approx(total - 0.5 * values["consistency"], abs=1e-6)
    assert metrics[0]["reward/probability"] > 0
    mean = metrics[0]["spread"]
    assert [m.get("spread_mean") for m in metrics] == [None, mean, 0.99 * mean + 0.01 * metrics[1]["spread"]]
    assert metrics[0]["dropped_groups"] == 0 < metrics[1]["dropped_groups"]


def test_what_is_learned_from_is_what_is_logged(setting):
    """The device weighs the columns, the host weighs them by name: components in no alphabetical order."""
    parts, encoded, *_ = setting
    made = make_programs(parts, 3)
    training, state = init_training(parts, made, components_of(parts, encoded))
    first = ({}, state.policy.params)
    for section in parts.config.reward.components:
        if (reward := made.policy_rewards.get(section.name or section.kind)) and reward.baseline is not None:
            scores = probability.start_scores(parts, section, first, encoded, lambda done, n: None)
            reward.baseline.update(scores)
    _, stats, scored, _ = train_step(training, encoded, state, 0)
    rewards = scored.verdicts.reward
    assert list(made.policy_rewards) == ["probability", "product", "consistency"]
    assert float(stats["reward"]) == pytest.approx(rewards.mean(), abs=1e-6)
    assert float(stats["reward_std"]) == pytest.approx(rewards.std(), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"reward.mode": "direct"}, "reward.components.1: probability needs reasoning"),
        ({"reward.components": [{"kind": "probability", "score": "logmean", "baseline": False}]}, "is always 0"),
        (
            {"reward.components": [{"kind": "probability", "of": "letter"}], "data.shuffle_options": True},
            r"reward.components.0.of: letter: data.shuffle_options changes the letters",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(changes, complaint):
    tree = json.loads(json.dumps(TREE))
    for name, value in changes.items():
        configs.override(tree, f"{name}={json.dumps(value)}")
    with pytest.raises(ConfigError, match=complaint):
        configs.from_tree(tree)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("consistency", "consistency: it compares letters, and question open-1 has not one right letter"),
        ("process", r"process: no question of data\.path has facts"),
        (
            "verifier",
            r"verifier: no right answer in data\.path is a text, so it would never be asked; set when",
        ),
    ],
)
def test_questions_that_lack_what_is_asked_for_are_refused(kind, complaint):
    value = Reference("number", "3", value=Fraction(3))
    config = RewardConfig(components=({"kind": kind} | ({"model": "m"} if kind == "verifier" else {}),))
    with pytest.raises(ConfigError, match=complaint):
        policy.check_questions(config, byte_tokenizer(), [Question("open-1", "How many?", value=value)])


SPREAD = SpreadConfig(beta=0.5, ema=0.9, start=7)


def test_the_running_mean_of_the_spread_by_hand():
    """Steps 2 to 6 begin it; then each step moves it by a tenth of its own."""
    history = [{"spread": x} for x in (9.0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    assert mean_spread(None, history, 7) == mean_spread(SPREAD, history[:5], 6) == 0.0
    assert mean_spread(SPREAD, history, 7) == pytest.approx(0.3)
    history.append({"spread": 0.8, "spread_mean": 0.3})
    assert mean_spread(SPREAD, history, 8) == pytest.approx(0.9 * 0.3 + 0.1 * 0.8)


def test_questions_of_little_spread_are_left_out():
    """Standard deviations 0.5, 0.1, 0 and, of the samples that did not fail, 0.2; at least 0.15 is asked for."""
    total = np.array([[0, 1, 0, 1], [0.4, 0.6, 0.4, 0.6], [1, 1, 1, 1], [0, 0.4, 9, 9]], np.float32)
    finite = np.ones((4, 4), bool)
    finite[3, 2:] = False
    config = AdvantageConfig(estimator="reinforce_pp", spread=SPREAD)
    kept, stats = learnable_responses(finite, total, total, np.float32(0.15), config)
    assert kept.tolist() == [[True] * 4, [False] * 4, [False] * 4, [True, True, False, False]]
    assert float(stats["spread"]) == pytest.approx((0.5 + 0.1 + 0 + 0.2) / 4)
    assert float(stats["dropped_groups"]) == 0.5
    kept, _ = learnable_responses(finite, total, total, np.float32(0), config)
    assert kept.sum() == 14
