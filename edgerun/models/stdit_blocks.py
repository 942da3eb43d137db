"""STDiT3 as a chain of blocks that can be programs of their own, in operations that on-device delegates have.

The chain: `head` (patches, time, caption), one `pair` for each spatial and temporal block, `tail`. It computes both
halves of classifier-free guidance at once, the prompt's first; the null caption is the head's own, as many of its rows
as the prompt has tokens. Against stdit.py only the spelling differs: means over channels are products with a column of
1/C, attention is spelled out, and a rotary pair's two channels lie half a head apart, for which the rows of the
temporal blocks' q and k are reordered (their products do not change).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from edgerun.models.stdit import (
    TIME_SCALE,
    Stdit,
    StditBlock,
    positions_2d,
    rotary_angles,
    sinusoid_frequencies,
)

_NORM_EPS = 1e-6


class Tensors(Protocol):
    """Tensors by name, as a dict has them or a file that reads them when asked."""

    def __getitem__(self, name: str, /) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True)
class DenoiserBlock:
    """One block of the chain. Inputs and outputs bear the names under which a runtime keeps them.

    x [2, C, T, h, w], time [2], fps [2], y [1, n, caption channels] → head → hidden [2, T, S, C], t [2, C],
    modulation [2, 6, C], caption [2, n, C] → pairs (hidden → hidden) → tail → v [2, C, T, h, w].
    A pair of a model that merges frames also takes merge [T', T], unmerge [T, T'], cosines and sines [T', head size].
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precise: tuple[str, ...] = ()  # submodules that stay in float32 where others are quantised


def denoiser_blocks(
    model: Stdit,
    latent: tuple[int, int, int],
    pixels: tuple[int, int],
    *,
    merge_parts: frozenset[str] = frozenset(),
    pairs_per_block: int = 1,
    weights: Tensors | None = None,
) -> Iterator[DenoiserBlock]:
    """The blocks in order, made one at a time.

    latent: frames, height and width. pixels: height and width of the video. merge_parts: what frames are merged for, of
    temporal_token_merging.PARTS. weights: where the tensors of a model on the meta device come from, by their official
    names; each is let go of after its block, so that one block is in memory at a time.
    """

    def filled(*prefixes: str) -> list[nn.Module]:
        modules = []
        for prefix in prefixes:
            module = model.get_submodule(prefix)
            if weights is not None:
                names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
                tensors = {name: weights[f"{prefix}.{name}"].float() for name in names}
                module.load_state_dict(tensors, assign=True)
            modules.append(module)
        return modules

    def emptied(modules: list[nn.Module]) -> None:
        if weights is not None:
            for module in modules:
                module.to("meta")

    parts = filled("x_embedder", "t_embedder", "fps_embedder", "t_block", "y_embedder")
    yield DenoiserBlock(
        "head",
        _Head(model, latent, pixels).eval(),
        ("x", "time", "fps", "y"),
        ("hidden", "t", "modulation", "caption"),
        precise=("time", "fps"),  # small, and every block depends on them
    )
    emptied(parts)
    depth = model.config.depth
    merged = ("merge", "unmerge", "cosines", "sines") if merge_parts else ()
    for first in range(0, depth, pairs_per_block):
        indices = range(first, min(depth, first + pairs_per_block))
        parts = filled(*(f"{kind}_blocks.{index}" for index in indices for kind in ("spatial", "temporal")), "rope")
        module = _Pairs(model, indices, latent[0], merge_parts)
        emptied(parts)
        yield DenoiserBlock(f"pairs_{first}", module.eval(), ("hidden", "modulation", "caption", *merged), ("hidden",))
        del module
    parts = filled("final_layer")
    yield DenoiserBlock("tail", _Tail(model, latent).eval(), ("hidden", "t"), ("v",), precise=("linear",))  # small
    emptied(parts)


# ---------------------------------------------------------------- spelled out


class _Mean(nn.Module):
    """Mean over the last dimension, kept as one of size 1."""

    column: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("column", torch.full((1, size), 1.0 / size), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.column)


class _LayerNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean = _Mean(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred: torch.Tensor = x - self.mean(x)
        scaled: torch.Tensor = centred * torch.rsqrt(self.mean(centred * centred) + _NORM_EPS)
        return scaled


class _RmsNorm(nn.Module):
    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.mean = _Mean(weight.shape[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = x * torch.rsqrt(self.mean(x * x) + _NORM_EPS) * self.weight
        return scaled


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, H, N, D], k and v [B, H, M, D] → [B, H, N, D]; batch and heads as one, which spares copies."""
    rows, keys, values = (part.reshape(-1, *part.shape[2:]) for part in (q * (q.shape[-1] ** -0.5), k, v))
    weights = torch.bmm(rows, keys.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, values).view(q.shape)


def _linear(source: nn.Linear, rows: slice | torch.Tensor) -> nn.Linear:
    """A Linear of its own with some of the source's rows."""
    # Copies: what is written of a view of a tensor is the tensor from its beginning.
    weight, bias = source.weight.detach()[rows].clone(), source.bias.detach()[rows].clone()
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return linear


class _SelfAttention(nn.Module):
    """q, k and v as three products: one would have to be cut apart again."""

    def __init__(self, source: nn.Module, *, rotary: bool) -> None:
        super().__init__()
        qkv: nn.Linear = source.qkv  # type: ignore[assignment]
        self.heads: int = source.heads  # type: ignore[assignment]
        size = qkv.in_features
        head_size = size // self.heads
        within = torch.arange(head_size)
        if rotary:  # even channels first, then the odd ones
            within = torch.cat([within[::2], within[1::2]])
        order = (torch.arange(self.heads)[:, None] * head_size + within).flatten()
        self.q, self.k = _linear(qkv, order), _linear(qkv, size + order)
        self.v = _linear(qkv, slice(2 * size, 3 * size))
        self.q_norm, self.k_norm = (
            nn.Identity() if isinstance(norm, nn.Identity) else _RmsNorm(norm.get_parameter("weight").detach()[within])
            for norm in (source.get_submodule("q_norm"), source.get_submodule("k_norm"))
        )
        self.proj: nn.Linear = source.proj  # type: ignore[assignment]
        self.proj = _linear(self.proj, slice(None))

    def forward(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """x [B, N, C]; angles: cosines and sines [N, D / 2]."""
        batch, count, size = x.shape
        q, k, v = (
            part(x).view(batch, count, self.heads, size // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = _rotate(q, *angles), _rotate(k, *angles)
        out = _attention(q, k, v).transpose(1, 2).reshape(batch, count, size)
        result: torch.Tensor = self.proj(out)
        return result


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """x [B, H, N, D] whose pairs lie half of D apart."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


class _CrossAttention(nn.Module):
    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.heads: int = source.heads  # type: ignore[assignment]
        both: nn.Linear = source.kv_linear  # type: ignore[assignment]
        size = both.in_features
        self.q = _linear(source.q_linear, slice(None))  # type: ignore[arg-type]
        self.k, self.v = _linear(both, slice(0, size)), _linear(both, slice(size, 2 * size))
        self.proj = _linear(source.proj, slice(None))  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [B, N, C] attends to y [B, M, C]."""
        batch, count, size = x.shape
        q, k, v = (
            part(rows).view(batch, rows.shape[1], self.heads, size // self.heads).transpose(1, 2)
            for part, rows in ((self.q, x), (self.k, y), (self.v, y))
        )
        out = _attention(q, k, v).transpose(1, 2).reshape(batch, count, size)
        result: torch.Tensor = self.proj(out)
        return result


class _Block(nn.Module):
    """StditBlock in the spelling of this file; `over` merges and unmerges the frames of a part, or does nothing."""

    table: torch.Tensor

    def __init__(self, source: StditBlock, merge_parts: frozenset[str]) -> None:
        super().__init__()
        self.temporal = source.temporal
        self.attention = _SelfAttention(source.attn, rotary=source.temporal)
        self.cross = _CrossAttention(source.cross_attn)
        self.up, self.down = _linear(source.mlp.fc1, slice(None)), _linear(source.mlp.fc2, slice(None))
        self.register_buffer("table", source.scale_shift_table.detach()[None])
        self.norm = _LayerNorm(self.up.in_features)
        self.merges_self = ("temporal" if self.temporal else "spatial") in merge_parts
        self.merges_cross, self.merges_mlp = "cross" in merge_parts, "mlp" in merge_parts

    def forward(
        self,
        x: torch.Tensor,
        caption: torch.Tensor,
        modulation: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        over: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """x [2, T, S, C]; angles [T', D / 2]; over: merge [2, T', T] and unmerge [2, T, T']."""
        rows = (self.table + modulation).unsqueeze(2)  # [2, 6, 1, C]
        shift1, scale1, gate1, shift2, scale2, gate2 = (rows[:, i : i + 1] for i in range(6))  # [2, 1, 1, C]

        def merged(y: torch.Tensor, wanted: bool) -> torch.Tensor:
            return _over_frames(over[0], y) if over is not None and wanted else y

        def unmerged(y: torch.Tensor, wanted: bool) -> torch.Tensor:
            return _over_frames(over[1], y) if over is not None and wanted else y

        inner = merged(self.norm(x) * (1 + scale1) + shift1, self.merges_self)
        x = x + gate1 * unmerged(self._attend(inner, angles), self.merges_self)

        inner = merged(x, self.merges_cross)
        batch, frames, sites, size = inner.shape
        attended = self.cross(inner.reshape(batch, frames * sites, size), caption)
        x = x + unmerged(attended.view(batch, frames, sites, size), self.merges_cross)

        inner = merged(self.norm(x) * (1 + scale2) + shift2, self.merges_mlp)
        inner = self.down(F.gelu(self.up(inner), approximate="tanh"))
        return x + gate2 * unmerged(inner, self.merges_mlp)

    def _attend(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, frames, sites, size = x.shape
        if not self.temporal:
            within: torch.Tensor = self.attention(x.reshape(batch * frames, sites, size), None)
            return within.view(batch, frames, sites, size)
        across: torch.Tensor = self.attention(x.transpose(1, 2).reshape(batch * sites, frames, size), angles)
        return across.view(batch, sites, frames, size).transpose(1, 2)


def _over_frames(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """matrix [2, A, B], x [2, B, S, C] → [2, A, S, C]."""
    batch, frames, sites, size = x.shape
    return torch.bmm(matrix, x.reshape(batch, frames, sites * size)).view(batch, matrix.shape[1], sites, size)


# ---------------------------------------------------------------- the chain's modules


class _Head(nn.Module):
    where: torch.Tensor
    frequencies: torch.Tensor

    def __init__(self, model: Stdit, latent: tuple[int, int, int], pixels: tuple[int, int]) -> None:
        super().__init__()
        config = model.config
        rows, columns = (-(-size // patch) for size, patch in zip(latent[1:], config.patch_size, strict=True))
        scale = math.sqrt(pixels[0] * pixels[1]) / config.input_sq_size
        self.register_buffer("where", positions_2d(rows, columns, config.hidden_size, scale).float(), persistent=False)
        self.register_buffer("frequencies", sinusoid_frequencies(torch.float32), persistent=False)
        projection = model.x_embedder.proj
        self.patches = nn.Conv2d(
            config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size, device="meta"
        )
        self.patches.weight = nn.Parameter(projection.weight.detach()[:, :, 0].clone(), False)
        self.patches.bias = nn.Parameter(projection.bias.detach().clone(), False)  # type: ignore[union-attr]
        self.time, self.fps = model.t_embedder.mlp, model.fps_embedder.mlp
        self.modulation, self.caption = model.t_block, model.y_embedder
        self.size = config.hidden_size
        self.padding = (0, -latent[2] % config.patch_size[1], 0, -latent[1] % config.patch_size[0])

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, fps: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The chain's inputs → tokens, t, modulation and caption, as DenoiserBlock says."""
        batch, channels, frames, height, width = x.shape
        flat = F.pad(x.transpose(1, 2).reshape(batch * frames, channels, height, width), self.padding)
        tokens = self.patches(flat).flatten(2).transpose(1, 2).reshape(batch, frames, -1, self.size) + self.where
        t = self.time(self._waves(time * TIME_SCALE)) + self.fps(self._waves(fps))
        null = self.caption.y_embedding[: y.shape[1]].unsqueeze(0)
        caption = self.caption.y_proj(torch.cat([y, null]))
        return tokens, t, self.modulation(t).view(batch, 6, self.size), caption

    def _waves(self, values: torch.Tensor) -> torch.Tensor:
        angles = values.unsqueeze(1) * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _Pairs(nn.Module):
    cosines: torch.Tensor
    sines: torch.Tensor

    def __init__(self, model: Stdit, indices: range, frames: int, merge_parts: frozenset[str]) -> None:
        super().__init__()
        blocks = [(model.spatial_blocks[i], model.temporal_blocks[i]) for i in indices]
        self.blocks = nn.ModuleList(_Block(block, merge_parts) for pair in blocks for block in pair)  # type: ignore[arg-type]
        self.merges, self.merges_time = bool(merge_parts), "temporal" in merge_parts
        cosines, sines = rotary_angles(torch.arange(frames, dtype=torch.float32), model.rope.freqs.detach().cpu())
        self.register_buffer("cosines", cosines[:, ::2].contiguous(), persistent=False)
        self.register_buffer("sines", sines[:, ::2].contiguous(), persistent=False)

    def forward(
        self, tokens: torch.Tensor, modulation: torch.Tensor, caption: torch.Tensor, *more: torch.Tensor
    ) -> torch.Tensor:
        over, angles = None, (self.cosines, self.sines)
        if self.merges:
            merge, unmerge, cosines, sines = more
            over = (torch.stack([merge, merge]), torch.stack([unmerge, unmerge]))
            # Neighbouring channels share an angle in what is given; here each pair needs it once.
            angles = (cosines[:, ::2], sines[:, ::2]) if self.merges_time else angles
        for block in self.blocks:
            tokens = block(tokens, caption, modulation, angles, over)
        return tokens


class _Tail(nn.Module):
    table: torch.Tensor

    def __init__(self, model: Stdit, latent: tuple[int, int, int]) -> None:
        super().__init__()
        config, layer = model.config, model.final_layer
        self.patch, self.latent, self.channels = config.patch_size, latent, config.in_channels
        # Only the velocity's rows: what the model predicts beside it is dropped.
        places = torch.arange(math.prod(config.patch_size))[:, None] * config.out_channels
        self.linear = _linear(layer.linear, (places + torch.arange(config.in_channels)).flatten())
        self.register_buffer("table", layer.scale_shift_table.detach()[None])
        self.norm = _LayerNorm(config.hidden_size)

    def forward(self, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = (self.table + t.unsqueeze(1)).unsqueeze(2)  # [2, 2, 1, C]
        out: torch.Tensor = self.linear(
            self.norm(tokens) * (1 + rows[:, 1:2]) + rows[:, 0:1]
        )  # [2, T, S, patch * C_in]
        frames, height, width = self.latent
        down, across = -(-height // self.patch[0]), -(-width // self.patch[1])
        out = out.reshape(2 * frames * down, across, self.patch[0], self.patch[1] * self.channels).transpose(1, 2)
        out = out.reshape(2, frames, down * self.patch[0], across * self.patch[1], self.channels)
        return out.permute(0, 4, 1, 2, 3)[..., :height, :width]
