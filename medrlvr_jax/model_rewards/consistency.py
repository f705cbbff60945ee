"""The component `consistency`: 1 if the policy, after its own thought, prefers another letter than it gave.

The policy is asked behind its thought without the last sentence. Of a thought of one sentence nothing is
left, so the policy is then asked behind an empty thought. CLARity lets another model read the thought.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from medrlvr_jax.build import Parts
from medrlvr_jax.config.reward import ConsistencyConfig
from medrlvr_jax.data.question import LETTERS
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import lora
from medrlvr_jax.model_rewards import answer_scores
from medrlvr_jax.model_rewards.answer_scores import EndingBatch, PolicyReward
from medrlvr_jax.model_rewards.endings import Replacement, find_positions, make_endings, thought_prefixes
from medrlvr_jax.rewards.parse import ANSWER, END_THINK
from medrlvr_jax.rollout.assess import AssessSettings, assess_settings
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.sharding import by_rows
from medrlvr_jax.types import Array, Leaf, Params, Prompts, Rollout, pytree

MAX_IDS = 16  # of an ending: the rest of the thought's last token, the tags and the letter
MAX_GAP = 2  # characters of white space between </think> and <answer> that are kept


def make_reward(parts: Parts, section: ConsistencyConfig) -> PolicyReward:
    letters = answer_scores.row_shape(parts, jnp.int32, len(LETTERS))
    return PolicyReward(
        program=jax.jit(partial(consistency_value, settings=assess_settings(parts))),
        make_request=partial(consistency_request, parts, section),
        shapes=ConsistencyRequest(answer_scores.ending_shapes(parts, MAX_IDS), letters),
    )


@pytree
class ConsistencyRequest:
    endings: EndingBatch
    letters: Int32[Leaf, "*rows L"]  # tokens of the letters that the question offers, else −1


def letter_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the token of each letter right behind <answer>. It may include the end of the tag.

    Raises `ConfigError` if a letter is not one token.
    """
    rows = tokenizer.encode_untrusted([f"{END_THINK}{ANSWER}{letter}" for letter in LETTERS])
    if len({tuple(row[:-1]) for row in rows}) > 1:
        problem = "the tokenizer writes a letter behind <answer> in several tokens"
        raise ConfigError(f"reward.components: consistency: {problem}; take it out")
    return tuple(row[-1] for row in rows)


def consistency_request(parts: Parts, section: ConsistencyConfig, scored: Scored) -> ConsistencyRequest:
    """Return the given letter behind each thought without its last sentence, as arrays [N, …]."""
    replacements, v = {}, scored.verdicts
    for i in np.flatnonzero(v.correct if section.of == "right" else v.format_ok).tolist():
        completion = scored.completions[i]
        if positions := find_positions(completion):
            start, end = positions.thought
            shorter = ["", *thought_prefixes(completion[start:end])][-2:][0]
            gap = completion[end + len(END_THINK) : completion.index(ANSWER)][:MAX_GAP]
            lead = f"{END_THINK}{gap}{ANSWER}"
            replacements[i] = Replacement(start + len(shorter), lead, str(v.answer[i]))
    endings = make_endings(parts, scored, replacements)
    offered = np.arange(len(LETTERS)) < np.array([[len(q.options)] for q in scored.questions])
    letters = np.where(offered, np.array(letter_tokens(parts.tokenizer)), -1).astype(np.int32)
    return ConsistencyRequest(
        answer_scores.stack_endings(endings, MAX_IDS, parts.config.sample.max_new_tokens), letters
    )


def consistency_value(
    base: Params,
    policy: Params,
    prompts: Prompts,
    rollout: Rollout,
    request: ConsistencyRequest,
    *,
    settings: AssessSettings,
) -> Float32[Array, "Q G"]:
    answers = answer_scores.append_endings(prompts, rollout.tokens, request.endings, rollout.tokens.shape[-1])
    with jax.named_scope("consistency"):
        other = answer_scores.prefers_other_letter(
            lora.join(base, policy), answers, request.letters, settings
        )
    return by_rows(other.astype(jnp.float32))
