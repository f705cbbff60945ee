"""The loop around any kind of training: resume, compile, evaluate; then step, evaluate, record, save, stop.

A `Job` says what a step is, what it logs and what evaluation reads. Reinforcement learning (train.py) and
fine-tuning (sft.py) each make one; everything that a run writes is written from here.
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

MAX_SKIPS = 3  # steps in a row with an update that was not finite, after which a run stops


@dataclass(frozen=True)
class StepResult:
    """What a step gives to the loop."""

    state: TrainState
    metrics: dict[str, Any]  # of this step: its line of metrics.jsonl
    learned: Experience  # the rows learned from: dumped where an update was not finite
    # rows for other files, named in `log.LOGS`
    logs: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """One kind of training, as the loop needs it."""

    command: str  # "train" or "sft": the command line that goes on with the run
    parts: Parts
    steps: int
    # what is trained on, and its tokens: compared with inputs.json on resuming
    rows: tuple[list[Any], list[Any]]
    sets: dict[str, Encoded]  # what is evaluated, by name
    state: TrainState  # at the start
    # (state, 0-based step, the last records) → result
    step: Callable[[TrainState, int, log.Records], StepResult]
    policy: Callable[[TrainState], Params]  # what evaluation reads: the sampler's parameters
    programs: Sequence[Program]  # what steps and evaluations call: compiled before the first step
    prepare: Callable[[int], None]  # begins to prepare the images of a batch, given its number
    # (folder, steps done, progress), before the first step of each start
    begin: Callable[[Path, int, ShowProgress], None] | None = None
    notices: Sequence[str] = ()  # about the data, for the console
    rewards: Sequence[dict[str, Any]] = ()  # the callables that pay, for inputs.json


class Session(NamedTuple):
    """What is open while a run goes on."""

    run: log.Run
    compiles: Compiles
    profile: Profile
    checkpoints: Checkpoints


def run_job(job: Job, callbacks: Callback | Sequence[Callback] = ()) -> dict[str, Any]:
    """Run or resume a job to its last step, or until a callback or a signal stops it.

    Returns the summary (`log.Run.finish`). Raises `Diverged` where updates are not finite in `MAX_SKIPS`
    steps in a row or nothing is learned from the rewards any more, after saving a checkpoint.
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
        if not run.stopping:  # else nothing would be saved of what is done from here on
            session = Session(run, compiles, profile, checkpoints)
            take_steps(job, session, state, done, skips, [callbacks] if callable(callbacks) else callbacks)
        checkpoints.close()
        return run.finish()


def fingerprints(job: Job) -> dict[str, Any]:
    """Hashes of all questions or rows that the run reads, for its logs."""
    sets = {f"eval.{name}": encoded.questions for name, encoded in job.sets.items()}
    return {name: fingerprint(rows) for name, rows in ({"train": job.rows[0]} | sets).items()}


def resume(job: Job, run: log.Run, checkpoints: Checkpoints) -> tuple[TrainState, int, int]:
    """The state of the newest checkpoint, its step, and how many of the last steps were skipped; the job's
    start and zeros where there is none. Refuses inputs that have changed since (`inputs.check`).
    """
    config = job.parts.config
    sets: inputs.Sets = {"data": (config.data, *job.rows)}
    for name, encoded in job.sets.items():
        sets[f"eval.sets.{name}"] = (config.eval.sets[name], encoded.questions, encoded.tokens)
    accepted = inputs.check(run.path, job.parts, sets, bool(checkpoints.steps()), job.rewards)
    state, done = checkpoints.restore(job.state)
    skips = run.resume(done)
    changed = [f"accepted a changed input: {line}" for line in accepted]
    for text in [
        *job.notices,
        *changed,
        *(f"eval.sets.{name}: {encoded.how_read}" for name, encoded in job.sets.items()),
    ]:
        run.notify(text)
    return state, done, skips


def take_steps(
    job: Job, session: Session, state: TrainState, done: int, skips: int, callbacks: Sequence[Callback]
) -> None:
    """The steps after `done`, each recorded and, where it is due, evaluated and saved."""
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
    """Step n, timed and, where due, evaluated. Reports compilations: there are none after the first."""
    run, compiles = session.run, session.compiles
    compiles.drain()  # what a checkpoint or a dump compiled is not the step's
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
    """The learning rate of step n's last update, of each learner that has one."""
    config, tuned = job.parts.config, job.command == "sft"
    learners = {"policy": (config.learn.policy, 0 if tuned else config.learn.critic_warmup)}
    learners |= {} if tuned else {"critic": (config.learn.critic, 0)}
    out = {}
    for name, (optimizer, waits) in learners.items():
        if optimizer and n > waits:
            rate = learning_rate(optimizer, count_updates(config, job.steps - waits))
            out[f"{name}/learning_rate"] = float(np.asarray(rate(count_updates(config, n - waits) - 1)))
    return out


def record(run: log.Run, n: int, result: StepResult) -> None:
    """Write the step's logs; report a reward that failed; dump the rows of an update that was not finite."""
    metrics, logs = result.metrics, result.logs
    if errors := [row["reward_error"] for row in logs.get("samples", []) if "reward_error" in row]:
        failed, unlearned = f"{metrics['reward_failed']:.1%}", f"{metrics['unlearned']:.1%}"
        share = f"{failed} of the completions, {unlearned} are not learned from"
        where = f"they are in samples.jsonl. The first: {errors[0]}"
        run.notify(f"step {n}: the reward failed on {share}; {where}")
    if log.has_skipped(metrics):
        path = dump(run.path, n, result.learned)
        run.notify(f"step {n}: an update was not finite, and skipped; its rows are in {path}")
    with jax.profiler.TraceAnnotation("log"):
        run.record(n, metrics, **logs)


def why_diverged(job: Job, n: int, metrics: dict[str, Any], skips: int) -> str | None:
    """Why a run must not go on after step n, and the remedy; None where it may."""
    if skips >= MAX_SKIPS:
        remedy = (
            "lower the rates or learn.*.clip_norm, look into the rows, and start again under another name="
        )
        return f"{MAX_SKIPS} steps in a row had updates that were not finite; {remedy}"
    if n < job.steps and monitors.has_stalled(metrics, job.parts.config):
        remedy = (
            "look at samples.jsonl, and mend prompt, format, rewards or rates; "
            "log.stop_constant=0 goes on regardless"
        )
        idle = f"nothing was learned from the rewards in {metrics['monitor/constant_reward']} steps in a row"
        return f"{idle}; {monitors.explain_idle(metrics, job.parts.config)}: {remedy}"
    return None


def dump(folder: Path, step: int, rows: Experience) -> Path:
    """Write the rows of a step to `skipped/<step>.npz`, an array for each of `Experience`'s."""
    path = folder / "skipped" / f"{step}.npz"
    arrays = jax.tree.leaves_with_path(process_allgather(rows, tiled=True))
    if jax.process_index() == 0:
        with files.named_errors(path):
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **{jax.tree_util.keystr(at, simple=True, separator="."): x for at, x in arrays})
    return path
