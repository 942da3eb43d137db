"""DHSA attention in plain torch, the truth for the portable kernel: written to be read beside the header.

Follows csrc/ops/dhsa_attention/dhsa_attention.h paragraph by paragraph, for any float dtype; float64 is the judge of
near ties. float16 is computed in float32, as the kernel does. Sums that end up in the state are added one term after
the other, never by a reduction whose order depends on the shape: the state is then bit-identical for every slicing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from edgerun.ops.dhsa_attention_types import (
    BOUNDARY_SPAN,
    BOUNDARY_WINDOW,
    KEPT_HEADER,
    REFINE_FACTOR,
    REFINE_LEAST,
    SCALE_CHANNELS,
    AttentionOptions,
    AttentionState,
    Chunking,
    Pooling,
    QueryPooling,
    Selector,
)
from edgerun.recipe import BOUNDARY_REACH, MAX_CHUNK, MICRO_BLOCK


@dataclasses.dataclass(frozen=True)
class BlockList:
    """What one KV head of one query group attends, and what the choice was made from."""

    blocks: list[int]  # micro-block ids, ascending
    chosen: int = 0  # how many of them were chosen by score
    first_candidate: int = 0  # id of the first candidate
    scores: torch.Tensor | None = None  # [candidates], each micro-block's score; None where nothing was chosen


Selection = list[list[BlockList]]  # [KV head][group]


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: AttentionState,
    input_pos: torch.Tensor | int,
    options: AttentionOptions,
) -> torch.Tensor:
    """The op: appends S tokens at `input_pos` to `state`, in place, and attends from them.

    query [1, Hq, S, D], key and value [1, Hkv, S, D]. Returns [1, S, Hq, D] in the dtype of `query`.
    """
    position = int(input_pos)
    append(key, value, state, position, options)
    selection = _kept_lists(state, position, query.shape[2], options, position - 1)
    if selection is not None:
        state.selection[:, 0] = position
        state.selection[:, 1] -= 1
    else:
        selection = select_lists(query, state, position, options)
        _keep_lists(state, selection, position, query.shape[2], options)
    return reference_attend(query, state, position, options, block_lists(selection))


def block_lists(selection: Selection) -> list[list[list[int]]]:
    """Only the ids of a selection: [KV head][group] -> micro-blocks, as the kernel gives and takes them."""
    return [[group.blocks for group in head] for head in selection]


# State


def append(
    key: torch.Tensor, value: torch.Tensor, state: AttentionState, input_pos: int, options: AttentionOptions
) -> None:
    """Writes key and value [1, Hkv, S, D] at `input_pos` into `state`; updates boundaries and summaries."""
    stored = input_pos + key.shape[2]
    positions = torch.arange(input_pos, stored)
    block, token = positions // MICRO_BLOCK, positions % MICRO_BLOCK
    if state.key_cache.dtype == torch.int8:
        quantize_tokens(key, value, state, block, token)
    else:
        state.key_cache[:, block, :, token] = key[0].transpose(0, 1).to(state.key_cache.dtype)
        state.value_cache[:, block, token, :] = value[0].to(state.value_cache.dtype)
    if options.budget > 0 and options.finds_boundaries:
        find_boundaries(state, input_pos, stored, options)
    if options.keeps_summaries:
        summarize(state, input_pos, stored, options)


def quantize_tokens(
    key: torch.Tensor, value: torch.Tensor, state: AttentionState, block: torch.Tensor, token: torch.Tensor
) -> None:
    """Writes key and value [1, Hkv, S, D] into an int8 cache, row s as token `token[s]` of micro-block `block[s]`."""
    head_dim = state.head_dim
    integers = MICRO_BLOCK * head_dim  # bytes of a micro-block before its scales
    for channel in range(0, head_dim, SCALE_CHANNELS):
        part = key[0, :, :, channel : channel + SCALE_CHANNELS].float()
        quantized, scales = quantize(part)
        for offset in range(part.shape[2]):
            state.key_cache[:, block, (channel + offset) * MICRO_BLOCK + token] = quantized[:, :, offset]
        _write_halves(state.key_cache, block, integers + 2 * (channel // SCALE_CHANNELS * MICRO_BLOCK + token), scales)
    quantized, scales = quantize(value[0].float())
    for channel in range(head_dim):
        state.value_cache[:, block, token * head_dim + channel] = quantized[:, :, channel]
    _write_halves(state.value_cache, block, integers + 2 * token, scales)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., n] → int8 [..., n] and float16 scales [...]; a row that is not finite has the scale NaN."""
    largest = x.abs().amax(dim=-1)
    scales = (largest / 127.0).clamp(max=torch.finfo(torch.float16).max).half()
    scales = torch.where(torch.isfinite(largest), scales, torch.full_like(scales, math.nan))
    divisor = scales.float().unsqueeze(-1)
    ratio = torch.where(divisor > 0, x / divisor, torch.zeros_like(x))
    return ratio.round().clamp(-127, 127).to(torch.int8), scales


