"""The sampler and its step rules against Open-Sora's formulas and flows whose end is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from edgerun import compare
from edgerun.errors import EdgerunError
from edgerun.models import rectified_flow
from edgerun.models.solvers import Solver, respaced
from edgerun.techniques.linear_proportional_leap import CosineLeap, FixedLeap
from tests.models.small_stdit import FPS, PIXELS, SMALL, formula, random_model


def open_sora_times(steps: int, height: int, width: int, frames: int, base: int = 512) -> list[float]:
    """Open-Sora v1.2's timestep_transform of its evenly spaced times, written out; in 0..1 instead of 0..1000."""
    latents = 1 if frames == 1 else frames // 17 * 5
    ratio = math.sqrt(height * width / base**2) * math.sqrt(latents)
    evenly = [1.0 - i / steps for i in range(steps)]
    return [ratio * u / (1 + (ratio - 1) * u) for u in evenly]


@pytest.mark.parametrize(
    ("height", "width", "frames", "ratio"),
    [
        (256, 256, 51, math.sqrt(15) / 2),
        (512, 512, 1, 1.0),
        (144, 256, 51, 0.375 * math.sqrt(15)),  # sqrt(144 x 256) = 192
        (240, 426, 68, math.sqrt(240 * 426 * 20) / 512),
        (720, 1280, 102, math.sqrt(720 * 1280 * 30) / 512),
        (1024, 1024, 1, 2.0),
    ],
)
def test_all_times_of_open_sora(height: int, width: int, frames: int, ratio: float) -> None:
    assert rectified_flow.shift_ratio((height, width), frames) == pytest.approx(ratio, rel=1e-12)
    times = rectified_flow.times(30, rectified_flow.shift_ratio((height, width), frames))
    expected = open_sora_times(30, height, width, frames)
    assert times[0] == 1.0 and len(times) == 30
    assert times == pytest.approx(expected, rel=1e-12)
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


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.94])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_other_steps_of_the_same_schedule(ratio: float, steps: int) -> None:
    expected = rectified_flow.times(steps, ratio)
    assert respaced(rectified_flow.times(30, ratio), steps) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(EdgerunError, match="the bundle has one step"):
        respaced([1.0], steps)


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


def test_second_order_steps_are_those_of_the_formula() -> None:
    """v = x t and steps of any length: each goes along the line through two velocities, at its middle."""
    times = [1.0, 0.9, 0.5, 0.45, 0.1]
    x, before = 1.0, None
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        v = x * t
        middle = v if before is None else v + (v - before[1]) / (t - before[0]) * ((t + following) / 2 - t)
        x, before = x + middle * (t - following), (t, v)
    done = rectified_flow.sample(lambda x, t: x * t, torch.ones(1, dtype=torch.float64), times, solver="ab2")
    assert float(done.latents) == pytest.approx(x, rel=1e-12) and done.evaluations == len(times)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_the_order_of_a_solver(solver: Solver, order: int) -> None:
    """Of dx/dt = -x t, whose solution from 1 at t = 1 is exp(1 / 2) at 0: twice the steps, the error by 2^order."""
    one = torch.ones(1, dtype=torch.float64)
    errors = [
        abs(float(rectified_flow.sample(lambda x, t: x * t, one, times, solver=solver).latents) - math.exp(0.5))
        for times in (rectified_flow.times(steps, 2.0) for steps in (200, 400))
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.02)


def test_a_leap_ends_second_order_steps_along_the_velocity_as_it_is() -> None:
    times = rectified_flow.times(6, 1.5)
    states: list[torch.Tensor] = []
    one = torch.ones(1, dtype=torch.float64)
    rectified_flow.sample(lambda x, t: x * t, one, times, on_step=lambda _, x: states.append(x), solver="ab2")
    done = rectified_flow.sample(lambda x, t: x * t, one, times, FixedLeap(3), solver="ab2")
    assert float(done.latents) == pytest.approx(float(states[1] + states[1] * times[2] * times[2]), rel=1e-12)


def test_guidance() -> None:
    with_prompt, without = torch.tensor([3.0]), torch.tensor([1.0])
    assert rectified_flow.guide(with_prompt, without, 7.0).item() == 15.0
    assert rectified_flow.guide(with_prompt, without, 1.0).item() == 3.0


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.0, -2.5])
def test_guidance_of_every_element(scale: float) -> None:
    """The weighted sum scale * prompt + (1 - scale) * null, element by element."""
    with_prompt, without = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guided = rectified_flow.guide(with_prompt, without, scale)
    assert guided.shape == with_prompt.shape and guided.dtype == torch.float64
    expected = [scale * a + (1 - scale) * b for a, b in zip(with_prompt.flatten(), without.flatten(), strict=True)]
    assert compare.relative_l2(guided.flatten(), expected) <= compare.tolerance("formula_fp64")


def test_guided_steps_of_a_denoiser() -> None:
    """Three steps of a small STDiT in float64 from noise to t = 0, against its formulas, the times' and Euler's."""
    model, scale, pixels = random_model(), 7.0, PIXELS
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(SMALL.in_channels, 5, 5, 7, generator=generator, dtype=torch.float64)
    caption = torch.randn(4, SMALL.caption_channels, generator=generator, dtype=torch.float64)
    both = torch.stack([caption, model.null_caption(4)])
    asked: list[float] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        asked.append(t)
        time, fps = (torch.full((2,), value, dtype=torch.float64) for value in (t, FPS))
        return rectified_flow.guide(*model(torch.stack([x, x]), time, both, fps=fps, pixels=pixels), scale)

    schedule = rectified_flow.times(3, rectified_flow.shift_ratio(pixels, 17, base=64))
    done = rectified_flow.sample(velocity, noise, schedule)

    x, null = noise.numpy(), model.state_dict()["y_embedder.y_embedding"][:4].numpy()
    expected_times = open_sora_times(3, *pixels, frames=17, base=64)
    for t, following in zip(expected_times, [*expected_times[1:], 0.0], strict=True):
        with_prompt, without = formula(model, x, t, caption.numpy()), formula(model, x, t, null)
        x = x + (without + scale * (with_prompt - without)) * (t - following)
    assert asked == pytest.approx(expected_times, rel=1e-12) and done.evaluations == 3
    assert compare.relative_l2(done.latents, x) <= compare.tolerance("formula_fp64")
    assert compare.relative_l2(done.latents, noise) > 0.1


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
