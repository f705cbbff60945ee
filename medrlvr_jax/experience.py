"""From questions to experience: the only place where host and device alternate.

encode → generate → (assess on the device ‖ decode and score on the host) → experience. Evaluation is the first half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax import advantages, model, text
from medrlvr_jax.build import Parts
from medrlvr_jax.config import Config, SampleConfig
from medrlvr_jax.data import LETTERS, Question
from medrlvr_jax.model import DecoderConfig
from medrlvr_jax.rewards import Verdicts, score
from medrlvr_jax.sample import generate
from medrlvr_jax.sharding import by_rows, place_rows, to_host
from medrlvr_jax.types import Array, Assessment, Experience, Params, Prompts, Rollout

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

    @property
    def width(self) -> int:
        return width(max(map(len, self.tokens)))

    def prompts(self, index: Sequence[int] | np.ndarray, pad_id: int) -> Prompts:
        return text.pad_prompts([self.tokens[i] for i in index], self.ids[np.asarray(index)], self.width, pad_id)


@dataclass(frozen=True)
class Scored:
    """What the host knows of a rollout; flat rows, question by question."""

    completions: list[str]  # [Q·G]
    verdicts: Verdicts  # of the same rows
    lengths: np.ndarray  # int [Q·G], tokens up to and including the stop token
    stopped: np.ndarray  # bool [Q·G], False where the budget cut the response

    def record(self, row: int, question: Question) -> dict[str, Any]:
        """One completion of `question` as a JSON object: what samples.jsonl and an evaluation's answers both say of it."""
        v = self.verdicts
        return {
            "id": question.id,
            "completion": self.completions[row],
            "key": LETTERS[question.answer],
            "answer": str(v.answer[row]) or None,
            "reward": float(v.reward[row]),
            "format_ok": bool(v.format_ok[row]),
            "correct": bool(v.correct[row]),
            "reason": str(v.reason[row]),
            "length": int(self.lengths[row]),
            "stopped": bool(self.stopped[row]),
        }


def encode(tokenizer: text.Tokenizer, questions: list[Question], config: Config) -> Encoded:
    tokens, dropped = text.encode_prompts(tokenizer, questions, config.prompt)
    gone = set(dropped)
    kept = [i for i in range(len(questions)) if i not in gone]
    return Encoded([questions[i] for i in kept], tokens, np.array(kept, np.uint32), len(dropped))


def score_rollout(tokenizer: text.Tokenizer, questions: list[Question], rollout: Rollout, config: Config) -> Scored:
    """Host work: bring the tokens over, decode, score. `questions` are those of the rollout's rows."""
    tokens, mask = to_host((rollout.tokens, rollout.mask))
    groups, length = tokens.shape[1:]
    flat, flat_mask = tokens.reshape(-1, length), mask.reshape(-1, length)
    completions = text.decode(tokenizer, flat, flat_mask)
    lengths = flat_mask.sum(1)
    last = flat[np.arange(len(flat)), np.maximum(lengths - 1, 0)]
    keys = [LETTERS[q.answer] for q in questions for _ in range(groups)]
    options = [q.options for q in questions for _ in range(groups)]
    return Scored(completions, score(completions, keys, options, config.reward), lengths, np.isin(last, tokenizer.stop_ids))


def sample_and_score(decode_params: Params, parts: Parts, encoded: Encoded, index: np.ndarray, key: Array, sample: SampleConfig) -> Scored:
    """Evaluation's whole job."""
    prompts = place_rows(encoded.prompts(index, parts.tokenizer.pad_id), parts.mesh)
    rollout = generate(decode_params, parts.cfg, prompts, key, sample, parts.tokenizer.stop_ids, parts.tokenizer.pad_id)
    return score_rollout(parts.tokenizer, [encoded.questions[i] for i in index], rollout, parts.config)


