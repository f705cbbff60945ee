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
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax import build, sharding
from medrlvr_jax.build import Parts, check_positions, total_steps
from medrlvr_jax.config import check
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.batches import step_batch
from medrlvr_jax.data.load import given, read
from medrlvr_jax.data.readers import Records
from medrlvr_jax.evaluation import evaluate, monitors
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import lora
from medrlvr_jax.model.spec import VISION
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.model_rewards.policy import asks_blank, check_questions
from medrlvr_jax.model_rewards.probability import take_baselines
from medrlvr_jax.rewards import judges
from medrlvr_jax.rewards.components import components
from medrlvr_jax.rewards.parse import beginning_trap
from medrlvr_jax.rl import records
from medrlvr_jax.rl.experience import (
    Rewards,
    columns,
    experience_settings,
    host_columns,
    mean_spread,
    place_scored,
    with_asked,
)
from medrlvr_jax.rl.learn import adapt_kl, offload
from medrlvr_jax.rl.loop import Callback, Job, StepResult, run_job
from medrlvr_jax.rl.programs import Programs, make_programs
from medrlvr_jax.rollout.assess import assess_settings
from medrlvr_jax.rollout.generate import draw_settings
from medrlvr_jax.rollout.program import Program, Recorder, a_key, abstract_prompts, array, sync_program
from medrlvr_jax.rollout.rollout import (
    Encoded,
    Scored,
    begin_images,
    check_seen,
    encode,
    place_prompts,
    reorder,
    score_rollout,
)
from medrlvr_jax.rollout.see import see_program
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs import log
from medrlvr_jax.runs.console import stage
from medrlvr_jax.types import (
    Array,
    Experience,
    Frozen,
    Leaf,
    Learner,
    Prompts,
    Rollout,
    TrainState,
)


def train(
    config: Config,
    rewards: judges.Given | None = None,
    data: Records | str | Path | None = None,
    callbacks: Callback | Sequence[Callback] = (),
) -> dict[str, Any]:
    """Run or resume a training by PPO, GRPO or their kin, as `config` says; writes `runs/<name>/` as `medrlvr
    train` does.

    `rewards`: what pays in place of `config.reward`'s rule: a callable, or a list of callables and of pairs
    (callable, weight), whose weighted values are added; of several, each has a metric `reward/<name>` (`f`,
    then `f_2`), its mean before the weight. Each is called with lists of N texts by keyword, those of
    `completions`, `keys` (letters of the right options), `options` and `questions` that its signature names,
    and returns N finite numbers. user.py says what follows where it does not. Accuracies and evaluations stay
    the rule's.

    `data`: what to train on in place of `config.data.path`: `Question`s, or dicts with the fields of one of
    the formats in formats.py, in a list or a `datasets.Dataset`; or a path as in `config.data.path`. The
    other settings of `config.data` hold for it too.

    `callbacks`: called as f(step, metrics) after each step, which is 1, 2, …, with the step's line of
    metrics.jsonl; where one returns True, the run saves a checkpoint and stops.

    Returns what summary.json holds; of a run that was stopped before its end, by a callback or by a signal
    (Ctrl-C), `name`, `steps`, `done` and `exit_status`: the same call goes on from there. Raises
    `ConfigError` for settings, data and rewards that cannot be used, `RewardError`, `Diverged`,
    `CheckpointError` and `Unwritable`.
    """
    check.check_best(config)
    given_terms = None if rewards is None else judges.from_callables(rewards)
    spec, given_rows = given(config.data, data)
    config = dataclasses.replace(config, data=spec)
    log.check(config, "train")
    parts = build.build(config)
    with stage(f"reading {config.data.path}") as show:
        questions, how_read = read(config.data, given_rows)
        encoding, shuffle = partial(show, "encoding questions"), config.data.shuffle_options
        encoded = encode(parts.tokenizer, questions, config, shuffle, parts.cfg.vision, encoding)
        check_lengths(parts, encoded)
        show("reading the sets of eval.sets", 0, 0)
        sets = evaluate.load_sets(parts)
    notices = [f"data: {how_read}"]
    if encoded.dropped:
        notices.append(f"{encoded.dropped} questions dropped: longer than prompt.max_tokens")
    if trap := beginning_trap(text.begins(parts.tokenizer, config.prompt), config.reward.mode):
        notices.append("; ".join(trap))
    asked = {} if given_terms else verifier_models.prepare(parts)
    with stage(f"loading {', '.join(asked)}") if asked else nullcontext():
        verifiers = verifier_models.start(parts, asked)
    with judges.started(config.reward, given_terms, questions, verifiers) as terms, jax.set_mesh(parts.mesh):
        with stage(f"loading {config.model.path}"):
            job = make_job(parts, encoded, sets, terms, asked)
        job = dataclasses.replace(job, notices=notices, rewards=judges.record(terms))
        return run_job(job, callbacks)


