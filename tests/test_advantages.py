"""Advantages against numbers worked out by hand, the O(T²) definition, and verl's own (`data/golden.json`).
Float32 throughout.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medrlvr_jax.config.schema import AdvantageConfig, KLConfig
from medrlvr_jax.rl import advantages as adv
from medrlvr_jax.types import Assessment

GOLDEN = json.loads((Path(__file__).parent / "data/golden.json").read_text())
# [Q=2, G=3, R=5]
F = {k: np.float32(v).reshape(2, 3, *np.shape(v)[1:]) for k, v in GOLDEN["fixture"].items() if k != "G"}
MASK = F["mask"] > 0
compute = jax.jit(adv.compute, static_argnums=(0, 1))
gae = jax.jit(adv.gae)
whiten = jax.jit(adv.whiten)
kl_estimate = jax.jit(adv.kl_estimate, static_argnums=2)


@jax.jit
def every_comparison(scores, eps):
    groups = adv.group(scores, 1, eps), adv.group(scores, 0, eps), adv.group_mean(scores), adv.rloo(scores)
    return *groups, adv.whiten(scores, jnp.ones_like(scores, bool))


property_test = settings(max_examples=40, deadline=None)
NO_KL = KLConfig(coef=0.0)


def verl(name):
    return np.float32(GOLDEN["verl"][name]).reshape(2, 3, -1).squeeze()


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def step(config, rewards, mask=None, values=None, logprobs=None, ref=None, kl=NO_KL, coef=0.0):
    """`compute` with nothing in it but what the test is about."""
    rewards = np.float32(rewards)
    mask = np.ones((*rewards.shape, 2), bool) if mask is None else np.array(mask)
    logprobs = np.zeros(mask.shape, np.float32) if logprobs is None else logprobs
    assessment = Assessment(logprobs, np.zeros_like(logprobs), ref, values)
    return jax.device_get(compute(config, kl, rewards, assessment, mask, np.float32(coef)))


# One response


def test_token_rewards_by_hand():
    mask = np.array([True, True, True, False])
    logprobs, ref = np.float32([-1, -2, -3, np.nan]), np.float32([-1.5, -1, -3, np.nan])
    rewards = partial(
        jax.jit(adv.token_rewards, static_argnames="kl"), np.float32(0.25), logprobs, mask=mask, kl_coef=0.1
    )
    close(rewards(ref, kl=KLConfig()), [-0.05, 0.1, 0.25, 0.0])  # k1 = log π − log π_ref = 0.5, −1, 0
    close(rewards(ref, kl=KLConfig(estimator="k2")), [-0.0125, -0.05, 0.25, 0.0])
    close(rewards(ref, kl=KLConfig(into="loss")), [0.0, 0.0, 0.25, 0.0])
    close(rewards(None, kl=KLConfig()), [0.0, 0.0, 0.25, 0.0])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_estimates_agree_with_verl(estimator):
    close(kl_estimate(F["new"], F["ref"], estimator), verl(f"kl_{estimator}"))


def test_kl_estimates_agree_with_the_exact_divergence_and_its_gradient():
    """Over a whole small vocabulary the expectations can be taken exactly: E k1 = E k3 = KL, E ∇k2 = ∇KL, E
    ∇k1 = 0.
    """
    logits, ref = np.float32([0.3, -1.0, 0.8, 0.0]), np.log(np.float32([0.2, 0.4, 0.3, 0.1]))

    def expected(logits, estimator, p):
        return (p * adv.kl_estimate(jax.nn.log_softmax(logits), ref, estimator)).sum()

    def exact(x):
        return (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref)).sum()

    p = np.exp(logits) / np.exp(logits).sum()
    kl, slope = jax.jit(jax.value_and_grad(exact))(logits)
    k1, k2, k3 = (
        jax.jit(jax.value_and_grad(expected), static_argnums=1)(logits, name, p)
        for name in ("k1", "k2", "k3")
    )
    close([k1[0], k3[0]], [kl, kl])
    close([k1[1], k2[1]], [np.zeros(4), slope])


def test_an_absurd_ratio_stays_finite():
    value, slope = jax.jit(jax.value_and_grad(lambda x: adv.ratio_of(x).sum()))(np.float32([-500, 500]))
    assert np.isfinite(value)
    close(slope, [0.0, 0.0])


def test_gae_by_hand():
    advantages, returns = gae(
        np.float32([0, 0, 0, 0, 1]), np.float32([1, 2, 0, 4, 2]), np.ones(5, bool), 0.5, 0.5
    )
    # δ = 0.5·Vₜ₊₁ − Vₜ (+ 1 at the end) = 0, −2, 2, −3, −1;  Aₜ = δₜ + Aₜ₊₁/4
    np.testing.assert_array_equal(advantages, [-0.42578125, -1.703125, 1.1875, -3.25, -1.0])
    np.testing.assert_array_equal(returns, [0.57421875, 0.296875, 1.1875, 0.75, 1.0])


responses = st.tuples(
    st.integers(0, 2**32 - 1),
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.floats(0, 1),
    st.floats(0, 1),
)


@given(responses)
@property_test
def test_gae_is_its_definition_whatever_the_padding_holds(response):
    """Aₜ = Σₖ (γλ)ᵏ δₜ₊ₖ over the tokens of the mask, in O(T²); a hole in the mask is as good as not there."""
    seed, real, gamma, lam = response
    rng, mask = np.random.default_rng(seed), np.array(real)
    rewards, values = rng.normal(size=(2, 7)).astype(np.float32)
    r, v = rewards[mask].astype(float), np.append(values[mask], 0.0).astype(float)
    delta = r + gamma * v[1:] - v[:-1]
    expected = np.zeros(7)
    expected[mask] = [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]
    rewards[~mask], values[~mask] = np.nan, np.nan
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    close(advantages, expected, 1e-5)
    close(returns, expected + np.where(mask, np.nan_to_num(values), 0), 1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
@property_test
def test_without_discount_returns_are_rewards_to_go(seed, length):
    rewards, values = np.random.default_rng(seed).normal(size=(2, 7)).astype(np.float32)
    mask = np.arange(7) < length
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    close(returns, np.where(mask, np.cumsum(np.where(mask, rewards, 0)[::-1])[::-1], 0), 1e-5)


# A step


@pytest.mark.parametrize(("lam", "name"), [(0.95, "gae_returns"), (1.0, "gae1_returns")])
def test_gae_agrees_with_verl(lam, name):
    config = AdvantageConfig(lam=lam, whiten=False)
    advantages, returns, _ = step(config, F["rewards"], MASK, values=F["values"])
    close(returns[MASK], verl(name)[MASK])
    close(advantages[MASK], (verl(name) - F["values"])[MASK])
    assert not advantages[~MASK].any() and not returns[~MASK].any()


def test_whitened_gae_agrees_with_verl():
    advantages, returns, stats = step(AdvantageConfig(lam=0.95), F["rewards"], MASK, values=F["values"])
    close(advantages[MASK], verl("gae_whitened")[MASK])
    close(returns[MASK], verl("gae_returns")[MASK])  # the critic's targets are not whitened
    raw = (verl("gae_returns") - F["values"])[MASK]
    close([stats["advantage_mean"], stats["advantage_std"]], [raw.mean(), raw.std()], 1e-5)


@pytest.mark.parametrize(
    ("estimator", "name"), [("group", "grpo_adv"), ("group_mean", "drgrpo_adv"), ("rloo", "rloo_adv")]
)
def test_group_estimators_agree_with_verl(estimator, name):
    advantages, returns, _ = step(AdvantageConfig(estimator=estimator), F["rewards"], MASK)
    close(advantages, MASK * verl(name)[..., None])
    assert returns is None


def test_group_by_hand():
    centred = np.array([[0, -0.25, -1.25, 1.5]])  # squares 0 + 1/16 + 25/16 + 9/4 = 31/8
    bessel, biased, mean, rloo, _ = every_comparison(np.float32([[0.25, 0.0, -1.0, 1.75]]), 0.0)
    close(bessel, centred / (31 / 24) ** 0.5)
    close(biased, centred / (31 / 32) ** 0.5)
    np.testing.assert_array_equal(mean, centred)
    close(rloo, centred * 4 / 3)


@given(st.floats(-10, 10, width=32), st.sampled_from([2, 3, 7]), st.sampled_from([0.0, 1e-9, 1e-6]))
@property_test
def test_equal_rewards_teach_exactly_nothing(reward, samples, eps):
    """In float32 the mean of 0.1, 0.1, 0.1 need not be 0.1, and dividing by std + 1e-9 would make an
    advantage near 1 of it.
    """
    for advantages in every_comparison(np.full((2, samples), reward, np.float32), eps):
        np.testing.assert_array_equal(advantages, np.zeros((2, samples)))


@pytest.mark.parametrize("estimator", ["group", "group_mean", "rloo"])
def test_a_group_of_equal_tenths_beside_another(estimator):
    advantages, _, stats = step(
        AdvantageConfig(estimator=estimator), [[0.1, 0.1, 0.1], [0.1, 0.2, 0.1]], np.ones((2, 3, 5), bool)
    )
    assert not advantages[0].any() and advantages[1].all() and stats["equal_groups"] == 0.5


def test_whiten_by_hand():
    mask = np.array([[True, True], [True, False]])
    close(whiten(np.float32([[1, 2], [3, np.nan]]), mask), [[-1.0, 0.0], [1.0, 0.0]])  # Bessel: variance 1
    for mask in (np.zeros((2, 2), bool), np.array([[True, False], [False, False]])):
        np.testing.assert_array_equal(whiten(np.full((2, 2), 0.7, np.float32), mask), np.zeros((2, 2)))


def test_reinforce_pp_by_hand():
    mask = [[[True, True, True], [True, True, False]]]
    ref, kl = np.full((1, 2, 3), -0.1, np.float32), KLConfig()  # k1 = 0.1 a token
    config = AdvantageConfig(estimator="reinforce_pp", gamma=0.5, whiten=False)
    advantages, returns, stats = step(config, [[1.0, 0.0]], mask, ref=ref, kl=kl, coef=1.0)
    close(advantages, [[[0.075, 0.35, 0.9], [-0.15, -0.1, 0.0]]])
    assert returns is None
    close(stats["kl_penalty"], 0.25)
    whitened = step(
        AdvantageConfig(estimator="reinforce_pp", gamma=0.5), [[1.0, 0.0]], mask, ref=ref, kl=kl, coef=1.0
    )[0]
    close(whitened, whiten(advantages, np.array(mask)))


def test_reinforce_pp_baseline_by_hand():
    """Group means 0.5 and 0; then one whitening over all tokens, so the longer response moves the mean."""
    mask = np.ones((2, 2, 2), bool)
    mask[0, 1, 1] = False
    advantages = step(AdvantageConfig(estimator="reinforce_pp_baseline"), [[1.0, 0.0], [0.0, 0.0]], mask)[0]
    tokens = np.array([0.5, 0.5, -0.5, 0, 0, 0, 0])
    close(advantages[mask], (tokens - tokens.mean()) / tokens.std(ddof=1))


def test_group_scores_pay_the_summed_penalty():
    """verl's order: rᵢ − β Σₜ kₜ, then the group is compared."""
    mask = [[[True, True, True], [True, False, False]]]
    kl = KLConfig(estimator="k1")
    advantages = step(
        AdvantageConfig(estimator="group_mean"),
        [[1.0, 1.0]],
        mask,
        ref=np.full((1, 2, 3), -1.0, np.float32),
        kl=kl,
        coef=0.1,
    )[0]
    close(advantages, [[[-0.1, -0.1, -0.1], [0.1, 0.0, 0.0]]])  # scores 0.7 and 0.9


