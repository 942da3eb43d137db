"""The sampler and its step rules against Open-Sora's formulas and flows whose end is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from edgerun import compare
from edgerun.models import rectified_flow
from edgerun.techniques.linear_proportional_leap import CosineLeap, FixedLeap


def test_times_of_open_sora() -> None:
    """256 x 256 and 51 frames: ratio = 1/2 sqrt(15); t_i = ratio u / (1 + (ratio - 1) u), u = 1 - i/K."""
    ratio = rectified_flow.shift_ratio((256, 256), 51)
    assert ratio == pytest.approx(0.5 * math.sqrt(15), rel=1e-12)
    times = rectified_flow.times(30, ratio)
    assert times[0] == 1.0 and len(times) == 30
    assert times[15] == pytest.approx(ratio * 0.5 / (1 + (ratio - 1) * 0.5), rel=1e-12)
    assert all(a > b for a, b in itertools.pairwise(times))


def test_times_begin_at_exactly_one_for_every_size() -> None:
    for side in range(16, 513, 8):
        ratio = rectified_flow.shift_ratio((side, 16), 17)
        assert rectified_flow.times(3, ratio)[0] == 1.0


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (17, 5), (51, 15), (68, 20), (60, 15)])
def test_ratio_counts_five_latents_for_every_whole_seventeen_frames(frames: int, latents: int) -> None:
    assert rectified_flow.shift_ratio((512, 512), frames) == pytest.approx(math.sqrt(latents))


@pytest.mark.parametrize(("frames", "latents"), [(2, 1), (4, 1), (5, 2), (16, 4)])
def test_a_clip_without_a_whole_chunk_counts_its_latents(frames: int, latents: int) -> None:
    assert rectified_flow.shift_ratio((512, 512), frames) == pytest.approx(math.sqrt(latents))


def test_the_chunk_is_the_autoencoders() -> None:
    assert rectified_flow.shift_ratio((512, 512), 12, chunk=(5, 2)) == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize("call", [lambda: rectified_flow.times(0, 1.0), lambda: rectified_flow.shift_ratio((8, 8), 0)])
def test_impossible_schedules_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"0 steps|0 frames"):
        call()  # type: ignore[operator]


def test_a_straight_flow_arrives_whatever_the_schedule() -> None:
    data, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    for steps in (1, 7, 30):
        done = rectified_flow.sample(lambda x, t: data - noise, noise, rectified_flow.times(steps, 1.9))
        assert done.evaluations == steps
        assert compare.max_abs(done.latents.numpy(), data.numpy()) <= 1e-12


def test_euler_steps_are_those_of_the_formula() -> None:
    """dx/dt = -v with v = x t: x_{i+1} = x_i (1 + t_i (t_i - t_{i+1}))."""
    times = rectified_flow.times(9, 1.5)
    factor = 1.0
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        factor *= 1 + t * (t - following)
    done = rectified_flow.sample(lambda x, t: x * t, torch.ones(1, dtype=torch.float64), times)
    assert float(done.latents) == pytest.approx(factor, rel=1e-12)


def test_guidance() -> None:
    with_prompt, without = torch.tensor([3.0]), torch.tensor([1.0])
    assert rectified_flow.guide(with_prompt, without, 7.0).item() == 15.0
    assert rectified_flow.guide(with_prompt, without, 1.0).item() == 3.0


def curved(x: torch.Tensor, t: float) -> torch.Tensor:
    """A velocity that turns with t and settles below 0.5."""
    angle = 3.0 * max(0.0, t - 0.5)
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


@pytest.mark.parametrize("evaluations", [1, 5, 30])
def test_fixed_leap_is_all_remaining_steps_along_the_last_velocity(evaluations: int) -> None:
    times = rectified_flow.times(30, 2.0)
    noise = torch.zeros(2, dtype=torch.float64)
    done = rectified_flow.sample(curved, noise, times, FixedLeap(evaluations))
    x, last = noise, torch.zeros(2, dtype=torch.float64)
    for index, (t, following) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        last = curved(x, t) if index < evaluations else last
        x = x + last * (t - following)
    assert done.evaluations == evaluations
    assert compare.max_abs(done.latents.numpy(), x.numpy()) <= 1e-12


def test_cosine_leap_waits_for_its_time_and_its_patience() -> None:
    times = rectified_flow.times(30, 2.0)
    done = rectified_flow.sample(curved, torch.zeros(2, dtype=torch.float64), times, CosineLeap(0.5, 1e-3, 3))
    stopped_at = times[done.evaluated[-1]]
    straight = [index for index, t in enumerate(times) if t <= 0.5]
    assert stopped_at <= 0.5 and done.evaluations < 30
    assert done.evaluated[-1] >= straight[0]
    # Straight from the start: three velocities without a better cosine are enough, but not before its time.
    flat = rectified_flow.sample(lambda x, t: torch.ones(2), torch.zeros(2), times, CosineLeap(0.5, 1e-3, 3))
    assert flat.evaluated[-1] == straight[0]


def test_cosine_leap_goes_on_while_the_flow_straightens() -> None:
    def straightening(x: torch.Tensor, t: float) -> torch.Tensor:
        angle = 3.0 * t * t  # consecutive velocities come ever closer
        return torch.tensor([math.cos(angle), math.sin(angle)])

    times = [1.0 - index / 12 for index in range(12)]
    done = rectified_flow.sample(straightening, torch.zeros(2), times, CosineLeap(1.0, 1e-4, 1))
    assert done.evaluations == 12


def test_a_rule_that_predicts_saves_evaluations() -> None:
    class EverySecond:
        def __init__(self) -> None:
            self.last = torch.zeros(1)

        def predict(self, index: int, t: float, x: torch.Tensor) -> torch.Tensor | None:
            return self.last if index % 2 else None

        def observe(self, index: int, t: float, x: torch.Tensor, velocity: torch.Tensor) -> bool:
            self.last = velocity
            return False

    seen: list[int] = []
    done = rectified_flow.sample(
        lambda x, t: torch.ones(1),
        torch.zeros(1),
        rectified_flow.times(6, 1.0),
        EverySecond(),
        lambda i, x: seen.append(i),
    )
    assert done.evaluated == (0, 2, 4) and seen == [0, 1, 2, 3, 4, 5]
    assert done.latents.item() == pytest.approx(1.0)


@pytest.mark.parametrize("make", [lambda: FixedLeap(0), lambda: CosineLeap(0.0), lambda: CosineLeap(patience=0)])
def test_impossible_rules_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"leap"):
        make()  # type: ignore[operator]
