"""Two sparse layers built on the decomposition, with their state passed in and returned, or kept in buffers."""

from __future__ import annotations

import torch
from torch import nn

from edgerun.ops import dhsa_attention as op
from edgerun.recipe import DhsaOptions
from edgerun.techniques.dhsa import LayerAttention, layer_options

HEADS, KV_HEADS, HEAD_DIM, MAX_CONTEXT = 4, 2, 8, 320
OPTIONS = layer_options(DhsaOptions(budget=172, tile=64, boundary_threshold=0.6), [LayerAttention(0.25)] * 2)
STATE_NAMES = ["boundaries", *(f"{name}_{i}" for i in (0, 1) for name in ("key_cache", "value_cache", "summaries"))]


def new_state(boundaries: torch.dtype = torch.uint8) -> list[torch.Tensor]:
    """Zeroed state, in the order of STATE_NAMES; the boundaries are the same for both layers."""
    layers = [op.AttentionState.allocate(KV_HEADS, HEAD_DIM, MAX_CONTEXT, options) for options in OPTIONS]
    shared = op.boundaries_as(layers[0].boundaries, boundaries)
    return [shared, *(t for layer in layers for t in (layer.key_cache, layer.value_cache, layer.summaries))]


def split_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's query [1, 4, S, 8], key and value [1, 2, S, 8] from its input [1, S, 32]."""
    query = x.reshape(1, -1, HEADS, HEAD_DIM).transpose(1, 2)
    return query, query[:, :KV_HEADS] * 0.5 + 0.1, query[:, KV_HEADS:] * 2.0


class FunctionalLayers(nn.Module):
    """forward(x [1, S, 32], input_pos [1], *state) -> (y [1, S, 32], *state)."""

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        boundaries, *caches = state
        written: list[torch.Tensor] = []
        for index, options in enumerate(OPTIONS):
            own = caches[3 * index : 3 * index + 3]
            out, *own, boundaries = op.decomposition(*split_heads(x), *own, boundaries, input_pos, options)
            written += own
            x = x + out.flatten(2)
        return (x, boundaries, *written)


class StatefulLayers(nn.Module):
    """forward(x, input_pos) -> y: the same with the state in buffers. Core ML's states are of a float dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = FunctionalLayers()
        for name, tensor in zip(STATE_NAMES, new_state(torch.float32), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        buffers = [getattr(self, name) for name in STATE_NAMES]
        y, *state = self.layers(x, input_pos, *buffers)
        for buffer, tensor in zip(buffers, state, strict=True):
            buffer.copy_(tensor)
        return y


def eager(x: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    """What the reference computes for each slice of x [1, n, 32]."""
    boundaries, *caches = new_state()
    states = [op.AttentionState(*caches[3 * i : 3 * i + 3], boundaries) for i in range(2)]
    results = []
    for first, last in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y = x[:, first:last]
        for state, options in zip(states, OPTIONS, strict=True):
            y = y + op.reference(*split_heads(y), state, first, options).flatten(2)
        results.append(y)
    return results


def example(tokens: int) -> torch.Tensor:
    """An input [1, tokens, 32] whose keys change topic now and then."""
    generator = torch.Generator().manual_seed(5)
    topics = torch.randn(1, tokens // 40 + 1, HEADS * HEAD_DIM, generator=generator).repeat_interleave(40, 1)
    return topics[:, :tokens] + 0.5 * torch.randn(1, tokens, HEADS * HEAD_DIM, generator=generator)
