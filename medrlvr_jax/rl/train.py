"""Training by reinforcement learning: what is read, checked and loaded before the first step, and what is
recorded of a step. The step itself is in step.py.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from medrlvr_jax import build, sharding
from medrlvr_jax.build import Parts, check_positions, total_steps
from medrlvr_jax.config import check
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.batches import run_batch
from medrlvr_jax.data.load import read, resolve_data
from medrlvr_jax.data.readers import Records
from medrlvr_jax.evaluation import evaluate, monitors
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import lora
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.model_rewards.policy import check_questions
from medrlvr_jax.model_rewards.probability import fill_baselines
from medrlvr_jax.rewards.components import Component, list_components
from medrlvr_jax.rewards.parse import prefix_conflict
from medrlvr_jax.rewards.training import (
    UserRewards,
    components_from_callables,
    describe_callables,
    start_components,
)
from medrlvr_jax.rl import records
from medrlvr_jax.rl.ahead import step_programs
from medrlvr_jax.rl.learn import offload
from medrlvr_jax.rl.loop import Callback, Job, StepResult, run_job
from medrlvr_jax.rl.programs import Programs, make_programs
from medrlvr_jax.rl.step import Training, train_step
from medrlvr_jax.rollout.program import sync_program
from medrlvr_jax.rollout.rollout import Encoded, check_seen, encode, prefetch_images
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs import log
from medrlvr_jax.runs.console import stage
from medrlvr_jax.types import TrainState


def train(
    config: Config,
    rewards: UserRewards | None = None,
    data: Records | str | Path | None = None,
    callbacks: Callback | Sequence[Callback] = (),
) -> dict[str, Any]:
    """Run or resume a training by PPO, GRPO or a relative. It writes `runs/<name>/` as `medrlvr train` does.

    `rewards`: one or more reward functions in place of `config.reward`, as a callable or as a list of
    callables and pairs (callable, weight). Their weighted values are added. If there are several, each has a
    metric `reward/<name>` (`f`, then `f_2`), its mean before the weight. A function is called with keyword
    arguments, those of `completions`, `keys` (letters of the right options), `options` and `questions` that
    its signature names. Each is a list with N items. It returns N finite numbers; rewards/user.py says what
    happens if it does not. Accuracies and evaluations use the rule.

    `data`: training data in place of `config.data.path`: `Question`s, or dicts with the fields of one of the
    formats in data/formats.py, in a list or a `datasets.Dataset`; or a path as in `config.data.path`. The
    other settings of `config.data` apply.

    `callbacks`: called as f(step, metrics) after each step, which is 1, 2, …, with the step's line of
    metrics.jsonl. If one returns True, the run saves a checkpoint and stops.

    Returns the content of summary.json. If a callback or a signal (Ctrl-C) has stopped the run, it returns
    `name`, `steps`, `done` and `exit_status` instead, and the same call resumes the run. Raises `ConfigError`
    for settings, data and rewards that cannot be used, `RewardError`, `Diverged`, `CheckpointError` and
    `Unwritable`.
    """
    check.check_best(config)
    user_components = None if rewards is None else components_from_callables(rewards)
    spec, given_rows = resolve_data(config.data, data)
    config = dataclasses.replace(config, data=spec)
    log.check(config, "train")
    parts = build.build(config)
    with stage(f"reading {config.data.path}") as show:
        questions, how_read = read(config.data, given_rows)
        encoding, shuffle = partial(show, "encoding questions"), config.data.shuffle_options
        encoded = encode(parts.tokenizer, questions, config, shuffle, parts.cfg.vision, encoding)
        check_lengths(parts, encoded)
        sets = evaluate.load_sets(parts, show)
    notices = [f"data: {how_read}"]
    if encoded.dropped:
        notices.append(f"{encoded.dropped} questions dropped: longer than prompt.max_tokens")
    if conflict := prefix_conflict(text.response_prefix(parts.tokenizer, config.prompt), config.reward.mode):
        notices.append("; ".join(conflict))
    prepared = {} if user_components else verifier_models.prepare(parts)
    with stage(f"loading {', '.join(prepared)}") if prepared else nullcontext():
        verifiers = verifier_models.load(parts, prepared)
    with (
        start_components(config.reward, user_components, questions, verifiers) as components,
        jax.set_mesh(parts.mesh),
    ):
        with stage(f"loading {config.model.path}"):
            job = make_job(parts, encoded, sets, components, prepared)
        job = dataclasses.replace(job, notices=notices, rewards=describe_callables(components))
        return run_job(job, callbacks)


def check_lengths(parts: Parts, encoded: Encoded) -> None:
    """Raise `ConfigError` if no question fits, if responses would exceed the model's positions, or if the
    critic's warm-up takes all steps.
    """
    config = parts.config
    if not encoded.questions:
        limit = f"prompt.max_tokens = {config.prompt.max_tokens}"
        raise ConfigError(f"data.path: no question of {config.data.path} fits {limit}; raise it")
    check_seen(parts, encoded.images)
    check_positions(parts, encoded.longest, config.sample.max_new_tokens, "sample.max_new_tokens")
    check_questions(config.reward, parts.tokenizer, encoded.questions)
    steps, warmup = total_steps(config, len(encoded.questions)), config.learn.critic_warmup
    if warmup >= steps:
        remedy = "leave none in which the policy learns; lower it"
        raise ConfigError(f"learn.critic_warmup: {warmup} of {steps} steps {remedy}")


def make_job(
    parts: Parts,
    encoded: Encoded,
    sets: dict[str, Encoded],
    components: tuple[Component, ...],
    verifiers: verifier_models.Verifiers | None = None,
) -> Job:
    """Return the training as the loop runs it. `verifiers` are the models among the reward's components."""
    steps = total_steps(parts.config, len(encoded.questions))
    programs = make_programs(parts, steps)
    training, state = init_training(parts, programs, components)
    # Evaluation draws from the policy itself, so it needs another copy of the weights if rollouts use int8.
    sync_weights = (
        programs.sync_weights if parts.sampler_cfg == parts.cfg else make_weight_sync(parts, parts.cfg)
    )
    ahead = step_programs(parts, programs, encoded.width, components, encoded.windows, verifiers)
    ahead += evaluate.programs(parts, sets)
    if sets and sync_weights is not programs.sync_weights:
        ahead += sync_program(sync_weights)
    start_policy = training.frozen.base, state.policy.params
    return Job(
        command="train",
        parts=parts,
        steps=steps,
        rows=(encoded.questions, encoded.tokens),
        sets=sets,
        state=state,
        step=partial(logged_step, training, encoded),
        policy=lambda state: sync_weights(lora.join(training.frozen.base, state.policy.params)),
        programs=ahead,
        prepare=lambda number: prefetch_images(
            parts, encoded, run_batch(parts.config, len(encoded.questions), number)
        ),
        begin=partial(fill_baselines, parts, programs.policy_rewards, start_policy, encoded),
    )


