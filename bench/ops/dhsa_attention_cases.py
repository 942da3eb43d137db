"""edgerun's candidates for the attention benchmark: the op dense and sparse, its selection alone, and their proofs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from bench.harness import Candidate, prove
from bench.peers.interface import AttentionCase
from edgerun.compare import relative_l2, tolerance
from edgerun.errors import EdgerunError
from edgerun.ops import dhsa_attention as op
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Selector
from edgerun.ops.native import native_module
from edgerun.recipe import MICRO_BLOCK, DhsaOptions

KV_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}  # of the cache; activations are fp32
NARROW_CACHE = 1e-2  # relative L2 of a token in the cache: 8 bits keep it within 4e-3
PROVEN_ROWS = 64  # query rows of each stretch that is held against float64


@dataclasses.dataclass(frozen=True)
class Native:
    """The op on one case: its options, the state it fills, and what it attended last."""

    case: AttentionCase
    options: AttentionOptions
    state: AttentionState
    counters: list[float]  # [realised density]

    @staticmethod
    def make(case: AttentionCase, budget: int) -> Native:
        """The op as export sets it up by default, with an empty cache for the case's tokens; budget 0 is dense."""
        options = attention_options(case.scale, budget)
        state = AttentionState.allocate(case.kv_heads, case.head_dim, case.length, options)
        return Native(case, options, state, [0.0])

    def run(self) -> torch.Tensor:
        """Append everything, find boundaries, summarise, select and attend: [1, S, Hq, D]."""
        with op.count_attention() as counters:
            result = op.attend(
                self.case.query, self.case.key, self.case.value, self.state, torch.tensor([0]), self.options
            )
        self.counters[0] = counters.density or 0.0
        return result

    def select(self, selector: Selector, threads: int) -> Callable[[], object]:
        """Selection alone, on a state that `run` filled. Its lists come back as Python lists, which takes time too."""
        options = dataclasses.replace(self.options, selector=selector)
        return lambda: op.native_lists(self.case.query, self.state, 0, options, threads)


def attention_options(scale: float, budget: int) -> AttentionOptions:
    """A layer's options under export's defaults; budget 0 is dense."""
    if budget == 0:
        return AttentionOptions(scale=scale)
    return AttentionOptions.from_recipe(DhsaOptions(budget=budget), scale=scale, finds_boundaries=True)


