"""STDiT3, the denoiser of Open-Sora v1.2: a diffusion transformer whose blocks attend over space, then over time.

Every block modulates by the time of the diffusion and attends to the caption:

    shift, scale, gate (twice) = table[6, C] + t6
    x += gate1 * attention(norm(x) * (1 + scale1) + shift1)      over the S sites of a frame, or the T frames of a site
    x += cross_attention(x, caption)
    x += gate2 * mlp(norm(x) * (1 + scale2) + shift2)

Parameters bear the official names, so hpcai-tech/OpenSora-STDiT-v3 loads unchanged. Ours: tokens keep their frame and
site dimensions apart and no tensor has more than five, the patch embedding is a 2-D convolution of every frame, and
the sinusoids are computed in float32: what ExecuTorch and XNNPACK can run. The model is its pieces in order: `embed`,
then `spatial_blocks[i]` and `temporal_blocks[i]` in turn, then `finish`; each can be a program of its own.

Source: https://github.com/hpcaitech/Open-Sora at v1.2.0; the reading in words is arXiv 2412.20404.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgerun.errors import CheckpointError
from edgerun.techniques.temporal_token_merging import FrameMerge

_NORM_EPS = 1e-6
_FREQUENCIES = 256  # length of a sinusoidal embedding
_THETA = 10000.0
TIME_SCALE = 1000.0  # a time in 0..1 enters the model times this


@dataclasses.dataclass(frozen=True)
class StditConfig:
    """The shape of a denoiser; the defaults are STDiT3-XL/2, 1.2 billion parameters."""

    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28  # pairs of a spatial and a temporal block
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: tuple[int, int] = (2, 2)  # latent rows and columns in a token
    caption_channels: int = 4096
    model_max_length: int = 300  # tokens of a caption
    input_sq_size: int = 512  # pixels: the side of a square at which a position step is 1
    qk_norm: bool = True
    pred_sigma: bool = True  # the output's second half of channels, which the sampler drops

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StditConfig:
        """The configuration of a config.json as Open-Sora writes it. Raises CheckpointError."""
        if str(values.get("model_type", "STDiT3")) != "STDiT3":
            raise CheckpointError(f"the denoiser is a {values['model_type']}; edgerun runs STDiT3")
        known = {field.name for field in dataclasses.fields(cls)}
        chosen = {name: value for name, value in values.items() if name in known}
        patch = tuple(values.get("patch_size", (1, 2, 2)))
        if len(patch) != 3 or patch[0] != 1:
            raise CheckpointError(f"patch_size is {list(patch)}; edgerun runs patches of one frame, [1, rows, columns]")
        config = cls(**{**chosen, "patch_size": (int(patch[1]), int(patch[2]))})
        if config.hidden_size % config.num_heads or config.head_size % 2 or config.hidden_size % 4:
            raise CheckpointError(
                f"hidden_size {config.hidden_size} in {config.num_heads} heads: heads must have one even size"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        return {**dataclasses.asdict(self), "model_type": "STDiT3", "patch_size": [1, *self.patch_size]}


# ---------------------------------------------------------------- embeddings


def sinusoid_frequencies(dtype: torch.dtype) -> torch.Tensor:
    """[128], from 1 down to nearly 1/10,000."""
    half = _FREQUENCIES // 2
    return torch.exp(-math.log(_THETA) / half * torch.arange(half, dtype=dtype))


def sinusoids(values: torch.Tensor) -> torch.Tensor:
    """values [N] → [N, 256], float32 or wider: cosines, then sines, of 128 frequencies."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    angles = values.to(dtype)[:, None] * sinusoid_frequencies(dtype).to(values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def positions_2d(rows: int, columns: int, channels: int, scale: float) -> torch.Tensor:
    """Positions of a frame's sites → [rows * columns, channels] float64.

    The first half of the channels holds the column, the second the row, each as sines, then cosines; a coordinate is
    index / scale * base / count with base = round(sqrt(rows * columns)).
    """
    base = round(math.sqrt(rows * columns))
    quarter = channels // 4
    frequencies = _THETA ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def along(count: int) -> torch.Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] / scale * base / count * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # [count, channels / 2]

    across, down = along(columns), along(rows)
    both = [across[None].expand(rows, -1, -1), down[:, None].expand(-1, columns, -1)]
    return torch.cat(both, dim=-1).reshape(rows * columns, channels)


