"""Selectors that score blocks by summaries of their keys: DHSA's chunks in every form that the lab compares.

The shipped rule runs as it ships, in the native op (`Shipped`). `Pooled` is the same arithmetic in torch with more
choices: which cuts make chunks, which summary, before or after RoPE, which channels, one selection a KV head or one for
all heads. Scores are the header's (csrc/ops/dhsa_attention/dhsa_attention.h) wherever it has them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention import Lists, native_lists
from edgerun.ops.dhsa_attention_types import BOUNDARY_WINDOW
from edgerun.recipe import MAX_CHUNK, MICRO_BLOCK
from edgerun.selectors.interface import BlockSelector, Call, RankedSelector, fold, merge_ranks, products
from edgerun.techniques.boundary_predictor import learned_cuts

Pool = Literal["mean", "sqrt", "centred", "minmax", "moments"]
Cuts = Literal["shipped", "fixed", "gaps"]
# Boundary logits of the gaps of keys [Hkv, n, D]: [n - 1].
BoundaryLogits = Callable[[torch.Tensor], torch.Tensor]


class Shipped(BlockSelector):
    """The lists of the native op itself, with the options of the layer."""

    def lists(self, call: Call) -> Lists:
        query = call.query.flatten(0, 1)[None]
        return native_lists(query, call.state, call.input_pos, call.options, threads=torch.get_num_threads())


@dataclasses.dataclass(frozen=True)
class Pooled(RankedSelector):
    """Chunks scored by pooled queries against pooled keys.

    cuts: where chunks begin besides every 64 tokens: shipped (what the model's rule found: cosine), fixed (every
    `chunk_tokens`: 16 with minmax is Quest, arXiv 2406.10774), gaps (`logits` above `threshold`, by the local rule).
    bands: after Prism (arXiv 2602.08426), whose point is that means lose the fast rotary channels. Ours: "split" ranks
    the fast and the slow half apart and takes the best of both in turns; "boosted" multiplies each half's part of the
    logit by the energy that averaging took from it, over all tokens that are stored.
    heads: "all" averages queries and keys over all heads before scoring, as the paper has it.
    """

    pooling: Pool = "moments"
    cuts: Cuts = "shipped"
    rope: Literal["after", "before"] = "after"
    bands: Literal["whole", "split", "boosted"] = "whole"
    heads: Literal["kv", "all"] = "kv"
    query_pooling: Literal["max", "mean"] = "max"
    chunk_tokens: int = MAX_CHUNK
    logits: BoundaryLogits | None = None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.chunk_tokens not in (16, 32, 48, 64):
            raise EdgerunError(f"chunks of {self.chunk_tokens} tokens; they have 16, 32, 48 or 64")

    def scores(self, call: Call) -> torch.Tensor:
        query = call.query
        if self.rope == "before" and call.rotation is not None:
            query = call.rotation.undo(query, call.input_pos)
        if self.heads == "all":
            query = query.mean(dim=(0, 1), keepdim=True)
        pooled = pool_queries(query, call, self.query_pooling)  # [Hkv, groups, Q, D]
        first, *second = call.per_block((self.pooling, self.rope, self.heads), lambda a, b: self.summaries(call, a, b))
        flags = self.chunk_starts(call)
        if self.bands == "whole":
            found = chunk_scores(pooled, first, second, flags, call, self.pooling)
            return found.expand(call.query.shape[0], -1, -1)
        bands = rotary_bands(call)
        if self.bands == "boosted":
            factor = torch.ones(call.keys.shape[2])
            for band in bands:
                factor[band] = temperature(call, query, band)
            found = chunk_scores(factor * pooled, first, second, flags, call, self.pooling)
        else:
            parts = [
                chunk_scores(
                    pooled[..., band], first[..., band], [x[..., band] for x in second], flags, call, self.pooling
                )
                for band in bands
            ]
            found = merge_ranks(*(part.masked_fill(~call.candidates, -math.inf) for part in parts))
        return found.expand(call.query.shape[0], -1, -1)

    def summaries(self, call: Call, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """Of the micro-blocks [first, last) of the keys that are scored: see `summaries`."""
        keys = call.keys[:, first * MICRO_BLOCK : last * MICRO_BLOCK]
        if self.rope == "before" and call.rotation is not None:
            keys = call.rotation.undo(keys, first * MICRO_BLOCK)
        return summaries(keys.mean(dim=0, keepdim=True) if self.heads == "all" else keys, self.pooling)

    def chunk_starts(self, call: Call) -> torch.Tensor:
        """bool [blocks]: where a chunk begins."""
        if self.cuts == "shipped":
            return call.state.boundaries[: call.blocks].bool()
        edges = torch.arange(call.blocks)
        if self.cuts == "fixed":
            return edges % (self.chunk_tokens // MICRO_BLOCK) == 0
        assert self.logits is not None
        return learned_cuts(boundary_logits(call, self.logits), self.threshold)[: call.blocks].bool()


def boundary_logits(call: Call, predict: BoundaryLogits) -> torch.Tensor:
    """Logits of the gaps between all stored tokens, [n - 1], from the keys of the first layer that asks."""
    known: torch.Tensor
    name = ("boundary_logits", predict)
    layer, known = call.shared.get(name, (call.layer, torch.zeros(0)))
    if layer == call.layer:
        require_layer(predict, call)
        # The gap i | i + 1 was final once the key i + 4 was there, so gaps from here on are computed again.
        final = max(0, min(len(known) + 1, call.input_pos) - BOUNDARY_WINDOW)
        begin = max(0, final - BOUNDARY_WINDOW + 1)
        known = torch.cat([known[:final], predict(call.keys[:, begin:])[final - begin :]])
        call.shared[name] = (layer, known)
    return known


def require_layer(predict: BoundaryLogits, call: Call) -> None:
    """Raise EdgerunError when the logits come from a predictor that was trained on another layer's keys."""
    layer = getattr(predict, "layer", None)
    if layer is not None and layer != call.layer:
        raise EdgerunError(
            f"the predictor was trained on the keys of layer {layer}, boundaries are found in layer {call.layer}: pass "
            f"one of layer {call.layer}, or make layer {layer} the first sparse one (--dense-layers)"
        )


