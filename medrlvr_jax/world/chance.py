"""Random draws that are the same on every machine and Python version.

They use only `random.Random(str).random()`, whose values Python guarantees. NumPy does not guarantee those of
its Generator.
"""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

SEED = 2502_19655


def make_rng(purpose: object) -> Random:
    """Return the random generator of one purpose, such as a split."""
    return Random(f"{SEED} {purpose}")


def below(rng: Random, n: int) -> int:
    """Draw an integer from 0 to n − 1."""
    return int(rng.random() * n)


def pick(rng: Random, items: Sequence[T]) -> T:
    """Draw one of the items."""
    return items[below(rng, len(items))]


def shuffled(rng: Random, items: Sequence[T], n: int | None = None) -> list[T]:
    """Return the items in random order: all, or the first `n` of that order."""
    out = list(items)
    n = len(out) if n is None else min(n, len(out))
    for i in range(n):
        j = i + below(rng, len(out) - i)
        out[i], out[j] = out[j], out[i]
    return out[:n]


def pick_weighted(rng: Random, weights: dict[str, float]) -> str:
    """Draw a name with probability proportional to its weight."""
    u = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        u -= weight
        if u < 0:
            return name
    return list(weights)[-1]  # rounding left u at 0
