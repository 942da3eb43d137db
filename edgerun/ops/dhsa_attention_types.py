"""What a DHSA attention layer is asked (AttentionOptions) and what it keeps between calls (AttentionState).

csrc/ops/dhsa_attention/dhsa_attention.h gives the meaning of every field; the enums carry its numbers.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal

import torch

from edgerun.errors import EdgerunError
from edgerun.recipe import BOUNDARY_REACH, MAX_CHUNK, MICRO_BLOCK, DhsaOptions

BOUNDARY_WINDOW = 4  # keys averaged on either side of a gap
REFINE_FACTOR, REFINE_LEAST = 2, 256  # micro-blocks ranked again: so many times those chosen, at least so many
BOUNDARY_SPAN = 8  # a cut may be caused by a gap this many tokens from its edge
MAX_BLOCKS = 1 << 16  # micro-block ids are 16 bits wide
CACHE_DTYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2}  # the op's; the reference takes any float dtype
KEPT_HEADER = 4  # integers before the micro-blocks of a kept list: last position, calls left, L / 16, count
SCALE_CHANNELS = 32  # of a key that share a scale in an int8 cache


class Chunking(enum.IntEnum):
    """Where a chunk may start besides every 64th token."""

    FIXED = 0
    COSINE = 1


class Pooling(enum.IntEnum):
    """How the summaries of a chunk become its score."""

    MEAN = 0
    SQRT = 1
    CENTRED = 2
    MINMAX = 3
    MOMENTS = 4


class QueryPooling(enum.IntEnum):
    """How the rows of a query group become the vectors that are scored."""

    MEAN = 0
    MAX = 1


class Selector(enum.IntEnum):
    """What ranks the candidates: their chunk's score, or how recent they are."""

    CHUNK = 0
    RECENT = 1


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """The scalar arguments of `edgerun::dhsa_attention`, in the order of its schema."""

    scale: float
    softcap: float = 0.0  # 0: none
    window: int = 0  # tokens, 0: none
    budget: int = 0  # tokens, 0: dense
    tile: int = 64  # query tokens
    sink: int = 16  # tokens
    dense_tail: int = 0  # tokens
    chunking: Chunking = Chunking.COSINE
    boundary_threshold: float = 0.25  # 1 - cosine
    finds_boundaries: bool = False
    pooling: Pooling = Pooling.MEAN
    query_pooling: QueryPooling = QueryPooling.MAX
    selector: Selector = Selector.CHUNK
    refine: int = 0  # key channels, 0: none
    reselect: int = 1  # tokens of decode that one selection serves

    def __post_init__(self) -> None:
        """Raises EdgerunError for settings that the op cannot serve."""
        if self.window < 0 or self.softcap < 0 or self.dense_tail < 0 or self.budget < 0 or self.refine < 0:
            raise EdgerunError(
                f"window {self.window}, softcap {self.softcap}, dense_tail {self.dense_tail}, budget {self.budget} and "
                f"refine {self.refine} must each be 0 (off) or more"
            )
        if self.tile < 1:
            raise EdgerunError(f"tile is {self.tile} tokens; it must be at least 1")
        if self.sink < 0 or self.sink % MICRO_BLOCK:
            raise EdgerunError(f"sink is {self.sink} tokens; it must be a multiple of {MICRO_BLOCK}")
        if self.reselect < 1:
            raise EdgerunError(f"reselect is {self.reselect} tokens; it must be at least 1 (every token)")
        minimum = self.sink + MAX_CHUNK + BOUNDARY_REACH + self.tile + self.reselect - 1
        if 0 < self.budget < minimum:
            raise EdgerunError(
                f"budget is {self.budget} tokens, below its minimum of {minimum} (sink {self.sink} + local "
                f"{MAX_CHUNK + BOUNDARY_REACH} + tile {self.tile} + reselect {self.reselect} - 1): raise the budget, "
                "or lower tile, sink or reselect; 0 is dense"
            )

    @staticmethod
    def from_recipe(
        dhsa: DhsaOptions,
        *,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
        finds_boundaries: bool = False,
        dense: bool = False,
    ) -> AttentionOptions:
        """One layer's options. A dense or a windowed layer has no budget, so it keeps no summaries and no boundaries.

        "block-topk" is fixed 64-token chunks with mean pooling. "window-sink" attends the sink and the most recent
        blocks whatever the chunks are, so it takes the fixed ones, which cost nothing to find.
        """
        if dense or window > 0:
            return AttentionOptions(scale=scale, softcap=softcap, window=window)
        cosine = dhsa.chunking == "cosine" and dhsa.selector == "chunk"
        return AttentionOptions(
            scale=scale,
            softcap=softcap,
            budget=dhsa.budget,
            tile=dhsa.tile,
            sink=dhsa.sink,
            dense_tail=dhsa.dense_tail,
            chunking=Chunking.COSINE if cosine else Chunking.FIXED,
            boundary_threshold=dhsa.boundary_threshold,
            finds_boundaries=finds_boundaries,
            pooling=Pooling.MEAN if dhsa.selector == "block-topk" else Pooling[dhsa.pooling.upper()],
            query_pooling=QueryPooling[dhsa.query_pooling.upper()],
            selector=Selector.RECENT if dhsa.selector == "window-sink" else Selector.CHUNK,
            refine=dhsa.refine if dhsa.selector == "chunk" and dhsa.pooling == "moments" else 0,
            reselect=dhsa.reselect,
        )

    @property
    def kind(self) -> Literal["window", "dhsa", "dense"]:
        """What the manifest calls a layer with these options."""
        if self.window > 0:
            return "window"
        return "dhsa" if self.budget > 0 else "dense"

    @property
    def keeps_summaries(self) -> bool:
        """Whether calls write chunk summaries."""
        return self.budget > 0 and self.selector == Selector.CHUNK

    @property
    def keeps_selection(self) -> bool:
        """Whether decode keeps what it selected for the tokens after."""
        return self.budget > 0 and self.window == 0 and self.reselect > 1

    @property
    def selection_integers(self) -> int:
        """Integers that a KV head keeps of its last selection: KEPT_HEADER of them, then the chosen micro-blocks."""
        return KEPT_HEADER + self.budget // MICRO_BLOCK

    def refines(self, rows: int) -> bool:
        """Whether a query group of so many rows ranks its best candidates again, by their keys."""
        return self.refine > 0 and rows == 1 and self.pooling == Pooling.MOMENTS

    @property
    def summary_vectors(self) -> int:
        """Vectors per micro-block: 2 with min-max (minimum, maximum) and moments (mean, variance) pooling, else 1."""
        return 2 if self.pooling in (Pooling.MINMAX, Pooling.MOMENTS) else 1

    def arguments(self) -> tuple[float, float, int, int, int, int, int, int, float, bool, int, int, int, int, int]:
        """The values as the op's schema orders them, enums as plain integers."""
        return (
            float(self.scale),
            float(self.softcap),
            self.window,
            self.budget,
            self.tile,
            self.sink,
            self.dense_tail,
            int(self.chunking),
            float(self.boundary_threshold),
            self.finds_boundaries,
            int(self.pooling),
            int(self.query_pooling),
            int(self.selector),
            self.refine,
            self.reselect,
        )


