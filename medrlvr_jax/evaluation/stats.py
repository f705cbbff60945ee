"""What an accuracy can and cannot show: intervals, paired tests, pass@k, the boundary between two models.

Everything is per question. `correct` is bool or float [n] (one answer a question, or the share of its samples that are right) or
bool [n, k] (k samples of each question). Samples of one question are not independent, so intervals and tests are over questions.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from scipy.special import gammaln

DRAWS = 10_000  # bootstrap resamples
ROOM = 0.1  # above chance, without which nothing is said beyond it
Z95 = 1.959964


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def wilson(correct: float, n: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default. (0, 1) for n = 0.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), with p = correct / n. Unlike p ± z √(p(1−p)/n) it never leaves [0, 1] and does
    not shrink to a point at 0 of n. E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209–212.
    """
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def mean_share(values: np.ndarray) -> Interval:
    """The mean of values in [0, 1] and its 95 % interval over questions: float [n], one each, or [n, k], of k runs with seeds of their own.

    Wilson's, of as many questions as would give the mean's variance σ² if each were wholly right or wholly wrong: p(1−p) / σ². Of one
    answer a question that is n. σ² / p(1−p) is taken with two questions of value 1 and two of 0 added (as Agresti & Coull, Am. Stat. 52,
    1998, do), so that it is not told from a handful of right answers, nor is 0 where all values are alike. Of several runs the interval
    is over questions and seeds, both random (see `contrast`).
    """
    x = np.asarray(values, np.float64).reshape(len(values), -1)
    (n, k), mean, padded = x.shape, float(x.mean()), np.concatenate([x.mean(1), [0.0, 0.0, 1.0, 1.0]])
    scale = float(padded.mean() * (1 - padded.mean()))
    questions, seeds = float(padded.var()) / n, 0.0
    if k > 1:
        between, residual = _over_runs(x)
        questions, seeds = questions - residual / (n * k), between / k
    size = scale / (questions + seeds)
    z = float(scipy.stats.t.ppf(0.975, _freedom([(questions, math.inf), (seeds, k - 1)]))) if seeds else Z95
    return Interval(mean, *wilson(mean * size, size, z))


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean of per-question values [n] and its 95 % percentile interval over resampled questions (Efron 1979)."""
    n, mean = len(values), float(np.mean(values, dtype=np.float64))
    # Resampling n of n is a multinomial draw of how often each value comes; shares of k samples have at most k + 1 values.
    levels, times = np.unique(np.asarray(values, np.float64), return_counts=True)
    counts = np.random.default_rng(seed).multinomial(n, times / n, size=draws)
    low, high = np.quantile(counts @ levels / n, (0.025, 0.975))
    return Interval(mean, float(low), float(high))


def accuracy(correct: np.ndarray) -> Interval:
    """Share of right answers, [n] or [n, k], with its 95 % interval over questions (`mean_share`): k samples are no k questions."""
    return mean_share(np.asarray(correct, np.float64).reshape(len(correct), -1).mean(1))


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """Two models on the same questions, one answer each, bool [n]: questions only a has right, only b, and the exact two-sided p.

    Under the null hypothesis each discordant question falls to either side with probability ½ (McNemar 1947, binomial form).
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    return only_a, only_b, float(scipy.stats.binomtest(only_a, n).pvalue) if n else 1.0


class Contrast(NamedTuple):
    """A difference of two means over the same questions, its 95 % interval and two-sided p, all three of one t statistic."""

    value: float
    low: float
    high: float
    p: float
    centre: float  # of the interval
    error: float  # the standard error
    freedom: float  # degrees of it

    def within(self, margin: float) -> float:
        """The p-value of "they differ by `margin` or more": two one-sided tests (Schuirmann 1987). Below 0.05 they are equivalent."""
        return float(scipy.stats.t.sf((margin - abs(self.centre)) / self.error, self.freedom))

    @property
    def detectable(self) -> float:
        """The least true difference that so many questions and seeds show at two-sided 5 % in 80 of 100 repetitions."""
        return float(scipy.stats.t.ppf([0.975, 0.8], self.freedom).sum() * self.error)


