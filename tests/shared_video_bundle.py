"""A tiny video checkpoint and its bundle, made once for a test run by the first worker that wants them."""

from __future__ import annotations

import dataclasses
import fcntl
import pathlib
from typing import Any, Literal

import numpy as np
import pytest
import torch

from edgerun.bundle import Bundle
from edgerun.export import export_video_bundle
from edgerun.models import rectified_flow
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.techniques.linear_proportional_leap import FixedLeap
from edgerun.techniques.temporal_token_merging import adjacent_groups, frame_merge
from edgerun.video_recipe import VideoRecipe
from tests.models import tiny_video_checkpoint

# Twelve frames are two chunks of five, of three latents each, and two frames of one latent; likewise three calls.
RECIPE = VideoRecipe(frames=12, frames_per_call=5, merge_steps=2, leap="fixed", leap_evaluations=3)


def _folder(factory: pytest.TempPathFactory) -> pathlib.Path:
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "shared video"
    folder.mkdir(exist_ok=True)
    return folder


def checkpoint(factory: pytest.TempPathFactory) -> pathlib.Path:
    """The checkpoint's folder."""
    folder = _folder(factory)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "a model").is_dir():
            tiny_video_checkpoint.write(folder / "partial", depth=1).rename(folder / "a model")
    return folder / "a model"


def bundle(factory: pytest.TempPathFactory, quantize: Literal["none", "int8"] = "none") -> Bundle:
    """Its bundle by RECIPE."""
    source, recipe = checkpoint(factory), dataclasses.replace(RECIPE, quantize=quantize)
    with (source.parent / "bundle lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name = "tiny.edgerun" if quantize == "none" else f"tiny {quantize}.edgerun"
        return export_video_bundle(source, recipe, source.parent / name)


@dataclasses.dataclass(frozen=True)
class EagerClip:
    """What the checkpoint's own models make of a prompt by RECIPE, in torch."""

    tokens: list[int]
    noise: np.ndarray  # float32 [C, T, h, w]
    latents: np.ndarray  # the same shape
    evaluations: int
    pixels: np.ndarray  # float32 [frames, H, W, 3], 0 to 255


def eager_clip(source: VideoCheckpoint, video: dict[str, Any], prompt: str) -> EagerClip:
    """With all that RECIPE asks for: merged first steps, then plain ones, then the leap. video: the manifest's."""
    encoder, denoiser, vae = source.load_text_encoder(), source.load_denoiser(), source.load_autoencoder()
    y = encoder.encode(prompt)
    both = torch.cat([y, denoiser.null_caption(y.shape[1])[None]])
    shape = [video["latent"][name] for name in ("channels", "frames", "height", "width")]
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    merge, step = frame_merge(adjacent_groups(shape[1])), iter(range(len(video["times"])))
    fps, size = torch.full((2,), float(video["fps"])), (video["height"], video["width"])

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        merged = merge if next(step) < RECIPE.merge_steps else None
        with torch.no_grad():
            v = denoiser(torch.cat([x, x]), torch.tensor([t, t]), both, fps=fps, pixels=size, merge=merged)
        return rectified_flow.guide(*v.chunk(2), video["guidance"])

    sampled = rectified_flow.sample(velocity, noise, video["times"], FixedLeap(RECIPE.leap_evaluations))
    with torch.no_grad():
        pixels = ((vae.decode(sampled.latents, video["frames"])[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)
    tokens = encoder.tokenizer.encode(prompt)[0].tolist()
    return EagerClip(tokens, noise[0].numpy(), sampled.latents[0].numpy(), sampled.evaluations, pixels.numpy())
