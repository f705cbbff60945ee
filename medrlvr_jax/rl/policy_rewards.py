"""Components of the reward that ask the policy itself: what the host writes down of each row, and the program
that answers for all rows.

probability: how probable the policy finds the right answer in the place of its own, after its own thought
(RLPR, arXiv 2506.18254; with `score: product`, no baseline and `format: 0` it is VeriFree's reward, arXiv
2505.21493).

    value = (1 − format) · max(score after the thought − baseline, 0) + format · [the format is kept]

The baseline is the start policy's score of the same answer right behind the prompt, without tags and thought.
It is taken once per question before the first step, and kept in `baseline.json` of the run's folder, for the
start policy is gone when a run resumes. A row whose format is broken, or which has one of its tags more than
once, is not asked about: its score pays 0.

consistency: 1 where the policy itself, after its thought without the last sentence, finds another letter more
probable than the one that it gave (CLARity has another model read the thought). Of a thought of one sentence
nothing is left: the policy is then asked after an empty thought.

looks: how much the response depends on the images (the idea of CAPO, arXiv 2506.12849, whose formulas are not
published): the mean over its tokens of

    log π(token | images) − log π(token | grey images of the same sizes)

clipped to ± `clip`; 0 where the format is broken or the question has no image. The first term is the
sampler's, the second takes one more pass over the rows. It pays for any difference between the images and
grey, also one that does not help to answer.

Departures: RLPR encodes the response's text again, here the drawn tokens stay (rewards/joins.py). It scores
all tokens of the right answer, here the first `max_tokens` are. VeriFree also learns from log π of the right
answer, weighted by the reward: that term is not here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32

from medrlvr_jax.build import Parts
from medrlvr_jax.config.reward import ConsistencyConfig, LooksConfig, ProbabilityConfig, RewardConfig
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.question import LETTERS, Question, question_hash
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import from_leader, gather
from medrlvr_jax.model import lora, scoring
from medrlvr_jax.rewards.components import components
from medrlvr_jax.rewards.joins import Join, join, places, sentences
from medrlvr_jax.rewards.parse import ANSWER, END_THINK, WHITE, judged_beginning
from medrlvr_jax.rl.experience import PolicyReward
from medrlvr_jax.rollout import ask
from medrlvr_jax.rollout.ask import Ending, Pass
from medrlvr_jax.rollout.assess import assess_settings
from medrlvr_jax.rollout.rollout import Encoded, Scored, place_prompts
from medrlvr_jax.sharding import by_rows, fetch_rows, own_rows, place_rows
from medrlvr_jax.types import Array, Leaf, Params, Prompts, Rollout, pytree

FILE = "baseline.json"
LEAD = 4  # tokens of an ending before the right answer, at most: what a token shares with it, and a space
CUT = 16  # tokens of an ending after a cut thought: its last token's rest, tags and letter
SEAM = 2  # characters of white space between </think> and <answer> that are kept after a cut thought


def make_policy_rewards(parts: Parts) -> dict[str, PolicyReward]:
    """By name, the components of the reward that ask the policy. Nothing is compiled yet."""
    out, how = {}, pass_over(parts)
    for term in components(parts.config.reward):
        match section := term.settings:
            case ProbabilityConfig():
                baseline: dict[str, float] | None = {} if section.baseline else None
                out[term.name] = PolicyReward(
                    program=jax.jit(partial(probability_value, section=section, how=how)),
                    request=partial(probability_request, parts, section, baseline),
                    shapes=ProbabilityRequest(
                        endings_as_shapes(parts, section.max_tokens + LEAD),
                        shape(parts, jnp.float32),
                        shape(parts, jnp.bool_),
                    ),
                    baseline=baseline,
                )
            case ConsistencyConfig():
                letters = shape(parts, jnp.int32, len(LETTERS))
                out[term.name] = PolicyReward(
                    program=jax.jit(partial(consistency_value, how=how)),
                    request=partial(consistency_request, parts, section),
                    shapes=ConsistencyRequest(endings_as_shapes(parts, CUT), letters),
                )
            case LooksConfig():
                out[term.name] = PolicyReward(
                    program=jax.jit(partial(looks_value, clip=section.clip, how=how)),
                    request=lambda scored: scored.verdicts.format_ok,
                    shapes=shape(parts, jnp.bool_),
                )
    return out


def asks_blank(config: RewardConfig) -> bool:
    """Whether a component needs the prompts with grey images."""
    return any(section.kind == "looks" for section in config.components)


def check_questions(config: RewardConfig, tokenizer: Tokenizer, questions: Sequence[Question]) -> None:
    """Refuse questions that lack what a component asks for (letters of one token each, texts, facts, images):
    its value would be the same for all completions.
    """
    for section in config.components:
        if section.kind == "consistency":
            letter_tokens(tokenizer)
        no_letters = next((q.id for q in questions if q.value is not None), None)
        if section.kind == "consistency" and no_letters is not None:
            problem = f"it asks for letters, and question {no_letters} has not one right letter"
            raise ConfigError(f"reward.components: consistency: {problem}; take it out")
        if section.kind == "looks" and not any(q.images for q in questions):
            raise ConfigError("reward.components: looks: no question of data.path has images; take it out")
        no_texts = not any(q.value is not None and q.value.kind == "text" for q in questions)
        if section.kind == "verifier" and section.when == "undecided" and no_texts:
            why = "no right answer in data.path is a text, so it is never asked; set when to wrong or always"
            raise ConfigError(f"reward.components: verifier: {why}")
        if section.kind == "process" and not any(q.facts for q in questions):
            remedy = "give them a field facts, or take it out"
            raise ConfigError(f"reward.components: process: no question of data.path has facts; {remedy}")


def pass_over(parts: Parts) -> Pass:
    """Rows are scored as the rollout's are."""
    settings, shares = assess_settings(parts), parts.config.learn.row_sizes
    return Pass(settings.cfg, settings.temperature, settings.slab, shares, settings.micro)


