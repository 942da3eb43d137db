"""Random calls of dhsa_attention, and the two implementations that every law is held against."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import strategies as st

from edgerun import compare
from edgerun.ops import dhsa_attention as op
from edgerun.ops.dhsa_attention import (
    AttentionOptions,
    AttentionState,
    Chunking,
    Pooling,
    QueryPooling,
    Selector,
)
from edgerun.recipe import BOUNDARY_REACH, MAX_CHUNK, MICRO_BLOCK

Lists = list[list[list[int]]]


class Reference:
    """edgerun/ops/dhsa_attention_reference.py behind the calls that the tests make."""

    def run(
        self, case: Case, first: int, last: int, state: AttentionState, options: AttentionOptions | None = None
    ) -> torch.Tensor:
        return op.reference(*case.rows(first, last), state, first, options or case.options)

    def lists(self, query: torch.Tensor, state: AttentionState, input_pos: int, options: AttentionOptions) -> Lists:
        return op.block_lists(op.reference_lists(query, state, input_pos, options))

    def attend(
        self, query: torch.Tensor, state: AttentionState, input_pos: int, options: AttentionOptions, lists: Lists
    ) -> torch.Tensor:
        return op.reference_attend(query, state, input_pos, options, lists)


class Native:
    """The same through torch.ops.edgerun and edgerun._native."""

    def run(
        self, case: Case, first: int, last: int, state: AttentionState, options: AttentionOptions | None = None
    ) -> torch.Tensor:
        return op.attend(*case.rows(first, last), state, torch.tensor([first]), options or case.options)

    def lists(self, query: torch.Tensor, state: AttentionState, input_pos: int, options: AttentionOptions) -> Lists:
        return op.native_lists(query, state, input_pos, options)

    def attend(
        self, query: torch.Tensor, state: AttentionState, input_pos: int, options: AttentionOptions, lists: Lists
    ) -> torch.Tensor:
        return op.native_attend(query, state, input_pos, options, lists)[0]


Implementation = Reference | Native
IMPLEMENTATIONS: dict[str, Implementation] = {"reference": Reference(), "native": Native()}
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())


@dataclasses.dataclass(frozen=True, repr=False)
class Case:
    """One sequence: query [1, Hq, n, D], key and value [1, Hkv, n, D], and the options of the layer."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: AttentionOptions
    shape: str  # what a failing example prints
    cache_dtype: torch.dtype | None = None  # None: the dtype of the query

    def __repr__(self) -> str:
        return f"Case({self.shape} {self.cache_dtype} {self.options})"

    @property
    def tokens(self) -> int:
        return self.query.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    def rows(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query[:, :, first:last], self.key[:, :, first:last], self.value[:, :, first:last]

    def new_state(self) -> AttentionState:
        """Room for the sequence and a little more, filled with values that must never be read."""
        state = AttentionState.allocate(
            self.kv_heads, self.key.shape[3], self.tokens + 40, self.options, self.cache_dtype or self.query.dtype
        )
        for tensor in (state.key_cache, state.value_cache, state.summaries):
            tensor.fill_(100)
        state.boundaries.fill_(1)
        state.selection.fill_(100)
        return state

    def with_options(self, **changes: object) -> Case:
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **changes))  # type: ignore[arg-type]


