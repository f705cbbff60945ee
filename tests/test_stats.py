"""Statistics against hand counts, brute force and published values."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrlvr_jax.evaluation import stats


def test_mcnemar_by_hand():
    a = np.array([1, 1, 1, 1, 1, 1, 0, 1, 0, 0], bool)
    b = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 0], bool)
    only_a, only_b, p = stats.mcnemar(a, b)
    assert (only_a, only_b) == (6, 1)
    assert p == pytest.approx(2 * (1 + 7) / 2**7)  # both tails of Binomial(7, ½) at 6 or more
    assert stats.mcnemar(a, a) == (0, 0, 1.0)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples, right, k):
    right, k = min(right, samples), min(k, samples)
    row = np.arange(samples) < right
    subsets = list(itertools.combinations(row, k))
    assert stats.pass_at_k(row[None], k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_refuses_too_few_samples():
    with pytest.raises(ValueError, match="k = 3 must be from 1 to the 2 samples"):
        stats.pass_at_k(np.zeros((1, 2), bool), 3)


def test_guessing_gives_zero_beyond_chance():
    rng = np.random.default_rng(0)
    options = rng.integers(3, 11, 4000)
    coin = rng.random((4000, 8)) < 1 / options[:, None]
    for k in (1, 4, 8):
        value, low, high = stats.beyond_chance(stats.pass_at_k(coin, k), options, k)
        assert low < 0 < high and abs(value) < 0.04
    assert stats.beyond_chance(np.ones(3), np.array([4, 5, 10]), 4).value == 1
    # Of 4 options a coin's 16 samples hold the key in 99 %: what is left, 1 %, is the noise of 400 questions.
    coin = rng.random((400, 16)) < 0.25
    assert stats.beyond_chance(stats.pass_at_k(coin, 16), np.full(400, 4), 16) is None


def test_majority_draws_ties_and_ignores_missing_answers():
    answers = np.array([["A", "A", "B"], ["A", "B", ""], ["", "", "C"], ["", "", ""]])
    correct = answers == np.array([["A"], ["B"], ["C"], ["D"]])
    assert stats.majority(answers, correct).tolist() == [1.0, 0.5, 1.0, 0.0]


def test_balanced_accuracy_is_the_mean_of_the_classes():
    correct, classes = np.array([[1], [1], [1], [0], [0], [1]], bool), np.array(list("aaaabb"))
    found = stats.balanced(correct, classes)
    assert found.value == pytest.approx((3 / 4 + 1 / 2) / 2)
    # padded, a has 5 of 8 right and b 3 of 6: (5/8 · 3/8 / 4 + 1/2 · 1/2 / 2) / 2²
    half = 1.959964 * math.sqrt((15 / 64 / 4 + 1 / 4 / 2) / 4)
    assert (found.low, found.high) == pytest.approx((0.625 - half, 1.0 if 0.625 + half > 1 else 0.625 + half))
    assert stats.balanced(np.ones((2, 3), bool), np.array(["a", "b"])).high == 1.0


def test_answer_entropy():
    answers = np.array([["A", "A", "A", "A"], ["A", "B", "C", ""], ["A", "A", "B", "B"]])
    np.testing.assert_allclose(stats.answer_entropy(answers), [0, math.log(4), math.log(2)], atol=1e-12)


def test_boundary_by_hand():
    base = np.array([[1, 0], [1, 1], [0, 0], [0, 0], [0, 1]], bool)
    trained = np.array([[1, 1], [0, 0], [1, 1], [0, 0], [1, 1]], bool)
    b = stats.boundary(base, trained)
    assert [b[k] for k in ("preserved", "gained", "lost", "never")] == [2, 1, 1, 1]
    assert b["srr"] == pytest.approx(2 / 3) and b["ndr"] == pytest.approx(1 / 3)
    assert b["sds"] == pytest.approx(2 * (2 / 9) / 1) and b["nscr"] == 0
    assert b["efficiency_gap"] == pytest.approx(3 / 5 - 6 / 10)
    unsolved = stats.boundary(base[3:4], trained[3:4])
    assert unsolved["srr"] is None and unsolved["sds"] is None and unsolved["nscr"] is None


def test_clustered_interval_is_wider_than_that_of_independent_samples():
    rng = np.random.default_rng(0)
    easy = rng.random(200) < 0.5
    # all samples of a question agree: 200 observations, not 3,200
    correct = np.repeat(easy[:, None], 16, axis=1)
    value, low, high = stats.accuracy(correct)
    naive = stats.wilson(correct.sum(), correct.size)
    assert value == pytest.approx(easy.mean())
    assert high - low == pytest.approx(np.diff(stats.wilson(easy.sum(), 200))[0])
    assert high - low > 3 * (naive[1] - naive[0])


def test_intervals_of_differences_and_means_cover_the_truth_in_95_percent():
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(400):
        a, b = rng.random(150) < 0.4, rng.random(150) < 0.5
        c, mean = stats.paired_difference(a, b), stats.mean(rng.exponential(size=150))
        hits.append((c.low <= 0.1 <= c.high, mean.low <= 1 <= mean.high))
    assert ((0.91 <= np.mean(hits, 0)) & (np.mean(hits, 0) <= 0.98)).all()


def test_the_interval_of_equal_answers_has_a_width():
    a = np.arange(20) < 10
    c = stats.paired_difference(a, a)
    half = stats.scipy.stats.t.ppf(0.975, 21) * math.sqrt(1 / 22 / 21)
    assert (c.value, c.low, c.high, c.p) == pytest.approx((0, -half, half, 1)) and half > 0.09


def test_the_minimum_detectable_difference_is_found_with_80_percent_power():
    rng = np.random.default_rng(0)
    n, ups, downs = 400, 0.2, 0.1  # shares of the questions that only b, and that only a has right
    found = [
        stats.contrast((d > 0).astype(float), (d < 0).astype(float), (True, True))
        for d in rng.choice([1, 0, -1], (400, n), p=[ups, 0.7, downs])
    ]
    assert np.mean([c.minimum_detectable for c in found]) == pytest.approx(
        2.8 * math.sqrt((ups + downs - 0.01) / n), rel=0.02
    )
    delta = 2.8 * math.sqrt(0.3 / n)
    up = 0.15 + delta / 2
    shown = [
        stats.contrast((d > 0).astype(float), (d < 0).astype(float), (True, True)).p < 0.05
        for d in rng.choice([1, 0, -1], (400, n), p=[up, 0.7, 0.3 - up])
    ]
    assert 0.74 < np.mean(shown) < 0.86


def test_letter_bias():
    key = np.array(list("ABCD" * 50))
    fair, stuck = stats.letter_bias(key, key), stats.letter_bias(np.array(["B"] * 200), key)
    assert fair["p"] == pytest.approx(1) and stuck["p"] < 1e-30
    assert stuck["letters"]["B"] == {"answered": 1.0, "key": 0.25}
    assert stats.letter_bias(np.array([""] * 4), key)["p"] == 1.0
    twice = stats.letter_bias(np.array([["B", "B"]] * 20 + [["A", ""]] * 20), np.array(list("AB" * 20)))
    assert twice["letters"] == {"A": {"answered": 1 / 3, "key": 0.5}, "B": {"answered": 2 / 3, "key": 0.5}}
    # a sample is half a question
    assert twice["p"] == pytest.approx(stats.scipy.stats.chisquare([10, 20]).pvalue)


def test_the_interval_of_few_right_answers_has_a_width():
    none = np.zeros((100, 4), bool)
    assert stats.accuracy(none) == pytest.approx((0.0, *stats.wilson(0, 100)), abs=1e-12)
    none[0, 0] = True  # the percentiles of resampled questions would be 0 and 0.75 %
    value, low, high = stats.accuracy(none)
    # Of 104 shares, 0.25 and two of 1 are not 0: mean 2.25 / 104, variance 2.0625 / 104 less its square.
    ratio = (2.0625 / 104 - (2.25 / 104) ** 2) / ((2.25 / 104) * (1 - 2.25 / 104))
    assert (value, low, high) == pytest.approx((0.0025, *stats.wilson(0.25 / ratio, 100 / ratio)))
    assert low > 0 and 0.037 < high < 0.04


def test_one_answer_to_each_question_gives_wilsons_interval():
    right = np.arange(148) < 15
    assert stats.accuracy(right) == pytest.approx((15 / 148, *stats.wilson(15, 148)))


def test_intervals_over_questions_cover_the_truth_in_95_percent():
    rng = np.random.default_rng(0)
    easiness = rng.beta(0.5, 0.5, (400, 100, 1))  # 400 evaluations of 100 questions with 4 samples each
    found = [stats.accuracy(c) for c in rng.random((400, 100, 4)) < easiness]
    assert 0.92 <= np.mean([low <= 0.5 <= high for _, low, high in found]) <= 0.98


def test_wilson_against_known_values():
    # Newcombe, Statistics in Medicine 17 (1998) 857–872, table I, method 3.
    for correct, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert stats.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert stats.wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert stats.wilson(0, 0) == (0.0, 1.0)