def pool_queries(query: torch.Tensor, call: Call, pooling: str) -> torch.Tensor:
    """[Hkv, G, S, D] -> [Hkv, groups, Q, D]: the header's vectors, means of 16-row segments, or one mean.

    A group with fewer segments repeats its first one, which changes no maximum.
    """
    pooled = []
    for first, last in call.groups:
        rows = query[:, :, first:last]
        if pooling == "mean":
            pooled.append(rows.mean(dim=(1, 2))[:, None])
            continue
        start = call.input_pos + first
        edges = range((start // MICRO_BLOCK + 1) * MICRO_BLOCK, start + last - first, MICRO_BLOCK)
        cuts = [0, *(edge - start for edge in edges), last - first]
        means = [rows[:, :, a:b].mean(dim=2) for a, b in itertools.pairwise(cuts)]
        pooled.append(torch.cat(means, dim=1))
    width = max(p.shape[1] for p in pooled)
    filled = [torch.cat([p, p[:, :1].expand(-1, width - p.shape[1], -1)], dim=1) for p in pooled]
    return torch.stack(filled, dim=1)


def rotary_bands(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of the fast and of the slow half of the rotary frequencies; channels without rotation are slow."""
    width = call.keys.shape[2]
    half = width // 2 if call.rotation is None else len(call.rotation.frequencies)
    channel = torch.arange(width)
    fast = (channel < 2 * half) & (channel % half < half // 2)
    return fast.nonzero().flatten(), (~fast).nonzero().flatten()


def temperature(call: Call, query: torch.Tensor, band: torch.Tensor) -> float:
    """What a band's logits are multiplied by, so that averaging over 16 tokens costs it no energy."""
    ratio = 1.0
    for x in (query.flatten(0, 1), call.keys):
        whole = x[:, : x.shape[1] // MICRO_BLOCK * MICRO_BLOCK, band]
        means = fold(whole, 1, (-1, MICRO_BLOCK)).mean(dim=2)
        energy = float(means.square().sum()) * MICRO_BLOCK
        ratio *= math.sqrt(float(whole.square().sum()) / energy) if energy > 0 else 1.0
    return ratio


def summaries(keys: torch.Tensor, pooling: str) -> tuple[torch.Tensor, ...]:
    """Of each micro-block of keys [Hkv, 16 M, D]: (mean), (mean, variance) or (lowest, highest), rounded to half."""
    blocks = fold(keys, 1, (-1, MICRO_BLOCK))  # [Hkv, M, 16, D]
    mean = blocks.mean(dim=2)
    parts: tuple[torch.Tensor, ...] = (mean,)
    if pooling == "minmax":
        parts = (blocks.amin(dim=2), blocks.amax(dim=2))
    elif pooling == "moments":
        parts = (mean, (blocks - mean[:, :, None]).square().mean(dim=2))
    return tuple(part.half().float() for part in parts)


def chunk_scores(
    pooled: torch.Tensor,
    first: torch.Tensor,
    second: Sequence[torch.Tensor],
    starts: torch.Tensor,
    call: Call,
    pooling: Pool,
) -> torch.Tensor:
    """[Hkv, groups, blocks]: each micro-block has its chunk's score, the best over the pooled queries.

    pooled [Hkv, groups, Q, D]; first and second: `summaries`, [Hkv, M, D] each; starts bool [blocks]. A chunk is its
    candidates.
    """
    blocks = first.shape[1]
    chunk = starts.long().cumsum(0)[:blocks] - 1
    chunks = int(chunk[-1]) + 1
    allowed = call.candidates[:, :blocks]  # [groups, M]
    size = torch.zeros(len(call.groups), chunks).index_add_(1, chunk, allowed.float())  # micro-blocks

    def over_chunks(values: torch.Tensor) -> torch.Tensor:
        """Sums over the candidates of each chunk: [..., groups, Q, M] -> [..., groups, Q, chunks]."""
        masked = torch.where(allowed[:, None], values, torch.zeros(()))
        return masked.new_zeros(*values.shape[:-1], chunks).index_add_(-1, chunk, masked)

    if pooling == "minmax":
        positive, negative = pooled.clamp(min=0), pooled.clamp(max=0)
        bounds = products(positive, second[0]) + products(negative, first)
        bounds = bounds.masked_fill(~allowed[:, None], -math.inf)
        scores = bounds.new_full((*bounds.shape[:-1], chunks), -math.inf)
        scores.scatter_reduce_(-1, chunk.expand_as(bounds), bounds, "amax")
    elif pooling == "moments":
        scaled = call.options.scale * pooled
        mass = products(scaled, first) + products(0.5 * scaled.square(), second[0])
        before_local = torch.arange(blocks) < torch.tensor([local for _, local, _ in call.ranges])[:, None]
        everything = mass.masked_fill(~before_local[:, None], -math.inf).logsumexp(dim=-1, keepdim=True)
        share = mass - everything
        top = share.masked_fill(~allowed[:, None], -math.inf).amax(dim=-1, keepdim=True).clamp(min=-1e30)
        scores = over_chunks((share - top).exp()).log() + top - size.log()[:, None]
    else:
        dots = products(pooled, first)
        scores = over_chunks(dots) / size[:, None]
        if pooling == "centred":
            before_local = torch.arange(blocks) < torch.tensor([local for _, local, _ in call.ranges])[:, None]
            total = torch.where(before_local[:, None], dots, torch.zeros(())).sum(dim=-1, keepdim=True)
            scores = scores - total / before_local.sum(dim=1).clamp(min=1)[:, None, None]
        if pooling in ("sqrt", "centred"):
            scores = (MICRO_BLOCK * size).sqrt()[:, None] * scores
    best = scores.amax(dim=2)[..., chunk]  # [Hkv, groups, M]
    return torch.nn.functional.pad(best, (0, call.blocks - blocks), value=-math.inf)
