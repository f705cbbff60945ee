"""How much the response depends on the images (the idea of CAPO, arXiv 2506.12849, whose formulas are not
published): the mean over its tokens of

    log π(token | images) − log π(token | grey images of the same sizes)

clipped to ± `clip`; 0 where the format is broken or the question has no image. The first term is the
sampler's, the second takes one more pass over the rows. It pays for any difference between the images and
grey, also one that does not help to answer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32

from medrlvr_jax.build import Parts
from medrlvr_jax.config.reward import LooksConfig
from medrlvr_jax.model import lora, scoring
from medrlvr_jax.model_rewards import ask
from medrlvr_jax.model_rewards.ask import Pass, PolicyReward
from medrlvr_jax.sharding import by_rows
from medrlvr_jax.types import Array, Params, Prompts, Rollout


def reward(parts: Parts, section: LooksConfig) -> PolicyReward:
    """The component."""
    return PolicyReward(
        program=jax.jit(partial(looks_value, clip=section.clip, how=ask.pass_over(parts))),
        request=lambda scored: scored.verdicts.format_ok,
        shapes=ask.shape(parts, jnp.bool_),
    )


def looks_value(
    base: Params,
    policy: Params,
    prompts: Prompts,
    rollout: Rollout,
    format_ok: Bool[Array, "Q G"],
    *,
    clip: float,
    how: Pass,
) -> Float32[Array, "Q G"]:
    vision, mask = prompts.vision, rollout.mask
    assert vision is not None
    blank = prompts.with_vision(features=vision.blank, blank=None)
    answers = ask.Answers(scoring.Rows(blank, rollout.tokens, mask), mask)
    with jax.named_scope("looks"):
        unseen = ask.answer_scores(lora.join(base, policy), answers, "logmean", how)
    logprobs = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    gain = jnp.clip(ask.reduced(logprobs, mask, "logmean") - unseen, -clip, clip)
    return by_rows(jnp.where(format_ok & (vision.slots >= 0).any(-1, keepdims=True), gain, 0.0))
