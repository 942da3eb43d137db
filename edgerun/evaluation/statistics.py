"""Intervals for accuracies: how sure a table's figure is, and whether two runs on the same samples differ."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_BOOTSTRAP_RESAMPLES = 10_000
# 97.5 % quantiles of Student's t distribution for 1 to 30 degrees of freedom; beyond, the normal's is within 0.08.
_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, in the units of the samples."""

    estimate: float
    low: float
    high: float


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), 0 to 1.

    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: needs 0 <= successes <= n and n > 0")
    share = successes / n
    square = _Z_95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z_95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At 0 and n successes the bound is exactly 0 or 1; rounding must not move it inside.
    return Interval(
        share, 0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half)
    )


def paired_shares(a: Sequence[bool], b: Sequence[bool]) -> Interval:
    """Share of a less share of b over paired yes and no, with Newcombe's 95 % interval (1998, paired data, method 10).

    Made of Wilson's intervals and the correlation of the pairs, so that without a pair that differs it does not shrink
    to nothing, as a bootstrap does. Raises ValueError when the sequences are empty or differ in length.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} samples: needs as many in both, and at least one")
    n = len(a)
    both = sum(x and y for x, y in zip(a, b, strict=True))
    only_a, only_b = sum(a) - both, sum(b) - both
    neither = n - both - only_a - only_b
    first, second = wilson_interval(both + only_a, n), wilson_interval(both + only_b, n)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    product: float = both * neither - only_a * only_b
    if product > 0:
        product = max(0.0, product - n / 2)  # a continuity correction, towards no correlation
    correlation = product / math.sqrt(margins) if margins else 0.0
    down_a, up_a = first.estimate - first.low, first.high - first.estimate
    down_b, up_b = second.estimate - second.low, second.high - second.estimate
    low = math.sqrt(max(0.0, down_a**2 - 2 * correlation * down_a * up_b + up_b**2))
    high = math.sqrt(max(0.0, up_a**2 - 2 * correlation * up_a * down_b + down_b**2))
    difference = first.estimate - second.estimate
    return Interval(difference, difference - low, difference + high)


def mean_interval(samples: Sequence[float]) -> Interval:
    """The mean with Student's 95 % t interval, for a handful of samples: a bootstrap of so few is too narrow.

    Raises ValueError for fewer than 2 samples.
    """
    n = len(samples)
    if n < 2:
        raise ValueError(f"{n} samples: an interval needs at least 2")
    mean = math.fsum(samples) / n
    variance = math.fsum((x - mean) ** 2 for x in samples) / (n - 1)
    half = (_T_95[n - 2] if n - 1 <= len(_T_95) else _Z_95) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of a - b over paired samples with a 95 % percentile bootstrap interval; one seed, one result.

    Raises ValueError when the sequences are empty or differ in length.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} samples: needs as many in both, and at least one")
    return bootstrap_mean([x - y for x, y in zip(a, b, strict=True)], seed=seed)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of samples with a 95 % percentile bootstrap interval; one seed, one result.

    Raises ValueError when there is no sample.
    """
    if not values:
        raise ValueError("0 samples: needs at least one")
    n = len(values)
    mean = math.fsum(values) / n
    rng = random.Random(f"paired_difference/{seed}")
    means = sorted(math.fsum(rng.choices(values, k=n)) / n for _ in range(_BOOTSTRAP_RESAMPLES))
    return Interval(mean, means[int(0.025 * _BOOTSTRAP_RESAMPLES)], means[int(0.975 * _BOOTSTRAP_RESAMPLES) - 1])
