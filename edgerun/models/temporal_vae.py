"""VideoAutoencoder: video ↔ latents, an AutoencoderKL for every frame around a causal autoencoder over time.

The architecture is Open-Sora v1.2's, with the parameter names of hpcai-tech/OpenSora-VAE-v1.2, at any size. Time is
causal: convolutions see earlier frames only, and a clip is coded in chunks that know nothing of each other (17 frames
give 5 latents). A chunk whose frames do not divide by the factor gets zeros in front of its first frame; decoding drops
what they became. Group norms take their statistics over all frames of a chunk, as the reference's do: through them
alone a frame feels the later frames of its chunk.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgerun.errors import CheckpointError, EdgerunError

_LOGVAR_LIMITS = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VideoAutoencoderConfig:
    """Sizes of a VideoAutoencoder; the defaults are those of OpenSora-VAE-v1.2."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # AutoencoderKL: each level after the first halves
    layers_per_block: int = 2
    latent_channels: int = 4  # of the frame latents and of the video latents
    spatial_norm_groups: int = 32
    mid_block_attention: bool = True
    temporal_filters: int = 128
    temporal_multipliers: tuple[int, ...] = (1, 2, 2, 4)  # channels of level i: temporal_filters × this
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # whether time halves after level i
    temporal_residual_blocks: int = 4  # per level
    temporal_norm_groups: int = 32
    frames_per_chunk: int = 17
    scaling_factor: float = 0.18215  # frame latents × this are what the temporal part codes
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)  # standard deviation of each latent channel
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)  # mean of each latent channel
    micro_batch: int | None = 4  # frames that go through the AutoencoderKL at once; None: all

    def __post_init__(self) -> None:
        """Raise EdgerunError for sizes that do not fit together."""
        if len(self.temporal_downsample) != len(self.temporal_multipliers) - 1:
            raise EdgerunError(
                f"temporal_downsample has {len(self.temporal_downsample)} flags; {len(self.temporal_multipliers)} "
                f"temporal_multipliers need {len(self.temporal_multipliers) - 1}: give one flag between two levels"
            )
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) != self.latent_channels:
                raise EdgerunError(
                    f"{name} has {len(values)} values for {self.latent_channels} latent channels: give one for each"
                )
        groups = [("block_out_channels", self.spatial_norm_groups, channels) for channels in self.block_out_channels]
        groups += [
            ("temporal_filters × temporal_multipliers", self.temporal_norm_groups, self.temporal_filters * multiplier)
            for multiplier in self.temporal_multipliers
        ]
        for name, count, channels in groups:
            if channels % count:
                raise EdgerunError(
                    f"{name} gives {channels} channels, not a multiple of {count} norm groups: change one"
                )
        if self.frames_per_chunk < 1 or (self.micro_batch is not None and self.micro_batch < 1):
            raise EdgerunError(
                f"frames_per_chunk is {self.frames_per_chunk} and micro_batch {self.micro_batch}; both start at 1"
            )

    def to_json(self) -> dict[str, Any]:
        """The sizes as plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> VideoAutoencoderConfig:
        """The sizes that to_json gave. Raises EdgerunError for names that are not known."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(VideoAutoencoderConfig)})
        if unknown:
            raise EdgerunError(f"{unknown[0]!r} is not a setting of a VideoAutoencoder: see VideoAutoencoderConfig")
        sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return VideoAutoencoderConfig(**sizes)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent."""
        return 1 << sum(self.temporal_downsample)

    @property
    def latents_per_chunk(self) -> int:
        """Latent frames of a whole chunk."""
        return -(-self.frames_per_chunk // self.temporal_factor)

    def padding(self, frames: int) -> int:
        """Zero frames in front of a chunk of `frames` frames."""
        return -frames % self.temporal_factor

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of `frames` frames."""
        chunks, rest = divmod(frames, self.frames_per_chunk)
        return chunks * self.latents_per_chunk + -(-rest // self.temporal_factor)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A diagonal normal distribution, what an encoder gives for its latents."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """One draw, shaped like mean; the noise comes from `generator`, on the generator's own device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def divergence(self) -> torch.Tensor:
        """Kullback-Leibler divergence from the standard normal distribution, in nats per element, shaped like mean."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)


def _gaussian(moments: torch.Tensor) -> Gaussian:
    """moments [B, 2C, ...]: means, then log variances. Half precision becomes float32."""
    wide = moments if moments.dtype == torch.float64 else moments.float()
    mean, logvar = wide.chunk(2, dim=1)
    return Gaussian(mean, logvar.clamp(*_LOGVAR_LIMITS))


class CausalConv3d(nn.Module):
    """A convolution whose output at time t sees frames up to t only: zeros come in front, none behind."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 3, *, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.time_padding = kernel - time_stride
        self.conv = nn.Conv3d(
            channels_in,
            channels_out,
            kernel,
            stride=(time_stride, 1, 1),
            padding=(0, kernel // 2, kernel // 2),
            bias=bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, T, H, W] → [B, C', T // time_stride, H, W]."""
        if self.time_padding:
            x = F.pad(x, (0, 0, 0, 0, self.time_padding, 0))
        result: torch.Tensor = self.conv(x)
        return result


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = CausalConv3d(channels_in, channels_out, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.conv2 = CausalConv3d(channels_out, channels_out, bias=False)
        if channels_in != channels_out:
            self.conv3 = CausalConv3d(channels_in, channels_out, 1, bias=False)
        self.changes_channels = channels_in != channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, T, H, W] → [B, C', T, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        result: torch.Tensor = hidden + (self.conv3(x) if self.changes_channels else x)
        return result


def _level(channels_in: int, channels_out: int, config: VideoAutoencoderConfig) -> nn.ModuleList:
    """The residual blocks of one level."""
    sizes = [channels_in] + [channels_out] * config.temporal_residual_blocks
    groups = config.temporal_norm_groups
    return nn.ModuleList(ResidualBlock(a, b, groups) for a, b in itertools.pairwise(sizes))


class TemporalEncoder(nn.Module):
    """Frame latents → moments of the latents, time shortened by the temporal factor."""

    def __init__(self, config: VideoAutoencoderConfig) -> None:
        super().__init__()
        widths = [config.temporal_filters * multiplier for multiplier in config.temporal_multipliers]
        self.conv_in = CausalConv3d(config.latent_channels, config.temporal_filters, bias=False)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        previous = config.temporal_filters
        for i, width in enumerate(widths):
            self.block_res_blocks.append(_level(previous, width, config))
            if i < len(config.temporal_downsample):
                halves = config.temporal_downsample[i]
                self.conv_blocks.append(CausalConv3d(width, width, time_stride=2) if halves else nn.Identity())
            previous = width
        self.res_blocks = _level(previous, previous, config)
        self.norm1 = nn.GroupNorm(config.temporal_norm_groups, previous)
        self.conv2 = CausalConv3d(previous, 2 * config.latent_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, T, h, w], T a multiple of the temporal factor → [B, 2C, T', h, w]."""
        x = self.conv_in(x)
        for i, level in enumerate(self.block_res_blocks):
            for block in level:  # type: ignore[attr-defined]
                x = block(x)
            if i < len(self.conv_blocks):
                x = self.conv_blocks[i](x)
        for block in self.res_blocks:
            x = block(x)
        result: torch.Tensor = self.conv2(F.silu(self.norm1(x)))
        return result


class TemporalDecoder(nn.Module):
    """Latents → frame latents, time stretched by the temporal factor. Level i has the encoder's index i."""

    def __init__(self, config: VideoAutoencoderConfig) -> None:
        super().__init__()
        widths = [config.temporal_filters * multiplier for multiplier in config.temporal_multipliers]
        self.conv1 = CausalConv3d(config.latent_channels, widths[-1])
        self.res_blocks = _level(widths[-1], widths[-1], config)
        levels: list[nn.Module] = []
        stretches: list[nn.Module] = []
        previous = widths[-1]
        for i in reversed(range(len(widths))):
            levels.insert(0, _level(previous, widths[i], config))
            previous = widths[i]
            if i:
                doubles = config.temporal_downsample[i - 1]
                stretches.insert(0, CausalConv3d(previous, 2 * previous) if doubles else nn.Identity())
        self.block_res_blocks = nn.ModuleList(levels)
        self.conv_blocks = nn.ModuleList(stretches)
        self.norm1 = nn.GroupNorm(config.temporal_norm_groups, previous)
        self.conv_out = CausalConv3d(previous, config.latent_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, T', h, w] → [B, C, T, h, w]."""
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for i in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[i]:  # type: ignore[attr-defined]
                x = block(x)
            if i and isinstance(stretch := self.conv_blocks[i - 1], CausalConv3d):
                x = _channels_to_time(stretch(x))
        result: torch.Tensor = self.conv_out(F.silu(self.norm1(x)))
        return result


def _channels_to_time(x: torch.Tensor) -> torch.Tensor:
    """x [B, 2C, T, H, W] → [B, C, 2T, H, W]: channel 2c + s becomes channel c of frame 2t + s."""
    batch, channels, frames, height, width = x.shape
    pairs = x.view(batch, channels // 2, 2, frames, height, width).transpose(2, 3)
    return pairs.reshape(batch, channels // 2, 2 * frames, height, width)


class TemporalAutoencoder(nn.Module):
    """The causal autoencoder over time, for one chunk."""

    def __init__(self, config: VideoAutoencoderConfig) -> None:
        super().__init__()
        self.encoder = TemporalEncoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = CausalConv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = TemporalDecoder(config)
        self.config = config

    def moments(self, frames: torch.Tensor) -> torch.Tensor:
        """frames [B, C, T, h, w], frame latents × scaling factor → [B, 2C, T', h, w]: means, log variances."""
        padding = self.config.padding(frames.shape[2])
        if padding:
            frames = F.pad(frames, (0, 0, 0, 0, padding, 0))
        result: torch.Tensor = self.quant_conv(self.encoder(frames))
        return result

    def decode(self, latents: torch.Tensor, number_of_frames: int) -> torch.Tensor:
        """latents [B, C, T', h, w] → frame latents × scaling factor [B, C, number_of_frames, h, w]."""
        frames: torch.Tensor = self.decoder(self.post_quant_conv(latents))
        return frames[:, :, self.config.padding(number_of_frames) :]


class FrameAutoencoder(nn.Module):
    """diffusers' AutoencoderKL on single frames, under the official name."""

    def __init__(self, config: VideoAutoencoderConfig) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        levels = len(config.block_out_channels)
        self.module: Any = AutoencoderKL(  # type: ignore[no-untyped-call]
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.spatial_norm_groups,
            scaling_factor=config.scaling_factor,
            mid_block_add_attention=config.mid_block_attention,
        )

    def moments(self, frames: torch.Tensor) -> torch.Tensor:
        """frames [N, 3, H, W] → [N, 2C, h, w]: means, log variances."""
        result: torch.Tensor = self.module.quant_conv(self.module.encoder(frames))
        return result

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [N, C, h, w], not scaled → frames [N, 3, H, W]."""
        result: torch.Tensor = self.module.decoder(self.module.post_quant_conv(latents))
        return result


def load_video_autoencoder(
    path: pathlib.Path, config: VideoAutoencoderConfig | None = None, *, dtype: torch.dtype = torch.float32
) -> VideoAutoencoder:
    """The model of a safetensors file with the official names, in eval mode; config: of the official model when None.

    Tensors that have `dtype` already stay views of the mapped file. scale and shift are those of the file.
    Raises CheckpointError when the file is missing or damaged, or its names and shapes are not those of `config`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}): fetch the checkpoint again") from None
    with torch.device("meta"):
        model = VideoAutoencoder(config or VideoAutoencoderConfig())
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"tensor {name!r} has shape {found.get(name, 'none')} in {path}, the configuration asks for "
                f"{expected.get(name, 'none')}: the weights and the configuration are not of the same model"
            )
    model.load_state_dict(tensors, assign=True)
    return model.to(dtype).eval().requires_grad_(False)


class VideoAutoencoder(nn.Module):
    """Video in [-1, 1] ↔ normalised latents.

    encode and decode are the whole; the parts between them are for training: posteriors come in float32 or float64,
    whatever the weights or autocast use.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, config: VideoAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = FrameAutoencoder(config)
        self.temporal_vae = TemporalAutoencoder(config)
        self.register_buffer("scale", torch.tensor(config.scale).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(config.shift).view(1, -1, 1, 1, 1))
        self.micro_batch = config.micro_batch  # frames; None is fastest where memory allows

    def encode(
        self, video: torch.Tensor, generator: torch.Generator | None = None, *, sample: bool = True
    ) -> torch.Tensor:
        """video [B, 3, T, H, W] in [-1, 1] → normalised latents [B, C, T', h, w].

        sample: draw from both posteriors, as the reference does; their means when False.
        Raises EdgerunError for a video of another rank, without frames, or whose size the spatial factor does not
        divide.
        """
        spatial = self.encode_frames(video)
        frames = spatial.sample(generator) if sample else spatial.mean
        temporal = self.encode_time((frames * self.config.scaling_factor).to(video.dtype))
        return self.normalise(temporal.sample(generator) if sample else temporal.mean).to(video.dtype)

    def decode(self, latents: torch.Tensor, number_of_frames: int) -> torch.Tensor:
        """Normalised latents [B, C, T', h, w] → video [B, 3, number_of_frames, H, W], about [-1, 1], not clamped.

        Raises EdgerunError when a clip of number_of_frames has another number of latents.
        """
        return self.decode_frames(self.decode_time(self.denormalise(latents), number_of_frames))

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the temporal autoencoder → about zero mean and unit variance per channel."""
        return (latents - self.shift) / self.scale

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of normalise."""
        return latents * self.scale + self.shift

    def encode_frames(self, video: torch.Tensor) -> Gaussian:
        """video [B, 3, T, H, W] → each frame's posterior [B, C, T, h, w], not scaled. Raises as encode does."""
        factor = self.config.spatial_factor
        if video.dim() != 5 or video.shape[1] != 3 or video.shape[2] < 1:
            raise EdgerunError(
                f"video has shape {list(video.shape)}; it must be [B, 3, T, H, W] with T ≥ 1: reshape it"
            )
        if video.shape[3] % factor or video.shape[4] % factor:
            raise EdgerunError(
                f"video is {video.shape[4]}×{video.shape[3]} pixels; both must be multiples of {factor}: crop or pad it"
            )
        return _gaussian(self._per_frame(self.spatial_vae.moments, video))

    def encode_time(self, frames: torch.Tensor) -> Gaussian:
        """frames [B, C, T, h, w], frame latents × scaling factor → posterior [B, C, T', h, w], not normalised."""
        chunks = torch.split(frames, self.config.frames_per_chunk, dim=2)
        return _gaussian(torch.cat([self.temporal_vae.moments(chunk) for chunk in chunks], dim=2))

    def decode_time(self, latents: torch.Tensor, number_of_frames: int) -> torch.Tensor:
        """latents [B, C, T', h, w], not normalised → frame latents × scaling factor [B, C, number_of_frames, h, w].

        Raises as decode does.
        """
        expected = self.config.latent_frames(number_of_frames)
        if number_of_frames < 1 or latents.shape[2] != expected:
            raise EdgerunError(
                f"{latents.shape[2]} latent frames cannot give {number_of_frames} frames, which need {expected}: "
                "pass the number of frames that was encoded"
            )
        whole = self.config.frames_per_chunk
        chunks = torch.split(latents, self.config.latents_per_chunk, dim=2)
        counts = [min(whole, number_of_frames - i * whole) for i in range(len(chunks))]
        decoded = [self.temporal_vae.decode(chunk, count) for chunk, count in zip(chunks, counts, strict=True)]
        return torch.cat(decoded, dim=2)

    def decode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """frames [B, C, T, h, w], frame latents × scaling factor → video [B, 3, T, H, W]."""
        return self._per_frame(self.spatial_vae.decode, frames / self.config.scaling_factor)

    def _per_frame(self, function: Callable[[torch.Tensor], torch.Tensor], video: torch.Tensor) -> torch.Tensor:
        """`function` on micro-batches of the frames [B, C, T, H, W], put together again."""
        batch, _, frames = video.shape[:3]
        flat = video.transpose(1, 2).flatten(0, 1)  # [B·T, C, H, W]
        parts = [flat] if self.micro_batch is None else torch.split(flat, self.micro_batch)
        result = torch.cat([function(part) for part in parts])
        return result.view(batch, frames, *result.shape[1:]).transpose(1, 2)
