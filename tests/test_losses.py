"""Losses against TRL, verl and OpenRLHF in value and gradient (`data/golden.json`), and against numbers
worked out by hand.

Float32: the peers' gradients are printed to six digits, and ours agree to 1e-6 without x64.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medrlvr_jax.config.schema import KLConfig, LossConfig
from medrlvr_jax.rl import losses
from medrlvr_jax.types import Experience

GOLDEN = json.loads((Path(__file__).parent / "data/golden.json").read_text())
# [Q=2, G=3, R=5]
F = {k: np.float32(v).reshape(2, 3, *np.shape(v)[1:]) for k, v in GOLDEN["fixture"].items() if k != "G"}
MASK = F["mask"] > 0
IN_LOSS = KLConfig(coef=0.1, into="loss", estimator="k3")


def experience(**fields):
    """The fixture, one advantage per response; what a policy loss never reads is None."""
    base = Experience(
        prompts=None,
        tokens=None,
        mask=MASK,
        logprobs=F["old"],
        ref_logprobs=None,
        advantages=np.broadcast_to(F["seq_adv"][..., None], MASK.shape),
        values=None,
        returns=None,
    )
    return dataclasses.replace(base, **fields)


@partial(jax.jit, static_argnames=("loss", "kl", "max_new_tokens"))
def policy_means(new, entropy, exp, coef, loss, kl, max_new_tokens):
    """(Mean, metrics), gradients of the total by log-probs and entropy."""

    def f(new, entropy):
        mean, metrics = losses.policy_loss(new, entropy, exp, loss, kl, coef, max_new_tokens)
        return mean.total, (mean, metrics)

    (_, aux), gradients = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(new, entropy)
    return aux, gradients


@partial(jax.jit, static_argnames="loss")
def value_means(values, exp, loss):
    """(Mean, metrics), gradient of the total by the values."""

    def f(values):
        mean, metrics = losses.value_loss(values, exp, loss)
        return mean.total, (mean, metrics)

    (_, aux), gradient = jax.value_and_grad(f, has_aux=True)(values)
    return aux, gradient


def divided(mean):
    return np.float32(mean.total) / np.float32(mean.count)


def policy(loss, exp, kl=IN_LOSS, coef=0.0, new=F["new"], entropy=F["mask"]):
    """(loss, gradients by log-probs and entropy, metrics), divided once as a learner does."""
    (mean, metrics), gradients = jax.device_get(policy_means(new, entropy, exp, coef, loss, kl, 8))
    metrics = {k: divided(m) for k, m in metrics.items()}
    return divided(mean), [np.asarray(g) / mean.count for g in gradients], metrics


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


# The peers

GSPO = LossConfig(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregate="sequence_mean")
PEERS = {
    ("trl", "bnpo"): LossConfig(),
    ("openrlhf", "policy_token_mean"): LossConfig(),
    ("verl_policy", "vanilla"): LossConfig(),
    ("trl", "dapo_cliphigher"): LossConfig(clip_high=0.28),
    ("verl_policy", "vanilla_high"): LossConfig(clip_high=0.28),
    ("trl", "grpo_k3"): LossConfig(aggregate="sequence_mean"),
    ("trl", "grpo_delta"): LossConfig(aggregate="sequence_mean", ratio_cap=4.0),
    ("trl", "dr_grpo"): LossConfig(aggregate="constant"),
    ("trl", "gspo"): GSPO,
    ("verl_policy", "gspo"): GSPO,
    ("trl", "cispo"): LossConfig(surrogate="cispo", clip_high=4.0),
    ("verl_policy", "cispo"): LossConfig(surrogate="cispo", clip_high=4.0),
}


@pytest.mark.parametrize(("system", "name"), PEERS)
def test_policy_loss_agrees_with_the_peers(system, name):
    """Only grpo_k3 has a KL term: β = 0.1, k3."""
    expected = GOLDEN[system][name]
    exp, coef = (experience(ref_logprobs=F["ref"]), 0.1) if name == "grpo_k3" else (experience(), 0.0)
    value, (gradient, _), _ = policy(PEERS[system, name], exp, coef=coef)
    close(value, expected["loss"])
    close(gradient, np.reshape(expected["grad"], MASK.shape))


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("token_mean", "token-mean"),
        ("sequence_mean", "seq-mean-token-mean"),
        ("constant", "seq-mean-token-sum"),
    ],
)
def test_aggregation_agrees_with_verl(how, name):
    """verl's seq-mean-token-sum is `constant` with a constant of 1."""
    close(
        jax.jit(losses.aggregate, static_argnums=(2, 3))(F["new"], MASK, how, 1).value(),
        GOLDEN["verl"][f"agg_{name}"],
    )