def with_variant(name: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with one kernel variant, leaving the dispatched one in use."""
    native = native_module()

    def chosen() -> object:
        native.dhsa_use_variant(name)
        try:
            return run()
        finally:
            native.dhsa_use_variant(native.dhsa_variants()[0])

    return chosen


def stretches(length: int) -> Iterator[slice]:
    """The first, a middle and the last rows of a sequence: what is held against float64."""
    middle = length // 2 // PROVEN_ROWS * PROVEN_ROWS
    for start in sorted({0, middle, max(0, length - PROVEN_ROWS)}):
        yield slice(start, min(start + PROVEN_ROWS, length))


def truth(case: AttentionCase, head: int, rows: slice, tokens: torch.Tensor) -> torch.Tensor:
    """Attention of some rows of one query head over some key tokens, in float64: [rows, D]."""
    kv_head = head // (case.query_heads // case.kv_heads)
    key, value = case.key[0, kv_head, tokens].double(), case.value[0, kv_head, tokens].double()
    scores = case.scale * case.query[0, head, rows].double() @ key.T
    positions = torch.arange(rows.start, rows.stop)
    scores = scores.masked_fill(tokens[None, :] > positions[:, None], float("-inf"))
    return scores.softmax(-1) @ value


def prove_dense(name: str, case: AttentionCase, answer: torch.Tensor, limit: float | None = None) -> float:
    """The relative L2 error of [1, S, Hq, D] against float64, over three stretches of rows of every head.

    Raises ParityError above the limit (the table's op_fp32 where None), or when a value is not finite.
    """
    errors = []
    for rows in stretches(case.length):
        tokens = torch.arange(rows.stop)
        expected = torch.stack([truth(case, head, rows, tokens) for head in range(case.query_heads)], dim=1)
        errors.append(relative_l2(answer[0, rows].numpy(), expected.numpy()))
    if not torch.isfinite(answer).all():
        errors.append(float("inf"))
    prove(name, max(errors), tolerance("op_fp32") if limit is None else limit)
    return max(errors)


def prove_same(name: str, answer: torch.Tensor, proven: torch.Tensor, limit: float | None = None) -> None:
    """The whole of an answer against one whose stretches were proven. Raises ParityError above op_against_op_fp32."""
    difference = torch.linalg.vector_norm(answer - proven) / torch.linalg.vector_norm(proven)
    prove(name, float(difference), tolerance("op_against_op_fp32") if limit is None else limit)


def prove_sparse(name: str, native: Native, answer: torch.Tensor) -> float:
    """The error against float64 over the lists that the op selected: a middle tile and the last, every head."""
    case, options, errors = native.case, native.options, []
    for rows in list(stretches(case.length))[1:]:
        start = rows.start // options.tile * options.tile
        tile = slice(start, min(start + options.tile, case.length))
        lists = op.native_lists(case.query[:, :, tile], native.state, tile.start, options)
        for head in range(case.query_heads):
            blocks = torch.tensor(lists[head // (case.query_heads // case.kv_heads)][0])
            tokens = (blocks[:, None] * MICRO_BLOCK + torch.arange(MICRO_BLOCK)).flatten()
            tokens = tokens[tokens < case.length]
            expected = truth(case, head, tile, tokens)
            errors.append(relative_l2(answer[0, tile, head].numpy(), expected.numpy()))
    if not torch.isfinite(answer).all():
        errors.append(float("inf"))
    prove(name, max(errors, default=float("inf")), tolerance("op_fp32"))
    return max(errors)


@dataclasses.dataclass(frozen=True)
class Decode:
    """One new token after `cached` tokens: the op on a filled cache, called again and again for the same position.

    Where a selection serves several tokens, calls go through so many positions, then begin again. Every call takes the
    next of a few queries, so that selection has new work. Where candidates share a cache, a dense call, which reads
    all of it, comes before each sparse one and sweeps it out of the last-level cache.
    """

    case: AttentionCase  # cached + 1 tokens
    options: AttentionOptions
    state: AttentionState
    queries: list[torch.Tensor]  # [1, Hq, 1, D]
    out: torch.Tensor  # [1, 1, Hq, D]
    calls: list[Callable[[], object]]  # prepared, one per query; run in turn
    made: list[int]  # [how many were made]

    @staticmethod
    def make(case: AttentionCase, options: AttentionOptions, state: AttentionState, threads: int) -> Decode:
        """Calls for the last position of the case, on a state that holds the tokens before it."""
        cached, every = case.length - 1, options.reselect
        out = torch.empty(1, 1, case.query_heads, case.query.shape[3])
        key, value = (tensor[:, :, -1:].contiguous() for tensor in (case.key, case.value))
        count = -(-min(16, case.length) // every) * every  # whole turns
        queries = [case.query[:, :, max(0, cached - i)].unsqueeze(2).contiguous() for i in range(count)]
        calls = [
            op.prepare_call(query, key, value, out, state, cached + i % every, options, threads)
            for i, query in enumerate(queries)
        ]
        return Decode(case, options, state, queries, out, calls, [0])

    @property
    def cached(self) -> int:
        """Tokens before the new one."""
        return self.case.length - 1

    def run(self) -> torch.Tensor:
        """[1, 1, Hq, D], the same tensor at every call. As ExecuTorch would call the kernel: no dispatch is timed."""
        self.calls[self.made[0] % len(self.calls)]()
        self.made[0] += 1
        return self.out

    @property
    def cache_bytes(self) -> int:
        """Keys, values, summaries, boundaries and kept selections, for the tokens that the cache can hold."""
        return sum(tensor.nbytes for tensor in self.state.tensors())

    def prove(self, name: str) -> float:
        """The error of one call against float64 over what the cache holds of the list that the op selected.

        Dense lists hold all tokens. What a narrow cache loses of its tokens is the op's tests' to bound.
        """
        query = self.queries[self.made[0] % len(self.queries)]
        position = self.cached + self.made[0] % self.options.reselect
        answer = self.run()
        lists = op.native_lists(query, self.state, position, self.options)
        errors = []
        keys = self.state.keys().transpose(2, 3).flatten(1, 2)  # [Hkv, 16 M, D]
        values = self.state.values().flatten(1, 2)
        for stored, given in ((keys, self.case.key), (values, self.case.value)):
            latest = relative_l2(stored[:, position].float().numpy(), given[0, :, -1].numpy())
            prove(f"{name}: the token that it appends", latest, NARROW_CACHE)
        for head in range(self.case.query_heads):
            kv_head = head // (self.case.query_heads // self.case.kv_heads)
            tokens = (torch.tensor(lists[kv_head][0])[:, None] * MICRO_BLOCK + torch.arange(MICRO_BLOCK)).flatten()
            tokens = tokens[tokens <= position]
            key, value = (stored[kv_head, tokens].double() for stored in (keys, values))
            weights = (self.options.scale * query[0, head].double() @ key.T).softmax(-1)
            errors.append(relative_l2(answer[0, :, head].float().numpy(), (weights @ value).numpy()))
        prove(name, max(errors), tolerance("op_fp32"))
        return max(errors)


def decode_pair(
    case: AttentionCase, budget: int, kv_dtype: str, threads: int, tokens: int = 1
) -> tuple[Decode, Decode]:
    """(dense, sparse) after case.length - 1 tokens, over one cache that both read, with room for `tokens` more.

    Raises EdgerunError for a cache dtype that this build's op does not have.
    """
    if kv_dtype not in KV_DTYPES:
        raise EdgerunError(f"a {kv_dtype} cache: this build's op has {', '.join(KV_DTYPES)}; left out")
    dtype = KV_DTYPES[kv_dtype]
    sparse, dense = attention_options(case.scale, budget), attention_options(case.scale, 0)
    state = AttentionState.allocate(case.kv_heads, case.head_dim, case.length - 1 + tokens, sparse, dtype)
    op.attend(case.query, case.key, case.value, state, torch.tensor([0]), sparse)
    empty = AttentionState.allocate(case.kv_heads, case.head_dim, MICRO_BLOCK, dense, dtype)
    shared = dataclasses.replace(empty, key_cache=state.key_cache, value_cache=state.value_cache)
    return Decode.make(case, dense, shared, threads), Decode.make(case, sparse, state, threads)


def keeping_selections(sparse: Decode, every: int, threads: int) -> Decode:
    """`sparse` where one selection serves `every` tokens, over the same cache: its runs differ in turn."""
    options = dataclasses.replace(sparse.options, reselect=every)
    kept = torch.zeros(sparse.case.kv_heads, options.selection_integers, dtype=torch.int32)
    one = Decode.make(sparse.case, options, dataclasses.replace(sparse.state, selection=kept), threads)
    for _ in range(every):  # the tokens of one turn are in the cache from here on
        one.prove(f"edgerun sparse, selecting every {every} tokens")
    return one


def native_candidate(name: str, native: Native, run: Callable[[], object] | None = None) -> Candidate:
    """A candidate of a prefill row; its realised density is that of its last run."""
    return Candidate(name, run or native.run, {"role": "sparse" if native.options.budget else "dense"})
