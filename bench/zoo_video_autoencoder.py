"""Stages `frames` and `time` of train_zoo_video.py: the autoencoder of frames, and the one over time around it."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import random
import time

import torch
import torch.nn.functional as F

from bench.zoo_video_common import (
    CHUNK,
    FRAMES,
    VAE,
    Clock,
    Means,
    load_state,
    log,
    mixed,
    optimizer_for,
    read_weights,
    save_training,
    update,
    write_weights,
)
from edgerun.evaluation import clips
from edgerun.models.temporal_vae import VideoAutoencoder, VideoAutoencoderConfig

SHAPE_WEIGHT = 10.0
KL_WEIGHT = 1e-4  # of the mean divergence in nats, against the error of pixels in [-1, 1]


def some_frames(batch: clips.ClipBatch, first: int, count: int) -> clips.ClipBatch:
    """The same `count` frames of every clip."""
    return dataclasses.replace(
        batch, position=batch.position[:, first : first + count], angle=batch.angle[:, first : first + count]
    )


def near_the_shape(batch: clips.ClipBatch) -> torch.Tensor:
    """Weights of the pixels, [B, 1, T, H, W] with mean 1: what lies on a shape or near it counts SHAPE_WEIGHT more.

    A shape covers a few per cent of a frame; unweighted, an autoencoder learns its colour last.
    """
    shown = clips.coverage(
        batch.shape[:, None], batch.radius[:, None], batch.position, batch.angle, batch.height, batch.width
    )
    weights = 1.0 + SHAPE_WEIGHT * F.max_pool2d((shown > 0).float(), 5, 1, 2)
    return (weights / weights.mean())[:, None]


def pixel_error(video: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean absolute plus mean squared error."""
    difference = video.float() - truth
    return (weights * difference.abs()).mean() + (weights * difference.square()).mean()


def train_frames(out: pathlib.Path, minutes: float, batch_size: int, peak: float, device: str) -> None:
    """The frames' autoencoder, from scratch, on single frames."""
    torch.manual_seed(0)
    model = VideoAutoencoder(VAE).to(device)
    part = model.spatial_vae
    parameters = list(part.parameters())
    optimizer = optimizer_for(parameters, device)
    path = out / "frames.state"
    step, used = load_state(path, part, optimizer, device)
    generator, rng = torch.Generator(device).manual_seed(1 + step), random.Random(2 + step)
    clock, saved, sums = Clock(minutes, used), time.monotonic(), Means(2, device)
    for _ in clock.running():
        batch = some_frames(clips.sample_batch(batch_size, generator, device), rng.randrange(FRAMES), 1)
        frames = clips.render(batch)[:, :, 0]
        with mixed(device):
            back = part.decode(part.moments(frames)[:, : VAE.latent_channels])
        pixel_error(back, frames, near_the_shape(batch)[:, :, 0]).backward()
        norm = update(optimizer, parameters, clock.rate(step, peak, 50, 0.4))
        sums.add((back.detach().float() - frames).square().mean(), norm)
        step += 1
        if step % 100 == 0:
            squared, norm_mean = sums.take()
            log(out, stage="frames", step=step, seconds=clock.used, mean_squared=squared, norm=norm_mean)
        if time.monotonic() - saved > 120:
            save_training(path, part, optimizer, step, clock)
            saved = time.monotonic()
    save_training(path, part, optimizer, step, clock)
    if clock.stopped:
        return
    with torch.no_grad():
        video = clips.render(clips.sample_batch(16, generator, device))
        deviation = float(model.eval().encode_frames(video).mean.std())
    write_vae(out, dataclasses.replace(VAE, scaling_factor=1.0 / deviation), model)


def train_time(out: pathlib.Path, minutes: float, batch_size: int, peak: float, device: str) -> None:
    """The autoencoder over time, around the frozen one of the frames: error of frame latents, and of some pixels."""
    model = load_vae(out / "vae", device)
    part = model.temporal_vae.train().requires_grad_(True)
    scale = model.config.scaling_factor
    with torch.no_grad():  # a posterior as wide as its prior would drown what the first steps learn
        part.quant_conv.conv.bias[VAE.latent_channels :] = -6.0
    parameters = list(part.parameters())
    optimizer = optimizer_for(parameters, device)
    path = out / "time.state"
    step, used = load_state(path, part, optimizer, device)
    generator, rng = torch.Generator(device).manual_seed(5 + step), random.Random(6 + step)
    clock, saved, sums = Clock(minutes, used), time.monotonic(), Means(4, device)
    for _ in clock.running():
        batch = some_frames(clips.sample_batch(batch_size, generator, device), CHUNK * rng.randrange(3), CHUNK)
        video, weights = clips.render(batch), near_the_shape(batch)
        coarse = F.avg_pool2d(weights[:, 0], VAE.spatial_factor)[:, None]
        seen = slice(rng.randrange(6), None, 6)  # the frames whose pixels are looked at
        with mixed(device):
            with torch.no_grad():
                frames = model.encode_frames(video).mean * scale
            posterior = model.encode_time(frames)
            back = model.decode_time(posterior.sample(), CHUNK)
            pixels = model.decode_frames(back[:, :, seen])
        error_latents = (coarse * (back.float() - frames).abs()).mean()
        error_pixels = pixel_error(pixels, video[:, :, seen], weights[:, :, seen])
        divergence = posterior.divergence().mean()
        (0.2 * error_latents + error_pixels + KL_WEIGHT * divergence).backward()
        norm = update(optimizer, parameters, clock.rate(step, peak, 50, 0.4))
        squared = (pixels.detach().float() - video[:, :, seen]).square().mean()
        sums.add(squared, error_latents, divergence, norm)
        step += 1
        if step % 50 == 0:
            squared, latents, nats, norm_mean = sums.take()
            log(
                out,
                stage="time",
                step=step,
                seconds=clock.used,
                mean_squared=squared,
                latents=latents,
                nats=nats,
                norm=norm_mean,
            )
        if time.monotonic() - saved > 120:
            save_training(path, part, optimizer, step, clock)
            saved = time.monotonic()
    save_training(path, part, optimizer, step, clock)
    if not clock.stopped:
        finish_vae(model.eval(), out, generator, device)


