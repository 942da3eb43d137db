"""The laws of dhsa_attention, held by the reference and by the native op alike, and parity judged in float64.

S state, T slices, 1 tile of one, C causality, D threads, G grouped heads: csrc/ops/dhsa_attention/dhsa_attention.h.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgerun import compare
from edgerun.errors import EdgerunError
from edgerun.ops import dhsa_attention as op
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Chunking, Pooling, QueryPooling, Selector
from edgerun.recipe import MICRO_BLOCK, DhsaOptions
from tests.ops.attention_cases import (
    IMPLEMENTATIONS,
    SPARSE_CHOICES,
    Case,
    Implementation,
    assert_same_state,
    cases,
    make_case,
    prefill,
    slices,
    sparse_options,
)

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
cut_lists = st.lists(st.integers(1, 399), max_size=6)
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 171, 172, 173, 255, 256, 257]


def small_options(**changes: object) -> AttentionOptions:
    values = {"scale": 0.25, "budget": 172, "tile": 64, "finds_boundaries": True, "boundary_threshold": 0.6, **changes}
    return AttentionOptions(**values)  # type: ignore[arg-type]


def output_limit(case: Case) -> float:
    return compare.tolerance("op_fp16" if case.query.dtype == torch.float16 else "op_fp32")


def explicit_attention(case: Case) -> torch.Tensor:
    """Dense attention by the formula, in float64, one score matrix a head: [1, n, Hq, D]."""
    options, n = case.options, case.tokens
    query, key, value = (tensor.double() for tensor in case.rows(0, n))
    group = query.shape[1] // key.shape[1]
    logits = options.scale * query @ key.repeat_interleave(group, 1).transpose(2, 3)
    if options.softcap > 0:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    row, column = torch.arange(n)[:, None], torch.arange(n)
    visible = (column <= row) & ((column > row - options.window) if options.window > 0 else True)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2)


# Law S: state


@both
@settings(max_examples=25)
@given(case=cases(), cuts=cut_lists)
def test_state_is_the_same_for_every_slicing(implementation: Implementation, case: Case, cuts: list[int]) -> None:
    _, whole = prefill(implementation, case)
    _, cut = prefill(implementation, case, cuts)
    assert_same_state(whole, cut, case.tokens, case.options)


@both
@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_state_is_the_same_token_by_token(implementation: Implementation, pooling: Pooling, dtype: torch.dtype) -> None:
    case = make_case(small_options(pooling=pooling), 219, dtype=dtype)
    _, whole = prefill(implementation, case)
    _, cut = prefill(implementation, case, range(219))
    assert_same_state(whole, cut, case.tokens, case.options)


@both
@settings(max_examples=15)
@given(case=cases(tokens=st.integers(40, 300)), back_to=st.integers(0, 299), first=st.integers(1, 300))
def test_going_back_leaves_no_trace(implementation: Implementation, case: Case, back_to: int, first: int) -> None:
    """A call whose input_pos lies before what is stored drops everything from it on."""
    first = min(first, case.tokens)
    back_to = min(back_to, first)
    other = make_case(case.options, first, kv_heads=case.kv_heads, head_dim=case.key.shape[3], dtype=case.key.dtype)
    kept = slice(0, back_to)
    for name in ("key", "value"):
        getattr(other, name)[:, :, kept] = getattr(case, name)[:, :, kept]
    expected, straight = prefill(implementation, case, [back_to])
    state = case.new_state()
    other = dataclasses.replace(other, query=other.query.repeat(1, case.query.shape[1], 1, 1)[:, : case.query.shape[1]])
    implementation.run(other, 0, first, state)
    if back_to == case.tokens:
        return
    out = implementation.run(case, back_to, case.tokens, state)
    assert_same_state(straight, state, case.tokens, case.options)
    assert torch.equal(out, expected[:, back_to:])


# Laws T and 1: slices


def run_with_lists(
    implementation: Implementation, case: Case, cuts: Sequence[int]
) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """Outputs of a sliced run and, per KV head, the lists of all its groups in order."""
    state = case.new_state()
    outputs: list[torch.Tensor] = []
    lists: list[list[list[int]]] = [[] for _ in range(case.kv_heads)]
    for first, last in slices(cuts, case.tokens):
        outputs.append(implementation.run(case, first, last, state))
        for head, found in enumerate(implementation.lists(case.query[:, :, first:last], state, first, case.options)):
            lists[head] += found
    return torch.cat(outputs, dim=1), lists


@both
@settings(max_examples=25)
@given(case=cases(), cuts=cut_lists)
def test_cuts_at_tile_edges_change_nothing(implementation: Implementation, case: Case, cuts: list[int]) -> None:
    tile = case.options.tile
    whole, whole_lists = run_with_lists(implementation, case, [])
    cut, cut_lists = run_with_lists(implementation, case, [cut // tile * tile for cut in cuts])
    assert cut_lists == whole_lists
    assert torch.equal(cut, whole)


@both
@settings(max_examples=6)
@given(case=cases(options=sparse_options(tile=1), tokens=st.integers(100, 200)), cuts=cut_lists)
def test_tile_of_one_is_the_same_token_by_token(implementation: Implementation, case: Case, cuts: list[int]) -> None:
    stepwise, stepwise_lists = run_with_lists(implementation, case, range(case.tokens))
    cut, cut_lists = run_with_lists(implementation, case, cuts)
    assert cut_lists == stepwise_lists
    assert torch.equal(cut, stepwise)


@both
@settings(max_examples=10)
@given(case=cases(), tile=st.sampled_from([1, 7, 16, 128]), cuts=cut_lists)
def test_a_budget_of_the_length_is_dense_for_every_tile(
    implementation: Implementation, case: Case, tile: int, cuts: list[int]
) -> None:
    case = case.with_options(tile=tile, budget=case.tokens + 1000)
    out, _ = prefill(implementation, case, cuts)
    assert compare.relative_l2(out, explicit_attention(case)) <= output_limit(case)


@both
@settings(max_examples=15)
@given(case=cases())
def test_a_tile_within_the_budget_takes_the_dense_path_bit_for_bit(implementation: Implementation, case: Case) -> None:
    sparse, _ = prefill(implementation, case)
    state = case.new_state()
    dense = implementation.run(case, 0, case.tokens, state, dataclasses.replace(case.options, budget=0))
    tile = case.options.tile
    rows = min(case.options.budget // tile * tile if case.tokens > case.options.budget else case.tokens, case.tokens)
    assert torch.equal(sparse[:, :rows], dense[:, :rows])


# Law C: causality


@both
@settings(max_examples=20)
@given(case=cases(tokens=st.integers(100, 400)), place=st.floats(0, 1), what=st.sampled_from(["query", "key", "value"]))
def test_what_changes_changes_nothing_before_it(
    implementation: Implementation, case: Case, place: float, what: str
) -> None:
    position = int(place * (case.tokens - 1))
    changed = dataclasses.replace(case, **{what: getattr(case, what).clone()})
    getattr(changed, what)[:, :, position] *= -3
    unchanged_rows = position if what != "query" else position // case.options.tile * case.options.tile
    before, _ = prefill(implementation, case)
    after, _ = prefill(implementation, changed)
    assert torch.equal(before[:, :unchanged_rows], after[:, :unchanged_rows])


# Law D: threads


@settings(max_examples=10)
@given(case=cases(), threads=st.sampled_from([2, 3, 8]))
def test_nothing_depends_on_threads(case: Case, threads: int) -> None:
    alone, state = prefill(IMPLEMENTATIONS["native"], case)
    torch.set_num_threads(threads)
    try:
        together, other_state = prefill(IMPLEMENTATIONS["native"], case)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, together)
    assert_same_state(state, other_state, case.tokens, case.options)
    lists = [op.native_lists(case.query, state, 0, case.options, threads=count) for count in (1, threads)]
    assert lists[0] == lists[1]


# Law G: grouped query heads


@both
@settings(max_examples=10)
@given(case=cases(options=sparse_options(budget=0), groups=[2, 4]))
def test_dense_groups_equal_repeated_heads(implementation: Implementation, case: Case) -> None:
    group = case.query.shape[1] // case.kv_heads
    repeated = dataclasses.replace(
        case, key=case.key.repeat_interleave(group, 1), value=case.value.repeat_interleave(group, 1)
    )
    grouped, _ = prefill(implementation, case)
    alone, _ = prefill(implementation, repeated)
    assert compare.relative_l2(grouped, alone) <= output_limit(case)


@both
@settings(max_examples=10)
@given(case=cases(groups=[2, 4]))
def test_sparse_groups_equal_repeated_heads_given_their_lists(implementation: Implementation, case: Case) -> None:
    group = case.query.shape[1] // case.kv_heads
    repeated = dataclasses.replace(
        case, key=case.key.repeat_interleave(group, 1), value=case.value.repeat_interleave(group, 1)
    )
    grouped, state = prefill(implementation, case)
    lists = implementation.lists(case.query, state, 0, case.options)
    _, repeated_state = prefill(implementation, repeated)
    lists = [head for head in lists for _ in range(group)]
    alone = implementation.attend(case.query, repeated_state, 0, case.options, lists)
    assert compare.relative_l2(grouped, alone) <= output_limit(case)


@both
@settings(max_examples=10)
@given(case=cases(groups=[1]), group=st.sampled_from([2, 3, 4]))
def test_a_group_of_identical_heads_equals_one_head(implementation: Implementation, case: Case, group: int) -> None:
    identical = dataclasses.replace(case, query=case.query.repeat_interleave(group, 1))
    _, state = prefill(implementation, case)
    assert_near_ties_only(implementation.lists(identical.query, state, 0, case.options), case, state)
    lists = implementation.lists(case.query, state, 0, case.options)
    one = implementation.attend(case.query, state, 0, case.options, lists)
    many = implementation.attend(identical.query, state, 0, case.options, lists)
    assert compare.relative_l2(many, one.repeat_interleave(group, 2)) <= output_limit(case)


# Parity, float64 as judge


def assert_near_ties_only(lists: list[list[list[int]]], case: Case, state: AttentionState) -> None:
    """Lists equal those of a float64 run on the same state, near ties aside."""
    judged = op.reference_lists(case.query.double(), state.to(torch.float64), 0, case.options)
    for judge_head, head in zip(judged, lists, strict=True):
        for judge, blocks in zip(judge_head, head, strict=True):
            assert op.tie_gap(judge, blocks) <= compare.tolerance("selection_near_tie"), (judge.blocks, blocks)


def assert_parity(implementation: Implementation, case: Case) -> None:
    """State, lists and outputs of one whole call against a float64 run of the reference."""
    out, state = prefill(implementation, case)
    exact = AttentionState.allocate(case.kv_heads, case.key.shape[3], case.tokens + 40, case.options, torch.float64)
    op.reference(*(tensor.double() for tensor in case.rows(0, case.tokens)), exact, 0, case.options)
    assert torch.equal(state.boundaries, exact.boundaries)
    complete = case.tokens // MICRO_BLOCK
    if case.options.keeps_summaries and complete:
        summaries = state.summaries[:, :complete]
        assert compare.relative_l2(summaries, exact.summaries[:, :complete]) <= output_limit(case)
    lists = implementation.lists(case.query, state, 0, case.options)
    assert_near_ties_only(lists, case, state)
    judged = op.reference_attend(case.query.double(), state.to(torch.float64), 0, case.options, lists)
    assert compare.relative_l2(out, judged) <= output_limit(case)
    assert compare.relative_l2(implementation.attend(case.query, state, 0, case.options, lists), judged) <= (
        output_limit(case)
    )


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
    chosen = [b for _, b in sorted(candidates)[:room]]
    return sorted([*range(o.sink // 16), *chosen, *(b for b in range(local // 16, case.tokens) if 16 * b < end)])


@settings(max_examples=20)
@given(case=cases(tokens=st.integers(170, 400)))
def test_reference_lists_equal_the_header_written_out(case: Case) -> None:
    case = dataclasses.replace(case, query=case.query.double(), key=case.key.double(), value=case.value.double())
    _, state = prefill(IMPLEMENTATIONS["reference"], case)
    lists = IMPLEMENTATIONS["reference"].lists(case.query, state, 0, case.options)
    tile = case.options.tile
    for group in {0, len(lists[0]) // 2, len(lists[0]) - 1}:
        start, end = group * tile, min(case.tokens, (group + 1) * tile)
        for head in range(case.kv_heads):
            assert lists[head][group] == written_out_list(case, head, start, end)


# What is refused


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    case = make_case(small_options(), 20)
    query, key, value = case.rows(0, 20)
    state = AttentionState.allocate(2, 16, 32, case.options)
    bad_calls = {
        "do not fit a context of 32 tokens": (query, key, value, 20),
        "at position -1": (query, key, value, -1),
        "expected one float dtype": (query.half(), key, value, 0),
        "head_dim is 8": (query[..., :8], key, value, 0),
        "must be equally many": (query[:, :3], key, value, 0),
        "the same number of each": (query, key[:, :, :5], value, 0),
        r"expected \[1, heads": (query[0], key, value, 0),
    }
    for message, (q, k, v, position) in bad_calls.items():
        with pytest.raises(EdgerunError, match=message):
            op.attend(q, k, v, state, torch.tensor([position]), case.options)
    wrong = dataclasses.replace(state, summaries=state.summaries[:, :1])
    with pytest.raises(EdgerunError, match=r"summaries is \[2, 1, 1, 16\], expected \[2, 2, 1, 16\]"):
        op.attend(query, key, value, wrong, torch.tensor([0]), case.options)
    assert not state.key_cache.any() and not state.boundaries.any()


def test_options_below_their_minimum_are_refused() -> None:
    with pytest.raises(EdgerunError, match="budget is 155 tokens, below its minimum of 156"):
        AttentionOptions(scale=1.0, budget=155)
    with pytest.raises(EdgerunError, match="sink is 8 tokens"):
        AttentionOptions(scale=1.0, sink=8)
    with pytest.raises(EdgerunError, match="tile is 0"):
        AttentionOptions(scale=1.0, tile=0)
    with pytest.raises(EdgerunError, match="max_context is 2000000 tokens"):
        AttentionState.allocate(1, 1, 2_000_000, AttentionOptions(scale=1.0))


def test_baselines_are_recipes_of_the_same_op() -> None:
    block_topk = AttentionOptions.from_recipe(DhsaOptions(selector="block-topk", pooling="minmax"), scale=1.0)
    assert (block_topk.chunking, block_topk.pooling) == (Chunking.FIXED, Pooling.MEAN)
    window_sink = AttentionOptions.from_recipe(DhsaOptions(selector="window-sink"), scale=1.0)
    assert (window_sink.selector, window_sink.keeps_summaries) == (Selector.RECENT, False)
