"""From questions to experience: the only place where host and device alternate.

encode → generate → (assess on the device ‖ decode and score on the host) → experience. Evaluation is the first half.
Of a batch, a process encodes the rows that its devices hold. A row that several processes hold is decoded and scored by one of them,
which tells the others its reward.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax.build import Parts
from medrlvr_jax.config.schema import COMPARING, Config, SampleConfig
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.formats import LETTERS, Question
from medrlvr_jax.data.load import fingerprint, repeats
from medrlvr_jax.data.options import shuffled
from medrlvr_jax.host.processes import agree, gather
from medrlvr_jax.model import lora, scoring
from medrlvr_jax.model.decoder import DecoderConfig
from medrlvr_jax.rewards import stages
from medrlvr_jax.rewards.rule import Verdicts, judged_beginning, score, toss
from medrlvr_jax.rewards.user import Judge
from medrlvr_jax.rl import advantages
from medrlvr_jax.rollout.generate import generate
from medrlvr_jax.sharding import by_rows, fetch_rows, join_rows, own_rows, place_rows, split_rows, to_memory
from medrlvr_jax.types import Array, Assessment, Experience, Frozen, Params, Prompts, Rollout

WIDTH_STEP = 16  # widths are multiples of this, so that few shapes are compiled


def width(longest: int) -> int:
    return -(-longest // WIDTH_STEP) * WIDTH_STEP


@dataclass(frozen=True)
class Encoded:
    """A set of questions with their prompts' tokens; `ids` are places in the file, whatever was dropped."""

    questions: list[Question]
    tokens: list[list[int]]
    ids: np.ndarray  # uint32
    dropped: int
    width: int  # columns of a batch of prompts, whichever questions it holds and in whatever order their options stand
    shuffle: bool = False  # whether its options are to be shuffled: see `reorder`
    repeats: dict[str, str] = dataclasses.field(default_factory=dict)  # see `data.repeats`
    told: str = ""  # how the set was read, for the console: see `data.read`

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, whatever the options' order."""
        return self.width if self.shuffle else max(map(len, self.tokens), default=0)

    def prompts(self, index: Sequence[int] | np.ndarray, pad_id: int) -> Prompts:
        return text.pad_prompts([self.tokens[i] for i in index], self.ids[np.asarray(index)], self.width, pad_id)


@dataclass(frozen=True)
class Scored:
    """What this process scored of a rollout: N flat rows, question by question. No other process scored any of them."""

    questions: list[Question]  # [N]
    places: np.ndarray  # int [N], each row's place among the Q·G of the whole batch
    completions: list[str]  # [N]
    verdicts: Verdicts  # of the same rows
    lengths: np.ndarray  # int [N], tokens up to and including the stop token
    stopped: np.ndarray  # bool [N], False where the budget cut the response
    stages: list[str | None]  # [N], which of the paper's six stages each completion shows; None under `direct`, which asks for no thought
    failed: dict[int, str]  # rows on which the user's own reward failed, and why; their reward is NaN
    entropy: np.ndarray | None = None  # float [N], the policy's, in nats, mean over the response's tokens; None where it was not taken

    def record(self, row: int) -> dict[str, Any]:
        """One completion as a JSON object: what samples.jsonl and an evaluation's answers both say of it."""
        v, question = self.verdicts, self.questions[row]
        failed = {"reward_error": self.failed[row]} if row in self.failed else {}
        return {
            "id": question.id,
            "completion": self.completions[row],
            "key": LETTERS[question.answer],
            "options": len(question.options),
            "answer": str(v.answer[row]) or None,
            "reward": None if failed else float(v.reward[row]),
            "format_ok": bool(v.format_ok[row]),
            "correct": bool(v.correct[row]),
            "reason": str(v.reason[row]),
            "stage": self.stages[row],
            "length": int(self.lengths[row]),
            "stopped": bool(self.stopped[row]),
            **({"order": question.order} if question.order else {}),
            **({} if self.entropy is None else {"entropy": round(float(self.entropy[row]), 6)}),
        } | failed


