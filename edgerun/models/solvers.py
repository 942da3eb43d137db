"""How the steps along the flow are made (rectified_flow.py), for those that need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edgerun.errors import EdgerunError

Solver = Literal["euler", "ab2"]
SOLVERS: tuple[Solver, ...] = ("euler", "ab2")  # in the order of csrc/runtime/video_bundle.h


def respaced(times: Sequence[float], steps: int) -> list[float]:
    """`steps` times of the same schedule (rectified_flow.times) as `times`; its ratio is read from the second of them.

    Raises EdgerunError where there is no second.
    """
    if len(times) < 2:
        raise EdgerunError("the bundle has one step, which does not tell how others would be spaced: export it again")
    u = 1.0 - 1.0 / len(times)
    ratio = times[1] * (1.0 - u) / (u * (1.0 - times[1]))
    every = [1.0 - i / steps for i in range(steps)]
    return [ratio * u / (ratio * u + (1.0 - u)) for u in every]
