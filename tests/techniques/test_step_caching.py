"""EasyCache's rule against its formula written out, and against flows whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from edgerun.models import rectified_flow
from edgerun.techniques.step_caching import StepCaching

NOISE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def bent(x: torch.Tensor, t: float) -> torch.Tensor:
    """A velocity that turns with the input and with time."""
    return torch.tanh(0.7 * x.roll(1, -1) + TARGET) * (1 + 0.3 * math.sin(5 * t))


def written_out(steps: int, threshold: float, warm_up: int) -> tuple[torch.Tensor, list[int]]:
    """The rule as the paper's text has it, step by step, on plain lists."""
    times = rectified_flow.times(steps, 1.0)
    xs, vs, at, change = [NOISE], [], [], 0.0
    for n, t in enumerate(times):
        x, v = xs[n], None
        if n >= warm_up and n < steps - 1:
            i, j = at[-1], at[-2]
            k = (vs[i] - vs[j]).abs().mean() / (xs[i] - xs[j]).abs().mean()
            change += float(k * (x - xs[n - 1]).abs().mean() / vs[n - 1].abs().mean())
            if change < threshold:
                v = x + vs[i] - xs[i]
        if v is None:
            v, change = bent(x, t), 0.0
            at.append(n)
        vs.append(v)
        xs.append(x + v * (t - (times[n + 1] if n + 1 < steps else 0.0)))
    return xs[-1], at


@pytest.mark.parametrize(("threshold", "warm_up"), [(0.02, 2), (0.1, 4), (0.2, 3)])
def test_equals_the_rule_written_out(threshold: float, warm_up: int) -> None:
    rule = StepCaching(24, threshold, warm_up)
    found = rectified_flow.sample(bent, NOISE, rectified_flow.times(24, 1.0), rule)
    expected, at = written_out(24, threshold, warm_up)
    assert list(found.evaluated) == at
    assert 4 < len(at) < 24
    assert torch.allclose(found.latents, expected, rtol=1e-12, atol=1e-12)


def test_a_higher_threshold_evaluates_less_and_errs_more() -> None:
    plain = rectified_flow.sample(bent, NOISE, rectified_flow.times(30, 1.0)).latents
    counts, errors = [], []
    for threshold in (1e-9, 0.05, 0.3):
        found = rectified_flow.sample(bent, NOISE, rectified_flow.times(30, 1.0), StepCaching(30, threshold))
        counts.append(found.evaluations)
        errors.append(float((found.latents - plain).norm()))
    assert counts[0] == 30 and counts[0] > counts[1] > counts[2]
    assert errors[0] == 0.0 < errors[1] < errors[2]


def test_the_first_steps_and_the_last_are_evaluated() -> None:
    rule = StepCaching(20, 1e9, warm_up=6)
    found = rectified_flow.sample(bent, NOISE, rectified_flow.times(20, 1.0), rule)
    assert found.evaluated == (*range(6), 19)


def test_an_output_that_moves_with_its_input_is_followed_exactly() -> None:
    """v = x + c: what the model does to its input never changes, so nothing is lost by keeping it."""
    plain = rectified_flow.sample(lambda x, t: x + TARGET, NOISE, rectified_flow.times(20, 1.0))
    rule = StepCaching(20, 10.0, warm_up=2)
    found = rectified_flow.sample(lambda x, t: x + TARGET, NOISE, rectified_flow.times(20, 1.0), rule)
    assert found.evaluations < plain.evaluations
    assert torch.allclose(found.latents, plain.latents, rtol=1e-12, atol=1e-12)


def test_an_input_that_stands_still_and_a_velocity_of_zero_are_evaluated() -> None:
    nothing = rectified_flow.sample(
        lambda x, t: torch.zeros_like(x), NOISE, rectified_flow.times(8, 1.0), StepCaching(8, 1.0, 2)
    )
    assert nothing.evaluations == 8 and torch.equal(nothing.latents, NOISE)


@pytest.mark.parametrize(("threshold", "warm_up"), [(0.0, 5), (-1.0, 5), (math.nan, 5), (math.inf, 5), (0.1, 1)])
def test_settings_out_of_range(threshold: float, warm_up: int) -> None:
    with pytest.raises(ValueError, match="step caching needs"):
        StepCaching(10, threshold, warm_up)
