"""The loop of every training: resume, compile, evaluate; then step, evaluate, record, save, until the end.

A `Job` defines the step, its logs and the policy that is evaluated. Reinforcement learning (train.py) and
fine-tuning (sft.py) each make one. Everything that a run writes is written here.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from medrlvr_jax.build import Parts, count_updates
from medrlvr_jax.data.batches import first_batch
from medrlvr_jax.data.question import fingerprint
from medrlvr_jax.evaluation import evaluate, monitors
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import Diverged
from medrlvr_jax.rl.ahead import compile_ahead
from medrlvr_jax.rl.learn import learning_rate
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.rollout import Encoded
from medrlvr_jax.runs import inputs, log
from medrlvr_jax.runs.checkpoint import Checkpoints
from medrlvr_jax.runs.console import ShowProgress
from medrlvr_jax.runs.profile import Compiles, Profile
from medrlvr_jax.types import Experience, Params, TrainState

Callback = Callable[[int, dict[str, Any]], Any]

MAX_SKIPS = 3  # A run stops after this many steps in a row with an update that was not finite.


@dataclass(frozen=True)
class StepResult:
    """The result of a step, for the loop."""

    state: TrainState
    metrics: dict[str, Any]  # the step's line of metrics.jsonl
    learned: Experience  # the rows learned from: written to a file if an update was not finite
    # lines for other files, by their names in `log.LOGS`
    logs: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """A training, as the loop needs it."""

    command: str  # "train" or "sft": the command that resumes the run
    parts: Parts
    steps: int
    # the training data and its tokens: compared with inputs.json when a run resumes
    rows: tuple[list[Any], list[Any]]
    sets: dict[str, Encoded]  # the sets to evaluate, by name
    state: TrainState  # before the first step
    # (state, 0-based step, the last records) → result
    step: Callable[[TrainState, int, log.Records], StepResult]
    policy: Callable[[TrainState], Params]  # the sampler's parameters, for evaluation
    programs: Sequence[Program]  # all that steps and evaluations call: compiled before the first step
    prepare: Callable[[int], None]  # starts to prepare the images of the batch with this number
    # called before the first step of each start, with the folder, the number of steps done and a progress bar
    begin: Callable[[Path, int, ShowProgress], None] | None = None
    notices: Sequence[str] = ()  # about the data, for the console
    rewards: Sequence[dict[str, Any]] = ()  # the user's reward functions, for inputs.json


class Session(NamedTuple):
    """The resources that are open during a run."""

    run: log.Run
    compiles: Compiles
    profile: Profile
    checkpoints: Checkpoints


def run_job(job: Job, callbacks: Callback | Sequence[Callback] = ()) -> dict[str, Any]:
    """Run or resume a job to its last step, or until a callback or a signal stops it.

    Returns the summary (`log.Run.finish`). If updates are not finite in `MAX_SKIPS` steps in a row, or if
    the rewards have taught nothing for `log.stop_constant` steps, it saves a checkpoint and raises
    `Diverged`.
    """
    config = job.parts.config
    with (
        log.Run(config, job.steps, fingerprints(job), job.command) as run,
        Compiles() as compiles,
        Profile(run.path / "profile", config.log.profile) as profile,
        Checkpoints(run.path / "checkpoints", config.checkpoint, run.meta, run.notify) as checkpoints,
    ):
        state, done, skips = resume(job, run, checkpoints)
        if done < job.steps:
            if job.begin:
                job.begin(run.path, done, run.progress)
            run.notify(compile_ahead(job.programs, job.parts, run.progress))
            run.check_signals()
        if not run.stopping:
            session = Session(run, compiles, profile, checkpoints)
            take_steps(job, session, state, done, skips, [callbacks] if callable(callbacks) else callbacks)
        checkpoints.close()
        return run.finish()


def fingerprints(job: Job) -> dict[str, Any]:
    """Return hashes of all sets that the run reads, for its logs."""
    sets = {f"eval.{name}": encoded.questions for name, encoded in job.sets.items()}
    return {name: fingerprint(rows) for name, rows in ({"train": job.rows[0]} | sets).items()}


def resume(job: Job, run: log.Run, checkpoints: Checkpoints) -> tuple[TrainState, int, int]:
    """Return the state of the newest checkpoint, its step, and how many of the last steps in a row skipped
    an update; or the job's state and zeros if there is no checkpoint.

    Raises `ConfigError` if the run's inputs have changed since it began (`inputs.check`).
    """
    config = job.parts.config
    sets: inputs.Sets = {"data": (config.data, *job.rows)}
    for name, encoded in job.sets.items():
        sets[f"eval.sets.{name}"] = (config.eval.sets[name], encoded.questions, encoded.tokens)
    accepted = inputs.check(run.path, job.parts, sets, bool(checkpoints.steps()), job.rewards)
    state, done = checkpoints.restore(job.state)
    skips = run.resume(done)
    changed = [f"accepted a changed input: {line}" for line in accepted]
    how_read = [f"eval.sets.{name}: {encoded.how_read}" for name, encoded in job.sets.items()]
    for text in [*job.notices, *changed, *how_read]:
        run.notify(text)
    return state, done, skips


def take_steps(
    job: Job, session: Session, state: TrainState, done: int, skips: int, callbacks: Sequence[Callback]
) -> None:
    """Take the steps after `done`. Record each, and evaluate and save the policy when it is due."""
    run, checkpoints, every = session.run, session.checkpoints, job.parts.config.checkpoint.every
    history = run.history(monitors.WINDOW)
    if done == 0 and job.sets:
        run.record(0, evaluate.evaluate_sets(job.parts, job.policy(state), job.sets, run, 0))
    for n in range(done + 1, job.steps + 1):
        if n < job.steps:
            job.prepare(first_batch(history, n - 1) + 1)
        result = take_step(job, session, state, n, history, first=n == done + 1)
        state, metrics = result.state, result.metrics
        history = [*history, metrics][-monitors.WINDOW :]
        skips = skips + 1 if log.has_skipped(metrics) else 0
        record(run, n, result)
        if any([callback(n, metrics) is True for callback in callbacks]):
            run.stop()
        if callbacks:
            run.check_signals()
        checkpoints.check()
        failure = why_diverged(job, n, metrics, skips)
        if n == job.steps or failure or run.stopping or (every and n % every == 0):
            checkpoints.save(n, state, metrics)
        if failure:
            checkpoints.close()
            raise Diverged(f"{run.path}: {failure}. Step {n} is saved")
        if run.stopping:
            break


def take_step(
    job: Job, session: Session, state: TrainState, n: int, history: log.Records, first: bool
) -> StepResult:
    """Take step n, measure its time and evaluate the policy if it is due.

    No program should be compiled after the `first` step of a process, so later compilations are reported.
    """
    run, compiles = session.run, session.compiles
    compiles.drain()  # forget what checkpoints have compiled
    if not first:
        compiles.explain_cache_misses()
    session.profile.before_step(n)
    began = time.monotonic()
    with jax.profiler.StepTraceAnnotation("step", step_num=n):
        result = job.step(state, n - 1, history)
    result.metrics.update(learning_rates(job, n))
    for text in result.notices:
        run.notify(f"step {n}: {text}")
    result.metrics["seconds"] = time.monotonic() - began
    every = job.parts.config.eval.every
    if job.sets and (n == job.steps or (every and n % every == 0)):
        policy = job.policy(result.state)
        result.metrics.update(evaluate.evaluate_sets(job.parts, policy, job.sets, run, n))
    if (compiled := compiles.drain()) and not first:
        names, seconds = ", ".join(sorted({name for name, _ in compiled})), sum(s for _, s in compiled)
        run.notify(
            f"step {n}: compiled {names} in mid-run, {seconds:.1f} s lost; JAX's log above says what changed"
        )
    return result


def learning_rates(job: Job, n: int) -> dict[str, float]:
    """Return the learning rate of the last update in step n, for each learner that was updated."""
    config, is_sft = job.parts.config, job.command == "sft"
    learners = {"policy": (config.learn.policy, 0 if is_sft else config.learn.critic_warmup)}
    learners |= {} if is_sft else {"critic": (config.learn.critic, 0)}
    out = {}
    for name, (optimizer, warmup) in learners.items():
        if optimizer and n > warmup:
            rate = learning_rate(optimizer, count_updates(config, job.steps - warmup))
            out[f"{name}/learning_rate"] = float(np.asarray(rate(count_updates(config, n - warmup) - 1)))
    return out


def record(run: log.Run, n: int, result: StepResult) -> None:
    """Write the logs of step n. Report a reward function that failed and an update that was not finite."""
    metrics, logs = result.metrics, result.logs
    if errors := [row["reward_error"] for row in logs.get("samples", []) if "reward_error" in row]:
        failed, unlearned = f"{metrics['reward_failed']:.1%}", f"{metrics['unlearned']:.1%}"
        share = f"{failed} of the completions, {unlearned} are not learned from"
        where = f"they are in samples.jsonl. The first: {errors[0]}"
        run.notify(f"step {n}: the reward failed on {share}; {where}")
    if log.has_skipped(metrics):
        path = save_rows(run.path, n, result.learned)
        run.notify(f"step {n}: an update was not finite and was skipped; its rows are in {path}")
    with jax.profiler.TraceAnnotation("log"):
        run.record(n, metrics, **logs)


def why_diverged(job: Job, n: int, metrics: dict[str, Any], skips: int) -> str | None:
    """Return why the run must stop after step n, and the remedy; None if it may continue."""
    if skips >= MAX_SKIPS:
        remedy = "lower the learning rates or learn.*.clip_norm, and start again with another name="
        return f"{MAX_SKIPS} steps in a row had updates that were not finite; {remedy}"
    if n < job.steps and monitors.has_stalled(metrics, job.parts.config):
        remedy = "look at samples.jsonl, and change prompt, rewards or rates; log.stop_constant=0 never stops"
        idle = f"nothing was learned from the rewards in {metrics['monitor/constant_reward']} steps in a row"
        return f"{idle}; {monitors.explain_idle(metrics, job.parts.config)}: {remedy}"
    return None


def save_rows(folder: Path, step: int, rows: Experience) -> Path:
    """Write the arrays of a step's `Experience` to `skipped/<step>.npz`, and return its path."""
    path = folder / "skipped" / f"{step}.npz"
    arrays = jax.tree.leaves_with_path(process_allgather(rows, tiled=True))
    if jax.process_index() == 0:
        with files.named_errors(path):
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **{jax.tree_util.keystr(at, simple=True, separator="."): x for at, x in arrays})
    return path
