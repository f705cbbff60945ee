"""From rewards to experience: one reward for each row in all processes, then advantages, and the step's
scalars.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax.build import Parts
from medrlvr_jax.config.schema import COMPARING
from medrlvr_jax.host.processes import gather
from medrlvr_jax.rl import advantages
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.sharding import by_rows, own_rows
from medrlvr_jax.types import Array, Assessment, Experience, Prompts, Rollout


def rewards_of_all(scored: Scored, n: int, parts: Parts) -> np.ndarray:
    """float32 [own, G]: the reward of each row that this process holds of n questions, from the process that
    scored it.

    Two processes that score one row may disagree (a judge, a clock, a time-out in one of them). JAX never
    compares the copies of an array, so the weights would then differ from process to process, and nothing
    would say so.
    """
    samples = parts.config.sample.samples
    rewards = np.empty(n * samples, np.float32)
    for places, values in gather([scored.places.tolist(), scored.verdicts.reward.tolist()]):
        rewards[places] = values
    return rewards.reshape(n, samples)[own_rows(n, parts.mesh)[0]]


@partial(jax.jit, static_argnames=("config",))
def make_experience(
    prompts: Prompts,
    rollout: Rollout,
    assessment: Assessment,
    rewards: Array,
    kl_coef: Array,
    *,
    config: tuple,
) -> tuple[Experience, dict[str, Array]]:
    """Rewards [Q, G] meet the assessment; `config` is (AdvantageConfig, KLConfig, LossConfig). Also the
    step's scalars, over tokens or responses. Responses whose reward is not finite are left out of what is
    learned from: see user.py.
    """
    advantage, kl, loss = config
    mask, n = rollout.mask, jnp.maximum(rollout.mask.sum(), 1)
    a = assessment
    kept = jnp.isfinite(rewards)
    rewards = jnp.where(kept, rewards, jnp.where(kept, rewards, 0.0).sum() / jnp.maximum(kept.sum(), 1))
    if advantage.estimator in COMPARING:
        kept = jnp.broadcast_to(kept.all(-1, keepdims=True), kept.shape)
    learned = mask & kept[..., None]
    adv, returns, stats = advantages.compute(advantage, kl, rewards, a, learned, kl_coef)
    sampler = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    gap = jnp.where(mask, a.logprobs - sampler, 0.0)
    stats |= {
        "entropy": jnp.where(mask, a.entropy, 0.0).sum() / n,
        "sampler_gap": jnp.abs(gap).max(),  # max |Δ log-prob| between sampler and trainer
        "sampler_ratio_far": (jnp.abs(jnp.exp(gap) - 1) > 0.1).sum() / n,
        "unlearned": 1 - kept.mean(),
    }
    mean_entropy = jnp.where(mask, a.entropy, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
    stats |= {  # places in the batch of the responses that the monitors name
        "row/sampler_ratio_far_high": jnp.abs(gap).max(-1).argmax(),
        "row/entropy_high": mean_entropy.argmax(),
        "row/entropy_low": mean_entropy.argmin(),
    }
    if a.ref_logprobs is not None:
        to_ref = jnp.where(mask, a.logprobs - a.ref_logprobs, 0.0)
        stats["kl"] = to_ref.sum() / n
        stats["kl_response"] = to_ref.sum(-1).mean()
        stats["row/kl_high"] = to_ref.sum(-1).argmax()
    experience = Experience(
        prompts=prompts,
        tokens=rollout.tokens,
        mask=learned,
        logprobs=a.logprobs,
        ref_logprobs=a.ref_logprobs,
        advantages=adv,
        values=a.values,
        returns=returns,
        sampler_weights=None
        if loss.sampler_cap is None
        else jnp.minimum(advantages.ratio_of(gap), loss.sampler_cap),
    )
    return by_rows(experience), stats


def experience_settings(parts: Parts) -> dict[str, Any]:
    """The static arguments of `make_experience`."""
    return {"config": (parts.config.advantage, parts.config.kl, parts.config.loss)}
