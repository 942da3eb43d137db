"""The decoder of a VideoAutoencoder as a chain of blocks that can be programs of their own.

On-device runtimes have no convolution over five dimensions, so here the frames of one chunk are the batch of ordinary
convolutions: [T, C, H, W] throughout. A convolution over time takes the frames that it sees as channels of one picture;
group norms are spelled out in means over pictures, which delegates have. T can stay open in a program, for the last
chunk of a clip is often shorter than the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgerun.models.temporal_vae import CausalConv3d, ResidualBlock, VideoAutoencoder

Stage = Literal["time", "frames"]
MOST_PARAMETERS = 15_000_000  # of a block; about one residual block over time of OpenSora-VAE-v1.2's widest level


@dataclasses.dataclass(frozen=True)
class DecoderBlock:
    """One block of the chain; each takes what the one before it gave, and gives one tensor.

    time: float32 [T', C, h, w], all frames of one chunk at once. The chain starts from normalised latents; from what
    the last of these blocks gives, the first `config.padding(frames of the chunk)` frames are dropped.
    frames: float32 [n, C, h, w], any number of frames, which do not know of each other; the chain ends at [n, 3, H, W].
    """

    name: str
    stage: Stage
    module: nn.Module


def decoder_blocks(
    model: VideoAutoencoder, most_parameters: int = MOST_PARAMETERS, stages: tuple[Stage, ...] = ("time", "frames")
) -> Iterator[DecoderBlock]:
    """The blocks of `stages` in order, made one at a time.

    Steps share a block while it has no more than most_parameters parameters; a step that has more is a block by itself.
    A block has copies of its convolutions over time; the rest it shares with `model`.
    """
    steps_of = {"time": _time_steps, "frames": _frame_steps}
    for stage in stages:
        for i, group in enumerate(_groups(steps_of[stage](model), most_parameters)):
            module = nn.Sequential(*(step.build() for step in group)).eval().requires_grad_(False)
            yield DecoderBlock(f"{stage}_{i}", stage, module)


class FrameConvolution(nn.Module):
    """A CausalConv3d that keeps time, on the frames of one chunk: one convolution over [frames it sees × C, H, W].

    What the frame before holds comes from a convolution too, over time as if it were the height of a picture: XNNPACK
    cannot cut a number of frames that is open, but convolves over it.
    """

    delay: torch.Tensor

    def __init__(self, source: CausalConv3d, *, doubles_time: bool = False) -> None:
        """doubles_time: give channels 2c and 2c + 1 of the source as channel c of two frames."""
        super().__init__()
        weight = source.conv.weight.detach()
        bias = None if source.conv.bias is None else source.conv.bias.detach()
        if doubles_time:
            weight = torch.cat((weight[0::2], weight[1::2]))
            bias = None if bias is None else torch.cat((bias[0::2], bias[1::2]))
        assert source.conv.stride[0] == 1, "a decoder does not shorten time"
        self.kernel_frames = weight.shape[2]
        self.padding = weight.shape[3] // 2
        self.frames_per_output = 2 if doubles_time else 1
        self.weight = nn.Parameter(weight.transpose(1, 2).flatten(1, 2).contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        one_before = torch.tensor([1.0, 0.0, 0.0], dtype=weight.dtype)  # of the places t - 1, t and t + 1
        self.register_buffer("delay", one_before.view(1, 1, 3, 1).repeat(weight.shape[1], 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C, H, W] → [T, C', H, W], or [2T, C' / 2, H, W]."""
        seen = [x]
        for _ in range(self.kernel_frames - 1):
            seen.insert(0, self._delayed(seen[0]))
        x = torch.cat(seen, dim=1) if len(seen) > 1 else x
        x = F.conv2d(x, self.weight, self.bias, padding=self.padding)
        if self.frames_per_output == 1:
            return x
        return x.reshape(x.shape[0] * 2, x.shape[1] // 2, *x.shape[2:])

    def _delayed(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C, H, W] → the frames one later, a frame of zeros first, without the last."""
        frames, channels, height, width = x.shape
        column = x.reshape(frames, channels, height * width, 1).permute(3, 1, 0, 2)  # [1, C, T, H·W]
        column = F.conv2d(column, self.delay, padding=(1, 0), groups=channels)
        return column.permute(2, 1, 3, 0).reshape(frames, channels, height, width)


class FrameNorm(nn.Module):
    """A group norm: over [channels of a group, H, W] of each frame, or of all frames together.

    Spelled so that XNNPACK takes the whole of it, and with it a chain of blocks: there a mean is one over the last two
    of four dimensions, and a value is repeated by a product that broadcasts.
    """

    ones: torch.Tensor

    def __init__(self, source: nn.GroupNorm, *, over_time: bool) -> None:
        super().__init__()
        self.groups = source.num_groups
        self.eps = source.eps
        self.over_time = over_time
        self.weight = nn.Parameter(source.weight.detach().view(1, -1, 1, 1), requires_grad=False)
        self.bias = nn.Parameter(source.bias.detach().view(1, -1, 1, 1), requires_grad=False)
        ones = torch.ones_like(source.weight).view(1, source.num_groups, -1, 1)  # [1, groups, channels of a group, 1]
        self.register_buffer("ones", ones, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C, H, W] → the same shape."""
        centred = x - self._group_mean(x)
        variance = self._group_mean(centred * centred)  # around the mean: never a difference of large numbers
        return centred * (self.weight * torch.rsqrt(variance + self.eps)) + self.bias

    def _group_mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over each group, repeated for its channels: [T or 1, C, 1, 1]."""
        frames, channels = x.shape[:2]
        size = channels // self.groups
        means = x.mean((2, 3), keepdim=True).view(frames, self.groups, size, 1)
        if self.over_time:
            means = means.permute(3, 1, 2, 0)  # [1, groups, channels of a group, T]
        return (means.mean((2, 3), keepdim=True) * self.ones).view(-1, channels, 1, 1)


class FrameResidual(nn.Module):
    """A residual block on frames: twice norm, SiLU and convolution, added to the input or its 1×1 convolution."""

    def __init__(
        self,
        norms: tuple[FrameNorm, FrameNorm],
        convolutions: tuple[nn.Module, nn.Module],
        shortcut: nn.Module | None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.conv1, self.conv2 = convolutions
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C, H, W] → [T, C', H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        result: torch.Tensor = self.shortcut(x) + hidden
        return result


class FrameAttention(nn.Module):
    """The attention of an AutoencoderKL's middle: one head over the places of a frame, added to the input."""

    def __init__(self, source: Any) -> None:
        """source: diffusers' Attention."""
        super().__init__()
        assert source.heads == 1, "an AutoencoderKL attends with one head"
        self.norm = FrameNorm(source.group_norm, over_time=False)
        self.query, self.key, self.value, self.output = source.to_q, source.to_k, source.to_v, source.to_out[0]
        self.scale = float(source.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, C, H, W] → the same shape."""
        places = self.norm(x).flatten(2).transpose(1, 2)  # [n, H·W, C]
        scores = torch.bmm(self.query(places) * self.scale, self.key(places).transpose(1, 2))  # [n, H·W, H·W]
        attended = self.output(torch.bmm(scores.softmax(-1), self.value(places)))
        result: torch.Tensor = attended.transpose(1, 2).reshape(x.shape) + x
        return result


class _Upsample(nn.Module):
    """Each pixel four times, then a convolution."""

    def __init__(self, source: Any) -> None:
        """source: diffusers' Upsample2D."""
        super().__init__()
        self.conv = source.conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, C, H, W] → [n, C, 2H, 2W]."""
        result: torch.Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return result


class _Denormalise(nn.Module):
    """Normalised latents → latents of the temporal autoencoder."""

    def __init__(self, model: VideoAutoencoder) -> None:
        super().__init__()
        self.scale = nn.Parameter(model.scale.detach().view(1, -1, 1, 1), requires_grad=False)
        self.shift = nn.Parameter(model.shift.detach().view(1, -1, 1, 1), requires_grad=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [T', C, h, w] → the same shape."""
        return latents * self.scale + self.shift


class _Unscale(nn.Module):
    """Frame latents × scaling factor → latents of the AutoencoderKL."""

    def __init__(self, scaling_factor: float) -> None:
        super().__init__()
        self.scaling_factor = scaling_factor

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [n, C, h, w] → the same shape."""
        return latents / self.scaling_factor


@dataclasses.dataclass(frozen=True)
class _Step:
    """The smallest part of a chain: what it is made of, and how to make it."""

    sources: tuple[nn.Module, ...]
    build: Callable[[], nn.Module]

    def parameters(self) -> int:
        return sum(parameter.numel() for source in self.sources for parameter in source.parameters())


def _groups(steps: list[_Step], most_parameters: int) -> Iterator[list[_Step]]:
    group: list[_Step] = []
    size = 0
    for step in steps:
        if group and size + step.parameters() > most_parameters:
            yield group
            group, size = [], 0
        group.append(step)
        size += step.parameters()
    yield group


def _time_steps(model: VideoAutoencoder) -> list[_Step]:
    autoencoder = model.temporal_vae
    decoder: Any = autoencoder.decoder
    quant, first, norm, last = autoencoder.post_quant_conv, decoder.conv1, decoder.norm1, decoder.conv_out
    steps = [
        _step(lambda a, b: nn.Sequential(_Denormalise(model), FrameConvolution(a), FrameConvolution(b)), quant, first)
    ]
    steps += [_step(_time_residual, block) for block in decoder.res_blocks]
    for i in reversed(range(len(decoder.block_res_blocks))):
        steps += [_step(_time_residual, block) for block in decoder.block_res_blocks[i]]
        if i and isinstance(stretch := decoder.conv_blocks[i - 1], CausalConv3d):
            steps.append(_step(lambda a: FrameConvolution(a, doubles_time=True), stretch))
    end = _step(lambda a, b: nn.Sequential(FrameNorm(a, over_time=True), nn.SiLU(), FrameConvolution(b)), norm, last)
    return [*steps, end]


def _frame_steps(model: VideoAutoencoder) -> list[_Step]:
    module = model.spatial_vae.module
    decoder, unscale = module.decoder, _Unscale(model.config.scaling_factor)
    steps = [_step(lambda a, b: nn.Sequential(unscale, a, b), module.post_quant_conv, decoder.conv_in)]
    middle = decoder.mid_block
    steps.append(_step(_frame_residual, middle.resnets[0]))
    for attention, residual in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            steps.append(_step(FrameAttention, attention))
        steps.append(_step(_frame_residual, residual))
    for level in decoder.up_blocks:
        steps += [_step(_frame_residual, residual) for residual in level.resnets]
        steps += [_step(_Upsample, upsampler) for upsampler in level.upsamplers or ()]
    norm, last = decoder.conv_norm_out, decoder.conv_out
    end = _step(lambda a, b: nn.Sequential(FrameNorm(a, over_time=False), nn.SiLU(), b), norm, last)
    return [*steps, end]


def _step(build: Callable[..., nn.Module], *sources: nn.Module) -> _Step:
    return _Step(sources, lambda: build(*sources))


def _time_residual(block: ResidualBlock) -> FrameResidual:
    return FrameResidual(
        (FrameNorm(block.norm1, over_time=True), FrameNorm(block.norm2, over_time=True)),
        (FrameConvolution(block.conv1), FrameConvolution(block.conv2)),
        FrameConvolution(block.conv3) if block.changes_channels else None,
    )


def _frame_residual(block: Any) -> FrameResidual:
    """block: diffusers' ResnetBlock2D, as an AutoencoderKL has it: no time embedding, no rescaling of the output."""
    assert block.time_emb_proj is None and block.output_scale_factor == 1.0
    return FrameResidual(
        (FrameNorm(block.norm1, over_time=False), FrameNorm(block.norm2, over_time=False)),
        (block.conv1, block.conv2),
        block.conv_shortcut,
    )