def test_value_loss_agrees_with_verl_and_openrlhf():
    exp = experience(values=F["old_values"], returns=F["token_rewards"])
    (mean, _), _ = value_means(F["values"], exp, LossConfig(value_clip=0.5))
    close(mean.value(), GOLDEN["verl"]["value"])
    close(mean.value(), GOLDEN["openrlhf"]["value_clip.5"])


# By hand: four tokens of one response with ρ = 1.5, 1.5, 0.5, 4 and A = 1, −1, 1, −1


def four(**fields):
    advantages = np.float32([[[1, -1, 1, -1]]])
    return experience(
        mask=np.ones((1, 1, 4), bool),
        logprobs=np.zeros((1, 1, 4), np.float32),
        advantages=advantages,
        **fields,
    )


FOUR = np.log(np.float32([[[1.5, 1.5, 0.5, 4.0]]]))
H = np.full((1, 1, 4), 2.0, np.float32)


@pytest.mark.parametrize(
    ("loss", "objective", "slope"),
    [
        (LossConfig(), [1.2, -1.5, 0.5, -4.0], [0, -1.5, 0.5, -4.0]),
        (LossConfig(clip_low=0.2, clip_high=0.6), [1.5, -1.5, 0.5, -4.0], [1.5, -1.5, 0.5, -4.0]),
        (LossConfig(ratio_cap=3.0), [1.2, -1.5, 0.5, -3.0], [0, -1.5, 0.5, 0]),
        (LossConfig(dual_clip=3.0), [1.2, -1.5, 0.5, -3.0], [0, -1.5, 0.5, 0]),
        (
            LossConfig(surrogate="cispo", clip_high=1.0),
            np.log([1.5, 1 / 1.5, 0.5, 1 / 4]) * [1.5, 1.5, 0.5, 2],
            [1.5, -1.5, 0.5, -2.0],
        ),
    ],
)
def test_surrogates_by_hand(loss, objective, slope):
    value, (gradient, _), metrics = policy(loss, four(), new=FOUR, entropy=H)
    close(value, -np.mean(objective))
    close(gradient[0, 0], -np.array(slope) / 4)
    close(
        [metrics["surrogate"], metrics["ratio"], metrics["ratio_far"], metrics["entropy"]],
        [-value, 1.875, 1.0, 2.0],
    )
    close(metrics["approx_kl"], np.mean([1.5, 1.5, 0.5, 4.0]) - 1 - FOUR.mean())


def test_clip_shares_count_the_tokens_that_lost_their_gradient():
    metrics = policy(LossConfig(), four(), new=FOUR, entropy=FOUR)[2]
    assert (metrics["clip_low"], metrics["clip_high"]) == (0.0, 0.25)
    metrics = policy(LossConfig(), four(), new=-FOUR, entropy=FOUR)[2]  # ρ = 2/3, 2/3, 2, 1/4
    assert (metrics["clip_low"], metrics["clip_high"]) == (0.5, 0.25)
    metrics = policy(LossConfig(surrogate="cispo"), four(), new=FOUR, entropy=FOUR)[2]
    assert (metrics["clip_low"], metrics["clip_high"]) == (0.0, 0.75)


def test_gspo_with_an_advantage_per_token_is_gspo_token():
    """∇ = s·Aₜ·∇log πₜ / |o|, s the geometric mean of the ratios: √[4]{1.5·1.5·0.5·4} = 4.5^¼."""
    s = 4.5**0.25
    value, (gradient, _), metrics = policy(
        LossConfig(ratio="sequence", clip_high=1.0, clip_low=1.0), four(), new=FOUR, entropy=FOUR
    )
    close(value, 0.0)
    close(gradient[0, 0], -s * np.array([1.0, -1.0, 1.0, -1.0]) / 4)
    close(metrics["ratio"], s)


