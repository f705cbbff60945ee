"""The records of a training step, gathered from all processes: metrics, samples, pass counts and alarms."""

import textwrap
from itertools import chain
from typing import Any

import numpy as np

from medrlvr_jax import sharding
from medrlvr_jax.build import Parts
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data.images import thumbnail
from medrlvr_jax.evaluation import monitors
from medrlvr_jax.host.processes import gather
from medrlvr_jax.rewards.stages import STAGES
from medrlvr_jax.rl.losses import explained_variance
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.types import Mean

MAX_FAILED = 16  # logged completions of a process and step on which the user's reward failed


def summarise(stats: dict[str, Any], scored: Scored) -> dict[str, float]:
    """Return the metrics of a step: shares and means of the rollout, then `policy/…` and `critic/…`."""
    v = scored.verdicts
    failed = np.isnan(v.reward)
    rows = {
        "reward": np.where(failed, 0, v.reward),
        "reward_failed": failed,
        "accuracy": v.correct,
        "format_ok": v.format_ok,
        "response_length": scored.lengths,
    }
    rows |= {"truncated": ~scored.stopped, "completions": np.ones(len(scored.places))}
    rows |= {f"monitor/{name}": column for name, column in monitors.flag_completions(scored).items()}
    if None not in scored.stages:
        rows |= {f"stage/{name}": np.array([s == name for s in scored.stages], bool) for name in STAGES}
    rows |= {f"reward/{name}": np.where(failed, 0, column) for name, column in v.reported_components.items()}
    rows |= v.row_metrics
    totals = gather({name: float(column.sum()) for name, column in rows.items()})  # of each process
    # A process without rows does not know whether stages are missing, so it names them.
    common = [name for name in rows if all(name in total for total in totals)]
    sums = {name: sum(total[name] for total in totals) for name in common}
    n = int(sums.pop("completions"))
    out = {name: total / n for name, total in sums.items()}
    out |= {"completions": n, "tokens": int(sums["response_length"])}
    paid = ("reward", *(f"reward/{name}" for name in v.reported_components))
    out |= {name: sums[name] / max(n - sums["reward_failed"], 1) for name in paid}  # where no reward failed
    return out | scalars(sharding.to_host(stats))


def scalars(stats: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that the device has computed; `stats` are already on the host."""
    out = {}
    if stats.get("critic") is not None:
        means = {name: Mean(*mean) for name, mean in stats["critic"].items()}
        out["critic/explained_variance"] = float(explained_variance(means))
    for name, value in stats.items():
        if isinstance(value, dict):
            out |= {f"{name}/{k}": float(mean.total / max(mean.count, 1e-9)) for k, mean in value.items()}
        elif name != "reward":
            out[name] = float(value)
    return out


def describe_alarms(
    alarms: list[monitors.Alarm], scored: Scored, metrics: dict[str, float], config: Config
) -> list[str]:
    """Return a message for each alarm, with the rows of all processes that show it best."""

    def examples(alarm: monitors.Alarm) -> list[list[Any]]:
        rows = monitors.example_rows(alarm, scored, metrics, config.sample.samples)
        return [[int(scored.places[i]), scored.completions[i]] for i in rows]

    gathered = gather([examples(alarm) for alarm in alarms]) if alarms else []
    texts = []
    for i, alarm in enumerate(alarms):
        rows = sorted(chain.from_iterable(part[i] for part in gathered))[: monitors.EXAMPLES]
        lines = [f"\n    row {place}: {textwrap.shorten(completion, 160)!r}" for place, completion in rows]
        texts.append(f"ALARM: {alarm.text}" + "".join(lines))
    return texts


def samples(parts: Parts, scored: Scored, n: int, step: int) -> list[dict[str, Any]]:
    """Return the records for samples.jsonl, gathered from all processes.

    These are the first samples of some of the step's n questions, spread evenly, and, at every step,
    completions on which the user's reward failed.
    """
    c = parts.config
    wanted = np.linspace(0, n - 1, min(c.log.samples, n)).astype(int) * c.sample.samples
    wanted = [] if not c.log.samples_every or step % c.log.samples_every else wanted
    logged = np.isin(scored.places, wanted)
    logged[list(scored.verdicts.failed)[:MAX_FAILED]] = True
    rows = [sample_record(parts, scored, row) for row in np.flatnonzero(logged).tolist()]
    return sorted(chain.from_iterable(gather(rows)), key=lambda r: r["row"])


def pass_counts(scored: Scored, samples: int) -> dict[str, Any]:
    """Return the line of questions.jsonl: how many samples of each question were right."""
    questions, correct = (scored.places // samples).tolist(), scored.verdicts.correct.tolist()
    rows = [(place, q.id, ok) for place, q, ok in zip(questions, scored.questions, correct, strict=True)]
    right: dict[tuple[int, str], int] = {}
    for place, question, ok in chain.from_iterable(gather(rows)):
        right[place, question] = right.get((place, question), 0) + ok
    return {"samples": samples, "right": {name: n for (_, name), n in sorted(right.items())}}


def sample_record(parts: Parts, scored: Scored, row: int) -> dict[str, Any]:
    """Return the record of this process's completion number `row`. The record's own `row` is the completion's
    place in the step.
    """
    tokens = scored.prompts[row]
    images = [thumbnail(image) for image in scored.questions[row].images]
    return {
        "row": int(scored.places[row]),
        "prompt": parts.tokenizer.show(tokens),
        "prompt_length": len(tokens),
        **({"images": images} if images else {}),
    } | scored.record(row)
