"""What goes wrong in a run, said while it goes wrong: shares of bad completions, excursions of the curves, rewards that teach nothing.

`flags` looks at each completion of a step, `letters` at its answers; their shares are metrics, `monitor/…`. `alarms` holds a step's
metrics against the limits below, and the moving ones against the run's own last steps, which are read from metrics.jsonl: a
resumed run raises the same alarms. A share's rows are named by their places in the step's batch, question · samples + sample.
"""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from medrlvr_jax.config.schema import Config
from medrlvr_jax.evaluation import stats
from medrlvr_jax.host.processes import gather
from medrlvr_jax.rewards import stages
from medrlvr_jax.rewards.rule import leaks
from medrlvr_jax.rollout.rollout import Scored

WINDOW, ENOUGH = 20, 5  # the last steps that a moving limit is the median of; fewer than so many say nothing
AGAIN = 10  # steps after which an alarm that goes on is said again
EXAMPLES = 2  # rows named in a notice, from each process
AFTER_LEAK = 5  # words that follow an answer stated too early
HEDGES, HEDGED = 3, 0.04  # hedges in a completion, and their share of its words, from which on it hedges
REPEATS = 0.5  # share of repeated 4-grams, as `stages` has it

HIGH = {  # metric: the share above which it is an alarm, and what to say
    "monitor/hacks": (0.10, "direct-answer hacks and reasoning before <think>"),
    "monitor/leak": (0.20, "the answer is stated well before the end of the thought"),
    "monitor/hedging": (0.25, "hedging"),
    "monitor/repetition": (0.10, "over half of the 4-grams repeat"),
    "truncated": (0.25, "cut off by sample.max_new_tokens"),
    "equal_groups": (0.80, "questions whose samples all have the same reward, which teach nothing by comparison"),
    "reward_clipped": (0.10, "rewards cut by advantage.reward_clip: what lies beyond it is not told apart; raise it, or scale the rewards"),
    "sampler_ratio_far": (0.01, "tokens whose probability differs by over 10 % between sampler and trainer"),
}
SAMPLER_FAR = {"float32": HIGH["sampler_ratio_far"][0], "bfloat16": 0.05}  # by model.dtype; two real models have 0.0 and 2.0 % in bfloat16
MOVES = {  # metric: the least and the greatest multiple of its recent median, a value below which it may do what it likes
    "response_length": (0.5, 2.0, 0.0),
    "entropy": (0.33, 3.0, 0.02),
    "kl": (0.0, 4.0, 0.05),
}
RARE = 5  # keys of a letter that are too few for χ²
LETTER_P, LETTER_SHIFT = 1e-3, 0.15  # χ² of one answer a question against the keys, and half the sum of the shares' differences

HEDGE = re.compile(
    r"\b(?:perhaps|maybe|possibly|probably|presumably|might|could be|may be|not (?:entirely |quite |very )?(?:sure|certain|clear)|unsure"
    r"|uncertain|unclear|(?:hard|difficult) to (?:say|tell)|it depends|i guess|seems?|appears? to|cannot (?:say|tell|determine))\b",
    re.I,
)


class Alarm(NamedTuple):
    name: str  # the metric
    text: str  # what is wrong, with the value and the limit
    high: bool = True  # too high, or too low


def flags(scored: Scored) -> dict[str, np.ndarray]:
    """Of each of a process's N rows, bool [N]: is it a hack, does it leak, hedge, repeat?"""
    told = {
        "hacks": [s in stages.HACKS for s in scored.stages],
        "leak": leak_early(scored.completions),
        "hedging": [hedges(c) for c in scored.completions],
        "repetition": [stages.repetition(c) > REPEATS for c in scored.completions],
    }
    return {name: np.array(column, bool) for name, column in told.items()}


