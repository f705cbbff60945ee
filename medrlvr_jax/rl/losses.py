"""The losses: the policy's surrogate, the critic's squared error, the negative log-likelihood of SFT.

Every loss and metric is a `Mean(total, count)`. Both are sums over rows, and the count does not depend on the
parameters. So gradients of the total can be summed over micro-batches, and one division by the summed count
gives the step's gradient, however the rows were split.

Where systems differ, this file does the following:

1. `aggregate` is over the minibatch: token_mean as Med-RLVR, DAPO and OpenRLHF; sequence_mean as GRPO and
   GSPO; constant as Dr.GRPO, by sequences · max_new_tokens. The KL term and the entropy bonus are aggregated
   as the surrogate is.
2. The critic's loss is always a mean over tokens. Metrics are means over tokens too, except `surrogate`.
3. CISPO caps the ratio at 1 + clip_high and has no lower bound, as in its paper's experiments (TRL's cap of
   5 is clip_high 4).
4. KL values are not clamped (verl clamps them to ±10); only exponents are, at 20.

Arrays are [Q, G, R]: questions, samples of each, response columns. The content of padding, even NaN,
affects neither values nor gradients.
"""

import jax
import jax.numpy as jnp

from medrlvr_jax.config.schema import KLConfig, LossConfig
from medrlvr_jax.rl.advantages import kl_estimate, ratio_of
from medrlvr_jax.types import Array, Experience, Mean

Metrics = dict[str, Mean]


def token_mean(x: Array, mask: Array) -> Mean:
    """Return the mean of x over the tokens of the mask, as a sum and a count."""
    return Mean(jnp.where(mask, x, 0.0).sum(), mask.sum().astype(jnp.float32))


def aggregate(x: Array, mask: Array, how: str, max_new_tokens: int) -> Mean:
    """Reduce a loss per token [..., R] to one number. xₜ is the loss of token t and |o| the number of tokens
    of response o:

    token_mean     Σₒ Σₜ xₜ / Σₒ |o|
    sequence_mean  Σₒ (Σₜ xₜ / |o|) / (number of responses with tokens)
    constant       Σₒ Σₜ xₜ / (number of responses · max_new_tokens)
    """
    match how:
        case "token_mean":
            return token_mean(x, mask)
        case "sequence_mean":
            length = mask.sum(axis=-1)
            means = jnp.where(mask, x, 0.0).sum(axis=-1) / jnp.maximum(length, 1)
            return Mean(means.sum(), (length > 0).sum().astype(jnp.float32))
        case "constant":
            responses = mask.size // mask.shape[-1]
            return Mean(jnp.where(mask, x, 0.0).sum(), jnp.float32(responses * max_new_tokens))
    raise ValueError(f"loss.aggregate: {how!r}: there are token_mean, sequence_mean, constant")


def sequence_log_ratio(log_ratio: Array, mask: Array) -> Array:
    """Return GSPO's log-ratio of each token [..., R] (arXiv 2507.18071): its value is log s = (1/|o|)·Σₜ log
    ρₜ, its gradient that of the token's own log ρₜ.

    With one advantage per response this is GSPO's gradient; with one per token it is the paper's GSPO-token.
    """
    length = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    mean = jnp.where(mask, log_ratio, 0.0).sum(axis=-1, keepdims=True) / length
    return jax.lax.stop_gradient(mean) + (log_ratio - jax.lax.stop_gradient(log_ratio))


def clip_surrogate(ratio: Array, advantages: Array, loss: LossConfig) -> Array:
    """Return PPO's surrogate of each token, which is maximised (arXiv 1707.06347):
    min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A).

    `ratio_cap` δ replaces the unclipped ρ by min(ρ, δ) (TRL). `dual_clip` c takes max(·, c·A) where A < 0
    (arXiv 1912.09729). Both bound the loss of a large ratio where A < 0; c = δ ≥ 1 + ε_high are the same.
    """
    free = ratio if loss.ratio_cap is None else jnp.minimum(ratio, loss.ratio_cap)
    clipped = jnp.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high)
    objective = jnp.minimum(free * advantages, clipped * advantages)
    if loss.dual_clip is None:
        return objective
    return jnp.where(advantages < 0, jnp.maximum(objective, loss.dual_clip * advantages), objective)


def cispo_surrogate(logprobs: Array, ratio: Array, advantages: Array, loss: LossConfig) -> Array:
    """Return CISPO's surrogate of each token, sg(min(ρ, 1 + ε_high))·A·log π (arXiv 2506.13585). Unlike
    PPO's, it keeps the gradient of every token.
    """
    return jax.lax.stop_gradient(jnp.minimum(ratio, 1 + loss.clip_high)) * advantages * logprobs