def penalised(config, coef, rewards=((1.0, 1.0, 1.0), (0.0, 1.0, 1.0))):
    """Advantages of two questions, three samples each, whose penalties are the same in both: k1 a token is 0,
    0.5 and 1.
    """
    logprobs = np.broadcast_to(np.float32([0.0, 0.5, 1.0])[None, :, None], (2, 3, 2))
    return step(
        config, rewards, logprobs=logprobs, ref=np.zeros((2, 3, 2), np.float32), kl=KLConfig(), coef=coef
    )


@pytest.mark.parametrize("estimator", ["group", "group_mean", "rloo"])
def test_the_penalty_is_never_divided_by_the_spread_of_a_group(estimator):
    """Where all samples earn the same, β·(mean of Σₜ kₜ − Σₜ kₜ) = β·(1, 0, −1) is left, times G/(G−1) in
    rloo.
    """
    config = AdvantageConfig(estimator=estimator)
    for coef in (0.01, 0.1):
        advantages, _, stats = penalised(config, coef)
        close(advantages[0, :, 0], coef * np.array([1, 0, -1]) * (1.5 if estimator == "rloo" else 1))
        assert stats["equal_groups"] == 0.5 and stats["no_contrast"] == 0
        # the reward's own, and the penalty
        close(advantages[1, :, 0], step(config, [[0.0, 1.0, 1.0]])[0][0, :, 0] + advantages[0, :, 0])