def shape(parts: Parts, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
    """Of an array [Q, G, …] about a step's rows."""
    return jax.ShapeDtypeStruct((parts.config.sample.questions, parts.config.sample.samples, *more), dtype)


def endings_as_shapes(parts: Parts, width: int) -> Ending:
    single = shape(parts, jnp.int32)
    return Ending(single, shape(parts, jnp.int32, width), single, single)


class Responses(NamedTuple):
    """N responses as they were drawn."""

    rows: list[list[int]]  # tokens without the stop token
    texts: list[str]  # what they decode to
    begun: int  # characters of a completion before them


def responses(parts: Parts, scored: Scored) -> Responses:
    """This process's scored rows."""
    sizes = scored.lengths - scored.stopped
    rows = [row[:size].tolist() for row, size in zip(scored.tokens, sizes, strict=True)]
    begun = judged_beginning(text.begins(parts.tokenizer, parts.config.prompt), parts.config.reward.mode)
    return Responses(rows, [c[len(begun) :] for c in scored.completions], len(begun))


def joined(
    tokenizer: Tokenizer, found: Responses, wanted: Mapping[int, tuple[int, tuple[str, str]]]
) -> list[Join | None]:
    """A join for each row in `wanted`, by the character of the completion and the ending; None for others."""
    out: list[Join | None] = [None] * len(found.rows)
    rows, texts = [found.rows[i] for i in wanted], [found.texts[i] for i in wanted]
    ends, endings = [end - found.begun for end, _ in wanted.values()], [e for _, e in wanted.values()]
    for i, j in zip(wanted, join(tokenizer, rows, texts, ends, endings), strict=True):
        out[i] = j
    return out


# ---- probability ----


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
    rows = joined(parts.tokenizer, responses(parts, scored), wanted)
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
        for term in components(parts.config.reward):
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
    tokenizer, mesh, questions = parts.tokenizer, parts.mesh, encoded.questions
    size, n, width = parts.config.sample.questions, len(questions), section.max_tokens + LEAD
    bare = text.encode_questions(tokenizer, questions, parts.config.prompt, begun=False)
    encoded = dataclasses.replace(encoded, tokens=bare)
    endings = [right_answer(q, section) for q in questions]
    rows = [j._replace(ids=j.ids[:width]) for j in join(tokenizer, [[]] * n, [""] * n, [0] * n, endings)]

    def score(base: Params, policy: Params, prompts: Prompts, ending: Ending) -> Float32[Array, "Q 1"]:
        blank = jnp.zeros((size, 1, 1), jnp.int32)
        answers = ask.with_ending(prompts, blank, ending, width)
        return by_rows(ask.answer_scores(lora.join(base, policy), answers, section.score, pass_over(parts)))

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


# ---- consistency ----


@pytree
class ConsistencyRequest:
    ending: Ending
    letters: Int32[Leaf, "*rows L"]  # tokens of those that the question offers, else −1


def letter_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token of each letter right after <answer>; it may hold the end of the tag."""
    rows = tokenizer.spell([f"{END_THINK}{ANSWER}{letter}" for letter in LETTERS])
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
    rows = joined(parts.tokenizer, responses(parts, scored), wanted)
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


# ---- looks ----


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
