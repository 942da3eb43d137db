"""Selectors that score blocks from attention logits: exact ones, or a sample of them.

`exact_mass` is the judge of all others: the attention that a tile's queries pay to each block. It computes every logit,
a group at a time, so it costs as much as dense attention.
"""

from __future__ import annotations

import math

import torch

from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention import Lists
from edgerun.recipe import MICRO_BLOCK
from edgerun.selectors.interface import BlockSelector, Call, RankedSelector, everything, fold, merge_ranks, products


def capped(logits: torch.Tensor, call: Call) -> torch.Tensor:
    """Under the layer's soft-capping, where it has one."""
    softcap = call.options.softcap
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def exact_logits(call: Call, group: int) -> torch.Tensor:
    """[Hkv, G, rows, n], scaled, soft-capped, -inf where not causal."""
    first, last = call.groups[group]
    rows = torch.arange(call.input_pos + first, call.input_pos + last)
    end = call.input_pos + last
    logits = capped(products(call.options.scale * call.query[:, :, first:last], call.keys[:, :end]), call)
    own = call.input_pos + first  # what comes before is seen by every row
    logits[..., own:].masked_fill_(torch.arange(own, end) > rows[:, None], -math.inf)
    return logits


def block_sums(values: torch.Tensor, blocks: int) -> torch.Tensor:
    """[..., tokens] summed over micro-blocks: [..., blocks]; tokens that are not there count 0."""
    padded = torch.nn.functional.pad(values, (0, blocks * MICRO_BLOCK - values.shape[-1]))
    return fold(padded, -1, (blocks, MICRO_BLOCK)).sum(-1)


def exact_mass(call: Call) -> torch.Tensor:
    """Softmax weights summed over each group's rows and query heads: [Hkv, groups, blocks]; a row's sum to 1."""
    found = call.query.new_zeros(call.query.shape[0], len(call.groups), call.blocks)
    for group in range(len(call.groups)):
        weights = exact_logits(call, group)  # softmax in place: this is what measurements wait for
        weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
        shares = weights.sum(dim=-1).reciprocal()  # [Hkv, G, rows]
        columns = torch.einsum("hgr,hgrn->hn", shares, weights)
        found[:, group] = block_sums(columns, call.blocks)
    return found


class Oracle(RankedSelector):
    """The blocks with the most exact attention: no other list of as many blocks holds more."""

    def scores(self, call: Call) -> torch.Tensor:
        return exact_mass(call)


