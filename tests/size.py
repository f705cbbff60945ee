"""Measure the size of `stats.contrast`: how often it finds a difference between equally good methods. It
should be 5 %.

    python tests/size.py [TRIALS]

Two equally good methods answer n questions of different difficulty, each with several runs. Each run has a
seed effect, normal on the scale of log-odds, that is common to all of its answers. A question may suit one
method better (`suits`). A base model has one run without a seed effect. The output also has the share of 95 %
intervals without 0 (equal by construction), and the standard deviation of the runs' accuracies in points.
"""

import sys

import numpy as np

from medrlvr_jax.evaluation import stats

CASES = [
    (runs, effect, suits)
    for runs in ((3, 3), (1, 3), (5, 5))
    for suits in (0.0, 0.7)
    for effect in (0.0, 0.1, 0.2, 0.4)
]


def size(runs, effect, suits=0.0, n=400, trials=2000, seed=0):
    """Return (share of p below 0.05, share of intervals without 0, standard deviation of a run's accuracy).
    An arm with 1 run is a base model.
    """
    rng, fixed = np.random.default_rng([seed, *runs]), tuple(k == 1 for k in runs)
    found, spread = [], []

    def arm(difficulty, k):
        own = difficulty + rng.normal(0, suits, n)
        logits = own[:, None] + (0 if k == 1 else rng.normal(0, effect, k))
        return (rng.random((n, k)) < 1 / (1 + np.exp(-logits))).astype(float)

    for _ in range(trials):
        difficulty = rng.normal(0, 1.5, n)
        a, b = (arm(difficulty, k) for k in runs)
        c = stats.contrast(a, b, fixed)
        found.append((c.p < 0.05, not c.low <= 0 <= c.high))
        spread.append(b.mean(0).var(ddof=1))
    return *np.mean(found, 0), float(np.sqrt(np.mean(spread)))


if __name__ == "__main__":
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    for runs, effect, suits in CASES:
        p, interval, spread = size(runs, effect, suits, trials=trials)
        print(
            f"{runs[0]} against {runs[1]} runs, suits {suits}, seed effect {effect} ({100 * spread:.1f} points):",
            end=" ",
        )
        print(f"p < 0.05 in {100 * p:.1f} %, intervals without 0 {100 * interval:.1f} %")
