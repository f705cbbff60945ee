"""From one score per response to one advantage per token: GAE, and the estimators that compare samples
instead of learning values.

Where systems differ, this file does the following:

1. KL in the reward (Med-RLVR, arXiv 2502.19655): rₜ = r(q, o)·1[t = last] − β·k(t). The score is clipped to
   ±`reward_clip`, the penalty is not, as in OpenRLHF.
2. Estimators with one number per response (group, group_mean, rloo, reinforce_pp_baseline) use Σₜ rₜ as its
   score, so the summed penalty is compared within the group as the reward is, as in verl. In OpenRLHF each
   token has its own penalty. `group` divides the reward by the group's standard deviation and the penalty
   not, as in OpenRLHF. verl divides their sum. If all samples have the same reward, β then cancels, and the
   penalties, which are noise at the start of a training, become advantages of unit variance.
3. `gdpo` normalises each component of the reward within the group, adds them by their weights, and whitens
   the sum over the step. So samples with different components differ even where the sums are equal.
4. Group estimators and returns-to-go return no returns, because there is no critic to fit.
5. Whitening is over all tokens of the step, before the split into minibatches, with Bessel's variance + 1e-8
   as in verl and tunix. If all rewards of a step are equal, only the mean is subtracted and nothing is
   divided, for the reason given in 2.

Arrays are [Q, G, R] (questions, samples of each, response columns). Functions of one response take [T], and
the caller vmaps them. The mask is True on the tokens of the response, at least one, and False on the padding
to their right.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from medrlvr_jax.config.schema import GROUP_ESTIMATORS, AdvantageConfig, KLConfig
from medrlvr_jax.types import Array, Assessment

WHITENED = ("gae", "gdpo", "reinforce_pp", "reinforce_pp_baseline")  # estimators to which `whiten` applies
Components = Sequence[tuple[float, Array]]  # each one's weight and values [Q, G]

MAX_EXPONENT = 20.0  # e²⁰ ≈ 5·10⁸ is larger than any real ratio of probabilities; float32 overflows at e⁸⁸


def ratio_of(log_ratio: Array) -> Array:
    """Return exp(log_ratio), at most e²⁰ (with gradient 0 there), so that a single token cannot make a step's
    loss overflow.
    """
    return jnp.exp(jnp.minimum(log_ratio, MAX_EXPONENT))


def kl_estimate(logprobs: Array, ref_logprobs: Array, estimator: str) -> Array:
    """Return an estimate of KL(π ‖ π_ref) for each token, which was drawn from π (Schulman 2020). Arrays have
    any shape.

    With x = log π_ref − log π:  k1 = −x,  k2 = x²/2,  k3 = eˣ − 1 − x,  abs = |x|.
    k1 and k3 are unbiased; k2 and k3 are never negative. In a *loss*, E[∇k1] = 0 and E[∇k2] = ∇KL.
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
    """Return β·k(log π, log π_ref) for each token, and 0 where the mask is False. Arrays have any shape."""
    return kl_coef * jnp.where(mask, kl_estimate(logprobs, ref_logprobs, kl.estimator), 0.0)


def token_rewards(
    reward: Array, logprobs: Array, ref_logprobs: Array | None, mask: Array, kl_coef: Array, kl: KLConfig
) -> Array:
    """Return the rewards of one response's tokens: rₜ = r·1[t = last] − β·k(log πₜ, log π_refₜ). The penalty
    needs a reference and `kl.into: reward`.

    reward [], the others [T] → [T]; 0 where the mask is False.
    """
    column = jnp.arange(mask.shape[-1])
    last = jnp.max(jnp.where(mask, column, -1))
    rewards = jnp.where(column == last, reward, 0.0)
    if ref_logprobs is None or kl.into == "loss":
        return rewards
    return rewards - penalties(logprobs, ref_logprobs, mask, kl_coef, kl)


