"""`medrlvr replay RUN --step s --row i`: sample a logged completion again.

Batch and noise are functions of (seed, step, question, sample). So only the policy before step s is needed:
checkpoint s − 1, or the initial model. If that checkpoint was deleted, the steps after the newest earlier one
are trained again, bitwise equal.
"""

import json
from pathlib import Path
from typing import Any

import jax

from medrlvr_jax.build import build, total_steps
from medrlvr_jax.config import load as configs
from medrlvr_jax.data import load as data
from medrlvr_jax.data.batches import first_batch
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import lora
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.model_rewards.policy import needs_grey_images
from medrlvr_jax.model_rewards.probability import fill_baselines
from medrlvr_jax.rewards.training import start_components
from medrlvr_jax.rl import records, train
from medrlvr_jax.rl.experience import add_policy_values
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rl.step import ask, batch_key, draw, grade, questions_of, train_step
from medrlvr_jax.rollout.rollout import encode, place_prompts
from medrlvr_jax.runs import inputs
from medrlvr_jax.runs.checkpoint import restore_before
from medrlvr_jax.runs.console import Console, format_duration


def replay(run: Path, step: int, row: int, settings: list[str]) -> dict[str, Any]:
    """Sample row `row` of step `step` again.

    Returns `{"drawn": the new record, "logged": the record in samples.jsonl or None, "differ": the names of
    the fields that differ}`. Raises `ConfigError` if the run has no such step or row.
    """
    c = configs.load(run, settings)
    metrics, samples = (_records(run / f"{name}.jsonl") for name in ("metrics", "samples"))
    if not any("completions" in m for m in metrics):
        remedy = "give a run of `medrlvr train` that has finished a step"
        raise ConfigError(f"{run}: this run has no completions; {remedy}")
    last = metrics[-1]["step"]
    if not 1 <= step <= last:
        raise ConfigError(f"--step {step}: {run} has steps 1 to {last}")
    rows = next(m["completions"] for m in metrics if m["step"] == step)
    if not 0 <= row < rows:
        per_question = f"sample.samples = {c.sample.samples} per question"
        raise ConfigError(f"--row {row}: this step of {run} has rows 0 to {rows - 1}, {per_question}")
    parts, console = build(c), Console()
    encoded = encode(parts.tokenizer, data.load(c.data), c, c.data.shuffle_options, parts.cfg.vision)
    inputs.check(run, parts, {"data": (c.data, encoded.questions, encoded.tokens)}, write=False)
    verifiers = verifier_models.load(parts, verifier_models.prepare(parts))
    started = start_components(c.reward, questions=encoded.questions, verifiers=verifiers)
    with started as components, jax.set_mesh(parts.mesh):
        programs = make_programs(parts, total_steps(c, len(encoded.questions)))
        training, state = train.init_training(parts, programs, components)
        start = training.frozen.base, state.policy.params
        fill_baselines(parts, programs.policy_rewards, start, encoded, run, step, console.progress)
        state, done = restore_before(run / "checkpoints", state, step - 1)
        if done < step - 1:
            seconds = sum(m.get("seconds", 0) for m in metrics if done < m["step"] < step)
            steps = (
                f"training steps {done + 1} to {step - 1} again, which took {format_duration(seconds)} before"
            )
            console.notify(f"checkpoint {step - 1} was not kept: {steps}")
        for k in range(done, step - 1):
            before = [m for m in metrics if 0 < m["step"] <= k]
            state, *_ = train_step(training, encoded, state, k, before)
            console.progress("training steps again", k + 1, step - 1)
        before = [m for m in metrics if 0 < m["step"] < step]
        k, of_batch = divmod(row, c.sample.questions * c.sample.samples)
        number = first_batch(before, step - 1) + k
        encoded, index = questions_of(parts, encoded, number)
        key, policy = batch_key(c.seed, number), lora.join(start[0], state.policy.params)
        prompts = place_prompts(policy, parts, encoded, index, needs_grey_images(c.reward))
        rollout = draw(training, state, prompts, key)
        graded = grade(training, encoded, index, rollout, key)
        asked = ask(training, state, prompts, rollout, graded.requests)
        scored = add_policy_values(graded.scored, asked, components, parts)
    record = records.sample_record(parts, scored, of_batch) | {"row": row}
    drawn = json.loads(json.dumps(record))  # with the types that a log is read with
    logged = next((s for s in samples if s["step"] == step and s["row"] == row), None)
    differ = [k for k, v in (logged or {}).items() if k != "step" and drawn.get(k) != v]
    return {"drawn": drawn, "logged": logged, "differ": differ}


def _records(path: Path) -> list[dict[str, Any]]:
    return files.read_jsonl(path) if path.exists() else []


def format_result(result: dict[str, Any]) -> str:
    """Return prompt, completion, rewards, and whether they equal the log, as text."""
    drawn, logged = result["drawn"], result["logged"]
    line = lambda name, value: f"{name:>14}: {json.dumps(value, ensure_ascii=False)}"
    rewards = [line(*item) for item in drawn.items() if item[0] not in ("prompt", "completion", "images")]
    verdict = "equal to the log"
    if logged is None:
        verdict = "not in samples.jsonl, so there is nothing to compare it with"
    elif result["differ"]:
        fields = [line(name, logged[name]) for name in result["differ"]]
        verdict = "\n".join(["NOT equal to the log, which has:", *fields])
    text = f"{drawn['prompt']}\n---- completion ----\n{drawn['completion']}\n---- reward ----"
    return "\n".join([text, *rewards, f"---- {verdict}"])
