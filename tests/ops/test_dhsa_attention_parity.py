"""Parity of dhsa_attention, reference and native alike: state, lists and outputs, with float64 as judge; density.

The reference's lists are held in turn against the header written out token by token.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgerun import compare
from edgerun.ops import dhsa_attention as op
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Chunking, Pooling, QueryPooling, Selector
from edgerun.recipe import MICRO_BLOCK
from tests.ops.attention_cases import (
    IMPLEMENTATIONS,
    SPARSE_CHOICES,
    Case,
    Implementation,
    assert_near_ties_only,
    both,
    cases,
    explicit_attention,
    held,
    make_case,
    output_limit,
    prefill,
    slices,
    small_options,
    sparse_options,
)

cut_lists = st.lists(st.integers(1, 399), max_size=6)
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 171, 172, 173, 255, 256, 257]


# Parity, float64 as judge


def assert_parity(implementation: Implementation, case: Case) -> None:
    """State, lists and outputs of one whole call against a float64 run of the reference on what the cache holds."""
    out, state = prefill(implementation, case)
    exact = AttentionState.allocate(case.kv_heads, case.key.shape[3], case.tokens + 40, case.options, torch.float64)
    op.reference(case.query.double(), *held(state, case.tokens), exact, 0, case.options)
    assert torch.equal(state.boundaries, exact.boundaries)
    complete = case.tokens // MICRO_BLOCK
    if case.options.keeps_summaries and complete:
        error = compare.relative_l2(state.summaries[:, :complete], exact.summaries[:, :complete])
        assert error <= compare.tolerance("op_fp16")
    lists = implementation.lists(case.query, state, 0, case.options)
    assert_near_ties_only(lists, case, state)
    judged = op.reference_attend(case.query.double(), state.to(torch.float64), 0, case.options, lists)
    assert compare.relative_l2(out, judged) <= output_limit(case)
    assert compare.relative_l2(implementation.attend(case.query, state, 0, case.options, lists), judged) <= (
        output_limit(case)
    )


@both
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("head_dim", [20, 32, 80])
def test_the_cache_holds_what_it_was_given(
    implementation: Implementation, cache_dtype: torch.dtype, head_dim: int
) -> None:
    case = make_case(small_options(budget=0, finds_boundaries=False), 75, head_dim=head_dim)
    case = dataclasses.replace(case, cache_dtype=cache_dtype)
    _, state = prefill(implementation, case, [3, 16, 40])
    for stored, found, channels in zip((case.key, case.value), held(state, 75), (32, head_dim), strict=True):
        step = 2.0**-11 * stored.abs().double()  # half a unit in the last place of float16
        if cache_dtype == torch.int8:  # half a step of 1/127 of the largest, of a scale rounded to float16
            parts = [part.abs().amax(3, keepdim=True).expand_as(part) for part in stored.double().split(channels, 3)]
            step = torch.cat(parts, 3) * (0.5 / 127 + 2.0**-11) + 1e-7
        error = (found - stored.double()).abs()
        assert bool((error <= (0 if cache_dtype == torch.float32 else step)).all())


@both
def test_an_int8_cache_keeps_zeros_extremes_and_what_is_not_finite(implementation: Implementation) -> None:
    case = make_case(small_options(budget=0, finds_boundaries=False), 8, kv_heads=1, group=1, head_dim=40)
    key = case.key.clone()
    key[0, 0, 0], key[0, 0, 1], key[0, 0, 2], key[0, 0, 3, 5] = 0.0, 1e-30, 3e38, torch.nan
    key[0, 0, 4, 35] = torch.inf
    case = dataclasses.replace(case, key=key, cache_dtype=torch.int8)
    state = case.new_state()
    implementation.run(case, 0, 8, state)
    found = held(state, 8)[0][0, 0]
    assert not found[:2].any()
    assert torch.equal(found[2], torch.full((40,), 127.0 * 65504, dtype=torch.float64))
    assert found[3, :32].isnan().all() and not found[3, 32:].isnan().any()
    assert found[4, 32:].isnan().all() and not found[4, :32].isnan().any()
    assert not found[5:].isnan().any()


@both
@settings(max_examples=25)
@given(case=cases())
def test_parity_with_float64_on_random_shapes(implementation: Implementation, case: Case) -> None:
    assert_parity(implementation, case)


@both
@pytest.mark.parametrize(("pooling", "query_pooling", "selector", "chunking"), SPARSE_CHOICES)
def test_parity_for_every_choice(
    implementation: Implementation,
    pooling: Pooling,
    query_pooling: QueryPooling,
    selector: Selector,
    chunking: Chunking,
) -> None:
    options = small_options(pooling=pooling, query_pooling=query_pooling, selector=selector, chunking=chunking)
    assert_parity(implementation, make_case(options, 330))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parity_at_every_edge_of_blocks_chunks_tiles_and_budget(
    implementation: Implementation, dtype: torch.dtype
) -> None:
    for tokens in LENGTHS:
        assert_parity(implementation, make_case(small_options(), tokens, dtype=dtype, seed=tokens))


@both
@settings(max_examples=15)
@given(
    case=cases(options=sparse_options(budget=0), tokens=st.integers(1, 200)),
    window=st.sampled_from([1, 2, 15, 16, 17, 64, 199]),
    cuts=cut_lists,
)
def test_window_attends_itself_and_what_is_just_before(
    implementation: Implementation, case: Case, window: int, cuts: list[int]
) -> None:
    case = case.with_options(window=window)
    out, _ = prefill(implementation, case, cuts)
    assert compare.relative_l2(out, explicit_attention(case)) <= output_limit(case)


@both
@pytest.mark.parametrize("group", [1, 2, 4])
def test_dense_equals_torch_attention_in_float64(implementation: Implementation, group: int) -> None:
    for tokens in LENGTHS:
        case = make_case(AttentionOptions(scale=0.3), tokens, group=group, seed=tokens)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.double() for tensor in case.rows(0, tokens)), is_causal=True, scale=0.3, enable_gqa=True
        ).transpose(1, 2)
        out, _ = prefill(implementation, case)
        assert compare.relative_l2(out, expected) <= compare.tolerance("op_fp32")


@both
def test_dense_tail_is_a_rule_of_the_call(implementation: Implementation) -> None:
    case = make_case(small_options(tile=16, budget=108, dense_tail=20), 300)
    state = case.new_state()
    implementation.run(case, 0, 260, state)
    for first, last, dense in ((260, 280, True), (280, 281, False), (281, 300, True), (260, 281, False)):
        out = implementation.run(case, first, last, state)
        expected = explicit_attention(case)[:, first:last]
        assert (compare.relative_l2(out, expected) <= compare.tolerance("op_fp32")) == dense


# Density


@settings(max_examples=15)
@given(case=cases(), cuts=cut_lists)
def test_reported_pairs_equal_pairs_counted_from_the_lists(case: Case, cuts: list[int]) -> None:
    state, attended, causal = case.new_state(), 0, 0
    with op.count_attention() as counters:
        for first, last in slices(cuts, case.tokens):
            IMPLEMENTATIONS["native"].run(case, first, last, state)
            query = case.query[:, :, first:last]
            lists = op.native_lists(query, state, first, case.options)
            pairs = op.count_pairs(lists, last - first, first, case.options)
            given_lists = op.native_attend(query, state, first, case.options, lists)[1]
            assert (given_lists.attended_pairs, given_lists.causal_pairs) == pairs
            attended, causal = attended + pairs[0], causal + pairs[1]
    assert (counters.attended_pairs, counters.causal_pairs) == (attended, causal)


@pytest.mark.parametrize("window", [0, 40])
def test_pairs_are_counted_one_by_one(window: int) -> None:
    case = make_case(small_options(tile=16, budget=0 if window else 108, window=window), 200)
    _, state = prefill(IMPLEMENTATIONS["reference"], case)
    lists = IMPLEMENTATIONS["reference"].lists(case.query, state, 0, case.options)
    attended = causal = 0
    for head, row in itertools.product(range(case.kv_heads), range(200)):
        for column in range(max(0, row - window + 1) if window else 0, row + 1):
            causal += 1
            attended += column // MICRO_BLOCK in lists[head][row // 16]
    assert op.count_pairs(lists, 200, 0, case.options) == (attended, causal)
    assert attended < causal or window


# The lists, written out a second time: token by token, in double, straight from the header


def written_out_list(case: Case, head: int, start: int, end: int) -> list[int]:
    """The list of the group [start, end) of KV head `head`, for a call that is longer than its dense tail."""
    o, group = case.options, case.query.shape[1] // case.kv_heads
    if end <= o.budget:
        return [b for b in range(case.tokens) if 16 * b < end]
    keys = case.key[0].double()  # [Hkv, n, D]

    def cut(edge: int) -> bool:
        if edge % 64 == 0 or o.chunking == Chunking.FIXED:
            return edge % 64 == 0
        for gap in range(edge - 8, edge + 9):
            left, right = (keys[:, a : a + 4].mean(1).flatten() for a in (gap - 4, gap))
            if 1 - torch.dot(left, right) / (left.norm() * right.norm()) > o.boundary_threshold:
                return True
        return False

    cuts = [edge for edge in range(0, start, 16) if edge == 0 or (edge + 12 <= start and cut(edge))]
    local, chunks = cuts[-1], list(itertools.pairwise(cuts))
    queries = case.query[0, head * group : (head + 1) * group, start:end].double()  # [G, rows, D]
    if o.query_pooling == QueryPooling.MEAN:
        pooled = [queries.reshape(-1, queries.shape[2]).mean(0)]
    else:
        segments = itertools.groupby(range(start, end), key=lambda token: token // 16)
        rows = [[token - start for token in tokens] for _, tokens in segments]
        pooled = [query[segment].mean(0) for query in queries for segment in rows]

    def score(query: torch.Tensor, first: int, last: int) -> float:
        products = [float(query @ keys[head, b : b + 16].mean(0)) for b in range(0, local, 16)]
        own = products[first // 16 : last // 16]
        if o.pooling == Pooling.MINMAX:
            blocks = [keys[head, b : b + 16] for b in range(first, last, 16)]
            return max(float(torch.maximum(query * b.amin(0), query * b.amax(0)).sum()) for b in blocks)
        if o.pooling == Pooling.MOMENTS:
            mass = []  # of each micro-block: mean exp(logit) if its logits are normal
            for b in range(0, local, 16):
                block, scaled = keys[head, b : b + 16], o.scale * query
                spread = float(scaled**2 @ block.var(0, unbiased=False))
                mass.append(math.exp(float(scaled @ block.mean(0)) + spread / 2))
            chunk = mass[first // 16 : last // 16]
            return math.log(sum(chunk) / len(chunk) / sum(mass))
        mean = sum(own) / len(own)
        if o.pooling == Pooling.CENTRED:
            mean -= sum(products) / len(products)
        return mean if o.pooling == Pooling.MEAN else (last - first) ** 0.5 * mean

    candidates: list[tuple[float, int]] = []
    for first, last in ((max(first, o.sink), last) for first, last in chunks if last > o.sink):
        value = max(score(query, first, last) for query in pooled)
        candidates += [
            (-float(b) if o.selector == Selector.RECENT else -value, b) for b in range(first // 16, last // 16)
        ]
    room = (o.budget - o.sink - (end - local)) // 16

    def again(query: torch.Tensor, b: int) -> float:
        block, scaled = keys[head, 16 * b : 16 * b + 16], o.scale * query
        strongest = [max(abs(float(q[d])) for q in pooled) for d in range(len(query))]
        limit = sorted(strongest, reverse=True)[: o.refine][-1]
        largest = [d for d in range(len(query)) if strongest[d] >= limit]
        others = [d for d in range(len(query)) if d not in largest]
        exact = sum(math.exp(sum(float(scaled[d] * token[d]) for d in largest)) for token in block) / 16
        spread = sum(float(scaled[d]) ** 2 * float(block[:, d].var(unbiased=False)) for d in others)
        return math.log(exact) + sum(float(scaled[d] * block[:, d].mean()) for d in others) + spread / 2

    def everything(query: torch.Tensor) -> float:
        blocks = [keys[head, b : b + 16] for b in range(0, local, 16)]
        spreads = [float((o.scale * query) ** 2 @ block.var(0, unbiased=False)) for block in blocks]
        means = [float(o.scale * query @ block.mean(0)) for block in blocks]
        return math.log(sum(math.exp(mean + spread / 2) for mean, spread in zip(means, spreads, strict=True)))

    if o.refine and end - start == 1 and o.selector == Selector.CHUNK and o.pooling == Pooling.MOMENTS:
        origins = [everything(query) for query in pooled]
        candidates = [
            (-max(again(query, b) - origin for query, origin in zip(pooled, origins, strict=True)), b)
            for _, b in sorted(candidates)[: max(2 * room, 256)]
        ]
    chosen = [b for _, b in sorted(candidates)[:room]]
    return sorted([*range(o.sink // 16), *chosen, *(b for b in range(local // 16, case.tokens) if 16 * b < end)])


@settings(max_examples=20)
@given(case=cases(tokens=st.integers(170, 400)))
def test_reference_lists_equal_the_header_written_out(case: Case) -> None:
    assert_equals_written_out(case)


@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize("query_pooling", QueryPooling)
def test_the_second_ranking_equals_the_header_written_out(tile: int, query_pooling: QueryPooling) -> None:
    options = small_options(tile=tile, pooling=Pooling.MOMENTS, refine=5, query_pooling=query_pooling)
    assert_equals_written_out(make_case(options, 321, seed=3))


def test_the_second_ranking_takes_the_first_ones_best() -> None:
    """More candidates than it looks at: the list differs from ranking all of them, and from not ranking again."""
    options = small_options(budget=172, pooling=Pooling.MOMENTS, refine=4)
    case = make_case(options, 6400 + 1, kv_heads=1, head_dim=8, seed=1)
    _, state = prefill(IMPLEMENTATIONS["native"], case, [6400])
    query = case.query[:, :, -1:]
    one = op.reference_lists(query.double(), state.to(torch.float64), 6400, options)[0][0]
    assert one.scores is not None
    assert int((one.scores > -math.inf).sum()) == 256 < len(one.scores)
    assert IMPLEMENTATIONS["native"].lists(query, state, 6400, options)[0][0] == one.blocks
    plain = dataclasses.replace(options, refine=0)
    assert op.reference_lists(query, state, 6400, plain)[0][0].blocks != one.blocks


def assert_equals_written_out(case: Case) -> None:
    case = dataclasses.replace(case, query=case.query.double(), key=case.key.double(), value=case.value.double())
    _, state = prefill(IMPLEMENTATIONS["reference"], case)
    lists = IMPLEMENTATIONS["reference"].lists(case.query, state, 0, case.options)
    tile = case.options.tile
    for group in {0, len(lists[0]) // 2, len(lists[0]) - 1}:
        start, end = group * tile, min(case.tokens, (group + 1) * tile)
        for head in range(case.kv_heads):
            assert lists[head][group] == written_out_list(case, head, start, end)