def gae(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> tuple[Array, Array]:
    """Compute generalised advantage estimation for one response (Schulman et al. 2016, arXiv 1506.02438).

    δₜ = rₜ + γ·Vₜ₊₁ − Vₜ,  Aₜ = Σₖ (γλ)ᵏ·δₜ₊ₖ,  returns = A + V;  V = 0 after the last token.
    rewards, values [T] float, mask [T] bool → advantages, returns [T], both 0 where the mask is False; γ, λ
    in [0, 1]. Columns where the mask is False are skipped, and may hold any value. With γ = λ = 1 returns are
    rewards-to-go.
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
    """Return (x − mean) / √(var + 1e-8) over the entries in the mask, with var = Σ(x − mean)² / (n − 1); 0
    elsewhere. With `scaled` False: x − mean. x has any shape; all axes are taken together.
    """
    # One of the entries is subtracted first, so that a constant x becomes exactly 0. The float32 mean of many
    # 0.1s is not 0.1, and 1/√1e-8 would magnify the difference by 10⁴.
    x = jnp.where(mask, x - jnp.max(x, where=mask, initial=-jnp.inf), 0.0)
    n = mask.sum()
    centred = jnp.where(mask, x - x.sum() / jnp.maximum(n, 1), 0.0)
    variance = (centred**2).sum() / jnp.maximum(n - 1, 1)
    return jnp.where(scaled, centred * jax.lax.rsqrt(variance + 1e-8), centred)


def group_mean(scores: Array) -> Array:
    """Return Aᵢ = rᵢ − mean(r) in each question (Dr.GRPO, arXiv 2503.20783), exactly 0 for equal scores.
    [Q, G] → [Q, G].
    """
    scores = scores - scores[:, :1]  # as in `whiten`: equal scores are exactly 0 from here on
    return scores - scores.mean(axis=-1, keepdims=True)


def group(scores: Array, ddof: int, eps: float) -> Array:
    """Return Aᵢ = (rᵢ − mean(r)) / (std(r) + eps) in each question (GRPO, arXiv 2402.03300), exactly 0 for
    equal scores. [Q, G] → [Q, G].

    std divides by G − ddof. Raises `ValueError` unless G > ddof.
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
    """Return Aᵢ = Σₖ wₖ·(rᵢₖ − mean(rₖ)) / (std(rₖ) + eps) in each question (GDPO, arXiv 2601.05242): [Q, G].

    A component whose values are all equal contributes exactly 0.
    """
    return sum((w * group(values, ddof, eps) for w, values in components), jnp.float32(0))


def rloo(scores: Array) -> Array:
    """Return Aᵢ = rᵢ − mean of the others = G/(G−1)·(rᵢ − mean(r)) in each question (RLOO, arXiv 2402.14740).
    [Q, G] → [Q, G]. Raises `ValueError` if G is 1.
    """
    samples = scores.shape[-1]
    if samples < 2:
        raise ValueError(f"{samples} sample cannot be compared with others: set sample.samples to at least 2")
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
    """Compute the advantages of a whole step and, if there is a critic, its returns: [Q, G, R], 0 where the
    mask is False; and statistics.

    rewards [Q, G] float, mask [Q, G, R]; components: the summands of the rewards, for gdpo. Without the
    assessment's ref_logprobs there is no penalty, without its values no critic.

    The statistics, which runs/metrics.py describes, are scalars over the responses that are learned from:
    those with a token in the mask. `reward` and `reward_std` are of rewards before clipping, `equal_groups`
    and `no_contrast` after it (gdpo: of each component). `no_contrast` is about the rewards that the
    estimator compares: those of a question, or else of the step. `advantage_…` are before whitening.
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
    """Return whether any two rewards [Q, G] of `learned` responses differ, `within` a question or in the
    whole step, bool []; and for each question whether all its rewards are equal, bool [Q].
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
    """Compute advantages [Q, G, R] before whitening and, if there are values, returns.

    shaped [Q, G, R]: the tokens' rewards; rewards, penalty [Q, G]: the two parts of their sum.
    """
    if values is not None:
        return _each(partial(gae, gamma=config.gamma, lam=config.lam))(shaped, values, mask)
    scores = shaped.sum(axis=-1)
    match config.estimator:
        case "gae":
            remedy = "set learn.critic, or use estimator group"
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
    """Map a function of one response over questions and samples."""
    return jax.vmap(jax.vmap(f))