def margins(call: Call) -> torch.Tensor:
    """By how much a block's largest logit is below the running one, at the row and query head where that is least.

    [Hkv, groups, blocks], 0 at most, -inf where no row sees the block. Running: over the blocks before it and itself.
    """
    found = torch.full((call.query.shape[0], len(call.groups), call.blocks), -math.inf)
    for group in range(len(call.groups)):
        logits = exact_logits(call, group)
        blocks = -(-logits.shape[-1] // MICRO_BLOCK)
        padded = torch.nn.functional.pad(logits, (0, blocks * MICRO_BLOCK - logits.shape[-1]), value=-math.inf)
        largest = fold(padded, -1, (blocks, MICRO_BLOCK)).amax(-1)  # [Hkv, G, rows, blocks]
        margin = largest - largest.cummax(dim=-1).values
        found[:, group, :blocks] = margin.nan_to_num(-math.inf, neginf=-math.inf).amax(dim=(1, 2))
    return found


class Threshold(BlockSelector):
    """BLASST (arXiv 2512.12087): a block counts unless the largest logit of every row is far below the running one.

    limit: how far, ln lambda, below 0. The rule has no budget, so its density is measured, not set; and no ranking: a
    block that raises the maximum so far has a margin of 0, whatever comes later. It needs every logit, and saves the
    softmax and the values alone. Ours: blocks of 16 keys by a tile of queries, kept for a KV head when one of its query
    heads wants it.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def lists(self, call: Call) -> Lists:
        if call.options.budget == 0:
            return everything(call)
        kept = (margins(call) >= self.limit) & call.candidates
        return [
            [
                [*range(sink), *kept[head, group].nonzero().flatten().tolist(), *range(local, end)]
                for group, (sink, local, end) in enumerate(call.ranges)
            ]
            for head in range(call.query.shape[0])
        ]


class VerticalSlash(RankedSelector):
    """MInference's vertical-slash (arXiv 2407.02490): a call's last queries tell which columns and diagonals count.

    Their exact attention is summed by key (verticals) and by distance (slashes); both kinds of blocks are taken in
    turns until the budget is full. Ours: one pattern a KV head, blocks of 16; the estimate is the call's, so it needs
    the prompt's end in the call. MInference leaves decode dense.
    """

    dense_decode = True

    def __init__(self, last_queries: int = 64) -> None:
        self.last_queries = last_queries

    def scores(self, call: Call) -> torch.Tensor:
        rows = min(self.last_queries, call.query.shape[2])
        positions = torch.arange(call.stored - rows, call.stored)[:, None]
        columns = torch.arange(call.stored)
        logits = capped(products(call.options.scale * call.query[:, :, -rows:], call.keys), call)
        weights = logits.masked_fill(columns > positions, -math.inf).softmax(dim=-1).sum(dim=1)  # [Hkv, rows, n]
        verticals = block_sums(weights.sum(dim=1), call.blocks)  # [Hkv, blocks]
        distances = (positions - columns).clamp(min=0).expand_as(weights)
        slashes = torch.zeros(weights.shape[0], call.stored + 1)
        slashes[:, :-1].scatter_add_(1, distances.flatten(1), weights.flatten(1))
        below = torch.nn.functional.pad(slashes.cumsum(dim=1), (1, 0))  # mass at distances under d: below[:, d]
        starts = torch.tensor([call.input_pos + first for first, _ in call.groups])[:, None]
        ends = torch.tensor([call.input_pos + last for _, last in call.groups])[:, None]
        block = torch.arange(call.blocks) * MICRO_BLOCK
        nearest = (starts - block - MICRO_BLOCK + 1).clamp(0, call.stored)  # [groups, blocks]
        farthest = (ends - block).clamp(0, call.stored)
        diagonal = below[:, farthest] - below[:, torch.minimum(nearest, farthest)]  # [Hkv, groups, blocks]
        allowed = call.candidates
        vertical = verticals[:, None].expand_as(diagonal).masked_fill(~allowed, -math.inf)
        return merge_ranks(vertical, diagonal.masked_fill(~allowed, -math.inf))


class Antidiagonal(RankedSelector):
    """XAttention (arXiv 2503.16428): sums of logits along the antidiagonals of stride x stride squares stand for them.

    Each square's sum over `stride` products, divided by the stride, is taken as one logit; softmax over the squares of
    a row of squares, then summed over a tile and a block. Ours: a fixed budget instead of a share of the sum, and query
    heads of a group added up. XAttention leaves decode dense.
    """

    dense_decode = True

    def __init__(self, stride: int = 8) -> None:
        if stride < 1 or MICRO_BLOCK % stride:
            raise EdgerunError(f"a stride of {stride} tokens; it must divide {MICRO_BLOCK}")
        self.stride = stride

    def scores(self, call: Call) -> torch.Tensor:
        stride = self.stride
        keys = torch.nn.functional.pad(call.keys, (0, 0, 0, call.blocks * MICRO_BLOCK - call.stored))
        folded_keys = fold(keys, 1, (-1, stride)).flatten(2)  # [Hkv, n / s, s D]
        found = torch.zeros(call.query.shape[0], len(call.groups), call.blocks)
        columns = torch.arange(folded_keys.shape[1])
        for group, (begin, end) in enumerate(call.groups):
            start, last = call.input_pos + begin, call.input_pos + end
            squares = torch.arange(start // stride, -(-last // stride))
            padding = (0, 0, start % stride, -last % stride)  # rows that are not there are 0
            rows = fold(torch.nn.functional.pad(call.query[:, :, begin:end], padding), 2, (-1, stride))
            folded = rows.flip(3).flatten(3)  # [Hkv, G, squares, s D]
            logits = capped(products((call.options.scale / stride) * folded, folded_keys), call)
            logits.masked_fill_(columns > squares[:, None], -math.inf)
            weights = logits.softmax(dim=-1).sum(dim=(1, 2))  # [Hkv, n / s]
            found[:, group] = fold(weights, 1, (call.blocks, MICRO_BLOCK // stride)).sum(-1)
        return found
