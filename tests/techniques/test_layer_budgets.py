"""The knapsack over layers against every combination, and what it must never do."""

from __future__ import annotations

import itertools
import random

import pytest

from edgerun.recipe import LayerChoice
from edgerun.techniques.layer_budgets import DENSE, Option, cheapest


def options(*pairs: tuple[float, float]) -> list[Option]:
    """Options of (divergence, cost), the first dense."""
    return [Option(DENSE if i == 0 else LayerChoice(100 * i), *pair) for i, pair in enumerate(pairs)]


def test_by_hand() -> None:
    layers = [options((0, 100), (0.01, 50), (0.04, 20)), options((0, 100), (0.02, 70))]
    assert [o.cost for o in cheapest(layers, 0.0)] == [100, 100]
    assert [o.cost for o in cheapest(layers, 0.0101)] == [50, 100]
    assert [o.cost for o in cheapest(layers, 0.0301)] == [50, 70]
    assert [o.cost for o in cheapest(layers, 0.0401)] == [20, 100]
    assert [o.cost for o in cheapest(layers, 1.0)] == [20, 70]


@pytest.mark.parametrize("seed", range(20))
def test_as_cheap_as_the_best_of_all_combinations(seed: int) -> None:
    rng = random.Random(seed)
    layers = [
        options((0.0, 1.0), *((rng.uniform(0, 0.02), rng.uniform(0.1, 1)) for _ in range(rng.randrange(4))))
        for _ in range(5)
    ]
    limit = rng.uniform(0.0, 0.05)
    found = cheapest(layers, limit)
    assert sum(o.divergence for o in found) <= limit

    def best(limit: float) -> float:
        return min(
            sum(o.cost for o in one) for one in itertools.product(*layers) if sum(o.divergence for o in one) <= limit
        )

    cost = sum(o.cost for o in found)
    assert best(limit) - 1e-12 <= cost <= best(limit * (1 - len(layers) / 2000)) + 1e-12


def test_of_equal_costs_the_least_divergent() -> None:
    (found,) = cheapest([options((0, 9.0), (0.03, 1.0), (0.01, 1.0), (0.02, 1.0))], 1.0)
    assert found.divergence == 0.01
    assert cheapest([options((0, 1.0), (0.0, 1.0))], 0.01)[0].choice == DENSE


def test_a_layer_that_cannot_be_dense_is_refused() -> None:
    with pytest.raises(ValueError, match="without divergence"):
        cheapest([[Option(LayerChoice(100), 0.1, 1.0)]], 1.0)
