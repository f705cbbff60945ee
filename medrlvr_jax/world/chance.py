"""Draws that are the same everywhere: from `random.Random(str).random()`, which Python keeps the same in all
versions; NumPy's Generator does not.
"""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

SEED = 2502_19655


def generator(name: object) -> Random:
    """The draws of one purpose."""
    return Random(f"{SEED} {name}")


def below(rng: Random, n: int) -> int:
    return int(rng.random() * n)


def pick(rng: Random, items: Sequence[T]) -> T:
    return items[below(rng, len(items))]


def shuffled(rng: Random, items: Sequence[T], n: int | None = None) -> list[T]:
    """All items in some order, or `n` of them."""
    out = list(items)
    n = len(out) if n is None else min(n, len(out))
    for i in range(n):
        j = i + below(rng, len(out) - i)
        out[i], out[j] = out[j], out[i]
    return out[:n]


def weighted(rng: Random, shares: dict[str, float]) -> str:
    u = rng.random() * sum(shares.values())
    for name, share in shares.items():
        u -= share
        if u < 0:
            return name
    return list(shares)[-1]  # rounding left u at 0
