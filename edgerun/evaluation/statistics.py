"""Intervals for accuracies: how sure a table's figure is, and whether two runs on the same samples differ."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_BOOTSTRAP_RESAMPLES = 10_000


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


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of a - b over paired samples with a 95 % percentile bootstrap interval; one seed, one result.

    Raises ValueError when the sequences are empty or differ in length.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} samples: needs as many in both, and at least one")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], seed=seed)


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
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
