"""edgerun::dhsa_attention: one attention layer over a growing key/value cache, dense or sparse by DHSA.

Schema, fake and CPU implementation. csrc/ops/dhsa_attention/dhsa_attention.h is the contract and
csrc/ops/dhsa_attention/dhsa_attention_portable.cpp the kernel; dhsa_attention_reference.py is the same in plain torch,
and dhsa_attention_decomposition.py the form for targets without custom ops.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch

from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention_decomposition import boundaries_as, decomposition
from edgerun.ops.dhsa_attention_reference import (
    append as reference_append,
)
from edgerun.ops.dhsa_attention_reference import (
    block_lists,
    count_pairs,
    reference,
    reference_attend,
    reference_lists,
    tie_gap,
)
from edgerun.ops.dhsa_attention_types import (
    CACHE_DTYPES,
    MAX_BLOCKS,
    AttentionOptions,
    AttentionState,
    Chunking,
    Pooling,
    QueryPooling,
    Selector,
    cache_shapes,
    summaries_dtype,
)
from edgerun.ops.native import native_module

__all__ = [
    "AttentionCounters",
    "AttentionOptions",
    "AttentionState",
    "Chunking",
    "Pooling",
    "QueryPooling",
    "Selector",
    "attend",
    "block_lists",
    "boundaries_as",
    "count_attention",
    "count_pairs",
    "count_pairs_in_context",
    "decomposition",
    "native_attend",
    "native_lists",
    "reference",
    "reference_append",
    "reference_attend",
    "reference_lists",
    "tie_gap",
]

# What ExecuTorch's emitter wants and gets here: the mutable state is followed by scalars, never directly by `out`
# (or the emitter takes a cache for the output), and input_pos is a tensor, so that no data-dependent integer enters
# the graph. Every layer declares the shared boundaries mutable, though only one writes them: that keeps the layers
# in order.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) summaries, "
    "Tensor(d!) boundaries, Tensor(e!) selection, Tensor input_pos, float scale, float softcap, int window, "
    "int budget, int tile, int sink, int dense_tail, int chunking, float boundary_threshold, bool finds_boundaries, "
    "int pooling, int query_pooling, int selector, int refine, int reselect"
)
_LIBRARY = torch.library.Library("edgerun", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"dhsa_attention({_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"dhsa_attention.out({_ARGUMENTS}, *, Tensor(f!) out) -> Tensor(f!)")  # type: ignore[no-untyped-call]

Lists = list[list[list[int]]]  # [KV head][group] -> micro-block ids, ascending


class _Native(Protocol):
    """What csrc/bindings/python_ops.cpp puts into `edgerun._native`.

    All take the same positional arguments. Pointers are data_ptr() integers of contiguous tensors, shaped as in
    `dhsa::Tensors` (0 for an empty or unused one); `dtype`, `cache_dtype`, `chunking`, `pooling`, `query_pooling` and
    `selector` are the header's enum numbers. What dhsa::check refuses raises ValueError with its text. The GIL is
    released.
    """

    def dhsa_attention(
        self,
        query_ptr: int,
        key_ptr: int,
        value_ptr: int,
        out_ptr: int,
        key_cache_ptr: int,
        value_cache_ptr: int,
        summaries_ptr: int,
        boundaries_ptr: int,
        selection_ptr: int,
        tokens: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        capacity_blocks: int,
        input_pos: int,
        dtype: int,
        cache_dtype: int,
        scale: float,
        softcap: float,
        window: int,
        budget: int,
        tile: int,
        sink: int,
        dense_tail: int,
        chunking: int,
        boundary_threshold: float,
        finds_boundaries: bool,
        pooling: int,
        query_pooling: int,
        selector: int,
        refine: int,
        reselect: int,
        threads: int,
        /,
    ) -> tuple[int, int]:
        """dhsa::run. Returns (attended_pairs, causal_pairs)."""
        ...

    def dhsa_select(self, *arguments: float) -> Lists:
        """dhsa::select alone, on a state that already holds input_pos + tokens tokens: the same arguments, of which
        key_ptr, value_ptr and out_ptr are 0 and not read. Returns lists[KV head][group]."""
        ...

    def dhsa_attend(self, *arguments: float | Lists) -> tuple[int, int]:
        """dhsa::attend alone, same state, with the lists after `threads`; key_ptr and value_ptr are 0 and not read."""
        ...


@dataclasses.dataclass
class AttentionCounters:
    """Pairs (query token, key token) per KV head, summed over the calls made inside `count_attention`."""

    attended_pairs: int = 0
    causal_pairs: int = 0

    @property
    def density(self) -> float | None:
        """Realised density, attended / causal; None before any call."""
        return self.attended_pairs / self.causal_pairs if self.causal_pairs else None


_COUNTERS: contextvars.ContextVar[AttentionCounters | None] = contextvars.ContextVar("edgerun_counters", default=None)


@contextlib.contextmanager
def count_attention() -> Iterator[AttentionCounters]:
    """Counts what the op attends in this context (thread or task): `with count_attention() as counters: ...`."""
    counters = AttentionCounters()
    token = _COUNTERS.set(counters)
    try:
        yield counters
    finally:
        _COUNTERS.reset(token)


def count_pairs_in_context(attended: int, causal: int) -> None:
    """Adds to the counters of this context, if it has any: for attention that is not the op's own call."""
    counters = _COUNTERS.get()
    if counters is not None:
        counters.attended_pairs += attended
        counters.causal_pairs += causal


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: AttentionState,
    input_pos: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Appends S tokens at `input_pos` to `state` and attends from them.

    query [1, Hq, S, D], key and value [1, Hkv, S, D], after rotary embedding, float32 or float16; the caches float32,
    float16 or int8; input_pos int64 [1]. Returns [1, S, Hq, D]. Raises EdgerunError for what does not fit.
    """
    result: torch.Tensor = torch.ops.edgerun.dhsa_attention(
        query,
        key,
        value,
        state.key_cache,
        state.value_cache,
        state.summaries,
        state.boundaries,
        state.selection,
        input_pos,
        *options.arguments(),
    )
    return result


def prepare_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    state: AttentionState,
    input_pos: int,
    options: AttentionOptions,
    threads: int,
) -> Callable[[], object]:
    """`attend` with its arguments checked and prepared: what the function that it returns takes is the kernel's time.

    out [1, S, Hq, D] receives the result; all tensors are contiguous, and the function keeps them. Raises EdgerunError
    for what does not fit; the function raises ValueError for what the kernel refuses.
    """
    tensors = (query, key, value, out, *state.tensors())
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise EdgerunError("a prepared call takes contiguous tensors")
    if tuple(out.shape) != _result_shape(query) or out.dtype != query.dtype:
        raise EdgerunError(f"out is {list(out.shape)} {out.dtype}; expected {list(_result_shape(query))} {query.dtype}")
    check_shapes(query, key, value, state, options)
    check_position(query.shape[2], key.shape[2], value.shape[2], input_pos, state.capacity_tokens)
    arguments = _native_arguments(query, key, value, out, state, input_pos, options, threads)
    call = _native().dhsa_attention

    def run(_kept: tuple[torch.Tensor, ...] = tensors) -> object:
        return call(*arguments)  # type: ignore[arg-type, call-arg]

    return run


def native_lists(
    query: torch.Tensor, state: AttentionState, input_pos: int, options: AttentionOptions, threads: int = 1
) -> Lists:
    """The lists that the native op selects for `query` [1, Hq, S, D] on a state that already holds its tokens."""
    query = query.contiguous()
    return _native().dhsa_select(*_native_arguments(query, None, None, None, state, input_pos, options, threads))


def native_attend(
    query: torch.Tensor,
    state: AttentionState,
    input_pos: int,
    options: AttentionOptions,
    lists: Lists,
    threads: int = 1,
) -> tuple[torch.Tensor, AttentionCounters]:
    """The native op's attention over given lists, on a state that already holds the call's tokens: [1, S, Hq, D]."""
    query = query.contiguous()
    out = query.new_empty(_result_shape(query))
    arguments = _native_arguments(query, None, None, out, state, input_pos, options, threads)
    return out, AttentionCounters(*_native().dhsa_attend(*arguments, lists))


def _native() -> _Native:
    return cast(_Native, native_module())


def _native_arguments(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    out: torch.Tensor | None,
    state: AttentionState,
    input_pos: int,
    options: AttentionOptions,
    threads: int,
) -> tuple[float, ...]:
    tensors = (query, key, value, out, *state.tensors())
    return (
        *(0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr() for tensor in tensors),
        query.shape[2],
        query.shape[1],
        state.key_cache.shape[0],
        query.shape[3],
        state.key_cache.shape[1],
        input_pos,
        CACHE_DTYPES[query.dtype],
        CACHE_DTYPES[state.key_cache.dtype],
        *options.arguments(),
        threads,
    )


def _result_shape(query: torch.Tensor) -> tuple[int, ...]:
    batch, heads, tokens, head_dim = query.shape
    return (batch, tokens, heads, head_dim)


def check_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: AttentionState,
    options: AttentionOptions,
) -> None:
    """Raises EdgerunError when shapes or dtypes do not belong together. Reads no dynamic dimension, so it traces."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or query.shape[0] != 1:
        raise EdgerunError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: "
            "expected [1, heads, tokens, head_dim]; run one sequence at a time"
        )
    query_heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    if kv_heads == 0 or query_heads % kv_heads or value.shape[1] != kv_heads:
        raise EdgerunError(
            f"{query_heads} query heads, {kv_heads} key heads, {value.shape[1]} value heads: "
            "key and value heads must be equally many and divide the query heads"
        )
    if key.shape[3] != head_dim or value.shape[3] != head_dim:
        raise EdgerunError(
            f"head_dim is {head_dim} for query, {key.shape[3]} for key, {value.shape[3]} for value; they must be equal"
        )
    blocks = state.key_cache.shape[1] if state.key_cache.dim() > 1 else 0
    key_shape, value_shape = cache_shapes(blocks, head_dim, state.key_cache.dtype)
    expected: dict[str, tuple[int, ...]] = {
        "key_cache": (kv_heads, *key_shape),
        "value_cache": (kv_heads, *value_shape),
    }
    if options.keeps_summaries:
        expected["summaries"] = (kv_heads, blocks, options.summary_vectors, head_dim)
    if options.budget > 0 or options.finds_boundaries:
        expected["boundaries"] = (blocks + 1,)
    if options.keeps_selection:
        expected["selection"] = (kv_heads, options.selection_integers)
    for name, shape in expected.items():
        found = getattr(state, name)
        if tuple(found.shape) != shape:
            raise EdgerunError(
                f"{name} is {list(found.shape)}, expected {list(shape)}: use AttentionState.allocate with these options"
            )
    if blocks > MAX_BLOCKS:
        raise EdgerunError(f"the cache has {blocks} micro-blocks; ids of 16 bits name at most {MAX_BLOCKS}")
    dtypes = {tensor.dtype for tensor in (query, key, value)}
    cache = state.key_cache.dtype
    summaries = summaries_dtype(cache)
    found_dtypes = (state.value_cache.dtype, state.summaries.dtype, state.boundaries.dtype, state.selection.dtype)
    if len(dtypes) != 1 or found_dtypes != (cache, summaries, torch.uint8, torch.int32):
        raise EdgerunError(
            f"query, key and value have dtypes {sorted(map(str, dtypes))}, the caches {cache} and {found_dtypes[0]}, "
            f"summaries {found_dtypes[1]}, boundaries {found_dtypes[2]}, selection {found_dtypes[3]}; expected one "
            f"float dtype for the first three, one for the caches, {summaries} for the summaries, uint8 and int32"
        )