def encode(tokenizer: text.Tokenizer, questions: list[Question], config: Config, shuffle: bool = False) -> Encoded:
    tokens, dropped = text.encode_prompts(tokenizer, questions, config.prompt)
    gone = set(dropped)
    kept = [i for i in range(len(questions)) if i not in gone]
    left, columns = [questions[i] for i in kept], width(max(map(len, tokens), default=0))
    agree(lambda: {"questions": fingerprint(left), "tokens of their prompts": fingerprint(tokens)})
    return Encoded(left, tokens, np.array(kept, np.uint32), len(dropped), columns, shuffle, repeats(left))


def reorder(parts: Parts, encoded: Encoded, index: np.ndarray, draw: int) -> Encoded:
    """`encoded` with other orders of options in the questions at `index`, as far as this process holds them. `draw`: epoch or sample.

    An order whose prompt has more tokens than fit is not taken: the question then stands as in its file.
    """
    own = index[own_rows(len(index), parts.mesh)[0]].tolist()
    wanted = [shuffled(encoded.questions[i], parts.config.seed, draw) for i in own]
    rows, limit = text.encode_questions(parts.tokenizer, wanted, parts.config.prompt), min(encoded.width, parts.config.prompt.max_tokens)
    questions, tokens = list(encoded.questions), list(encoded.tokens)
    for i, question, row in zip(own, wanted, rows, strict=True):
        if len(row) <= limit:
            questions[i], tokens[i] = question, row
        else:
            questions[i] = dataclasses.replace(questions[i], order=LETTERS[: len(question.options)])
    return dataclasses.replace(encoded, questions=questions, tokens=tokens)


def score_rollout(
    parts: Parts, encoded: Encoded, index: np.ndarray, rollout: Rollout, coin: Array | None = None, judge: Judge | None = None
) -> Scored:
    """Host work: bring this process's tokens over, decode, score. `index` names the questions of the whole rollout.

    Training alone pays by other things than the rule: by `judge`, the user's own rewards, or by `coin`, its key for the control
    `reward.random`. Evaluation has neither.
    """
    tokenizer = parts.tokenizer
    own, counted = own_rows(len(index), parts.mesh)
    own = own[counted]
    tokens, mask = (x[counted] for x in fetch_rows((rollout.tokens, rollout.mask), parts.mesh))
    groups, length = tokens.shape[1:]
    flat, flat_mask = tokens.reshape(-1, length), mask.reshape(-1, length)
    begun = judged_beginning(text.begins(tokenizer, parts.config.prompt), parts.config.reward.mode)
    completions = [begun + c for c in text.decode(tokenizer, flat, flat_mask)]
    lengths = flat_mask.sum(1)
    last = flat[np.arange(len(flat)), np.maximum(lengths - 1, 0)]
    questions = [encoded.questions[i] for i in index[own] for _ in range(groups)]
    keys, options, rule = [LETTERS[q.answer] for q in questions], [q.options for q in questions], parts.config.reward
    verdicts = score(completions, keys, options, rule)
    shown: list[str | None] = [None] * len(completions)
    if rule.mode != "direct":
        lenient = verdicts if rule.mode == "paper" else score(completions, keys, options, dataclasses.replace(rule, mode="paper"))
        shown = [stages.stage(*row) for row in zip(completions, lenient.format_ok.tolist(), options, strict=True)]
    failed: dict[int, str] = {}
    if judge is not None:
        values, failed = judge.score(list(zip(completions, keys, options, (q.question for q in questions), strict=True)))
        verdicts = dataclasses.replace(verdicts, reward=np.array(values, np.float32))
    elif rule.random is not None and coin is not None:
        paid = toss(np.asarray(jax.random.key_data(coin)), encoded.ids[index[own]], groups, rule)
        verdicts = dataclasses.replace(verdicts, reward=paid.ravel())
    places = (own[:, None] * groups + np.arange(groups)).ravel()
    stopped = np.isin(last, tokenizer.stop_ids)
    return Scored(questions, places, completions, verdicts, lengths, stopped, shown, failed)


