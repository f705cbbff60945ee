"""Alarms during training: bad completions, sudden changes of metrics, rewards that give no gradient.

`flag_completions` checks each completion of a step, and `letter_metrics` the answered letters. Their results
are the metrics `monitor/…`. `find_alarms` compares a step's metrics with the limits below, and some of them
with the run's last steps. Those come from metrics.jsonl, so a resumed run raises the same alarms.
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

WINDOW, ENOUGH = 20, 5  # moving limits use the median over the last WINDOW steps, if ENOUGH have a value
EXAMPLES = 2  # rows in a notice
LEAK_WORDS = 5  # a stated answer is too early if at least so many words of the thought follow
HEDGES, HEDGE_SHARE = 3, 0.04  # a completion hedges if it has this number and this share of hedging words
REPEATED = 0.5  # share of repeated 4-grams, as in `stages`

HIGH = {  # metric: its limit, a description of the share, and the remedy
    "monitor/hacks": (
        0.10,
        "of the answers have no reasoning, or have it outside of <think>",
        "read them in samples.jsonl; set reward.mode=strict and reward.before_penalty",
    ),
    "monitor/leak": (
        0.20,
        "of the thoughts state the answer long before their end",
        "set reward.leak_penalty, such as 0.5",
    ),
    "monitor/hedging": (
        0.25,
        "of the responses hedge (perhaps, might be, unclear) instead of deciding",
        "lower learn.policy.lr or raise kl.coef, and restart from an earlier checkpoint",
    ),
    "monitor/repetition": (
        0.10,
        "of the responses repeat themselves: over half of their 4-grams are repeats",
        "lower learn.policy.lr or raise kl.coef, and restart from an earlier checkpoint",
    ),
    "truncated": (
        0.25,
        "of the responses were cut off before their end",
        "raise sample.max_new_tokens",
    ),
    "dropped_groups": (
        0.80,
        "of the questions were dropped, because their samples had nearly the same rewards",
        "choose questions of middle difficulty (data.pass_count), or raise sample.samples",
    ),
    "equal_groups": (
        0.80,
        "of the questions have the same reward for all samples, so their advantages are 0",
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
        "set loss.sampler_cap, usually to 2.0; in float32, this should not happen",
    ),
}
SAMPLER_FAR = {"float32": 0.01, "bfloat16": 0.05}  # by model.dtype: real models have up to 2.0 % in bfloat16
STEADY = "lower learn.policy.lr or raise kl.coef if the responses became worse, too"
MOVES = {  # metric: description; lowest and highest multiple of its recent median; a floor that never alarms
    "response_length": ("tokens of a response", 0.5, 2.0, 0.0),
    "entropy": ("entropy of the policy's next-token distribution", 0.33, 3.0, 0.02),
    "kl": ("KL divergence from the reference", 0.0, 4.0, 0.05),
}
RARE = 5  # letters that are the key of fewer questions are too rare for the χ² test
LETTER_P, LETTER_SHIFT = 1e-3, 0.15  # limits of the two `letter_metrics`; both must be exceeded

HEDGE = re.compile(
    r"\b(?:perhaps|maybe|possibly|probably|presumably|might|could be|may be|unsure|uncertain|unclear"
    r"|not (?:entirely |quite |very )?(?:sure|certain|clear)|(?:hard|difficult) to (?:say|tell)|it depends"
    r"|i guess|seems?|appears? to|cannot (?:say|tell|determine))\b",
    re.I,
)


class Alarm(NamedTuple):
    name: str  # the metric
    text: str  # the problem with value and limit, and the remedy
    high: bool = True  # whether the value is too high; otherwise it is too low


def flag_completions(scored: Scored) -> dict[str, Bool[np.ndarray, " N"]]:
    """Return which of this process's N completions are hacks, leak the answer, hedge or repeat themselves."""
    columns = {
        "hacks": [s in stages.HACKS for s in scored.stages],
        "leak": leak_early(scored.completions),
        "hedging": [is_hedging(c) for c in scored.completions],
        "repetition": [stages.repetition(c) > REPEATED for c in scored.completions],
    }
    return {name: np.array(column, bool) for name, column in columns.items()}


def leak_early(completions: Sequence[str]) -> list[bool]:
    """Return whether each thought states the answer (`penalties.LEAK`) `LEAK_WORDS` words before its end."""
    thoughts = [c.partition("<think>")[2].partition("</think>")[0] for c in completions]
    pairs = zip(thoughts, find_leaks(thoughts), strict=True)
    return [match is not None and stages.words(text[match.end() :]) >= LEAK_WORDS for text, match in pairs]


def is_hedging(completion: str) -> bool:
    count = len(HEDGE.findall(completion))
    return count >= HEDGES and count >= HEDGE_SHARE * stages.words(completion)


def letter_metrics(scored: Scored, samples: int) -> dict[str, float]:
    """Compare the distribution of the answered letters with that of the keys. All must call it together.

    `monitor/letter_p` is the p value of the χ² test, and `monitor/letter_shift` half the sum of the absolute
    differences of the shares. Only the first of a question's samples counts, so that answers are independent.
    Letters with fewer than `RARE` keys are merged for the test, or left out if they are too few together.
    """
    first = np.flatnonzero(scored.places % samples == 0).tolist()
    first = [i for i in first if scored.questions[i].letters]  # the questions that one letter answers
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


# --- rewards without a gradient ---


