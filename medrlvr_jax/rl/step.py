"""Med-RLVR (arXiv 2502.19655): reinforcement learning from verifiable rewards, PPO or GRPO by what the config
holds.

    for each step:
        sample G responses to each of Q questions            generate.generate
        log-probs by policy and reference, values by critic  assess.assess
        r ∈ {−1, 0, +1} by the rule                          rewards.grade
        advantages from rewards, KL, and values if any       advantages.compute
        policy ← clipped surrogate, epochs × minibatches     learn.learn
        critic ← clipped squared error, the same way         learn.learn

Departures from the paper as it is known, in one place:
1. Its rates, β, batch and lengths are not published: the presets take OpenRLHF's usual ones.
2. Minibatches are shuffled by question: the samples of one question stay together, for they share their
   prompt's computation.
3. The critic starts as the policy's body with a value head of zeros; it sees the state before each token, as
   OpenRLHF's.
4. The reward rule is `strict` unless the config says `paper`; `paper` has the loopholes that the paper
   reports as hacks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax import build, sharding
from medrlvr_jax.build import Parts
from medrlvr_jax.data.batches import step_batch
from medrlvr_jax.model import lora
from medrlvr_jax.model.spec import VISION
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.model_rewards.policy import asks_blank
from medrlvr_jax.rewards.components import Component, list_components
from medrlvr_jax.rl.experience import (
    Rewards,
    columns,
    experience_settings,
    host_columns,
    mean_spread,
    place_scored,
    with_asked,
)
from medrlvr_jax.rl.learn import adapt_kl
from medrlvr_jax.rl.programs import Programs
from medrlvr_jax.rollout.assess import assess_settings
from medrlvr_jax.rollout.generate import draw_settings
from medrlvr_jax.rollout.program import Program, Recorder, a_key, abstract_prompts, array
from medrlvr_jax.rollout.rollout import Encoded, Scored, place_prompts, score_rollout
from medrlvr_jax.rollout.see import see_program
from medrlvr_jax.types import Array, Experience, Frozen, Leaf, Learner, Prompts, Rollout, TrainState


@dataclass(frozen=True)
class Training:
    """What the steps of a training read and never change."""

    parts: Parts
    programs: Programs
    frozen: Frozen
    components: tuple[Component, ...]  # of the reward


class Keys(NamedTuple):
    """The randomness of a step: functions of (seed, step), so that a resumed run is the same run."""

    sample: Leaf
    shuffle: Leaf  # of the rows, and of rounding


def step_keys(seed: int, step: int) -> Keys:
    key = jax.random.fold_in(jax.random.key(seed), step)
    # beyond every question's number: the two never share a key
    return Keys(key, jax.random.fold_in(key, 2**31))


def train_step(
    training: Training,
    encoded: Encoded,
    state: TrainState,
    step: int,
    history: Sequence[dict[str, Any]] = (),
) -> tuple[TrainState, dict[str, Any], Scored, Experience]:
    """Step `step` of the method above: the new state, scalars on the device, what the host scored, the rows
    learned from. `history`: records of the steps before, which `advantage.spread` needs.
    """
    parts, config = training.parts, training.parts.config
    index, keys = step_batch(config, len(encoded.questions), step), step_keys(config.seed, step)
    if step < config.learn.critic_warmup:
        waiting = dataclasses.replace(training.programs, learn_policy=None)
        training = dataclasses.replace(training, programs=waiting)
    policy = lora.join(training.frozen.base, state.policy.params)
    prompts = place_prompts(policy, parts, encoded, index, asks_blank(config.reward))
    spread = config.advantage.spread
    mean = mean_spread(spread, history, step + 1)
    least = spread and jax.device_put(jnp.float32(spread.beta * mean), sharding.replicated(parts.mesh))
    graded = partial(grade, training, encoded, index, coin=keys.sample, least_spread=least)
    after, stats, (scored, asked), experience = five_parts(training, state, prompts, keys, graded)
    scored = with_asked(scored, asked, training.components, parts)
    if config.kl.target is not None:
        responses = config.sample.questions * config.sample.samples
        coef = adapt_kl(state.kl_coef, stats["kl_response"], responses, config.kl)
        after = dataclasses.replace(after, kl_coef=coef)
    stats |= {"kl_coef": state.kl_coef} | ({"spread_mean": mean} if mean else {})
    return after, stats, scored, experience


def five_parts(
    training: Training,
    state: TrainState,
    prompts: Prompts,
    keys: Keys,
    grade: Callable[[Rollout], "Graded"],
) -> tuple[TrainState, dict[str, Any], tuple[Any, dict[str, Array]], Experience]:
    """Draw, assess, grade, ask, advantages, learn. `grade` is the host's part.

    Returns also what the host scored, with what the policy answered. `step_programs` calls it with shapes in
    place of arrays: so nothing here computes but by a program of `training`.
    """
    parts, programs, frozen = training.parts, training.programs, training.frozen
    policy, critic = state.policy.params, state.critic and state.critic.params
    rollout = draw(training, state, prompts, keys.sample)
    # a copy that was offloaded is on the device for this call alone
    shown = sharding.to_memory(frozen, "device") if parts.config.learn.offload else frozen
    assessment = programs.assess(shown, policy, critic, prompts, rollout, assess_settings(parts))
    del shown
    graded = grade(rollout)  # while the device assesses: programs are only dispatched
    asked = ask(training, state, prompts, rollout, graded.requests)
    rewards = Rewards(graded.rewards, tuple(asked.values()), graded.least_spread)
    kinds = experience_settings(parts, training.components)
    experience, stats = programs.make_experience(
        prompts, rollout, assessment, rewards, state.kl_coef, config=kinds
    )
    state, learned = learn(training, state, experience, keys.shuffle)
    return state, stats | learned, (graded.scored, asked), experience


class Graded(NamedTuple):
    """What the host makes of a rollout."""

    rewards: Leaf  # float32 [Q, G, K], the columns of `experience.host_columns`
    requests: dict[str, Any]  # by component: what the policy is asked, arrays [Q, G, …]
    scored: Any  # Scored, of this process's rows
    least_spread: Leaf | None  # float32 []: see `experience.kept_responses`


def grade(
    training: Training,
    encoded: Encoded,
    index: np.ndarray,
    rollout: Rollout,
    coin: Array,
    least_spread: Array | None,
) -> Graded:
    """Decode and score the responses to the questions at `index`, and write down what the policy is asked."""
    parts, n = training.parts, len(index)
    with jax.profiler.TraceAnnotation("score"):
        scored = score_rollout(parts, encoded, index, rollout, coin, training.components)
        graded = host_columns(scored.verdicts, training.components, parts.config.advantage)
        asked = training.programs.policy_rewards
        requests = {name: reward.request(scored) for name, reward in asked.items()}
    rewards, requests = place_scored((graded, requests), scored, n, parts)
    return Graded(rewards, requests, scored, least_spread)


def ask(
    training: Training, state: TrainState, prompts: Prompts, rollout: Rollout, requests: dict[str, Any]
) -> dict[str, Array]:
    """By component, in the order of `experience.columns`, what the policy answers: [Q, G], only dispatched.

    The requests' own order is another: JAX sorts the keys of a dict.
    """
    base, policy = training.frozen.base, state.policy.params
    return {
        name: reward.program(base, policy, prompts, rollout, requests[name])
        for name, reward in training.programs.policy_rewards.items()
    }


def draw(training: Training, state: TrainState, prompts: Prompts, key: Array) -> Rollout:
    """Responses by the policy. The sampler's copy of it (`sync.WeightSync`) lives only during this call."""
    parts, programs = training.parts, training.programs
    params = programs.sync_weights(lora.join(training.frozen.base, state.policy.params))
    settings = draw_settings(parts, parts.sampler_cfg, parts.config.sample)
    return programs.generate(params, prompts, key, settings)