def train_decoder(out: pathlib.Path, minutes: float, batch_size: int, peak: float, device: str) -> None:
    """Both decoders together, from given latents to pixels; latents stay what they are, and so does a denoiser."""
    model = load_vae(out / "vae", device)
    time_part, frame_part = model.temporal_vae, model.spatial_vae.module
    parts = torch.nn.ModuleList(
        [time_part.decoder, time_part.post_quant_conv, frame_part.decoder, frame_part.post_quant_conv]
    )
    parts.train().requires_grad_(True)
    parameters = list(parts.parameters())
    optimizer = optimizer_for(parameters, device)
    path = out / "decoder.state"
    step, used = load_state(path, parts, optimizer, device)
    generator, rng = torch.Generator(device).manual_seed(7 + step), random.Random(8 + step)
    clock, saved, sums = Clock(minutes, used), time.monotonic(), Means(2, device)
    for _ in clock.running():
        batch = some_frames(clips.sample_batch(batch_size, generator, device), CHUNK * rng.randrange(3), CHUNK)
        video, weights = clips.render(batch), near_the_shape(batch)
        seen = slice(rng.randrange(6), None, 6)
        with mixed(device):
            with torch.no_grad():
                frames = model.encode_frames(video).mean * model.config.scaling_factor
                latents = model.encode_time(frames).sample()
            pixels = model.decode_frames(model.decode_time(latents, CHUNK)[:, :, seen])
        pixel_error(pixels, video[:, :, seen], weights[:, :, seen]).backward()
        norm = update(optimizer, parameters, clock.rate(step, peak, 50, 0.6))
        sums.add((pixels.detach().float() - video[:, :, seen]).square().mean(), norm)
        step += 1
        if step % 50 == 0:
            squared, norm_mean = sums.take()
            log(out, stage="decoder", step=step, seconds=clock.used, mean_squared=squared, norm=norm_mean)
        if time.monotonic() - saved > 120:
            save_training(path, parts, optimizer, step, clock)
            saved = time.monotonic()
    save_training(path, parts, optimizer, step, clock)
    if not clock.stopped:
        write_vae(out, model.config, model.eval())


def encoder_sha256(out: pathlib.Path) -> str:
    """Of all that latents depend on: they are the same whatever the decoder is."""
    _, tensors = read_weights(out / "vae")
    kept = {name: value for name, value in tensors.items() if "decoder" not in name and "post_quant" not in name}
    digest = hashlib.sha256()
    for name in sorted(kept):
        digest.update(name.encode() + kept[name].numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def finish_vae(model: VideoAutoencoder, out: pathlib.Path, generator: torch.Generator, device: str) -> None:
    """Mean and deviation of each latent channel become the normalisation; the weights are written."""
    parts = []
    for _ in range(16):
        video = clips.render(clips.sample_batch(32, generator, device))
        with mixed(device):
            parts.append(model.encode_time(model.encode_frames(video).mean * model.config.scaling_factor).mean.float())
    latents = torch.cat(parts).transpose(0, 1).flatten(1)  # [C, all]
    scale, shift = tuple(latents.std(1).tolist()), tuple(latents.mean(1).tolist())
    write_vae(out, dataclasses.replace(model.config, scale=scale, shift=shift), model)


def write_vae(out: pathlib.Path, config: VideoAutoencoderConfig, model: VideoAutoencoder) -> None:
    model.scale.copy_(torch.tensor(config.scale).view(1, -1, 1, 1, 1))
    model.shift.copy_(torch.tensor(config.shift).view(1, -1, 1, 1, 1))
    write_weights(out / "vae", dataclasses.asdict(config), model.state_dict())
    log(out, stage="vae", scale=list(config.scale), shift=list(config.shift), scaling_factor=config.scaling_factor)


def load_vae(folder: pathlib.Path, device: str) -> VideoAutoencoder:
    config, tensors = read_weights(folder)
    tupled = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    model = VideoAutoencoder(VideoAutoencoderConfig(**tupled))  # type: ignore[arg-type]
    model.load_state_dict(tensors)
    model.micro_batch = None
    return model.to(device).eval().requires_grad_(False)
