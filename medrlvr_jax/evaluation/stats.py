"""Statistics of accuracies: intervals, paired tests, pass@k, and which questions training made solvable.

`correct` is [n], one answer to each question (or the share of its samples that are right), or [n, k], k
samples of each question. Samples of one question are not independent, so the question is the unit of all
intervals and tests. All intervals are 95 % intervals.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy  # loads scipy.stats when it is first used, which takes half a second
from jaxtyping import Bool, Float64, Int, Num, Shaped

ROOM = 0.1  # pass@k beyond chance is computed only if guessing fails at least this often
Z95 = 1.959964
PADDING = [0.0, 0.0, 1.0, 1.0]  # values added to n questions: two right, two wrong (Agresti & Coull 1998)

Values = Num[np.ndarray, " n"] | Num[np.ndarray, "n k"] | Bool[np.ndarray, " n"] | Bool[np.ndarray, "n k"]


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def wilson(correct: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return both ends of the Wilson score interval of a share; (0, 1) if n = 0.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), with p = correct / n. Unlike p ± z √(p(1−p)/n), it
    stays within [0, 1] and has a width at 0 of n. Unlike scipy's function, this one takes fractional counts.
    E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209–212.
    """
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def mean_share(values: Values) -> Interval:
    """Return the mean of values in [0, 1] with its interval.

    Values [n] give an interval over n questions. Values [n, k] of k runs give one over questions and runs,
    both random (`contrast`).

    It is Wilson's interval for the effective number of questions p(1−p) / σ², where σ² is the variance of
    the mean. With one answer to each question that number is n. The ratio σ² / p(1−p) is estimated with
    `PADDING` (Agresti & Coull, Am. Stat. 52, 1998): few right answers do not determine it, and equal values
    would make it 0.
    """
    x = _columns(values)
    (n, k), share, padded = x.shape, float(x.mean()), np.concatenate([x.mean(1), PADDING])
    scale = float(padded.mean() * (1 - padded.mean()))
    questions, seeds = float(padded.var()) / n, 0.0
    if k > 1:
        between, residual = _run_variances(x)
        questions, seeds = questions - residual / (n * k), between / k
    size = scale / (questions + seeds)
    freedom = _degrees_of_freedom([(questions, math.inf), (seeds, k - 1)]) if seeds else math.inf
    z = float(scipy.stats.t.ppf(0.975, freedom)) if seeds else Z95
    return Interval(share, *wilson(share * size, size, z))


def mean(values: Num[np.ndarray, " n"]) -> Interval:
    """Return the mean of values of any size with Student's t interval, which is infinite for one value."""
    x, n = np.asarray(values, np.float64), len(values)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def accuracy(correct: Values) -> Interval:
    """Return the share of right answers with its interval over questions, whatever the number of samples."""
    return mean_share(_columns(correct).mean(1))