@partial(jax.jit, static_argnames=("cfg", "critic_cfg", "temperature", "slab"))
def assess(
    policy: Params,
    reference: Params | None,
    critic: Params | None,
    prompts: Prompts,
    tokens: Array,
    *,
    cfg: DecoderConfig,
    critic_cfg: DecoderConfig,
    temperature: float,
    slab: int,
) -> Assessment:
    """What the trainer itself says of the rollout before learning: log-probs, the reference's, and values."""

    def logprobs(params):
        hidden = model.hidden_states(params, cfg, prompts.tokens, prompts.mask, tokens)
        return model.token_logprobs(params, cfg, hidden, tokens, temperature, slab)

    with jax.named_scope("assess_policy"):
        own, entropy = logprobs(policy)
    with jax.named_scope("assess_reference"):
        ref = None if reference is None else logprobs(reference)[0]
    with jax.named_scope("assess_critic"):
        values = None
        if critic is not None:
            hidden = model.hidden_states(critic, critic_cfg, prompts.tokens, prompts.mask, tokens)
            values = model.values(critic, critic_cfg, hidden)
    return by_rows(Assessment(own, entropy, ref, values))


@partial(jax.jit, static_argnames=("config",))
def make_experience(
    prompts: Prompts, rollout: Rollout, assessment: Assessment, rewards: Array, kl_coef: Array, *, config: tuple
) -> tuple[Experience, dict[str, Array]]:
    """Rewards [Q, G] meet the assessment; `config` is (AdvantageConfig, KLConfig). Also the step's scalars, over tokens or responses."""
    advantage, kl = config
    mask, n = rollout.mask, jnp.maximum(rollout.mask.sum(), 1)
    a = assessment
    adv, returns, stats = advantages.compute(advantage, kl, rewards, a.logprobs, a.ref_logprobs, a.values, mask, kl_coef)
    sampler = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    gap = jnp.where(mask, a.logprobs - sampler, 0.0)
    stats |= {
        "entropy": jnp.where(mask, a.entropy, 0.0).sum() / n,
        "sampler_gap": jnp.abs(gap).max(),  # max |Δ log-prob| between sampler and trainer
        "sampler_ratio_far": (jnp.abs(jnp.exp(gap) - 1) > 0.1).sum() / n,
    }
    if a.ref_logprobs is not None:
        to_ref = jnp.where(mask, a.logprobs - a.ref_logprobs, 0.0)
        stats["kl"] = to_ref.sum() / n
        stats["kl_response"] = to_ref.sum(-1).mean()
    experience = Experience(
        prompts=prompts.tokens,
        prompt_mask=prompts.mask,
        tokens=rollout.tokens,
        mask=mask,
        logprobs=a.logprobs,
        ref_logprobs=a.ref_logprobs,
        advantages=adv,
        values=a.values,
        returns=returns,
    )
    return by_rows(experience), stats


def assess_settings(parts: Parts) -> dict[str, Any]:
    """The static arguments of `assess`."""
    c = parts.config
    return {"cfg": parts.cfg, "critic_cfg": parts.critic_cfg, "temperature": c.sample.temperature, "slab": c.model.logit_slab}


def collect(
    relay: Callable[[Params], Params],
    policy: Params,
    reference: Params | None,
    critic: Params | None,
    parts: Parts,
    encoded: Encoded,
    index: np.ndarray,
    key: Array,
    kl_coef: Array,
) -> tuple[Experience, dict[str, Array], Scored]:
    """One step's rollout of the questions at `index`, made into experience. Assessing runs while the host scores.

    The sampler's copy of the policy (`relay`, see build.py) lives no longer than `generate`.
    """
    config, tokenizer, mesh, sample = parts.config, parts.tokenizer, parts.mesh, parts.config.sample
    prompts = place_rows(encoded.prompts(index, tokenizer.pad_id), mesh)
    rollout = generate(relay(policy), parts.cfg, prompts, key, sample, tokenizer.stop_ids, tokenizer.pad_id)
    assessment = assess(policy, reference, critic, prompts, rollout.tokens, **assess_settings(parts))
    scored = score_rollout(tokenizer, [encoded.questions[i] for i in index], rollout, config)
    rewards = place_rows(scored.verdicts.reward.reshape(len(index), sample.samples), mesh)
    experience, stats = make_experience(prompts, rollout, assessment, rewards, kl_coef, config=(config.advantage, config.kl))
    return experience, stats, scored
