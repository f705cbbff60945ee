"""Med-RLVR (arXiv 2502.19655): reinforcement learning from verifiable rewards, by PPO, GRPO or a relative.

    for each step:
        sample G responses to each of Q questions            generate.generate
        log-probs by policy and reference, values by critic  assess.assess
        r ∈ {−1, 0, +1} by the rule                          rewards.grade
        advantages from rewards, KL, and values if any       advantages.compute
        policy ← clipped surrogate, epochs × minibatches     learn.learn
        critic ← clipped squared error, the same way         learn.learn

The config decides which of them it is: PPO has a critic, the others compare samples. Departures from the
paper, as far as it is known:
1. Its rates, β, batch size and lengths are not published. The presets use OpenRLHF's usual ones.
2. Minibatches are shuffled by question. The samples of a question stay together, because they share the
   computation of their prompt.
3. The critic starts as the policy's body with a value head of zeros. As in OpenRLHF, it reads the state
   before each token.
4. With `sample.max_batches`, a step draws further batches until Q questions have samples with different
   rewards, and leaves the other questions out (DAPO's dynamic sampling, arXiv 2503.14476).
5. The reward's mode is `strict` by default. The mode `paper` has the loopholes that the paper reports as
   hacks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax import sharding
from medrlvr_jax.build import Parts
from medrlvr_jax.data.batches import first_batch, run_batch
from medrlvr_jax.model import lora
from medrlvr_jax.model_rewards.policy import needs_grey_images
from medrlvr_jax.rewards.components import Component
from medrlvr_jax.rl.experience import (
    Drawn,
    ExperienceConfig,
    add_policy_values,
    experience_settings,
    host_columns,
    mean_spread,
    place_scored,
)
from medrlvr_jax.rl.learn import adapt_kl
from medrlvr_jax.rl.programs import Programs
from medrlvr_jax.rollout.assess import assess_settings
from medrlvr_jax.rollout.generate import draw_settings
from medrlvr_jax.rollout.rollout import Encoded, Scored, join_scored, place_prompts, reorder, score_rollout
from medrlvr_jax.types import Array, Assessment, Experience, Frozen, Leaf, Prompts, Rollout, TrainState

# of a batch: what the host scored (Scored), and the policy's answers [Q, G] by component
Result = tuple[Any, dict[str, Array]]


@dataclass(frozen=True)
class Training:
    """What all steps of a training read and none changes."""

    parts: Parts
    programs: Programs
    frozen: Frozen
    components: tuple[Component, ...]  # of the reward


def batch_key(seed: int, number: int) -> Array:
    """Return the key of the sampling noise of batch `number`: so a resumed run draws the same samples."""
    return jax.random.fold_in(jax.random.key(seed), number)


def shuffle_key(seed: int, step: int) -> Array:
    """Return the key by which a step shuffles rows and rounds weights. The sampling noise folds the numbers
    of questions into its key, and 2³¹ is larger than all of them, so the two never coincide.
    """
    return jax.random.fold_in(batch_key(seed, step), 2**31)


class Batch(NamedTuple):
    """Q questions to which responses are drawn."""

    prompts: Prompts
    key: Leaf  # of the sampling noise
    grade: Callable[[Rollout], "Graded"]  # the host's part
    places: Leaf | None = None  # see `Drawn`


class Graded(NamedTuple):
    """What the host computes from a rollout."""

    rewards: Leaf  # float32 [Q, G, K], the columns of `experience.host_columns`
    requests: dict[str, Any]  # by component: what the policy is asked, arrays [Q, G, …]
    scored: Any  # Scored, of this process's rows


def train_step(
    training: Training,
    encoded: Encoded,
    state: TrainState,
    step: int,
    history: Sequence[dict[str, Any]] = (),
) -> tuple[TrainState, dict[str, Any], Scored, Experience]:
    """Take the 0-based step `step` of the method above.

    Returns the new state, scalars on the device, what the host scored, and the rows that were learned from.
    `history`: the records of the steps before, which `advantage.spread` and `sample.max_batches` need.
    """
    parts, config = training.parts, training.parts.config
    if step < config.learn.critic_warmup:
        critic_alone = dataclasses.replace(training.programs, learn_policy=None)
        training = dataclasses.replace(training, programs=critic_alone)
    policy = lora.join(training.frozen.base, state.policy.params)
    first, max_batches = first_batch(history, step), config.sample.max_batches

    def batch_of(k: int) -> Batch:
        """Return the k-th batch of this step."""
        of_epoch, index = questions_of(parts, encoded, first + k)
        prompts = place_prompts(policy, parts, of_epoch, index, needs_grey_images(config.reward))
        key, places = batch_key(config.seed, first + k), None
        if max_batches > 1:
            mine, _ = sharding.local_rows(len(index), parts.mesh)
            numbers = (k * len(index) + mine).astype(np.int32)
            places = sharding.place_rows(numbers, len(index), parts.mesh)
        return Batch(prompts, key, partial(grade, training, of_epoch, index, coin=key), places)

    spread, shuffle = config.advantage.spread, shuffle_key(config.seed, step)
    mean = mean_spread(spread, history, step + 1)
    least = spread and jax.device_put(jnp.float32(spread.beta * mean), sharding.replicated(parts.mesh))
    after, stats, batches, experience = five_parts(training, state, batch_of, max_batches, shuffle, least)
    responses = config.sample.questions * config.sample.samples
    scored = [add_policy_values(part, asked, training.components, parts) for part, asked in batches]
    scored = join_scored(scored, responses)
    if (target := config.kl.target) is not None:
        coef = adapt_kl(state.kl_coef, stats["kl_response"], responses, target, config.kl.horizon)
        after = dataclasses.replace(after, kl_coef=coef)
    stats |= {"kl_coef": state.kl_coef} | ({"spread_mean": mean} if mean else {})
    if max_batches > 1:
        stats |= {"batches": len(batches), "next_batch": first + len(batches)}
    return after, stats, scored, experience


def questions_of(parts: Parts, encoded: Encoded, number: int) -> tuple[Encoded, np.ndarray]:
    """Return `encoded` and the places in it of the questions of batch `number`, whose options are in their
    epoch's order where `data.shuffle_options` is set.
    """
    n = len(encoded.questions)
    index = run_batch(parts.config, n, number)
    if not encoded.shuffle:
        return encoded, index
    return reorder(parts, encoded, index, draw=number // (n // len(index))), index


def five_parts(
    training: Training,
    state: TrainState,
    batch_of: Callable[[int], Batch],
    max_batches: int,
    shuffle: Leaf,
    least_spread: Leaf | None,
) -> tuple[TrainState, dict[str, Any], list[Result], Experience]:
    """Draw, grade, assess, compute advantages, learn. Return also the result of each batch.

    `step_programs` calls this with shapes in place of arrays, so only programs of `training` compute here.
    """
    settings = experience_settings(training.parts, training.components)
    if max_batches == 1:
        batch = batch_of(0)
        rollout = draw(training, state, batch.prompts, batch.key)
        # dispatched, not awaited: the device assesses while the host grades
        assessment = assess(training, state, batch.prompts, rollout)
        drawn, result = grade_drawn(training, state, batch, rollout)
        results = [result]
    else:
        drawn, results = draw_until_full(training, state, batch_of, max_batches, settings)
        assessment = assess(training, state, drawn.prompts, drawn.rollout)
    experience, stats = training.programs.make_experience(
        drawn, assessment, least_spread, state.kl_coef, config=settings
    )
    state, learned = learn(training, state, experience, shuffle)
    return state, stats | learned, results, experience


def draw_until_full(
    training: Training,
    state: TrainState,
    batch_of: Callable[[int], Batch],
    max_batches: int,
    settings: ExperienceConfig,
) -> tuple[Drawn, list[Result]]:
    """Draw at most `max_batches` batches until `drop_equal_groups` keeps Q questions of them: dynamic
    sampling (DAPO, arXiv 2503.14476, section 3.2).

    Returns Q questions, others among them only if too few are kept, and the result of each batch.
    """
    pool, results, questions = (), [], training.parts.config.sample.questions
    while True:
        batch = batch_of(len(results))
        rollout = draw(training, state, batch.prompts, batch.key)
        drawn, result = grade_drawn(training, state, batch, rollout)
        results.append(result)
        drawn, usable = training.programs.select((*pool, drawn), config=settings)
        if int(sharding.to_host(usable)) == questions or len(results) == max_batches:
            return drawn, results
        pool = (drawn,)


def grade_drawn(
    training: Training, state: TrainState, batch: Batch, rollout: Rollout
) -> tuple[Drawn, Result]:
    """Grade a batch's responses on the host, then ask the policy what components ask of it."""
    graded = batch.grade(rollout)
    asked = ask(training, state, batch.prompts, rollout, graded.requests)
    drawn = Drawn(batch.prompts, rollout, graded.rewards, tuple(asked.values()), batch.places)
    return drawn, (graded.scored, asked)