def contrast(a: np.ndarray, b: np.ndarray, fixed: tuple[bool, bool] = (False, False)) -> Contrast:
    """The mean of a [n, k] less that of b [n, l]: n questions, the same for both, answered by k and by l runs with seeds of their own.

    Questions and seeds are both random: the variance is that of the questions' differences, less what of it is the runs' scatter on
    each question, and that of the runs' means, which holds this scatter; two-way random effects, Var = σ²_question / n +
    σ²_run (1/k + 1/l). Runs of both arms are taken to scatter alike, as those of equal methods do; where only one arm has several,
    the other's are taken to scatter as they do. An arm that is `fixed` is one model that is asked as it is, and has no seeds. Where no
    arm has several runs, the result is of these very runs. Half a question of each kind (both right, neither, only a, only b) is
    added, as Agresti & Min (Stat. Med. 24, 2005) do, so that the interval of equal answers is no point.
    """
    x, y = (np.asarray(m, np.float64).reshape(len(m), -1) for m in (a, b))
    n, d = len(x), x.mean(1) - y.mean(1)
    centre = float(d.sum()) / (n + 2)
    questions = ((float((d * d).sum()) + 1) / (n + 2) - centre**2) / (n + 1)
    scatter, runs = 0.0, 0
    for m in (m for m in (x, y) if m.shape[1] > 1):
        between, residual = _over_runs(m)
        questions -= residual / m.size
        scatter, runs = scatter + between * (m.shape[1] - 1), runs + m.shape[1] - 1
    questions = max(questions, 1 / ((n + 1) * (n + 2)))
    seeds = scatter / max(runs, 1) * sum(1 / m.shape[1] for m, alone in zip((x, y), fixed, strict=True) if not alone)
    error, freedom = math.sqrt(questions + seeds), _freedom([(questions, n + 1), (seeds, runs)])
    half = error * float(scipy.stats.t.ppf(0.975, freedom))
    p = float(2 * scipy.stats.t.sf(abs(centre) / error, freedom))
    return Contrast(float(d.mean()), max(centre - half, -1.0), min(centre + half, 1.0), p, centre, error, freedom)


def paired_difference(a: np.ndarray, b: np.ndarray) -> Contrast:
    """Mean of b − a over the same questions, [n] or [n, k] each, k samples of one model: the question is the unit (`contrast`)."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1).mean(1) for x in (a, b))
    return contrast(b, a, (True, True))


def _over_runs(x: np.ndarray) -> tuple[float, float]:
    """Of n questions by k runs: the variance of the runs' means, and that of what neither question nor run explains."""
    n, k = x.shape
    residual = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    return float(x.mean(0).var(ddof=1)), float((residual**2).sum()) / max((n - 1) * (k - 1), 1)


