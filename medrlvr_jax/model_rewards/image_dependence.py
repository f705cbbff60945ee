"""The component `looks`: how much more probable the images make the response than grey images do.

It follows the idea of CAPO (arXiv 2506.12849), whose formulas are not published. The value is the mean over
the response's tokens of

    log π(token | images) − log π(token | grey images of the same sizes)

clipped to ± `clip`. It is 0 if the format is broken or the question has no image. The first term comes from
the sampler, the second takes one more pass over the rows. Any difference between the images and grey is
rewarded, even one that does not help to answer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32

from medrlvr_jax.build import Parts
from medrlvr_jax.config.reward import LooksConfig
from medrlvr_jax.model import lora, scoring
from medrlvr_jax.model_rewards import answer_scores
from medrlvr_jax.model_rewards.answer_scores import AnswerRows, PolicyReward
from medrlvr_jax.rollout.assess import AssessSettings, assess_settings
from medrlvr_jax.sharding import by_rows
from medrlvr_jax.types import Array, Params, Prompts, Rollout


def make_reward(parts: Parts, section: LooksConfig) -> PolicyReward:
    return PolicyReward(
        program=jax.jit(partial(image_dependence, clip=section.clip, settings=assess_settings(parts))),
        make_request=lambda scored: scored.verdicts.format_ok,
        shapes=answer_scores.row_shape(parts, jnp.bool_),
    )


def image_dependence(
    base: Params,
    policy: Params,
    prompts: Prompts,
    rollout: Rollout,
    format_ok: Bool[Array, "Q G"],
    *,
    clip: float,
    settings: AssessSettings,
) -> Float32[Array, "Q G"]:
    vision, mask = prompts.vision, rollout.mask
    assert vision is not None
    blank = prompts.with_vision(features=vision.blank, blank=None)
    rows = AnswerRows(scoring.Rows(blank, rollout.tokens, mask), mask)
    with jax.named_scope("looks"):
        on_grey = answer_scores.score_answers(lora.join(base, policy), rows, "logmean", settings)
    logprobs = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    gain = jnp.clip(answer_scores.reduce_logprobs(logprobs, mask, "logmean") - on_grey, -clip, clip)
    return by_rows(jnp.where(format_ok & (vision.slots >= 0).any(-1, keepdims=True), gain, 0.0))
