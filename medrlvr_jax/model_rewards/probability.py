"""How probable the policy finds the right answer in the place of its own, after its own thought (RLPR, arXiv
2506.18254; with `score: product`, no baseline and `format: 0` it is VeriFree's reward, arXiv 2505.21493).

    value = (1 − format) · max(score after the thought − baseline, 0) + format · [the format is kept]

The baseline is the start policy's score of the same answer right behind the prompt, without tags and thought.
It is taken once per question before the first step, and kept in `baseline.json` of the run's folder, for the
start policy is gone when a run resumes. A row whose format is broken, or which has one of its tags more than
once, is not asked about: its score pays 0.

Departures: RLPR encodes the response's text again, here the drawn tokens stay (joins.py). It scores all
tokens of the right answer, here the first `max_tokens` are. VeriFree also learns from log π of the right
answer, weighted by the reward: that term is not here.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32

from medrlvr_jax.build import Parts
from medrlvr_jax.config.reward import ProbabilityConfig
from medrlvr_jax.data.question import Question, question_hash
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import from_leader, gather
from medrlvr_jax.model import lora
from medrlvr_jax.model_rewards import ask
from medrlvr_jax.model_rewards.ask import Ending, Pass, PolicyReward
from medrlvr_jax.model_rewards.joins import join, joined, places
from medrlvr_jax.rewards.components import list_components
from medrlvr_jax.rewards.parse import WHITE
from medrlvr_jax.rollout.rollout import Encoded, Scored, before_response, place_prompts
from medrlvr_jax.sharding import by_rows, fetch_rows, own_rows, place_rows
from medrlvr_jax.types import Array, Leaf, Params, Prompts, Rollout, pytree

FILE = "baseline.json"
LEAD = 4  # tokens of an ending before the right answer, at most: what a token shares with it, and a space


def reward(parts: Parts, section: ProbabilityConfig) -> PolicyReward:
    """The component with an empty baseline (`take_baselines`), if it has one."""
    baseline: dict[str, float] | None = {} if section.baseline else None
    return PolicyReward(
        program=jax.jit(partial(probability_value, section=section, how=ask.pass_over(parts))),
        request=partial(probability_request, parts, section, baseline),
        shapes=ProbabilityRequest(
            ask.endings_as_shapes(parts, section.max_tokens + LEAD),
            ask.shape(parts, jnp.float32),
            ask.shape(parts, jnp.bool_),
        ),
        baseline=baseline,
    )


@pytree
class ProbabilityRequest:
    ending: Ending
    baseline: Float32[Leaf, "*rows"]
    format_ok: Bool[Leaf, "*rows"]


def right_answer(question: Question, section: ProbabilityConfig) -> tuple[str, str]:
    """The right answer as it is scored, after a lead: a text has a space before it, as within a sentence."""
    return ("", question.reference) if section.of == "letter" else (" ", question.right_text)


def probability_request(
    parts: Parts,
    section: ProbabilityConfig,
    baseline: Mapping[str, float] | None,
    scored: Scored,
) -> ProbabilityRequest:
    """[N, …]: the right answer behind each thought whose format is kept."""
    wanted, format_ok = {}, scored.verdicts.format_ok
    for i in np.flatnonzero(format_ok).tolist():
        completion = scored.completions[i]
        if where := places(completion):
            lead, answer = right_answer(scored.questions[i], section)
            spaced = completion[where.answer - 1] in WHITE  # as the model has it, if it has any
            wanted[i] = where.answer, ("" if spaced else lead, answer)
    width = section.max_tokens + LEAD
    rows = joined(parts, scored, wanted)
    rows = [j and j._replace(ids=j.ids[:width]) for j in rows]
    level = [0.0 if baseline is None else baseline[question_hash(q)] for q in scored.questions]
    room = answer_columns(section, parts.config.sample.max_new_tokens)
    return ProbabilityRequest(ask.endings(rows, width, room), np.array(level, np.float32), format_ok)


def answer_columns(section: ProbabilityConfig, length: int) -> int:
    """Tokens of a response with its right answer, at most: that stands in the place of two or more, the given
    answer and the tag behind it. `length`: tokens of a response.
    """
    return length - 2 + section.max_tokens + LEAD


def probability_value(
    base: Params,
    policy: Params,
    prompts: Prompts,
    rollout: Rollout,
    request: ProbabilityRequest,
    *,
    section: ProbabilityConfig,
    how: Pass,
) -> Float32[Array, "Q G"]:
    columns = answer_columns(section, rollout.tokens.shape[-1])
    answers = ask.with_ending(prompts, rollout.tokens, request.ending, columns)
    with jax.named_scope("probability"):
        score = ask.answer_scores(lora.join(base, policy), answers, section.score, how)
    gain = jnp.where(request.ending.size > 0, jnp.maximum(score - request.baseline, 0.0), 0.0)
    return by_rows((1 - section.format) * gain + section.format * request.format_ok)


def take_baselines(
    parts: Parts,
    rewards: Mapping[str, PolicyReward],
    start: tuple[Params, Params],
    encoded: Encoded,
    folder: Path,
    done: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Fill the baselines: before the first step by the start policy (base, policy), later from the file.

    Raises `ConfigError` where a run that resumes after `done` steps has none for one of its questions.
    """
    baselines = {name: reward.baseline for name, reward in rewards.items() if reward.baseline is not None}
    if not baselines:
        return
    path = folder / FILE
    if done:
        saved = from_leader(lambda: files.read_json(path) if path.is_file() else {})
        asked = {question_hash(q) for q in encoded.questions}
        if lost := [name for name in baselines if asked - saved.get(name, {}).keys()]:
            problem = f"it lacks scores of {lost[0]}, and after step {done} the start policy is gone"
            raise ConfigError(f"{path}: {problem}; put the file back, or start under another name=")
    else:
        saved = {}
        for term in list_components(parts.config.reward):
            if term.name in baselines:
                report = partial(progress, f"baseline of {term.name}")
                saved[term.name] = start_scores(parts, term.settings, start, encoded, report)
        if jax.process_index() == 0:
            files.write_json(path, saved)
    for name, baseline in baselines.items():
        baseline.update(saved[name])


