"""What an accuracy can and cannot show: intervals, paired tests, pass@k, the boundary between two models.

Everything is per question. `correct` is [n], one answer a question (or the share of its samples that are
right), or [n, k], k samples of each question. Samples of one question are not independent, so intervals and
tests are over questions. All intervals are of 95 %.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy  # loads scipy.stats when it is first used, which takes half a second
from jaxtyping import Bool, Float64, Int, Num, Shaped

ROOM = 0.1  # pass@k beyond chance is given only where chance leaves at least this much
Z95 = 1.959964

Values = Num[np.ndarray, " n"] | Num[np.ndarray, "n k"] | Bool[np.ndarray, " n"] | Bool[np.ndarray, "n k"]


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def wilson(correct: float, n: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share; (0, 1) for n = 0. Counts may be fractions, unlike scipy's.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), with p = correct / n. Unlike p ± z √(p(1−p)/n) it never
    leaves [0, 1] and does not shrink to a point at 0 of n. E. B. Wilson, J. Am. Stat. Assoc. 22 (1927)
    209–212.
    """
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def mean_share(values: Values) -> Interval:
    """The mean of values in [0, 1] and its interval: over questions, or of k runs over both (`contrast`).

    It is Wilson's, for as many questions as would give the mean's variance σ² if the value of each were 0 or
    1: p(1−p) / σ². With one answer a question that is n. For σ² / p(1−p), two questions of value 1 and two of
    0 are added, as Agresti & Coull (Am. Stat. 52, 1998) do: few right answers do not determine it, and equal
    values would make it 0.
    """
    x = np.asarray(values, np.float64).reshape(len(values), -1)
    (n, k), share, padded = x.shape, float(x.mean()), np.concatenate([x.mean(1), [0.0, 0.0, 1.0, 1.0]])
    scale = float(padded.mean() * (1 - padded.mean()))
    questions, seeds = float(padded.var()) / n, 0.0
    if k > 1:
        between, residual = _over_runs(x)
        questions, seeds = questions - residual / (n * k), between / k
    size = scale / (questions + seeds)
    freedom = _freedom([(questions, math.inf), (seeds, k - 1)]) if seeds else math.inf
    z = float(scipy.stats.t.ppf(0.975, freedom)) if seeds else Z95
    return Interval(share, *wilson(share * size, size, z))


def mean(values: Num[np.ndarray, " n"]) -> Interval:
    """The mean of per-question values of any size, and Student's t interval; infinite for a single value."""
    x, n = np.asarray(values, np.float64), len(values)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def accuracy(correct: Values) -> Interval:
    """Share of right answers with its interval over questions: k samples of one are one observation."""
    return mean_share(np.asarray(correct, np.float64).reshape(len(correct), -1).mean(1))