def make_case(
    options: AttentionOptions,
    tokens: int,
    *,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Keys come in runs of 5 to 70 similar tokens, so that cosine boundaries find cuts and leave others out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    starts = torch.zeros(tokens, dtype=torch.long)
    at = 0
    while at < tokens:
        starts[at] = 1
        at += int(torch.randint(5, 70, (1,), generator=generator))
    topics = normal(1, kv_heads, tokens, head_dim)[:, :, starts.cumsum(0) - 1]
    query = normal(1, kv_heads * group, tokens, head_dim)
    key = topics + 0.5 * normal(1, kv_heads, tokens, head_dim)
    value = normal(1, kv_heads, tokens, head_dim)
    shape = f"{tokens=} {kv_heads=} {group=} {head_dim=} {dtype=} {seed=}"
    return Case(query.to(dtype), key.to(dtype), value.to(dtype), options, shape)


def slices(cuts: Sequence[int], tokens: int) -> Iterator[tuple[int, int]]:
    """[0, tokens) cut at the given positions."""
    return itertools.pairwise([0, *sorted(cut for cut in set(cuts) if 0 < cut < tokens), tokens])


def prefill(
    implementation: Implementation, case: Case, cuts: Sequence[int] = ()
) -> tuple[torch.Tensor, AttentionState]:
    """Runs a whole case, cut at `cuts`: result [1, n, Hq, D] and the state after it."""
    state = case.new_state()
    pieces = [implementation.run(case, first, last, state) for first, last in slices(cuts, case.tokens)]
    return torch.cat(pieces, dim=1), state


def defined_state(state: AttentionState, tokens: int, options: AttentionOptions) -> dict[str, torch.Tensor]:
    """The part of a state that has a meaning after `tokens` tokens; the rest may hold anything."""
    parts = {
        "keys": state.keys().transpose(2, 3).flatten(1, 2)[:, :tokens],
        "values": state.values().flatten(1, 2)[:, :tokens],
        "boundaries": state.boundaries,
    }
    if options.keeps_summaries:
        parts["summaries"] = state.summaries[:, : tokens // MICRO_BLOCK]
    return parts


def assert_same_state(a: AttentionState, b: AttentionState, tokens: int, options: AttentionOptions) -> None:
    left, right = defined_state(a, tokens, options), defined_state(b, tokens, options)
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} differ after {tokens} tokens"


SPARSE_CHOICES = list(itertools.product(Pooling, QueryPooling, Selector, Chunking))


@st.composite
def sparse_options(draw: st.DrawFn, tile: int | None = None, **fixed: object) -> AttentionOptions:
    """Options of a sparse layer that finds its own boundaries, with a budget near the minimum: lists are short."""
    tile = tile or draw(st.sampled_from([1, 3, 16, 20, 64]))
    sink = draw(st.sampled_from([0, 16, 48]))
    values: dict[str, object] = {
        "scale": 0.25,
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "budget": sink + MAX_CHUNK + BOUNDARY_REACH + tile + draw(st.integers(0, 90)),
        "tile": tile,
        "sink": sink,
        "dense_tail": 0,
        "chunking": draw(st.sampled_from(Chunking)),
        "boundary_threshold": draw(st.sampled_from([0.3, 0.6, 1.0])),
        "finds_boundaries": fixed.get("budget") != 0,
        "pooling": draw(st.sampled_from(Pooling)),
        "query_pooling": draw(st.sampled_from(QueryPooling)),
        "selector": draw(st.sampled_from([Selector.CHUNK, Selector.CHUNK, Selector.RECENT])),
        "refine": draw(st.sampled_from([0, 4, 16])),
    }
    return AttentionOptions(**{**values, **fixed})  # type: ignore[arg-type]


@st.composite
def cases(
    draw: st.DrawFn,
    options: st.SearchStrategy[AttentionOptions] = sparse_options(),  # noqa: B008
    tokens: st.SearchStrategy[int] = st.integers(1, 400),  # noqa: B008
    groups: Sequence[int] = (1, 2, 4),
    caches: Sequence[torch.dtype | None] = (None, torch.float32, torch.float16, torch.int8),
) -> Case:
    """A sequence long enough for a sparse selection more often than not."""
    case = make_case(
        draw(options),
        draw(tokens),
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from(groups)),
        head_dim=draw(st.sampled_from([8, 16, 20, 40])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float16])),
        seed=draw(st.integers(0, 2**20)),
    )
    return dataclasses.replace(case, cache_dtype=draw(st.sampled_from(caches)))


def small_options(**changes: object) -> AttentionOptions:
    values = {"scale": 0.25, "budget": 172, "tile": 64, "finds_boundaries": True, "boundary_threshold": 0.6, **changes}
    return AttentionOptions(**values)  # type: ignore[arg-type]


def output_limit(case: Case) -> float:
    return compare.tolerance("op_fp16" if case.query.dtype == torch.float16 else "op_fp32")


def held(state: AttentionState, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value [1, Hkv, tokens, D] as the cache holds them, in float64."""
    key = state.keys().transpose(2, 3).flatten(1, 2)[None, :, :tokens]
    return key.double(), state.values().flatten(1, 2)[None, :, :tokens].double()


def explicit_attention(case: Case) -> torch.Tensor:
    """Dense attention by the formula, in float64, one score matrix a head, on what the cache holds: [1, n, Hq, D]."""
    options, n = case.options, case.tokens
    query, key, value = (tensor.double() for tensor in case.rows(0, n))
    if case.cache_dtype is not None:
        state = case.new_state()
        op.reference_append(*case.rows(0, n)[1:], state, 0, dataclasses.replace(options, budget=0))
        key, value = held(state, n)
    group = query.shape[1] // key.shape[1]
    logits = options.scale * query @ key.repeat_interleave(group, 1).transpose(2, 3)
    if options.softcap > 0:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    row, column = torch.arange(n)[:, None], torch.arange(n)
    visible = (column <= row) & ((column > row - options.window) if options.window > 0 else True)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2)


def assert_near_ties_only(lists: list[list[list[int]]], case: Case, state: AttentionState) -> None:
    """Lists equal those of a float64 run on the same state, near ties aside."""
    judged = op.reference_lists(case.query.double(), state.to(torch.float64), 0, case.options)
    for judge_head, head in zip(judged, lists, strict=True):
        for judge, blocks in zip(judge_head, head, strict=True):
            assert op.tie_gap(judge, blocks) <= compare.tolerance("selection_near_tie"), (judge.blocks, blocks)
