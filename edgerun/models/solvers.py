"""How a step along the flow is made (rectified_flow.py): the names, for those that need no torch."""

from __future__ import annotations

from typing import Literal

Solver = Literal["euler", "ab2"]
SOLVERS: tuple[Solver, ...] = ("euler", "ab2")  # in the order of csrc/runtime/video_bundle.h