def policy_loss(
    logprobs: Array,
    entropy: Array,
    experience: Experience,
    loss: LossConfig,
    kl: KLConfig,
    kl_coef: Array,
    max_new_tokens: int,
) -> tuple[Mean, Metrics]:
    """Return the aggregate of −surrogate(ρ, A) + β·k(log π, log π_ref) − c·H over tokens, and metrics. The
    ratio is ρ = π / π_old with log π_old = `experience.logprobs`.

    logprobs, entropy [Q, G, R]: of the policy that learns; only they have gradients. The KL term needs
    `kl.into: loss` and a reference. If the experience has `sampler_weights`, which are min(π_old / π_sampler,
    cap) for rollouts drawn from other weights (truncated importance sampling, Ionides 2008), they multiply
    the surrogate, but neither the KL term nor the entropy bonus. runs/metrics.py describes the metrics, with
    the prefix `policy/`. `clip_low` and `clip_high` count tokens whose gradient a bound removes, or whose
    ratio it caps (CISPO).
    """
    mask = experience.mask
    # Padding becomes 0 before any arithmetic: a NaN that is masked afterwards would reach the gradient as
    # 0 · NaN.
    new, old, advantages, entropy = (
        jnp.where(mask, x, 0.0) for x in (logprobs, experience.logprobs, experience.advantages, entropy)
    )
    log_ratio = new - old
    ratio = ratio_of(sequence_log_ratio(log_ratio, mask) if loss.ratio == "sequence" else log_ratio)
    cispo = loss.surrogate == "cispo"
    if cispo:
        surrogate = cispo_surrogate(new, ratio, advantages, loss)
        cut_low = jnp.zeros_like(mask)
    else:
        surrogate = clip_surrogate(ratio, advantages, loss)
        cut_low = (ratio < 1 - loss.clip_low) & (advantages < 0)
    metrics = {}
    if experience.sampler_weights is not None:
        weights = jnp.where(mask, experience.sampler_weights, 0.0)
        surrogate, metrics["sampler_weight"] = weights * surrogate, token_mean(weights, mask)
    metrics |= {
        "surrogate": aggregate(surrogate, mask, loss.aggregate, max_new_tokens),
        "ratio": token_mean(ratio, mask),
        "ratio_far": token_mean(jnp.abs(ratio - 1) > 0.1, mask),
        "clip_low": token_mean(cut_low, mask),
        "clip_high": token_mean((ratio > 1 + loss.clip_high) & (cispo | (advantages > 0)), mask),
        "approx_kl": token_mean(kl_estimate(old, new, "k3"), mask),
        "entropy": token_mean(entropy, mask),
    }
    per_token = -surrogate
    if loss.entropy_coef != 0:
        per_token -= loss.entropy_coef * entropy
    if experience.ref_logprobs is not None:
        to_ref = kl_estimate(new, jnp.where(mask, experience.ref_logprobs, 0.0), kl.estimator)
        metrics["kl_ref"] = token_mean(to_ref, mask)
        if kl.into == "loss":
            per_token += kl_coef * to_ref
    return aggregate(per_token, mask, loss.aggregate, max_new_tokens), metrics


def value_loss(values: Array, experience: Experience, loss: LossConfig) -> tuple[Mean, Metrics]:
    """Return the mean over tokens of ½·max((V − R)², (clip(V, V_old ± ε) − R)²), or of ½·(V − R)² if
    `value_clip` is None; and metrics.

    values [Q, G, R]: of the critic that learns. The experience needs values (V_old) and returns (R). Metrics:
    `value_clip`, the share of tokens whose gradient the bound removes; and for `explained_variance` the means
    `value`, `return`, `return_square` and `value_error` = (R − V)².
    """
    if experience.values is None or experience.returns is None:
        raise ValueError("no values or no returns: a critic learns only where advantage.estimator is gae")
    mask = experience.mask
    new, old, returns = (jnp.where(mask, x, 0.0) for x in (values, experience.values, experience.returns))
    error = (new - returns) ** 2
    worst = error
    if loss.value_clip is not None:
        moved = jnp.clip(new - old, -loss.value_clip, loss.value_clip)
        worst = jnp.maximum(error, (old + moved - returns) ** 2)
    metrics = {
        "value_clip": token_mean(worst > error, mask),
        "value": token_mean(new, mask),
        "return": token_mean(returns, mask),
        "return_square": token_mean(returns**2, mask),
        "value_error": token_mean(error, mask),
    }
    return token_mean(0.5 * worst, mask), metrics


def explained_variance(metrics: Metrics) -> Array:
    """Return 1 − E[(R − V)²] / Var[R] from the summed metrics of `value_loss`: 1 for a perfect critic, 0 for
    one that predicts E[R].

    It is 0 if R is constant up to the rounding of Var[R], which is a difference of two float32 numbers as
    large as E[R²].
    """
    square = metrics["return_square"].value()
    variance, rounding = square - metrics["return"].value() ** 2, 1e-6 + 1e-5 * square
    explained = 1 - metrics["value_error"].value() / jnp.maximum(variance, rounding)
    return jnp.where(variance > rounding, explained, 0.0)


def nll_loss(logprobs: Array, mask: Array) -> tuple[Mean, Metrics]:
    """Return the mean of −log π over the targets' tokens, and the same as metric `nll`, in nats. logprobs,
    mask [..., R].
    """
    nll = token_mean(-logprobs, mask)
    return nll, {"nll": nll}