def check_position(tokens: int, key_tokens: int, value_tokens: int, input_pos: int, capacity_tokens: int) -> None:
    """Raises EdgerunError when a call's tokens do not fit behind `input_pos`."""
    if tokens < 1 or key_tokens != tokens or value_tokens != tokens:
        raise EdgerunError(
            f"a call has {tokens} query, {key_tokens} key and {value_tokens} value tokens; "
            "it needs the same number of each, at least 1"
        )
    if input_pos < 0 or input_pos + tokens > capacity_tokens:
        raise EdgerunError(
            f"{tokens} tokens at position {input_pos} do not fit a context of {capacity_tokens} tokens: "
            "shorten the prompt, or export with a larger --max-context"
        )


def _implementation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    summaries: torch.Tensor,
    boundaries: torch.Tensor,
    selection: torch.Tensor,
    input_pos: torch.Tensor,
    *scalars: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    options = _options(scalars)
    state = AttentionState(key_cache, value_cache, summaries, boundaries, selection)
    check_shapes(query, key, value, state, options)
    position = int(input_pos.item())
    check_position(query.shape[2], key.shape[2], value.shape[2], position, state.capacity_tokens)
    if query.dtype not in (torch.float32, torch.float16) or key_cache.dtype not in CACHE_DTYPES:
        raise EdgerunError(
            f"dtypes are {query.dtype} and, of the caches, {key_cache.dtype}; the op computes float32 and float16 on "
            "float32, float16 and int8 caches, the reference any"
        )
    if out is None:
        out = query.new_empty(_result_shape(query))
    if tuple(out.shape) != _result_shape(query) or out.dtype != query.dtype:
        raise EdgerunError(f"out is {list(out.shape)} {out.dtype}; expected {list(_result_shape(query))} {query.dtype}")
    if not all(t.is_contiguous() for t in (*state.tensors(), out)):
        raise EdgerunError("the state and the result must be contiguous, since the kernel writes them in place")
    inputs = (query.contiguous(), key.contiguous(), value.contiguous())
    arguments = _native_arguments(*inputs, out, state, position, options, torch.get_num_threads())
    try:
        attended_pairs, causal_pairs = _native().dhsa_attention(*arguments)  # type: ignore[arg-type, call-arg]
    except ValueError as error:
        raise EdgerunError(f"dhsa_attention cannot serve this call: {error}") from error
    count_pairs_in_context(attended_pairs, causal_pairs)
    return out


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    summaries: torch.Tensor,
    boundaries: torch.Tensor,
    selection: torch.Tensor,
    input_pos: torch.Tensor,
    *scalars: float,
) -> torch.Tensor:
    state = AttentionState(key_cache, value_cache, summaries, boundaries, selection)
    check_shapes(query, key, value, state, _options(scalars))
    return query.new_empty(_result_shape(query))


