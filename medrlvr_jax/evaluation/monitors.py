"""Alarms while a run goes on: shares of bad completions, jumps of the curves, rewards that teach nothing.

`flags` looks at each completion of a step, `watch` at its answers; their shares are metrics, `monitor/…`.
`alarms` compares a step's metrics with the limits below, and some with the run's last steps. Those are read
from metrics.jsonl, so a resumed run raises the same alarms.
"""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from medrlvr_jax.config.schema import Config
from medrlvr_jax.evaluation import stats
from medrlvr_jax.host.processes import gather
from medrlvr_jax.rewards import stages
from medrlvr_jax.rewards.penalties import find_leaks
from medrlvr_jax.rollout.rollout import Scored
from medrlvr_jax.runs.metrics import is_due

WINDOW, ENOUGH = 20, 5  # a moving limit follows the median of the last WINDOW steps; it needs ENOUGH
EXAMPLES = 2  # rows named in a notice, from each process
AFTER_LEAK = 5  # words that follow an answer stated too early
HEDGES, HEDGED = 3, 0.04  # a completion hedges from so many hedges on, if they are this share of its words
REPEATS = 0.5  # share of repeated 4-grams, as in `stages`

HIGH = {  # metric: the share above which it is an alarm, what it is a share of, and the remedy
    "monitor/hacks": (
        0.10,
        "of the answers have no reasoning, or have it outside of <think>",
        "look at them in samples.jsonl; reward.mode=strict and reward.before_penalty do not pay for them",
    ),
    "monitor/leak": (
        0.20,
        "of the thoughts state the answer long before their end",
        "set reward.leak_penalty, such as 0.5",
    ),
    "monitor/hedging": (
        0.25,
        "of the responses hedge (perhaps, might be, unclear) where they should decide",
        "lower learn.policy.lr or raise kl.coef, and begin again at an earlier checkpoint",
    ),
    "monitor/repetition": (
        0.10,
        "of the responses repeat themselves: over half of their runs of four words come again",
        "lower learn.policy.lr or raise kl.coef, and begin again at an earlier checkpoint",
    ),
    "truncated": (
        0.25,
        "of the responses were cut off before their end",
        "raise sample.max_new_tokens",
    ),
    "dropped_groups": (
        0.80,
        "of the questions gave all their samples nearly the same reward and were dropped",
        "choose questions of middle difficulty (data.pass_count), or raise sample.samples",
    ),
    "equal_groups": (
        0.80,
        "of the questions gave all their samples the same reward, which teaches nothing",
        "choose questions by data.pass_count (medrlvr difficulty), or raise sample.samples",
    ),
    "reward_clipped": (
        0.10,
        "of the rewards were cut by advantage.reward_clip",
        "raise it, or scale the rewards",
    ),
    "sampler_ratio_far": (
        0.01,
        "of the tokens differ by over 10 % in probability between sampler and trainer",
        "set loss.sampler_cap, 2.0 is usual; it should not happen in float32",
    ),
}
SAMPLER_FAR = {"float32": 0.01, "bfloat16": 0.05}  # by model.dtype: real models have up to 2.0 % in bfloat16
STEADY = "lower learn.policy.lr or raise kl.coef if the responses got worse with it"
MOVES = {  # metric: what it is; least and greatest multiple of its recent median; a floor that never alarms
    "response_length": ("tokens of a response", 0.5, 2.0, 0.0),
    "entropy": ("entropy (how undecided the model is between next words)", 0.33, 3.0, 0.02),
    "kl": ("kl (how far the model is from where it started)", 0.0, 4.0, 0.05),
}
RARE = 5  # fewer keys of a letter than this are too few for χ²
LETTER_P, LETTER_SHIFT = 1e-3, 0.15  # limits of `watch`'s two metrics; both must be passed

HEDGE = re.compile(
    r"\b(?:perhaps|maybe|possibly|probably|presumably|might|could be|may be|unsure|uncertain|unclear"
    r"|not (?:entirely |quite |very )?(?:sure|certain|clear)|(?:hard|difficult) to (?:say|tell)|it depends"
    r"|i guess|seems?|appears? to|cannot (?:say|tell|determine))\b",
    re.I,
)


class Alarm(NamedTuple):
    name: str  # the metric
    text: str  # what is wrong, with the value and the limit
    high: bool = True  # too high, or too low


