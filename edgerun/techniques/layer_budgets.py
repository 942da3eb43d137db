"""Which layer attends how much: the cheapest choice for every layer whose divergences add up to no more than a limit.

Each layer's options were measured alone, every other layer dense. Taking divergences as additive makes this a knapsack
with one option from every layer; what it gives is a proposal, which is then measured as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgerun.recipe import LayerChoice

_STEPS = 2000  # parts of the limit that divergences are rounded up to: the sum never exceeds the limit


@dataclasses.dataclass(frozen=True)
class Option:
    """One way for one layer. divergence: mean KL to the dense model, nats; cost: attended pairs."""

    choice: LayerChoice
    divergence: float
    cost: float


DENSE = LayerChoice()


def cheapest(layers: Sequence[Sequence[Option]], limit: float) -> tuple[Option, ...]:
    """One option for each layer, of least total cost with total divergence at most `limit`; of a layer's options that
    cost the same, the least divergent. Exact but for the rounding of divergences to limit / 2000, upwards.

    Every layer needs an option with divergence 0, the dense one, so that there is always an answer. Raises ValueError
    where one has none, or for a negative limit.
    """
    if limit < 0 or not all(any(option.divergence <= 0 for option in options) for options in layers):
        raise ValueError(f"limit {limit} must be at least 0, and every layer needs an option without divergence")
    layers = [sorted(options, key=lambda option: option.divergence) for options in layers]
    steps = _STEPS if limit > 0 else 0
    cost = np.zeros(steps + 1)  # least cost of the layers so far by steps that they may use
    picks: list[np.ndarray] = []
    for options in layers:
        tried = np.full((len(options), steps + 1), np.inf)
        for index, option in enumerate(options):
            used = _steps(option.divergence, limit, steps)
            if used <= steps:
                tried[index, used:] = cost[: steps + 1 - used] + option.cost
        picks.append(tried.argmin(axis=0))
        cost = tried.min(axis=0)
    left, chosen = steps, []
    for options, pick in zip(reversed(layers), reversed(picks), strict=True):
        chosen.append(options[int(pick[left])])
        left -= _steps(chosen[-1].divergence, limit, steps)
    return tuple(reversed(chosen))


def _steps(divergence: float, limit: float, steps: int) -> int:
    if divergence <= 0:
        return 0
    if limit <= 0 or divergence > limit:
        return steps + 1
    return int(np.ceil(divergence / limit * steps))
