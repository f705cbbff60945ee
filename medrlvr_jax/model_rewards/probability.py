"""The component `probability`: how probable the policy finds the right answer behind its own thought.

    value = (1 − format) · max(score behind the thought − baseline, 0) + format · [the format is right]

This is RLPR's reward (arXiv 2506.18254). With `score: product`, `baseline: false` and `format: 0` it is
VeriFree's (arXiv 2505.21493). The baseline is the start policy's score of the same answer right behind the
prompt, without tags and thought. It is computed once for each question, before the first step, and kept in
`baseline.json` of the run's folder, because a resumed run no longer has the start policy. A row with a wrong
format, or with one of its tags more than once, is not scored: its score is 0.

Departures: RLPR encodes the response's text again; here the sampled tokens stay (endings.py). RLPR scores all
tokens of the right answer; here the first `max_tokens`. VeriFree also learns from log π of the right answer,
weighted by the reward; that term is not here.
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
from medrlvr_jax.model_rewards import answer_scores
from medrlvr_jax.model_rewards.answer_scores import EndingBatch, PolicyReward
from medrlvr_jax.model_rewards.endings import Replacement, encode_endings, find_positions, make_endings
from medrlvr_jax.rewards.components import list_components
from medrlvr_jax.rewards.parse import WHITE
from medrlvr_jax.rollout.assess import AssessSettings, assess_settings
from medrlvr_jax.rollout.rollout import Encoded, Scored, before_response, place_prompts
from medrlvr_jax.sharding import by_rows, fetch_rows, local_rows, place_rows
from medrlvr_jax.types import Array, Leaf, Params, Prompts, Rollout, pytree

FILE = "baseline.json"
LEAD = 4  # tokens of an ending before the right answer, at most: a shared token's characters, and a space


def make_reward(parts: Parts, section: ProbabilityConfig) -> PolicyReward:
    """Return the component. Its baseline, if it has one, is empty until `fill_baselines`."""
    baseline: dict[str, float] | None = {} if section.baseline else None
    return PolicyReward(
        program=jax.jit(partial(probability_value, section=section, settings=assess_settings(parts))),
        make_request=partial(probability_request, parts, section, baseline),
        shapes=ProbabilityRequest(
            answer_scores.ending_shapes(parts, section.max_tokens + LEAD),
            answer_scores.row_shape(parts, jnp.float32),
            answer_scores.row_shape(parts, jnp.bool_),
        ),
        baseline=baseline,
    )


@pytree
class ProbabilityRequest:
    endings: EndingBatch
    baseline: Float32[Leaf, "*rows"]
    format_ok: Bool[Leaf, "*rows"]


def right_answer(question: Question, section: ProbabilityConfig) -> tuple[str, str]:
    """Return the lead before the right answer, and the answer as it is scored.

    A text has a space before it, as within a sentence.
    """
    return ("", question.reference) if section.of == "letter" else (" ", question.right_text)


def probability_request(
    parts: Parts,
    section: ProbabilityConfig,
    baseline: Mapping[str, float] | None,
    scored: Scored,
) -> ProbabilityRequest:
    """Return the right answer behind each thought with a right format, as arrays [N, …]."""
    replacements, format_ok = {}, scored.verdicts.format_ok
    for i in np.flatnonzero(format_ok).tolist():
        completion = scored.completions[i]
        if positions := find_positions(completion):
            lead, answer = right_answer(scored.questions[i], section)
            has_space = completion[positions.answer - 1] in WHITE
            replacements[i] = Replacement(positions.answer, "" if has_space else lead, answer)
    width = section.max_tokens + LEAD
    endings = make_endings(parts, scored, replacements)
    endings = [ending and ending._replace(ids=ending.ids[:width]) for ending in endings]
    levels = [0.0 if baseline is None else baseline[question_hash(q)] for q in scored.questions]
    room = answer_columns(section, parts.config.sample.max_new_tokens)
    return ProbabilityRequest(
        answer_scores.stack_endings(endings, width, room), np.array(levels, np.float32), format_ok
    )


def answer_columns(section: ProbabilityConfig, length: int) -> int:
    """Return the most tokens that a response of `length` tokens has with its right answer in place.

    The right answer replaces at least two tokens, the given answer and the tag behind it.
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
    settings: AssessSettings,
) -> Float32[Array, "Q G"]:
    columns = answer_columns(section, rollout.tokens.shape[-1])
    answers = answer_scores.append_endings(prompts, rollout.tokens, request.endings, columns)
    with jax.named_scope("probability"):
        score = answer_scores.score_answers(lora.join(base, policy), answers, section.score, settings)
    gain = jnp.where(request.endings.size > 0, jnp.maximum(score - request.baseline, 0.0), 0.0)
    return by_rows((1 - section.format) * gain + section.format * request.format_ok)


def fill_baselines(
    parts: Parts,
    rewards: Mapping[str, PolicyReward],
    start: tuple[Params, Params],
    encoded: Encoded,
    folder: Path,
    done: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Fill the baselines: before the first step by the `start` policy (base, policy), later from the file.

    Raises `ConfigError` if a run resumes after `done` steps and the file lacks one of its questions.
    """
    baselines = {name: reward.baseline for name, reward in rewards.items() if reward.baseline is not None}
    if not baselines:
        return
    path = folder / FILE
    if done:
        saved = from_leader(lambda: files.read_json(path) if path.is_file() else {})
        needed = {question_hash(q) for q in encoded.questions}
        if lost := [name for name in baselines if needed - saved.get(name, {}).keys()]:
            problem = f"it lacks scores of {lost[0]}, and after step {done} the start policy is gone"
            raise ConfigError(f"{path}: {problem}; put the file back, or start under another name=")
    else:
        saved = {}
        for component in list_components(parts.config.reward):
            if component.name in baselines:
                report = partial(progress, f"baseline of {component.name}")
                saved[component.name] = start_scores(parts, component.settings, start, encoded, report)
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
    """Return the score of each question's right answer right behind its prompt, by `question_hash`."""
    mesh, questions, settings = parts.mesh, encoded.questions, assess_settings(parts)
    size, n, width = parts.config.sample.questions, len(questions), section.max_tokens + LEAD
    encoded = before_response(parts, encoded)
    answers = [Replacement(0, *right_answer(q, section)) for q in questions]
    rows = encode_endings(parts.tokenizer, [[]] * n, [""] * n, answers)
    rows = [row._replace(ids=row.ids[:width]) for row in rows]

    def score(base: Params, policy: Params, prompts: Prompts, endings: EndingBatch) -> Float32[Array, "Q 1"]:
        blank = jnp.zeros((size, 1, 1), jnp.int32)
        answers = answer_scores.append_endings(prompts, blank, endings, width)
        return by_rows(answer_scores.score_answers(lora.join(base, policy), answers, section.score, settings))

    program, out = jax.jit(score), {}
    for first in range(0, n, size):
        index = np.resize(np.arange(first, min(first + size, n)), size)
        local, counted = local_rows(size, mesh)
        endings = answer_scores.stack_endings([rows[i] for i in index[local]], width, width)
        placed = place_rows(jax.tree.map(lambda x: x[:, None], endings), size, mesh)
        prompts = place_prompts(lora.join(*start), parts, encoded, index)
        scores = fetch_rows(program(*start, prompts, placed), mesh)[counted]
        hashes = [question_hash(questions[i]) for i in index[local[counted]]]
        out |= dict(zip(hashes, scores[:, 0].tolist(), strict=True))
        progress(min(first + size, n), n)
    return dict(chain.from_iterable(part.items() for part in gather(out)))
