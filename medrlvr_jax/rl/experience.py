"""From rewards to experience: which questions are learned from, their advantages, and the step's scalars."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax.build import Parts
from medrlvr_jax.config.schema import GROUP_ESTIMATORS, AdvantageConfig, KLConfig, LossConfig, SpreadConfig
from medrlvr_jax.host.processes import gather
from medrlvr_jax.rewards.components import Component, list_components
from medrlvr_jax.rewards.verdicts import Verdicts, add_components
from medrlvr_jax.rl import advantages
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.sharding import by_rows, fetch_rows, local_rows, place_rows
from medrlvr_jax.types import Array, Assessment, Experience, Leaf, Prompts, Rollout


class Column(NamedTuple):
    """One summand of the reward."""

    weight: float
    penalty: bool = False  # `advantage.drop_equal_groups` ignores penalties


class ExperienceConfig(NamedTuple):
    """The static settings of `make_experience`."""

    advantage: AdvantageConfig
    kl: KLConfig
    loss: LossConfig
    columns: tuple[Column, ...] = (Column(1.0),)
    stop_ids: tuple[int, ...] = ()  # needed by `loss.mask_truncated` alone


class Drawn(NamedTuple):
    """Q questions with G responses to each and their rewards."""

    prompts: Prompts
    rollout: Rollout
    graded: Leaf  # float32 [Q, G, K], the host's columns
    asked: tuple[Leaf, ...] = ()  # of each component that asks the policy, its values [Q, G]
    # int32 [Q], each question's place among all that the step drew; None: there is only one batch
    places: Leaf | None = None


def split(config: AdvantageConfig) -> bool:
    """Return whether the device needs each component of the reward, and not only their sum."""
    return config.estimator == "gdpo"


def columns(components: Sequence[Component], config: AdvantageConfig) -> tuple[Column, ...]:
    """Return the columns of a step's rewards: first those that the host grades, then those of the policy.

    The host adds its components in float64: those that pay in one column, penalties in another.
    """
    host = [c for c in components if not c.on_device]
    if split(config):
        graded = [Column(c.weight, c.penalty) for c in host]
    else:
        graded = [Column(1.0), *([Column(-1.0, True)] if any(c.penalty for c in host) else [])]
    asked = [Column(c.weight, c.penalty) for c in components if c.on_device]
    return (*graded, *asked)


def host_columns(verdicts: Verdicts, components: Sequence[Component], config: AdvantageConfig) -> np.ndarray:
    """Return the columns that the host has graded, float32 [N, K]."""
    host = [c for c in components if not c.on_device]
    if split(config) and verdicts.components:
        rows = [verdicts.components[c.name] for c in host]
    else:
        rows = [verdicts.unpenalised, *([verdicts.penalty] if any(c.penalty for c in host) else [])]
    return np.stack(rows, axis=1).astype(np.float32)


def place_scored(tree: Any, scored: Scored, n: int, parts: Parts) -> Any:
    """Turn arrays [N, …] of this process's scored rows into arrays [Q, G, …] of all rows on the mesh.

    Each row is scored by one process, and the others receive its values. If two processes scored the same
    row, they could disagree, for example by a time-out in one of them. JAX does not compare the copies of an
    array, so the weights would silently differ between processes.
    """
    leaves, structure = jax.tree.flatten(tree)
    samples, (mine, _) = parts.config.sample.samples, local_rows(n, parts.mesh)
    pieces = [[scored.places, leaves]]
    if jax.process_count() > 1:
        pieces = gather([scored.places.tolist(), [leaf.tolist() for leaf in leaves]])
    out = [np.empty((n * samples, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    for places, values in pieces:
        for array, rows in zip(out, values, strict=True):
            array[places] = np.asarray(rows, array.dtype).reshape(-1, *array.shape[1:])
    out = [array.reshape(n, samples, *array.shape[1:])[mine] for array in out]
    return place_rows(jax.tree.unflatten(structure, out), n, parts.mesh)


def add_policy_values(
    scored: Scored, asked: Mapping[str, Array], components: Sequence[Component], parts: Parts
) -> Scored:
    """Return what was scored with the values [Q, G] of components that ask the policy added."""
    if not asked:
        return scored
    n = len(next(iter(asked.values())))
    _, counted = local_rows(n, parts.mesh)
    v = scored.verdicts
    values = dict(v.components) | {k: x[counted].ravel() for k, x in fetch_rows(asked, parts.mesh).items()}
    device = [c for c in components if c.on_device]
    unpenalised, penalty = add_components(v.unpenalised, v.penalty, device, values)
    ordered = {c.name: values[c.name] for c in components}
    verdicts = dataclasses.replace(v, unpenalised=unpenalised, penalty=penalty, components=ordered)
    return dataclasses.replace(scored, verdicts=verdicts)


def weigh(rewards: Array, weights: tuple[Column, ...]) -> tuple[Array, Array]:
    """Return the weighted sums of the columns [Q, G, K]: rewards [Q, G], and rewards without penalties."""
    sums: dict[bool, Array] = {}
    for k, column in enumerate(weights):
        value = rewards[..., k] if column.weight == 1.0 else column.weight * rewards[..., k]
        sums[column.penalty] = sums[column.penalty] + value if column.penalty in sums else value
    paid = sums.get(False, jnp.zeros_like(rewards[..., 0]))
    return (paid + sums[True] if True in sums else paid), paid


def total_rewards(drawn: Drawn, config: ExperienceConfig) -> tuple[Array, Array, Array, Array]:
    """Return all columns [Q, G, K], the rewards [Q, G], rewards without penalties, and which are finite.

    A reward that is not finite is replaced by the mean of the others and is not learned from (see
    rewards/user.py).
    """
    each = drawn.graded
    if drawn.asked:
        each = jnp.concatenate([each, jnp.stack(drawn.asked, axis=-1)], axis=-1)
    total, unshaped = weigh(each, config.columns)
    finite = jnp.isfinite(total)
    total = jnp.where(finite, total, jnp.where(finite, total, 0.0).sum() / jnp.maximum(finite.sum(), 1))
    return each, total, unshaped, finite


@partial(jax.jit, static_argnames=("config",))
def select(pool: tuple[Drawn, ...], *, config: ExperienceConfig) -> tuple[Drawn, Array]:
    """Return Q questions of one or two batches, first those that `learnable_responses` keeps, in the order in
    which they were drawn; and how many of the Q it keeps, int32 [].
    """
    drawn: Drawn = jax.tree.map(lambda *x: jnp.concatenate(x), *pool)
    _, total, unshaped, finite = total_rewards(drawn, config)
    usable, _ = learnable_responses(finite, total, unshaped, None, config.advantage)
    usable_questions, size = usable.any(-1), len(pool[0].graded)
    order = jnp.argsort(~usable_questions, stable=True)[:size]
    return by_rows(jax.tree.map(lambda x: x[order], drawn)), jnp.minimum(usable_questions.sum(), size)


@partial(jax.jit, static_argnames=("config",))
def make_experience(
    drawn: Drawn,
    assessment: Assessment,
    least_spread: Array | None,
    kl_coef: Array,
    *,
    config: ExperienceConfig,
) -> tuple[Experience, dict[str, Array]]:
    """Compute advantages from rewards and the assessment. Return the rows to learn from, and the step's
    scalars, over tokens or responses.
    """
    advantage, kl, loss, rollout = config.advantage, config.kl, config.loss, drawn.rollout
    each, total, unshaped, finite = total_rewards(drawn, config)
    usable, stats = learnable_responses(finite, total, unshaped, least_spread, advantage)
    learned = rollout.mask & usable[..., None]
    each = jnp.where(usable[..., None], each, 0.0)
    terms = [(column.weight, each[..., k]) for k, column in enumerate(config.columns)]
    adv, returns, compared = advantages.compute(advantage, kl, total, assessment, learned, kl_coef, terms)
    if loss.mask_truncated:
        last = rollout.tokens[..., -1]
        usable &= ~(rollout.mask[..., -1] & ~jnp.isin(last, jnp.array(config.stop_ids)))
        learned = rollout.mask & usable[..., None]
        adv = jnp.where(learned, adv, 0.0)
    sampler = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    gap = jnp.where(rollout.mask, assessment.logprobs - sampler, 0.0)
    stats |= compared | assessment_metrics(rollout.mask, assessment, gap) | {"unlearned": 1 - usable.mean()}
    if (places := drawn.places) is not None:
        samples = usable.shape[1]
        place = lambda row: places[row // samples] * samples + row % samples
        stats |= {name: place(row) for name, row in stats.items() if name.startswith("row/")}
    weights = None
    if loss.sampler_cap is not None:
        weights = jnp.minimum(advantages.ratio_of(gap), loss.sampler_cap)
    experience = Experience(
        prompts=drawn.prompts,
        tokens=rollout.tokens,
        mask=learned,
        logprobs=assessment.logprobs,
        ref_logprobs=assessment.ref_logprobs,
        advantages=adv,
        values=assessment.values,
        returns=returns,
        sampler_weights=weights,
    )
    return by_rows(experience), stats


def learnable_responses(
    finite: Array, total: Array, unshaped: Array, least_spread: Array | None, config: AdvantageConfig
) -> tuple[Array, dict[str, Array]]:
    """Return which responses are learned from, bool [Q, G], and metrics.

    The reward must be `finite`; if the estimator compares samples, those of all samples of the question. The
    questions that `drop_equal_groups` or `spread` drops are left out. total, unshaped [Q, G]: rewards, and
    rewards without penalties.
    """
    usable, dropped, stats = finite, jnp.zeros(len(finite), bool), {}
    if config.estimator in GROUP_ESTIMATORS:
        usable = jnp.broadcast_to(finite.all(-1, keepdims=True), finite.shape)
    if config.drop_equal_groups:
        _, dropped = advantages.contrast(unshaped, usable, within=True)
    if least_spread is not None:
        n = jnp.maximum(usable.sum(-1), 1)
        mean = jnp.where(usable, total, 0.0).sum(-1) / n
        spread = jnp.sqrt(jnp.where(usable, (total - mean[:, None]) ** 2, 0.0).sum(-1) / n)
        dropped |= spread < least_spread
        stats["spread"] = spread.mean()
    if config.drop_equal_groups or least_spread is not None:
        stats["dropped_groups"] = dropped.mean()
    return usable & ~dropped[:, None], stats


BEFORE = 5  # The running mean of `SpreadConfig` begins as the mean of this many steps.


def mean_spread(config: SpreadConfig | None, history: Sequence[Mapping[str, Any]], step: int) -> float:
    """Return the running mean of `spread` before step `step`, which is 1, 2, …; 0 before `config.start`.

    It depends on `history` alone, the records of earlier steps, so a resumed run continues exactly.
    """
    if config is None or step < config.start:
        return 0.0
    if step == config.start:
        first = [record["spread"] for record in history[-BEFORE:]]
        return sum(first) / len(first)
    last = history[-1]
    return config.ema * last["spread_mean"] + (1 - config.ema) * last["spread"]


def assessment_metrics(mask: Array, assessment: Assessment, gap: Array) -> dict[str, Array]:
    """Return scalars of the assessment over the tokens in the mask. `gap`: its log-probs minus the sampler's,
    [Q, G, R].
    """
    n = jnp.maximum(mask.sum(), 1)
    entropy = jnp.where(mask, assessment.entropy, 0.0)
    mean_entropy = entropy.sum(-1) / jnp.maximum(mask.sum(-1), 1)
    stats = {
        "entropy": entropy.sum() / n,
        "sampler_gap": jnp.abs(gap).max(),  # max |Δ log-prob| between sampler and trainer
        "sampler_ratio_far": (jnp.abs(jnp.exp(gap) - 1) > 0.1).sum() / n,
        # places of the responses that alarms show as examples
        "row/sampler_ratio_far_high": jnp.abs(gap).max(-1).argmax(),
        "row/entropy_high": mean_entropy.argmax(),
        "row/entropy_low": mean_entropy.argmin(),
    }
    if assessment.ref_logprobs is not None:
        to_ref = jnp.where(mask, assessment.logprobs - assessment.ref_logprobs, 0.0)
        stats["kl"] = to_ref.sum() / n
        stats["kl_response"] = to_ref.sum(-1).mean()
        stats["row/kl_high"] = to_ref.sum(-1).argmax()
    return stats


def experience_settings(parts: Parts, components: Sequence[Component] | None = None) -> ExperienceConfig:
    """Return the settings for `components` of the reward, by default those of the config."""
    c = parts.config
    components = list_components(c.reward) if components is None else components
    stop_ids = tuple(parts.tokenizer.stop_ids) if c.loss.mask_truncated else ()
    return ExperienceConfig(c.advantage, c.kl, c.loss, columns(components, c.advantage), stop_ids)