@pytest.mark.parametrize(
    ("name", "k", "slope"), [("k1", -0.5, 1), ("k3", np.exp(0.5) - 1.5, 1 - np.exp(0.5))]
)
def test_kl_enters_the_loss(name, k, slope):
    exp = four(ref_logprobs=FOUR + np.float32(0.5))  # log π_ref − log π = ½
    plain, (bare, _), _ = policy(LossConfig(), four(), new=FOUR, entropy=H)
    value, (gradient, _), metrics = policy(
        LossConfig(), exp, KLConfig(into="loss", estimator=name), 0.1, new=FOUR, entropy=H
    )
    close([value - plain, metrics["kl_ref"]], [0.1 * k, k])
    close(gradient, bare + 0.1 * slope / 4)


def test_kl_that_was_paid_in_the_reward_is_only_reported():
    plain, (bare, _), _ = policy(LossConfig(), four(), new=FOUR, entropy=H)
    value, (gradient, _), metrics = policy(
        LossConfig(), four(ref_logprobs=FOUR + np.float32(0.5)), KLConfig(), 0.1, new=FOUR, entropy=H
    )
    close([value, metrics["kl_ref"]], [plain, -0.5])
    close(gradient, bare)


def test_entropy_is_rewarded():
    plain, (bare, none), _ = policy(LossConfig(), four(), new=FOUR, entropy=H)
    value, (gradient, by_entropy), _ = policy(LossConfig(entropy_coef=0.01), four(), new=FOUR, entropy=H)
    close(value, plain - 0.02)
    close(gradient, bare)
    close([none, by_entropy], [H * 0, H * 0 - 0.01 / 4])


def test_value_loss_by_hand():
    """V = 1, 1, 0; V_old = 0, 0.9, 0; R = 1, 0, 0.5: the first token has gone too far, so it pays for V = 0.5
    and learns nothing.
    """
    value, old, returns = np.float32([[[[1, 1, 0]]], [[[0, 0.9, 0]]], [[[1, 0, 0.5]]]])
    exp = experience(mask=np.ones((1, 1, 3), bool), values=old, returns=returns)
    for clip, squares in ((0.5, [0.25, 1.0, 0.25]), (None, [0.0, 1.0, 0.25])):
        (mean, metrics), gradient = value_means(value, exp, LossConfig(value_clip=clip))
        close(mean.value(), 0.5 * np.mean(squares))
        close(gradient[0, 0], [0.0, 1.0, -0.5])
        close(metrics["value_clip"].value(), 0.0 if clip is None else 1 / 3)
        close(losses.explained_variance(metrics), 1 - (1.25 / 3) / np.var([1.0, 0.0, 0.5]), 1e-5)
    flat = dataclasses.replace(exp, returns=returns * 0 + np.float32(0.3))
    assert losses.explained_variance(value_means(value, flat, LossConfig())[0][1]) == 0
    # E[R²] − E[R]² of 100 − 100 has rounding errors of 1e-5, where the variance is 3.6e-6: it cannot be told
    # from none.
    nearly = dataclasses.replace(exp, returns=np.float32([[[-10, -10.004, -10]]]))
    assert losses.explained_variance(value_means(value, nearly, LossConfig())[0][1]) == 0
    with pytest.raises(ValueError, match="no values or no returns"):
        value_means(value, experience(), LossConfig())


def test_nll_by_hand():
    logprobs, mask = (
        np.float32([[-1, -3, np.nan], [-2, 0, 0]]),
        np.array([[True, True, False], [True, False, False]]),
    )
    mean, metrics = jax.jit(losses.nll_loss)(logprobs, mask)
    assert (mean.total, mean.count, metrics["nll"].value()) == (6.0, 3.0, 2.0)


# Sums and counts


def fields_of(seed, lengths):
    rng = np.random.default_rng(seed)
    mask = np.arange(5) < np.reshape(lengths, (4, 2, 1))
    new, entropy, old, ref, advantages, values, v_old, returns = rng.normal(size=(8, 4, 2, 5)).astype(
        np.float32
    )
    exp = experience(
        mask=mask, logprobs=old, ref_logprobs=ref, advantages=advantages, values=v_old, returns=returns
    )
    return new, entropy, values, exp


def losses_of(loss):
    """Rows → the three losses' Means, their metrics, and the slope of the totals along one parameter that all
    rows share.
    """

    def f(w, new, entropy, values, exp):
        p, a = losses.policy_loss(new + w, entropy + w, exp, loss, IN_LOSS, 0.1, 6)
        v, b = losses.value_loss(values + w, exp, loss)
        n, c = losses.nll_loss(new + w, exp.mask)
        return p.total + v.total + n.total, ((p, v, n), (a, b, c))

    def means_and_slope(*rows):
        (_, (means, metrics)), slope = jax.value_and_grad(f, has_aux=True)(np.float32(0.1), *rows)
        return means, metrics, slope

    return means_and_slope


