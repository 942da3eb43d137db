"""The decomposition equals the reference on random shapes, call after call, and converts to Core ML and ONNX."""

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
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Chunking, Pooling, QueryPooling, Selector
from tests.ops.attention_cases import (
    SPARSE_CHOICES,
    Case,
    assert_same_state,
    cases,
    defined_state,
    make_case,
    slices,
    sparse_options,
)

EXACT = 1e-10  # relative L2 of two float64 forms that sum in different orders


def decompose(case: Case, first: int, last: int, state: AttentionState) -> tuple[torch.Tensor, AttentionState]:
    tensors = (state.key_cache, state.value_cache, state.summaries, state.boundaries)
    before = [tensor.clone() for tensor in tensors]
    out, *after = op.decomposition(*case.rows(first, last), *tensors, torch.tensor([first]), case.options)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)), "it wrote into its inputs"
    return out, AttentionState(*after)


def assert_equals_reference(case: Case, cuts: Sequence[int], limit: float) -> None:
    state, expected_state = case.new_state(), case.new_state()
    for first, last in slices(cuts, case.tokens):
        expected = op.reference(*case.rows(first, last), expected_state, first, case.options)
        out, state = decompose(case, first, last, state)
        assert out.shape == expected.shape and out.dtype == expected.dtype
        assert compare.relative_l2(out, expected) <= limit
        if not case.options.keeps_summaries or case.options.pooling == Pooling.MINMAX:
            assert_same_state(state, expected_state, last, case.options)
        else:
            left, right = (defined_state(s, last, case.options) for s in (state, expected_state))
            assert torch.equal(left["keys"], right["keys"]) and torch.equal(left["boundaries"], right["boundaries"])
            if right["summaries"].numel():
                assert compare.relative_l2(left["summaries"], right["summaries"]) <= limit


def double(case: Case) -> Case:
    return dataclasses.replace(case, query=case.query.double(), key=case.key.double(), value=case.value.double())


@settings(max_examples=40)
@given(case=cases(caches=(None,)), cuts=st.lists(st.integers(1, 399), max_size=4))
def test_equals_the_reference_call_after_call(case: Case, cuts: list[int]) -> None:
    assert_equals_reference(double(case), cuts, EXACT)


@pytest.mark.parametrize(("pooling", "query_pooling", "selector", "chunking"), SPARSE_CHOICES)
def test_equals_the_reference_for_every_choice(
    pooling: Pooling, query_pooling: QueryPooling, selector: Selector, chunking: Chunking
) -> None:
    options = AttentionOptions(
        scale=0.25,
        budget=172,
        finds_boundaries=True,
        boundary_threshold=0.6,
        chunking=chunking,
        pooling=pooling,
        query_pooling=query_pooling,
        selector=selector,
    )
    assert_equals_reference(double(make_case(options, 330)), [200, 201, 270], EXACT)


@pytest.mark.parametrize("query_pooling", QueryPooling)
@pytest.mark.parametrize("tile", [1, 16, 64])
def test_equals_the_reference_where_it_ranks_again(query_pooling: QueryPooling, tile: int) -> None:
    options = AttentionOptions(
        scale=0.25,
        budget=172,
        tile=tile,
        finds_boundaries=True,
        boundary_threshold=0.6,
        pooling=Pooling.MOMENTS,
        query_pooling=query_pooling,
        refine=5,
    )
    # Groups of one row: in calls of one token, first in a call (255), and last (256, 321).
    assert_equals_reference(double(make_case(options, 321)), [200, 201, 202, 255, 257], EXACT)


@settings(max_examples=15)
@given(
    case=cases(options=sparse_options(budget=0), caches=(None,)),
    window=st.sampled_from([0, 1, 17, 64]),
    cut=st.integers(1, 399),
)
def test_equals_the_reference_dense_and_windowed(case: Case, window: int, cut: int) -> None:
    assert_equals_reference(double(case.with_options(window=window)), [cut], EXACT)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "op_against_op_fp32"), (torch.float16, "op_fp16")])
def test_equals_the_reference_in_other_dtypes(dtype: torch.dtype, name: str) -> None:
    options = AttentionOptions(scale=0.25, budget=108, tile=16, finds_boundaries=True, dense_tail=20)
    assert_equals_reference(make_case(options, 300, dtype=dtype), [128, 250, 270, 271], compare.tolerance(name))


def test_equals_the_reference_with_a_float16_cache() -> None:
    options = AttentionOptions(scale=0.25, budget=108, tile=16, finds_boundaries=True)
    case = dataclasses.replace(make_case(options, 300), cache_dtype=torch.float16)
    assert_equals_reference(case, [128, 250, 271], compare.tolerance("op_fp16"))


def test_an_int8_cache_is_refused() -> None:
    case = dataclasses.replace(make_case(AttentionOptions(scale=0.25), 20), cache_dtype=torch.int8)
    with pytest.raises(EdgerunError, match="float32 and float16 caches"):
        decompose(case, 0, 20, case.new_state())


def test_going_back_equals_the_reference() -> None:
    options = AttentionOptions(scale=0.25, budget=108, tile=16, finds_boundaries=True, boundary_threshold=0.6)
    case = double(make_case(options, 300))
    state, expected_state = case.new_state(), case.new_state()
    for first, last in ((0, 280), (150, 230), (7, 120)):
        expected = op.reference(*case.rows(first, last), expected_state, first, options)
        out, state = decompose(case, first, last, state)
        assert compare.relative_l2(out, expected) <= EXACT
        assert torch.equal(state.boundaries, expected_state.boundaries)


def test_boundaries_survive_a_float_state() -> None:
    options = AttentionOptions(scale=0.25, budget=108, tile=16, finds_boundaries=True, boundary_threshold=0.6)
    case = make_case(options, 300)
    state, float_state = case.new_state(), case.new_state()
    float_state = dataclasses.replace(float_state, boundaries=op.boundaries_as(float_state.boundaries, torch.float32))
    for first, last in ((0, 200), (200, 300)):
        out, state = decompose(case, first, last, state)
        float_out, float_state = decompose(case, first, last, float_state)
        assert torch.equal(out, float_out)
        assert float_state.boundaries.dtype == torch.float32
        assert torch.equal(op.boundaries_as(float_state.boundaries, torch.uint8), state.boundaries)