def balanced(correct: Values, classes: Shaped[np.ndarray, " n"]) -> Interval:
    """Balanced accuracy, the mean of the classes' shares of right answers, and its interval.

    Variances of the classes add up; each class is padded as in `mean_share`, so that none is 0.
    """
    shares = np.asarray(correct, np.float64).reshape(len(correct), -1).mean(1)
    rows = [shares[classes == name] for name in np.unique(classes)]
    variance = sum(np.concatenate([x, [0.0, 0.0, 1.0, 1.0]]).var() / len(x) for x in rows) / len(rows) ** 2
    mean, half = float(np.mean([x.mean() for x in rows])), Z95 * math.sqrt(variance)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def mcnemar(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> tuple[int, int, float]:
    """Questions only a has right, questions only b has right, and the exact two-sided p.

    Under the null hypothesis each discordant question falls to either side with probability ½ (McNemar 1947,
    binomial form).
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    return only_a, only_b, float(scipy.stats.binomtest(only_a, n).pvalue) if n else 1.0


class Contrast(NamedTuple):
    """A difference of two means over the same questions, its interval and two-sided p: one t statistic."""

    value: float
    low: float
    high: float
    p: float
    centre: float  # of the interval
    error: float  # standard error
    freedom: float  # degrees of freedom

    @property
    def interval(self) -> Interval:
        return Interval(self.value, self.low, self.high)

    def within(self, margin: float) -> float:
        """The p of "they differ by `margin` or more": two one-sided tests (Schuirmann 1987)."""
        return float(scipy.stats.t.sf((margin - abs(self.centre)) / self.error, self.freedom))

    @property
    def minimum_detectable(self) -> float:
        """The least true difference that is significant (two-sided, 5 %) with 80 % power."""
        return float(scipy.stats.t.ppf([0.975, 0.8], self.freedom).sum() * self.error)


def contrast(a: Values, b: Values, fixed: tuple[bool, bool] = (False, False)) -> Contrast:
    """The mean of a [n, k] less that of b [n, l]: the same n questions, answered by k and by l runs.

    Questions and seeds are both random: two-way random effects, Var = σ²_question / n + σ²_run (1/k + 1/l).
    The runs' scatter on each question is part of the variance of the questions' differences and of that of
    the runs' means; it is subtracted from the former. The runs of both arms are assumed to scatter alike, as
    those of equal methods do. An arm that is `fixed` is a model that is not trained, and has no seeds. If no
    arm has several runs, the result is about these two runs only. Half a question of each kind (both right,
    neither, only a, only b) is added, as Agresti & Min (Stat. Med. 24, 2005) do, so that the interval of
    equal answers is no point.
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
    with_seeds = [m for m, is_fixed in zip((x, y), fixed, strict=True) if not is_fixed]
    seeds = scatter / max(runs, 1) * sum(1 / m.shape[1] for m in with_seeds)
    error, freedom = math.sqrt(questions + seeds), _freedom([(questions, n + 1), (seeds, runs)])
    half = error * float(scipy.stats.t.ppf(0.975, freedom))
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    p = float(2 * scipy.stats.t.sf(abs(centre) / error, freedom))
    return Contrast(float(d.mean()), low, high, p, centre, error, freedom)


def paired_difference(a: Values, b: Values) -> Contrast:
    """Mean of b − a over the same questions; samples are of one model each, so the question is the unit."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1).mean(1) for x in (a, b))
    return contrast(b, a, (True, True))


def _over_runs(x: Float64[np.ndarray, "n k"]) -> tuple[float, float]:
    """The variance of the k runs' means, and the residual variance beside questions and runs."""
    n, k = x.shape
    residual = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    return float(x.mean(0).var(ddof=1)), float((residual**2).sum()) / max((n - 1) * (k - 1), 1)


def _freedom(parts: list[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances, each with its degrees: 1 / Σ share^1.25 / degrees.

    Satterthwaite (Biometrics 2, 1946) squares the shares, which he takes as known. Estimated from three seeds
    they are not. False positives of a 5 % test, by tests/size.py: the square gives 7 to 8 % for a base
    against three runs that scatter much, an exponent of 1 less than 4 % where they scatter little; 1.25 gives
    4 to 6 % for three seeds or more, and 8 % where one arm's runs scatter many times as much as the other's.
    """
    total = sum(variance for variance, _ in parts)
    return 1 / max(sum((variance / total) ** 1.25 / free for variance, free in parts if variance > 0), 1e-9)


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values of several tests, in their order (Holm 1979): running maximum of (m − rank) · p."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


# --- several samples of each question ---


def pass_at_k(correct: Bool[np.ndarray, "n samples"], k: int) -> Float64[np.ndarray, " n"]:
    """Per question, the unbiased chance that one of k samples is right: 1 − C(s−c, k) / C(s, k) for c of s.

    Chen et al. 2021 (arXiv 2107.03374); used as in arXiv 2504.13837.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} must be from 1 to the {samples} samples there are")
    return 1 - scipy.stats.hypergeom.pmf(0, samples, correct.sum(1), k)


def beyond_chance(passed: Num[np.ndarray, " n"], options: Int[np.ndarray, " n"], k: int) -> Interval | None:
    """Mean pass@k on a scale where guessing is 0 and certainty 1: (p − g) / (1 − g).

    g is the mean of 1 − (1 − 1/m)^k for m options. Guessing among 4 has a pass@16 of 0.99: without this, all
    models look alike at large k. The means are taken first, since a single question's 1 − g is near 0 where
    it has few options; an open question, of 0 options, cannot be guessed. None where 1 − g is below `ROOM`:
    the scale is then all noise.
    """
    options = np.where(np.asarray(options) > 0, options, np.inf)
    guess = float((1 - (1 - 1 / options) ** k).mean())
    if 1 - guess < ROOM:
        return None
    return Interval(*((x - guess) / (1 - guess) for x in mean_share(passed)))


def majority(
    answers: Shaped[np.ndarray, "n k"], correct: Bool[np.ndarray, "n k"]
) -> Float64[np.ndarray, " n"]:
    """Per question, the chance that its most frequent answer is right; a tie is drawn with equal chances.

    Empty answers do not vote; where nobody votes, it is 0.
    """
    out = np.zeros(len(answers))
    for i, (row, right) in enumerate(zip(answers, correct, strict=True)):
        names, first, counts = np.unique(row[row != ""], return_index=True, return_counts=True)
        top = right[row != ""][first[counts == counts.max()]] if len(names) else right[:0]
        out[i] = top.sum() / max(len(top), 1)
    return out


def answer_entropy(answers: Shaped[np.ndarray, "n k"]) -> Float64[np.ndarray, " n"]:
    """Per question, −Σ p log p over its distinct answers, in nats; to give no answer is one of them."""
    return np.array([scipy.stats.entropy(np.unique(row, return_counts=True)[1]) for row in answers])


def consistency(
    answers: Shaped[np.ndarray, "n k"],
) -> tuple[Bool[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Of a question's answers to k orders of its options: are all the same option, and what share of pairs?

    Where no answer was given, it equals no other.
    """
    k = answers.shape[1]
    given = answers != ""
    agree = ((answers[:, :, None] == answers[:, None]) & given[:, None]).sum((1, 2)) - given.sum(1)
    return agree == k * (k - 1), agree / (k * (k - 1))


def boundary(base: Bool[np.ndarray, "n k"], trained: Bool[np.ndarray, "n k"]) -> dict[str, float]:
    """How training changed which questions are solved by at least one of k samples.

    Invisible Leash (arXiv 2507.14843): P both, E only trained, S only base; support retention SRR = P/(P+S),
    net discovery NDR = E/(P+E), SDS their harmonic mean, net change NSCR = (E−S)/(P+E+S). The
    sampling-efficiency gap (arXiv 2504.13837) is base pass@k − trained pass@1. A ratio without denominator is
    NaN.
    """
    a, b = base.any(1), trained.any(1)
    p, e, s, o = (int(x.sum()) for x in (a & b, b & ~a, a & ~b, ~a & ~b))
    srr, ndr = _ratio(p, p + s), _ratio(e, p + e)
    return {
        "preserved": p,
        "gained": e,
        "lost": s,
        "never": o,
        "srr": srr,
        "ndr": ndr,
        "sds": _ratio(2 * srr * ndr, srr + ndr),
        "nscr": _ratio(e - s, p + e + s),
        "efficiency_gap": float(a.mean() - trained.mean()),
    }


def _ratio(part: float, total: float) -> float:
    return part / total if total else math.nan


def letter_bias(answers: Shaped[np.ndarray, "..."], key: Shaped[np.ndarray, "..."]) -> dict[str, Any]:
    """How often each letter is answered and how often it is the key, and the χ² test of one on the other.

    Both are [n] or [n, k]: each of k samples counts 1/k, since samples of one question are no new evidence.
    """
    answers, key = (x if x.ndim == 2 else x[:, None] for x in map(np.asarray, (answers, key)))
    letters = sorted((set(key.ravel().tolist()) | set(answers.ravel().tolist())) - {""})
    answered, keyed = (np.array([(x == letter).mean(1).sum() for letter in letters]) for x in (answers, key))
    use = keyed > 0  # a letter that is never the key has no expected count
    p = 1.0
    if use.sum() >= 2 and answered[use].sum() > 0:
        expected = keyed[use] / keyed[use].sum() * answered[use].sum()
        p = float(scipy.stats.chisquare(answered[use], expected).pvalue)
    answered, keyed = (answered / (answered.sum() or 1.0)).tolist(), (keyed / len(key)).tolist()
    shares = zip(letters, answered, keyed, strict=True)
    return {"letters": {letter: {"answered": a, "key": b} for letter, a, b in shares}, "p": p}