SPLITS = [
    LossConfig(dual_clip=3.0),
    LossConfig(ratio="sequence", aggregate="sequence_mean", entropy_coef=0.1, value_clip=None),
    LossConfig(surrogate="cispo", aggregate="constant"),
]
WHOLE = {loss: jax.jit(losses_of(loss)) for loss in SPLITS}
BY_ROW = {
    loss: jax.jit(jax.vmap(lambda *row, f=f: f(*jax.tree.map(lambda x: x[None], row))))
    for loss, f in WHOLE.items()
}


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 5), min_size=8, max_size=8))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("loss", SPLITS, ids=lambda c: c.aggregate)
def test_any_split_of_rows_gives_the_same_sums(loss, seed, lengths):
    """Each row alone, added up, is the whole: totals, counts, metrics and gradients. So it is for every split
    between.
    """
    rows = fields_of(seed, lengths)
    whole, parts = jax.device_get((WHOLE[loss](*rows), BY_ROW[loss](*rows)))
    jax.tree.map(lambda a, b: close(np.sum(a, axis=0), b, 1e-4), parts, whole)
    tokens = sum(lengths)
    (p, v, n), metrics, _ = whole
    assert (
        p.count
        == {"token_mean": tokens, "sequence_mean": np.count_nonzero(lengths), "constant": 8 * 6}[
            loss.aggregate
        ]
    )
    assert v.count == n.count == tokens and all(
        m.count == tokens for x in metrics for name, m in x.items() if name != "surrogate"
    )


def test_a_mean_of_micro_batch_means_would_be_another_number():
    exp = experience()
    halves = [jax.tree.map(lambda x, q=q: x[q : q + 1], (F["new"], exp)) for q in (0, 1)]
    means = [policy_means(new, new, e, 0.0, LossConfig(), IN_LOSS, 8)[0][0] for new, e in halves]
    close(jax.tree.map(jnp.add, *means).value(), GOLDEN["trl"]["bnpo"]["loss"])
    assert abs((means[0].value() + means[1].value()) / 2 - GOLDEN["trl"]["bnpo"]["loss"]) > 1e-3


@pytest.mark.parametrize("loss", SPLITS, ids=lambda c: c.aggregate)
def test_padding_reaches_neither_value_nor_gradient(loss):
    """NaN and infinities in every padded column; one response is padding throughout."""
    rows = fields_of(0, [5, 3, 0, 1, 2, 5, 4, 4])
    clean, mask = WHOLE[loss](*rows), rows[-1].mask
    for filler in (np.nan, -np.inf):
        *spoilt, exp = jax.tree.map(lambda x, filler=filler: np.where(mask, x, np.float32(filler)), rows)
        jax.tree.map(close, WHOLE[loss](*spoilt, dataclasses.replace(exp, mask=mask)), clean)


def test_an_unknown_aggregate_is_refused():
    with pytest.raises(ValueError, match="token_mean, sequence_mean, constant"):
        losses.aggregate(F["new"], MASK, "mean", 8)


def test_sampler_weights_multiply_the_surrogate_alone():
    """By hand: at ρ = 1 the loss is −w·A + β·k3 per token, and its gradient by log π is −w·A + β·∂k3."""
    weights = np.random.default_rng(0).uniform(0.5, 2, MASK.shape).astype(np.float32)
    exp = experience(sampler_weights=weights, ref_logprobs=F["ref"])
    (mean, metrics), (gradient, _) = policy_means(
        F["old"], np.zeros_like(F["old"]), exp, np.float32(0.1), LossConfig(), IN_LOSS, 5
    )
    log = F["ref"] - F["old"]
    want = -weights * exp.advantages + 0.1 * (np.exp(log) - log - 1)
    assert divided(mean) == pytest.approx(want[MASK].mean(), abs=1e-6)
    np.testing.assert_allclose(
        gradient[MASK], (-weights * exp.advantages + 0.1 * (1 - np.exp(log)))[MASK], atol=1e-6
    )
    assert divided(metrics["sampler_weight"]) == pytest.approx(weights[MASK].mean(), abs=1e-6)
