"""Linear proportional leap (LPL, arXiv 2502.04363 section 3.1): stop evaluating when the flow has become straight.

With v the velocity at t, all remaining Euler steps along that same v add up to one: x(0) = x + v t, whatever the
schedule. `FixedLeap` does it after a given number of evaluations. `CosineLeap` is the paper's dynamic rule: once t is
small enough, leap when the cosine between consecutive velocities has not improved by `tolerance` for `patience` steps.

Ours: the rule is gated by t, not by the step's number, because a shifted schedule still has 0.7 of the noise after
half of its steps; the cosine is of the whole latent, not of one channel of one frame; and a rule belongs to one sample
(the published code carries its state over to the next prompt).
"""

from __future__ import annotations

import torch


class FixedLeap:
    """Leaps after `evaluations` of the model."""

    def __init__(self, evaluations: int) -> None:
        if evaluations < 1:
            raise ValueError(f"a leap after {evaluations} evaluations; give at least 1")
        self._left = evaluations

    def predict(self, index: int, t: float, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def observe(self, index: int, t: float, x: torch.Tensor, velocity: torch.Tensor) -> bool:
        self._left -= 1
        return self._left <= 0


class CosineLeap:
    """Leaps when consecutive velocities no longer come closer to each other."""

    def __init__(self, latest_time: float = 0.5, tolerance: float = 1e-3, patience: int = 3) -> None:
        """latest_time: no leap while t is above it. tolerance: what counts as an improvement of the cosine."""
        if not 0.0 < latest_time <= 1.0 or patience < 1:
            raise ValueError(
                f"a cosine leap needs 0 < latest_time <= 1 and patience >= 1, not {latest_time}, {patience}"
            )
        self.latest_time, self.tolerance, self.patience = latest_time, tolerance, patience
        self._previous: torch.Tensor | None = None
        self._best = -1.0
        self._stale = 0

    def predict(self, index: int, t: float, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def observe(self, index: int, t: float, x: torch.Tensor, velocity: torch.Tensor) -> bool:
        previous, self._previous = self._previous, velocity.detach()
        if previous is None:
            return False
        cosine = float(torch.nn.functional.cosine_similarity(previous.flatten(), velocity.flatten(), dim=0))
        if cosine > self._best + self.tolerance:
            self._best, self._stale = cosine, 0
        else:
            self._stale += 1
        return t <= self.latest_time and self._stale >= self.patience
