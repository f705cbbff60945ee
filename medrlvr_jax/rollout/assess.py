"""The trainer's pass over a rollout: log-probs and entropy by the policy, log-probs by the reference, and the
critic's values.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax

from medrlvr_jax.build import Parts
from medrlvr_jax.model import lora, scoring
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.sharding import map_rows
from medrlvr_jax.types import Array, Assessment, Frozen, Params, Prompts, Rollout


@dataclass(frozen=True)
class AssessSettings:
    """The static arguments of `assess`."""

    cfg: DecoderConfig
    critic_cfg: DecoderConfig
    temperature: float
    slab: int  # tokens; see `scoring.token_logprobs`
    shares: tuple[float, ...]  # see `scoring.row_sizes`
    micro: int  # questions per forward pass


def assess_settings(parts: Parts) -> AssessSettings:
    """Return the settings of a training step."""
    c = parts.config
    q, micro, shares = c.sample.questions, c.learn.microbatch or c.learn.minibatch, c.learn.row_sizes
    micro = max(micro * k for k in range(1, 5) if q % (micro * k) == 0)  # without gradients, more fit
    return AssessSettings(
        parts.cfg, parts.critic_cfg, c.sample.temperature, c.model.logit_slab, shares, micro
    )


def assess_alone(policy: Params, parts: Parts, prompts: Prompts, rollout: Rollout) -> Assessment:
    """Assess any responses by the policy alone, at temperature 1."""
    c, questions = parts.config, len(rollout.tokens)
    micro = math.gcd(questions, c.learn.microbatch or c.learn.minibatch)
    settings = AssessSettings(parts.cfg, parts.critic_cfg, 1.0, c.model.logit_slab, (), micro)
    return assess(Frozen({}, None), policy, None, prompts, rollout, settings)


@partial(jax.jit, static_argnames="settings")
def assess(
    frozen: Frozen,
    policy: Params,
    critic: Params | None,
    prompts: Prompts,
    rollout: Rollout,
    settings: AssessSettings,
) -> Assessment:
    """Assess a rollout before it is learned from. `policy` and `critic` are their trained parameters. The
    reference has no adapters.
    """
    cfg = settings.cfg

    def logprobs_at(
        rows: scoring.Rows, trained: Params, cfg: DecoderConfig, size: int
    ) -> tuple[Array, Array]:
        params = lora.join(frozen.base, trained)
        how = {"temperature": settings.temperature, "slab": settings.slab}
        read = partial(scoring.token_logprobs, params, cfg, **how)
        return scoring.at_responses(params, cfg, rows, size, read)

    def values_at(rows: scoring.Rows, trained: Params, size: int) -> Array:
        params, critic_cfg = lora.join(frozen.base, trained), settings.critic_cfg
        read = lambda hidden, _: scoring.values(params, critic_cfg, hidden)
        return scoring.at_responses(params, critic_cfg, rows, size, read)

    def at(rows: scoring.Rows, size: int) -> Assessment:
        ref_logprobs = values = None
        with jax.named_scope("assess_policy"):
            logprobs, entropy = logprobs_at(rows, policy, cfg, size)
        with jax.named_scope("assess_reference"):
            if frozen.reference is not None:
                unseen = rows._replace(prompts=rows.prompts.unseen)
                ref_logprobs, _ = logprobs_at(unseen, frozen.reference, lora.without_adapters(cfg), size)
        with jax.named_scope("assess_critic"):
            if critic is not None:
                values = values_at(rows, critic, size)
        return Assessment(logprobs, entropy, ref_logprobs, values)

    sizes = scoring.row_sizes(settings.shares, *rollout.mask.shape[1:])

    def part(rows: scoring.Rows) -> Assessment:
        return scoring.at_row_size(rows.mask, sizes, partial(at, rows))

    return map_rows(part, scoring.Rows(prompts, rollout.tokens, rollout.mask), settings.micro)
