"""Random calls of one attention layer, as a selector sees them."""

from __future__ import annotations

import torch

from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Pooling, reference_append
from edgerun.selectors.interface import Call, Rotation

KV_HEADS, GROUP, HEAD_DIM = 2, 2, 16


def make_call(
    tokens: int,
    *,
    input_pos: int = 0,
    budget: int = 256,
    tile: int = 64,
    seed: int = 0,
    pooling: Pooling = Pooling.MOMENTS,
    loud: bool = False,
    rotation: Rotation | None = None,
) -> Call:
    """A call of `tokens` rows behind `input_pos` stored tokens.

    loud: keys in runs of 40 that resemble each other, and queries that look for a few of them.
    """
    generator = torch.Generator().manual_seed(seed)
    options = AttentionOptions(
        scale=HEAD_DIM**-0.5, budget=budget, tile=tile, sink=16, finds_boundaries=True, pooling=pooling
    )
    stored = input_pos + tokens
    state = AttentionState.allocate(KV_HEADS, HEAD_DIM, stored, options)
    keys = torch.randn(KV_HEADS, stored, HEAD_DIM, generator=generator)
    query = torch.randn(KV_HEADS, GROUP, tokens, HEAD_DIM, generator=generator)
    if loud:
        topics = torch.randn(KV_HEADS, stored // 40 + 1, HEAD_DIM, generator=generator).repeat_interleave(40, dim=1)
        keys = 0.4 * keys + 1.5 * topics[:, :stored]
        wanted = torch.randint(0, stored, (tokens,), generator=generator)
        query = 0.5 * query + 1.5 * keys[:, None, wanted]
    reference_append(keys[None], torch.zeros_like(keys)[None], state, 0, options)
    return Call(query, keys, input_pos, state, options, rotation=rotation)


def continued(call: Call, first: int, last: int, memory: dict[object, object]) -> Call:
    """The rows [first, last) of a call as a call of their own, with what came before remembered."""
    return Call(
        call.query[:, :, first:last],
        call.keys[:, : call.input_pos + last],
        call.input_pos + first,
        call.state,
        call.options,
        memory=memory,
    )