def flags(scored: Scored) -> dict[str, Bool[np.ndarray, " N"]]:
    """Of each of a process's N rows: is it a hack, does it leak, hedge, repeat?"""
    columns = {
        "hacks": [s in stages.HACKS for s in scored.stages],
        "leak": leak_early(scored.completions),
        "hedging": [hedges(c) for c in scored.completions],
        "repetition": [stages.repetition(c) > REPEATS for c in scored.completions],
    }
    return {name: np.array(column, bool) for name, column in columns.items()}


def leak_early(completions: Sequence[str]) -> list[bool]:
    """Whether each thought states the answer (`penalties.LEAK`) and goes on for `AFTER_LEAK` words."""
    thoughts = [c.partition("<think>")[2].partition("</think>")[0] for c in completions]
    pairs = zip(thoughts, find_leaks(thoughts), strict=True)
    return [match is not None and stages.words(text[match.end() :]) >= AFTER_LEAK for text, match in pairs]


def hedges(completion: str) -> bool:
    count = len(HEDGE.findall(completion))
    return count >= HEDGES and count >= HEDGED * stages.words(completion)


def watch(scored: Scored, samples: int) -> dict[str, float]:
    """Do the letters answered differ from those of the keys? All processes call it together.

    `monitor/letter_p` is the χ² test's p; `monitor/letter_shift` is half the sum of the shares' differences.
    Of each question only the first sample counts, so that answers are independent. Letters with fewer than
    RARE keys, too few for χ², count as one; or not at all, where they are too few together.
    """
    first = np.flatnonzero(scored.places % samples == 0).tolist()
    first = [i for i in first if scored.questions[i].letters]  # others are not answered by one letter
    given = [str(scored.verdicts.answer[i]) for i in first]
    parts = gather([given, [scored.questions[i].reference for i in first]])
    answers, key = (np.array([x for part in parts for x in part[i]], str) for i in (0, 1))
    if not len(key):
        return {}
    bias = stats.letter_bias(answers, key)
    rare = [letter for letter in bias["letters"] if (key == letter).sum() < RARE]
    left_out = rare if np.isin(key, rare).sum() < RARE else []
    merged = (np.where(np.isin(x, rare), "rare", x)[~np.isin(x, left_out)] for x in (answers, key))
    shares = bias["letters"].values() if (answers != "").any() else ()
    shift = sum(abs(share["answered"] - share["key"]) for share in shares) / 2
    return {"monitor/letter_p": stats.letter_bias(*merged)["p"], "monitor/letter_shift": shift}


# --- rewards that teach nothing ---


def count_idle(metrics: dict[str, Any], history: Sequence[dict[str, Any]]) -> dict[str, int]:
    """`monitor/constant_reward`: in how many steps in a row, with this one, the rewards taught nothing.

    That is where no compared rewards differ after clipping (`no_contrast`), or the gradient is exactly 0.
    """
    idle = metrics["no_contrast"] or (metrics.get("policy/grad_norm") == 0 and not metrics["policy/skipped"])
    before = history[-1].get("monitor/constant_reward", 0) if history else 0
    return {"monitor/constant_reward": 1 + before if idle else 0}


def why_idle(metrics: dict[str, Any], config: Config) -> str:
    """Why a step taught nothing, from its metrics."""
    if metrics.get("unlearned") == 1:
        if metrics.get("reward_failed") == 0:
            return "no response is left to learn from: drop_equal_groups and mask_truncated leave all out"
        return "no question is left that can be learned from: the user's reward failed on samples of each"
    if share := metrics.get("reward_clipped"):
        clipped = f"were cut to ±{config.advantage.reward_clip:g} (advantage.reward_clip)"
        return f"{100 * share:.0f} % of the rewards, {metrics['reward']:g} on average, {clipped}"
    if not metrics.get("no_contrast", 1):
        return f"rewards of {metrics['reward']:g} on average differ, but the policy's gradient was exactly 0"
    if metrics.get("reward_std", 0) > 1e-6:  # not 0 by rounding alone
        return "rewards differed between questions, but never between samples of one, which are compared"
    return f"all rewards were {metrics['reward']:g}"


def constant_by_choice(config: Config) -> bool:
    """A control run: the settings leave no other reward than one."""
    reward = config.reward
    by_rule = reward.fn is None and not reward.components
    return by_rule and reward.unformatted == reward.wrong == reward.correct


def stalled(metrics: dict[str, Any], config: Config) -> bool:
    """Whether the run is to stop: `log.stop_constant` steps in a row taught nothing, and not by choice."""
    idle = metrics.get("monitor/constant_reward", 0)
    return 0 < config.log.stop_constant <= idle and not constant_by_choice(config)


# --- alarms ---


