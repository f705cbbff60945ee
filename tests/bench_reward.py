"""Compare the time of `score` with that of loops over compiled regular expressions with the same verdicts.

    python tests/bench_reward.py [rows] [pairs]

One call scores 100,000 completions of 200 to 2,000 characters with all kinds of verdicts. Each pair times the
loops and then `score` on the same rows, in CPU seconds; the ratio is the median over pairs. `plain` is a
straightforward pattern. `tuned` is the fastest loop that we found: its pattern is unrolled at every `<`, and
in mode `paper` `str.find` skips the thought. The output is one JSON line per mode, and a last line with the
rule and all penalties for the 1,024 completions of a step.
"""

import json
import random
import re
import statistics
import sys
import time

import numpy as np

from medrlvr_jax.config.reward import (
    BeforeConfig,
    LeakConfig,
    LengthConfig,
    OverlongConfig,
    RepetitionConfig,
    RewardConfig,
    RuleConfig,
)
from medrlvr_jax.data.question import Question
from medrlvr_jax.rewards import grade, score
from medrlvr_jax.rewards.graders import TokenCounts

TERMS = """the patient presents with fever chest pain dyspnea on exertion an elevated troponin level suggests myocardial infarction
warfarin inhibits vitamin K epoxide reductase INR < 2.0 and LDL >100 mg/dL so option B is less likely than C given a history of
hypertension (BP 150/90 mmHg), beta-blockers reduce mortality; however, the most appropriate next step in management is therefore""".split()
OPTIONS = [
    "Coronary angiography",
    "Chest X-ray",
    "Transthoracic echocardiography",
    "Troponin measurement",
    "Watchful waiting",
]
WHITE = r"[ \t\n\v\f\r]*"
TAG = r"</?(?:think|answer)>"
PLAIN = {
    "paper": re.compile(rf"<think>.+?</think>{WHITE}<answer>{WHITE}([A-E]){WHITE}</answer>", re.S),
    "strict": re.compile(
        rf"{WHITE}<think>((?:(?!{TAG}).)*)</think>{WHITE}<answer>{WHITE}([A-E])(?:[.):]((?:(?!{TAG}).)*))?{WHITE}</answer>{WHITE}",
        re.S,
    ),
}
TUNED = {
    "paper": re.compile(rf"</think>{WHITE}<answer>{WHITE}([A-E]){WHITE}</answer>"),
    "strict": re.compile(
        rf"{WHITE}<think>([^<]*(?:<(?!/?(?:think|answer)>)[^<]*)*)</think>{WHITE}<answer>{WHITE}([A-E])"
        rf"(?:[.):]([^<]*(?:<(?!/?(?:think|answer)>)[^<]*)*))?{WHITE}</answer>{WHITE}"
    ),
}
ASCII_WHITE = " \t\n\v\f\r"


def completion(rng: random.Random) -> str:
    """Return a completion as in the middle of training: mostly well-formed, the others with various errors."""
    # one in ten is not ASCII
    thought = " ".join(rng.choices(TERMS, k=rng.randint(30, 300))) + rng.choice([""] * 9 + [" β₁"])
    letter = rng.choice("ABCDE")
    text = f"{letter}{rng.choice('.):')} {OPTIONS['ABCDE'.index(letter)]}"
    kind = rng.random()
    if kind < 0.60:
        return f"<think>{thought}</think>\n<answer>{letter}</answer>"
    if kind < 0.70:
        return f"<think>\n{thought}\n</think>\n\n<answer> {text} </answer>\n"
    if kind < 0.78:
        return f"{thought}<think>ok</think><answer>{letter}</answer>"
    return rng.choice(
        [
            thought,
            f"<think>{thought}",
            f"<think>{thought}</think>\nThe answer is {letter}.",
            f"<think>{thought}</think>\n<answer>A, B, C, D, E</answer>",
            f"<think>{thought}</think>\n<answer>{letter}</answer><answer>A</answer>",
            f"<think>{thought}</think> So: <answer>{letter}</answer>",
            f"<think></think><answer>{letter}</answer> {thought}",
            f"<think>{thought}</think>\n<answer>{letter}. Aspirin</answer>",
            f"<think>{thought}</think>\n<answer>Ｃ</answer>",
        ]
    )