def start_scores(
    parts: Parts,
    section: ProbabilityConfig,
    start: tuple[Params, Params],
    encoded: Encoded,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """The score of each question's right answer right behind its prompt, by `question_hash`."""
    tokenizer, mesh, questions, how = parts.tokenizer, parts.mesh, encoded.questions, ask.pass_over(parts)
    size, n, width = parts.config.sample.questions, len(questions), section.max_tokens + LEAD
    encoded = before_response(parts, encoded)
    endings = [right_answer(q, section) for q in questions]
    rows = [j._replace(ids=j.ids[:width]) for j in join(tokenizer, [[]] * n, [""] * n, [0] * n, endings)]

    def score(base: Params, policy: Params, prompts: Prompts, ending: Ending) -> Float32[Array, "Q 1"]:
        blank = jnp.zeros((size, 1, 1), jnp.int32)
        answers = ask.with_ending(prompts, blank, ending, width)
        return by_rows(ask.answer_scores(lora.join(base, policy), answers, section.score, how))

    program, out = jax.jit(score), {}
    for first in range(0, n, size):
        index = np.resize(np.arange(first, min(first + size, n)), size)
        mine, counted = own_rows(size, mesh)
        ending = ask.endings([rows[i] for i in index[mine]], width, width)
        placed = place_rows(jax.tree.map(lambda x: x[:, None], ending), size, mesh)
        prompts = place_prompts(lora.join(*start), parts, encoded, index)
        scores = fetch_rows(program(*start, prompts, placed), mesh)[counted]
        hashes = [question_hash(questions[i]) for i in index[mine[counted]]]
        out |= dict(zip(hashes, scores[:, 0].tolist(), strict=True))
        progress(min(first + size, n), n)
    return dict(chain.from_iterable(part.items() for part in gather(out)))