def logged_step(
    training: Training,
    encoded: Encoded,
    state: TrainState,
    step: int,
    history: Sequence[dict[str, Any]],
) -> StepResult:
    """Take a step, and collect its metrics, samples and alarms."""
    parts, config = training.parts, training.parts.config
    state, stats, scored, experience = train_step(training, encoded, state, step, history)
    metrics = records.summarise(stats, scored) | monitors.letter_metrics(scored, config.sample.samples)
    metrics |= monitors.count_idle(metrics, history)
    durations, alarms = monitors.count_durations(monitors.find_alarms(metrics, history, config), history)
    notices = records.describe_alarms(alarms, scored, metrics, config)
    questions = int(metrics["completions"]) // config.sample.samples
    logs = {
        "samples": records.samples(parts, scored, questions, step),
        "questions": [records.pass_counts(scored, config.sample.samples)],
    }
    return StepResult(state, metrics | durations, experience, logs, notices)


def init_training(
    parts: Parts, programs: Programs, components: tuple[Component, ...] | None = None
) -> tuple[Training, TrainState]:
    """Return the training and its state before the first step."""
    config = parts.config
    components = list_components(config.reward) if components is None else components
    policy, _ = build.init_learner(parts, parts.cfg, programs.policy_tx)
    policy, learn_policy = offload(config, policy, programs.learn_policy)
    critic, learn_critic = None, None
    if programs.critic_tx:
        critic, _ = build.init_learner(parts, parts.critic_cfg, programs.critic_tx)
        critic, learn_critic = offload(config, critic, programs.learn_critic)
    programs = dataclasses.replace(programs, learn_policy=learn_policy, learn_critic=learn_critic)
    kl_coef = jax.device_put(jnp.float32(config.kl.coef), sharding.replicated(parts.mesh))
    training = Training(parts, programs, build.load_frozen(parts), components)
    return training, TrainState(policy, critic, kl_coef)
