"""dhsa_attention for targets without custom ops: the same result in plain tensor ops, its state passed in and returned.

Row-gather form: micro-blocks are rows of a flattened cache, picked by index_select; rank at most 5; no control flow on
data and no writes into slices, so torch.export carries it to Core ML and ONNX. The state has the op's own layout, save
that the boundaries may be of a float dtype where a target has no 8-bit state (`boundaries_as`). Nothing here depends on
the order in which a target breaks ties: a top-k gives only its values, and equal scores are taken in the order of ids.
Departures from the header: the boundary scores are computed in float, and every call rewrites its caches whole.
Core ML's gather has 16-bit row indices: Hkv M must stay below 32,768 there.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention_types import (
    BOUNDARY_SPAN,
    BOUNDARY_WINDOW,
    REFINE_FACTOR,
    REFINE_LEAST,
    AttentionOptions,
    Chunking,
    Pooling,
    QueryPooling,
    Selector,
)
from edgerun.recipe import BOUNDARY_REACH, MAX_CHUNK, MICRO_BLOCK

_BLOCKS_PER_SPAN = (
    MAX_CHUNK // MICRO_BLOCK
)  # every 64th token is a cut, so no chunk leaves its aligned span of 4 blocks
_NEVER = -3.0e4  # a logit or score that loses against any other; a float16 holds it

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def boundaries_as(boundaries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The boundary flags, 0 or 1, in another dtype: uint8 as the op keeps them, or a float for Core ML's states."""
    return (boundaries > 0).to(dtype)


def decomposition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    summaries: torch.Tensor,
    boundaries: torch.Tensor,
    input_pos: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op as a function: (result [1, S, Hq, D], key_cache, value_cache, summaries, boundaries), shapes as the op's.

    query [1, Hq, S, D], key and value [1, Hkv, S, D], input_pos an integer [1]. S is static: export one
    program (or one function of a program) per call size. The caller keeps input_pos + S within the cache.
    """
    if not key_cache.is_floating_point():
        raise EdgerunError(
            f"the cache is {key_cache.dtype}: targets without custom ops take float32 and float16 caches"
        )
    if options.keeps_selection:
        raise EdgerunError(
            f"reselect is {options.reselect}: targets without custom ops select for every token, so take reselect 1"
        )
    key_cache, value_cache = _append(key, value, key_cache, value_cache, input_pos)
    tokens = key.shape[2]
    if options.budget > 0 and options.finds_boundaries:
        boundaries = _find_boundaries(key_cache, boundaries, input_pos, tokens, options)
    if options.keeps_summaries:
        summaries = _summarize(key_cache, summaries, input_pos, tokens, options)
    out = _attend(query, key_cache, value_cache, summaries, boundaries, input_pos, options)
    return out, key_cache, value_cache, summaries, boundaries


def _between(x: torch.Tensor, low: torch.Tensor | int, high: torch.Tensor | int) -> torch.Tensor:
    """low <= x < high."""
    return torch.logical_and(x >= low, x < high)


def _floor_divide(x: torch.Tensor, divisor: int) -> torch.Tensor:
    """x // divisor of integers that are not negative. The casts are for Core ML, whose quotient is a float."""
    return torch.div(x.to(torch.int64), divisor, rounding_mode="floor").to(torch.int32)


