"""Quality measures against cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from edgerun.evaluation import clips, video_quality
from edgerun.evaluation.clips import Clip


def noise(seed: int = 0, frames: int = 3) -> torch.Tensor:
    return torch.rand((3, frames, 24, 24), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def texture_that_moves(pixels_x: int, pixels_y: int, frames: int = 4) -> torch.Tensor:
    """A smooth random texture of 48 x 48 pixels that moves by whole pixels a frame."""
    coarse = torch.rand((1, 3, 20, 20), generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic")[0].clamp(0, 1) * 2 - 1
    return torch.stack([texture[:, 8 + t * pixels_y :, 8 + t * pixels_x :][:, :48, :48] for t in range(frames)], dim=1)


def test_psnr_of_equal_clips_is_infinite() -> None:
    assert video_quality.psnr(noise(), noise()) == math.inf


@pytest.mark.parametrize(("difference", "expected"), [(0.2, 20.0), (0.02, 40.0), (2.0, 0.0)])
def test_psnr_of_a_known_error(difference: float, expected: float) -> None:
    low = torch.full((3, 4, 8, 8), -1.0)
    assert video_quality.psnr(low + difference, low) == pytest.approx(expected, abs=1e-4)


def test_psnr_is_of_the_whole_clip_and_of_what_is_shown() -> None:
    still = torch.zeros(3, 4, 8, 8)
    one_frame = still.clone()
    one_frame[:, 0] = 0.4  # a mean squared error of 0.16 / 4
    assert video_quality.psnr(one_frame, still) == pytest.approx(20.0, abs=1e-4)
    assert video_quality.psnr(still + 5.0, still + 1.0) == math.inf


def test_ssim_of_equal_clips_is_one() -> None:
    assert video_quality.ssim(noise(), noise()) == pytest.approx(1.0)


def test_ssim_of_flat_clips_is_the_luminance_term() -> None:
    a, b = torch.full((3, 2, 16, 16), 0.5), torch.full((3, 2, 16, 16), 0.25)
    constant = 0.01**2
    expected = (2 * 0.75 * 0.625 + constant) / (0.75**2 + 0.625**2 + constant)  # in [0, 1]
    assert video_quality.ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_unrelated_and_inverted_noise() -> None:
    assert abs(video_quality.ssim(noise(0), noise(1))) < 0.1
    assert video_quality.ssim(noise(0), -noise(0)) < -0.6


def test_flicker_of_a_known_difference() -> None:
    assert video_quality.temporal_flicker(torch.zeros(3, 5, 8, 8)) == 0.0
    blinking = torch.zeros(3, 5, 8, 8)
    blinking[:, 1::2] = 2.0 / 255.0  # one level of 8 bits, every frame
    assert video_quality.temporal_flicker(blinking) == pytest.approx(1.0, rel=1e-5)
    half = blinking.clone()
    half[:, :, :4] = 0.0
    assert video_quality.temporal_flicker(half) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("x", "y", "speed"), [(0, 0, 0.0), (1, 0, 1.0), (0, 1, 1.0), (1, 1, math.sqrt(2.0)), (2, 0, 2.0)]
)
def test_dynamic_degree_of_a_texture_that_moves(x: int, y: int, speed: float) -> None:
    assert video_quality.dynamic_degree(texture_that_moves(x, y), pairs=3) == pytest.approx(speed, rel=0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("colour", "background"), [("white", "black"), ("green", "grey"), ("purple", "grey")]
)  # the last two hardly differ in brightness
def test_dynamic_degree_of_a_shape_that_moves(colour: str, background: str) -> None:
    clip = Clip(colour, "square", "moves right", background, "large", "quickly")
    batch = clips.enact([clip], torch.Generator().manual_seed(1), "cpu")
    speed = float((batch.position[0, -1] - batch.position[0, 0]).norm()) / 50
    assert video_quality.dynamic_degree(clips.render(batch)[0], pairs=6) == pytest.approx(speed, rel=0.25)


def test_dynamic_degree_of_noise_is_small() -> None:
    still = 0.05 * torch.randn((3, 5, 48, 48), generator=torch.Generator().manual_seed(0))
    assert video_quality.dynamic_degree(still, pairs=4) < 0.1


def test_what_cannot_be_measured_is_refused() -> None:
    clip = torch.zeros(3, 4, 16, 16)
    with pytest.raises(ValueError, match="reference"):
        video_quality.psnr(clip, clip[:, :3])
    with pytest.raises(ValueError, match="uint8"):
        video_quality.psnr(clip.to(torch.uint8), clip.to(torch.uint8))
    with pytest.raises(ValueError, match="11 x 11"):
        video_quality.ssim(clip[..., :8], clip[..., :8])
    with pytest.raises(ValueError, match="T of 2 or more"):
        video_quality.temporal_flicker(clip[:, :1])
    with pytest.raises(ValueError, match="0 pairs"):
        video_quality.dynamic_degree(clip, pairs=0)
    with pytest.raises(ValueError, match="not finite"):
        video_quality.psnr(clip / 0.0, clip)