def check_lengths(parts: Parts, encoded: Encoded) -> None:
    """Refuse data without a usable question, rows beyond the model's positions, and a warm-up without end."""
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
    terms: judges.Terms,
    verifiers: verifier_models.Prepared | None = None,
) -> Job:
    """The training as the loop runs it; `terms` are what is paid, by `verifiers` among others."""
    steps = total_steps(parts.config, len(encoded.questions))
    programs = make_programs(parts, steps)
    training, state = start(parts, programs, terms)
    # Evaluation is of the policy itself: where rollouts are drawn from int8 weights, it has a sync_weights of
    # its own.
    sync_weights = (
        programs.sync_weights if parts.sampler_cfg == parts.cfg else make_weight_sync(parts, parts.cfg)
    )
    ahead = step_programs(parts, programs, encoded.width, terms, encoded.windows, verifiers)
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
        prepare=lambda step: begin_images(
            parts, encoded, step_batch(parts.config, len(encoded.questions), step)
        ),
        begin=partial(take_baselines, parts, programs.policy_rewards, start_policy, encoded),
    )


def logged_step(
    training: "Training",
    encoded: Encoded,
    state: TrainState,
    step: int,
    history: Sequence[dict[str, Any]],
) -> StepResult:
    """A step, with its metrics, samples and alarms."""
    parts = training.parts
    config, batch = parts.config, at_epoch(parts, encoded, step)
    state, stats, scored, experience = train_step(training, batch, state, step, history)
    metrics = records.summarise(stats, scored) | monitors.watch(scored, config.sample.samples)
    metrics |= monitors.count_idle(metrics, history)
    lasting, alarms = monitors.mark(monitors.alarms(metrics, history, config), history)
    notices = records.tell(alarms, scored, metrics, config)
    logs = {
        "samples": records.samples(parts, batch, scored, step),
        "questions": [records.passes(scored, config.sample.samples)],
    }
    return StepResult(state, metrics | lasting, experience, logs, notices)


@dataclass(frozen=True)
class Training:
    """What the steps of a training read and never change."""

    parts: Parts
    programs: Programs
    frozen: Frozen
    terms: judges.Terms  # what is paid


def start(parts: Parts, programs: Programs, terms: judges.Terms | None = None) -> tuple[Training, TrainState]:
    """The learners at their start, and their programs as a step calls them. `terms`: see `step_programs`."""
    config = parts.config
    terms = components(config.reward) if terms is None else terms
    policy, _ = build.init_learner(parts, parts.cfg, programs.policy_tx)
    policy, learn_policy = offload(config, policy, programs.learn_policy)
    critic, learn_critic = None, None
    if programs.critic_tx:
        critic, _ = build.init_learner(parts, parts.critic_cfg, programs.critic_tx)
        critic, learn_critic = offload(config, critic, programs.learn_critic)
    programs = dataclasses.replace(programs, learn_policy=learn_policy, learn_critic=learn_critic)
    kl_coef = jax.device_put(jnp.float32(config.kl.coef), sharding.replicated(parts.mesh))
    training = Training(parts, programs, build.load_frozen(parts), terms)
    return training, TrainState(policy, critic, kl_coef)


def at_epoch(parts: Parts, encoded: Encoded, step: int) -> Encoded:
    """The questions of a step, options in their epoch's order where `data.shuffle_options` asks for it."""
    if not encoded.shuffle:
        return encoded
    n = len(encoded.questions)
    return reorder(
        parts, encoded, step_batch(parts.config, n, step), step // (n // parts.config.sample.questions)
    )


# --- a step: what the host does of it, then its parts ---


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
    scored = with_asked(scored, asked, training.terms, parts)
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
    kinds = experience_settings(parts, training.terms)
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
        scored = score_rollout(parts, encoded, index, rollout, coin, training.terms)
        graded = host_columns(scored.verdicts, training.terms, parts.config.advantage)
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
    terms: judges.Terms | None = None,
    windows: int = 0,
    verifiers: verifier_models.Prepared | None = None,
) -> list[Program]:
    """All programs of a training step in their order, by taking one with shapes for arrays; prompts have
    `width` columns, and their images `windows` windows. `terms`: what is paid, by default what the settings
    say. `verifiers`: laid out.
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
    terms = components(config.reward) if terms is None else terms
    recorded = programs.wrapped(recorder.of)
    training = Training(dataclasses.replace(parts, config=on_chip), recorded, frozen, terms)
    questions, samples = config.sample.questions, config.sample.samples
    graded_columns = columns([term for term in terms if not term.on_device], config.advantage)
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
