"""`medrlvr replay RUN --step s --row i`: a logged completion, drawn again.

Batch and noise are functions of (seed, step, question, sample), so all that is needed is the policy before
step s: checkpoint s − 1, or the start. Where it is not kept, the steps from the newest earlier checkpoint on
are trained again, which gives it bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import jax

from medrlvr_jax.build import build, total_steps
from medrlvr_jax.config import load as configs
from medrlvr_jax.data import load as data
from medrlvr_jax.data.batches import step_batch
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards import judges
from medrlvr_jax.rl import records, train
from medrlvr_jax.rl.experience import with_asked
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rollout.rollout import encode, place_prompts
from medrlvr_jax.runs import inputs
from medrlvr_jax.runs.checkpoint import restore_before
from medrlvr_jax.runs.console import Console, clock


def replay(run: Path, step: int, row: int, settings: list[str]) -> dict[str, Any]:
    """`{"drawn": the record, "logged": that of samples.jsonl or None, "differ": the logged fields that came
    out otherwise}`."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no config.yaml in it; give a run's folder, such as runs/quickstart")
    c = configs.load(run / "config.yaml", settings)
    metrics, samples = (_records(run / f"{name}.jsonl") for name in ("metrics", "samples"))
    if not any("completions" in m for m in metrics):
        raise ConfigError(
            f"{run}: no completion was drawn in it; give a run of `medrlvr train` that has made a step"
        )
    last, n = metrics[-1]["step"], c.sample.questions * c.sample.samples
    if not 1 <= step <= last:
        raise ConfigError(f"--step {step}: {run} has steps 1 to {last}")
    if not 0 <= row < n:
        raise ConfigError(
            f"--row {row}: a step of {run} has rows 0 to {n - 1},"
            f" sample.samples = {c.sample.samples} to a question"
        )
    parts, console = build(c), Console()
    encoded = encode(parts.tokenizer, data.load(c.data), c, c.data.shuffle_options)
    inputs.check_replay(run, parts, {"data": (c.data, encoded.questions, encoded.tokens)})
    with judges.started(c.reward) as terms, jax.set_mesh(parts.mesh):
        programs = make_programs(parts, total_steps(c, len(encoded.questions)))
        training, state = train.start(parts, programs, terms)
        state, done = restore_before(run / "checkpoints", state, step - 1)
        if done < step - 1:
            seconds = clock(sum(m.get("seconds", 0) for m in metrics if done < m["step"] < step))
            console.notify(
                f"checkpoint {step - 1} is not kept: training steps {done + 1} to {step - 1} again,"
                f" which took {seconds} then"
            )
        for k in range(done, step - 1):
            state, *_ = train.train_step(training, train.at_epoch(parts, encoded, k), state, k)
            console.progress("training steps again", k + 1, step - 1)
        encoded, index = (
            train.at_epoch(parts, encoded, step - 1),
            step_batch(c, len(encoded.questions), step - 1),
        )
        key = train.step_keys(c.seed, step - 1).sample
        prompts = place_prompts(parts, encoded, index)
        rollout = train.draw(training, state, prompts, key)
        graded = train.grade(training, encoded, index, rollout, key)
        asked = train.ask(training, state, prompts, rollout, graded.requests)
        scored = with_asked(graded.scored, asked, terms, parts)
    drawn = json.loads(
        json.dumps(records.sample_record(parts, encoded, index, scored, row))
    )  # as a log gives it back
    logged = next((s for s in samples if s["step"] == step and s["row"] == row), None)
    differ = [k for k, v in (logged or {}).items() if k != "step" and drawn.get(k) != v]
    return {"drawn": drawn, "logged": logged, "differ": differ}


def _records(path: Path) -> list[dict[str, Any]]:
    return files.read_jsonl(path) if path.exists() else []


def show(found: dict[str, Any]) -> str:
    """For reading: prompt, completion, what the reward says of it, and whether it is what was logged."""
    drawn, logged = found["drawn"], found["logged"]
    rest = "\n".join(
        f"{k:>14}: {json.dumps(v, ensure_ascii=False)}"
        for k, v in drawn.items()
        if k not in ("prompt", "completion")
    )
    if logged is None:
        verdict = "not in samples.jsonl, so there is nothing to compare it with"
    elif found["differ"]:
        verdict = "NOT what was logged:\n" + "\n".join(
            f"{k:>14}: {json.dumps(logged[k], ensure_ascii=False)} there" for k in found["differ"]
        )
    else:
        verdict = "exactly what was logged"
    text = f"{drawn['prompt']}\n---- completion ----\n{drawn['completion']}"
    return f"{text}\n---- reward ----\n{rest}\n---- {verdict}"
