"""What every selector of the accuracy lab sees and gives: a call of one attention layer, and a score for each block.

A selector ranks the micro-blocks of 16 keys for each KV head and query group. What is forced is the same for all: the
sink, the local band (from the last cut that was decidable before the group, on the boundaries that the model's shipped
rule found) and the group's own tokens; the best of the rest fill the budget. So at one budget every selector attends
the same number of tokens, and lists differ by the ranking alone. Rules without a budget give their lists themselves.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Lists
from edgerun.ops.dhsa_attention_reference import groups
from edgerun.recipe import BOUNDARY_REACH, MICRO_BLOCK


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How positions enter queries and keys: rotary frequencies [R / 2] in radians a token, over the first R channels.

    Channel i pairs with channel i + R / 2, as transformers' rotate_half has it; scaling multiplies both.
    """

    frequencies: torch.Tensor
    scaling: float = 1.0

    def undo(self, x: torch.Tensor, first_position: int) -> torch.Tensor:
        """x [..., tokens, D] of consecutive positions as it was before its rotation."""
        positions = torch.arange(first_position, first_position + x.shape[-2], dtype=torch.float32)
        angles = torch.outer(positions, self.frequencies.float())  # [tokens, R / 2]
        cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        width = cosine.shape[1]
        rotated, rest = x[..., :width], x[..., width:]
        a, b = rotated.chunk(2, dim=-1)
        back = (rotated * cosine + torch.cat([b, -a], dim=-1) * sine) / self.scaling
        return torch.cat([back, rest], dim=-1)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of one layer, its tokens already in `state`.

    query [Hkv, G, S, D] and keys [Hkv, n, D] (all n = input_pos + S stored tokens), float32, after RoPE. options: of
    the layer under the shipped rule; sink, tile, scale and budget hold for every selector. rotation: None where the
    model has no rotary embedding.
    """

    query: torch.Tensor
    keys: torch.Tensor
    input_pos: int
    state: AttentionState
    options: AttentionOptions
    layer: int = 0
    rotation: Rotation | None = None
    memory: dict[Any, Any] = dataclasses.field(default_factory=dict)  # of this layer, from call to call
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)  # of all layers, from call to call

    @property
    def stored(self) -> int:
        """n."""
        return self.keys.shape[1]

    @property
    def blocks(self) -> int:
        """Micro-blocks that hold the stored tokens, the last one perhaps in part."""
        return -(-self.stored // MICRO_BLOCK)

    @functools.cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Rows [first, last) that share a selection."""
        return groups(self.query.shape[2], self.input_pos, self.options.tile)

    @functools.cached_property
    def ranges(self) -> list[tuple[int, int, int]]:
        """For each group (sink, local, end): candidates are the micro-blocks sink..local-1, forced the others < end."""
        flags = self.state.boundaries
        cuts = flags.nonzero().flatten()
        found = []
        for first, last in self.groups:
            start = self.input_pos + first
            decidable = max(0, start - BOUNDARY_REACH) // MICRO_BLOCK
            local = int(cuts[torch.searchsorted(cuts, decidable, right=True) - 1])
            found.append((min(self.options.sink // MICRO_BLOCK, local), local, self._end(last)))
        return found

    def _end(self, last: int) -> int:
        return -(-(self.input_pos + last) // MICRO_BLOCK)

    @functools.cached_property
    def candidates(self) -> torch.Tensor:
        """bool [groups, blocks]: what a selector may choose from."""
        columns = torch.arange(self.blocks)
        return torch.stack([(columns >= sink) & (columns < local) for sink, local, _ in self.ranges])

    def per_block(
        self, name: object, compute: Callable[[int, int], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        """`compute`, which gives [Hkv, last - first, ...] for the whole micro-blocks [first, last), for all of them.

        Blocks that no token of this call touched are remembered under `name`.
        """
        last = self.stored // MICRO_BLOCK
        known = self.memory.get(name)
        first = 0 if known is None else min(known[0].shape[1], self.input_pos // MICRO_BLOCK)
        if known is None or first < last:
            new = compute(first, last)
            known = (
                new
                if known is None
                else tuple(torch.cat([a[:, :first], b], dim=1) for a, b in zip(known, new, strict=True))
            )
        self.memory[name] = known
        return tuple(part[:, :last] for part in known)


class BlockSelector(abc.ABC):
    """Chooses micro-blocks. dense_decode: its authors have no rule for single tokens, which then attend everything."""

    dense_decode = False

    @abc.abstractmethod
    def lists(self, call: Call) -> Lists:
        """The micro-blocks that each KV head and group attends, ascending."""


class RankedSelector(BlockSelector):
    """Ranks micro-blocks; the best of the candidates fill the budget."""

    @abc.abstractmethod
    def scores(self, call: Call) -> torch.Tensor:
        """[Hkv, groups, blocks]: higher is better; only `call.candidates` are looked at."""

    def lists(self, call: Call) -> Lists:
        if call.options.budget == 0 or (self.dense_decode and call.query.shape[2] == 1):
            return everything(call)
        return choose(self.scores(call), call)


def fold(x: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """A dimension split into several, the last one fastest."""
    split: torch.Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [H, ..., D] with every row of y [H, n, D]: [H, ..., n], as one product a head, so that y is not copied."""
    return (x.flatten(1, -2) @ y.transpose(1, 2)).view(*x.shape[:-1], y.shape[1])


def everything(call: Call) -> Lists:
    """Dense attention as lists."""
    return [[list(range(end)) for _, _, end in call.ranges] for _ in range(call.query.shape[0])]


def room(call: Call, group: int) -> int:
    """How many micro-blocks of candidates fit into the budget of a group beside what is forced; all, where dense."""
    sink, local, _ = call.ranges[group]
    end = call.input_pos + call.groups[group][1]
    if call.options.budget == 0 or end <= call.options.budget:
        return local - sink
    forced = sink * MICRO_BLOCK + end - local * MICRO_BLOCK
    return max(0, min(local - sink, (call.options.budget - forced) // MICRO_BLOCK))


def choose(scores: torch.Tensor, call: Call) -> Lists:
    """What is forced, and the best of scores [Hkv, groups, blocks] up to the budget, ties to the lower id."""
    ranked = scores.masked_fill(~call.candidates, -math.inf)
    order = torch.sort(ranked, dim=2, descending=True, stable=True).indices
    lists: Lists = [[] for _ in range(scores.shape[0])]
    for group, (sink, local, end) in enumerate(call.ranges):
        count = room(call, group)
        for head, mine in enumerate(lists):
            chosen = order[head, group, :count].sort().values.tolist()
            mine.append([*range(sink), *chosen, *range(local, end)])
    return lists


def merge_ranks(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Scores [..., blocks] whose top n is the union of the best of both, taken in turns, `first` before `second`."""
    places = []
    for scores in (first, second):
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        place = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order))
        places.append(place)
    return -torch.minimum(2 * places[0], 2 * places[1] + 1).to(first.dtype)
