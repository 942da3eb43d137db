"""Temporal dimension token merging (TDTM, arXiv 2502.04363 section 3.2): attention on pairs of frames, at every site.

Frames (2j, 2j+1) are replaced by their mean before an attention, and its result is replicated to both. Both maps are
linear over frames: `merge` [T', T] holds the means, `unmerge` [T, T'] the replication, so one program with T' free
runs merged and unmerged.

Ours, where the published code goes wrong or stops short: a merged frame's rotary position is the mean of its frames'
(2j + 1/2); of an odd count one frame stays alone, by default the first, which a causal autoencoder encodes by itself;
the feed-forward layer can be merged too; and pairs can be limited to frames whose tokens point the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

PARTS = ("spatial", "temporal", "cross", "mlp")
PAPER_PARTS = ("spatial", "temporal", "cross")


@dataclasses.dataclass(frozen=True)
class FrameMerge:
    """Which frames are computed together, and in which parts of a block."""

    merge: torch.Tensor  # [T', T] float32, rows sum to 1
    unmerge: torch.Tensor  # [T, T'] float32, one 1 in every row
    positions: torch.Tensor  # [T'] float32: rotary positions, in frames
    parts: frozenset[str]  # of PARTS

    def narrow(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, T, S, C] → their means [B, T', S, C]."""
        return _over_frames(self.merge, tokens)

    def widen(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, T', S, C] → every frame its group's [B, T, S, C]."""
        return _over_frames(self.unmerge, tokens)


def _over_frames(matrix: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    batch, frames, sites, channels = tokens.shape
    flat = tokens.reshape(batch, frames, sites * channels)
    return (matrix.to(flat.dtype) @ flat).reshape(batch, matrix.shape[0], sites, channels)


def adjacent_groups(frames: int, *, alone: str = "first") -> list[list[int]]:
    """Pairs of neighbouring frames; of an odd count the `first` or the `last` stays alone.

    >>> adjacent_groups(5)
    [[0], [1, 2], [3, 4]]
    """
    if frames < 1:
        raise ValueError(f"{frames} frames cannot be merged; give at least 1")
    if alone not in ("first", "last"):
        raise ValueError(f"the frame that stays alone is 'first' or 'last', not {alone!r}")
    start = frames % 2 if alone == "first" else 0
    groups = [[index] for index in range(start)]
    groups += [[index, index + 1] for index in range(start, frames - 1, 2)]
    if alone == "last" and frames % 2:
        groups.append([frames - 1])
    return groups


def similar_groups(tokens: torch.Tensor, least_cosine: float, *, alone: str = "first") -> list[list[int]]:
    """The pairs of `adjacent_groups` whose frames agree; the others stay apart. Ours.

    tokens [B, T, S, C]: two frames agree when the cosine of their tokens, averaged over batch and sites, is at least
    `least_cosine`.
    """
    groups: list[list[int]] = []
    for group in adjacent_groups(tokens.shape[1], alone=alone):
        if len(group) == 2:
            first, second = tokens[:, group[0]].float(), tokens[:, group[1]].float()
            if float(torch.nn.functional.cosine_similarity(first, second, dim=-1).mean()) < least_cosine:
                groups += [[group[0]], [group[1]]]
                continue
        groups.append(group)
    return groups


def frame_merge(groups: Sequence[Sequence[int]], parts: frozenset[str] = frozenset(PAPER_PARTS)) -> FrameMerge:
    """The maps of `groups`, which must name every frame from 0 on once and in order."""
    order = [frame for group in groups for frame in group]
    if order != list(range(len(order))) or not order:
        raise ValueError(f"groups must name the frames 0, 1, 2, … once and in order, not {order}")
    unknown = sorted(parts - set(PARTS))
    if unknown:
        raise ValueError(f"token merging knows the parts {', '.join(PARTS)}, not {', '.join(unknown)}")
    merge = torch.zeros(len(groups), len(order))
    for row, group in enumerate(groups):
        merge[row, list(group)] = 1.0 / len(group)
    positions = merge @ torch.arange(len(order), dtype=torch.float32)
    return FrameMerge(merge, (merge > 0).float().T.contiguous(), positions, parts)
