"""The laws of dhsa_attention, held by the reference and by the native op alike, and what the op refuses.

S state, T slices, 1 tile of one, C causality, D threads, G grouped heads: csrc/ops/dhsa_attention/dhsa_attention.h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgerun import compare
from edgerun.errors import EdgerunError
from edgerun.ops import dhsa_attention as op
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Chunking, Pooling, Selector
from edgerun.recipe import DhsaOptions
from tests.ops.attention_cases import (
    IMPLEMENTATIONS,
    Case,
    Implementation,
    assert_near_ties_only,
    assert_same_state,
    both,
    cases,
    explicit_attention,
    make_case,
    output_limit,
    prefill,
    slices,
    small_options,
    sparse_options,
)

cut_lists = st.lists(st.integers(1, 399), max_size=6)


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
