"""Recipe: every choice that shapes a text bundle. Frozen; its hash names the build, whatever the file is called."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

from edgerun.errors import ExportError

MICRO_BLOCK = 16  # tokens; the same unit as csrc/ops/dhsa_attention/dhsa_attention.h
BOUNDARY_REACH = 12  # tokens after an edge that must be there before its cut is decided
MAX_CHUNK = 64  # tokens


@dataclasses.dataclass(frozen=True)
class DhsaOptions:
    """Settings of dynamic hierarchical sparse attention; csrc/ops/dhsa_attention/dhsa_attention.h explains them."""

    budget: int = 2048  # most distinct key tokens per query tile and KV head
    tile: int = 64  # queries that share one selection
    sink: int = 16  # first tokens, always attended
    dense_tail: int = 0  # a call of 2..dense_tail tokens attends densely; 0: never
    dense_layers: int = 0  # first layers that stay dense
    chunking: Literal["fixed", "cosine"] = "cosine"
    boundary_threshold: float = 0.25
    pooling: Literal["mean", "sqrt", "centred", "minmax", "moments"] = "moments"
    query_pooling: Literal["mean", "max"] = "max"
    refine: int = 12  # channels of the keys that a single query (decode) reads to rank the best again; 0: never
    selector: Literal["chunk", "block-topk", "window-sink"] = "chunk"  # block-topk: fixed chunking, mean pooling
    reselect: int = 1  # tokens of decode that one selection serves

    def minimum_budget(self) -> int:
        """Smallest budget that always holds the sink, the local band and the tile itself, in tokens."""
        return self.sink + MAX_CHUNK + BOUNDARY_REACH + self.tile + self.reselect - 1

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ExportError(f"tile is {self.tile} tokens; it must be at least 1")
        if self.sink < 0 or self.sink % MICRO_BLOCK:
            raise ExportError(f"sink is {self.sink} tokens; it must be a multiple of {MICRO_BLOCK}")
        if self.dense_tail < 0 or self.dense_layers < 0 or self.refine < 0:
            raise ExportError(
                f"dense_tail is {self.dense_tail}, dense_layers {self.dense_layers} and refine {self.refine}; "
                "none can be below 0"
            )
        if self.reselect < 1:
            raise ExportError(f"reselect is {self.reselect} tokens; it must be at least 1 (select for every token)")
        if self.budget < self.minimum_budget():
            raise ExportError(
                f"budget is {self.budget} tokens, below its minimum of {self.minimum_budget()} "
                f"(sink {self.sink} + local {MAX_CHUNK + BOUNDARY_REACH} + tile {self.tile} + reselect "
                f"{self.reselect} - 1): raise --budget, or lower --tile, --sink or --reselect"
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what a text bundle computes and how much memory it takes."""

    attention: Literal["dhsa", "dense"] = "dhsa"
    dhsa: DhsaOptions = DhsaOptions()
    max_context: int | None = None  # tokens; None: the model's own limit
    prefill_slice: int = 512  # most tokens per call
    quantize: Literal["none", "int8", "8da4w"] = "none"
    dtype: Literal["fp32", "fp16"] = "fp32"
    kv_dtype: Literal["auto", "fp32", "fp16", "int8"] = "auto"  # of the key/value cache; auto: dtype
    embedding_dtype: Literal["auto", "fp32", "fp16", "int8"] = "auto"  # auto: int8 when quantized, else dtype

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values, as the manifest stores it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Recipe:
        """The recipe that a manifest stores."""
        return Recipe(**{**values, "dhsa": DhsaOptions(**values["dhsa"])})

    def hash(self, checkpoint_hash: str) -> str:
        """sha256 (hex) over this recipe and the checkpoint it is applied to: the identity of a build."""
        text = json.dumps({"recipe": self.to_json(), "checkpoint": checkpoint_hash}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
