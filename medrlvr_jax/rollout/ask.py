"""What the policy says of answers that it did not give, after its own thoughts: one pass over a step's rows.

`Answers` are the responses of a rollout, each with another ending (rewards/joins.py): they are scored as the
rollout itself is, all of a group behind one prompt.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int32

from medrlvr_jax.model import decoder, lora, scoring
from medrlvr_jax.model.spec import DecoderConfig
from medrlvr_jax.sharding import by_rows, join_rows, split_rows
from medrlvr_jax.types import Array, Params, Prompts, pytree

Score = Literal["mean", "geometric", "product", "logmean"]


@pytree
class Answers:
    """Responses up to an answer. A row without one is empty."""

    tokens: Int32[Array, "Q G R"]
    mask: Bool[Array, "Q G R"]  # True up to the answer's last token
    answer: Bool[Array, "Q G R"]  # the answer's own tokens


class Rows(NamedTuple):
    """Questions and answers to them."""

    responses: scoring.Rows
    answer: Array  # bool [Q, G, R]
    offered: Any  # int32 [Q], how many letters each question offers; None: no letters


@partial(jax.jit, static_argnames=("cfg", "score", "temperature", "slab", "sizes", "micro"))
def answer_scores(
    base: Params,
    policy: Params,
    prompts: Prompts,
    answers: Answers,
    *,
    cfg: DecoderConfig,
    score: Score,
    temperature: float,
    slab: int,
    sizes: tuple[int, ...],
    micro: int,
) -> Float32[Array, "Q G"]:
    """How probable the policy finds each answer: `reduced` over its tokens."""
    params = lora.join(base, policy)

    def read(hidden: Array, tokens: Array) -> Array:
        return scoring.token_logprobs(params, cfg, hidden, tokens, temperature, slab)[0]

    def at(rows: Rows, size: int) -> Array:
        logprobs = scoring.at_responses(params, cfg, rows.responses, size, read)
        return reduced(logprobs, rows.answer, score)

    with jax.named_scope("answer_scores"):
        rows = Rows(scoring.Rows(prompts, answers.tokens, answers.mask), answers.answer, None)
        return _in_parts(rows, at, sizes, micro)


def reduced(
    logprobs: Float32[Array, "Q G R"], answer: Bool[Array, "Q G R"], score: Score
) -> Float32[Array, "Q G"]:
    """One number from the log-probs of an answer's n tokens; 0 where there are none.

    mean: Σ p ÷ n (RLPR, arXiv 2506.18254); product: Π p (VeriFree, arXiv 2505.21493); geometric: (Π p)^(1/n);
    logmean: Σ log p ÷ n.
    """
    logprobs, n = jnp.where(answer, logprobs, 0.0), answer.sum(-1)
    total, some = logprobs.sum(-1), jnp.maximum(n, 1)
    match score:
        case "mean":
            return jnp.where(answer, jnp.exp(logprobs), 0.0).sum(-1) / some
        case "product":
            return jnp.where(n > 0, jnp.exp(total), 0.0)
        case "geometric":
            return jnp.where(n > 0, jnp.exp(total / some), 0.0)
        case "logmean":
            return total / some


@partial(jax.jit, static_argnames=("cfg", "letters", "sizes", "micro"))
def best_letters(
    base: Params,
    policy: Params,
    prompts: Prompts,
    answers: Answers,
    offered: Int32[Array, " Q"],
    *,
    cfg: DecoderConfig,
    letters: tuple[int, ...],
    sizes: tuple[int, ...],
    micro: int,
) -> Int32[Array, "Q G"]:
    """Which of the tokens `letters`, of the first `offered` of them, is most probable in the place of each
    answer, which is one token; 0 where there is none.
    """
    params = lora.join(base, policy)
    name = "embed" if cfg.tied else "head"
    table = params[name][jnp.array(letters)] if cfg.tied else params[name][:, jnp.array(letters)]
    letters_only = {**params, name: table}

    def at(rows: Rows, size: int) -> Array:
        known = jnp.arange(len(letters)) < rows.offered[:, None, None, None]

        def read(hidden: Array, tokens: Array) -> Array:
            scores = decoder.logits(letters_only, cfg, hidden)
            return jnp.where(known, scores, -jnp.inf).argmax(-1).astype(jnp.int32)

        return jnp.where(rows.answer, scoring.at_responses(params, cfg, rows.responses, size, read), 0).sum(
            -1
        )

    with jax.named_scope("best_letters"):
        rows = Rows(scoring.Rows(prompts, answers.tokens, answers.mask), answers.answer, offered)
        return _in_parts(rows, at, sizes, micro)


def _in_parts(rows: Rows, at: Callable[[Rows, int], Array], sizes: tuple[int, ...], micro: int) -> Array:
    """`at` of `micro` questions at a time, each part at the least of `sizes` that holds its rows."""

    def part(rows: Rows) -> Array:
        return scoring.at_row_size(rows.responses.mask, sizes, partial(at, rows))

    if micro == len(rows.answer):
        return by_rows(part(rows))
    return by_rows(join_rows(jax.lax.map(part, split_rows(rows, micro))))
