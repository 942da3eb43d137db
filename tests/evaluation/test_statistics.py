"""Intervals against published and hand-worked values."""

import math

import pytest

from edgerun.evaluation.statistics import (
    bootstrap_mean,
    mean_interval,
    paired_difference,
    paired_shares,
    wilson_interval,
)


# Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_matches_newcombes_table(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, n)
    assert interval.estimate == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_interval_of_all_right_ends_at_one() -> None:
    interval = wilson_interval(200, 200)
    assert interval.high == 1.0
    assert interval.low == pytest.approx(200 / (200 + 1.959964**2), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_paired_difference_of_a_constant_gap_has_no_width() -> None:
    interval = paired_difference([1.0, 0.5, 2.0], [0.5, 0.0, 1.5])
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_paired_difference_agrees_with_the_normal_interval_on_many_pairs() -> None:
    a = [1.0] * 120 + [0.0] * 80
    b = [1.0] * 100 + [0.0] * 100
    # 20 pairs differ by one: mean 0.1, variance 0.1 - 0.01, 1.96 * sqrt(0.09 / 200) = 0.0416.
    interval = paired_difference(a, b, seed=3)
    assert interval.estimate == pytest.approx(0.1)
    assert interval.low == pytest.approx(0.1 - 0.0416, abs=0.006)
    assert interval.high == pytest.approx(0.1 + 0.0416, abs=0.006)
    assert interval == paired_difference(a, b, seed=3)


def test_paired_difference_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="2 and 1 samples"):
        paired_difference([1.0, 0.0], [1.0])


def test_bootstrap_mean_agrees_with_the_normal_interval_on_many_samples() -> None:
    values = [math.sin(i) for i in range(2000)]
    mean = sum(values) / 2000
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2000 / 2000)
    found = bootstrap_mean(values)
    assert found.estimate == pytest.approx(mean)
    assert (found.low, found.high) == (pytest.approx(mean - half, abs=0.003), pytest.approx(mean + half, abs=0.003))
    with pytest.raises(ValueError, match="0 samples"):
        bootstrap_mean([])


def test_mean_interval_is_students() -> None:
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for n in (2, 3, 6, 31, 32, 200):
        samples = [math.sin(i) for i in range(n)]
        found = mean_interval(samples)
        low, high = scipy.t.interval(0.95, n - 1, loc=found.estimate, scale=scipy.sem(samples))
        assert found.estimate == pytest.approx(sum(samples) / n)
        assert (found.low, found.high) == pytest.approx((low, high), rel=5e-2 if n > 31 else 1e-3, abs=1e-6)


def test_mean_interval_needs_two_samples() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([1.0])


def exact_coverage(n: int, both: float, only_a: float, only_b: float) -> float:
    """How often the interval holds the true difference, over every outcome of n pairs with its probability."""
    neither = 1.0 - both - only_a - only_b
    logs = [math.log(p) for p in (both, only_a, only_b, neither)]
    total = 0.0
    for x in range(n + 1):
        for y in range(n + 1 - x):
            for z in range(n + 1 - x - y):
                counts = (x, y, z, n - x - y - z)
                weight = math.lgamma(n + 1) - sum(math.lgamma(c + 1) for c in counts)
                weight += sum(c * log for c, log in zip(counts, logs, strict=True))
                if weight < -25:
                    continue
                a = [True] * (x + y) + [False] * (z + counts[3])
                b = [True] * x + [False] * y + [True] * z + [False] * counts[3]
                found = paired_shares(a, b)
                total += math.exp(weight) * (found.low <= only_a - only_b <= found.high)
    return total


@pytest.mark.parametrize("shares", [(0.88, 0.04, 0.06), (0.5, 0.2, 0.1), (0.9, 0.05, 0.01)])
def test_paired_shares_cover_the_truth_as_often_as_they_say(shares: tuple[float, float, float]) -> None:
    """Never much less than 95 %; with few pairs that differ it is careful, and says more."""
    assert 0.93 <= exact_coverage(30, *shares) < 0.9999


def test_paired_shares_without_a_difference_are_not_certain() -> None:
    same = [True] * 100
    found = paired_shares(same, same)
    assert found.estimate == 0.0
    assert found.low == pytest.approx(-found.high) and 0.01 < found.high < 0.05
    assert paired_shares([True] * 400, [True] * 400).high < found.high


def test_paired_shares_turn_round() -> None:
    a = [True] * 30 + [False] * 10
    b = [True] * 20 + [False] * 10 + [True] * 5 + [False] * 5
    one, other = paired_shares(a, b), paired_shares(b, a)
    assert (one.estimate, one.low, one.high) == pytest.approx((-other.estimate, -other.high, -other.low))
    with pytest.raises(ValueError, match="as many in both"):
        paired_shares([True], [])