def grade(training: Training, encoded: Encoded, index: np.ndarray, rollout: Rollout, coin: Array) -> Graded:
    """Decode and score the responses to the questions at `index`, and prepare what the policy is asked."""
    parts, n = training.parts, len(index)
    with jax.profiler.TraceAnnotation("score"):
        scored = score_rollout(parts, encoded, index, rollout, coin, training.components)
        graded = host_columns(scored.verdicts, training.components, parts.config.advantage)
        asked = training.programs.policy_rewards
        requests = {name: reward.make_request(scored) for name, reward in asked.items()}
    rewards, requests = place_scored((graded, requests), scored, n, parts)
    return Graded(rewards, requests, scored)


def ask(
    training: Training, state: TrainState, prompts: Prompts, rollout: Rollout, requests: dict[str, Any]
) -> dict[str, Array]:
    """Return what the policy answers, [Q, G] for each component, in the order of `experience.columns`.

    The programs are dispatched and not awaited. `requests` may have another order: JAX sorts a dict's keys.
    """
    base, policy = training.frozen.base, state.policy.params
    return {
        name: reward.program(base, policy, prompts, rollout, requests[name])
        for name, reward in training.programs.policy_rewards.items()
    }


def draw(training: Training, state: TrainState, prompts: Prompts, key: Array) -> Rollout:
    """Draw responses by the policy. Its copy for the sampler (`sync.WeightSync`) is freed after this call."""
    parts, programs = training.parts, training.programs
    params = programs.sync_weights(lora.join(training.frozen.base, state.policy.params))
    settings = draw_settings(parts, parts.sampler_cfg, parts.config.sample)
    return programs.generate(params, prompts, key, settings)


def assess(training: Training, state: TrainState, prompts: Prompts, rollout: Rollout) -> Assessment:
    """Compute log-probs by policy and reference, and the critic's values. What `learn.offload` keeps in the
    host's memory is on the device for this call alone.
    """
    parts, frozen = training.parts, training.frozen
    if parts.config.learn.offload:
        frozen = sharding.to_memory(frozen, "device")
    critic = state.critic and state.critic.params
    settings = assess_settings(parts)
    return training.programs.assess(frozen, state.policy.params, critic, prompts, rollout, settings)


def learn(
    training: Training, state: TrainState, experience: Experience, key: Array
) -> tuple[TrainState, dict[str, Any]]:
    """Update policy and critic by their epochs over the rows. A learner without a program is unchanged."""
    programs, base = training.programs, training.frozen.base
    policy, critic, metrics = state.policy, state.critic, {}
    if programs.learn_policy:
        policy, metrics["policy"] = programs.learn_policy(policy, base, experience, key, state.kl_coef)
    if programs.learn_critic:
        critic, metrics["critic"] = programs.learn_critic(critic, base, experience, key, None)
    return TrainState(policy, critic, state.kl_coef), metrics
