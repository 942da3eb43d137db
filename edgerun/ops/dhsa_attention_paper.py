"""DHSA as its paper has it: arXiv 2510.24606 v1, one whole prompt at once, to measure our departures against.

Exempt from the laws of csrc/ops/dhsa_attention/dhsa_attention.h: a chunk starts at any token, boundaries are suppressed
globally by score, so the end of a prompt can move a cut at its start; a chunk's mean may hold keys that come after the
query; one selection serves all heads. Boundary logits are an input: the paper's predictor is trained per model.
Where the paper is silent the choice is marked "ours".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from edgerun.errors import EdgerunError


@dataclasses.dataclass(frozen=True)
class PaperOptions:
    """The paper's settings; its LongBench runs use budget 2048, its needle runs 1024, its latency runs tile 256."""

    scale: float  # of q . k in the attention; the selection has none
    budget: int = 2048  # N_b, key tokens per query tile
    tile: int = 128  # B_q, query tokens
    recent: int = 128  # last tokens before a tile's end, always attended
    sink: int = 128  # first tokens, they replace the lowest picks
    question_tokens: int = 0  # queries at the prompt's end that attend densely
    window: int = 0  # sliding layers: a token attends at most this many, its own among them; 0: none
    boundary_logit: float = 1.1  # a gap above it may be a boundary
    suppression: int = 8  # no two boundaries at this distance or nearer, tokens
    chunks_per_tile: int = 8  # at most floor(L / B_q) times this many chunks

    def __post_init__(self) -> None:
        if self.budget < self.recent + self.sink:
            raise EdgerunError(
                f"budget is {self.budget} tokens, below the {self.recent} recent and {self.sink} sink tokens "
                "that it must hold: raise budget"
            )


def paper_boundaries(logits: torch.Tensor, options: PaperOptions) -> list[int]:
    """Chunk starts, ascending, 0 first. logits [L - 1]: entry i for the gap between the tokens i and i + 1.

    Greedy non-maximum suppression over the whole prompt: the best gap first (ours: of equal ones the earlier), each
    kept unless a kept one is within `suppression` tokens, until the quota of chunks is full (ours: at least one chunk).
    """
    quota = max(1, (len(logits) + 1) // options.tile * options.chunks_per_tile) - 1
    kept: list[int] = []
    for gap in torch.sort(logits, descending=True, stable=True).indices.tolist():
        if len(kept) == quota or logits[gap] <= options.boundary_logit:
            break
        if all(abs(gap - other) > options.suppression for other in kept):
            kept.append(gap)
    return [0, *sorted(gap + 1 for gap in kept)]


def paper_scores(query: torch.Tensor, key: torch.Tensor, starts: Sequence[int], options: PaperOptions) -> torch.Tensor:
    """S = q_b . k_c upsampled to tokens, [tiles, L]; q_b = sqrt(n) mean_t mean_h Q, k_c = sqrt(|C|) mean_t mean_h K.

    query [1, Hq, L, D] and key [1, Hkv, L, D], means over all heads.
    """
    tokens = key.shape[2]
    queries = [math.sqrt(rows.shape[0]) * rows.mean(0) for rows in torch.split(query[0].mean(0), options.tile)]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], tokens], strict=True)]
    chunks = [
        math.sqrt(size) * rows.mean(0) for size, rows in zip(sizes, torch.split(key[0].mean(0), sizes), strict=True)
    ]
    scores = torch.stack(queries) @ torch.stack(chunks).T  # [tiles, chunks]
    return scores.repeat_interleave(torch.tensor(sizes), dim=1)


def paper_tokens(scores: torch.Tensor, start: int, end: int, options: PaperOptions) -> torch.Tensor:
    """Key tokens of the tile [start, end), ascending; `scores` [L] is the tile's row of `paper_scores`.

    Block-causal: only tokens before `end`. The `recent` last ones, then the best of the rest up to the budget (ours: of
    equal ones the earlier), whose `sink` lowest picks give way to the first tokens. Where all fit, all are attended.
    A window leaves out what no query of the tile can see (ours: the first tokens are then the window's).
    """
    first = max(0, start - options.window + 1) if options.window > 0 else 0
    if end - first <= options.budget:
        return torch.arange(first, end)
    rest = scores[first : end - options.recent]
    picks = torch.sort(rest, descending=True, stable=True).indices[: options.budget - options.recent] + first
    picks = picks[: len(picks) - options.sink]
    chosen = torch.cat([torch.arange(first, first + options.sink), picks, torch.arange(end - options.recent, end)])
    distinct: torch.Tensor = torch.unique(chosen)  # type: ignore[no-untyped-call]
    return distinct


def paper_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, options: PaperOptions
) -> torch.Tensor:
    """Steps 1 to 7 for a whole prompt: query [1, Hq, L, D], key and value [1, Hkv, L, D], logits [L - 1] of the gaps.

    Returns [1, L, Hq, D]. Exact attention over the gathered tokens under the token-exact causal mask.
    """
    tokens = key.shape[2]
    scores = paper_scores(query, key, paper_boundaries(logits, options), options)
    group = query.shape[1] // key.shape[1]
    keys, values = key[0].repeat_interleave(group, 0), value[0].repeat_interleave(group, 0)  # [Hq, L, D]
    question = tokens - options.question_tokens
    out = torch.empty_like(query[0])
    for index, start in enumerate(range(0, tokens, options.tile)):
        end = min(start + options.tile, tokens)
        sparse = torch.arange(start, max(start, min(end, question)))
        dense = torch.arange(max(start, min(end, question)), end)
        for rows, columns in (
            (sparse, paper_tokens(scores[index], start, end, options)),
            (dense, torch.arange(end)),
        ):
            visible = columns <= rows[:, None]
            if options.window > 0:
                visible &= columns > rows[:, None] - options.window
            products = options.scale * query[0, :, rows] @ keys[:, columns].transpose(1, 2)
            weights = products.masked_fill(~visible, -math.inf).softmax(dim=-1)
            out[:, rows] = weights @ values[:, columns]
    return out.transpose(0, 1)[None].contiguous()
