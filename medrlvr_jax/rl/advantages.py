"""From one score per response to one advantage per token: GAE, and the estimators that compare samples
instead of learning values.

Where systems differ, this file does so:

1. KL in the reward (Med-RLVR, arXiv 2502.19655): rₜ = r(q, o)·1[t = last] − β·k(t), the score clipped to
   ±`reward_clip` first and the penalty never, as OpenRLHF.
2. Estimators with one number per response (group, group_mean, rloo, reinforce_pp_baseline) take Σₜ rₜ as its
   score, so the summed penalty is compared within the group as the reward is, as verl. OpenRLHF lets each
   token carry its own penalty. `group` divides the reward by the group's spread, and the penalty never, as
   OpenRLHF: verl divides their sum, by which β cancels where all samples earn the same, and what is left of
   the penalty, noise near a policy's start, gets advantages of unit variance.
3. `gdpo` normalises each component of the reward within the group, adds them by their weights, and whitens
   the sum over the step. It keeps apart samples whose components differ and whose sums do not.
4. Group estimators and returns-to-go yield no returns: there is no critic to fit.
5. Whitening is over all tokens of the step, before it is split into minibatches; Bessel's variance + 1e-8 as
   verl and tunix. In a step whose rewards are all alike nothing is divided, for the same reason as in 2: only
   the mean is taken off.

Arrays are [Q, G, R] (questions, samples of each, response columns); functions of one response take [T] and
the caller vmaps. The mask is True on the response's tokens, at least one, and False on the padding to their
right.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from medrlvr_jax.config.schema import GROUP_ESTIMATORS, AdvantageConfig, KLConfig
from medrlvr_jax.types import Array, Assessment

WHITENED = ("gae", "gdpo", "reinforce_pp", "reinforce_pp_baseline")  # estimators that `whiten` is about
Components = Sequence[tuple[float, Array]]  # each one's weight and values [Q, G]

MAX_EXPONENT = 20.0  # e²⁰ ≈ 5·10⁸ is past any honest ratio of probabilities; float32 overflows at e⁸⁸


def ratio_of(log_ratio: Array) -> Array:
    """exp(log_ratio), cut at e²⁰ (with gradient 0 there), so that no stray token turns a step into NaN."""
    return jnp.exp(jnp.minimum(log_ratio, MAX_EXPONENT))


def kl_estimate(logprobs: Array, ref_logprobs: Array, estimator: str) -> Array:
    """Per token, an estimate of KL(π ‖ π_ref) from a token drawn from π (Schulman 2020). Any shape,
    elementwise.

    With x = log π_ref − log π:  k1 = −x,  k2 = x²/2,  k3 = eˣ − 1 − x,  abs = |x|.
    k1 and k3 are unbiased, k3 and k2 never negative. In a *loss*, E[∇k1] = 0 and it is E[∇k2] that is ∇KL.
    """
    x = ref_logprobs - logprobs
    match estimator:
        case "k1":
            return -x
        case "k2":
            return 0.5 * x**2
        case "k3":
            return ratio_of(x) - 1.0 - x
        case "abs":
            return jnp.abs(x)
    raise ValueError(f"kl.estimator: {estimator!r}: there are k1, k2, k3, abs")


def penalties(logprobs: Array, ref_logprobs: Array, mask: Array, kl_coef: Array, kl: KLConfig) -> Array:
    """β·k(log π, log π_ref) per token, 0 off the mask, whatever that holds. Any shape, elementwise."""
    return kl_coef * jnp.where(mask, kl_estimate(logprobs, ref_logprobs, kl.estimator), 0.0)


def token_rewards(
    reward: Array, logprobs: Array, ref_logprobs: Array | None, mask: Array, kl_coef: Array, kl: KLConfig
) -> Array:
    """One response: rₜ = r·1[t = last] − β·k(log πₜ, log π_refₜ), the penalty only if there is a reference
    and `kl.into` is reward.

    reward [], the others [T] → [T]; 0 where the mask is False, whatever the padding holds.
    """
    column = jnp.arange(mask.shape[-1])
    last = jnp.max(jnp.where(mask, column, -1))
    rewards = jnp.where(column == last, reward, 0.0)
    if ref_logprobs is None or kl.into == "loss":
        return rewards
    return rewards - penalties(logprobs, ref_logprobs, mask, kl_coef, kl)


def gae(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> tuple[Array, Array]:
    """Generalised advantage estimation of one response (Schulman et al. 2016, arXiv 1506.02438).

    δₜ = rₜ + γ·Vₜ₊₁ − Vₜ,  Aₜ = Σₖ (γλ)ᵏ·δₜ₊ₖ,  returns = A + V;  V = 0 after the last token.
    rewards, values [T] float, mask [T] bool → advantages, returns [T], both 0 off the mask; γ, λ in [0, 1]. A
    column off the mask is passed over as if it were not there, so its value may be anything. γ = λ = 1:
    returns are rewards-to-go.
    """

    def backward(after, column):
        reward, value, real = column
        advantage_after, value_after = after
        advantage = reward + gamma * value_after - value + gamma * lam * advantage_after
        at_token = (advantage, value)
        return jax.tree.map(partial(jnp.where, real), at_token, after), jnp.where(real, advantage, 0.0)

    zero = jnp.zeros((), values.dtype)
    columns = rewards.astype(values.dtype), values, mask
    _, advantages = jax.lax.scan(backward, (zero, zero), columns, reverse=True)
    return advantages, jnp.where(mask, advantages + values, 0.0)


def whiten(x: Array, mask: Array, scaled: Array | bool = True) -> Array:
    """(x − mean) / √(var + 1e-8) over the masked entries, var = Σ(x − mean)² / (n − 1); 0 elsewhere. Any
    shape, all axes at once.

    `scaled` False: x − mean.
    """
    # Measured from one of its entries, a constant x is exactly 0; the mean of many 0.1s is not 0.1, and √1e-8
    # magnifies by 10⁴.
    x = jnp.where(mask, x - jnp.max(x, where=mask, initial=-jnp.inf), 0.0)
    n = mask.sum()
    centred = jnp.where(mask, x - x.sum() / jnp.maximum(n, 1), 0.0)
    variance = (centred**2).sum() / jnp.maximum(n - 1, 1)
    return jnp.where(scaled, centred * jax.lax.rsqrt(variance + 1e-8), centred)


def group_mean(scores: Array) -> Array:
    """Aᵢ = rᵢ − mean(r) in each question (Dr.GRPO, arXiv 2503.20783); exactly 0 of equal scores. [Q, G]."""
    scores = scores - scores[:, :1]  # as in `whiten`: equal scores are exactly 0 from here on
    return scores - scores.mean(axis=-1, keepdims=True)


def group(scores: Array, ddof: int, eps: float) -> Array:
    """Aᵢ = (rᵢ − mean(r)) / (std(r) + eps) within each question (GRPO, arXiv 2402.03300). [Q, G] → [Q, G];
    equal scores give exactly 0.

    std divides by G − ddof, so G > ddof is needed.
    """
    samples = scores.shape[-1]
    if samples <= ddof:
        raise ValueError(
            f"{samples} samples have no standard deviation with ddof {ddof}: set sample.samples to "
            f"at least {ddof + 1}"
        )
    centred = group_mean(scores)
    scale = jnp.sqrt((centred**2).sum(axis=-1, keepdims=True) / (samples - ddof)) + eps
    return centred / jnp.where(scale > 0, scale, 1.0)  # eps may be 0


def gdpo(components: Components, ddof: int, eps: float) -> Array:
    """Aᵢ = Σₖ wₖ·(rᵢₖ − mean(rₖ)) / (std(rₖ) + eps) within each question (GDPO, arXiv 2601.05242). [Q, G].

    A component whose values are all equal gives exactly 0 and takes nothing from the others.
    """
    return sum((w * group(values, ddof, eps) for w, values in components), jnp.float32(0))


def rloo(scores: Array) -> Array:
    """Aᵢ = rᵢ − mean of the others = G/(G−1)·(rᵢ − mean(r)) (RLOO, arXiv 2402.14740). [Q, G ≥ 2]."""
    samples = scores.shape[-1]
    if samples < 2:
        raise ValueError(
            f"{samples} sample has no others to be compared with: set sample.samples to at least 2"
        )
    return group_mean(scores) * (samples / (samples - 1))


def compute(
    config: AdvantageConfig,
    kl: KLConfig,
    rewards: Array,
    assessment: Assessment,
    mask: Array,
    kl_coef: Array,
    components: Components = (),
) -> tuple[Array, Array | None, dict[str, Array]]:
    """A whole step's advantages and, if there are values to fit, returns; both [Q, G, R] and 0 off the mask.

    rewards [Q, G] float, mask [Q, G, R]; components: what the rewards are a sum of, for gdpo. Without the
    assessment's ref_logprobs there is no penalty, without its values no critic. The statistics are scalars
    over the step's learned responses, those with a token in the mask: `reward` and `reward_std` before
    clipping; `reward_clipped`, the share that clipping changed; of the clipped rewards, which are what is
    learned from (gdpo: of each component), `equal_groups`, the share of questions whose samples all earn the
    same, and `no_contrast`, 1 where none differ of those that the estimator compares (samples of one
    question, or else all of the step); `kl_penalty`, the mean of what was subtracted; `advantage_mean` and
    `advantage_std` over tokens before whitening.
    """
    logprobs, ref_logprobs, values = assessment.logprobs, assessment.ref_logprobs, assessment.values
    clipped = jnp.clip(rewards, -config.reward_clip, config.reward_clip)
    shaped = _each(partial(token_rewards, kl_coef=kl_coef, kl=kl))(clipped, logprobs, ref_logprobs, mask)
    penalty = jnp.zeros_like(clipped)
    if ref_logprobs is not None and kl.into == "reward":
        penalty = penalties(logprobs, ref_logprobs, mask, kl_coef, kl).sum(axis=-1)
    advantages, returns = _estimate(config, shaped, clipped, penalty, values, mask, components)
    n = jnp.maximum(mask.sum(), 1)
    mean = advantages.sum() / n
    learned = mask.any(axis=-1)
    groups = learned.any(axis=-1)
    differ, equal = contrast(clipped, learned, config.estimator in GROUP_ESTIMATORS)
    if config.estimator == "gdpo":  # components may differ where their sum does not
        each = [contrast(values, learned, True) for _, values in components]
        differ = jnp.stack([d for d, _ in each]).any()
        equal = jnp.stack([e for _, e in each]).all(0)

    def over_learned(x):
        return jnp.where(learned, x, 0.0).sum() / jnp.maximum(learned.sum(), 1)

    reward = over_learned(rewards)
    stats = {
        "reward": reward,
        "reward_std": jnp.sqrt(over_learned((rewards - reward) ** 2)),
        "reward_clipped": over_learned(rewards != clipped),
        "equal_groups": (groups & equal).sum() / jnp.maximum(groups.sum(), 1),
        "no_contrast": 1.0 - differ,
        "kl_penalty": over_learned(penalty),
        "advantage_mean": mean,
        "advantage_std": jnp.sqrt(jnp.where(mask, (advantages - mean) ** 2, 0.0).sum() / n),
    }
    if config.whiten and config.estimator in WHITENED:
        advantages = whiten(advantages, mask, differ)
    return advantages, returns, stats


def contrast(rewards: Array, learned: Array, within: bool) -> tuple[Array, Array]:
    """Of rewards [Q, G] that are `learned`: whether any differ of those that are compared, `within` questions
    or in the whole step; and for each question, bool [Q], whether its samples' are all the same.
    """
    ends = ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    least, most = (f(rewards, -1, initial=end, where=learned) for f, end in ends)
    return (least < most).any() if within else least.min() < most.max(), least == most


def _estimate(
    config: AdvantageConfig,
    shaped: Array,
    rewards: Array,
    penalty: Array,
    values: Array | None,
    mask: Array,
    components: Components,
) -> tuple[Array, Array | None]:
    """Token rewards [Q, G, R], which are `rewards` less `penalty` [Q, G] → advantages before whitening, and
    returns if there are values.
    """
    if values is not None:
        return _each(partial(gae, gamma=config.gamma, lam=config.lam))(shaped, values, mask)
    scores = shaped.sum(axis=-1)
    match config.estimator:
        case "gae":
            remedy = "set learn.critic, or take estimator group"
            raise ValueError(f"advantage.estimator: gae needs values: {remedy}")
        case "reinforce_pp":
            # REINFORCE++, arXiv 2501.03262: discounted rewards-to-go, which is GAE with V = 0 and λ = 1
            to_go = partial(gae, gamma=config.gamma, lam=1.0)
            return _each(to_go)(shaped, jnp.zeros_like(shaped), mask)[0], None
        case "group":
            per_response = group(rewards, config.std_ddof, config.std_eps) - group_mean(penalty)
        case "group_mean" | "reinforce_pp_baseline":  # they differ in whitening
            per_response = group_mean(scores)
        case "gdpo":
            per_response = gdpo(components, config.std_ddof, config.std_eps) - group_mean(penalty)
        case "rloo":
            per_response = rloo(scores)
    return jnp.where(mask, per_response[..., None], 0.0), None


def _each(f):
    """A function of one response, over questions and samples."""
    return jax.vmap(jax.vmap(f))