def learn(
    training: Training, state: TrainState, experience: Experience, key: Array
) -> tuple[TrainState, dict[str, Any]]:
    """Policy and critic after their epochs over the rows, and metrics. A None program leaves its learner."""
    programs, base = training.programs, training.frozen.base
    policy, critic, metrics = state.policy, state.critic, {}
    if programs.learn_policy:
        policy, metrics["policy"] = programs.learn_policy(policy, base, experience, key, state.kl_coef)
    if programs.learn_critic:
        critic, metrics["critic"] = programs.learn_critic(critic, base, experience, key, None)
    return TrainState(policy, critic, state.kl_coef), metrics


def step_programs(
    parts: Parts,
    programs: Programs,
    width: int,
    components: tuple[Component, ...] | None = None,
    windows: int = 0,
    verifiers: verifier_models.Prepared | None = None,
) -> list[Program]:
    """All programs of a training step in their order, by taking one with shapes for arrays; prompts have
    `width` columns, and their images `windows` windows. `components` of the reward are by default those
    of the settings. `verifiers`: laid out.
    """
    config, mesh = parts.config, parts.mesh

    def learner(cfg: Any, tx: Any) -> Learner:
        return build.abstract_learner(parts, cfg, tx)

    policy = learner(parts.cfg, programs.policy_tx)
    critic = learner(parts.critic_cfg, programs.critic_tx) if programs.critic_tx else None
    frozen = build.abstract_frozen(parts)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    on_device: Any = policy.params, critic and critic.params, frozen.base
    if not config.learn.offload:
        on_device += policy.opt_state, critic and critic.opt_state, frozen.reference
    tower = None
    if windows and parts.cfg.execution.tower == "freeze":
        tower = build.abstract_tower(parts)
        on_device += (tower,)
    elif windows:
        tower = lora.join(frozen.base, policy.params)[VISION]
    asked = [each for each in (verifiers or {}).values() if isinstance(each, verifier_models.MeshVerifier)]
    on_device += tuple(each.model.params for each in asked if not each.settings.offload)
    recorder = Recorder(mesh, on_device)
    # What is offloaded comes to the device before a program is called: to the programs nothing is.
    on_chip = dataclasses.replace(config, learn=dataclasses.replace(config.learn, offload=False))
    components = list_components(config.reward) if components is None else components
    recorded = programs.wrapped(recorder.of)
    training = Training(dataclasses.replace(parts, config=on_chip), recorded, frozen, components)
    questions, samples = config.sample.questions, config.sample.samples
    graded_columns = columns([c for c in components if not c.on_device], config.advantage)
    rewards = array(parts, jnp.float32, questions, samples, len(graded_columns))
    requests = {name: reward.shapes for name, reward in programs.policy_rewards.items()}
    requests = jax.tree.map(lambda x: array(parts, x.dtype, *x.shape), requests)
    keys = Keys(a_key(parts), a_key(parts))
    prompts = abstract_prompts(parts, questions, width, windows, asks_blank(config.reward))
    with jax.set_mesh(mesh):
        if tower:
            seen = see_program(parts, questions, windows, "see", tower)
            recorder.add(seen._replace(calls=1 + asks_blank(config.reward)))

        def graded(rollout: Rollout) -> Graded:
            for program in chain.from_iterable(each.programs(questions * samples) for each in asked):
                recorder.add(program)
            return Graded(rewards, requests, None, scalar if config.advantage.spread else None)

        five_parts(training, TrainState(policy, critic, scalar), prompts, keys, graded)
    return recorder.programs
