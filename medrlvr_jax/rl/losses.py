"""What is minimised: the policy's surrogate, the critic's squared error, the SFT negative log-likelihood.

Every loss and metric is a `Mean(total, count)`: total is a sum over rows, count a sum over rows that no
parameter moves. So the gradients of `total` add over micro-batches, and one division by the summed count
gives the step's gradient, however it was split.

Where systems differ, this file does so:

1. `aggregate` is over the minibatch: token_mean as Med-RLVR, DAPO and OpenRLHF; sequence_mean as GRPO and
   GSPO; constant as Dr.GRPO, by sequences · max_new_tokens. The KL term and the entropy bonus are aggregated
   as the surrogate is.
2. The critic's loss is always a mean over tokens. Metrics are means over tokens too, except `surrogate`.
3. CISPO caps the ratio at 1 + clip_high and leaves it free below, as its paper ran it (TRL's cap 5 is
   clip_high 4).
4. KL values are not clamped (verl: ±10); only exponents are, at e²⁰.

Arrays are [Q, G, R]: questions, samples of each, response columns. What padding holds, NaN included, reaches
neither value nor gradient.
"""

import jax
import jax.numpy as jnp

from medrlvr_jax.config.schema import KLConfig, LossConfig
from medrlvr_jax.rl.advantages import kl_estimate, ratio_of
from medrlvr_jax.types import Array, Experience, Mean

Metrics = dict[str, Mean]


def token_mean(x: Array, mask: Array) -> Mean:
    """The mean of x over the tokens of the mask, undivided."""
    return Mean(jnp.where(mask, x, 0.0).sum(), mask.sum().astype(jnp.float32))


def aggregate(x: Array, mask: Array, how: str, max_new_tokens: int) -> Mean:
    """From a loss per token [..., R] to one number, xₜ being the loss of token t and |o| the tokens of
    response o:

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
    """GSPO (arXiv 2507.18071): every token gets log s = (1/|o|)·Σₜ log ρₜ as value, and keeps the gradient of
    its own log ρₜ.

    [..., R] → [..., R]. With one advantage per response this is GSPO's gradient; with one per token it is the
    paper's GSPO-token.
    """
    length = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    mean = jnp.where(mask, log_ratio, 0.0).sum(axis=-1, keepdims=True) / length
    return jax.lax.stop_gradient(mean) + (log_ratio - jax.lax.stop_gradient(log_ratio))


def clip_surrogate(ratio: Array, advantages: Array, loss: LossConfig) -> Array:
    """PPO (arXiv 1707.06347), per token: min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A), to be maximised.
    Elementwise.

    `ratio_cap` δ puts min(ρ, δ) for the unclipped ρ (TRL); `dual_clip` c takes max(·, c·A) where A < 0 (arXiv
    1912.09729). Both bound what a grown ratio costs where A < 0, and c = δ ≥ 1 + ε_high are one and the same.
    """
    free = ratio if loss.ratio_cap is None else jnp.minimum(ratio, loss.ratio_cap)
    clipped = jnp.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high)
    objective = jnp.minimum(free * advantages, clipped * advantages)
    if loss.dual_clip is None:
        return objective
    return jnp.where(advantages < 0, jnp.maximum(objective, loss.dual_clip * advantages), objective)


def cispo_surrogate(logprobs: Array, ratio: Array, advantages: Array, loss: LossConfig) -> Array:
    """CISPO (arXiv 2506.13585), per token: sg(min(ρ, 1 + ε_high))·A·log π; no token loses its gradient."""
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
    """−surrogate(ρ, A) + β·k(log π, log π_ref) − c·H per token, aggregated; ρ = π / π_old, the old being
    `experience.logprobs`.

    logprobs, entropy [Q, G, R] of the policy that learns: gradients flow through these two alone. The KL term
    is there if `kl.into` is loss and the experience has a reference. Where the experience has
    `sampler_weights` (min(π_old / π_sampler, cap): truncated importance sampling, Ionides 2008, for rollouts
    drawn from other weights), they multiply the surrogate; the KL term and the entropy bonus stay. Metrics:
    `sampler_weight`, their mean; `surrogate`; `ratio`; `ratio_far`, the share of tokens with ρ outside [0.9,
    1.1]; `clip_low` and `clip_high`, the shares at which a bound took the gradient away (CISPO: cut the
    ratio); `approx_kl`, k3 of KL(π_old ‖ π); `kl_ref`, by `kl.estimator`, if there is a reference; `entropy`
    in nats.
    """
    mask = experience.mask
    # Padding becomes 0 before any arithmetic: a NaN that is masked afterwards would still reach the gradient
    # as 0 · NaN.
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
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²) per token, mean over tokens; `value_clip` None: ½·(V − R)².

    values [Q, G, R] of the critic that learns; the experience needs values (V_old) and returns (R). Metrics:
    `value_clip`, the share of tokens whose gradient the bound took away, and what `explained_variance` needs:
    `value`, `return`, `return_square`, `value_error` = mean (R − V)².
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
    """1 − E[(R − V)²] / Var[R] from `value_loss`'s metrics, summed: 1 is a perfect critic, 0 one that knows
    E[R].

    0 if R is constant up to the rounding of Var[R], which is a difference of two float32 numbers as large as
    E[R²].
    """
    square = metrics["return_square"].value()
    variance, rounding = square - metrics["return"].value() ** 2, 1e-6 + 1e-5 * square
    explained = 1 - metrics["value_error"].value() / jnp.maximum(variance, rounding)
    return jnp.where(variance > rounding, explained, 0.0)


def nll_loss(logprobs: Array, mask: Array) -> tuple[Mean, Metrics]:
    """−log π of the targets, mean over tokens. logprobs, mask [..., R]; `nll` is the same, in nats."""
    nll = token_mean(-logprobs, mask)
    return nll, {"nll": nll}