@pytest.mark.parametrize("estimator", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_step_of_equal_rewards_is_not_whitened_to_unit_noise(estimator):
    config = AdvantageConfig(estimator=estimator)
    small, large = (penalised(config, coef, np.ones((2, 3)))[0] for coef in (0.01, 0.1))
    close(small, 0.1 * large, 1e-5)
    assert 0 < np.abs(small).max() < 0.02
    assert np.abs(penalised(config, 0.01)[0]).max() > 1


def test_statistics_are_of_the_learned_responses():
    """Four responses are left out, by a mask that is False: without a reference there is no penalty, and
    their rewards do not count.
    """
    mask = np.ones((2, 3, 2), bool)
    mask[0, 2], mask[1] = False, False
    for estimator in ("gae", "reinforce_pp"):
        values = np.zeros((2, 3, 2), np.float32) if estimator == "gae" else None
        stats = step(
            AdvantageConfig(estimator=estimator, whiten=False),
            [[0.5, 0.5, 90.0], [0.25, 1.0, 1.0]],
            mask,
            values=values,
        )[2]
        assert stats["kl_penalty"] == stats["reward_std"] == stats["reward_clipped"] == 0
        assert stats["reward"] == 0.5 and stats["equal_groups"] == 1 and stats["no_contrast"] == 1


def test_rewards_are_clipped_but_stay_fractions():
    config = AdvantageConfig(estimator="group_mean", reward_clip=2.0)
    advantages, _, stats = step(config, [[50.0, 0.25, 0.25, -0.5]])
    np.testing.assert_array_equal(advantages[0, :, 0], [1.5, -0.25, -0.25, -1.0])
    assert (stats["reward"], stats["reward_clipped"], stats["kl_penalty"]) == (12.5, 0.25, 0.0)


def test_the_impossible_is_refused():
    with pytest.raises(ValueError, match=r"gae needs values: set learn\.critic"):
        step(AdvantageConfig(), [[1.0, 0.0]])
    with pytest.raises(ValueError, match=r"sample\.samples to at least 2"):
        adv.group(np.ones((2, 1)), 1, 0.0)
    with pytest.raises(ValueError, match=r"sample\.samples to at least 2"):
        adv.rloo(np.ones((2, 1)))
    with pytest.raises(ValueError, match="k1, k2, k3, abs"):
        adv.kl_estimate(np.ones(1), np.ones(1), "k4")