def rewards_of_all(scored: Scored, n: int, parts: Parts) -> np.ndarray:
    """float32 [own, G]: the reward of each row that this process holds of n questions, from the process that scored it.

    Two processes that score one row may disagree (a judge, a clock, a time-out in one of them). JAX never compares the copies of an
    array, so the weights would then differ from process to process, and nothing would say so.
    """
    samples = parts.config.sample.samples
    rewards = np.empty(n * samples, np.float32)
    for places, values in gather([scored.places.tolist(), scored.verdicts.reward.tolist()]):
        rewards[places] = values
    return rewards.reshape(n, samples)[own_rows(n, parts.mesh)[0]]


def place_prompts(parts: Parts, encoded: Encoded, index: np.ndarray) -> Prompts:
    """The prompts of the questions at `index` on the mesh; each process pads and places its own."""
    own, _ = own_rows(len(index), parts.mesh)
    return place_rows(encoded.prompts(index[own], parts.tokenizer.pad_id), len(index), parts.mesh)


def draw(
    decode_params: Params, cfg: DecoderConfig, parts: Parts, prompts: Prompts, key: Array, sample: SampleConfig, entropies: bool = False
) -> Rollout:
    """Responses to `prompts` by a sampler `cfg`."""
    tokenizer = parts.tokenizer
    return generate(decode_params, cfg, prompts, key, sample, tokenizer.stop_ids, tokenizer.pad_id, entropies=entropies)


def sample_and_score(
    decode_params: Params, parts: Parts, encoded: Encoded, index: np.ndarray, key: Array, sample: SampleConfig, entropies: bool = False
) -> Scored:
    """Evaluation's whole job. With `entropies`, also the mean entropy of each response."""
    rollout = draw(decode_params, parts.cfg, parts, place_prompts(parts, encoded, index), key, sample, entropies)
    scored = score_rollout(parts, encoded, index, rollout)
    if not entropies:
        return scored
    _, counted = own_rows(len(index), parts.mesh)
    flat = (-1, rollout.tokens.shape[-1])
    entropy, mask = (x[counted].reshape(flat) for x in fetch_rows((rollout.entropy, rollout.mask), parts.mesh))
    return dataclasses.replace(scored, entropy=entropy.sum(1) / np.maximum(mask.sum(1), 1))


def assess_alone(policy: Params, parts: Parts, prompts: Prompts, rollout: Rollout) -> Assessment:
    """What the policy, whole, says of responses that are there, by the training's own pass; no reference and no critic."""
    learn, rows = parts.config.learn, len(rollout.tokens)
    settings = {"cfg": parts.cfg, "critic_cfg": parts.critic_cfg, "temperature": 1.0, "slab": parts.config.model.logit_slab}
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

    `policy` and `critic` are what is trained of them; the reference is computed without adapters. `micro` questions
    at a time, each at the least of `sizes` that holds them (`scoring.at_row_size`).
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

    rows = scoring.Rows(prompts.tokens, prompts.mask, rollout.tokens, rollout.mask)
    if micro == len(rows.tokens):
        return by_rows(part(rows))
    return by_rows(join_rows(jax.lax.map(part, split_rows(rows, micro))))