def _freedom(parts: list[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances, (variance, its own degrees) each: 1 / Σ share^1.25 / degrees.

    Satterthwaite (Biometrics 2, 1946) has the square, for shares that are known. Told from three seeds they are not: one base against
    three runs that scatter much is then called different in 7 to 8 % of cases where there is no difference; an exponent of 1 makes it under
    4 % where they scatter little. With 1.25 it is 4 to 6 % for three seeds or more: tests/size.py. Where one arm's runs scatter many times
    as much as the other's, it is 8 %.
    """
    total = sum(variance for variance, _ in parts)
    return 1 / max(sum((variance / total) ** 1.25 / degrees for variance, degrees in parts if variance > 0), 1e-9)


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values for several tests, in their order (Holm 1979): max over smaller ones of (m − rank) · p, at most 1."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Per question [n], the unbiased chance that one of k samples is right: 1 − C(s−c, k) / C(s, k), s samples with c right.

    Chen et al. 2021 (arXiv 2107.03374); used as in arXiv 2504.13837.
    """
    samples, right = correct.shape[1], correct.sum(1)
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} must be from 1 to the {samples} samples there are")
    wrong = samples - right
    log = gammaln(wrong + 1) - gammaln(np.maximum(wrong - k, 0) + 1) - gammaln(samples + 1) + gammaln(samples - k + 1)
    return np.where(wrong < k, 1.0, 1.0 - np.exp(log))


def beyond_chance(passed: np.ndarray, options: np.ndarray, k: int) -> Interval | None:
    """Mean pass@k [n] on a scale where guessing is 0 and certainty 1: (p − g) / (1 − g), g the mean of 1 − (1 − 1/m)^k for m options [n].

    With 4 options a coin's pass@16 is 0.99: without this, all models look alike at large k. The means are taken first, since a
    single question's 1 − g is near 0 where it has few options. None where g leaves less than `ROOM`: the scale is then all noise.
    """
    guess = float((1 - (1 - 1 / np.asarray(options, np.float64)) ** k).mean())
    if 1 - guess < ROOM:
        return None
    return Interval(*((x - guess) / (1 - guess) for x in mean_share(passed)))


def majority(answers: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Per question [n], the chance that the most frequent of its answers [n, k] is the key; a tie is drawn with equal chances.

    Empty answers do not vote; where nobody votes, it is 0.
    """
    out = np.zeros(len(answers))
    for i, (row, right) in enumerate(zip(answers, key, strict=True)):
        names, counts = np.unique(row[row != ""], return_counts=True)
        top = names[counts == counts.max()] if len(names) else names
        out[i] = (right in top) / max(len(top), 1)
    return out


def answer_entropy(answers: np.ndarray) -> np.ndarray:
    """Per question [n], −Σ p log p over the distinct answers of its samples [n, k], in nats; no answer counts as one of them."""
    out = np.zeros(len(answers))
    for i, row in enumerate(answers):
        p = np.unique(row, return_counts=True)[1] / len(row)
        out[i] = -(p * np.log(p)).sum()
    return out


def consistency(answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each question's k answers [n, k] to other orders of its options: whether all are the same option, bool [n], and the share of
    pairs that are, float [n]. No answer is the same as nothing."""
    k = answers.shape[1]
    agree = ((answers[:, :, None] == answers[:, None]) & (answers != "")[:, None]).sum((1, 2)) - (answers != "").sum(1)
    return agree == k * (k - 1), agree / (k * (k - 1))


def boundary(base: np.ndarray, trained: np.ndarray) -> dict[str, float]:
    """What training kept, gained and lost of the questions that k samples solve at least once; bool [n, k] each.

    Invisible Leash (arXiv 2507.14843): P both, E only trained, S only base, O neither; support retention SRR = P/(P+S), net discovery
    NDR = E/(P+E), SDS their harmonic mean, net change NSCR = (E−S)/(P+E+S). The sampling-efficiency gap (arXiv 2504.13837) is
    base pass@k − trained pass@1. A ratio without denominator is NaN.
    """
    a, b = base.any(1), trained.any(1)
    p, e, s, o = (int(x.sum()) for x in (a & b, b & ~a, a & ~b, ~a & ~b))
    srr, ndr = _share(p, p + s), _share(e, p + e)
    return {
        "preserved": p,
        "gained": e,
        "lost": s,
        "never": o,
        "srr": srr,
        "ndr": ndr,
        "sds": _share(2 * srr * ndr, srr + ndr),
        "nscr": _share(e - s, p + e + s),
        "efficiency_gap": float(a.mean() - trained.mean()),
    }


def letter_bias(answers: np.ndarray, key: np.ndarray) -> dict[str, Any]:
    """How often each letter is answered against how often it is the key, and the χ² test of the one against the other's shares.

    `answers` [n] or [n, k]: each of k samples counts 1/k, since samples of one question are no new evidence of a bias. `key` likewise.
    """
    answers, key = (x if x.ndim == 2 else x[:, None] for x in map(np.asarray, (answers, key)))
    letters = sorted((set(key.ravel().tolist()) | set(answers.ravel().tolist())) - {""})
    answered, keyed = (np.array([(x == letter).mean(1).sum() for letter in letters]) for x in (answers, key))
    use = keyed > 0  # a letter that is never the key has no expected count
    if use.sum() < 2 or answered[use].sum() == 0:
        p = 1.0
    else:
        p = float(scipy.stats.chisquare(answered[use], keyed[use] / keyed[use].sum() * answered[use].sum()).pvalue)
    given = answered.sum() or 1.0
    shares = {x: {"answered": a / given, "key": b / len(key)} for x, a, b in zip(letters, answered.tolist(), keyed.tolist(), strict=True)}
    return {"letters": shares, "p": p}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
