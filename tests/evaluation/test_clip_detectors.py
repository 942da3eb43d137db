"""The detectors read what was drawn, also from lossy clips; wrong, still and empty clips count as wrong."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch

from edgerun.evaluation import clip_detectors, clips
from edgerun.evaluation.clip_detectors import Detection
from edgerun.evaluation.clips import Clip

Degrade = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@functools.cache
def drawn(count: int, seed: int) -> tuple[list[Clip], torch.Tensor]:
    wanted = clips.prompts(count, seed)
    return wanted, clips.render(clips.enact(wanted, torch.Generator().manual_seed(seed), "cpu"))


@functools.cache
def read(count: int, seed: int) -> list[Detection]:
    return [clip_detectors.detect(video) for video in drawn(count, seed)[1]]


def one(colour: str, shape: str, motion: str, background: str = "black", seed: int = 0) -> torch.Tensor:
    clip = Clip(colour, shape, motion, background)
    return clips.render(clips.enact([clip], torch.Generator().manual_seed(seed), "cpu"))[0]


def share_right(wanted: list[Clip], found: list[Detection]) -> float:
    right = [clip_detectors.agreement(a, b).all for a, b in zip(found, wanted, strict=True)]
    return sum(right) / len(right)


def blurred(video: torch.Tensor, sigma: float) -> torch.Tensor:
    steps = torch.arange(-4, 5)
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum())[None, None, None]
    frames = torch.nn.functional.pad(video, (4, 4, 4, 4), mode="replicate").flatten(0, 1)[:, None]
    frames = torch.nn.functional.conv2d(torch.nn.functional.conv2d(frames, kernel), kernel.mT)
    return frames.view_as(video)


def noisy(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return video + 0.05 * torch.randn(video.shape, generator=generator)


def halved(video: torch.Tensor) -> torch.Tensor:
    small = torch.nn.functional.interpolate(video, scale_factor=0.5, mode="area")
    return torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")


def quantised(video: torch.Tensor) -> torch.Tensor:
    """Blocks of 8 x 8 through a DCT whose steps grow with the frequency, from 0.1 to 1.5, as in JPEG."""
    k = torch.arange(8)
    transform = torch.cos(math.pi * (2 * k + 1) * k[:, None] / 16) * 0.5
    transform[0] /= math.sqrt(2.0)
    steps = 0.1 * (1 + k + k[:, None])
    blocks = video.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).transpose(3, 4)
    blocks = transform.T @ (transform @ blocks @ transform.T / steps).round().mul(steps) @ transform
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def tinted(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    gain = 0.85 + 0.2 * torch.rand((3, 1, 1, 1), generator=generator)
    return (video * gain + 0.2 * (torch.rand((3, 1, 1, 1), generator=generator) - 0.5)).clamp(-1, 1)


def mixed_in_time(video: torch.Tensor) -> torch.Tensor:
    padded = torch.cat((video[:, :1], video, video[:, -1:]), 1)
    return (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4


DEGRADATIONS: dict[str, Degrade] = {
    "blur of 0.7": lambda video, _: blurred(video, 0.7),
    "blur of 1": lambda video, _: blurred(video, 1.0),
    "noise": noisy,
    "half the resolution": lambda video, _: halved(video),
    "quantisation": lambda video, _: quantised(video),
    "tint": tinted,
    "all at once": lambda video, generator: quantised(
        tinted(noisy(halved(mixed_in_time(video)), generator), generator)
    ),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ground_truth_is_read_right(seed: int) -> None:
    wanted, found = drawn(100, seed)[0], read(100, seed)
    assert share_right(wanted, found) >= 0.99
    backgrounds = [clip_detectors.agreement(a, b).background for a, b in zip(found, wanted, strict=True)]
    assert None in backgrounds and False not in backgrounds


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_lossy_clips_are_read_right(name: str) -> None:
    wanted, videos = drawn(70, 3)
    generator = torch.Generator().manual_seed(0)
    found = [clip_detectors.detect(DEGRADATIONS[name](video, generator)) for video in videos]
    assert share_right(wanted, found) >= 0.97


def test_captions_of_other_clips_agree_by_chance_only() -> None:
    wanted, found = drawn(100, 0)[0], read(100, 0)
    shares = [share_right(wanted[turn:] + wanted[:turn], found) for turn in range(1, 100)]
    assert sum(shares) / len(shares) <= 0.01  # of 352 combinations


@pytest.mark.parametrize("shape", clips.SHAPES)
def test_a_shape_at_rest_is_still(shape: str) -> None:
    video = one("red", shape, "moves left")
    assert clip_detectors.detect(video[:, :1].expand(-1, 51, -1, -1)).motion == clip_detectors.STILL


def test_noise_does_not_turn_a_shape_at_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in clips.SHAPES:
        video = one("blue", shape, "moves left", "grey")[:, :1].expand(-1, 51, -1, -1)
        found = clip_detectors.detect(noisy(video, generator))
        assert (found.colour, found.shape, found.motion) == ("blue", shape, clip_detectors.STILL)


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_an_empty_clip_has_no_object(level: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for video in (torch.full((3, 51, 48, 48), level), noisy(torch.full((3, 51, 48, 48), level), generator)):
        found = clip_detectors.detect(video)
        assert (found.colour, found.shape, found.motion) == (None, None, None)
        agreement = clip_detectors.agreement(found, Clip("white", "ring", "moves left"))
        assert not (agreement.colour or agreement.shape or agreement.motion or agreement.all)


def test_white_noise_is_no_shape() -> None:
    video = torch.rand((3, 51, 48, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert clip_detectors.detect(video).shape is None


@pytest.mark.parametrize(
    ("motion", "mirrored"),
    [
        ("moves left", "moves right"),
        ("moves up", "moves down"),
        ("turns clockwise", "turns counterclockwise"),
        ("turns counterclockwise", "turns clockwise"),
    ],
)
def test_a_clip_played_backwards_moves_the_other_way(motion: str, mirrored: str) -> None:
    video = one("yellow", "star", motion)
    assert clip_detectors.detect(video).motion == motion
    assert clip_detectors.detect(video.flip(1)).motion == mirrored


def test_a_change_halfway_is_no_class() -> None:
    half = 25
    red, blue = one("red", "square", "turns clockwise"), one("blue", "square", "turns clockwise")
    assert clip_detectors.detect(torch.cat((red[:, :half], blue[:, half:]), 1)).colour is None
    star, circle = one("red", "star", "moves left"), one("red", "circle", "moves left")
    assert clip_detectors.detect(torch.cat((star[:, :half], circle[:, half:]), 1)).shape is None
    gone = red.clone()
    gone[:, half:] = -1.0
    assert clip_detectors.detect(gone).colour is None


def test_a_diagonal_way_is_no_class() -> None:
    batch = clips.enact([Clip("red", "circle", "moves left", "black")], torch.Generator().manual_seed(0), "cpu")
    track = torch.linspace(14.0, 34.0, 51)
    batch = dataclasses.replace(batch, position=torch.stack((track, track), -1)[None])
    assert clip_detectors.detect(clips.render(batch)[0]).motion is None


def test_bytes_and_halves_read_as_floats_do() -> None:
    video = one("green", "cross", "bounces up and down", "white")
    wanted = clip_detectors.detect(video)
    for other in (((video + 1) * 127.5).round().to(torch.uint8), video.half()):
        found = clip_detectors.detect(other)
        assert (found.background, found.colour, found.shape, found.motion) == (
            wanted.background,
            wanted.colour,
            wanted.shape,
            wanted.motion,
        )


def test_other_sizes_and_lengths_are_read() -> None:
    wanted = clips.prompts(24, 0)
    batch = clips.enact(wanted, torch.Generator().manual_seed(0), "cpu", frames=24, height=64, width=80)
    found = [clip_detectors.detect(video) for video in clips.render(batch)]
    assert share_right(wanted, found) == 1.0


def test_detections_say_how_sure_they_are() -> None:
    found = clip_detectors.detect(one("cyan", "triangle", "turns clockwise", "navy"))
    assert found.shape_confidence == 1.0
    for confidence in (found.background_confidence, found.colour_confidence, found.motion_confidence):
        assert 0.8 < confidence <= 1.0


def test_what_is_no_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[51, 3, 48, 48\]"):
        clip_detectors.detect(torch.zeros(51, 3, 48, 48))
    with pytest.raises(ValueError, match="not finite"):
        clip_detectors.detect(torch.full((3, 51, 48, 48), math.nan))