def leak_early(completions: Sequence[str]) -> list[bool]:
    """Whether each one's thought states the answer (`rewards.LEAK`) and goes on for `AFTER_LEAK` words or more."""
    thoughts = [c.partition("<think>")[2].partition("</think>")[0] for c in completions]
    stated = zip(thoughts, leaks(thoughts), strict=True)
    return [match is not None and stages.words(thought[match.end() :]) >= AFTER_LEAK for thought, match in stated]


def hedges(completion: str) -> bool:
    count = len(HEDGE.findall(completion))
    return count >= HEDGES and count >= HEDGED * stages.words(completion)


def watch(scored: Scored, samples: int) -> dict[str, float]:
    """`monitor/letter_p` and `letter_shift` of the letters answered against the keys; all processes call it together.

    Of each question only the first sample counts, so that answers are independent of each other.
    """
    first = np.flatnonzero(scored.places % samples == 0).tolist()
    told = gather([[str(scored.verdicts.answer[i]) for i in first], [scored.questions[i].reference for i in first]])
    answers, key = (np.array([x for part in told for x in part[i]], str) for i in (0, 1))
    bias = stats.letter_bias(answers, key)
    rare = [letter for letter in bias["letters"] if (key == letter).sum() < RARE]  # χ² needs some of each: these count as one letter,
    left_out = rare if np.isin(key, rare).sum() < RARE else []  # or not at all
    p = stats.letter_bias(*(np.where(np.isin(x, rare), "rare", x)[~np.isin(x, left_out)] for x in (answers, key)))["p"]
    shift = sum(abs(share["answered"] - share["key"]) for share in bias["letters"].values()) / 2 if (answers != "").any() else 0.0
    return {"monitor/letter_p": p, "monitor/letter_shift": shift}


def count_idle(metrics: dict[str, Any], history: Sequence[dict[str, Any]]) -> dict[str, int]:
    """`monitor/constant_reward`: for how many steps in a row, this one included, nothing was learned from the rewards.

    That is where none of those that are compared differ after clipping (`no_contrast`), or the policy's gradient is exactly 0.
    """
    idle = metrics["no_contrast"] or (metrics.get("policy/grad_norm") == 0 and not metrics["policy/skipped"])
    before = history[-1].get("monitor/constant_reward", 0) if history else 0
    return {"monitor/constant_reward": 1 + before if idle else 0}


def why_idle(metrics: dict[str, Any], config: Config) -> str:
    """What a step that taught nothing looked like, from its metrics."""
    if metrics.get("unlearned") == 1:
        return "no question is left that can be learned from: reward.fn failed on samples of each"
    if metrics.get("reward_clipped"):
        limit, share = config.advantage.reward_clip, metrics["reward_clipped"]
        return f"{100 * share:.0f} % of the rewards, {metrics['reward']:g} on average, were cut to ±{limit:g} (advantage.reward_clip)"
    if not metrics.get("no_contrast", 1):
        return f"rewards of {metrics['reward']:g} on average differ, but the policy's gradient was exactly 0"
    if metrics.get("reward_std", 0) > 1e-6:  # not 0 by rounding alone
        return "rewards differed between questions, but never between samples of one, which is all that is compared"
    return f"all rewards were {metrics['reward']:g}"