def count_idle(metrics: dict[str, Any], history: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return `monitor/constant_reward`: the number of consecutive steps, up to this one, without learning.

    A step learns nothing if no compared rewards differ after clipping (`no_contrast`), or if the policy's
    gradient is exactly 0.
    """
    idle = metrics["no_contrast"] or (metrics.get("policy/grad_norm") == 0 and not metrics["policy/skipped"])
    before = history[-1].get("monitor/constant_reward", 0) if history else 0
    return {"monitor/constant_reward": 1 + before if idle else 0}


def explain_idle(metrics: dict[str, Any], config: Config) -> str:
    """Return why nothing was learned in a step, from its metrics."""
    if metrics.get("unlearned") == 1:
        if metrics.get("reward_failed") == 0:
            return "no response is left to learn from: drop_equal_groups and mask_truncated remove all"
        return "no question is left to learn from: the user's reward failed on samples of each"
    if share := metrics.get("reward_clipped"):
        clipped = f"were cut to ±{config.advantage.reward_clip:g} (advantage.reward_clip)"
        return f"{100 * share:.0f} % of the rewards, {metrics['reward']:g} on average, {clipped}"
    if not metrics.get("no_contrast", 1):
        return f"rewards of {metrics['reward']:g} on average differ, but the policy's gradient was exactly 0"
    if metrics.get("reward_std", 0) > 1e-6:  # larger than a rounding error
        return "rewards differed between questions, but not between samples of one, which are compared"
    return f"all rewards were {metrics['reward']:g}"


def has_constant_reward(config: Config) -> bool:
    """Return whether the settings allow one reward only, as in a control run."""
    reward = config.reward
    by_rule = reward.fn is None and not reward.components
    return by_rule and reward.unformatted == reward.wrong == reward.correct


def has_stalled(metrics: dict[str, Any], config: Config) -> bool:
    """Return whether the run must stop, because `log.stop_constant` consecutive steps learned nothing."""
    idle = metrics.get("monitor/constant_reward", 0)
    return 0 < config.log.stop_constant <= idle and not has_constant_reward(config)


# --- alarms ---


def find_alarms(metrics: dict[str, Any], history: Sequence[dict[str, Any]], config: Config) -> list[Alarm]:
    """Return the alarms of a step. `history` are the records of the earlier steps, oldest first.

    Absent metrics raise no alarm.
    """
    out = []
    idle = int(metrics.get("monitor/constant_reward") or 0)
    skipped = {"equal_groups", "reward_clipped"} if idle else set()  # the last alarm below includes them
    if config.sample.weights != "same":
        skipped.add("sampler_ratio_far")  # quantised weights are another policy, and the loss corrects for it
    for name, (limit, text, remedy) in HIGH.items():
        limit = SAMPLER_FAR[config.model.dtype] if name == "sampler_ratio_far" else limit
        value = _number(metrics, name)
        if name not in skipped and value > limit:
            out.append(Alarm(name, f"{100 * value:.1f} % {text} (limit {100 * limit:.0f} %); {remedy}"))
    for name, (description, low, high, floor) in MOVES.items():
        value, before = _number(metrics, name), [_number(r, name) for r in history[-WINDOW:]]
        before = [x for x in before if math.isfinite(x)]
        if not math.isfinite(value) or len(before) < ENOUGH:
            continue
        usual = statistics.median(before)
        if value < low * usual or (value > high * usual and value > floor):
            times = f"{value / usual:.2g} times" if usual else "above"
            text = f"{description}: {value:.4g}, {times} the median of the last steps, {usual:.4g}; {STEADY}"
            out.append(Alarm(name, text, value > usual))
    p, shift = _number(metrics, "monitor/letter_p"), _number(metrics, "monitor/letter_shift")
    if p < LETTER_P and shift > LETTER_SHIFT:
        text = f"the model prefers some letters: {100 * shift:.0f} % of its answers would need another letter"
        text += f" to be distributed as the keys are (χ² p = {p:.1g}); set data.shuffle_options=true"
        out.append(Alarm("monitor/letter_shift", text))
    if idle and not has_constant_reward(config):
        limit = config.log.stop_constant
        stop = f"; after {limit} such steps in a row the run stops (log.stop_constant)" if limit else ""
        text = f"NOTHING IS LEARNED FROM THE REWARDS, for {idle} step{'s' * (idle > 1)} now"
        out.append(Alarm("monitor/constant_reward", f"{text}: {explain_idle(metrics, config)}{stop}"))
    return out


def _number(record: dict[str, Any], name: str) -> float:
    """Return a metric; NaN if it is absent or null, which stands for a value that is not finite."""
    value = record.get(name)
    return math.nan if value is None else float(value)


def count_durations(
    alarms: Sequence[Alarm], history: Sequence[dict[str, Any]]
) -> tuple[dict[str, int], list[Alarm]]:
    """Return for how many steps each alarm has lasted, as metrics `alarm/…`, and the alarms that are due."""
    before = history[-1] if history else {}
    names = [f"alarm/{alarm.name.removeprefix('monitor/')}" for alarm in alarms]
    durations = {name: 1 + (before.get(name) or 0) for name in names}
    due = [alarm for alarm, name in zip(alarms, names, strict=True) if is_due(alarm.name, durations[name])]
    return durations, due


def example_rows(alarm: Alarm, scored: Scored, metrics: dict[str, Any], samples: int) -> list[int]:
    """Return at most `EXAMPLES` of this process's rows that show an alarm best.

    For metrics of the device it is the row in `row/<metric>_high` or `_low`.
    """
    name = alarm.name.removeprefix("monitor/")
    flagged = flag_completions(scored) | {"truncated": ~scored.stopped}
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
