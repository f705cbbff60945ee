"""1 where the policy itself, after its thought without the last sentence, finds another letter more probable
than the one that it gave (CLARity has another model read the thought). Of a thought of one sentence nothing
is left: the policy is then asked after an empty thought.
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
from medrlvr_jax.model_rewards import ask
from medrlvr_jax.model_rewards.ask import Ending, Pass, PolicyReward
from medrlvr_jax.model_rewards.joins import joined, places, sentences
from medrlvr_jax.rewards.parse import ANSWER, END_THINK
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.sharding import by_rows
from medrlvr_jax.types import Array, Leaf, Params, Prompts, Rollout, pytree

CUT = 16  # tokens of an ending after a cut thought: its last token's rest, tags and letter
SEAM = 2  # characters of white space between </think> and <answer> that are kept after a cut thought


def reward(parts: Parts, section: ConsistencyConfig) -> PolicyReward:
    """The component."""
    letters = ask.shape(parts, jnp.int32, len(LETTERS))
    return PolicyReward(
        program=jax.jit(partial(consistency_value, how=ask.pass_over(parts))),
        request=partial(consistency_request, parts, section),
        shapes=ConsistencyRequest(ask.endings_as_shapes(parts, CUT), letters),
    )


@pytree
class ConsistencyRequest:
    ending: Ending
    letters: Int32[Leaf, "*rows L"]  # tokens of those that the question offers, else −1


def letter_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token of each letter right after <answer>; it may hold the end of the tag."""
    rows = tokenizer.encode_untrusted([f"{END_THINK}{ANSWER}{letter}" for letter in LETTERS])
    if len({tuple(row[:-1]) for row in rows}) > 1:
        problem = "the tokenizer writes a letter behind <answer> in several tokens"
        raise ConfigError(f"reward.components: consistency: {problem}; take it out")
    return tuple(row[-1] for row in rows)


def consistency_request(parts: Parts, section: ConsistencyConfig, scored: Scored) -> ConsistencyRequest:
    """[N, …]: the letter that was given behind each thought without its last sentence."""
    wanted, v = {}, scored.verdicts
    for i in np.flatnonzero(v.correct if section.of == "right" else v.format_ok).tolist():
        completion = scored.completions[i]
        if where := places(completion):
            begin, end = where.thought
            before = ["", *sentences(completion[begin:end])][-2:][0]
            seam = completion[end + len(END_THINK) : completion.index(ANSWER)][:SEAM]
            letter = str(v.answer[i])
            wanted[i] = begin + len(before), (f"{END_THINK}{seam}{ANSWER}", letter)
    rows = joined(parts, scored, wanted)
    offered = np.arange(len(LETTERS)) < np.array([[len(q.options)] for q in scored.questions])
    letters = np.where(offered, np.array(letter_tokens(parts.tokenizer)), -1).astype(np.int32)
    return ConsistencyRequest(ask.endings(rows, CUT, parts.config.sample.max_new_tokens), letters)


def consistency_value(
    base: Params,
    policy: Params,
    prompts: Prompts,
    rollout: Rollout,
    request: ConsistencyRequest,
    *,
    how: Pass,
) -> Float32[Array, "Q G"]:
    answers = ask.with_ending(prompts, rollout.tokens, request.ending, rollout.tokens.shape[-1])
    with jax.named_scope("consistency"):
        other = ask.differs(lora.join(base, policy), answers, request.letters, how)
    return by_rows(other.astype(jnp.float32))
