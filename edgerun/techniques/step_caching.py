"""Step caching, the training-free rival of LPL: steps whose velocity would hardly change take it from a cache.

The rule of EasyCache (arXiv 2507.02860): how much the model's output changes for a change of its input,

    k = |v_i - v_j| / |x_i - x_j|     at the last two evaluations j < i, |.| the mean magnitude,

is nearly constant from step to step. So the relative change of the velocity at step n is expected to be

    k |x_n - x_{n-1}| / |v_{n-1}|     and these add up to E since the last evaluation.

While E is below a threshold, the velocity is x_n + (v_i - x_i): what the model did to its input is kept, no output.
The first steps are always evaluated, and so is the last.

Ours: times instead of step numbers have no part in it; a rule belongs to one sample.
"""

from __future__ import annotations

import math

import torch


class StepCaching:
    """Evaluates until the outputs are predictable, then only when the expected change has added up."""

    def __init__(self, steps: int, threshold: float = 0.05, warm_up: int = 5) -> None:
        """steps: of the schedule. threshold: of the added relative change. warm_up: first steps, always evaluated.

        Raises ValueError for a threshold that is not positive and finite, or fewer than two steps of warm-up: the rate
        k needs two evaluations.
        """
        if not 0.0 < threshold < math.inf or warm_up < 2 or steps < 1:
            raise ValueError(
                f"step caching needs a threshold above 0, a warm-up of at least 2 steps and at least 1 step, not "
                f"{threshold}, {warm_up}, {steps}"
            )
        self.steps, self.threshold, self.warm_up = steps, threshold, warm_up
        self._rate: float | None = None  # k
        self._evaluated: tuple[torch.Tensor, torch.Tensor] | None = None  # x and v of the last evaluation
        self._previous: tuple[torch.Tensor, torch.Tensor] | None = None  # x and v of the last step
        self._change = 0.0  # E

    def predict(self, index: int, t: float, x: torch.Tensor) -> torch.Tensor | None:
        if index < self.warm_up or index >= self.steps - 1 or self._rate is None:
            return None
        assert self._previous is not None and self._evaluated is not None
        before, velocity = self._previous
        size = _magnitude(velocity)
        self._change += self._rate * _magnitude(x - before) / size if size > 0 else math.inf
        if not self._change < self.threshold:  # an evaluation too many is the safe side for NaN
            return None
        start, output = self._evaluated
        kept = x + (output - start)
        self._previous = (x, kept)
        return kept

    def observe(self, index: int, t: float, x: torch.Tensor, velocity: torch.Tensor) -> bool:
        x, velocity = x.detach(), velocity.detach()
        if self._evaluated is not None:
            moved = _magnitude(x - self._evaluated[0])
            self._rate = _magnitude(velocity - self._evaluated[1]) / moved if moved > 0 else None
        self._evaluated = self._previous = (x, velocity)
        self._change = 0.0
        return False


def _magnitude(x: torch.Tensor) -> float:
    return float(x.abs().mean())