def alarms(metrics: dict[str, Any], history: Sequence[dict[str, Any]], config: Config) -> list[Alarm]:
    """What is wrong with a step. `history` are the records of the steps before it, oldest first.

    A metric that is absent raises no alarm.
    """
    out = []
    idle = int(metrics.get("monitor/constant_reward") or 0)
    skipped = {"equal_groups", "reward_clipped"} if idle else set()  # the last alarm below reports them
    if config.sample.weights != "same":
        skipped.add("sampler_ratio_far")  # the sampler is another policy on purpose, and corrected for
    for name, (limit, text, remedy) in HIGH.items():
        limit = SAMPLER_FAR[config.model.dtype] if name == "sampler_ratio_far" else limit
        value = _number(metrics, name)
        if name not in skipped and value > limit:
            out.append(Alarm(name, f"{100 * value:.1f} % {text} (limit {100 * limit:.0f} %); {remedy}"))
    for name, (what, low, high, floor) in MOVES.items():
        value, before = _number(metrics, name), [_number(r, name) for r in history[-WINDOW:]]
        before = [x for x in before if math.isfinite(x)]
        if not math.isfinite(value) or len(before) < ENOUGH:
            continue
        usual = statistics.median(before)
        if value < low * usual or (value > high * usual and value > floor):
            times = f"{value / usual:.2g} times" if usual else "after"
            text = f"{what}: {value:.4g}, {times} the median of the last steps, {usual:.4g}; {STEADY}"
            out.append(Alarm(name, text, value > usual))
    p, shift = _number(metrics, "monitor/letter_p"), _number(metrics, "monitor/letter_shift")
    if p < LETTER_P and shift > LETTER_SHIFT:
        text = f"the model prefers some letters whatever the question: {100 * shift:.0f} % of its answers"
        text += " would have to change their letter to be spread as the keys"
        remedy = "set data.shuffle_options=true"
        out.append(Alarm("monitor/letter_shift", f"{text} (χ² p = {p:.1g}); {remedy}"))
    if idle and not constant_by_choice(config):
        stop = config.log.stop_constant
        after = f"; after {stop} such steps in a row the run stops (log.stop_constant)" if stop else ""
        text = f"NOTHING IS LEARNED FROM THE REWARDS, for {idle} step{'s' * (idle > 1)} now"
        out.append(Alarm("monitor/constant_reward", f"{text}: {why_idle(metrics, config)}{after}"))
    return out


def _number(record: dict[str, Any], name: str) -> float:
    """NaN where there is none: metrics.jsonl has null for what is not finite."""
    value = record.get(name)
    return math.nan if value is None else float(value)


def mark(found: Sequence[Alarm], history: Sequence[dict[str, Any]]) -> tuple[dict[str, int], list[Alarm]]:
    """How many steps each alarm has lasted, as metrics `alarm/…`; and those to report now (`is_due`)."""
    before = history[-1] if history else {}
    names = [f"alarm/{alarm.name.removeprefix('monitor/')}" for alarm in found]
    durations = {name: 1 + (before.get(name) or 0) for name in names}
    due = [alarm for alarm, name in zip(found, names, strict=True) if is_due(alarm.name, durations[name])]
    return durations, due


def examples(alarm: Alarm, scored: Scored, metrics: dict[str, Any], samples: int) -> list[int]:
    """At most `EXAMPLES` of this process's rows that show it best.

    For what only the device knows, that is the row which the metrics name.
    """
    name = alarm.name.removeprefix("monitor/")
    flagged = flags(scored) | {"truncated": ~scored.stopped}
    if name in flagged:
        rows = np.flatnonzero(flagged[name])
    elif name == "response_length":
        rows = np.argsort(-scored.lengths if alarm.high else scored.lengths, kind="stable")
    elif name == "letter_shift":
        answers, key = scored.verdicts.answer, np.array([q.reference for q in scored.questions])
        wrong, counts = np.unique(answers[(answers != key) & (answers != "")], return_counts=True)
        most = wrong[counts.argmax()] if len(wrong) else None
        rows = np.flatnonzero((answers != key) & (answers == most))
    elif name == "equal_groups":
        rewards = scored.verdicts.reward.reshape(-1, samples)
        rows = np.flatnonzero((rewards == rewards[:, :1]).all(1)) * samples
    elif (row := f"row/{name}_{'high' if alarm.high else 'low'}") in metrics:
        rows = np.flatnonzero(scored.places == metrics[row])
    else:
        rows = np.arange(len(scored.places))
    return rows[:EXAMPLES].tolist()