def rotary_angles(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [T, head_size], for positions [T] in frames; neighbouring channels share an angle."""
    angles = (positions[:, None] * frequencies).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] turned by pairs of neighbouring channels."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x * cosines + turned * sines).to(x.dtype)


class _Mlp(nn.Module):
    """fc1, GELU by tanh, fc2."""

    def __init__(self, size: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return result


class _ScalarEmbedder(nn.Module):
    """A number (the time, or frames per second) → [N, C]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.mlp(sinusoids(values).to(self.dtype))
        return result


class _PatchEmbedder(nn.Module):
    """[B, C_in, T, H, W] → tokens [B, T, S, C]; the weight is Conv3d's, of one frame."""

    def __init__(self, in_channels: int, size: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, size, kernel_size=(1, *patch), stride=(1, *patch))
        self.patch = patch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, frames, height, width = x.shape
        flat = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        flat = F.pad(flat, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        patches = F.conv2d(flat, self.proj.weight[:, :, 0], self.proj.bias, stride=self.patch)
        tokens = patches.flatten(2).transpose(1, 2)
        return tokens.reshape(batch, frames, *tokens.shape[1:])


class _CaptionEmbedder(nn.Module):
    """Text features → the blocks' width; holds the null caption, which guidance contrasts with."""

    y_embedding: torch.Tensor

    def __init__(self, in_channels: int, size: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = _Mlp(in_channels, size, size)
        self.register_buffer("y_embedding", torch.randn(tokens, in_channels) / in_channels**0.5)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.y_proj(y)
        return result


class _Rope(nn.Module):
    freqs: torch.Tensor

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.register_buffer("freqs", _THETA ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size))


# ---------------------------------------------------------------- blocks


class _RmsNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + _NORM_EPS)
        return (wide * scale * self.weight).to(x.dtype)


class _SelfAttention(nn.Module):
    def __init__(self, config: StditConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = _RmsNorm(config.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = _RmsNorm(config.head_size) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """x [B, N, C], all N attending to each other."""
        batch, count, size = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)  # [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        out = F.scaled_dot_product_attention(q, k, v)
        result: torch.Tensor = self.proj(out.transpose(1, 2).reshape(batch, count, size))
        return result


class _CrossAttention(nn.Module):
    def __init__(self, config: StditConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, N, C] attends to y [B, M, C]; mask [B, 1, 1, M], True where y holds a token."""
        batch, count, size = x.shape
        q = self.q_linear(x).view(batch, count, self.heads, -1).transpose(1, 2)
        k, v = self.kv_linear(y).view(batch, y.shape[1], 2 * self.heads, -1).transpose(1, 2).chunk(2, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: torch.Tensor = self.proj(out.transpose(1, 2).reshape(batch, count, size))
        return result


class StditBlock(nn.Module):
    """One block: attention within frames, or across them at every site; then the caption; then the feed-forward."""

    def __init__(self, config: StditConfig, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.attn = _SelfAttention(config)
        self.cross_attn = _CrossAttention(config)
        self.mlp = _Mlp(config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, config.hidden_size) / config.hidden_size**0.5)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        t6: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None = None,
        merge: FrameMerge | None = None,
    ) -> torch.Tensor:
        """x [B, T, S, C], y [B, M, C], t6 [B, 6, C] → x.

        rotary: of the frames that a temporal block attends over, so of the merged ones where `merge` covers it.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (self.scale_shift_table[None] + t6)[:, :, None, None].to(x.dtype).unbind(1)
        )  # each [B, 1, 1, C]
        parts = merge.parts if merge is not None else frozenset()

        inner = _normalize(x) * (1 + scale1) + shift1
        covered = ("temporal" if self.temporal else "spatial") in parts
        inner = merge.narrow(inner) if merge is not None and covered else inner
        inner = self._attend(inner, rotary)
        inner = merge.widen(inner) if merge is not None and covered else inner
        x = x + gate1 * inner

        queries = merge.narrow(x) if merge is not None and "cross" in parts else x
        attended = self.cross_attn(queries.flatten(1, 2), y, mask).view(queries.shape)
        x = x + (merge.widen(attended) if merge is not None and "cross" in parts else attended)

        inner = _normalize(x) * (1 + scale2) + shift2
        inner = merge.narrow(inner) if merge is not None and "mlp" in parts else inner
        inner = self.mlp(inner)
        inner = merge.widen(inner) if merge is not None and "mlp" in parts else inner
        return x + gate2 * inner

    def _attend(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        batch, frames, sites, size = x.shape
        if not self.temporal:
            within: torch.Tensor = self.attn(x.reshape(batch * frames, sites, size), None)
            return within.view(batch, frames, sites, size)
        across: torch.Tensor = self.attn(x.transpose(1, 2).reshape(batch * sites, frames, size), rotary)
        return across.view(batch, sites, frames, size).transpose(1, 2)


def _normalize(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=_NORM_EPS).to(x.dtype)


class _FinalLayer(nn.Module):
    def __init__(self, config: StditConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.hidden_size) / config.hidden_size**0.5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.scale_shift_table[None] + t[:, None])[:, :, None, None].to(x.dtype).unbind(1)
        result: torch.Tensor = self.linear(_normalize(x) * (1 + scale) + shift)
        return result


# ---------------------------------------------------------------- the model


class Stdit(nn.Module):
    """The whole denoiser."""

    def __init__(self, config: StditConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = _PatchEmbedder(config.in_channels, config.hidden_size, config.patch_size)
        self.t_embedder = _ScalarEmbedder(config.hidden_size)
        self.fps_embedder = _ScalarEmbedder(config.hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))
        self.y_embedder = _CaptionEmbedder(config.caption_channels, config.hidden_size, config.model_max_length)
        self.rope = _Rope(config.head_size)
        self.spatial_blocks = nn.ModuleList(StditBlock(config, temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(StditBlock(config, temporal=True) for _ in range(config.depth))
        self.final_layer = _FinalLayer(config)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        y: torch.Tensor,
        *,
        fps: torch.Tensor,
        pixels: tuple[int, int],
        mask: torch.Tensor | None = None,
        merge: FrameMerge | None = None,
    ) -> torch.Tensor:
        """Noisy latents → velocity, from noise towards data, [B, C, T, H, W] in float32 or wider.

        x: [B, C, T, H, W]. time: [B], 1 is noise and 0 is data. y: [B, M, caption_channels], text features. fps: [B].
        pixels: height and width of the video. mask: bool [B, M], True where y holds a token; None: everywhere.
        merge: the frames to compute together; None: every frame by itself.
        """
        tokens, t, t6 = self.embed(x, time, fps, pixels)
        y = self.y_embedder(y)
        rotary = self.rotary(x.shape[2], merge, x.device)
        key_mask = None if mask is None else mask[:, None, None, :]
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, y, t6, None, key_mask, merge)
            tokens = temporal(tokens, y, t6, rotary, key_mask, merge)
        result: torch.Tensor = self.finish(tokens, t, (x.shape[3], x.shape[4]))
        return result

    def embed(
        self, x: torch.Tensor, time: torch.Tensor, fps: torch.Tensor, pixels: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """→ tokens [B, T, S, C], t [B, C] and the modulation t6 [B, 6, C]."""
        patch_rows, patch_columns = self.config.patch_size
        rows, columns = -(-x.shape[3] // patch_rows), -(-x.shape[4] // patch_columns)
        scale = math.sqrt(pixels[0] * pixels[1]) / self.config.input_sq_size
        tokens = self.x_embedder(x)
        where = positions_2d(rows, columns, self.config.hidden_size, scale).to(tokens.device, tokens.dtype)
        t = self.t_embedder(time * TIME_SCALE) + self.fps_embedder(fps)
        return tokens + where, t, self.t_block(t).unflatten(-1, (6, -1))

    def rotary(self, frames: int, merge: FrameMerge | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary cosines and sines of the frames that a temporal block attends over."""
        frequencies = self.rope.freqs.to(torch.promote_types(self.rope.freqs.dtype, torch.float32))
        if merge is not None and "temporal" in merge.parts:
            return rotary_angles(merge.positions.to(device), frequencies)
        return rotary_angles(torch.arange(frames, dtype=torch.float32, device=device), frequencies)

    def finish(self, tokens: torch.Tensor, t: torch.Tensor, latent_size: tuple[int, int]) -> torch.Tensor:
        """tokens [B, T, S, C] → velocity [B, C_in, T, H, W]; a patch that reaches over the edge is cut."""
        patch_rows, patch_columns = self.config.patch_size
        height, width = latent_size
        rows, columns = -(-height // patch_rows), -(-width // patch_columns)
        out: torch.Tensor = self.final_layer(tokens, t)  # [B, T, S, patch_rows * patch_columns * C_out]
        batch, frames = out.shape[:2]
        # Dropped channels first: the rest moves less. [B*T*rows, columns, patch_rows, patch_columns, C]
        out = out.reshape(*out.shape[:-1], patch_rows * patch_columns, -1)[..., : self.config.in_channels]
        out = out.reshape(batch * frames * rows, columns, patch_rows, -1).transpose(1, 2)
        out = out.reshape(batch, frames, rows * patch_rows, columns * patch_columns, -1)
        return out.permute(0, 4, 1, 2, 3)[..., :height, :width].to(torch.promote_types(out.dtype, torch.float32))

    def null_caption(self, tokens: int) -> torch.Tensor:
        """The caption of no caption, [tokens, caption_channels]; guidance takes as many rows as the prompt has."""
        result: torch.Tensor = self.y_embedder.y_embedding[:tokens]
        return result


def initialize(model: Stdit) -> None:
    """Weights to begin training with: Open-Sora's, and an output of zero (arXiv 2212.09748 section 3.2)."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif weight.dim() > 1 and not name.endswith("scale_shift_table"):
            nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        if name.startswith(("t_embedder.mlp", "fps_embedder.mlp")) and name.endswith("weight"):
            nn.init.normal_(weight, std=0.02)
        zero = name.startswith("temporal_blocks") and name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
        if zero or name.endswith("cross_attn.proj.weight"):
            nn.init.zeros_(weight)
        if name in ("fps_embedder.mlp.2.weight", "final_layer.linear.weight"):
            nn.init.zeros_(weight)