def balanced(correct: Values, classes: Shaped[np.ndarray, " n"]) -> Interval:
    """Return the balanced accuracy, which is the mean of the classes' accuracies, with its interval.

    The variances of the classes add up. Each class gets `PADDING`, so that no variance is 0.
    """
    shares = _columns(correct).mean(1)
    members = [shares[classes == name] for name in np.unique(classes)]
    variance = sum(np.concatenate([x, PADDING]).var() / len(x) for x in members) / len(members) ** 2
    value, half = float(np.mean([x.mean() for x in members])), Z95 * math.sqrt(variance)
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def mcnemar(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> tuple[int, int, float]:
    """Return how many questions only a answers right, how many only b, and the exact two-sided p value.

    Under the null hypothesis each of these questions belongs to either side with probability ½ (McNemar
    1947, binomial form).
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    return only_a, only_b, float(scipy.stats.binomtest(only_a, n).pvalue) if n else 1.0


class Contrast(NamedTuple):
    """A difference of two means over the same questions; interval and p come from one t statistic."""

    value: float
    low: float
    high: float
    p: float  # two-sided
    centre: float  # the middle of the interval before it is clipped to [−1, 1]
    error: float  # the standard error
    freedom: float  # the degrees of freedom

    @property
    def interval(self) -> Interval:
        return Interval(self.value, self.low, self.high)

    def within(self, margin: float) -> float:
        """Return the p value of the hypothesis "the means differ by `margin` or more".

        These are two one-sided tests (Schuirmann 1987).
        """
        return float(scipy.stats.t.sf((margin - abs(self.centre)) / self.error, self.freedom))

    @property
    def minimum_detectable(self) -> float:
        """The smallest true difference that the test finds (two-sided, 5 %) with 80 % power."""
        return float(scipy.stats.t.ppf([0.975, 0.8], self.freedom).sum() * self.error)


def contrast(a: Values, b: Values, fixed: tuple[bool, bool] = (False, False)) -> Contrast:
    """Return mean(a) − mean(b), where k runs (a [n, k]) and l runs (b [n, l]) answer the same n questions.

    Questions and seeds are both random: two-way random effects, Var = σ²_question / n + σ²_run (1/k + 1/l).
    The variance of the questions' differences contains the residual variance of the runs, which the variance
    of the runs' means contains, too; so it is subtracted once. Both arms are assumed to have the same σ²_run,
    as equal methods have. A `fixed` arm is a model that is not trained, so it has no seeds. If neither arm
    has several runs, the result holds for these two runs only. Half a question of each kind (both right,
    neither, only a, only b) is added (Agresti & Min, Stat. Med. 24, 2005), so that the interval of equal
    answers has a width.
    """
    x, y = _columns(a), _columns(b)
    n, d = len(x), x.mean(1) - y.mean(1)
    centre = float(d.sum()) / (n + 2)
    questions = ((float((d * d).sum()) + 1) / (n + 2) - centre**2) / (n + 1)
    scatter, runs = 0.0, 0
    for m in (m for m in (x, y) if m.shape[1] > 1):
        between, residual = _run_variances(m)
        questions -= residual / m.size
        scatter, runs = scatter + between * (m.shape[1] - 1), runs + m.shape[1] - 1
    questions = max(questions, 1 / ((n + 1) * (n + 2)))
    with_seeds = [m for m, is_fixed in zip((x, y), fixed, strict=True) if not is_fixed]
    seeds = scatter / max(runs, 1) * sum(1 / m.shape[1] for m in with_seeds)
    error, freedom = math.sqrt(questions + seeds), _degrees_of_freedom([(questions, n + 1), (seeds, runs)])
    half = error * float(scipy.stats.t.ppf(0.975, freedom))
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    p = float(2 * scipy.stats.t.sf(abs(centre) / error, freedom))
    return Contrast(float(d.mean()), low, high, p, centre, error, freedom)


def paired_difference(a: Values, b: Values) -> Contrast:
    """Return mean(b) − mean(a) for two models that answered the same questions, once or several times."""
    return contrast(_columns(b).mean(1), _columns(a).mean(1), (True, True))


def _columns(values: Values) -> Float64[np.ndarray, "n k"]:
    return np.asarray(values, np.float64).reshape(len(values), -1)


def _run_variances(x: Float64[np.ndarray, "n k"]) -> tuple[float, float]:
    """Return the variance of the k runs' means, and the residual variance of a two-way layout."""
    n, k = x.shape
    residual = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    return float(x.mean(0).var(ddof=1)), float((residual**2).sum()) / max((n - 1) * (k - 1), 1)


def _degrees_of_freedom(parts: list[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of variances: 1 / Σ share^1.25 / degrees.

    `parts` are pairs of a variance and its degrees of freedom. Satterthwaite (Biometrics 2, 1946) squares the
    shares, because he takes them as known. Three seeds only estimate them. tests/size.py measures the false
    positives of a 5 % test. The square gives 7 to 8 % for a base against three runs of high variance. An
    exponent of 1 gives less than 4 % for runs of low variance. 1.25 gives 4 to 6 % for three seeds or more,
    and 8 % if the runs of one arm have many times the variance of the other's.
    """
    total = sum(variance for variance, _ in parts)
    return 1 / max(sum((variance / total) ** 1.25 / free for variance, free in parts if variance > 0), 1e-9)


def holm(p_values: list[float]) -> list[float]:
    """Return Holm's adjusted p values (1979) in the order given: the running maximum of (m − rank) · p."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


# --- several samples of each question ---


def pass_at_k(correct: Bool[np.ndarray, "n samples"], k: int) -> Float64[np.ndarray, " n"]:
    """Return each question's unbiased pass@k: 1 − C(s−c, k) / C(s, k), if c of its s samples are right.

    Chen et al. 2021 (arXiv 2107.03374); used as in arXiv 2504.13837.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} must be from 1 to the {samples} samples there are")
    return 1 - scipy.stats.hypergeom.pmf(0, samples, correct.sum(1), k)


def beyond_chance(passed: Num[np.ndarray, " n"], options: Int[np.ndarray, " n"], k: int) -> Interval | None:
    """Return mean pass@k rescaled to (p − g) / (1 − g), so that guessing gives 0 and certainty 1.

    g is the mean of 1 − (1 − 1/m)^k for m options. Guessing among 4 options has a pass@16 of 0.99, so without
    this correction all models look alike at large k. The means are taken before the division, because 1 − g
    of a single question with few options is near 0. An open question (0 options) cannot be guessed. The
    result is None if 1 − g is below `ROOM`, because noise would then dominate.
    """
    options = np.where(np.asarray(options) > 0, options, np.inf)
    guess = float((1 - (1 - 1 / options) ** k).mean())
    if 1 - guess < ROOM:
        return None
    return Interval(*((x - guess) / (1 - guess) for x in mean_share(passed)))


def majority(
    answers: Shaped[np.ndarray, "n k"], correct: Bool[np.ndarray, "n k"]
) -> Float64[np.ndarray, " n"]:
    """Return for each question the probability that its most frequent answer is right.

    Ties are drawn with equal chances. Empty answers do not vote. Without votes, the probability is 0.
    """
    out = np.zeros(len(answers))
    for i, (row, right) in enumerate(zip(answers, correct, strict=True)):
        names, first, counts = np.unique(row[row != ""], return_index=True, return_counts=True)
        top = right[row != ""][first[counts == counts.max()]] if len(names) else right[:0]
        out[i] = top.sum() / max(len(top), 1)
    return out


def answer_entropy(answers: Shaped[np.ndarray, "n k"]) -> Float64[np.ndarray, " n"]:
    """Return each question's entropy over its distinct answers, in nats. No answer counts as an answer."""
    return np.array([scipy.stats.entropy(np.unique(row, return_counts=True)[1]) for row in answers])


def consistency(
    answers: Shaped[np.ndarray, "n k"],
) -> tuple[Bool[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Return for each question whether its answers to k orders of options all agree, and the share of pairs.

    A missing answer agrees with no other.
    """
    k = answers.shape[1]
    given = answers != ""
    agree = ((answers[:, :, None] == answers[:, None]) & given[:, None]).sum((1, 2)) - given.sum(1)
    return agree == k * (k - 1), agree / (k * (k - 1))


def boundary(base: Bool[np.ndarray, "n k"], trained: Bool[np.ndarray, "n k"]) -> dict[str, float | None]:
    """Return how training changed which questions at least one of k samples solves (support).

    Invisible Leash (arXiv 2507.14843): P questions are solved by both models, E only by the trained one, S
    only by the base. Support retention SRR = P/(P+S), net discovery NDR = E/(P+E), SDS is their harmonic
    mean, net change NSCR = (E−S)/(P+E+S). The sampling-efficiency gap (arXiv 2504.13837) is base pass@k −
    trained pass@1. A ratio with denominator 0 is None.
    """
    a, b = base.any(1), trained.any(1)
    p, e, s, o = (int(x.sum()) for x in (a & b, b & ~a, a & ~b, ~a & ~b))
    ratio = lambda part, total: part / total if total else None
    srr, ndr = ratio(p, p + s), ratio(e, p + e)
    return {
        **{"preserved": p, "gained": e, "lost": s, "never": o, "srr": srr, "ndr": ndr},
        "sds": None if srr is None or ndr is None else ratio(2 * srr * ndr, srr + ndr),
        "nscr": ratio(e - s, p + e + s),
        "efficiency_gap": float(a.mean() - trained.mean()),
    }


def letter_bias(answers: Shaped[np.ndarray, "..."], key: Shaped[np.ndarray, "..."]) -> dict[str, Any]:
    """Return how often each letter is the answer and the key, and the p value of a χ² test that they agree.

    Both arguments are [n] or [n, k]. Each of k samples counts 1/k, so that a question counts once.
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
