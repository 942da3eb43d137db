"""Rectified flow as Open-Sora v1.2 samples it: times, guidance, and steps from noise to data.

The model gives the velocity v = data - noise at x(t) = (1 - t) data + t noise. Times run from 1 down; a step is
x += v * (t_i - t_{i+1}), the last one to t = 0. `ab2` is the second-order Adams-Bashforth step instead, which has the
flow turn on as it did since the step before, with v' and t' of that one:

    x += (v + (t_i - t_{i+1}) / (2 (t' - t_i)) (v - v')) (t_i - t_{i+1})

It asks the model no more often, so it needs fewer steps for an error; the first step, which has none before it, is
Euler's. Bigger videos spend more steps near the noise: evenly spaced u becomes

    t = ratio u / (1 + (ratio - 1) u),   ratio = sqrt(height width / base^2) * sqrt(latent frames)

How many evaluations are made, and what stands in for the others, is a `StepRule`'s business (linear_proportional_leap,
step_caching): the loop asks it before every step.

Source: Open-Sora v1.2.0, opensora/schedulers/rf; arXiv 2403.03206 section 3.1. The second-order step: Hairer, Norsett
and Wanner, Solving Ordinary Differential Equations I, III.5 (steps of any length).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from edgerun.models.solvers import SOLVERS, Solver

Velocity = Callable[[torch.Tensor, float], torch.Tensor]  # (x, t) → v of x's shape
OFFICIAL_BASE = 512  # pixels


def shift_ratio(
    pixels: tuple[int, int], frames: int, base: int = OFFICIAL_BASE, chunk: tuple[int, int] = (17, 4)
) -> float:
    """By how much times lean towards the noise.

    frames: of video; one is an image. chunk: frames of an autoencoder's chunk, and how many of them are a latent. Only
    whole chunks count. Ours: a clip without one counts its latents, where the reference has 0 and no schedule.
    """
    if frames < 1:
        raise ValueError(f"{frames} frames: a clip has at least 1")
    whole, factor = chunk
    latents = frames // whole * -(-whole // factor) or -(-frames // factor)
    return math.sqrt(pixels[0] * pixels[1]) / base * math.sqrt(latents)


def shift_time(u: torch.Tensor, ratio: float) -> torch.Tensor:
    """u in 0..1, of any shape → t in 0..1."""
    return ratio * u / (ratio * u + (1 - u))  # exactly 1 at u = 1, where the other spelling can round above it


def times(steps: int, ratio: float) -> list[float]:
    """The `steps` times at which the velocity is evaluated, from 1 down; 0 is left out."""
    if steps < 1:
        raise ValueError(f"{steps} steps; give at least 1")
    u = 1 - torch.arange(steps, dtype=torch.float64) / steps
    return [float(t) for t in shift_time(u, ratio)]


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: the prompt's velocity, `scale` times as far from the null caption's."""
    return unconditional + scale * (conditional - unconditional)


def advance(
    x: torch.Tensor, v: torch.Tensor, t: float, following: float, before: tuple[float, torch.Tensor] | None = None
) -> torch.Tensor:
    """x at `following`. before: time and velocity of the step before, which a second-order step looks back at."""
    if before is not None:
        v = v + (t - following) / (2.0 * (before[0] - t)) * (v - before[1])
    return x + v * (t - following)


class StepRule(Protocol):
    """What decides, step by step, where a velocity comes from. One rule serves one sample: it keeps its state."""

    def predict(self, index: int, t: float, x: torch.Tensor) -> torch.Tensor | None:
        """The velocity of step `index` without an evaluation, or None: evaluate."""

    def observe(self, index: int, t: float, x: torch.Tensor, velocity: torch.Tensor) -> bool:
        """Takes note of an evaluated velocity; True ends the run: the last velocity is followed to t = 0."""


class EveryStep:
    """Evaluates at every time."""

    def predict(self, index: int, t: float, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def observe(self, index: int, t: float, x: torch.Tensor, velocity: torch.Tensor) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A finished run."""

    latents: torch.Tensor  # at t = 0
    evaluations: int  # how often the model was asked (NFE); guidance's two halves are one
    evaluated: tuple[int, ...]  # the steps at which it was


def sample(
    velocity: Velocity,
    noise: torch.Tensor,
    schedule: Sequence[float],
    rule: StepRule | None = None,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
    solver: Solver = "euler",
) -> Sampled:
    """Follow the flow from `noise` at schedule[0] to 0. `on_step` hears of every step done and its x.

    A rule that ends the run follows the last velocity as it is, with either solver. Raises ValueError for another one.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; choose {' or '.join(SOLVERS)}")
    rule = rule or EveryStep()
    x, evaluated = noise, []
    before: tuple[float, torch.Tensor] | None = None
    for index, t in enumerate(schedule):
        following = schedule[index + 1] if index + 1 < len(schedule) else 0.0
        v, leaps = rule.predict(index, t, x), False
        if v is None:
            v = velocity(x, t)
            evaluated.append(index)
            leaps = rule.observe(index, t, x, v)
            following = 0.0 if leaps else following
        x = advance(x, v, t, following, None if leaps else before)
        before = (t, v) if solver == "ab2" else None
        if on_step is not None:
            on_step(index, x)
        if following == 0.0:
            break
    return Sampled(x, len(evaluated), tuple(evaluated))