def loop(
    mode: str,
    pattern: re.Pattern,
    completions: list[str],
    answers: list[str],
    options: list[list[str]],
    tuned: bool,
):
    """Compute all fields of Verdicts except the reason, one completion at a time. All questions have five
    options, so one pattern is enough.
    """
    rewards, letters, format_ok, correct = [], [], [], []
    for i, text in enumerate(completions):
        letter = ""
        if mode == "strict":
            if (m := pattern.fullmatch(text)) and m[1].strip(ASCII_WHITE):
                option = options[i]["ABCDE".index(m[2])].strip(ASCII_WHITE)
                letter = m[2] if m[3] is None or m[3].strip(ASCII_WHITE) == option else ""
        elif tuned:
            opened = text.find("<think>")
            m = pattern.search(text, opened + 8) if opened >= 0 else None
            letter = m[1] if m else ""
        elif m := pattern.search(text):
            letter = m[1]
        letters.append(letter)
        format_ok.append(letter != "")
        correct.append(letter == answers[i])
        rewards.append(-1.0 if not letter else 1.0 if letter == answers[i] else 0.0)
    return np.array(rewards, np.float32), np.array(format_ok), np.array(correct), np.array(letters)


def timed(function, *args):
    start = time.process_time()
    out = function(*args)
    return out, time.process_time() - start


def main(rows: int = 100_000, pairs: int = 5) -> None:
    rng = random.Random(0)
    completions, answers = [completion(rng) for _ in range(rows)], rng.choices("ABCDE", k=rows)
    options = [OPTIONS] * rows
    lengths = sorted(map(len, completions))
    rewards = {}
    for mode in ("paper", "strict"):
        seconds = {"score": [], "plain": [], "tuned": []}
        for _ in range(pairs):
            # new strings, as from a tokenizer, because Python caches the UTF-8 form of a str
            completions = [c[:9] + c[9:] for c in completions]
            (plain, t) = timed(loop, mode, PLAIN[mode], completions, answers, options, False)
            seconds["plain"].append(t)
            (tuned, t) = timed(loop, mode, TUNED[mode], completions, answers, options, True)
            seconds["tuned"].append(t)
            (verdicts, t) = timed(score, completions, answers, options, RewardConfig(mode=mode))
            seconds["score"].append(t)
            rewards = {str(v): int((verdicts.reward == v).sum()) for v in (-1, 0, 1)}
            columns = verdicts.reward, verdicts.format_ok, verdicts.correct, verdicts.answer
            for expected in (plain, tuned):
                assert all(map(np.array_equal, expected, columns))
        ratio = {
            k: statistics.median(t / s for t, s in zip(seconds[k], seconds["score"], strict=True))
            for k in ("plain", "tuned")
        }
        figures = {
            "mode": mode,
            "rows": rows,
            "characters": {"least": lengths[0], "median": lengths[rows // 2], "most": lengths[-1]},
            "rewards": rewards,
            "seconds": {k: round(statistics.median(v), 4) for k, v in seconds.items()},
            "times_faster_than_plain": round(ratio["plain"], 1),
            "times_faster_than_tuned": round(ratio["tuned"], 2),
        }
        print(json.dumps(figures), flush=True)
    penalties(completions[:1024], answers)


def penalties(completions: list[str], answers: list[str], runs: int = 31) -> None:
    components = (
        LeakConfig(),
        BeforeConfig(),
        OverlongConfig(buffer=64),
        LengthConfig(budget=256),
        RepetitionConfig(),
    )
    config = RewardConfig(components=(RuleConfig(), *components))
    lengths = np.array([len(c) // 4 for c in completions])
    tokens = TokenCounts(lengths, lengths < 512, 512)
    questions = [Question("", "", tuple(OPTIONS), "ABCDE".index(answer)) for answer in answers]
    seconds = []
    for _ in range(runs):
        fresh = [c[:9] + c[9:] for c in completions]
        seconds.append(timed(grade, fresh, questions[: len(fresh)], config, tokens)[1])
    figures = {"median": statistics.median(seconds), "least": min(seconds)}
    print(json.dumps({"penalties": len(components), "rows": len(completions), "seconds": figures}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