@partial(jax.jit, static_argnames=("config",))
def make_experience(
    prompts: Prompts, rollout: Rollout, assessment: Assessment, rewards: Array, kl_coef: Array, *, config: tuple
) -> tuple[Experience, dict[str, Array]]:
    """Rewards [Q, G] meet the assessment; `config` is (AdvantageConfig, KLConfig, LossConfig). Also the step's scalars, over tokens or
    responses. Responses whose reward is not finite are left out of what is learned from: see user.py."""
    advantage, kl, loss = config
    mask, n = rollout.mask, jnp.maximum(rollout.mask.sum(), 1)
    a = assessment
    kept = jnp.isfinite(rewards)
    rewards = jnp.where(kept, rewards, jnp.where(kept, rewards, 0.0).sum() / jnp.maximum(kept.sum(), 1))
    if advantage.estimator in COMPARING:
        kept = jnp.broadcast_to(kept.all(-1, keepdims=True), kept.shape)
    learned = mask & kept[..., None]
    adv, returns, stats = advantages.compute(advantage, kl, rewards, a.logprobs, a.ref_logprobs, a.values, learned, kl_coef)
    sampler = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    gap = jnp.where(mask, a.logprobs - sampler, 0.0)
    stats |= {
        "entropy": jnp.where(mask, a.entropy, 0.0).sum() / n,
        "sampler_gap": jnp.abs(gap).max(),  # max |Δ log-prob| between sampler and trainer
        "sampler_ratio_far": (jnp.abs(jnp.exp(gap) - 1) > 0.1).sum() / n,
        "unlearned": 1 - kept.mean(),
    }
    mean_entropy = jnp.where(mask, a.entropy, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
    stats |= {  # places in the batch of the responses that the monitors name
        "row/sampler_ratio_far_high": jnp.abs(gap).max(-1).argmax(),
        "row/entropy_high": mean_entropy.argmax(),
        "row/entropy_low": mean_entropy.argmin(),
    }
    if a.ref_logprobs is not None:
        to_ref = jnp.where(mask, a.logprobs - a.ref_logprobs, 0.0)
        stats["kl"] = to_ref.sum() / n
        stats["kl_response"] = to_ref.sum(-1).mean()
        stats["row/kl_high"] = to_ref.sum(-1).argmax()
    experience = Experience(
        prompts=prompts.tokens,
        prompt_mask=prompts.mask,
        tokens=rollout.tokens,
        mask=learned,
        logprobs=a.logprobs,
        ref_logprobs=a.ref_logprobs,
        advantages=adv,
        values=a.values,
        returns=returns,
        sampler_weights=None if loss.sampler_cap is None else jnp.minimum(advantages.ratio_of(gap), loss.sampler_cap),
    )
    return by_rows(experience), stats


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


def experience_settings(parts: Parts) -> dict[str, Any]:
    """The static arguments of `make_experience`."""
    return {"config": (parts.config.advantage, parts.config.kl, parts.config.loss)}


def collect(
    relay: Callable[[Params], Params],
    frozen: Frozen,
    policy: Params,
    critic: Params | None,
    parts: Parts,
    encoded: Encoded,
    index: np.ndarray,
    key: Array,
    kl_coef: Array,
    judge: Judge | None = None,
) -> tuple[Experience, dict[str, Array], Scored]:
    """One step's rollout of the questions at `index`, made into experience. Assessing runs while the host scores.

    The sampler's copy of the policy (`relay`, see build.py) lives no longer than `generate`.
    """
    sample, prompts = parts.config.sample, place_prompts(parts, encoded, index)
    rollout = draw(relay(lora.join(frozen.base, policy)), parts.sampler_cfg, parts, prompts, key, sample)
    here = to_memory(frozen, "device") if parts.config.learn.offload else frozen
    assessment = assess(here, policy, critic, prompts, rollout, **assess_settings(parts))
    with jax.profiler.TraceAnnotation("score"):
        scored = score_rollout(parts, encoded, index, rollout, coin=key, judge=judge)
    rewards = place_rows(rewards_of_all(scored, len(index), parts), len(index), parts.mesh)
    kinds = experience_settings(parts)
    experience, stats = make_experience(prompts, rollout, assessment, rewards, kl_coef, **kinds)
    return experience, stats, scored