@dataclasses.dataclass(frozen=True)
class AttentionState:
    """What one layer keeps. The tensors are written in place by each call; `boundaries` is shared between layers.

    key_cache [Hkv, M, D, 16] and value_cache [Hkv, M, 16, D], M micro-blocks of 16 tokens; summaries [Hkv, M, P, D],
    or [Hkv, 0, 1, D] where not kept; boundaries uint8 [M + 1], or [0] where not read. int8 caches hold micro-blocks of
    bytes, integers and then float16 scales: keys { [D, 16], [ceil(D / 32), 16] }, values { [16, D], [16] }.
    selection int32 [Hkv, 4 + budget / 16], what decode selected last, or [Hkv, 0] where every token selects.
    """

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    summaries: torch.Tensor
    boundaries: torch.Tensor
    selection: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int32))

    @staticmethod
    def allocate(
        kv_heads: int,
        head_dim: int,
        max_context: int,
        options: AttentionOptions,
        dtype: torch.dtype = torch.float32,
        boundaries: torch.Tensor | None = None,
    ) -> AttentionState:
        """Zeroed state for at least `max_context` tokens; dtype: the caches'; boundaries: another layer's, to share it.

        Raises EdgerunError when the context is empty or longer than 16-bit micro-block ids can name.
        """
        blocks = -(-max_context // MICRO_BLOCK)
        if not 0 < blocks <= MAX_BLOCKS:
            raise EdgerunError(f"max_context is {max_context} tokens; the cache holds 1 to {MAX_BLOCKS * MICRO_BLOCK}")
        if boundaries is None or options.budget == 0:
            boundaries = torch.zeros(blocks + 1 if options.budget > 0 else 0, dtype=torch.uint8)
        summaries = (blocks, options.summary_vectors) if options.keeps_summaries else (0, 1)
        key_shape, value_shape = cache_shapes(blocks, head_dim, dtype)
        return AttentionState(
            key_cache=torch.zeros(kv_heads, *key_shape, dtype=dtype),
            value_cache=torch.zeros(kv_heads, *value_shape, dtype=dtype),
            summaries=torch.zeros(kv_heads, *summaries, head_dim, dtype=summaries_dtype(dtype)),
            boundaries=boundaries,
            selection=torch.zeros(
                kv_heads, options.selection_integers if options.keeps_selection else 0, dtype=torch.int32
            ),
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in the order of the op's arguments."""
        return (self.key_cache, self.value_cache, self.summaries, self.boundaries, self.selection)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the caches can hold."""
        return self.key_cache.shape[1] * MICRO_BLOCK

    @property
    def head_dim(self) -> int:
        """D."""
        if self.value_cache.dtype == torch.int8:
            return self.value_cache.shape[2] // MICRO_BLOCK - 2
        return self.value_cache.shape[3]

    def keys(self) -> torch.Tensor:
        """The key cache as floats, [Hkv, M, D, 16]: itself, or what an int8 cache stands for, in float32."""
        if self.key_cache.dtype != torch.int8:
            return self.key_cache
        integers, scales = _split(self.key_cache, self.head_dim)
        shape = (*integers.shape[:2], -1, MICRO_BLOCK)
        each = scales.reshape(shape).repeat_interleave(SCALE_CHANNELS, dim=2)[:, :, : self.head_dim]
        return torch.mul(integers.reshape(shape), each)

    def values(self) -> torch.Tensor:
        """The value cache as floats, [Hkv, M, 16, D]: itself, or what an int8 cache stands for, in float32."""
        if self.value_cache.dtype != torch.int8:
            return self.value_cache
        integers, scales = _split(self.value_cache, self.head_dim)
        return torch.mul(integers.reshape(*integers.shape[:2], MICRO_BLOCK, -1), scales.unsqueeze(3))

    def clone(self) -> AttentionState:
        """An independent copy."""
        return AttentionState(*(tensor.clone() for tensor in self.tensors()))

    def to(self, dtype: torch.dtype) -> AttentionState:
        """A copy whose caches have another float dtype, and summaries that go with it."""
        return AttentionState(
            self.keys().to(dtype, copy=True),
            self.values().to(dtype, copy=True),
            self.summaries.to(summaries_dtype(dtype), copy=True),
            self.boundaries.clone(),
            self.selection.clone(),
        )


def cache_shapes(blocks: int, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one head's key and value cache: elements, or bytes of a micro-block in int8."""
    if dtype != torch.int8:
        return (blocks, head_dim, MICRO_BLOCK), (blocks, MICRO_BLOCK, head_dim)
    scales = -(-head_dim // SCALE_CHANNELS)
    return (blocks, MICRO_BLOCK * (head_dim + 2 * scales)), (blocks, MICRO_BLOCK * (head_dim + 2))


def summaries_dtype(cache: torch.dtype) -> torch.dtype:
    """The summaries' dtype beside a cache of this dtype: half precision, but float64 for a judge in float64."""
    return cache if cache == torch.float64 else torch.float16


def _split(cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [Hkv, M, 16 D] and scales [Hkv, M, ...] of an int8 cache, both in float32."""
    integers, scales = cache[:, :, : MICRO_BLOCK * head_dim], cache[:, :, MICRO_BLOCK * head_dim :]
    return integers.float(), scales.contiguous().view(torch.float16).float()