def alarms(metrics: dict[str, Any], history: Sequence[dict[str, Any]], config: Config) -> list[Alarm]:
    """What is wrong with a step; `history` are the records of the steps before it, oldest first. A metric that is not there is well."""
    out = []
    for name, (limit, text) in HIGH.items():
        value = _number(metrics, name)
        if name == "sampler_ratio_far":
            if config.sample.weights != "same":
                continue  # another policy on purpose, and corrected for
            limit = SAMPLER_FAR[config.model.dtype]
        if name in ("equal_groups", "reward_clipped") and metrics.get("monitor/constant_reward"):
            continue  # said below, and louder
        if value > limit:
            out.append(Alarm(name, f"{100 * value:.1f} % {text} (limit {100 * limit:.0f} %)"))
    for name, (low, high, free) in MOVES.items():
        value, before = _number(metrics, name), [_number(r, name) for r in history[-WINDOW:]]
        before = [x for x in before if math.isfinite(x)]
        if not math.isfinite(value) or len(before) < ENOUGH:
            continue
        usual = statistics.median(before)
        if value < low * usual or (value > high * usual and value > free):
            times = f"{value / usual:.2g} times" if usual else "after"
            out.append(Alarm(name, f"{name} {value:.4g}, {times} the median of the last steps, {usual:.4g}", value > usual))
    p, shift = _number(metrics, "monitor/letter_p"), _number(metrics, "monitor/letter_shift")
    if p < LETTER_P and shift > LETTER_SHIFT:
        text = f"{100 * shift:.0f} % of the answers would have to change their letter to be as frequent as the keys (χ² p = {p:.1g})"
        out.append(Alarm("monitor/letter_shift", text))
    same = int(metrics.get("monitor/constant_reward") or 0)
    if same and not constant_by_choice(config):
        stop = config.log.stop_constant
        after = f"; after {stop} such steps in a row the run stops (log.stop_constant)" if stop else ""
        text = f"NOTHING IS LEARNED FROM THE REWARDS, for {same} step{'s' * (same > 1)} now: {why_idle(metrics, config)}{after}"
        out.append(Alarm("monitor/constant_reward", text))
    return out


def _number(record: dict[str, Any], name: str) -> float:
    """NaN where there is none: metrics.jsonl has null for what is not finite."""
    value = record.get(name)
    return math.nan if value is None else float(value)


def constant_by_choice(config: Config) -> bool:
    """A control run: the settings leave no other reward than one."""
    return config.reward.fn is None and config.reward.unformatted == config.reward.wrong == config.reward.correct


def stalled(metrics: dict[str, Any], config: Config) -> bool:
    """Whether the run is to stop: `log.stop_constant` steps in a row from which nothing was learned, and no settings that ask for that."""
    return 0 < config.log.stop_constant <= metrics.get("monitor/constant_reward", 0) and not constant_by_choice(config)


def mark(found: Sequence[Alarm], history: Sequence[dict[str, Any]]) -> tuple[dict[str, int], list[Alarm]]:
    """How many steps each alarm has lasted, as metrics `alarm/…`; and those to be said now: new ones, and lasting ones every `AGAIN`."""
    before = history[-1] if history else {}
    lasted = {f"alarm/{a.name.removeprefix('monitor/')}": 0 for a in found}
    lasted = {name: 1 + (before.get(name) or 0) for name in lasted}
    return lasted, [a for a, n in zip(found, lasted.values(), strict=True) if n % AGAIN == 1]


def examples(alarm: Alarm, scored: Scored, metrics: dict[str, Any], samples: int) -> list[int]:
    """Which of this process's rows show it best, at most `EXAMPLES`; for what only the device knows, the row that it named."""
    name = alarm.name.removeprefix("monitor/")
    told = flags(scored) | {"truncated": ~scored.stopped}
    if name in told:
        rows = np.flatnonzero(told[name])
    elif name == "response_length":
        rows = np.argsort(-scored.lengths if alarm.high else scored.lengths, kind="stable")
    elif name == "letter_shift":
        answers, key = scored.verdicts.answer, np.array([q.reference for q in scored.questions])
        wrong, counts = np.unique(answers[(answers != key) & (answers != "")], return_counts=True)
        rows = np.flatnonzero((answers != key) & (answers == wrong[counts.argmax()])) if len(wrong) else np.zeros(0, int)
    elif name == "equal_groups":
        rewards = scored.verdicts.reward.reshape(-1, samples)
        rows = np.flatnonzero((rewards == rewards[:, :1]).all(1).repeat(samples))[::samples]
    elif (at := f"row/{name}_{'high' if alarm.high else 'low'}") in metrics:
        rows = np.flatnonzero(scored.places == metrics[at])
    else:
        rows = np.arange(len(scored.places))
    return rows[:EXAMPLES].tolist()