def _write_halves(cache: torch.Tensor, block: torch.Tensor, offset: torch.Tensor, halves: torch.Tensor) -> None:
    """halves [Hkv, S] as two bytes each at offset[s] of micro-block block[s]."""
    low, high = halves.unsqueeze(-1).view(torch.int8).unbind(-1)
    cache[:, block, offset] = low
    cache[:, block, offset + 1] = high


def stored_keys(state: AttentionState) -> torch.Tensor:
    """The key cache token by token, [Hkv, 16 M, D], in the dtype of the arithmetic."""
    keys = state.keys().transpose(2, 3).flatten(1, 2)
    return keys.to(_arithmetic(keys.dtype))


def find_boundaries(state: AttentionState, input_pos: int, stored: int, options: AttentionOptions) -> None:
    """Clears the cuts that were decided from dropped tokens, then decides every edge that has become decidable."""
    flags = state.boundaries
    first_edge = max(1, (input_pos - BOUNDARY_REACH) // MICRO_BLOCK + 1)  # the first with 16 e + reach > input_pos
    flags[first_edge:] = 0
    flags[0] = 1
    past_the_edges = (stored - BOUNDARY_REACH) // MICRO_BLOCK + 1
    if past_the_edges <= first_edge:
        return
    edges = torch.arange(first_edge, past_the_edges) * MICRO_BLOCK
    cut = edges % MAX_CHUNK == 0
    if options.chunking == Chunking.COSINE:
        gaps = edges[:, None] + torch.arange(-BOUNDARY_SPAN, BOUNDARY_SPAN + 1)  # [edges, 17]
        scores = gap_scores(stored_keys(state), gaps.flatten()).view(gaps.shape)
        cut = cut | (scores.amax(dim=1) > options.boundary_threshold)
    flags[edges // MICRO_BLOCK] = cut.to(torch.uint8)


def gap_scores(keys: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the mean keys on either side of each gap, in double. keys [Hkv, tokens, D], gaps [n] -> [n]."""
    x = keys.transpose(0, 1).flatten(1).double()  # [tokens, Hkv D]: all KV heads concatenated
    before, after = x[gaps - BOUNDARY_WINDOW], x[gaps]  # [n, Hkv D]
    for offset in range(1, BOUNDARY_WINDOW):
        before = before + x[gaps - BOUNDARY_WINDOW + offset]
        after = after + x[gaps + offset]
    dot, before_square, after_square = (torch.zeros(len(gaps), dtype=torch.float64) for _ in range(3))
    for a, b in zip((before / BOUNDARY_WINDOW).unbind(1), (after / BOUNDARY_WINDOW).unbind(1), strict=True):
        dot += a * b
        before_square += a * a
        after_square += b * b
    size = (before_square * after_square).sqrt()
    return 1.0 - torch.where(size > 0, dot / size, torch.zeros_like(dot))


def summarize(state: AttentionState, input_pos: int, stored: int, options: AttentionOptions) -> None:
    """Writes the summaries of the micro-blocks that are complete now and were not before the call."""
    first, last = input_pos // MICRO_BLOCK, stored // MICRO_BLOCK
    keys = state.keys()[:, first:last]  # [Hkv, blocks, D, 16]
    keys = keys.to(_arithmetic(keys.dtype))
    if options.pooling == Pooling.MINMAX:
        summaries = torch.stack([keys.amin(dim=-1), keys.amax(dim=-1)], dim=2)
    else:
        total = keys[..., 0]
        for token in range(1, MICRO_BLOCK):
            total = total + keys[..., token]
        mean = total / MICRO_BLOCK
        summaries = mean.unsqueeze(2)
        if options.pooling == Pooling.MOMENTS:
            squares = (keys[..., 0] - mean) ** 2
            for token in range(1, MICRO_BLOCK):
                squares = squares + (keys[..., token] - mean) ** 2
            summaries = torch.stack([mean, squares / MICRO_BLOCK], dim=2)
    largest = torch.finfo(state.summaries.dtype).max
    state.summaries[:, first:last] = summaries.clamp(-largest, largest).to(state.summaries.dtype)


# Selection


def groups(tokens: int, input_pos: int, tile: int) -> list[tuple[int, int]]:
    """The query groups of a call as rows [first, last): rows that lie in one tile of the absolute grid."""
    edges = range((input_pos // tile + 1) * tile, input_pos + tokens, tile)
    cuts = [0, *(edge - input_pos for edge in edges), tokens]
    return list(itertools.pairwise(cuts))


def reference_lists(query: torch.Tensor, state: AttentionState, input_pos: int, options: AttentionOptions) -> Selection:
    """The lists of query [1, Hq, S, D] on a state that already holds the call's tokens, input_pos + S of them: those
    that were kept for this call, or selected anew."""
    kept = _kept_lists(state, input_pos, query.shape[2], options, input_pos)
    return select_lists(query, state, input_pos, options) if kept is None else kept


def _kept_lists(
    state: AttentionState, input_pos: int, tokens: int, options: AttentionOptions, last: int
) -> Selection | None:
    """What an earlier call of one row kept for this one: the lists that served the call at `last`, if they still do."""
    if not options.keeps_selection or tokens != 1 or input_pos + 1 <= options.budget:
        return None
    kept = state.selection.tolist()
    if any(row[0] != last or (last < input_pos and row[1] <= 0) for row in kept):
        return None
    sink, past_the_end = range(options.sink // MICRO_BLOCK), input_pos // MICRO_BLOCK + 1
    chosen = [row[KEPT_HEADER : KEPT_HEADER + row[3]] for row in kept]
    return [[BlockList([*sink, *ids, *range(row[2], past_the_end)])] for row, ids in zip(kept, chosen, strict=True)]


def _keep_lists(
    state: AttentionState, selection: Selection, input_pos: int, tokens: int, options: AttentionOptions
) -> None:
    """Keeps what a call of one row chose; any other call forgets what was kept."""
    if not options.keeps_selection:
        return
    state.selection[:, 0] = -2  # no position, nor one before the first
    if tokens != 1 or selection[0][0].scores is None:
        return
    local, sink = _local_block(state.boundaries, input_pos), options.sink // MICRO_BLOCK
    for row, (group,) in zip(state.selection, selection, strict=True):
        chosen = group.blocks[sink : sink + group.chosen]
        row[: KEPT_HEADER + len(chosen)] = torch.tensor([input_pos, options.reselect - 1, local, len(chosen), *chosen])


def select_lists(query: torch.Tensor, state: AttentionState, input_pos: int, options: AttentionOptions) -> Selection:
    """Selects for query [1, Hq, S, D] on a state that already holds the call's tokens."""
    tokens = query.shape[2]
    kv_heads = state.key_cache.shape[0]
    queries = query[0].reshape(kv_heads, -1, *query.shape[2:]).to(_arithmetic(query.dtype))  # [Hkv, G, S, D]
    return [
        [
            _block_list(_rows(queries[head], first, last), state, head, input_pos + first, tokens, options)
            for first, last in groups(tokens, input_pos, options.tile)
        ]
        for head in range(kv_heads)
    ]


def _block_list(
    queries: torch.Tensor, state: AttentionState, head: int, start: int, call_tokens: int, options: AttentionOptions
) -> BlockList:
    """The list of one group and KV head: `queries` [G, rows, D], the first row at position `start`."""
    end = start + queries.shape[1]
    past_the_end = -(-end // MICRO_BLOCK)
    if options.window > 0:
        return BlockList(list(range(max(0, start - options.window + 1) // MICRO_BLOCK, past_the_end)))
    if options.budget == 0 or end <= options.budget or 2 <= call_tokens <= options.dense_tail:
        return BlockList(list(range(past_the_end)))

    local = _local_block(state.boundaries, start)
    sink = options.sink // MICRO_BLOCK  # < local, and the budget holds what is forced: that is the budget's minimum
    forced_tokens = sink * MICRO_BLOCK + end - local * MICRO_BLOCK
    to_come = options.reselect - 1 if call_tokens == 1 else 0  # tokens that a kept list will have to hold besides
    count = (options.budget - forced_tokens - to_come) // MICRO_BLOCK  # < local - sink, since end > budget
    if options.selector == Selector.RECENT:
        scores = torch.arange(sink, local, dtype=queries.dtype)
    else:
        scores = _block_scores(queries, state, head, start, sink, local, options)
    if options.selector == Selector.CHUNK and options.refines(queries.shape[1]):
        again = torch.sort(scores, descending=True, stable=True).indices[: max(REFINE_FACTOR * count, REFINE_LEAST)]
        scores = torch.full_like(scores, -math.inf).index_copy(
            0, again, _refined_scores(queries, state, head, start, local, again + sink, options)
        )
    best_first = torch.sort(scores, descending=True, stable=True).indices  # equal scores: lower id first
    chosen = (best_first[:count] + sink).tolist()
    blocks = sorted([*range(sink), *chosen, *range(local, past_the_end)])
    return BlockList(blocks, chosen=count, first_candidate=sink, scores=scores)


def _local_block(boundaries: torch.Tensor, start: int) -> int:
    """L / 16: the last cut that was decidable before the token `start`; everything from it on is attended."""
    decidable = boundaries[: max(0, start - BOUNDARY_REACH) // MICRO_BLOCK + 1]
    return int(decidable.nonzero().max())


def _block_scores(
    queries: torch.Tensor,
    state: AttentionState,
    head: int,
    start: int,
    sink: int,
    local: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Each candidate micro-block's score, [local - sink]: that of its chunk, the best over the pooled queries."""
    pooled = pool_queries(queries, start, options.query_pooling)  # [Q, D]
    summaries = state.summaries[head, :local].to(pooled.dtype)  # [local, P, D]
    starts = state.boundaries[sink:local].long()
    chunk = starts.cumsum(0) - starts[0]  # of each candidate, counted from the first, which may begin before `sink`
    chunks = int(chunk[-1]) + 1
    if options.pooling == Pooling.MINMAX:
        low, high = summaries.unbind(1)
        bounds = torch.maximum(pooled[:, None] * low, pooled[:, None] * high).sum(dim=2)[:, sink:]  # [Q, candidates]
        scores = bounds.new_full((len(pooled), chunks), -math.inf)
        scores = scores.scatter_reduce(1, chunk.expand_as(bounds), bounds, "amax")
    elif options.pooling == Pooling.MOMENTS:
        mean, variance = summaries.unbind(1)
        scaled = options.scale * pooled
        mass = scaled @ mean.T + 0.5 * (scaled * scaled) @ variance.T  # [Q, local], about log mean exp(scale q . k)
        share = (mass - mass.logsumexp(dim=1, keepdim=True))[:, sink:]  # [Q, candidates]
        in_chunk = chunk == torch.arange(chunks)[:, None]  # [chunks, candidates]
        members = share[:, None].masked_fill(~in_chunk, -math.inf)
        scores = members.logsumexp(dim=2) - in_chunk.sum(dim=1).log()
    else:
        products = pooled @ summaries[:, 0].T  # [Q, local]
        sums = products.new_zeros(len(pooled), chunks).index_add(1, chunk, products[:, sink:])
        size = torch.bincount(chunk, minlength=chunks).to(products.dtype)  # |c|, micro-blocks
        scores = sums / size
        if options.pooling == Pooling.CENTRED:
            scores = scores - products.mean(dim=1, keepdim=True)
        if options.pooling in (Pooling.SQRT, Pooling.CENTRED):
            scores = (MICRO_BLOCK * size).sqrt() * scores
    return scores.amax(dim=0)[chunk]


def _refined_scores(
    queries: torch.Tensor,
    state: AttentionState,
    head: int,
    start: int,
    local: int,
    blocks: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Scores [len(blocks)] of given micro-blocks: the largest channels meet the keys, the others the moments."""
    pooled = options.scale * pool_queries(queries, start, options.query_pooling)  # [Q, D]
    mean, variance = state.summaries[head, :local].to(pooled.dtype).unbind(1)  # [local, D]
    everything = (pooled @ mean.T + 0.5 * (pooled * pooled) @ variance.T).logsumexp(dim=1, keepdim=True)
    strongest = pooled.abs().amax(dim=0)  # [D]
    least = strongest.sort(descending=True).values[: options.refine][-1]
    large = torch.where(strongest >= least, pooled, torch.zeros_like(pooled))
    small = pooled - large
    rest = small @ mean[blocks].T + 0.5 * (small * small) @ variance[blocks].T  # [Q, blocks]
    keys = state.keys()[head, blocks].to(pooled.dtype)  # [blocks, D, 16]
    logits = torch.einsum("qd,bdi->qbi", large, keys)
    mass = logits.logsumexp(dim=2) - math.log(MICRO_BLOCK) + rest
    return (mass - everything).amax(dim=0)


def pool_queries(queries: torch.Tensor, start: int, pooling: QueryPooling) -> torch.Tensor:
    """The vectors that are scored for one group: queries [G, rows, D], the first row at position `start` -> [Q, D]."""
    if pooling == QueryPooling.MEAN:
        return queries.mean(dim=(0, 1))[None]
    segments = groups(queries.shape[1], start, MICRO_BLOCK)
    return torch.cat([queries[:, first:last].mean(dim=1) for first, last in segments])


# Attention


def reference_attend(
    query: torch.Tensor,
    state: AttentionState,
    input_pos: int,
    options: AttentionOptions,
    lists: Sequence[Sequence[Sequence[int]]],
) -> torch.Tensor:
    """Exact attention of query [1, Hq, S, D] over lists[KV head][group]: [1, S, Hq, D]."""
    kv_heads, head_dim, tokens = state.key_cache.shape[0], state.head_dim, query.shape[2]
    all_keys, all_values = state.keys(), state.values()
    arithmetic = _arithmetic(query.dtype)
    queries = query[0].reshape(kv_heads, -1, *query.shape[2:]).to(arithmetic)  # [Hkv, G, S, D]
    out = torch.empty_like(queries)
    for head in range(kv_heads):
        for (first, last), blocks in zip(groups(tokens, input_pos, options.tile), lists[head], strict=True):
            rows = torch.arange(input_pos + first, input_pos + last)[:, None]
            columns = _positions(blocks, input_pos + last)
            keys = all_keys[head, list(blocks)].transpose(1, 2).reshape(-1, head_dim)[: len(columns)]
            values = all_values[head, list(blocks)].reshape(-1, head_dim)[: len(columns)]
            logits = options.scale * (_rows(queries[head], first, last) @ keys.to(arithmetic).T)
            if options.softcap > 0:
                logits = options.softcap * torch.tanh(logits / options.softcap)
            logits = logits.masked_fill(~_attended(rows, columns, options.window), -math.inf)
            out[head, :, first:last] = logits.softmax(dim=-1) @ values.to(arithmetic)
    return out.flatten(0, 1).transpose(0, 1)[None].to(query.dtype).contiguous()


def count_pairs(
    lists: Sequence[Sequence[Sequence[int]]], tokens: int, input_pos: int, options: AttentionOptions
) -> tuple[int, int]:
    """(attended, causal) pairs of query and key token, summed over KV heads: their ratio is the realised density."""
    attended = causal = 0
    for head in lists:
        for (first, last), blocks in zip(groups(tokens, input_pos, options.tile), head, strict=True):
            rows = torch.arange(input_pos + first, input_pos + last)[:, None]
            attended += int(_attended(rows, _positions(blocks, input_pos + last), options.window).sum())
            causal += int(_attended(rows, torch.arange(input_pos + last), options.window).sum())
    return attended, causal


def _positions(blocks: Sequence[int], end: int) -> torch.Tensor:
    """The token positions in ascending micro-blocks, those from `end` on left out."""
    positions = (torch.tensor(blocks)[:, None] * MICRO_BLOCK + torch.arange(MICRO_BLOCK)).flatten()
    return positions[positions < end]


def _attended(rows: torch.Tensor, columns: torch.Tensor, window: int) -> torch.Tensor:
    """Which query position sees which key position: causal, and inside the window where there is one."""
    visible = columns <= rows
    return visible & (columns > rows - window) if window > 0 else visible


def _rows(queries: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Rows of [G, S, D] in memory of their own: a matrix product may round differently at another alignment."""
    return queries[:, first:last].clone(memory_format=torch.contiguous_format)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


# Judging


def tie_gap(judge: BlockList, blocks: Sequence[int]) -> float:
    """How far another list is from a near tie: 0 when equal, infinite when no near tie explains it.

    `judge` comes from a float64 run. The gap is the largest distance of a block on one list only from the score at the
    cut, relative to the largest |score|: a list is as good as the judge's when it is below the selection tolerance.
    """
    different = set(judge.blocks) ^ set(blocks)
    if not different:
        return 0.0
    if judge.scores is None or len(blocks) != len(judge.blocks) or list(blocks) != sorted(set(blocks)):
        return math.inf
    candidates = range(judge.first_candidate, judge.first_candidate + len(judge.scores))
    if judge.chosen == 0 or not all(block in candidates for block in different):
        return math.inf
    at_the_cut = float(judge.scores.sort(descending=True).values[judge.chosen - 1])
    distances = [abs(float(judge.scores[block - judge.first_candidate]) - at_the_cut) for block in different]
    ranked = judge.scores[judge.scores > -math.inf]  # -inf: what was not ranked again
    return max(distances) / max(float(ranked.abs().max()), 1e-30)