def _options(scalars: Sequence[float]) -> AttentionOptions:
    """AttentionOptions of the schema's scalars; checks them."""
    scale, softcap, window, budget, tile, sink, dense_tail = scalars[:7]
    chunking, boundary_threshold, finds_boundaries, pooling, query_pooling, selector, refine, reselect = scalars[7:]
    try:
        return AttentionOptions(
            scale=scale,
            softcap=softcap,
            window=int(window),
            budget=int(budget),
            tile=int(tile),
            sink=int(sink),
            dense_tail=int(dense_tail),
            chunking=Chunking(int(chunking)),
            boundary_threshold=boundary_threshold,
            finds_boundaries=bool(finds_boundaries),
            pooling=Pooling(int(pooling)),
            query_pooling=QueryPooling(int(query_pooling)),
            selector=Selector(int(selector)),
            refine=int(refine),
            reselect=int(reselect),
        )
    except ValueError as error:
        raise EdgerunError(f"dhsa_attention: {error}; see csrc/ops/dhsa_attention/dhsa_attention.h") from error


torch.library.impl(_LIBRARY, "dhsa_attention", "CPU")(_implementation)
torch.library.impl(_LIBRARY, "dhsa_attention.out", "CPU")(_implementation)
torch.library.register_fake("edgerun::dhsa_attention", _fake, lib=_LIBRARY)
