"""Good and bad reward functions for `reward.fn`; test_user_reward.py calls them in workers. The bad ones
fail at the completion POISON.
"""

import asyncio
import os
import random
import time

import numpy as np

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


def digits(completions, *_):
    return ["0.25" if c == POISON else 0.25 for c in completions]


def absent(completions, *_):
    return [None if c == POISON else 0.25 for c in completions]


def boxed(completions, *_):
    return [np.array([0.25]) if c == POISON else 0.25 for c in completions]


def huge(completions, *_):
    return [1e39 if c == POISON else 0.25 for c in completions]


def silent(completions, *_):
    return None if POISON in completions else [0.25] * len(completions)


def array(completions, *_):
    return np.arange(1, len(completions) + 1) % 2


def generator(completions, *_):
    return ((i + 1) % 2 for i, _ in enumerate(completions))


def views(completions, *_):
    return {i: (i + 1) % 2 for i, _ in enumerate(completions)}.values()


def booleans(completions, *_):
    return [i % 2 == 0 for i, _ in enumerate(completions)]


def mean(completions, *_):
    """Return one value for any batch."""
    return [sum(map(len, completions)) / len(completions)]


def mean_raises(completions, *_):
    if POISON in completions:
        raise ValueError("no such drug")
    return [0.25]


def distinct(completions, *_):
    """Return one value for equal completions."""
    return dict.fromkeys(completions, 0.25).values()


def doubled(completions, *_):
    return [0.25] * (2 * len(completions))


def mapping(completions, *_):
    return {i: 0.25 for i, _ in enumerate(completions)}


def columns(completions, *_):
    return np.full((len(completions), 1), 0.25)


def lists(completions, *_):
    return [[0.25] for _ in completions]


def scalar(*_):
    return 0.25


def dice(completions, *_):
    """Return other values at each call and in each process, like a judge that samples."""
    return [random.SystemRandom().random() for _ in completions]


def always(*_):
    raise RuntimeError("the service is down")


def odd(completions, *_):
    """Fail on completions with an odd number of characters."""
    return [float("inf") if len(c) % 2 else len(c) / 64 for c in completions]


async def asks(completion, question):
    """Stand for a judge over a network: slow, and without an answer at POISON."""
    await asyncio.sleep(60 if completion == POISON else 0.01)
    if completion == "raises":
        raise ValueError("no such drug")
    return None if completion == "absent" else len(completion) / 8 + (question == "?")


async def needs(completion, reference):
    return 0.0
