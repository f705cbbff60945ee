"""The loop around any step: resume, compile, evaluate, record, checkpoint, stop when asked. Training and fine-tuning are two of it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from medrlvr_jax.build import Parts
from medrlvr_jax.data.question import fingerprint
from medrlvr_jax.evaluation import evaluate, monitors
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import Diverged
from medrlvr_jax.rl.programs import compile_ahead
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.rollout import Encoded
from medrlvr_jax.runs import inputs, log
from medrlvr_jax.runs.checkpoint import Checkpoints
from medrlvr_jax.runs.profile import Compiles, Profile
from medrlvr_jax.types import Experience, TrainState

Callback = Callable[[int, dict[str, Any]], Any]


SKIPS = 3  # steps in a row with an update that was not finite, after which a run stops


def drive(
    command: str,
    parts: Parts,
    rows: tuple[list[Any], list[Any]],
    sets: dict[str, Encoded],
    steps: int,
    state: TrainState,
    one: Any,
    relay: Any,
    ahead: list[Program],
    notices: list[str],
    callbacks: Callback | Sequence[Callback] = (),
    rewards: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The loop around any step: resume, compile, evaluate, record, checkpoint, stop when asked.

    `rows` is what is trained on, and its tokens. `one`:
    (state, step, the last records) → (state, metrics, logs, the rows learned from, notices).
    `ahead` are the programs that `one` and the evaluations will call. `rewards` says which callables pay, for inputs.json.
    """
    config, callbacks = parts.config, [callbacks] if callable(callbacks) else callbacks
    used = {"train": rows[0]} | {f"eval.{name}": encoded.questions for name, encoded in sets.items()}
    prints = {name: fingerprint(of) for name, of in used.items()}
    looked_at: inputs.Sets = {"data": (config.data, *rows)}
    looked_at |= {f"eval.sets.{name}": (config.eval.sets[name], encoded.questions, encoded.tokens) for name, encoded in sets.items()}
    run, profiled = log.Run(config, steps, prints, command), config.log.profile
    with (
        run,
        Compiles() as compiles,
        Profile(run.path / "profile", profiled) as profile,
        Checkpoints(run.path / "checkpoints", config.checkpoint, run.meta, run.notify) as checkpoints,
    ):
        accepted = inputs.check(run.path, parts, looked_at, bool(checkpoints.steps()), rewards)
        notices += [f"going on with what is not as it was: {line}" for line in accepted]
        state, done = checkpoints.restore_newest(state)
        skips = run.resume(done)
        for text in [*notices, *(f"eval.sets.{name}: {encoded.told}" for name, encoded in sets.items())]:
            run.notify(text)
        if done < steps:
            run.notify(compile_ahead(ahead, parts, run.progress))
            run.check_signals()
        if run.stopping:  # before anything is done that is not saved
            checkpoints.close()
            return run.finish()
        history = run.history(monitors.WINDOW)
        if done == 0 and sets:
            run.record(0, evaluate.evaluate_sets(parts, relay(state.policy.params), sets, run))
        for step in range(done, steps):
            compiles.drain()  # by a checkpoint or a dump
            if step > done:
                compiles.explain_cache_misses()
            profile.at(step + 1)
            began = time.monotonic()
            with jax.profiler.StepTraceAnnotation("step", step_num=step + 1):
                state, metrics, logs, learned, said = one(state, step, history)
            history = [*history, metrics][-monitors.WINDOW :]
            for text in said:
                run.notify(f"step {step + 1}: {text}")
            metrics |= {"seconds": time.monotonic() - began}
            n, last = step + 1, step + 1 == steps
            if sets and (last or (config.eval.every and n % config.eval.every == 0)):
                metrics |= evaluate.evaluate_sets(parts, relay(state.policy.params), sets, run)
            if (made := compiles.drain()) and step > done:
                names, lost = ", ".join(sorted({name for name, _ in made})), sum(seconds for _, seconds in made)
                run.notify(f"step {n}: compiled {names} in mid-run, {lost:.1f} s lost; JAX's log above says what changed")
            if errors := [row["reward_error"] for row in logs.get("samples", []) if "reward_error" in row]:
                share = f"{metrics['reward_failed']:.1%} of the completions, {metrics['unlearned']:.1%} are not learned from"
                run.notify(f"step {n}: the reward failed on {share}; they are in samples.jsonl. The first: {errors[0]}")
            if log.skipped(metrics):
                skips += 1
                run.notify(f"step {n}: an update was not finite, and skipped; its rows are in {dump(run.path, n, learned)}")
            else:
                skips = 0
            with jax.profiler.TraceAnnotation("log"):
                run.record(n, metrics, **logs)
            if any([callback(n, metrics) is True for callback in callbacks]):
                run.stop()
            if callbacks:
                run.check_signals()
            checkpoints.check()
            stalled = not last and monitors.stalled(metrics, config)
            if last or stalled or skips >= SKIPS or run.stopping or (config.checkpoint.every and n % config.checkpoint.every == 0):
                checkpoints.save(n, state, metrics)
            if skips >= SKIPS:
                checkpoints.close()
                remedy = "lower the rates or learn.*.clip_norm, look into the rows, and start again under another name="
                raise Diverged(f"{run.path}: {SKIPS} steps in a row had updates that were not finite; {remedy}. Step {n} is saved")
            if stalled:
                checkpoints.close()
                remedy = "look at samples.jsonl, and mend prompt, format, rewards or rates; log.stop_constant=0 goes on regardless"
                idle = f"nothing was learned from the rewards in {metrics['monitor/constant_reward']} steps in a row"
                raise Diverged(f"{run.path}: {idle}; {monitors.why_idle(metrics, config)}: {remedy}. Step {n} is saved")
            if run.stopping:
                break
        checkpoints.close()
        return run.finish()


def dump(folder: Path, step: int, rows: Experience) -> Path:
    """The rows of a step, for inspection: one array of `skipped/<step>.npz` for each array of `Experience`, as `prompts.tokens`."""
    path = folder / "skipped" / f"{step}.npz"
    whole = process_allgather(rows, tiled=True)
    if jax.process_index() == 0:
        with files.named_errors(path):
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **{jax.tree_util.keystr(name, simple=True, separator="."): x for name, x in jax.tree.leaves_with_path(whole)})
    return path