def _clamp(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """low <= x <= high of integers: both sides are needed, since Core ML makes a float of a one-sided clamp."""
    return torch.clamp(x, low, high)


def _append(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    input_pos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each cache position takes its new row where the call has one, else what it held."""
    kv_heads, blocks, head_dim, _ = key_cache.shape
    tokens = key.shape[2]
    position = torch.arange(blocks * MICRO_BLOCK)
    fresh = _between(position, input_pos, input_pos + tokens)
    row = _clamp(position - input_pos, 0, tokens - 1)
    new_key, new_value = (
        torch.index_select(x[0], 1, row).reshape(kv_heads, blocks, MICRO_BLOCK, head_dim).to(key_cache.dtype)
        for x in (key, value)
    )
    return (
        torch.where(fresh.reshape(1, blocks, 1, MICRO_BLOCK), new_key.transpose(2, 3), key_cache),
        torch.where(fresh.reshape(1, blocks, MICRO_BLOCK, 1), new_value, value_cache),
    )


def _find_boundaries(
    key_cache: torch.Tensor, boundaries: torch.Tensor, input_pos: torch.Tensor, tokens: int, options: AttentionOptions
) -> torch.Tensor:
    """Keeps the flags that were decided from tokens still stored, decides the edges that have become decidable."""
    blocks = key_cache.shape[1]
    index = torch.arange(blocks + 1)
    decided = index * MICRO_BLOCK + BOUNDARY_REACH <= input_pos
    decidable = index * MICRO_BLOCK + BOUNDARY_REACH <= input_pos + tokens
    cut = index % _BLOCKS_PER_SPAN == 0
    if options.chunking == Chunking.COSINE:
        # The first edge not decided before the call, 1 at least, and how many a call of S tokens can decide.
        first = _clamp(_floor_divide(input_pos + MICRO_BLOCK - BOUNDARY_REACH, MICRO_BLOCK), 1, blocks)
        count = (tokens + MICRO_BLOCK - 1) // MICRO_BLOCK
        edges = _clamp(first + torch.arange(count), 0, blocks - 1)
        change = _gap_maxima(key_cache, edges) > options.boundary_threshold  # [count]
        place = _clamp(index - first, 0, count - 1)
        cut = torch.logical_or(cut, torch.index_select(change.to(torch.int32), 0, place) > 0)
    fresh = torch.logical_and(torch.logical_and(decidable, torch.logical_not(decided)), cut)
    flags = torch.logical_or(torch.logical_and(decided, boundaries > 0), fresh)
    return torch.logical_or(flags, index == 0).to(boundaries.dtype)


def _gap_maxima(key_cache: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """The largest 1 - cosine over the 17 gaps around each edge (given as a micro-block id, 1 at least): [edges]."""
    before = torch.index_select(key_cache, 1, edges - 1)  # [Hkv, edges, D, 16]
    x = torch.cat([before, torch.index_select(key_cache, 1, edges)], dim=3)  # tokens edge - 16 ... edge + 15
    x = x.to(_arithmetic(x.dtype))
    first, last = MICRO_BLOCK - BOUNDARY_REACH, MICRO_BLOCK + BOUNDARY_SPAN  # windows start at these and between
    sums = x[..., first : last + 1]
    for offset in range(1, BOUNDARY_WINDOW):
        sums = sums + x[..., first + offset : last + offset + 1]
    means = sums / BOUNDARY_WINDOW  # [Hkv, edges, D, 21]
    left, right = means[..., :-BOUNDARY_WINDOW], means[..., BOUNDARY_WINDOW:]  # [Hkv, edges, D, 17]
    dot, left_square, right_square = ((a * b).sum(dim=(0, 2)) for a, b in ((left, right), (left, left), (right, right)))
    size = torch.sqrt(left_square) * torch.sqrt(right_square)
    none = size <= 0
    cosine = torch.where(none, torch.zeros_like(dot), dot / torch.where(none, torch.ones_like(size), size))
    return (1.0 - cosine).amax(dim=1)


def _summarize(
    key_cache: torch.Tensor, summaries: torch.Tensor, input_pos: torch.Tensor, tokens: int, options: AttentionOptions
) -> torch.Tensor:
    """Summaries of the micro-blocks that the call touched; those not complete yet hold what nobody reads."""
    blocks = key_cache.shape[1]
    first = _floor_divide(input_pos, MICRO_BLOCK)
    count = (tokens + MICRO_BLOCK - 2) // MICRO_BLOCK + 1
    touched = torch.index_select(key_cache, 1, _clamp(first + torch.arange(count), 0, blocks - 1))
    touched = touched.to(_arithmetic(touched.dtype))  # [Hkv, count, D, 16]
    if options.pooling == Pooling.MINMAX:
        pooled = torch.stack([touched.amin(dim=3), touched.amax(dim=3)], dim=2)
    elif options.pooling == Pooling.MOMENTS:
        mean = touched.mean(dim=3, keepdim=True)
        variance = ((touched - mean) * (touched - mean)).mean(dim=3)
        pooled = torch.stack([mean.squeeze(3), variance], dim=2)
    else:
        pooled = touched.mean(dim=3).unsqueeze(2)
    if summaries.dtype == torch.float16:
        pooled = torch.clamp(pooled, -torch.finfo(torch.float16).max, torch.finfo(torch.float16).max)
    index = torch.arange(blocks)
    new = torch.index_select(pooled.to(summaries.dtype), 1, _clamp(index - first, 0, count - 1))
    return torch.where(_between(index, first, first + count).reshape(1, blocks, 1, 1), new, summaries)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The query groups of a call: as many as its rows can touch tiles, the last of them possibly empty."""

    start: torch.Tensor  # [G], first row's position
    end: torch.Tensor  # [G], last row's position + 1
    position: torch.Tensor  # [G, W], each row's position
    real: torch.Tensor  # [G, W], whether the row is one of the group's

    @staticmethod
    def of_call(input_pos: torch.Tensor, tokens: int, tile: int) -> _Groups:
        width = min(tile, tokens)
        count = (tokens + tile - 2) // tile + 1
        tile_start = (_floor_divide(input_pos, tile) + torch.arange(count)) * tile
        start = torch.maximum(tile_start, input_pos.expand(count))
        end = torch.minimum(tile_start + tile, (input_pos + tokens).expand(count))
        position = start.unsqueeze(1) + torch.arange(width)
        return _Groups(start, end, position, position < end.unsqueeze(1))


def _attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    summaries: torch.Tensor,
    boundaries: torch.Tensor,
    input_pos: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    kv_heads, blocks, head_dim, _ = key_cache.shape
    query_heads, tokens = query.shape[1], query.shape[2]
    group = query_heads // kv_heads
    groups = _Groups.of_call(input_pos, tokens, options.tile)
    count, width = groups.position.shape
    row = _clamp(groups.position - input_pos, 0, tokens - 1)
    rows = torch.index_select(query[0], 1, row.reshape(-1)).to(_arithmetic(query.dtype))
    rows = rows.reshape(kv_heads, group, count, width, head_dim)

    listed, length = _listed_blocks(rows, key_cache, summaries, boundaries, groups, tokens, options)  # [Hkv, G, M]
    # Listed blocks first, ascending: keys are distinct, so every top-k agrees on the order.
    index = torch.arange(blocks, dtype=torch.int32)
    order = torch.where(listed, blocks - index, -index)
    ids = torch.topk(order, length, dim=2).indices  # [Hkv, G, K]
    flat = (ids + torch.arange(kv_heads).reshape(kv_heads, 1, 1) * blocks).reshape(-1)
    keys = torch.index_select(key_cache.reshape(kv_heads * blocks, head_dim * MICRO_BLOCK), 0, flat)
    keys = keys.reshape(kv_heads, count, length, head_dim, MICRO_BLOCK).transpose(2, 3)  # [Hkv, G, D, K, 16]
    keys = keys.reshape(kv_heads, count, head_dim, length * MICRO_BLOCK).to(rows.dtype)
    values = torch.index_select(value_cache.reshape(kv_heads * blocks, MICRO_BLOCK * head_dim), 0, flat)
    values = values.reshape(kv_heads, count, length * MICRO_BLOCK, head_dim).to(rows.dtype)

    queries = rows.permute(0, 2, 1, 3, 4).reshape(kv_heads, count, group * width, head_dim)
    logits = torch.matmul(queries, keys) * options.scale
    if options.softcap > 0:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    # Position of each gathered key; one on no list is moved behind every row. [Hkv, G, 1, 1, K 16]
    within = ids.unsqueeze(3) * MICRO_BLOCK + torch.arange(MICRO_BLOCK)
    place = torch.arange(length).reshape(1, 1, length, 1)
    listed_count = listed.to(torch.int32).sum(dim=2).reshape(kv_heads, count, 1, 1)
    within = torch.where(place < listed_count, within, torch.full_like(within, blocks * MICRO_BLOCK))
    within = within.reshape(kv_heads, count, 1, 1, length * MICRO_BLOCK)
    position = groups.position.reshape(1, count, 1, width, 1)
    visible = within <= position
    if options.window > 0:
        visible = torch.logical_and(visible, within > position - options.window)
    logits = logits.reshape(kv_heads, count, group, width, length * MICRO_BLOCK)
    weights = torch.softmax(torch.where(visible, logits, torch.full_like(logits, _NEVER)), dim=4)
    weights = weights.reshape(kv_heads, count, group * width, length * MICRO_BLOCK)
    out = torch.matmul(weights, values).reshape(kv_heads, count, group, width, head_dim)

    # Back from groups to rows: token t of the call is row (position - start) of its group.
    out = out.permute(0, 2, 1, 3, 4).reshape(query_heads, count * width, head_dim)
    position = input_pos + torch.arange(tokens)
    group_of = _floor_divide(position, options.tile) - _floor_divide(input_pos, options.tile)
    place = group_of * width + position - torch.index_select(groups.start, 0, group_of)
    out = torch.index_select(out, 1, place)
    return out.transpose(0, 1).unsqueeze(0).to(query.dtype)


def _listed_blocks(
    rows: torch.Tensor,
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    boundaries: torch.Tensor,
    groups: _Groups,
    tokens: int,
    options: AttentionOptions,
) -> tuple[torch.Tensor, int]:
    """Which micro-blocks each group's list holds, [Hkv, G, M], and the most that any list can hold."""
    kv_heads, blocks = key_cache.shape[:2]
    index = torch.arange(blocks).unsqueeze(0)  # [1, M]
    before_end = index * MICRO_BLOCK < groups.end.unsqueeze(1)  # [G, M]
    if options.window > 0:
        first_token = _clamp(groups.start - options.window + 1, 0, blocks * MICRO_BLOCK)
        inside = (index + 1) * MICRO_BLOCK > first_token.unsqueeze(1)
        listed = torch.logical_and(before_end, inside).unsqueeze(0).expand(kv_heads, -1, -1)
        return listed, min(blocks, (options.window + options.tile - 3) // MICRO_BLOCK + 2)
    if options.budget == 0 or (options.dense_tail > 0 and 2 <= tokens <= options.dense_tail):
        return before_end.unsqueeze(0).expand(kv_heads, -1, -1), blocks

    flags = boundaries[:blocks] > 0  # [M]
    usable = index * MICRO_BLOCK + BOUNDARY_REACH <= groups.start.unsqueeze(1)
    cuts = torch.where(torch.logical_and(flags.unsqueeze(0), usable), index, torch.zeros_like(index))
    local = cuts.amax(dim=1)  # [G], L / 16
    sink = options.sink // MICRO_BLOCK
    forced_tokens = options.sink + groups.end - local * MICRO_BLOCK
    room = _floor_divide(_clamp(options.budget - forced_tokens, 0, options.budget), MICRO_BLOCK)  # [G]
    candidate = torch.logical_and(index >= sink, index < local.unsqueeze(1))  # [G, M]
    if options.selector == Selector.RECENT:
        scores = index.to(rows.dtype).unsqueeze(0).expand(kv_heads, local.shape[0], -1)
    else:
        scores = _block_scores(rows, summaries, flags, groups, local, sink, options)
        if options.refines(1):
            scores = _rank_again(scores, candidate, room, rows, key_cache, summaries, groups, local, options)
    longest = min(blocks, options.budget // MICRO_BLOCK + 1)
    chosen = _best(scores, candidate, room, longest)
    forced = torch.logical_and(before_end, torch.logical_or(index < sink, index >= local.unsqueeze(1)))
    sparse = torch.logical_or(forced.unsqueeze(0), chosen)
    dense = (groups.end <= options.budget).reshape(1, -1, 1)
    return torch.logical_or(sparse, torch.logical_and(dense, before_end.unsqueeze(0))), longest


def _best(scores: torch.Tensor, candidate: torch.Tensor, room: torch.Tensor, longest: int) -> torch.Tensor:
    """The `room` [G] best candidates [G, M] by score [Hkv, G, M], of equal scores the lower ids, as a mask."""
    scores = torch.where(candidate.unsqueeze(0), scores, torch.full_like(scores, _NEVER))
    best = torch.topk(scores, longest, dim=2).values  # [Hkv, G, K], descending
    last = torch.arange(longest) == (room - 1).unsqueeze(1)  # [G, K]
    at_the_cut = torch.where(last.unsqueeze(0), best, torch.zeros_like(best)).sum(dim=2, keepdim=True)
    above = torch.logical_and(scores > at_the_cut, candidate.unsqueeze(0))
    equal = torch.logical_and(scores == at_the_cut, candidate.unsqueeze(0))
    left = room.reshape(1, -1, 1) - above.to(torch.int32).sum(dim=2, keepdim=True)
    nth = torch.cumsum(equal.to(torch.int32), dim=2)
    chosen = torch.logical_or(above, torch.logical_and(equal, nth <= left))
    return torch.logical_and(chosen, (room > 0).reshape(1, -1, 1))


def _rank_again(
    scores: torch.Tensor,
    candidate: torch.Tensor,
    room: torch.Tensor,
    rows: torch.Tensor,
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    groups: _Groups,
    local: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Scores [Hkv, G, M], where in a group of one row the best candidates' are refined and the others' lose.

    Only the first group and the last (or, where that is empty, the one before) can have a single row beside others.
    """
    kv_heads, blocks, head_dim, _ = key_cache.shape
    count = scores.shape[1]
    longest = min(blocks, max(REFINE_FACTOR * (options.budget // MICRO_BLOCK), REFINE_LEAST))
    again = _best(scores, candidate, _clamp(room * REFINE_FACTOR, min(blocks, REFINE_LEAST), longest), longest)
    single = [*range(count)] if options.tile == 1 else sorted({0, max(0, count - 2), count - 1})
    chosen = torch.tensor(single)
    queries = torch.index_select(rows[:, :, :, 0], 2, chosen) * options.scale  # [Hkv, heads, G', D]
    if options.query_pooling == QueryPooling.MEAN:
        queries = queries.mean(dim=1, keepdim=True)
    heads = queries.shape[1]
    queries = queries.reshape(kv_heads, heads * len(single), head_dim)
    mean, variance = (summaries[:, :, i].to(queries.dtype).transpose(1, 2) for i in range(2))  # [Hkv, D, M]

    def moments(q: torch.Tensor) -> torch.Tensor:
        products = torch.matmul(q, mean) + torch.matmul(q * q * 0.5, variance)
        return products.reshape(kv_heads, heads, len(single), blocks)

    in_past = torch.arange(blocks).unsqueeze(0) < torch.index_select(local, 0, chosen).unsqueeze(1)  # [G', M]
    everything = moments(queries)
    everything = torch.where(in_past, everything, torch.full_like(everything, _NEVER))
    highest = everything.amax(dim=3, keepdim=True)
    everything = highest + torch.log(torch.exp(everything - highest).sum(dim=3, keepdim=True))
    by_head = queries.reshape(kv_heads, heads, len(single), head_dim)
    strongest = torch.maximum(by_head, -by_head).amax(dim=1, keepdim=True)  # [Hkv, 1, G', D]
    least = torch.topk(strongest, min(options.refine, head_dim), dim=3).values.amin(dim=3, keepdim=True)
    large = torch.where(strongest >= least, by_head, torch.zeros_like(by_head)).reshape(queries.shape)
    keys = key_cache.to(queries.dtype).transpose(1, 2).reshape(kv_heads, head_dim, blocks * MICRO_BLOCK)
    logits = torch.matmul(large, keys).reshape(kv_heads, heads, len(single), blocks, MICRO_BLOCK)
    top = logits.amax(dim=4, keepdim=True)
    mass = torch.log(torch.exp(logits - top).mean(dim=4)) + top.squeeze(4) + moments(queries - large)
    refined = torch.where(in_past, mass - everything, torch.full_like(mass, _NEVER)).amax(dim=1)  # [Hkv, G', M]
    slot = torch.tensor([single.index(group) if group in single else 0 for group in range(count)])
    refined = torch.index_select(refined, 1, slot)
    refined = torch.where(again, refined, torch.full_like(refined, _NEVER))
    return torch.where((groups.end - groups.start == 1).reshape(1, count, 1), refined, scores)


def _block_scores(
    rows: torch.Tensor,
    summaries: torch.Tensor,
    flags: torch.Tensor,
    groups: _Groups,
    local: torch.Tensor,
    sink: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Each micro-block's score, that of its chunk, the best over the pooled queries: [Hkv, G, M]."""
    kv_heads, blocks = summaries.shape[:2]
    pooled, real = _pooled_queries(rows, groups, options)  # [Hkv, G, Q, D], [G, Q]
    count, vectors, head_dim = pooled.shape[1:]
    vector_rows = pooled.reshape(kv_heads, count * vectors, head_dim)
    summaries = summaries.to(pooled.dtype)
    if options.pooling == Pooling.MINMAX:  # sum_d max(q low, q high) = q+ . high - q- . low
        low, high = summaries[:, :, 0].transpose(1, 2), summaries[:, :, 1].transpose(1, 2)
        products = torch.matmul(torch.relu(vector_rows), high) - torch.matmul(torch.relu(-vector_rows), low)
    elif options.pooling == Pooling.MOMENTS:
        mean, variance = summaries[:, :, 0].transpose(1, 2), summaries[:, :, 1].transpose(1, 2)
        scaled = vector_rows * options.scale
        products = torch.matmul(scaled, mean) + torch.matmul(scaled * scaled * 0.5, variance)
    else:
        products = torch.matmul(vector_rows, summaries[:, :, 0].transpose(1, 2))
    products = products.reshape(kv_heads, count, vectors, blocks)
    in_past = (torch.arange(blocks).unsqueeze(0) < local.unsqueeze(1)).reshape(1, count, 1, blocks)
    if options.pooling == Pooling.MOMENTS:
        past = torch.where(in_past, products, torch.full_like(products, _NEVER))
        highest = past.amax(dim=3, keepdim=True)
        products = products - highest - torch.log(torch.exp(past - highest).sum(dim=3, keepdim=True))

    same, size = _same_chunk(flags, sink)  # [spans, 4, 4], [spans, 4]
    spans = same.shape[0]
    by_span = F.pad(products, (0, spans * _BLOCKS_PER_SPAN - blocks))
    by_span = by_span.reshape(kv_heads, count, vectors, spans, _BLOCKS_PER_SPAN)
    terms = [by_span[..., i : i + 1] for i in range(_BLOCKS_PER_SPAN)]
    members = [same[:, :, i] for i in range(_BLOCKS_PER_SPAN)]
    if options.pooling in (Pooling.MINMAX, Pooling.MOMENTS):
        scores = torch.full_like(by_span, _NEVER)
        for term, member in zip(terms, members, strict=True):
            scores = torch.maximum(scores, torch.where(member, term, torch.full_like(by_span, _NEVER)))
        if options.pooling == Pooling.MOMENTS:
            total = torch.zeros_like(by_span)
            for term, member in zip(terms, members, strict=True):
                total = total + torch.where(
                    member, torch.exp(torch.clamp(term - scores, max=0.0)), torch.zeros_like(total)
                )
            scores = scores + torch.log(torch.clamp(total, min=1e-30) / size.to(scores.dtype))
    else:
        scores = torch.zeros_like(by_span)
        for term, member in zip(terms, members, strict=True):
            scores = scores + torch.where(member, term, torch.zeros_like(by_span))
        scores = scores / size.to(scores.dtype)
        if options.pooling == Pooling.CENTRED:
            past = torch.where(in_past, products, torch.zeros_like(products))
            past_size = _clamp(local, 1, blocks).to(scores.dtype).reshape(1, count, 1)
            scores = scores - (past.sum(dim=3) / past_size).reshape(kv_heads, count, vectors, 1, 1)
        if options.pooling in (Pooling.SQRT, Pooling.CENTRED):
            scores = torch.sqrt(size.to(scores.dtype) * MICRO_BLOCK) * scores
    scores = torch.where(real.reshape(1, count, vectors, 1, 1), scores, torch.full_like(scores, _NEVER))
    return scores.amax(dim=2).reshape(kv_heads, count, spans * _BLOCKS_PER_SPAN)[:, :, :blocks]


def _same_chunk(flags: torch.Tensor, sink: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each aligned span of 4 micro-blocks: whether b counts for the chunk of a, [spans, 4 a, 4 b], and how many do.

    What lies before `sink` counts for none.
    """
    blocks = flags.shape[0]
    spans = (blocks + _BLOCKS_PER_SPAN - 1) // _BLOCKS_PER_SPAN
    starts = F.pad(flags.to(torch.int32), (0, spans * _BLOCKS_PER_SPAN - blocks)).reshape(spans, _BLOCKS_PER_SPAN)
    chunk = torch.cumsum(starts, dim=1)
    index = torch.arange(spans * _BLOCKS_PER_SPAN).reshape(spans, 1, _BLOCKS_PER_SPAN)
    same = torch.logical_and(chunk.unsqueeze(2) == chunk.unsqueeze(1), index >= sink)
    return same, _clamp(same.to(torch.int32).sum(dim=2), 1, _BLOCKS_PER_SPAN)


def _pooled_queries(
    rows: torch.Tensor, groups: _Groups, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors that are scored, [Hkv, G, Q, D], from rows [Hkv, heads, G, W, D]; and which are real, [G, Q]."""
    kv_heads, heads, count, width, head_dim = rows.shape
    if options.query_pooling == QueryPooling.MEAN:
        segments, segment = 1, torch.zeros_like(groups.position)
    else:
        segments = (width + MICRO_BLOCK - 2) // MICRO_BLOCK + 1
        first = _floor_divide(groups.start, MICRO_BLOCK)
        segment = _floor_divide(groups.position, MICRO_BLOCK) - first.unsqueeze(1)
    member = torch.logical_and(
        segment.unsqueeze(1) == torch.arange(segments).reshape(1, segments, 1), groups.real[:, None]
    )
    weights = member.to(rows.dtype)  # [G, segments, W]
    sizes = weights.sum(dim=2)  # [G, segments]
    means = torch.matmul(weights, rows) / torch.clamp(sizes, min=1.0).unsqueeze(2)  # [Hkv, heads, G, segments, D]
    if options.query_pooling == QueryPooling.MEAN:
        return means.mean(dim=1), sizes > 0
    pooled = means.permute(0, 2, 1, 3, 4).reshape(kv_heads, count, heads * segments, head_dim)
    real = (sizes > 0).unsqueeze(1).expand(-1, heads, -1).reshape(count, heads * segments)
    return pooled, real


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
