"""What users may name as reward.fn, good and bad; test_user_reward.py calls them in workers. POISON is the completion that does it."""

import os
import time

POISON = "poison"
number = 3


def length(completions, keys, options, questions):
    rows = zip(completions, keys, options, questions, strict=True)
    return [len(c) / 8 + (key == "B") + len(own) / 16 + (q == "?") / 64 for c, key, own, q in rows]


def raises(completions, *_):
    if POISON in completions:
        raise ValueError("no such drug")
    return [0.25] * len(completions)


def hangs(completions, *_):
    while POISON in completions:
        time.sleep(1)
    return [0.25] * len(completions)


def dies(completions, *_):
    if POISON in completions:
        os._exit(7)
    return [0.25] * len(completions)


def forgets(completions, *_):
    return [0.25 for c in completions if c != POISON]


def nan(completions, *_):
    return [float("nan") if c == POISON else 0.25 for c in completions]


def words(completions, *_):
    return ["good" if c == POISON else 0.25 for c in completions]


def always(*_):
    raise RuntimeError("the service is down")


def odd(completions, *_):
    """Fails on completions of an odd number of characters."""
    return [float("inf") if len(c) % 2 else len(c) / 64 for c in completions]
