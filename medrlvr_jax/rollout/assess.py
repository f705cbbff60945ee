"""What the trainer's own pass says of responses: log-probs and entropy by the policy, log-probs by the
reference, the critic's values.
"""

import math
from functools import partial
from typing import Any

import jax

from medrlvr_jax.build import Parts
from medrlvr_jax.model import lora, scoring
from medrlvr_jax.model.spec import DecoderConfig
from medrlvr_jax.sharding import by_rows, join_rows, split_rows
from medrlvr_jax.types import Assessment, Frozen, Params, Prompts, Rollout


def assess_alone(policy: Params, parts: Parts, prompts: Prompts, rollout: Rollout) -> Assessment:
    """What the policy, whole, says of responses that are there, by the training's own pass; no reference and
    no critic.
    """
    learn, rows = parts.config.learn, len(rollout.tokens)
    settings = {
        "cfg": parts.cfg,
        "critic_cfg": parts.critic_cfg,
        "temperature": 1.0,
        "slab": parts.config.model.logit_slab,
    }
    sizes = (rollout.tokens.shape[1] * rollout.tokens.shape[2],)
    micro = math.gcd(rows, learn.microbatch or learn.minibatch)
    return assess(Frozen({}, None), policy, None, prompts, rollout, **settings, sizes=sizes, micro=micro)


@partial(jax.jit, static_argnames=("cfg", "critic_cfg", "temperature", "slab", "sizes", "micro"))
def assess(
    frozen: Frozen,
    policy: Params,
    critic: Params | None,
    prompts: Prompts,
    rollout: Rollout,
    *,
    cfg: DecoderConfig,
    critic_cfg: DecoderConfig,
    temperature: float,
    slab: int,
    sizes: tuple[int, ...],
    micro: int,
) -> Assessment:
    """What the trainer itself says of the rollout before learning: log-probs, the reference's, and values.

    `policy` and `critic` are what is trained of them; the reference is computed without adapters. `micro`
    questions at a time, each at the least of `sizes` that holds them (`scoring.at_row_size`).
    """

    def read(rows, trained, cfg, size, of):
        params = lora.join(frozen.base, trained)
        return scoring.at_responses(params, cfg, rows, size, partial(of, params, cfg))

    def logprobs(params, cfg, hidden, tokens):
        return scoring.token_logprobs(params, cfg, hidden, tokens, temperature, slab)

    def values(params, cfg, hidden, tokens):
        return scoring.values(params, cfg, hidden)

    def at(rows: scoring.Rows, size: int) -> Assessment:
        ref = found = None
        with jax.named_scope("assess_policy"):
            own, entropy = read(rows, policy, cfg, size, logprobs)
        with jax.named_scope("assess_reference"):
            if frozen.reference is not None:
                ref, _ = read(rows, frozen.reference, lora.off(cfg), size, logprobs)
        with jax.named_scope("assess_critic"):
            if critic is not None:
                found = read(rows, critic, critic_cfg, size, values)
        return Assessment(own, entropy, ref, found)

    def part(rows: scoring.Rows) -> Assessment:
        return scoring.at_row_size(rows.mask, sizes, partial(at, rows))

    rows = scoring.Rows(prompts, rollout.tokens, rollout.mask)
    if micro == len(rows.tokens):
        return by_rows(part(rows))
    return by_rows(join_rows(jax.lax.map(part, split_rows(rows, micro))))


def assess_settings(parts: Parts) -> dict[str, Any]:
    """The static arguments of `assess`."""
    c = parts.config
    sizes = scoring.row_sizes(c.learn.row_sizes, c.sample.samples, c.sample.max_new_tokens)
    q, micro = c.sample.questions, c.learn.microbatch or c.learn.minibatch
    micro = max(micro * k for k in range(1, 5) if q % (micro * k) == 0)  # a forward pass alone keeps less
    return {
        "cfg": parts.cfg,
        "critic_cfg": parts.critic_cfg,
        "temperature": c.sample.temperature,
        "slab": c.model.logit_slab,
        "sizes": sizes,
        "micro": micro,
    }
